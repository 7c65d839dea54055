"""The CUDA emulation itself (tests/emulation): it finds every planted fault, and passes the same kernel without it.

What its primitives compute is for test_primitives.py."""

import ctypes
import functools
import re
import sys
import threading

import pytest
import torch
from cpp_suites import ROOT, Unavailable, run
from emulation.mutate import command_for, mutants_of
from emulator import (
    ASCENDING,
    BOUNDS,
    CONTENTS,
    DESCENDING,
    RANDOM,
    READ,
    SOURCES,
    WRITE,
    WRITE_FIRST,
    Emulator,
    build_library,
)

ORDERS = [(ASCENDING, 0), (DESCENDING, 0), *((RANDOM, seed) for seed in range(6))]
TEXT = (SOURCES / "faults.cu").read_text()
FAULTS = re.findall(r"ENTRY\((\w+)\)[,}]", TEXT)
BLOCKS, THREADS = 3, 128  # of its kernels

# What the error says after file, line, block and thread.
MESSAGES = {
    "no_syncthreads": r"race: (read of .*, written by thread \d+ at faults.cu:\d+|write to .*, which warp \d reads)",
    "no_syncwarp": r"race: (read of .*, written by thread \d+ at faults.cu:\d+|write to .*, which lane \d+ .* reads)",
    "shuffle_instead_of_syncwarp": r"race: (read of shared memory|write to shared memory .*, which lane)",
    "overwrites_what_another_warp_reads": r"race: (write to .*, which warp \d reads with no|read of .*, written by)",
    "overwrites_what_its_warp_reads": r"race: (write to .*, which lane \d+ of the warp reads|read of .*, written by)",
    "two_warps_write": r"race: write to shared memory .*, also written by thread \d+",
    "two_lanes_write": r"race: write to scratch at byte \d+, also written by thread \d+",
    "global_memory_without_syncthreads": r"(race: read of scratch|read of uninitialised scratch)",
    "half_words": r"(race: read of|read of uninitialised) shared memory",
    "ldmatrix_of_unordered_rows": r"race: read of shared memory",
    "barriers_apart": r"thread \d+ is here while others of its block are at faults.cu:\d+",
    "barrier_of_some": r"deadlock: threads 0-63 wait for their block at faults.cu:\d+; threads 64-127 have returned",
    "returns_before_barrier": r"deadlock: threads 0-4 wait .*; threads 5-5 have returned; threads 6-127 wait",
    "half_a_warp": r"deadlock: threads 0-15 wait for their warp at faults.cu:\d+; threads 16-31 have returned",
    "collectives_apart": r"thread \d+ is here while others of its warp are at faults.cu:\d+",
    "one_lane_does_not_multiply": r"deadlock: threads 0-30 wait for their warp at .*; threads 31-31 have returned",
    "warp_waits_while_block_waits": r"deadlock: threads 0-2 wait for their warp at .*; threads 3-127 wait for their b",
    "mask_beyond_the_warp": r"shfl_xor with mask 32",
    "beyond_shared": r"shared memory: 16 bytes at byte 2048 of 2048",
    "before_shared": r"shared memory: 4 bytes at byte -4 of 2048",
    "misaligned_shared": r"shared memory: 8 bytes at byte \d+, misaligned",
    "ldmatrix_misaligned": r"shared memory: 16 bytes at byte 152, misaligned",
    "uninitialised_shared": r"read of uninitialised shared memory at byte 308",
    "contents_of_another_block": r"read of uninitialised shared memory",
    "beyond_global": r"global memory: reads 4 bytes at byte 1536 of in, which has 1536",
    "before_global": r"global memory: writes 4 bytes at byte -4 of out, which has 1536",
    "partly_beyond_global": r"global memory: writes 16 bytes at byte 6144 of scratch, which has 6144",
    "unregistered": r"global memory: reads 4 bytes at 0x7000, which is in no registered range",
    "misaligned_global": r"global memory: reads 16 bytes at byte 8 of in, misaligned",
    "misaligned_pair": r"global memory: adds to 4 bytes at byte 4 of total, misaligned",
    "uninitialised_global": r"read of uninitialised scratch at byte \d+",
    "adds_to_nothing": r"atomic addition to uninitialised scratch at byte 0",
    "writes_to_read_only": r"global memory: writes in, which is read only",
    "adds_to_read_only": r"global memory: adds to in, which is read only",
    "reads_before_copy_is_there": r"read of shared memory at byte \d+ while a cp.async to it is under way, begun by",
    "waits_for_its_own_copy_only": r"(race: read of|read of uninitialised|read of .* while a cp.async) ?",
    "barrier_without_waiting": r"read of shared memory at byte \d+ while a cp.async to it is under way",
    "waits_for_the_wrong_group": r"read of shared memory at byte \d+ while a cp.async to it is under way",
    "does_not_commit": r"read of shared memory at byte \d+ while a cp.async to it is under way",
    "writes_where_a_copy_goes": r"write to shared memory at byte \d+ while a cp.async to it is under way",
    "copies_over_what_is_read": r"race: (write to .*, which warp \d reads|read of .*, written by)",
    "returns_while_copying": r"the thread returns, its last primitive here, with cp.async under way",
    "copies_from_misaligned": r"cp.async of 16 bytes from a misaligned global address",
    "copies_from_beyond": r"global memory: reads 16 bytes at byte 1536 of in, which has 1536",
    "two_blocks_write": r"race: write to out at byte \d+, also written by thread \d+ of another block",
    "reads_what_another_block_writes": (
        r"(race: read of scratch .* of another block|read of uninit|race: write to scratch .* another block reads)"
    ),
    "writes_what_all_blocks_read": r"race: (read of total .* of another block|write to total .*, which another)",
    "reads_a_sum_of_all_blocks": r"race: (read of total .*, written by atomic additions|write to total .*, which a)",
    "adds_where_another_writes": r"race: write to total at byte 0, also written by .* of another block",
    "plain_pointer": r"access through a plain pointer",
    "null_pointer": r"access through a plain pointer",
    "division_by_zero": r"integer division by zero",
    "beyond_a_local_array": r"undefined behaviour, found by the compiler's checks",
    "shift_too_wide": r"undefined behaviour, found by the compiler's checks",
    "stack_overflow": r"stack overflow",
}


