"""The functional API as agreed: signatures, what is not built yet says so, misspelt options are errors, compilers."""

import ast
import inspect
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

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
    image_rows="self", scale=None): ...
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"is_causal": True},
        {"scale": 0.2, "window": (1, 0)},
        {"window": [None, -1], "key_mask": torch.tensor([[True] * 3 + [False] * 2, [False] * 5])},
        {"attn_mask": torch.tensor([[True, False, True, False, True]] * 3)},
        {"dropout_p": 0.4},
        {"softcap": 0.0, "deterministic": True},
    ],
    ids=str,
)
def test_attention_is_the_reference(kwargs, dtype):
    query, key, value = (t.to(dtype) for t in (QUERY, KEY, VALUE))
    ours, expected = (
        f(query, key, value, return_lse=True, generator=torch.Generator().manual_seed(7), **kwargs)
        for f in (functional.attention, reference.attention)
    )
    torch.testing.assert_close(ours, expected)
    alone = functional.attention(query, key, value, generator=torch.Generator().manual_seed(7), **kwargs)
    assert torch.equal(alone, ours[0])


@pytest.mark.parametrize("image_rows", ["self", "block", "causal", "self+text"])
@pytest.mark.parametrize("merge", ["sum", "lse"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_mmca_attention_is_the_reference(image_rows, merge, p):
    image_id = torch.tensor([[0, 1, 2, 0, 0], [3, 3, 0, 4, 0]])
    ours, expected = (
        f(
            *(QUERY, KEY, VALUE, MODALITY),
            image_rows=image_rows,
            merge=merge,
            image_id=image_id,
            dropout_p=p,
            return_lse=True,
            generator=torch.Generator().manual_seed(7),
        )
        for f in (functional.mmca_attention, reference.mmca_attention)
    )
    torch.testing.assert_close(ours, expected)


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
def test_autocast_is_served(dtype):
    with torch.autocast("cpu", dtype=dtype):
        out = functional.attention(*(t.to(dtype) for t in (QUERY, KEY, VALUE)))
        expected = reference.attention(*(t.to(dtype) for t in (QUERY, KEY, VALUE)))
    assert out.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(out, expected)


# ---------------------------------------------------------------- not built yet

FLAT = QUERY[0].transpose(0, 1)
OFFSETS = torch.tensor([0, 3])


@pytest.mark.parametrize(
    "says, call",
    [
        ("attn_mask", lambda f: f.attention(QUERY, KEY, VALUE, torch.zeros(3, 5))),
        ("softcap", lambda f: f.attention(QUERY, KEY, VALUE, softcap=2.0)),
        ("cu_seqlens", lambda f: f.attention(FLAT, FLAT, FLAT, cu_seqlens_q=OFFSETS, cu_seqlens_k=OFFSETS)),
        ("bfloat16", lambda f: f.attention(QUERY.bfloat16(), KEY.bfloat16(), VALUE.bfloat16())),
        ("float16", lambda f: f.attention(QUERY.half(), KEY.half(), VALUE.half())),
        ("softcap", lambda f: f.mmca_attention(QUERY, KEY, VALUE, MODALITY, softcap=2.0)),
        ("none", lambda f: f.mmca_attention(QUERY, KEY, VALUE, MODALITY, merge="none")),
        ("gate", lambda f: f.mmca_attention(QUERY, KEY, VALUE, MODALITY, merge="gate", gate=torch.ones(2))),
        ("cu_seqlens", lambda f: f.mmca_attention(FLAT, FLAT, FLAT, torch.ones(3).long(), cu_seqlens=OFFSETS)),
        (
            "bfloat16",
            lambda f: f.mmca_attention(QUERY.bfloat16(), KEY.bfloat16(), VALUE.bfloat16(), MODALITY),
        ),
        ("linear_attention", lambda f: f.linear_attention(QUERY, KEY, VALUE, True)),
    ],
)
def test_not_built_yet_names_the_argument_and_the_reference(says, call):
    with pytest.raises(NotImplementedError, match=says) as caught:
        call(functional)
    assert "mmca_ext.reference" in str(caught.value)
    call(reference)  # which has it


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


# ---------------------------------------------------------------- compilers


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(dynamic):
    def f(query, key, value, modality):
        out, lse = functional.attention(query, key, value, is_causal=True, window=(3, None), return_lse=True)
        return out + functional.mmca_attention(query, key, value, modality, image_rows="block"), lse

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (5, 6):
        key, value = randn(2, 2, length, 8, seed=1), randn(2, 2, length, 6, seed=2)
        query = randn(2, 4, 3, 8).requires_grad_()
        modality = torch.ones(2, length, dtype=torch.int64)
        expected, actual = f(query, key, value, modality), compiled(query, key, value, modality)
        torch.testing.assert_close(actual, expected)
        grads = (torch.autograd.grad(out.sum(), query)[0] for out, _ in (expected, actual))
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("rows", [False, True])
def test_fake_results_have_the_real_layout(rows):
    query = randn(2, 3, 4, 8).transpose(1, 2) if rows else QUERY
    calls = (
        (torch.ops.mmca_ext.attention, (query, KEY, VALUE, None, None, None, None, False, -1, -1, 0.0, True)),
        (
            torch.ops.mmca_ext.mmca_attention,
            (query, KEY, VALUE, MODALITY, None, None, "self", "sum", None, 0.0, True),
        ),
    )
    for op, args in calls:
        real = op(*args)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
        for r, f in zip(real, fake, strict=True):
            assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())
