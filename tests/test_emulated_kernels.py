"""CUDA's kernels on the emulated GPU, every dtype, forward and backward, against the reference in fp64: a sample, which
`make emulated` extends to whole suites. With them what the binding does for CUDA alone."""

import emulated_device
import pytest
import torch
from cases import Case, check, given, run_kernels
from cpp_suites import Unavailable
from devices import on
from emulator import DESCENDING, RANDOM
from operators import BACKWARD, FORWARD, PROBLEMS, arguments, problem, randn

from mmca_ext import functional

SEEDS, BATCH = 900, 30
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALF)


@pytest.fixture(scope="module", autouse=True)
def device():
    try:
        device = emulated_device.load()
    except Unavailable as reason:
        pytest.skip(str(reason))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # beside the reference, for tensors of a few elements
    with on("emulated"):
        yield device
    torch.set_num_threads(threads)
    device.reset()


@pytest.fixture(autouse=True)
def unchecked_index_tensors(monkeypatch):
    monkeypatch.delenv("MMCA_EXT_VALIDATE", raising=False)


@pytest.fixture
def order(device):
    """Sets the order in which warps, lanes and blocks run."""
    yield device.order
    device.reset()


@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_kernels_are_the_reference(order, first):
    """Each batch in an order of its own: on a GPU there is none."""
    if first:
        order(RANDOM, first)
    failures = []
    for seed in range(first, first + BATCH):
        try:
            check(Case(seed, device="emulated"))
        except AssertionError as failure:
            failures.append(str(failure))
    assert not failures, f"{len(failures)} of {BATCH} cases:\n\n" + "\n\n".join(failures[:5])


def test_every_kernel_has_run(device):
    for seed in range(40):
        run_kernels(Case(seed, device="emulated"))
    assert all(device.launches().values()), device.launches()


def results_of(**given):
    out, lse, lse_low, group_out = FORWARD(*arguments(FORWARD, **given, save_for_backward=True))
    kept = {"out": out, "lse": lse, "lse_low": lse_low, "group_out": group_out}
    arriving = {"grad_out": out.cos(), "grad_lse": torch.ones_like(lse)}
    return [out, lse, *BACKWARD(*arguments(BACKWARD, **given, **kept, **arriving, attn_mask_gradient=True))]


def same_bits(results, others):
    return all(torch.equal(a, b) for a, b in zip(results, others, strict=True))


def large(dtype):
    """Many tiles of keys and of rows, and a bias that all of them share."""
    query, key, value = (randn(1, 2, n, 16, seed=n, dtype=dtype) for n in (150, 170, 170))
    return {"query": query, "key": key, "value": value, "attn_mask": randn(1, 170, seed=4, dtype=dtype)}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_deterministic_is_the_same_bits_in_every_order(order, dtype):
    first = results_of(**large(dtype), deterministic=True)
    for mode, seed in ((DESCENDING, 0), (RANDOM, 1), (RANDOM, 2)):
        order(mode, seed)
        assert same_bits(first, results_of(**large(dtype), deterministic=True))


def test_without_it_the_order_shows(order):
    """Else the test before this one could not fail."""
    first = results_of(**large(torch.float32))
    order(DESCENDING)
    assert not same_bits(first, results_of(**large(torch.float32)))


def test_deterministic_algorithms_ask_for_the_same(order):
    torch.use_deterministic_algorithms(True)
    try:
        first = results_of(**large(torch.bfloat16))
        order(RANDOM, 5)
        assert same_bits(first, results_of(**large(torch.bfloat16)))
    finally:
        torch.use_deterministic_algorithms(False)


# ---------------------------------------------------------------- GPUs: much and little shared memory

OPTIONS = {
    "plain": {"is_causal": True},
    "mask": {"attn_mask": randn(1, 1, 20, 70, seed=6) < 0.5},
    "dropout": {"dropout_p": 0.3, "deterministic": True},
    "groups apart": {"modality": torch.arange(70).remainder(3)[None], "merge": "none", "image_rows": "block"},
}


@pytest.mark.parametrize("sm", [80, 86, 120])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_shapes_of_every_gpu(device, sm, dim, name, dtype):
    """A kernel's tiles are as large as the GPU's shared memory lets them be: forward, backward, and few rows."""
    mmca = "modality" in OPTIONS[name]
    try:
        device.device(sm, 4)
        for rows in (20, 1):
            options = dict(OPTIONS[name])
            keys = rows if mmca else 70
            if mmca:
                options["modality"] = options["modality"][:, :rows] + (rows == 1)
            elif name == "mask":
                options["attn_mask"] = options["attn_mask"][:, :, :rows]
            query, key, value = (
                randn(1, heads, n, dim, seed=i, dtype=dtype)
                for i, (heads, n) in enumerate(((2, rows), (1, keys), (1, keys)))
            )
            groups = (2,) if mmca else ()
            grad_out = randn(*groups, *query.shape, seed=4, dtype=dtype)
            grad_lse = randn(*groups, 1, 2, rows, seed=5, dtype=torch.promote_types(dtype, torch.float32))
            check(given("mmca_attention" if mmca else "attention", query, key, value, grad_out, grad_lse, **options))
    finally:
        device.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("bad", ["query", "grad_out"])
def test_a_row_that_is_not_finite_stays_with_the_keys_it_sees(bad, dtype):
    """Whichever thread has met the NaN: it is in one feature of one row."""
    tensors = {n: randn(1, 1, 40, 64, seed=i, dtype=dtype) for i, n in enumerate(("query", "key", "value", "grad_out"))}
    tensors[bad][0, 0, 3, 37] = torch.nan
    grad_out = tensors.pop("grad_out")
    leaves = [t.requires_grad_() for t in tensors.values()]
    _, *gradients = torch.autograd.grad(functional.attention(*leaves, is_causal=True), leaves, grad_out)
    assert all(g[:, :, 4:].isfinite().all() for g in gradients)


