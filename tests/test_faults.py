"""Faults and extremes: what a user may feed the operators by accident, and what they must make of it."""

import math

import pytest
import torch
from cases import LAYOUTS, Case, check, given

from mmca_ext import _C, functional

ISAS = sorted({kernel["isa"] for kernel in _C.kernels() if kernel["available"]})
SIZES = {"few rows": (4, 40), "one tile": (40, 50), "many tiles": (210, 400)}
ROWS = ("self", "block", "causal", "self+text")


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(q_len, k_len, batch=2, heads=4, kv_heads=2, dim=8, value_dim=12, dtype=torch.float32):
    return [
        randn(batch, heads, q_len, dim, seed=1, dtype=dtype),
        randn(batch, kv_heads, k_len, dim, seed=2, dtype=dtype),
        randn(batch, kv_heads, k_len, value_dim, seed=3, dtype=dtype),
    ]


def everything(query, key, value, modality=None, **kwargs):
    """out, lse and the gradients for fixed gradients of out and lse."""
    tensors = [t.detach().requires_grad_() for t in (query, key, value)]
    if modality is None:
        out, lse = functional.attention(*tensors, return_lse=True, **kwargs)
    else:
        out, lse = functional.mmca_attention(*tensors, modality, return_lse=True, **kwargs)
    grads = randn(*out.shape, seed=4, dtype=out.dtype), randn(*lse.shape, seed=5, dtype=out.dtype)
    gradients = torch.autograd.grad((out, lse), tensors, grads)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *gradients), strict=True))


