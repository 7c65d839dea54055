"""The functional API as agreed: signatures, the reference's numbers for every argument, misspelt options are errors."""

import ast
import inspect
from itertools import pairwise

import devices
import pytest
import torch
import torch.nn.functional as F
from bounds import bounds, weight_rounding
from cases import excess, given, run_kernels, run_reference

import mmca_ext
from mmca_ext import functional, reference

# The contract, in words to be parsed: names, order, kinds and defaults.
SIGNATURES = """
def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, *, key_mask=None,
    window=None, softcap=None, generator=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
    max_seqlen_k=None, deterministic=False, return_lse=False): ...
def mmca_attention(query, key, value, modality, *, image_rows="self", merge="sum", gate=None, image_id=None,
    dropout_p=0.0, scale=None, softcap=None, generator=None, cu_seqlens=None, max_seqlen=None, deterministic=False,
    return_lse=False): ...
def linear_attention(query, key, value, is_causal=False, *, key_mask=None, cu_seqlens_q=None, cu_seqlens_k=None,
    state=None, return_state=False): ...
def merge_attention(outputs, lses): ...
def attention_map(query, key, lse, *, rows=None, is_causal=False, attn_mask=None, key_mask=None, modality=None,
    image_rows="self", scale=None, window=None, softcap=None, image_id=None): ...
def dropout_mask(batch, heads, q_len, k_len, p, seed, offset): ...
"""
FUNCTIONS = {node.name: ast.unparse(node.args) for node in ast.parse(SIGNATURES).body}


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


QUERY, KEY, VALUE = randn(2, 4, 3, 8), randn(2, 2, 5, 8, seed=1), randn(2, 2, 5, 6, seed=2)
MODALITY = torch.tensor([[1, 2, 2, 1, 1], [2, 3, 1, 2, 0]])


@pytest.mark.parametrize("module", [functional, reference], ids=["functional", "reference"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_signature(name, module):
    parameters = inspect.signature(getattr(module, name)).parameters.values()
    if module is reference:
        parameters = [p for p in parameters if p.name != "rng_state"]
    agreed = eval(f"lambda {FUNCTIONS[name]}: None")
    assert list(parameters) == list(inspect.signature(agreed).parameters.values())
    assert name in module.__all__ and getattr(module, name).__doc__


def test_package_exports():
    assert mmca_ext.__version__ == "0.1.0"
    for name in ("MGQA", "MultiModalCausalAttention", "MultiModalCrossAttention", "SimpleMMCA"):
        assert getattr(mmca_ext, name) is getattr(mmca_ext.nn, name)
    assert functional.LinearState is reference.LinearState


def test_docstring_is_loud_about_causal():
    for module in (functional, functional.attention):
        assert "BOTTOM-RIGHT" in module.__doc__.upper() and "SDPA" in module.__doc__


# ---------------------------------------------------------------- the same numbers as the reference


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ROWS = torch.tensor([[True, False, True, False, True]] * 3)
BIAS = randn(4, 3, 5, seed=3).masked_fill(~ROWS, -torch.inf)
FLAT = [t.flatten(0, 1) for t in (randn(2, 4, 4, 8), randn(2, 4, 2, 8, seed=1), randn(2, 4, 2, 6, seed=2))]
OFFSETS = torch.tensor([0, 3, 3, 7])  # of 8 tokens


# In 16 bits the backward takes dO . out from the rounded out: an absolute error, whatever cancels in the gradient.
TOLERANCES = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 5e-3},
    torch.float16: {"rtol": 2e-3, "atol": 1e-3},
}


def arriving_at(results):
    return [randn(*r.shape, seed=8, dtype=r.dtype).masked_fill(r == -torch.inf, 0.0) for r in results]


def held_to_reference(name, tensors, dtype, *more, **kwargs):
    """functional's (out, lse), which the reference gives too, with the same gradients and the same dropout."""
    found = []
    for module in (functional, reference):
        args = [t.detach().to(dtype).requires_grad_() for t in tensors]
        generator = torch.Generator().manual_seed(7)
        wanted = [t for t in kwargs.values() if isinstance(t, torch.Tensor) and t.requires_grad]
        results = getattr(module, name)(*args, *more, return_lse=True, generator=generator, **kwargs)
        found.append((results, torch.autograd.grad(results, [*args, *wanted], arriving_at(results))))
    if devices.current != "cpu" and dtype.itemsize == 2:
        assert_in_bounds(name, tensors, dtype, found[0][0], *more, **kwargs)
    else:
        assert_same(*found, dtype)
    return found[0][0]


