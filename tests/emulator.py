"""CUDA kernels on the CPU: builds sources with the emulation (tests/emulation) into a library, and talks to it.

Objects and libraries lie in build/emulation under the hash of all they are made of, so nothing is compiled twice.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cpp_suites import ROOT, Unavailable, run

SOURCES = ROOT / "tests" / "emulation"
BUILD = ROOT / "build" / "emulation"
EMULATOR = sorted(SOURCES / f"{name}.cpp" for name in ("emulator", "memory", "shadow", "tensor_core"))

FLAGS = ["-std=c++20", "-O2", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
FLAGS += ["-g1"]  # for the line of a fault that only a signal tells of
FLAGS += ["-ftrivial-auto-var-init=pattern"]  # most variables begin as -1.7e38, not as what lay there
# What is undefined in C++ ends the launch, at its line: an index beyond a local array, an overflow, a shift too wide.
FLAGS += ["-fsanitize=bounds,shift,signed-integer-overflow", "-fsanitize-undefined-trap-on-error"]
FLAGS += ["-fno-tree-tail-merge", "-fno-crossjumping"]
INCLUDES = [f"-I{SOURCES / 'include'}", f"-I{ROOT / 'csrc'}"]
READ, WRITE, WRITE_FIRST = range(3)  # emulation_register
ASCENDING, DESCENDING, RANDOM = range(3)  # emulation_order
BOUNDS, CONTENTS, RACES = range(3)  # emulation_check_level
STATISTICS = ("launches", "blocks", "switches", "mma", "ldmatrix_phases", "ldmatrix_conflicts")


@functools.cache
def compiler():
    """The compiler and its flags for this processor."""
    if platform.machine() != "x86_64":
        raise Unavailable("the emulation is written for x86-64")
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise Unavailable(f"no compiler: {name}")
    features = Path("/proc/cpuinfo").read_text().split()
    return name, *FLAGS, *(("-mavx2", "-mfma") if {"avx2", "fma"} <= set(features) else ())


@functools.cache
def compiler_version():
    return run(compiler()[0], "--version", timeout=60).stdout


@functools.cache
def content_hash(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read_dependencies(path):
    """The files that a compiler's rule for make names."""
    return path.read_text().replace("\\\n", " ").split(":", 1)[1].split()


def make(target, *command):
    """Runs a compiler unless its target is there; two processes may do so at once."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(f".{os.getpid()}{target.suffix}")
        done = run(*command, "-o", unfinished, timeout=1800)
        if done.returncode != 0:
            raise RuntimeError(done.stdout)
        unfinished.replace(target)
    return target


def compile_source(source, flags=()):
    """The object of a source; what it includes is known from the last time it was compiled."""
    # The names of files in messages are those in the tree.
    command = (*compiler(), *INCLUDES, *flags, "-c", "-x", "c++", str(source))
    words = "\0".join((compiler_version(), *command))
    stem = f"{source.stem}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"
    rule = BUILD / f"{stem}.d"

    def target():
        files = read_dependencies(rule)
        if not all(os.path.exists(name) for name in files):
            return None
        key = hashlib.sha256("\0".join([words, *map(content_hash, files)]).encode()).hexdigest()
        return BUILD / f"{stem}-{key[:16]}.o"

    if rule.exists() and (known := target()) and known.exists():
        return known
    fresh = BUILD / f"{stem}.{os.getpid()}.o"
    make(fresh, *command, "-MMD", "-MF", rule.with_suffix(f".{os.getpid()}.d"))
    rule.with_suffix(f".{os.getpid()}.d").replace(rule)
    return fresh.replace(target())


def build_library(name, sources, flags=None, libraries=(), jobs=None):
    """The library of these sources and the emulation; `flags`: of some of the sources. Raises Unavailable, or
    RuntimeError with the compiler's words."""
    flags = flags or {}
    compiler()
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        objects = list(pool.map(lambda s: compile_source(Path(s), flags.get(s, ())), [*EMULATOR, *sources]))
    key = hashlib.sha256("".join([*(o.name for o in objects), *libraries]).encode()).hexdigest()
    target = BUILD / f"lib{name}-{key[:16]}.so"
    return make(target, *compiler(), "-shared", *objects, *libraries, "-ldl", "-lpthread")


class Emulator:
    """A library of build_library. `register` keeps what it is given alive."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        self.kept = []
        c = self.library
        c.emulation_register.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_char_p]
        c.emulation_register.restype = ctypes.c_void_p
        c.emulation_unregister.argtypes = [ctypes.c_void_p]
        c.emulation_order.argtypes = [ctypes.c_int, ctypes.c_uint32]
        c.emulation_last_error.restype = ctypes.c_char_p
        self.reset()

    def reset(self):
        self.library.emulation_unregister_all()
        self.kept.clear()
        self.order(ASCENDING)
        self.check_level(RACES)
        self.device(90, 4)

    def register(self, tensor, access, name):
        """The tensor's address for kernels; all of its storage from there on is its range."""
        size = tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size()
        self.kept.append(tensor)
        address = self.library.emulation_register(tensor.data_ptr(), size, access, name.encode())
        if address is None and size:
            raise ValueError(self.error())
        return ctypes.c_void_p(address)

    def order(self, mode, seed=0):
        self.library.emulation_order(mode, seed)

    def check_level(self, level):
        self.library.emulation_check_level(level)

    def device(self, sm, multiprocessors):
        self.library.emulation_device(sm, multiprocessors)

    def error(self):
        return self.library.emulation_last_error().decode()

    def statistics(self):
        """What was counted since this was last asked."""
        numbers = (ctypes.c_uint64 * len(STATISTICS))()
        self.library.emulation_statistics(numbers)
        return dict(zip(STATISTICS, numbers))
