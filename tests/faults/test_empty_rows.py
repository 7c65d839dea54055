"""Rows that see nothing: zero, with finite zero gradients. A bias of finfo.min is a number, not a hidden key."""

import math

import pytest
import torch
from bounds import bounds, weight_rounding
from cases import excess, given, run_kernels, run_reference

from mmca_ext import functional

from .common import MERGES, ROWS, SIZES, Problem, everything, in_bound, problem, qkv, randn

pytestmark = pytest.mark.usefixtures("isa")


def without(empty, kwargs, query, key, value):
    """Results of a problem whose rows `empty` (B, Hq, Lq) see nothing, after what must hold for those."""
    results = everything(dict(kwargs, query=query, key=key, value=value))
    for name, t in results.items():
        if name.endswith("lse"):
            assert (t[empty] == -math.inf).all() and t[~empty].isfinite().all()
        else:
            assert t.isfinite().all() and (not t[empty].any() if name.endswith(("out", "query")) else True)
    assert (results["out"][~empty] != 0).any()
    return results


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("how", ["attn_mask", "bias", "key_mask", "causal", "window"])
def test_rows_that_see_nothing_are_zero(size, how, dtype):
    q_len, k_len = SIZES[size]
    query, key, value = qkv(q_len, k_len, dtype=dtype)
    empty = torch.zeros(2, 4, q_len, dtype=torch.bool)
    if how in ("attn_mask", "bias"):
        mask = torch.ones(2, 4, q_len, k_len, dtype=torch.bool)
        mask[0, :, 1] = mask[1, 2] = False
        empty[0, :, 1] = empty[1, 2] = True
        kwargs = {"attn_mask": mask}
        if how == "bias":
            kwargs["attn_mask"] = randn(*mask.shape, dtype=dtype).masked_fill(~mask, -math.inf)
    elif how == "key_mask":
        kwargs = {"key_mask": torch.tensor([[True], [False]]).expand(2, k_len)}
        empty[1] = True
    elif how == "causal":
        key, value = key[:, :, : q_len - 2], value[:, :, : q_len - 2]
        empty[:, :, :2] = True
        kwargs = {"is_causal": True}
    else:
        kwargs = {"window": (0, 0), "key_mask": (torch.arange(k_len) != k_len - 2).expand(2, k_len)}
        empty[:, :, q_len - 2] = True
    results = without(empty, kwargs, query, key, value)
    if how == "bias":
        assert (results["d_attn_mask"][~mask] == 0).all()


@pytest.mark.parametrize("size", SIZES)
def test_nothing_is_seen_at_all(size, dtype):
    query, key, value = qkv(*SIZES[size], dtype=dtype)
    pairs = (*query.shape[:3], key.shape[2])
    for mask in (torch.zeros(pairs, dtype=torch.bool), torch.full(pairs, -math.inf, dtype=dtype)):
        results = everything({"query": query, "key": key, "value": value, "attn_mask": mask})
        assert all((t == -math.inf).all() if name.endswith("lse") else not t.any() for name, t in results.items())


