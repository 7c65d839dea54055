"""Sizes at their limits: none, one, the largest, and more than the counters of a simpler kernel hold."""

import math

import devices
import pytest
import torch

from .common import (
    DTYPES,
    ISAS,
    MERGES,
    ROWS,
    WIDE,
    Problem,
    assert_same_bits,
    everything,
    in_bound,
    problem,
    qkv,
    randn,
    same_bits,
)


@pytest.mark.parametrize("empty", ["batch", "q_len", "k_len", "both lengths"])
@pytest.mark.parametrize("merge", [None, *MERGES])
def test_empty_dimensions(isa, empty, merge, dtype):
    if merge and empty == "k_len":
        empty = "batch and q_len"  # more queries than tokens is an error: test_bad_input.py
    q_len, k_len = 0 if "q_len" in empty or "both" in empty else 3, 0 if empty in ("k_len", "both lengths") else 5
    query, key, value = qkv(q_len, k_len, batch=0 if "batch" in empty else 2, dtype=dtype)
    for rows in ROWS if merge else ("",):
        arguments = Problem(query=query, key=key, value=value)
        if merge:
            ids = torch.ones(query.shape[0], k_len, dtype=torch.int64)
            arguments.update(modality=ids, image_rows=rows, merge=merge)
            if merge == "gate":
                arguments["gate"] = randn(2, dtype=dtype)
        else:
            arguments["attn_mask"] = randn(*query.shape[:3], k_len, dtype=dtype)
        results = everything(arguments)
        shape = (*query.shape[:3], 12)
        assert results["out"].shape == ((2, *shape) if merge == "none" else shape)
        lse = results.pop("lse")
        results.pop("inferred_lse", None)
        assert lse.shape == ((2, *shape[:3]) if merge else shape[:3])
        assert k_len or (lse == -math.inf).all()
        assert not any(t.any() for t in results.values())
        for name in arguments.differentiable():
            assert results[f"d_{name}"].shape == arguments[name].shape


@pytest.mark.parametrize("offsets", [[0], [0, 0], [0, 0, 7, 7], [0, 0, 0, 0], [0, 1], [0, 3, 3, 9]])
def test_packed_sequences_of_nothing(isa, offsets, dtype):
    """Empty sequences change nothing; rows past the last offset are 0, and so are their gradients."""
    query, key, value = (randn(12, h, 8, seed=s, dtype=dtype) for h, s in ((4, 1), (2, 2), (2, 3)))
    cu_seqlens, end = torch.tensor(offsets), offsets[-1]
    arguments = Problem(query=query, key=key, value=value, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)
    results = everything(arguments)
    assert not results["out"][end:].any() and (results["lse"][:, end:] == -math.inf).all()
    assert not any(results[f"d_{name}"][end:].any() for name in ("query", "key", "value"))
    assert all(results[name][:end].isfinite().all() for name in ("out", "d_query", "d_key", "d_value"))
    arguments["cu_seqlens_q"] = arguments["cu_seqlens_k"] = cu_seqlens.unique()
    assert_same_bits(everything(arguments), results)
    ids = torch.ones(12, dtype=torch.int64)
    mmca = everything(
        Problem(query=query, key=key, value=value, modality=ids, cu_seqlens=cu_seqlens, image_rows="causal")
    )
    assert not mmca["out"][end:].any() and (mmca["lse"][:, :, end:] == -math.inf).all()
    assert end == 0 or mmca["out"][:end].any()


@pytest.mark.parametrize("q, k", [([0, 0, 4, 4], [0, 5, 5, 9]), ([0, 6, 7], [0, 2, 9]), ([0, 3], [0, 0])])
def test_packed_sequences_that_differ_in_length(isa, q, k, dtype):
    """Queries without keys, keys without queries, and Lq > Lk under causal: a sequence is what it is by itself."""
    query, key, value = (randn(10, h, 8, seed=s, dtype=dtype) for h, s in ((4, 1), (2, 2), (2, 3)))
    arguments = Problem(query=query, key=key, value=value, is_causal=True)
    arguments.update(cu_seqlens_q=torch.tensor(q), cu_seqlens_k=torch.tensor(k))
    in_bound(arguments, isa)
    results = everything(arguments)
    for n in range(len(q) - 1):
        rows, keys = slice(q[n], q[n + 1]), slice(k[n], k[n + 1])
        own = [t[s].transpose(0, 1)[None] for t, s in ((query, rows), (key, keys), (value, keys))]
        alone = everything(Problem(zip(("query", "key", "value"), own, strict=True), is_causal=True))
        for name in alone.keys() & {"out", "inferred_out"}:
            assert same_bits(results[name][rows], alone[name][0].transpose(0, 1)), name
        empty = max(0, (q[n + 1] - q[n]) - (k[n + 1] - k[n]))
        assert (results["lse"][:, rows][:, :empty] == -math.inf).all() and not results["out"][rows][:empty].any()


