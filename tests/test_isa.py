"""Instruction sets: each available one really runs, none leaks out of its namespace, wrong choices are explained."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmca_ext import _C, functional

ROOT = Path(__file__).parent.parent


def kernels():
    return [kernel for kernel in _C.kernels() if kernel["device"] == "cpu"]


KERNELS = kernels()
ISAS = sorted({kernel["isa"] for kernel in KERNELS if kernel["available"]})
MISSING = sorted({kernel["isa"] for kernel in KERNELS} - set(ISAS))
OPERATIONS = ("attention_forward", "attention_backward", "linear_forward", "linear_backward")
DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}
NAMES = {kernel["name"] for kernel in KERNELS}
EXTENDS = {"amx": "avx512"}  # what serves the dtypes an instruction set has no kernels for


@pytest.fixture
def force():
    before = _C.forced_isa()
    yield _C.force_isa
    _C.force_isa(before)


def launches():
    return {kernel["name"]: kernel["launches"] for kernel in kernels()}


def serving(isa, operation, dtype):
    """The name of the kernel that runs where `isa` is forced."""
    name = f"cpu.{isa}.{operation}.{dtype}"
    return name if name in NAMES else serving(EXTENDS[isa], operation, dtype)


def test_the_portable_kernels_are_always_there():
    assert "scalar" in ISAS
    assert NAMES == {
        f"cpu.{isa}.{operation}.{dtype}"
        for isa in {k["isa"] for k in KERNELS}
        for operation in OPERATIONS
        for dtype in DTYPES
        if isa != "amx" or (dtype == "bf16" and operation.startswith("attention"))
    }
    for operation in OPERATIONS:
        for dtype in DTYPES:
            chosen = [k for k in KERNELS if (k["op"], k["dtype"]) == (operation, dtype) and k["selected"]]
            assert len(chosen) == 1 and chosen[0]["available"] and chosen[0]["device"] == "cpu"


IDS, OFFSETS = torch.tensor([[1, 2, 2, 1, 3] * 4]), torch.tensor([0, 9, 20])
CALLS = {
    "attention": lambda *t: functional.attention(*t),
    "bias": lambda *t: functional.attention(*t, torch.zeros(20, 20), softcap=5.0, is_causal=True, dropout_p=0.1),
    "packed": lambda *t: functional.attention(
        *(x[0].transpose(0, 1) for x in t), cu_seqlens_q=OFFSETS, cu_seqlens_k=OFFSETS
    ),
    "mmca": lambda *t: functional.mmca_attention(*t, IDS),
    "gate": lambda *t: functional.mmca_attention(*t, IDS, image_rows="causal", merge="gate", gate=torch.ones(2)),
    "none": lambda *t: functional.mmca_attention(*t, IDS, image_rows="block", merge="none")[0],
    "linear": lambda *t: functional.linear_attention(*t, True),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS)
def test_the_forced_kernel_and_no_other_runs(force, isa, dtype, call):
    force(isa)
    assert _C.forced_isa() == isa
    tensors = [torch.randn(1, 2, 20, 8, dtype=DTYPES[dtype]).requires_grad_() for _ in range(3)]
    before = launches()
    out = CALLS[call](*tensors)
    middle = launches()
    out.sum().backward()
    after = launches()
    kind = "linear" if call == "linear" else "attention"
    forward, backward = (serving(isa, f"{kind}_{way}", dtype) for way in ("forward", "backward"))
    assert {name: middle[name] - before[name] for name in before} == {name: int(name == forward) for name in before}
    assert {name: after[name] - middle[name] for name in before} == {name: int(name == backward) for name in before}


def test_refusals_are_explained(force):
    force("scalar")
    for kernel in kernels():
        if kernel["isa"] == "scalar":
            assert kernel["available"] and kernel["selected"]
        else:
            assert not kernel["selected"] and ("scalar is forced" in kernel["reason"] or "lacks" in kernel["reason"])
    force(None)
    for kernel in kernels():
        if not kernel["available"]:
            assert re.search(r"this processor lacks \w+", kernel["reason"])
        elif kernel["selected"]:
            assert "best" in kernel["reason"]
        else:
            assert re.fullmatch(
                r"cpu\.\w+\.(attention|linear)_\w+\.b?f\d+ is preferred|serves fewer than \d+ keys", kernel["reason"]
            )


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_keys_have_the_kernel_that_says_so(force, dtype):
    force(None)
    served = [k for k in kernels() if (k["op"], k["dtype"]) == ("attention_forward", dtype) and k["available"]]
    best = next(k for k in served if k["selected"])
    limit = re.search(r"from (\d+) keys", best["reason"])
    if not limit:
        pytest.skip("one kernel serves every number of keys here")
    (other,) = [k for k in served if k["reason"] == f"serves fewer than {limit[1]} keys"]
    for keys, kernel in ((int(limit[1]) - 1, other), (int(limit[1]), best)):
        before = launches()
        functional.attention(*[torch.ones(1, 1, keys, 4, dtype=DTYPES[dtype]) for _ in range(3)])
        assert {name for name, count in launches().items() if count > before[name]} == {kernel["name"]}


@pytest.mark.parametrize("name", ["", "AVX2", "sse9", "avx512 ", "cpu.avx2"])
def test_unknown_names(force, name):
    with pytest.raises(ValueError, match="accepted: scalar") as caught:
        force(name)
    assert f"'{name}'" in str(caught.value)
    assert _C.forced_isa() is None  # a refused choice changes nothing


@pytest.mark.skipif(not MISSING, reason="this processor has every instruction set built in")
def test_missing_instruction_set(force):
    with pytest.raises(ValueError, match="this processor lacks"):
        force(MISSING[0])


def in_a_new_process(isa, code):
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))))
    environment["MMCA_EXT_ISA"] = isa
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)


COMPUTE = """
import torch
from mmca_ext import _C, functional
functional.attention(*[torch.ones(1, 1, 30, 4) for _ in range(3)])
print(_C.forced_isa(), [k["name"] for k in _C.kernels() if k["launches"]])
"""


@pytest.mark.parametrize("isa", [*ISAS, ""])
def test_environment(isa):
    done = in_a_new_process(isa, COMPUTE)
    assert done.returncode == 0, done.stderr
    forced, names = done.stdout.split(" ", 1)
    best = next(k["isa"] for k in KERNELS if k["op"] == "attention_forward" and k["dtype"] == "f32" and k["available"])
    assert forced == (isa or "None")
    assert names.strip() == f"['{serving(isa or best, 'attention_forward', 'f32')}']"


def test_environment_with_an_unknown_name():
    done = in_a_new_process("mmx", COMPUTE)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "MMCA_EXT_ISA" in last and "'mmx'" in last and "accepted: scalar" in last


@pytest.mark.skipif(not MISSING, reason="this processor has every instruction set built in")
def test_environment_with_a_missing_instruction_set():
    done = in_a_new_process(MISSING[0], COMPUTE)
    assert done.returncode == 1 and "this processor lacks" in done.stderr


# ---------------------------------------------------------------- what the compiler made of it

BUILT = {kernel["isa"] for kernel in KERNELS}  # the files of another processor's instruction sets compile to nothing
OBJECTS = sorted(p for p in ROOT.glob("build/objects-*/csrc/cpu/isa_*.o") if p.stem.removeprefix("isa_") in BUILT)
WIDE = {"isa_avx2": r"%[yz]mm\d", "isa_avx512": r"%[yz]mm\d|\{%k\d\}", "isa_amx": r"%[tyz]mm\d|\{%k\d\}"}


@pytest.mark.skipif(not OBJECTS, reason="no objects under build/: the extension was not built in this folder")
@pytest.mark.skipif(not shutil.which("nm") or not shutil.which("objdump"), reason="needs nm and objdump (binutils)")
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.stem)
def test_no_shared_function_holds_an_instruction_sets_code(path):
    """The linker keeps one copy of a weak function, from any file: made for a newer processor, it would crash an older
    one. So a weak function of another namespace must not use wide registers."""
    isa = path.stem.removeprefix("isa_")
    symbols = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout.splitlines()
    parts = [line.split(maxsplit=2) for line in symbols]
    weak = {p[2] for p in parts if len(p) == 3 and p[1] in "WwVvu"}
    strong = {p[2] for p in parts if len(p) == 3 and p[1] == "T"}
    assert strong and all(name.startswith(f"mmca::cpu::{isa}::") for name in strong), sorted(strong)[:5]

    listing = subprocess.run(
        ["objdump", "-dC", "--no-show-raw-insn", str(path)], capture_output=True, text=True, check=True
    )
    function, wide, own = None, set(), 0
    for line in listing.stdout.splitlines():
        head = re.fullmatch(r"[0-9a-f]+ <(.*)>:", line)
        if head:
            function = head[1]
        elif function and path.stem in WIDE and re.search(WIDE[path.stem] + r"|\tv[a-z]+\d*\w* ", line):
            own += f"mmca::cpu::{isa}::" in function
            wide.add(function)
    leaks = sorted(name for name in wide & weak if f"mmca::cpu::{isa}::" not in name)
    assert not leaks, leaks[:5]
    if path.stem in WIDE:
        assert own > 1000  # the search does find this instruction set's code where it belongs