@pytest.mark.parametrize("how", ["attn_mask", "bias"])
@pytest.mark.parametrize("q_len, k_len", [(4, 190), (30, 190), (30, 450)])
def test_holes_between_keys(isa, how, q_len, k_len, dtype):
    """Whole tiles that no row of theirs sees, between tiles that are seen: at one place for some rows, at another for
    the others."""
    query, key, value = qkv(q_len, k_len, batch=1, dtype=dtype)
    mask = torch.ones(q_len, k_len, dtype=torch.bool)
    mask[: q_len // 2, 40:150] = mask[q_len // 2 :, 5:120] = False
    if how == "bias":
        mask = torch.zeros(q_len, k_len, dtype=dtype).masked_fill(~mask, -math.inf)
    in_bound(Problem(query=query, key=key, value=value, attn_mask=mask), isa)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("fill", [0, 1, 2])
def test_modality_groups_that_are_empty(rows, merge, fill, dtype):
    query, key, value = qkv(50, 50, dtype=dtype)
    arguments = {"modality": torch.full((2, 50), fill), "image_rows": rows, "merge": merge}
    if merge == "gate":
        arguments["gate"] = randn(2, 4, 50, 2, seed=8, dtype=dtype)
    results = everything(dict(arguments, query=query, key=key, value=value))
    lse = results.pop("lse")
    assert all(t.isfinite().all() for t in results.values())
    assert fill != 0 or not any(t.any() for t in results.values())
    hidden = 1 if fill == 1 else 0
    assert (lse[hidden] == -math.inf).all()
    if merge == "none":
        assert (results["out"][hidden] == 0).all() and (fill == 0 or results["out"][1 - hidden].any())
    if merge == "gate":
        assert (results["d_gate"][..., hidden] == 0).all()


@pytest.mark.parametrize("k_len", [60, 500])
@pytest.mark.parametrize("q_len", [4, 40])
@pytest.mark.parametrize("whole", [True, False])
def test_the_smallest_number_as_a_bias_is_a_number(isa, q_len, k_len, whole, dtype):
    """Rows whose every key has it are uniform over their keys, as arithmetic in float64 says too; with other keys to
    see, it is too small to count. Scores that are all equal have no rounding error of their own: the bound is that of
    a bias of 0, but where the number is not large enough to swallow the scores (float16)."""
    query, key, value = qkv(q_len, k_len, batch=1, dtype=dtype)
    bias = torch.zeros(1, 1, q_len, k_len, dtype=dtype)
    smallest = torch.finfo(dtype).min
    bias[:, :, 1, :] = smallest
    bias[:, :, 2, 5:] = smallest
    if not whole:
        bias[:, :, 1, ::3] = -math.inf
    grads = randn(1, 4, q_len, 12, seed=4, dtype=dtype), randn(1, 4, q_len, seed=5, dtype=torch.float64)
    grads = grads[0], grads[1].to(torch.float64 if dtype == torch.float64 else torch.float32)
    case = given("attention", query, key, value, *grads, isa=isa, attn_mask=bias.requires_grad_())
    actual, exact = run_kernels(case), run_reference(case, torch.float64)
    if dtype != torch.float16:
        case.kwargs["attn_mask"] = bias.detach().masked_fill(bias == smallest, 0.0)
    bound = bounds(case, exact, weight_rounding(case))
    bound["lse"][..., 1] += torch.finfo(actual["lse"].dtype).eps * exact["lse"][..., 1].abs()
    wrong = {name: excess(actual[name], exact[name], bound[name]) for name in exact}
    wrong = {name: found for name, found in wrong.items() if not found[0] <= 1}
    assert not wrong, wrong
    seen = torch.ones(k_len, dtype=torch.bool) if whole else torch.arange(k_len) % 3 != 0
    if dtype != torch.float16:
        mean = value.double()[:, :, seen].mean(2).repeat_interleave(2, 1)
        torch.testing.assert_close(actual["out"][:, :, 1].double(), mean, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_a_bias_beyond_the_arithmetic_still_gives_numbers(dtype):
    """float64's smallest number is -inf in float32: hidden or not, nothing becomes NaN."""
    query, key, value = qkv(9, 30, dtype=dtype)
    bias = torch.zeros(9, 30, dtype=torch.float64)
    bias[1], bias[2, 3:] = torch.finfo(torch.float64).min, torch.finfo(torch.float64).min
    results = everything({"query": query, "key": key, "value": value, "attn_mask": bias})
    assert all(t.isfinite().all() for name, t in results.items() if not name.endswith("lse"))
    assert not results["lse"].isnan().any()
    expected = functional.attention(query[:, :, 2:3], key[:, :, :3], value[:, :, :3])
    torch.testing.assert_close(results["out"][:, :, 2:3], expected)


@pytest.mark.parametrize("feature", ["plain", "masks", "bias"])
def test_maps_and_merges_of_empty_rows(feature, dtype):
    """attention_map's weights of such rows are 0; merge_attention ignores parts that saw nothing."""
    arguments = problem(feature, dtype, 9, 30)
    q, k, v = (arguments[name] for name in ("query", "key", "value"))
    nothing = torch.ones(2, 30, dtype=torch.bool)
    nothing[1] = False
    keywords = {name: arguments[name] for name in ("attn_mask", "is_causal") if name in arguments}
    out, lse = functional.attention(q, k, v, key_mask=nothing, return_lse=True, **keywords)
    weights = functional.attention_map(q, k, lse, key_mask=nothing, **keywords)
    assert weights.isfinite().all() and not weights[1].any() and weights[0].any()

    parts = [t.detach().requires_grad_() for t in (out, torch.full_like(out, math.nan))]
    lses = [lse.detach().requires_grad_(), torch.full_like(lse, -math.inf).requires_grad_()]
    merged, total = functional.merge_attention(parts, lses)
    assert torch.equal(merged, out) and torch.equal(total, lse)
    gradients = torch.autograd.grad((merged.sum(), total[0].sum()), (*parts, *lses))
    assert all(g.isfinite().all() for g in gradients) and not gradients[1].any() and not gradients[3].any()
    assert not gradients[0][1].any()
