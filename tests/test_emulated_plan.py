"""The lists and ranges that the CUDA plan kernels make are those of core/plan.h, on random problems."""

import ctypes

import pytest
from cpp_suites import ROOT, Unavailable
from emulator import DESCENDING, RANDOM, SOURCES, Emulator, build_library


@pytest.fixture(scope="module")
def emulator():
    sources = [SOURCES / "plan_check.cu", ROOT / "csrc/cuda/plan.cu", ROOT / "csrc/core/plan.cpp"]
    try:
        emulator = Emulator(build_library("plan", sources))
    except Unavailable as reason:
        pytest.skip(str(reason))
    emulator.library.plan_check.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_bool]
    emulator.library.plan_check.restype = ctypes.c_char_p
    return emulator


@pytest.mark.parametrize("seed", range(0, 400, 20))
def test_plans_agree(emulator, seed):
    emulator.order(RANDOM, seed)
    difference = emulator.library.plan_check(seed, 20, False)
    assert difference is None, difference.decode()


def test_in_descending_order(emulator):
    emulator.order(DESCENDING)
    difference = emulator.library.plan_check(1000, 20, False)
    assert difference is None, difference.decode()


@pytest.mark.parametrize("seed", range(2000, 2200, 20))
def test_nonsense_in_index_tensors_is_survived(emulator, seed):
    emulator.order(RANDOM, seed)
    difference = emulator.library.plan_check(seed, 20, True)
    assert difference is None, difference.decode()