@functools.cache
def built(name):
    try:
        return build_library(name, [SOURCES / f"{name}.cu"])
    except Unavailable as reason:
        return reason


def emulator(name):
    library = built(name)
    if isinstance(library, Unavailable):
        pytest.skip(str(library))
    return Emulator(library)


class Faults:
    def __init__(self):
        self.emulator = emulator("faults")
        name = self.emulator.library.fault_name
        name.restype = ctypes.c_char_p
        self.numbers = {}
        while text := name(len(self.numbers)):
            self.numbers[text.decode()] = len(self.numbers)

    def run(self, name, broken, order=(ASCENDING, 0)):
        """The error, and what the kernel wrote."""
        e = self.emulator
        self.buffers = [torch.full((n,), float("nan")) for n in (384, 384, 1536)] + [torch.zeros(128)]
        self.buffers[0][:] = 1
        e.library.emulation_unregister_all()
        names, access = ("in", "out", "scratch", "total"), (READ, WRITE_FIRST, WRITE_FIRST, WRITE)
        addresses = [e.register(b, a, n) for b, a, n in zip(self.buffers, access, names)]
        e.order(*order)
        status = e.library.run_fault(self.numbers[name], broken, *addresses)
        assert (status != 0) == (e.error() != "")
        return e.error(), self.buffers[1]


@pytest.fixture(scope="module")
def faults():
    return Faults()


@pytest.fixture
def probes():
    return emulator("probes")


# ---------------------------------------------------------------- faults


def test_every_fault_has_a_message(faults):
    assert sorted(FAULTS) == sorted(MESSAGES) == sorted(faults.numbers)


@pytest.mark.parametrize("name", FAULTS)
def test_fault(faults, name):
    """Found in every order, at the marked line; what follows is not disturbed; without the fault nothing is found."""
    lines = {number for number, line in enumerate(TEXT.split("\n"), 1) if line.endswith(f"// BREAKS {name}")}
    assert lines
    for order in ORDERS:
        error, _ = faults.run(name, True, order)
        found = re.match(r"faults\.cu:(\d+): block [012] thread \d+: (.*)", error)
        assert found, f"{order}: {error!r}"
        assert re.match(MESSAGES[name], found[2]), f"{order}: {error}"
        assert int(found[1]) in lines, f"{order}: {error}"
        error, out = faults.run(name, False, order)
        assert error == ""
        assert name == "adds_to_read_only" or not out.isnan().any()


def test_only_races_are_left_out_at_a_lower_level(faults):
    faults.emulator.check_level(CONTENTS)
    assert faults.run("no_syncthreads", True)[0] == ""
    assert "uninitialised" in faults.run("uninitialised_shared", True)[0]
    assert "under way" in faults.run("does_not_commit", True)[0]
    faults.emulator.check_level(BOUNDS)
    assert faults.run("uninitialised_shared", True)[0] == ""
    assert "at byte 2048 of 2048" in faults.run("beyond_shared", True)[0]
    faults.emulator.reset()
    assert "race" in faults.run("no_syncthreads", True)[0]


# ---------------------------------------------------------------- contents, registration, launches


