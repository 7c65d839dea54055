"""The operators on an emulated GPU (tests/emulation/binding.cpp): CPU tensors, csrc/torch's code, csrc/cuda's kernels.

    with emulated_device():
        functional.attention(query, key, value)  # runs the CUDA kernels

A fault that the emulation finds in a kernel is a RuntimeError with its file and line.
"""

import contextlib
import ctypes
import functools
from pathlib import Path

import torch
from cpp_suites import ROOT, Unavailable
from emulator import SOURCES, Emulator, build_library

import mmca_ext  # noqa: F401 (the operators must be there before their implementation is replaced)

CSRC = ROOT / "csrc"
BINDING = [SOURCES / "binding.cpp", *(CSRC / "torch" / f"{name}.cpp" for name in ("arguments", "ops", "linear_ops"))]


class EmulatedDevice(Emulator):
    def __init__(self, path):
        super().__init__(path)
        c = self.library
        c.emulated_device_enable.argtypes = [ctypes.c_bool]
        c.emulated_device_launches.argtypes = [ctypes.c_size_t]
        c.emulated_device_launches.restype = ctypes.c_uint64
        c.emulated_device_kernel.argtypes = [ctypes.c_size_t]
        c.emulated_device_kernel.restype = ctypes.c_char_p

    def enable(self, on):
        self.library.emulated_device_enable(on)

    def launches(self):
        """Kernel -> how often it has run."""
        counts, index = {}, 0
        while name := self.library.emulated_device_kernel(index):
            counts[name.decode()] = self.library.emulated_device_launches(index)
            index += 1
        return counts


@functools.cache
def load():
    """The library of all CUDA kernels, built if need be: minutes the first time."""
    torch_folder = Path(torch.__file__).parent
    includes = torch_folder / "include", torch_folder / "include" / "torch" / "csrc" / "api" / "include"
    flags = [f"-DBUILT_FOR_TORCH={torch.__version__}", "-O1", "-fvisibility=hidden", "-fno-gnu-unique"]
    flags += [f"-isystem{folder}" for folder in includes]
    libraries = (f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_folder / 'lib'}")
    kernels = [CSRC / "core" / "names.cpp", *sorted((CSRC / "cuda").rglob("*.cu"))]
    return EmulatedDevice(
        build_library("device", [*BINDING, *kernels], dict.fromkeys(BINDING, flags), (*libraries, "-Wl,-z,defs"))
    )


def load_or_skip():
    import pytest

    try:
        return load()
    except Unavailable as reason:
        pytest.skip(str(reason))


@contextlib.contextmanager
def emulated_device():
    """CPU tensors are the emulated GPU's, and the operators run there."""
    device = load()
    device.enable(True)
    try:
        yield device
    finally:
        device.enable(False)
        device.reset()
