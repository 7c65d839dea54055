"""The process's memory: what a call needs at most beside its inputs and results, and memory that stays where it is.

By the kernel's own count of resident pages: linux with glibc. Elsewhere nothing is measured, and nothing is kept.
"""

import ctypes
import re
import threading
from pathlib import Path

STATUS, REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8  # <malloc.h>


def _libc(name):
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return None


def keep():
    """Freed memory is kept for the next call: without this every large result is fetched from the system page by page,
    which takes longer than computing it, for all sides alike. Whether that could be had.

    All threads share one heap, so that malloc_trim, below, reaches it. To be called before there are threads."""
    mallopt = _libc("mallopt")
    settings = {ARENA_MAX: 1, MMAP_MAX: 0, TRIM_THRESHOLD: -1}
    return bool(mallopt and all(mallopt(name, value) for name, value in settings.items()))


def peak(call):
    """Bytes that call() had at most, its results among them, beyond what there was before; None: cannot be known here.

    In a thread of its own: the scratch memory that ours keeps from call to call is the thread's, and would be missed.
    To about a megabyte: the system counts pages in batches. After keep(), else freed memory of other heaps is missed,
    and a call of call(), else its code counts.
    """
    trim = _libc("malloc_trim")
    if not trim or not STATUS.exists() or not REFS.exists():
        return None
    found = []

    def measure():
        trim(0)  # memory that was freed and kept would be missed likewise
        before = _resident("VmRSS")
        try:
            REFS.write_text("5")  # the peak is now what is there
            call()
        except (OSError, RuntimeError):  # a container without clear_refs; a peer that fails is said elsewhere
            return
        found.append(max(0, _resident("VmHWM") - before))

    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()
    return found[0] if found else None


def _resident(name):
    return int(re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())[1]) * 1024