def test_orders_of_blocks(probes):
    """fp32 sums in ascending, descending and random order: as many results as the seed gives orders."""
    x = torch.tensor([2.0**24, 1, 1, -(2.0**24), 3, 0.125])
    results = {}
    for order in ORDERS:
        probes.library.emulation_unregister_all()
        total = torch.zeros(1)
        probes.order(*order)
        given = probes.register(x, READ, "x"), probes.register(total, WRITE, "sum")
        assert probes.library.probe_sum(6, *given) == 0
        results[order] = total.item()
    assert results[ASCENDING, 0] == 3.125 and results[DESCENDING, 0] == 5.0
    assert len(set(results.values())) > 2


def test_nothing_is_zero_by_chance(probes):
    """Without the checks: shared memory is NaN, local variables are far off."""
    probes.check_level(BOUNDS)
    out = torch.zeros(3)
    given = probes.register(torch.ones(1), READ, "from"), probes.register(out, WRITE_FIRST, "out")
    assert probes.library.probe_contents(*given) == 0, probes.error()
    assert out[0].isnan() and out[1] < -1e37 and out[2] == 1


def test_contents_outlast_the_launch(probes):
    first, second, third = torch.zeros(32), torch.zeros(32), torch.zeros(32)
    a, b, c = (probes.register(x, WRITE_FIRST, n) for x, n in ((first, "first"), (second, "second"), (third, "third")))
    assert probes.library.probe_write(1, a) == 0
    assert probes.library.probe_read(a, b) == 0, probes.error()
    assert (second == 7).all()
    assert probes.library.probe_read(c, b) != 0
    assert "read of uninitialised third at byte 0" in probes.error()
    assert probes.library.probe_zero(c, 128) == 0
    assert probes.library.probe_read(c, b) == 0
    assert (second == 0).all()
    # The host's addresses serve as well.
    assert probes.library.probe_read(ctypes.c_void_p(first.data_ptr()), ctypes.c_void_p(second.data_ptr())) == 0
    assert (second == 7).all()


def test_fill_zero_is_checked(probes):
    x = torch.ones(64)
    p = probes.register(x[:32], READ, "x")
    assert probes.library.probe_zero(p, 4) != 0 and probes.error().startswith("fill_zero: 4 bytes")
    probes.library.emulation_unregister_all()
    p = probes.register(x, WRITE, "x")
    assert probes.library.probe_zero(p, 257) != 0
    assert probes.library.probe_zero(p, 128) == 0
    assert torch.equal(x, torch.cat([torch.zeros(32), torch.ones(32)]))


def test_registration(probes):
    memory = torch.zeros(64)
    register = probes.library.emulation_register
    assert register(memory.data_ptr(), 128, READ, b"whole")
    assert not register(memory.data_ptr() + 64, 128, READ, b"part")
    assert "part overlaps another registered range in part" in probes.error()
    assert not register(memory.data_ptr(), 64, READ, b"part")
    assert register(memory.data_ptr() + 128, 128, READ, b"neighbour")
    again = register(memory.data_ptr(), 128, WRITE, b"again")  # in wider use
    assert probes.library.probe_write(1, ctypes.c_void_p(again)) == 0, probes.error()
    assert probes.library.emulation_unregister(memory.data_ptr()) == 0
    assert probes.library.emulation_unregister(memory.data_ptr()) != 0
    assert probes.library.probe_write(1, ctypes.c_void_p(again)) != 0
    assert "at byte -128 of neighbour" in probes.error()
    assert register(memory.data_ptr(), 0, READ, b"empty") and register(None, 0, READ, b"null")


@pytest.mark.parametrize(
    "grid, block, shared, words",
    [
        ((1, 1, 1), (0, 1, 1), 0, "from 1 to 1024 threads"),
        ((1, 1, 1), (1056, 1, 1), 0, "from 1 to 1024 threads"),
        ((1, 1, 1), (48, 1, 1), 0, "whole warps"),
        ((0, 1, 1), (32, 1, 1), 0, "blocks are possible"),
        ((1, 65536, 1), (32, 1, 1), 0, "blocks are possible"),
        ((2**31, 1, 1), (32, 1, 1), 0, "blocks are possible"),
        ((1, 1, 1), (32, 1, 1), 227 * 1024 + 1, "the device has 232448"),
    ],
)
def test_impossible_launches(probes, grid, block, shared, words):
    sizes = [(ctypes.c_uint * 3)(*size) for size in (grid, block)]
    status = probes.library.probe_shape(*sizes, ctypes.c_size_t(shared))
    text = probes.library.probe_error_text
    text.restype = ctypes.c_char_p
    assert status != 0 and words in probes.error() and text(status).decode() == probes.error()
    small = [(ctypes.c_uint * 3)(1, 1, 1), (ctypes.c_uint * 3)(32, 1, 1)]
    assert probes.library.probe_shape(*small, ctypes.c_size_t(0)) == 0 and text(0) == b""