def assert_in_bounds(name, tensors, dtype, results, *modality, **kwargs):
    """Where tensor cores round weights and scores' gradients to 16 bits, the tolerances above do not hold, as those
    roundings do not cancel where a gradient does: held to the reference in fp64 and the bounds derived from them."""
    kwargs.update(zip(("modality",), modality))
    kwargs = {option: value for option, value in kwargs.items() if value is not None}
    case = given(name, *(t.to(dtype) for t in tensors), *arriving_at(results), **kwargs)
    actual, exact = run_kernels(case), run_reference(case, torch.float64)
    bound = bounds(case, exact, weight_rounding(case))
    ratios = {result: excess(actual[result], exact[result], bound[result]) for result in exact}
    assert all(ratio <= 1.0 for ratio, _ in ratios.values()), f"error over bound, and where: {ratios}"


def assert_same(ours, expected, dtype):
    (out, lse), (other, other_lse) = ours[0], expected[0]
    torch.testing.assert_close(out, other, **TOLERANCES[dtype])
    torch.testing.assert_close(lse, other_lse, **TOLERANCES[lse.dtype])
    for a, b in zip(ours[1], expected[1], strict=True):
        # A bias or a gate may have a dtype of its own: what is coarser decides.
        coarser = max(dtype, a.dtype, key=lambda d: TOLERANCES[d]["atol"])
        torch.testing.assert_close(a, b, **TOLERANCES[coarser])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"is_causal": True},
        {"scale": 0.2, "window": (1, 0)},
        {"window": [None, -1], "key_mask": torch.tensor([[True] * 3 + [False] * 2, [False] * 5])},
        {"attn_mask": ROWS},
        {"attn_mask": BIAS},
        {"attn_mask": BIAS.detach().requires_grad_(), "is_causal": True, "softcap": 2.0},
        {"attn_mask": randn(5, seed=4, dtype=torch.bfloat16).requires_grad_()},
        {"attn_mask": randn(2, 1, 1, 5, seed=4, dtype=torch.float64).requires_grad_()},
        {"softcap": 1.5, "scale": 1.0},
        {"dropout_p": 0.4},
        {"softcap": 0.0, "deterministic": True},
    ],
    ids=lambda kwargs: str({name: tuple(v.shape) if torch.is_tensor(v) else v for name, v in kwargs.items()}),
)
def test_attention_is_the_reference(kwargs, dtype):
    out, _ = held_to_reference("attention", (QUERY, KEY, VALUE), dtype, **kwargs)
    query, key, value = (t.to(dtype) for t in (QUERY, KEY, VALUE))
    # Without lse and without gradients: the same result alone.
    alone = functional.attention(query, key, value, generator=torch.Generator().manual_seed(7), **kwargs)
    torch.testing.assert_close(alone, out)
    assert isinstance(alone, torch.Tensor) and alone.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kwargs", [{}, {"is_causal": True}, {"window": (1, 1), "softcap": 2.0}], ids=str)
