"""The two forwards of the 16-bit kernels in every shape they have: tiles of many rows, whose keys pass in several turns
of their ring, and few rows, whose keys are shared out among blocks."""

import emulated_device
import pytest
import torch
from bounds import bounds, weight_rounding
from cases import excess, given, run_kernels, run_reference
from cpp_suites import Unavailable
from devices import on
from emulator import RANDOM
from operators import randn


@pytest.fixture(autouse=True)
def device():
    try:
        device = emulated_device.load()
    except Unavailable as reason:
        pytest.skip(str(reason))
    with on("emulated"):
        yield device
    device.reset()


def in_bounds(query, key, value, **kwargs):
    """out and lse are where the reference in fp64 and the roundings of tensor cores say."""
    mmca = "modality" in kwargs
    rows = (query.shape[1], query.shape[0]) if query.dim() == 3 else query.shape[:3]
    grad_out = torch.zeros((2,) * (kwargs.get("merge") == "none") + (*query.shape[:-1], value.shape[-1]))
    op = "mmca_attention" if mmca else "attention"
    case = given(op, query, key, value, grad_out, torch.zeros((2,) * mmca + rows), **kwargs)
    case.wanted = ()
    actual, exact = run_kernels(case), run_reference(case, torch.float64)
    bound = bounds(case, exact, weight_rounding(case))
    ratios = {name: excess(actual[name], exact[name], bound[name]) for name in ("out", "lse")}
    assert all(ratio <= 1.0 for ratio, _ in ratios.values()), ratios


def rows_and_keys(rows, keys, dim, dtype, heads=1):
    shapes = (1, heads, rows, dim), (1, 1, keys, dim), (1, 1, keys, dim)
    return [randn(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


TILES = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window": (100, 5)},
    "hidden keys": {"key_mask": torch.arange(270)[None] % 7 > 0},
    "mask": {"attn_mask": randn(130, 270, seed=6) < 0.5},
    "bias and softcap": {"attn_mask": randn(1, 270, seed=7, dtype=torch.float32), "softcap": 5.0},
    "dropout": {"dropout_p": 0.3, "is_causal": True},
    # A tile of 64 rows begins where the keys that are not hidden have ended: at no multiple of 8.
    "nothing to see": {"window": (10, 10), "key_mask": torch.arange(270)[None] < 173},
}


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("name", TILES)
def test_tiles(device, name, dim):
    device.order(RANDOM, dim)
    dtype = (torch.bfloat16, torch.float16)[list(TILES).index(name) % 2]
    in_bounds(*rows_and_keys(130, 270, dim, dtype), **TILES[name])


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("merge", ["sum", "lse", "none"])
def test_tiles_of_groups(device, merge, softcap, dim):
    device.order(RANDOM, dim)
    modality = torch.randint(0, 3, (1, 29), generator=torch.Generator().manual_seed(1)).repeat_interleave(5, 1)
    tensors = rows_and_keys(145, 145, dim, torch.bfloat16)
    in_bounds(*tensors, modality=modality, merge=merge, image_rows="block", softcap=softcap)


FEW = {
    "plain": {},
    "causal": {"is_causal": True},
    "hidden keys": {"key_mask": torch.arange(700)[None] % 7 > 0},
    "mask": {"attn_mask": randn(3, 700, seed=6) < 0.5},
    "bias and softcap": {"attn_mask": randn(1, 700, seed=7, dtype=torch.float32), "softcap": 5.0},
    "dropout": {"dropout_p": 0.3},
}


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("name", FEW)
def test_keys_shared_by_blocks(device, name, dim):
    device.order(RANDOM, dim)
    dtype = (torch.bfloat16, torch.float16)[list(FEW).index(name) % 2]
    in_bounds(*rows_and_keys(3, 700, dim, dtype, heads=4), **FEW[name])


@pytest.mark.parametrize("merge", ["sum", "lse", "none"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_few_rows_of_groups(device, merge, dim):
    """Packed, so that there are few rows a sequence."""
    device.order(RANDOM, dim)
    query, key, value = (t[0].transpose(0, 1) for t in rows_and_keys(100, 100, dim, torch.bfloat16))
    modality = torch.randint(0, 3, (100,), generator=torch.Generator().manual_seed(1))
    offsets = torch.tensor([0, 31, 31, 70, 98])
    in_bounds(query, key, value, modality=modality, merge=merge, image_rows="causal", cu_seqlens=offsets)


def test_more_blocks_than_threads_that_merge(device):
    """231 parts of the keys, of which 128 threads look at one and then at another."""
    device.device(90, 132)
    in_bounds(*rows_and_keys(1, 33_000, 64, torch.bfloat16))