def test_device(probes):
    facts = (ctypes.c_int * 2)()
    probes.library.probe_device(facts)
    assert list(facts) == [90, 4]
    probes.device(80, 108)
    probes.library.probe_device(facts)
    assert list(facts) == [80, 108]
    size = (ctypes.c_uint * 3)(1, 1, 1), (ctypes.c_uint * 3)(32, 1, 1)
    assert probes.library.probe_shape(*size, ctypes.c_size_t(163 * 1024)) == 0
    refused = probes.library.probe_shape(*size, ctypes.c_size_t(163 * 1024 + 1))
    probes.device(75, 40)
    missing = probes.library.probe_shape(*size, ctypes.c_size_t(0))
    assert refused and missing and "no kernel image" in probes.error()
    is_missing = probes.library.probe_is_missing_kernel
    is_missing.restype = ctypes.c_bool
    assert [is_missing(status) for status in (0, refused, missing)] == [False, False, True]


def test_launches_of_several_threads(probes):
    """One after the other, each with its own error."""
    outs = [torch.zeros(32 * 50) for _ in range(4)]
    addresses = [probes.register(out, WRITE_FIRST, "out") for out in outs]
    errors = [[] for _ in outs]

    def launch(i):
        for _ in range(50):
            blocks = 50 if i % 2 else 51  # one too many
            status = probes.library.probe_write(blocks, addresses[i])
            errors[i].append((status != 0, probes.error()))

    threads = [threading.Thread(target=launch, args=(i,)) for i in range(len(outs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, found in enumerate(errors):
        assert (outs[i] == 7).all()
        assert all(failed == (i % 2 == 0) and ("at byte 6400 of out" in text) == failed for failed, text in found)


# ---------------------------------------------------------------- taking synchronisations away

KERNEL = """
PRIM void syncwarp() {}  // not syncthreads();
void kernel() {
  prim::syncthreads();

  if (last) cp_async_wait<stages - 2>();
  else cp_async_commit(); /* syncwarp(); */
  any = syncthreads_or(x == f(y));
  text = "syncthreads();";
  fetch(1, g(2)), other.syncwarp();
}
"""


def test_mutants():
    """Where calls are, and what becomes of the text."""
    changes = {
        (4, "without prim::syncthreads()"): ("prim::syncthreads()", "((void)0)"),
        (6, "without cp_async_wait<stages - 2>()"): ("cp_async_wait<stages - 2>()", "((void)0)"),
        (6, "cp_async_wait<stages - 2>() for one group fewer"): ("<stages - 2>", "<(stages - 2) + 1>"),
        (7, "without cp_async_commit()"): ("cp_async_commit()", "((void)0)"),
        (8, "syncthreads_or(x == f(y)) of each thread alone"): ("syncthreads_or(x == f(y))", "(x == f(y))"),
        (10, "without fetch(1, g(2))"): ("fetch(1, g(2))", "((void)0)"),
    }
    found = {(m.number, m.what): m for m in mutants_of("x.cu", KERNEL, ["fetch"])}
    assert sorted(found) == sorted(changes)
    assert {key: m.text for key, m in found.items()} == {key: KERNEL.replace(*c) for key, c in changes.items()}
    assert found[6, "without cp_async_wait<stages - 2>()"].after == "prim::syncthreads();"


@pytest.mark.parametrize("command, status", [("code.count('cp_async_commit();') != 2", 0), ("False", 1)])
def test_mutation_run(command, status):
    """A command that notices, and one that does not."""
    if not (ROOT / ".git").exists():
        pytest.skip("copies what git lists")
    script = f"import sys; code = open('tests/emulation/probes.cu').read(); sys.exit({command})"
    options = ["--files", "tests/emulation/probes.cu", "--only", "without cp_async_commit"]
    done = run(sys.executable, SOURCES / "mutate.py", *options, "--", sys.executable, "-c", script, timeout=300)
    assert done.returncode == status, done.stdout
    assert "2 mutants, 2 found, 0 not" in done.stdout or done.stdout.count("SURVIVED") == 2, done.stdout


def test_every_mutant_has_tests_of_its_own_and_they_are_there():
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cuda").rglob("*.cu*"))
    mutated = [f for f in files if not f.endswith("primitives.cuh") and list(mutants_of(f, (ROOT / f).read_text()))]
    commands = {tuple(command_for(file)) for file in mutated}
    assert mutated and tuple(command_for("csrc/cuda/scores.cuh")) not in commands
    tests = sorted({test for command in commands for test in command if "::" in test})
    done = run(sys.executable, "-m", "pytest", "-q", "--collect-only", *tests, timeout=300)
    assert done.returncode == 0 and f"{len(tests)} tests collected" in done.stdout, done.stdout
