"""Large and small numbers: finite results inside the a-priori bound, where a sentinel such as -5e4 would show."""

import math

import devices
import pytest
import torch

from mmca_ext import functional

from .common import SIZES, WIDE, Problem, everything, in_bound, qkv, rand, randn, same_bits


@pytest.fixture
def known_on_gpus(request):
    """known_on_gpus(condition, why): what CUDA's kernels do not do where the condition holds."""

    def mark(condition, why, strict=True):
        if devices.current != "cpu" and condition:
            request.applymarker(pytest.mark.xfail(reason=why, strict=strict))

    return mark


@pytest.mark.parametrize("q_len, k_len", [(4, 140), (50, 140), (20, 450)])
@pytest.mark.parametrize("logit", [2.5e5, -2.5e5, 1e3, -200.0])
@pytest.mark.parametrize("how", ["products", "bias", "softcap"])
def test_huge_logits(isa, dtype, q_len, k_len, logit, how):
    """A constant that the softmax takes away."""
    query, key, value = qkv(q_len, k_len, batch=1, heads=2, dtype=dtype)
    arguments = Problem(query=query, key=key, value=value, scale=1.0, is_causal=True)
    if how == "bias":
        arguments["attn_mask"] = logit + randn(q_len, k_len)
    else:
        query[..., 0], key[..., 0] = 8.0, logit / 8
        if how == "softcap":
            arguments["softcap"] = 1e5
    in_bound(arguments, isa)


@pytest.mark.parametrize("logit", [2.5e5, -2.5e5])
@pytest.mark.parametrize("merge", ["sum", "lse", "gate", "none"])
def test_huge_logits_in_both_groups(isa, dtype, logit, merge):
    query, key, value = qkv(50, 50, batch=1, heads=2, dtype=dtype)
    query[..., 0], key[..., 0] = 8.0, logit / 8
    ids = torch.randint(0, 3, (1, 50), generator=torch.Generator().manual_seed(6))
    arguments = {"modality": ids, "merge": merge, "image_rows": "causal", "scale": 1.0}
    if merge == "gate":
        arguments["gate"] = randn(1, 2, 50, 2, seed=7)
    in_bound(Problem(arguments, query=query, key=key, value=value), isa)


@pytest.mark.parametrize("q_len, k_len", [(4, 60), (50, 60), (20, 450)])
def test_enormous_queries_and_keys(isa, dtype, q_len, k_len, known_on_gpus):
    """q and k of 5e8 (float16: as large as it can): every row has one key that is far above the others, by more than
    the scores' rounding, and takes its value."""
    why = "tensor cores' exponents, products times scale less the lse, are off by a rounding of scores of 1e8 and more"
    known_on_gpus(dtype not in WIDE, why, strict=False)
    size = 5e8 if dtype != torch.float16 else 1e4
    query, key, value = qkv(q_len, k_len, dtype=dtype)
    query, key = size * query, size * key
    scores = query.double() @ key.double().repeat_interleave(2, 1).mT * 8**-0.5
    best, second = scores.topk(2, -1).values.unbind(-1)
    rounding = 8 * torch.finfo(torch.float32).eps * scores.abs().amax(-1)
    decided = best - second > rounding + 104  # exp(-104) is 0 in float32
    assert decided.float().mean() > 0.9
    results = everything(Problem(query=query, key=key, value=value))
    assert all(t.isfinite().all() for t in results.values() if t.dtype != torch.float16)
    chosen = value.repeat_interleave(2, 1).gather(2, scores.argmax(-1, keepdim=True).expand(-1, -1, -1, 12))
    assert torch.equal(results["out"][decided], chosen[decided])
    assert not results["out"].isnan().any()
    lse_error = (results["lse"].double() - best).abs()
    assert (lse_error <= rounding + math.log(k_len)).all()


@pytest.mark.parametrize("q_len", [1, 20])
@pytest.mark.parametrize("start", range(1, 130, 43))
def test_every_length_with_a_tiny_log_sum_exp(isa, dtype, q_len, start):
    """Every Lk mod 128, with an lse below -89: exp of it is no float32."""
    for k_len in range(start, start + 43):
        query, key, value = qkv(q_len, k_len, batch=1, heads=2, kv_heads=1, dim=5, value_dim=3, dtype=dtype)
        key[..., 0], query[..., 0] = -120.0, 2.0
        in_bound(Problem(query=query, key=key, value=value), isa)


@pytest.mark.parametrize("k_len", [255, 256, 257, 383, 384, 385, 512, 513])
def test_block_edges(isa, dtype, k_len):
    query, key, value = qkv(7, k_len, batch=1, heads=2, kv_heads=1, dim=5, value_dim=3, dtype=dtype)
    key[..., 0], query[..., 0] = -120.0, 2.0
    in_bound(Problem(query=query, key=key, value=value, attn_mask=randn(7, k_len), softcap=300.0), isa)


