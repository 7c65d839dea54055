"""What the device primitives compute (csrc/cuda/primitives.cuh), against the PTX ISA: those of the emulation and, where
there is a GPU, those of the GPU. So a misreading cannot be shared by kernels and emulation."""

import ctypes
import functools
import math
import shutil

import pytest
import torch
from cpp_suites import ROOT, Unavailable, run
from emulator import (
    ASCENDING,
    BUILD,
    DESCENDING,
    RANDOM,
    READ,
    SOURCES,
    WRITE,
    WRITE_FIRST,
    Emulator,
    build_library,
)


class Emulated:
    """tests/emulation/probes.cu on the CPU."""

    def __init__(self, library, order):
        self.emulator = Emulator(library)
        self.emulator.order(*order)

    def run(self, kernel, *arguments):
        """Tensors go with what the kernel may do to them."""
        e = self.emulator
        e.library.emulation_unregister_all()
        given = [
            e.register(a[0], a[1], f"argument {i}") if isinstance(a, tuple) else a for i, a in enumerate(arguments)
        ]
        status = getattr(e.library, f"probe_{kernel}")(*given)
        assert status == 0, e.error()


class OnGpu:
    """The same on the GPU."""

    def __init__(self, library):
        self.library = library

    def run(self, kernel, *arguments):
        tensors = {i: a[0].cuda() for i, a in enumerate(arguments) if isinstance(a, tuple)}
        given = [ctypes.c_void_p(tensors[i].data_ptr()) if i in tensors else a for i, a in enumerate(arguments)]
        torch.cuda.synchronize()
        status = getattr(self.library, f"probe_{kernel}")(*given)
        self.library.probe_error_text.restype = ctypes.c_char_p
        assert status == 0, self.library.probe_error_text(status).decode()
        torch.cuda.synchronize()
        for i, tensor in tensors.items():
            arguments[i][0].copy_(tensor)


NVCC = ["nvcc", "-std=c++17", "-O2", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}"]


def compiled_by_nvcc(name, *flags):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    BUILD.mkdir(parents=True, exist_ok=True)
    target = BUILD / f"lib{name}-gpu.so"
    done = run(*NVCC, *flags, "-Xcompiler=-fPIC", "-shared", SOURCES / f"{name}.cu", "-o", target, timeout=600)
    assert done.returncode == 0, done.stdout
    return target


@functools.cache
def emulated():
    try:
        return build_library("probes", [SOURCES / "probes.cu"])
    except Unavailable as reason:
        return reason


@functools.cache
def on_gpu():
    return OnGpu(ctypes.CDLL(str(compiled_by_nvcc("probes", "-arch=native"))))


ORDERS = {
    "ascending": (ASCENDING, 0),
    "descending": (DESCENDING, 0),
    "random": (RANDOM, 1),
    "random again": (RANDOM, 2),
}


@pytest.fixture(params=[*ORDERS, pytest.param("gpu", marks=pytest.mark.cuda)])
def probes(request):
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        return on_gpu()
    if isinstance(emulated(), Unavailable):
        pytest.skip(str(emulated()))
    return Emulated(emulated(), ORDERS[request.param])


def emulated_only(probes):
    if not isinstance(probes, Emulated):
        pytest.skip("of the emulation")


@pytest.mark.parametrize("name", ["probes", "faults"])
def test_emulated_kernels_are_cuda(name):
    """They compile with the real primitives."""
    compiled_by_nvcc(name, "-arch=sm_80")


# ---------------------------------------------------------------- tensor core, after the PTX ISA
#
# "Matrix Fragments for mma.m16n8k16 with floating point type" and "ldmatrix", formula by formula. A fragment's elements
# are numbered through its registers, two 16-bit ones in each, the lower half first.


def a_place(lane, i):
    group, thread = lane >> 2, lane % 4
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    column = thread * 2 + (i & 1) if i < 4 else thread * 2 + (i & 1) + 8
    return row, column


def b_place(lane, i):
    group, thread = lane >> 2, lane % 4
    return (thread * 2 + (i & 1) if i < 2 else thread * 2 + (i & 1) + 8), group