# ---------------------------------------------------------------- how 16-bit rows lie


def misaligned(t, shift):
    memory = torch.full((t.numel() + shift + 9,), torch.nan, dtype=t.dtype)
    return memory[shift : shift + t.numel()].view(t.shape).copy_(t)


LAYOUTS = {
    "an odd address": lambda t: misaligned(t, 3),
    "odd rows": lambda t: torch.nn.functional.pad(t, (0, 3), value=torch.nan)[..., : t.shape[-1]],
    "every other feature": lambda t: torch.stack((t, torch.full_like(t, torch.nan)), -1)[..., 0],
    "features outside": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "heads inside": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [8, 13, 64])
@pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: str(dtype)[6:])
def test_layouts_are_the_same_bits(layout, dim, dtype):
    tensors = {n: randn(2, 2, 20, dim, seed=i, dtype=dtype) for i, n in enumerate(("query", "key", "value"))}
    moved = {n: LAYOUTS[layout](t) for n, t in tensors.items()}
    assert same_bits(results_of(**tensors), results_of(**moved))


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("dim", [8, 13])
def test_expanded_tensors_are_the_same_bits(axis, dim):
    tensors = {n: randn(3, 2, 20, dim, seed=i, dtype=torch.bfloat16) for i, n in enumerate(("query", "key", "value"))}
    expanded = {n: t.narrow(axis, 0, 1).expand(t.shape) for n, t in tensors.items()}
    whole = {n: t.contiguous() for n, t in expanded.items()}
    assert same_bits(results_of(**whole), results_of(**expanded))


# ---------------------------------------------------------------- what index tensors hold

NONSENSE = [0, 5, 2, 10**12], [7, 3, -(2**62), 6], [0, 2, 2, 4000], [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("values", NONSENSE, ids=str)
@pytest.mark.parametrize("side", ["cu_seqlens_q", "cu_seqlens_k"])
def test_offsets_of_any_value_are_survived(values, side, dtype):
    """No access outside the tensors: the emulation would see it. Nobody waits to look at the values."""
    given = problem("packed and all", dtype=dtype, requires_grad=())
    given = {**given, side: torch.tensor(values), "max_seqlen_q": None, "max_seqlen_k": None}
    assert all(t.isfinite().all() for t in results_of(**given)[2:5])


@pytest.mark.parametrize("shift", [-1, -(10**6), 2**33])
def test_modalities_of_any_value_are_survived(shift):
    for name in ("mmca self sum", "mmca block lse", "mmca packed gate and all"):
        given = problem(name, dtype=torch.float32, requires_grad=())
        results_of(**{**given, "modality": given["modality"].long() + shift})


def test_values_are_checked_on_request(monkeypatch):
    monkeypatch.setenv("MMCA_EXT_VALIDATE", "1")
    packed, ids = (problem(n, dtype=torch.float32, requires_grad=()) for n in ("packed", "mmca self sum"))
    with pytest.raises(ValueError, match="cu_seqlens_q must not decrease, got 2 after 5"):
        results_of(**{**packed, "cu_seqlens_q": torch.tensor([0, 5, 2, 5])})
    with pytest.raises(ValueError, match="max_seqlen_k must be at least the longest sequence's 4 tokens, got 3"):
        results_of(**packed, max_seqlen_k=3)
    with pytest.raises(ValueError, match=r"modality must be 0 .* got -1"):
        results_of(**{**ids, "modality": ids["modality"] - 1})
    with pytest.raises(ValueError, match="modality must fit 32 bits"):
        results_of(**{**ids, "modality": ids["modality"] + 2**33})


# ---------------------------------------------------------------- dropout, devices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_one_seed_is_one_mask_on_every_device(dtype):
    """Values of 1: what comes out is the kept weights' sum."""
    query, key = (randn(2, 2, 40, 8, seed=i, dtype=dtype) for i in range(2))
    results = []
    for device in ("cpu", "emulated"):
        torch.manual_seed(5)
        with on(device):
            results.append(functional.attention(query, key, torch.ones_like(key), dropout_p=0.4).float())
    torch.testing.assert_close(*results, rtol=0, atol=4 * torch.finfo(dtype).eps * results[0].abs().max().item())


def test_a_gpu_that_is_too_old(device):
    given = problem("plain", dtype=torch.bfloat16, requires_grad=())
    device.device(70, 4)
    try:
        with pytest.raises(RuntimeError, match=r"needs compute capability 8\.0, this GPU has 7\.0"):
            results_of(**given)
        with pytest.raises(RuntimeError, match=r"needs compute capability 8\.0, this GPU has 7\.0"):
            results_of(**{name: t.float() for name, t in given.items()})
    finally:
        device.reset()
    results_of(**given)


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_of_the_catalogue(name):
    """Every argument of the schema, in fp64 beside the CPU's kernels."""
    given = problem(name, requires_grad=())
    actual = results_of(**given)
    with on("cpu"):
        expected = results_of(**given)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_every_kernel_has_a_line_in_the_status():
    """bench/results/gpu_status.md says of each kernel whether a GPU has run it."""
    with open(emulated_device.ROOT / "bench" / "results" / "gpu_status.md") as file:
        text = file.read()
    for kernel in emulated_device.load().launches():
        stem, dtype = kernel.rsplit(".", 1)
        lines = [line for line in text.splitlines() if f"`{stem}." in line]
        assert any(f".{dtype}`" in line for line in lines), kernel