@pytest.mark.parametrize("q_len", [1, 8, 9])
@pytest.mark.parametrize("how", ["products", "softcap", "bias"])
def test_weights_of_the_backward_are_those_of_the_forward(isa, dtype, q_len, how):
    """With values and a gradient of one, dV of a row sums to its weights: to 1. Sums of 600 terms round by less than
    600 eps, and by about sqrt(600) eps in practice, each element of dV once more to its storage; scores of hundreds
    would show a second way to compute them. (The portable kernels, which cannot fuse a multiply-add, scores that are
    more than products, and float64, which has no wider number for an lse, round each score once more.)"""
    generator, double = torch.Generator().manual_seed(0), dtype == torch.float64
    query, key = (30 * torch.randn(1, 1, n, 33, generator=generator).to(dtype) for n in (q_len, 600))
    value = torch.ones(1, 1, 600, 1, requires_grad=True, dtype=dtype)
    options = {"products": {}, "softcap": {"softcap": 1000.0}, "bias": {"attn_mask": randn(q_len, 600)}}[how]
    functional.attention(query, key, value, **options).sum().backward()
    largest = (query.double() @ key.double().mT).abs().max().item() * 33**-0.5
    roundings = 600**0.5 + (largest if isa == "scalar" or how != "products" or double else 0.0)
    eps = torch.finfo(torch.float64 if double else torch.float32).eps
    stored = torch.finfo(dtype).eps if dtype not in WIDE else 0.0
    assert abs(value.grad.double().sum().item() - q_len) <= (roundings * eps + stored) * q_len


@pytest.mark.parametrize("merge", ["sum", "lse", "gate"])
def test_a_row_alone_copies_its_value_whatever_its_score(isa, dtype, merge, known_on_gpus):
    """The score overflows."""
    known_on_gpus(dtype != torch.float64, "an infinite score makes the row NaN, alone or not")
    query = torch.full((1, 1, 1, 4), 1e20 if dtype != torch.float16 else 6e4, dtype=dtype)
    value = torch.ones(1, 1, 1, 4, requires_grad=True, dtype=dtype)
    options = {"scale": 1e30 if dtype == torch.float16 else None}
    if merge == "gate":
        options["gate"] = torch.ones((), dtype=dtype)
    out = functional.mmca_attention(query, query, value, torch.tensor([[2]]), merge=merge, **options)
    assert torch.equal(out, torch.ones(1, 1, 1, 4, dtype=dtype))
    assert torch.equal(torch.autograd.grad(out.sum(), value)[0], torch.ones(1, 1, 1, 4, dtype=dtype))


@pytest.mark.parametrize("k_len", [100, 300])
@pytest.mark.parametrize("how", ["attn_mask", "bias"])
def test_scores_at_the_end_of_the_range(isa, dtype, k_len, how, known_on_gpus):
    """log2(e) times such a log-sum-exp is no float32 any more (and near the end of float64)."""
    known_on_gpus(dtype not in WIDE and how == "attn_mask", "tensor cores' scores are exponents of 2 unless shaped")
    size = {torch.float64: 1.1e154, torch.float16: 6e4}.get(dtype, 1.6e19)
    query = torch.full((1, 1, 16, 1), size, dtype=dtype, requires_grad=True)
    key = (size * rand_column(k_len)).to(dtype).requires_grad_()
    value = randn(1, 1, k_len, 4, dtype=dtype).requires_grad_()
    hidden = torch.arange(k_len) % 3 == 0
    mask = ~hidden.expand(16, k_len)
    if how == "bias":
        mask = torch.zeros(16, k_len, dtype=dtype).masked_fill(~mask, -math.inf)
    scale = 3e38 / 6e4**2 if dtype == torch.float16 else 1.0
    out, lse = functional.attention(query, key, value, mask, scale=scale, return_lse=True)
    assert lse.isfinite().all() and (lse.abs() > torch.finfo(lse.dtype).max / 2).any()
    gradients = torch.autograd.grad(out.sum(), (query, key, value))
    assert not any(g.isnan().any() for g in gradients)  # that of a score of 1e38 times 1e29 may leave float16
    assert dtype == torch.float16 or all(g.isfinite().all() for g in gradients)
    assert all((g[:, :, hidden] == 0).all() for g in gradients[1:])


def rand_column(k_len):
    return rand(1, 1, k_len, 1).double()