def d_place(lane, i):
    group, thread = lane >> 2, lane % 4
    return (group if i < 2 else group + 8), thread * 2 + (i & 1)


def fragment(matrix, place, elements):
    return torch.stack([matrix[place(lane, i)] for lane in range(32) for i in range(elements)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma(probes, dtype):
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        # Integers of 8 bits, which both types hold; sums below 2^24, so nothing is rounded.
        a, b, d = (torch.randint(-255, 256, shape, generator=g) for shape in ((16, 16), (16, 8), (16, 8)))
        a_lanes, b_lanes = fragment(a, a_place, 8).to(dtype), fragment(b, b_place, 4).to(dtype)
        d_lanes = fragment(d, d_place, 4).float()
        probes.run("mma", dtype == torch.float16, (a_lanes, READ), (b_lanes, READ), (d_lanes, WRITE))
        assert torch.equal(d_lanes, fragment(a @ b + d, d_place, 4).float())


def test_mma_adds_in_fp32(probes):
    """2^24 + 1 - 2^24 is 0, k ascending. (A GPU has an order and a few bits of its own.)"""
    emulated_only(probes)
    a, b, d = torch.zeros(16, 16), torch.ones(16, 8), torch.zeros(16, 8)
    a[:, 0], a[:, 1], a[:, 2] = 2.0**24, 1, -(2.0**24)
    given = [fragment(a, a_place, 8).bfloat16(), fragment(b, b_place, 4).bfloat16(), fragment(d, d_place, 4)]
    probes.run("mma", False, *((x, WRITE) for x in given))
    assert torch.equal(given[2], torch.zeros(128))


def ldmatrix(probes, memory, addresses, transposed):
    """[lane, register, half]."""
    out = torch.full((128,), -1, dtype=torch.int32)
    probes.run("ldmatrix", (memory, READ), memory.numel() * 2, (addresses, READ), transposed, (out, WRITE_FIRST))
    return out.view(torch.int16).view(32, 4, 2)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(probes, transposed):
    """Rows anywhere, some of them twice."""
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        memory = torch.arange(1024, dtype=torch.int16)
        rows = torch.randint(0, 128, (32,), generator=g, dtype=torch.int32)
        registers = ldmatrix(probes, memory, rows * 16, transposed)
        for lane in range(32):
            for i in range(4):
                # Threads 8 i to 8 i + 7 give the addresses of matrix i's rows 0 to 7.
                matrix = torch.stack([memory.view(-1, 8)[rows[8 * i + row]] for row in range(8)])
                matrix = matrix.T if transposed else matrix
                row, column = lane // 4, 2 * (lane % 4)
                assert registers[lane, i].tolist() == [matrix[row, column], matrix[row, column + 1]]


@pytest.mark.parametrize("stride, conflicts", [(16, 0), (32, 1), (64, 3), (128, 7), (144, 0), (0, 0)])
def test_ldmatrix_bank_conflicts(probes, stride, conflicts):
    """Eight rows of 16 bytes fill the 32 banks of 4 bytes if their addresses differ modulo 128, or are the same."""
    emulated_only(probes)
    probes.emulator.statistics()
    addresses = torch.arange(32, dtype=torch.int32) % 8 * stride
    ldmatrix(probes, torch.zeros(1024, dtype=torch.int16), addresses, False)
    counted = probes.emulator.statistics()
    assert (counted["ldmatrix_phases"], counted["ldmatrix_conflicts"]) == (4, 4 * conflicts)


# ---------------------------------------------------------------- the other primitives


def bits(x):
    return x.view(torch.int16).int() & 0xFFFF


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widening(probes, dtype):
    patterns = torch.arange(65536).to(torch.int32).to(torch.int16)
    numbers = torch.zeros(65536)
    probes.run("widen", dtype == torch.float16, 256, (patterns, READ), (numbers, WRITE_FIRST))
    assert torch.equal(numbers.nan_to_num(12345.0), patterns.view(dtype).float().nan_to_num(12345.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrowing(probes, dtype):
    """To nearest, ties to even: all 16-bit numbers, the middles between two, and the floats to either side of those."""
    every = torch.arange(65536).to(torch.int32).to(torch.int16).view(dtype).float()
    every = every[every.isfinite()].sort().values
    middles = ((every[1:].double() + every[:-1].double()) / 2).float()
    infinite = torch.tensor(math.inf)
    beyond = torch.tensor([math.inf, -math.inf, math.nan, 65519.99, 65520.0, 3.4e38, -3.4e38, 1e-45, -1e-45])
    numbers = torch.cat([every, middles, middles.nextafter(infinite), middles.nextafter(-infinite), beyond])
    numbers = torch.cat([numbers, torch.zeros(-numbers.numel() % 512)])
    result = torch.zeros(numbers.numel() // 2, dtype=torch.int32)
    probes.run("narrow", dtype == torch.float16, numbers.numel() // 512, (numbers, READ), (result, WRITE_FIRST))
    got, wanted = result.view(torch.int16).view(dtype), numbers.to(dtype)
    assert torch.equal(bits(got)[~numbers.isnan()], bits(wanted)[~numbers.isnan()])
    assert bits(got)[numbers.isnan()].tolist() == [0x7FFF]  # the PTX ISA's NaN


def test_exp2(probes):
    """Within 2 ulp, 0 below 2^-126, infinite above the largest float; either to both sides of these bounds."""
    special = torch.tensor([-math.inf, math.inf, math.nan, -126.0, -0.0, 1e-40])
    x = torch.cat([torch.linspace(-160, 130, 100_000), special])
    x = torch.cat([x, torch.zeros(-x.numel() % 256)])
    y = torch.zeros_like(x)
    probes.run("exp2", x.numel() // 256, (x, READ), (y, WRITE_FIRST))
    exact, margin = torch.exp2(x.double()), 2 * 2.0**-23
    smallest, largest = 2.0**-126, torch.finfo(torch.float32).max
    assert (y[exact < smallest * (1 - margin)] == 0).all()
    assert y[exact > largest * (1 + margin)].isinf().all()
    normal = (exact >= smallest) & (exact <= largest * (1 - margin))
    assert ((y[normal] - exact[normal]).abs() <= margin * exact[normal]).all()
    assert torch.equal(y.isnan(), x.isnan())


@pytest.mark.parametrize(
    "grid, block", [((3, 1, 1), (1024, 1, 1)), ((2, 3, 4), (8, 4, 2)), ((70_000, 1, 1), (32, 1, 1))]
)
def test_indices(probes, grid, block):
    threads = math.prod(block)
    out = torch.full((math.prod(grid) * threads,), -1, dtype=torch.int32)
    probes.run("index", (out, WRITE_FIRST), *((ctypes.c_uint * 3)(*size) for size in (grid, block)))
    assert torch.equal(out, torch.arange(out.numel(), dtype=torch.int32) // 32 * 32)


def test_collectives(probes):
    out = torch.zeros(68, dtype=torch.float64)
    probes.run("collectives", (out, WRITE_FIRST))
    lanes = torch.arange(32)
    assert torch.equal(out[:32], 100.0 + 31 - lanes.double())
    assert torch.equal(out[32:64], 100.0 + (lanes ^ 5).double())
    assert out[64:].tolist() == [1, 0, 1, 0]


def test_copies(probes):
    source = torch.arange(64 * 32, dtype=torch.int32).to(torch.uint8)
    result = torch.zeros_like(source)
    probes.run("copy", (source, READ), (result, WRITE_FIRST))
    wanted = source.view(64, 32).clone()
    wanted[torch.arange(64) % 3 == 2] = 0
    assert torch.equal(result.view(64, 32), wanted)


def test_atomic_additions(probes):
    f, d = torch.zeros(4), torch.zeros(1, dtype=torch.float64)
    probes.run("add", (f, WRITE), (d, WRITE))
    assert (f.tolist(), d.tolist()) == ([320, 0, 640, 960], [160])
