"""The process's memory: what a call needs at most beside its inputs and results, and memory that stays where it is.

By the system's own count of resident pages: linux with glibc. Elsewhere nothing is measured, and nothing is kept.
"""

import ctypes
import re
import threading
from pathlib import Path

STATUS, REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -3, -4, -8  # <malloc.h>


def _libc(name):
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return None


def _set(settings):
    mallopt = _libc("mallopt")
    return bool(mallopt and all(mallopt(name, value) for name, value in settings.items()))


def give_back():
    """Freed memory goes back to the system, so that peak() counts what a call has and nothing else. Whether that could
    be had. To be called before there are threads: all share one heap, which malloc_trim reaches."""
    return _set({ARENA_MAX: 1, MMAP_THRESHOLD: 128 << 10})


def keep():
    """Freed memory is kept for the next call: without this every large result is fetched from the system page by page,
    which takes longer than computing it, for all sides alike. Whether that could be had."""
    return _set({MMAP_MAX: 0, TRIM_THRESHOLD: -1})


def peak(call):
    """Bytes that call() had at most, its results among them, beyond what there was before; None: cannot be known here.

    After give_back(), to about a megabyte: the system counts pages in batches. The first call() counts its code too.
    In a thread of its own: the scratch memory that ours keeps from call to call is the thread's, and would be missed.
    """
    trim = _libc("malloc_trim")
    if not trim or not STATUS.exists() or not REFS.exists():
        return None
    found = []

    def measure():
        trim(0)
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