@pytest.mark.parametrize("scale", [0.0, 1e-30, -1e-30, 1e30, -3.0])
def test_scales(isa, dtype, scale):
    query, key, value = qkv(9, 30, dtype=dtype)
    if abs(scale) == 1e30:
        query, key = (t / 1e15 if dtype in (*WIDE, torch.bfloat16) else t / 2**13 for t in (query, key))
    arguments = Problem(query=query, key=key, value=value, scale=scale, is_causal=True)
    if scale == 1e30 and dtype == torch.float16:  # scores up to 1e23 that float16's products still make
        results = everything(arguments)
        assert results["out"].isfinite().all() and results["lse"].isfinite().all()
    else:
        in_bound(arguments, isa)


@pytest.mark.parametrize("q_len, k_len", SIZES.values())
def test_a_scale_of_zero_is_a_mean_whatever_the_products(isa, dtype, q_len, k_len, known_on_gpus):
    known_on_gpus(dtype != torch.float16, "products overflow before the scale can take them to 0")
    query, key, value = qkv(q_len, k_len, dtype=dtype)
    large = torch.finfo(dtype).max / 8
    out = functional.attention(query.sign() * large, key.sign() * large, value, scale=0.0)
    mean = value.double().mean(2, keepdim=True).repeat_interleave(2, 1).expand_as(out)
    error = (out.double() - mean).abs()
    own = torch.finfo(dtype).eps * mean.abs()
    sums = k_len * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    assert (error <= own + sums * value.double().abs().mean(2, keepdim=True).repeat_interleave(2, 1)).all()


def test_results_too_large_for_the_storage_are_infinite_not_wrong(isa):
    """float16 ends at 65,504: sums beyond it become inf in the result, and its neighbours stay what they are."""
    query, key, value = (t.half() for t in qkv(9, 30))
    value[0, 0, :, 0] = 65504
    gate = torch.full((2, 4, 9, 2), 1.0)
    arguments = {"query": query, "key": key, "value": value, "merge": "gate", "image_rows": "causal", "gate": gate}
    arguments["modality"] = torch.ones(2, 30, dtype=torch.int64)
    expected = functional.mmca_attention(**arguments)
    gate[0, 0] = 2.0
    actual = functional.mmca_attention(**arguments)
    assert (actual[0, 0, :, 0] == math.inf).all() and actual[0, 0, :, 1:].isfinite().all()
    assert same_bits(actual[:, 1:], expected[:, 1:]) and same_bits(actual[1:], expected[1:])


@pytest.mark.parametrize("q_len, k_len", [(4, 40), (20, 450)])
def test_an_overflow_without_a_gradient_spoils_none(isa, q_len, k_len):
    """Dropout doubles float16 values beyond their range in one feature, which the loss does not use."""
    query, key, value = qkv(q_len, k_len, dtype=torch.float16)
    value[..., 0] = 6e4
    grads = randn(2, 4, q_len, 12, seed=4, dtype=torch.float16), torch.zeros(2, 4, q_len)
    grads[0][..., 0] = 0
    arguments = Problem(query=query, key=key, value=value, dropout_p=0.5)
    results = everything(arguments, grads)
    assert results["out"][..., 0].isinf().any() and results["out"][..., 1:].isfinite().all()
    assert all(results[f"d_{name}"].isfinite().all() for name in ("query", "key", "value"))


@pytest.mark.parametrize("level", [-2.5e5, -200.0, 0.0, 2.5e5])
def test_merging_and_mapping_at_every_level(dtype, level):
    """Halves of the keys, merged, are the whole; the map of the whole sums to 1, also where exp(lse) is no number."""
    query, key, value = qkv(9, 60, dtype=dtype)
    query[..., 0], key[..., 0] = 8.0, level / 8
    whole, lse = functional.attention(query, key, value, scale=1.0, return_lse=True)
    parts = [
        functional.attention(query, key[:, :, part], value[:, :, part], scale=1.0, return_lse=True)
        for part in (slice(0, 25), slice(25, 60))
    ]
    merged, total = functional.merge_attention(*map(list, zip(*parts, strict=True)))
    # S of bounds.py: a score's rounding is an exponent's; 16-bit parts are rounded once each.
    work = torch.finfo(lse.dtype).eps
    relative = work * (4 + 60**0.5 + (query.double().norm(dim=-1).max() * key.double().norm(dim=-1).max()).item())
    stored = 2 * torch.finfo(dtype).eps
    assert (merged.double() - whole.double()).abs().max() <= 4 * (relative + stored) * value.abs().max()
    assert (total.double() - lse.double()).abs().max() <= 4 * relative
    weights = functional.attention_map(query, key, lse, scale=1.0)
    assert (weights.sum(-1) - 1).abs().max() <= 4 * relative