def test_packed_attention_is_the_reference(kwargs, p, dtype):
    """And row by row what each sequence gives by itself."""
    queries = torch.tensor([0, 1, 5, 6])
    offsets = {"cu_seqlens_q": queries, "cu_seqlens_k": OFFSETS.int(), "max_seqlen_q": 4, "max_seqlen_k": 9}
    out, lse = held_to_reference("attention", FLAT, dtype, dropout_p=p, **offsets, **kwargs)
    if p:
        return
    query, key, value = (t.to(dtype) for t in FLAT)
    for (a, b), (c, d) in zip(pairwise(queries.tolist()), pairwise(OFFSETS.tolist())):
        dense = [t[None].transpose(1, 2) for t in (query[a:b], key[c:d], value[c:d])]
        alone, alone_lse = functional.attention(*dense, return_lse=True, **kwargs)
        torch.testing.assert_close(out[a:b].transpose(0, 1)[None], alone)
        torch.testing.assert_close(lse[:, a:b][None], alone_lse)
    assert (out[6:] == 0).all() and (lse[:, 6:] == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("image_rows", ["self", "block", "causal", "self+text"])
@pytest.mark.parametrize("merge", ["sum", "lse", "gate", "none"])
@pytest.mark.parametrize("p, softcap", [(0.0, None), (0.3, 2.0)])
def test_mmca_attention_is_the_reference(image_rows, merge, p, softcap, dtype):
    kwargs = {"image_rows": image_rows, "merge": merge, "dropout_p": p, "softcap": softcap}
    image_id = torch.tensor([[0, 1, 2, 0, 0], [3, 3, 0, 4, 0]])
    for gate in (randn(2, 4, 3, 2, seed=5), randn(4, 1, 2, seed=6, dtype=dtype)) if merge == "gate" else (None,):
        kwargs["gate"] = gate if gate is None else gate.requires_grad_()
        held_to_reference("mmca_attention", (QUERY, KEY, VALUE), dtype, MODALITY, image_id=image_id, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("image_rows", ["self", "block", "causal", "self+text"])
@pytest.mark.parametrize("merge", ["sum", "lse", "gate", "none"])
def test_packed_mmca_attention_is_the_reference(image_rows, merge, dtype):
    modality, image_id = torch.tensor([1, 2, 2, 2, 1, 3, 3, 1]), torch.tensor([0, 1, 2, 2, 0, 2, 2, 0])
    kwargs = {"image_rows": image_rows, "merge": merge, "cu_seqlens": OFFSETS, "max_seqlen": 4, "softcap": 3.0}
    if merge == "gate":
        kwargs["gate"] = randn(8, 4, 2, seed=5).requires_grad_()
    for p in (0.0, 0.3):
        out, lse = held_to_reference("mmca_attention", FLAT, dtype, modality, image_id=image_id, dropout_p=p, **kwargs)
        assert (out[..., 7:, :, :] == 0).all() and (lse[..., 7:] == -torch.inf).all()


def test_merges_of_the_parts_are_the_merged():
    """Of what "none" returns, the sum, the gated sum and the joint softmax are the other merges."""
    tensors = QUERY.double(), KEY.double(), VALUE.double()
    kwargs = {"image_rows": "causal", "return_lse": True}
    parts, lses = functional.mmca_attention(*tensors, MODALITY, merge="none", **kwargs)
    gate = randn(4, 3, 2, dtype=torch.float64)
    merged = {
        "sum": (parts.sum(0), {}),
        "gate": ((parts * gate.movedim(-1, 0)[:, None, ..., None]).sum(0), {"gate": gate}),
        "lse": (functional.merge_attention(parts, lses)[0], {}),
    }
    for merge, (expected, more) in merged.items():
        out, lse = functional.mmca_attention(*tensors, MODALITY, merge=merge, **kwargs, **more)
        torch.testing.assert_close(out, expected)
        assert torch.equal(lse, lses)


def test_positional_arguments_are_those_of_sdpa():
    mask = torch.ones(3, 5, dtype=torch.bool)
    value = VALUE.repeat_interleave(2, 1)
    args = (QUERY, KEY.repeat_interleave(2, 1), value, mask, 0.0, False)
    torch.testing.assert_close(functional.attention(*args), F.scaled_dot_product_attention(*args))


def test_lse_is_differentiable():
    grads = []
    for f in (functional.attention, reference.attention):
        tensors = [t.double().requires_grad_() for t in (QUERY, KEY, VALUE)]
        out, lse = f(*tensors, return_lse=True)
        grads.append(torch.autograd.grad((out.sin().sum(), lse.cos().sum()), tensors))
    torch.testing.assert_close(*grads)


def test_split_keys_merge_with_gradients():
    grads = []
    for pieces in ((0, 5), (0, 2, 5)):
        tensors = query, key, value = [t.double().requires_grad_() for t in (QUERY, KEY, VALUE)]
        parts = [
            functional.attention(query, key[:, :, a:b], value[:, :, a:b], return_lse=True) for a, b in pairwise(pieces)
        ]
        out, lse = functional.merge_attention([o for o, _ in parts], [s for _, s in parts])
        grads.append((out, lse, *torch.autograd.grad(out.sin().sum() + lse.cos().sum(), tensors)))
    torch.testing.assert_close(*grads)


def test_output_is_laid_out_as_query():
    rows = randn(2, 3, 4, 8)
    out = functional.attention(rows.transpose(1, 2), KEY, VALUE)
    assert out.transpose(1, 2).is_contiguous()
    assert functional.attention(QUERY, KEY, VALUE).is_contiguous()
    assert functional.mmca_attention(rows.transpose(1, 2), KEY, VALUE, MODALITY).transpose(1, 2).is_contiguous()


def test_causal_is_bottom_right():
    out = functional.attention(QUERY, KEY, VALUE, is_causal=True)
    mask = torch.ones(3, 5, dtype=torch.bool).tril(2)
    torch.testing.assert_close(out, functional.attention(QUERY, KEY, VALUE, mask))
    assert (
        functional.attention(randn(1, 1, 3, 8), KEY[:1, :1, :2], VALUE[:1, :1, :2], is_causal=True)[:, :, 0] == 0
    ).all()


def test_generator_repeats_the_mask():
    draws = [
        functional.attention(QUERY, KEY, VALUE, dropout_p=0.5, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", DTYPES)
def test_autocast_is_served(inputs, dtype):
    tensors = [t.to(inputs) for t in (QUERY, KEY, VALUE)]
    with torch.autocast("cpu", dtype=dtype):
        found = [
            (m.attention(*tensors, is_causal=True), m.mmca_attention(*tensors, MODALITY))
            for m in (functional, reference)
        ]
    expected = inputs if inputs == torch.float64 else dtype
    assert {out.dtype for outs in found for out in outs} == {expected}
    # Tensor cores round weights to 16 bits: half an epsilon of values' size for each softmax, of which the sum has two.
    rounded = dtype if devices.current != "cpu" and expected.itemsize == 2 else None
    for softmaxes, ours, theirs in zip((1, 2), *found, strict=True):
        if rounded is None:
            torch.testing.assert_close(ours, theirs)
        else:
            rounding = softmaxes * torch.finfo(rounded).eps / 2 * VALUE.abs().max().item()
            torch.testing.assert_close(ours, theirs, rtol=torch.finfo(rounded).eps, atol=rounding)


# ---------------------------------------------------------------- options that do not exist


@pytest.mark.parametrize(
    "error, says, call",
    [
        (
            ValueError,
            "image_rows.*'own'",
            lambda: functional.mmca_attention(QUERY, KEY, VALUE, MODALITY, image_rows="own"),
        ),
        (ValueError, "merge.*'mean'", lambda: functional.mmca_attention(QUERY, KEY, VALUE, MODALITY, merge="mean")),
        (ValueError, "gate", lambda: functional.mmca_attention(QUERY, KEY, VALUE, MODALITY, gate=torch.ones(2))),
        (ValueError, "max_seqlen", lambda: functional.mmca_attention(QUERY, KEY, VALUE, MODALITY, max_seqlen=4)),
        (ValueError, "max_seqlen", lambda: functional.attention(QUERY, KEY, VALUE, max_seqlen_q=4)),
        (ValueError, "window", lambda: functional.attention(QUERY, KEY, VALUE, window=4)),
        (ValueError, "window", lambda: functional.attention(QUERY, KEY, VALUE, window=(1, 2, 3))),
        (ValueError, "window", lambda: functional.attention(QUERY, KEY, VALUE, window=(-2, 0))),
        (TypeError, "window", lambda: functional.attention(QUERY, KEY, VALUE, window=(0.5, 0))),
        (ValueError, "dropout_p", lambda: functional.attention(QUERY, KEY, VALUE, dropout_p=-0.5)),
        (ValueError, "scale", lambda: functional.attention(QUERY, KEY, VALUE, scale=float("nan"))),
        (TypeError, "attn_mask", lambda: functional.attention(QUERY, KEY, VALUE, torch.ones(3, 5).long())),
        (ValueError, "heads", lambda: functional.attention(QUERY[:, :3], KEY, VALUE)),
        (TypeError, "dtype|floating", lambda: functional.attention(QUERY.long(), KEY.long(), VALUE.long())),
        (TypeError, "dtype", lambda: functional.attention(QUERY, KEY.double(), VALUE)),
        (ValueError, "modality", lambda: functional.mmca_attention(QUERY, KEY, VALUE, MODALITY - 2)),
        (TypeError, "modality", lambda: functional.mmca_attention(QUERY, KEY, VALUE, MODALITY.float())),
    ],
)
def test_wrong_arguments_are_named(error, says, call):
    with pytest.raises(error, match=says):
        call()