def same_bits(a, b):
    integers = {4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def assert_same_bits(actual, expected, names=("out", "lse", "dq", "dk", "dv")):
    different = [name for name in names if not same_bits(actual[name], expected[name])]
    assert not different, different


@pytest.fixture(params=ISAS, autouse=True)
def isa(request):
    _C.force_isa(request.param)
    yield request.param
    _C.force_isa(None)


# ---------------------------------------------------------------- rows that see nothing


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("how", ["attn_mask", "key_mask", "causal", "window"])
def test_rows_that_see_nothing_are_zero(size, how):
    q_len, k_len = SIZES[size]
    query, key, value = qkv(q_len, k_len)
    empty = torch.zeros(2, 4, q_len, dtype=torch.bool)
    if how == "attn_mask":
        mask = torch.ones(2, 4, q_len, k_len, dtype=torch.bool)
        mask[0, :, 1] = mask[1, 2] = False
        empty[0, :, 1] = empty[1, 2] = True
        kwargs = {"attn_mask": mask}
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
    results = everything(query, key, value, **kwargs)
    assert (results["out"][empty] == 0).all() and (results["dq"][empty] == 0).all()
    assert (results["lse"][empty] == -math.inf).all() and results["lse"][~empty].isfinite().all()
    assert all(results[name].isfinite().all() for name in ("out", "dq", "dk", "dv"))
    assert (results["out"][~empty] != 0).any()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("merge", ["sum", "lse"])
def test_modality_groups_that_are_empty(rows, merge):
    query, key, value = qkv(50, 50)
    for fill in (0, 1, 2):
        ids = torch.full((2, 50), fill)
        results = everything(query, key, value, ids, image_rows=rows, merge=merge)
        assert all(results[name].isfinite().all() for name in ("out", "dq", "dk", "dv"))
        if fill == 0:
            assert all((results[name] == 0).all() for name in ("out", "dq", "dk", "dv"))
        hidden = 1 if fill == 1 else 0
        assert (results["lse"][hidden] == -math.inf).all()


# ---------------------------------------------------------------- large and small numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("q_len", [4, 50])
@pytest.mark.parametrize("logit", [2.5e5, -2.5e5, 1e3, -200.0])
def test_huge_logits(dtype, q_len, logit):
    query, key, value = qkv(q_len, 140, batch=1, heads=2, dtype=dtype)
    query[..., 0], key[..., 0] = 1.0, logit  # a constant that the softmax takes away, and that a sentinel could meet
    grads = randn(1, 2, q_len, 12, seed=4, dtype=dtype), randn(1, 2, q_len, seed=5, dtype=dtype)
    check(given("attention", query, key, value, *grads, isa=_C.forced_isa(), scale=1.0, is_causal=True))


@pytest.mark.parametrize("q_len", [4, 50])
def test_enormous_queries_and_keys(q_len):
    query, key, value = qkv(q_len, 60)
    results = everything(5e8 * query, 5e8 * key, value)
    assert all(t.isfinite().all() for t in results.values())


@pytest.mark.parametrize("q_len", [1, 20])
def test_every_length(q_len):
    for k_len in range(1, 130):
        query, key, value = qkv(q_len, k_len, batch=1, heads=2, kv_heads=1, dim=5, value_dim=3)
        key[..., 0], query[..., 0] = -120.0, 2.0  # lse is below -89: exp of it is no float32
        grad = randn(1, 2, q_len, 3, seed=4)
        check(given("attention", query, key, value, grad, isa=_C.forced_isa()))


# ---------------------------------------------------------------- NaN and infinity

BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("how", ["key_mask", "attn_mask", "causal", "window"])
def test_keys_hidden_from_all_rows_have_no_influence(size, bad, how):
    q_len, k_len = SIZES[size]
    query, key, value = qkv(q_len, k_len)
    hidden = torch.zeros(k_len, dtype=torch.bool)
    if how == "key_mask":
        hidden[[0, 7, 30, k_len - 1]] = True
        kwargs = {"key_mask": ~hidden.expand(2, k_len)}
    elif how == "attn_mask":
        hidden[[0, 7, 30, k_len - 1]] = True
        kwargs = {"attn_mask": ~hidden}
    elif how == "causal":
        key, value = (torch.cat((t, t[:, :, :3]), 2) for t in (key, value))
        kwargs = {"is_causal": True, "key_mask": (torch.arange(k_len + 3) < k_len).expand(2, -1)}
        hidden = torch.arange(k_len + 3) >= k_len
    else:
        if q_len + 2 >= k_len:
            key, value = (torch.cat((t, t), 2) for t in (key, value))
            k_len, hidden = 2 * k_len, hidden.repeat(2)
        hidden[: k_len - q_len - 2] = True
        kwargs = {"window": (2, None)}
    expected = everything(query, key, value, **kwargs)
    key[:, :, hidden] = bad
    value[:, :, hidden] = bad
    assert_same_bits(everything(query, key, value, **kwargs), expected)
    assert (expected["dk"][:, :, hidden] == 0).all() and (expected["dv"][:, :, hidden] == 0).all()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("merge", ["sum", "lse"])
def test_padding_tokens_have_no_influence(bad, rows, merge):
    query, key, value = qkv(90, 90)
    ids = torch.tensor([0, 2, 2, 1, 1, 0, 3, 3, 1, 0]).repeat(2, 9)
    expected = everything(query, key, value, ids, image_rows=rows, merge=merge)
    for tensor, heads in ((query, 4), (key, 2), (value, 2)):
        tensor.masked_fill_((ids == 0)[:, None, :, None].expand(2, heads, 90, 1), bad)
    assert_same_bits(everything(query, key, value, ids, image_rows=rows, merge=merge), expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["key", "value", "both"])
def test_keys_hidden_from_some_rows_do_not_change_those(size, bad, where):
    """Two halves that do not see each other: what is bad in one leaves the other's results and gradients alone."""
    q_len, k_len = SIZES[size]
    query, key, value = qkv(q_len, k_len)
    rows, keys = torch.arange(q_len) < q_len // 2, torch.arange(k_len) < k_len // 2
    mask = rows[:, None] == keys
    expected = everything(query, key, value, attn_mask=mask)
    if where != "value":
        key[:, :, k_len // 2 + 1] = bad
    if where != "key":
        value[:, :, k_len // 2 + 1] = bad
    actual = everything(query, key, value, attn_mask=mask)
    for name, chosen in (("out", rows), ("lse", rows), ("dq", rows), ("dk", keys), ("dv", keys)):
        assert same_bits(actual[name][:, :, chosen], expected[name][:, :, chosen]), name
    assert not actual["out"][:, :, ~rows].isfinite().all() or where == "key"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bad", BAD)
def test_the_future_does_not_change_the_past(size, bad):
    q_len, k_len = SIZES[size]
    query, key, value = qkv(q_len, k_len)
    expected = everything(query, key, value, is_causal=True)
    key[:, :, -1], value[:, :, -1] = bad, bad
    actual = everything(query, key, value, is_causal=True)
    for name in ("out", "lse", "dq"):
        assert same_bits(actual[name][:, :, :-1], expected[name][:, :, :-1]), name
    assert not actual["out"][:, :, -1].isfinite().any()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_query_spoils_its_own_row_alone(size, bad):
    q_len, k_len = SIZES[size]
    query, key, value = qkv(q_len, k_len)
    keys = torch.arange(k_len) < k_len // 2
    mask = torch.ones(q_len, k_len, dtype=torch.bool)
    mask[2] = ~keys  # and does not see the first half of the keys
    expected = everything(query, key, value, attn_mask=mask)
    query[:, 1, 2] = bad
    actual = everything(query, key, value, attn_mask=mask)
    own = torch.zeros(4, q_len, dtype=torch.bool)
    own[1, 2] = True
    for name in ("out", "lse", "dq"):
        assert same_bits(actual[name][:, ~own], expected[name][:, ~own]), name
    assert actual["out"][:, own].isnan().all()
    for name in ("dk", "dv"):
        assert same_bits(actual[name][:, :, keys], expected[name][:, :, keys]), name
        assert same_bits(actual[name][:, 1], expected[name][:, 1]), name  # of the KV head it does not use


@pytest.mark.parametrize("size", SIZES)
def test_a_bad_gradient_spoils_its_own_row_alone(size):
    q_len, k_len = SIZES[size]
    tensors = [t.requires_grad_() for t in qkv(q_len, k_len)]
    keys = torch.arange(k_len) < k_len // 2
    mask = torch.ones(q_len, k_len, dtype=torch.bool)
    mask[2] = ~keys
    out = functional.attention(*tensors, mask)
    grad = randn(*out.shape, seed=4)
    expected = torch.autograd.grad(out, tensors, grad, retain_graph=True)
    grad[:, 1, 2, 3] = math.nan
    actual = torch.autograd.grad(out, tensors, grad)
    own = torch.zeros(4, q_len, dtype=torch.bool)
    own[1, 2] = True
    assert same_bits(actual[0][:, ~own], expected[0][:, ~own])
    assert all(same_bits(a[:, :, keys], e[:, :, keys]) for a, e in zip(actual[1:], expected[1:], strict=True))


# ---------------------------------------------------------------- where things lie in memory


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_layout_gives_the_bits_of_the_contiguous_one(layout, size, dtype):
    case = Case(1)  # for its layouts
    tensors = qkv(*SIZES[size], dtype=dtype)
    for which in range(4):
        laid_out = [t.clone() for t in tensors]
        grad = randn(2, 4, tensors[0].shape[2], 12, seed=4, dtype=dtype)
        case.dtype = dtype
        if which < 3:
            laid_out[which] = case._lay_out(laid_out[which], layout, None)
        else:
            grad = case._lay_out(grad, layout, None)
        results = []
        for arguments in ((*laid_out, grad), (*(t.contiguous() for t in laid_out), grad.contiguous())):
            leaves = [t.detach().requires_grad_() for t in arguments[:3]]
            out = functional.attention(*leaves, is_causal=True)
            results.append([out, *torch.autograd.grad(out, leaves, arguments[3])])
        assert all(same_bits(a.detach(), b.detach()) for a, b in zip(*results, strict=True)), which


@pytest.mark.parametrize("empty", ["batch", "q_len", "k_len", "both lengths"])
@pytest.mark.parametrize("how", ["attention", *ROWS])
@pytest.mark.parametrize("merge", ["sum", "lse"])
def test_empty_dimensions(empty, how, merge):
    if how != "attention" and empty == "k_len":
        pytest.skip("the queries are the last of the tokens: more queries than tokens is an error")
    q_len, k_len = 0 if empty in ("q_len", "both lengths") else 3, 0 if empty in ("k_len", "both lengths") else 5
    query, key, value = qkv(q_len, k_len, batch=0 if empty == "batch" else 2)
    kwargs = {} if how == "attention" else {"image_rows": how, "merge": merge}
    ids = None if how == "attention" else torch.ones(query.shape[0], k_len, dtype=torch.int64)
    results = everything(query, key, value, ids, **kwargs)
    assert results["out"].shape == (*query.shape[:3], 12) and (results["out"] == 0).all()
    assert results["lse"].shape == (*(() if ids is None else (2,)), *query.shape[:3])
    assert k_len or (results["lse"] == -math.inf).all()
    for name, tensor in (("dq", query), ("dk", key), ("dv", value)):
        assert results[name].shape == tensor.shape and (results[name] == 0).all()


@pytest.mark.parametrize("batch, heads", [(65536, 1), (1, 65536)])
def test_many_heads(batch, heads):
    query, key, value = qkv(1, 2, batch=batch, heads=heads, kv_heads=heads, dim=2, value_dim=2)
    grads = randn(batch, heads, 1, 2, seed=4), randn(batch, heads, 1, seed=5)
    check(given("attention", query, key, value, *grads, isa=_C.forced_isa(), threads=2))


@pytest.mark.parametrize("which", ["batch", "head", "row"])
def test_offsets_beyond_32_bits(which):
    """Strides of 2^31 elements and more, over memory of which only a few pages are ever touched."""
    far = 2**31 + 8
    shape = (2, 2, 3, 4)
    strides = {"batch": (far, 16, 4, 1), "head": (16, far, 4, 1), "row": (16, 4, far, 1)}[which]
    size = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    try:
        memory = torch.empty(size)
    except RuntimeError:
        pytest.skip(f"this machine does not hand out {4 * size >> 30} GiB of untouched memory")
    plain = [randn(*shape, seed=seed) for seed in (1, 2, 3)]
    for i in range(4):
        tensors = [t.clone() for t in plain]
        grad = randn(*shape, seed=4)
        mask = torch.rand(2, 2, 3, 3, generator=torch.Generator().manual_seed(5)) < 0.8
        distant = memory.as_strided(shape, strides)
        distant.copy_(tensors[i] if i < 3 else grad)
        results = []
        for use in (False, True):
            leaves = [(distant if use and j == i else t).detach().requires_grad_() for j, t in enumerate(tensors)]
            out = functional.attention(*leaves, mask)
            results.append([out, *torch.autograd.grad(out, leaves, distant if use and i == 3 else grad)])
        assert all(same_bits(a.detach(), b.detach()) for a, b in zip(*results, strict=True)), i
    del memory, distant
    strides = {"batch": (far, 9, 3, 1), "head": (9, far, 3, 1), "row": (9, 3, far, 1)}[which]
    bits = torch.empty(sum((n - 1) * s for n, s in zip((2, 2, 3, 3), strides, strict=True)) + 1, dtype=torch.bool)
    distant = bits.as_strided((2, 2, 3, 3), strides)
    distant.copy_(mask)
    assert torch.equal(functional.attention(*plain, distant), functional.attention(*plain, mask))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("how", ["attention", "self", "causal"])
def test_neighbours_in_the_batch_have_no_influence(size, how):
    q_len, k_len = SIZES[size]
    query, key, value = qkv(q_len, k_len, batch=3)
    generator = torch.Generator().manual_seed(6)
    if how == "attention":
        ids, kwargs = None, {"key_mask": torch.rand(3, k_len, generator=generator) < 0.8, "is_causal": True}
    else:
        ids, kwargs = torch.randint(0, 4, (3, k_len), generator=generator), {"image_rows": how}
    expected = everything(query, key, value, ids, **kwargs)
    for tensor in (query, key, value):
        tensor[0], tensor[2] = 1e6 * tensor[1], math.nan
    if ids is None:
        kwargs["key_mask"][0], kwargs["key_mask"][2] = True, False
    else:
        ids[0], ids[2] = 1, 2
    actual = everything(query, key, value, ids, **kwargs)
    for name, tensor in expected.items():
        mine = (slice(None), 1) if name == "lse" and ids is not None else (1,)
        assert same_bits(actual[name][mine], tensor[mine]), name
    alone = everything(
        *(t[1:2] for t in (query, key, value)),
        None if ids is None else ids[1:2],
        **({"key_mask": kwargs["key_mask"][1:2], "is_causal": True} if ids is None else kwargs),
    )
    assert same_bits(alone["out"][0], expected["out"][1])


def test_repeats_are_bitwise_equal():
    query, key, value = qkv(210, 400)
    first = everything(query, key, value, is_causal=True)
    for _ in range(20):
        assert_same_bits(everything(query, key, value, is_causal=True), first)


# ---------------------------------------------------------------- in place


@pytest.mark.parametrize(
    "which", ["query", "key", "value", "out", "lse", "attn_mask", "key_mask", "modality", "image_id"]
)
def test_modified_saved_tensors_are_noticed(which):
    leaves = [t.requires_grad_() for t in qkv(5, 9)]
    query, key, value = (t.clone() for t in leaves)
    masks = {"attn_mask": torch.ones(5, 9, dtype=torch.bool), "key_mask": torch.ones(2, 9, dtype=torch.bool)}
    ids = torch.ones(2, 9, dtype=torch.int64)
    if which in ("modality", "image_id"):
        out, lse = functional.mmca_attention(query, key, value, ids, image_id=(images := ids.clone()), return_lse=True)
    else:
        out, lse = functional.attention(query, key, value, return_lse=True, **masks)
        images = None
    loss = out.sum()
    victim = {
        "query": query,
        "key": key,
        "value": value,
        "out": out,
        "lse": lse,
        "modality": ids,
        "image_id": images,
        **masks,
    }
    with torch.no_grad():
        victim[which].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("q_len", [1, 8, 9])
def test_weights_of_the_backward_are_those_of_the_forward(q_len):
    """With values and a gradient of one, dV of a row sums to its weights: to 1. Sums of 600 terms round by less than
    600 eps, and by about sqrt(600) eps in practice; scores of hundreds would show a second way to compute them. (The
    portable kernels, which cannot fuse a multiply-add, round each score once more.)"""
    generator = torch.Generator().manual_seed(0)
    query, key = (30 * torch.randn(1, 1, n, 33, generator=generator) for n in (q_len, 600))
    value = torch.ones(1, 1, 600, 1, requires_grad=True)
    functional.attention(query, key, value).sum().backward()
    largest = (query @ key.mT).abs().max().item() * 33**-0.5
    roundings = 600**0.5 + (largest if _C.forced_isa() == "scalar" else 0.0)
    assert abs(value.grad.double().sum().item() - q_len) <= roundings * torch.finfo(torch.float32).eps * q_len


def test_a_row_alone_copies_its_value_whatever_its_score():
    query = torch.full((1, 1, 1, 4), 1e20)  # the score overflows
    value = torch.ones(1, 1, 1, 4, requires_grad=True)
    for merge in ("sum", "lse"):
        out = functional.mmca_attention(query, query, value, torch.tensor([[2]]), merge=merge)
        assert torch.equal(out, torch.ones(1, 1, 1, 4))
        assert torch.equal(torch.autograd.grad(out.sum(), value)[0], torch.ones(1, 1, 1, 4))


def test_scores_at_the_end_of_float32():
    """log2(e) times such a log-sum-exp is no float32 any more."""
    generator = torch.Generator().manual_seed(0)
    query = torch.full((1, 1, 16, 1), 1.6e19, requires_grad=True)
    key = (1.6e19 * torch.rand(1, 1, 300, 1, generator=generator)).requires_grad_()
    value = torch.randn(1, 1, 300, 4, generator=generator).requires_grad_()
    hidden = torch.arange(300) % 3 == 0
    out = functional.attention(query, key, value, ~hidden.expand(16, 300))
    gradients = torch.autograd.grad(out.sum(), (query, key, value))
    assert all(g.isfinite().all() for g in gradients)
    assert all((g[:, :, hidden] == 0).all() for g in gradients[1:])