@pytest.mark.parametrize("feature", ["plain", "causal", "bias", "softcap", "self sum", "block gate", "packed mmca"])
@pytest.mark.parametrize("k_len", [1, 2, 9])
def test_one_token(isa, feature, k_len, dtype):
    """One query; also of one key, whose weight is 1 and passes no gradient to the scores but the lse's."""
    arguments = problem(feature, dtype, 1, k_len)
    in_bound(arguments, isa)
    if k_len == 1 and feature in ("plain", "causal", "bias", "softcap"):
        grads = randn(2, 4, 1, 12, dtype=dtype), torch.zeros(2, 4, 1)
        grads = grads[0], grads[1].to(torch.float64 if dtype == torch.float64 else torch.float32)
        results = everything(arguments, grads)
        assert torch.equal(results["out"], arguments["value"].repeat_interleave(2, 1))
        # Tensor cores sum dO V in an order of their own: what is left beside dO out is inside in_bound's bound, not 0.
        if devices.current == "cpu" or dtype in WIDE:
            assert not results["d_query"].any() and not results["d_key"].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", range(1, 257, 32))
def test_every_head_dim(dtype, start):
    """1..256, each with another value head_dim, by the instruction sets in turn."""
    for dim in range(start, start + 32):
        arguments = problem("bias" if dim % 2 else "block gate", dtype, 7, 11, dim=dim, value_dim=257 - dim)
        isa = ISAS[dim % len(ISAS)]
        in_bound(arguments, isa)


@pytest.mark.parametrize("dim, value_dim", [(256, 1), (1, 256), (255, 256), (64, 65), (128, 96)])
def test_head_dims_of_many_keys(isa, dtype, dim, value_dim):
    arguments = problem("causal lse", dtype, 30, 290, batch=1, heads=2, kv_heads=1, dim=dim, value_dim=value_dim)
    in_bound(arguments, isa)
    in_bound(problem("softcap", dtype, 5, 290, batch=1, heads=2, dim=dim, value_dim=value_dim), isa)


@pytest.mark.parametrize("batch, heads", [(65536, 1), (1, 65536)])
@pytest.mark.parametrize("mmca", [False, True])
def test_many_heads(isa, batch, heads, mmca, dtype):
    query, key, value = qkv(1, 2, batch=batch, heads=heads, kv_heads=heads, dim=2, value_dim=2, dtype=dtype)
    arguments = Problem(query=query, key=key, value=value)
    if mmca:
        arguments["modality"] = torch.tensor([[2, 1]]).expand(batch, 2)
    in_bound(arguments, isa, threads=2, lse=not mmca)


def test_many_sequences(isa, dtype):
    """65,536 packed sequences of one token each, half of them empty."""
    tokens, offsets = 32768, torch.arange(65537) // 2
    query, key, value = (randn(tokens, 1, 2, seed=s, dtype=dtype) for s in (1, 2, 3))
    results = everything(Problem(query=query, key=key, value=value, cu_seqlens_q=offsets, cu_seqlens_k=offsets))
    assert same_bits(results["out"], value)
    expected = (query.double() * key.double()).sum(-1).mT * 2**-0.5
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    size = (query.double().norm(dim=-1) * key.double().norm(dim=-1)).max().item()
    assert (results["lse"].double() - expected).abs().max() <= eps * (4 + 2 * size)


@pytest.mark.parametrize("window", [(2**63 - 1, 2**63 - 1), (2**63 - 1, 0), (0, 2**63 - 1), (2**31, 2**31), (2**62, 1)])
def test_windows_of_any_width(isa, window, dtype):
    """As wide as an integer can say is as wide as the keys are."""
    arguments = problem("plain", dtype, 20, 50)
    expected = everything({**arguments, "window": tuple(min(side, 100) for side in window)})
    assert_same_bits(everything({**arguments, "window": window}), expected)


def test_more_queries_than_keys_under_causal(isa, dtype):
    arguments = problem("causal", dtype, 50, 40)
    results = everything(arguments)
    assert not results["out"][:, :, :10].any() and (results["lse"][:, :, :10] == -math.inf).all()
    assert not results["d_query"][:, :, :10].any() and results["d_query"][:, :, 11:].any()
    in_bound(arguments, isa)
