"""Bad arguments: one error of the right class that names the operator, the argument, what it got and what is accepted,
before any kernel runs. Nothing ends the process."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operators import BACKWARD, arguments, as_in_the_schema, forward, refused

import mmca_ext
from mmca_ext import _C, functional

Q, K, V = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 5, 6)
IDS = torch.tensor([[1, 2, 2, 1, 1], [2, 3, 1, 2, 0]])
OUT, LSE, LSES, GROUPS = (
    torch.zeros(2, 4, 3, 6),
    torch.zeros(2, 4, 3),
    torch.zeros(2, 2, 4, 3),
    torch.zeros(2, 2, 4, 3, 6),
)
BOOL, F32, I64, F16, C64 = torch.bool, torch.float32, torch.int64, torch.float16, torch.complex64
NAN, INF = math.nan, math.inf


def ones(*shape, dtype=BOOL, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


# ---------------------------------------------------------------- the entry points


def raw_attention(query, key, value, **given):
    return forward(query=query, key=key, value=value, **given)


def raw_mmca(query, key, value, **given):
    return raw_attention(query, key, value, **{"modality": IDS, **given})


def raw_attention_backward(query, key, value, **given):
    results = {"grad_out": OUT, "out": OUT, "lse": LSE, "lse_low": LSE, "group_out": torch.zeros(0)}
    return BACKWARD(*arguments(BACKWARD, query=query, key=key, value=value, **{**results, **given}))


def raw_mmca_backward(query, key, value, **given):
    results = {"lse": LSES, "lse_low": LSES, "group_out": GROUPS, "modality": IDS}
    return raw_attention_backward(query, key, value, **{**results, **given})


FLOAT8 = [t.to(torch.float8_e5m2) for t in (Q, K, V)]
ROWS = [t[0].transpose(0, 1) for t in (Q, K, V)]  # packed tensors, and no cu_seqlens

# What query, key and value must be is the same for every entry point: (error, message, query, key, value).
TENSORS = [
    (ValueError, r"query must be 4-D \(B, Hq, Lq, D\), got shape \[4, 3, 8\]", Q[0], K, V),
    (ValueError, r"key must be 4-D \(B, Hkv, Lk, D\), got shape \[2, 5, 8\]", Q, K[0], V),
    (ValueError, r"value must be 4-D \(B, Hkv, Lk, Dv\), got shape \[1, 2, 2, 5, 6\]", Q, K, V[None]),
    (ValueError, r"query must be 4-D \(B, Hq, Lq, D\), got shape \[3, 4, 8\]", *ROWS),
    (TypeError, r"query must be a floating-point tensor, got Long", Q.long(), K.long(), V.long()),
    (TypeError, r"query must be a floating-point tensor, got Bool", Q.bool(), K, V),
    (TypeError, r"query must be a floating-point tensor, got ComplexFloat", Q + 0j, K + 0j, V + 0j),
    (TypeError, r"query must be float32, float64, bfloat16 or float16, got Float8", *FLOAT8),
    (TypeError, r"share one dtype, got Float for query and Double for key", Q, K.double(), V),
    (TypeError, r"share one dtype, got Float for query and BFloat16 for value", Q, K, V.bfloat16()),
    (TypeError, r"share one dtype, got Half for query and BFloat16 for key", Q.half(), K.bfloat16(), V.half()),
    (ValueError, r"share the batch size, got 2, 1 and 2", Q, K[:1], V),
    (ValueError, r"share the batch size, got 2, 2 and 1", Q, K, V[:1]),
    (ValueError, r"key must have the query's head_dim 8, got 7", Q, K[..., :7], V),
    (ValueError, r"value must have the key's heads and length \(2, 5\), got \(1, 5\)", Q, K, V[:, :1]),
    (ValueError, r"value must have the key's heads and length \(2, 5\), got \(2, 4\)", Q, K, V[:, :, :4]),
    (ValueError, r"multiple of the key/value heads, got 3 and 2", Q[:, :3], K, V),
    (ValueError, r"multiple of the key/value heads, got 1 and 2", Q[:, :1], K, V),
    (ValueError, r"at least one head is needed, got 0 query heads and 2", Q[:, :0], K, V),
    (ValueError, r"at least one head is needed, got 4 query heads and 0", Q, K[:, :0], V[:, :0]),
    (ValueError, r"head_dim must be 1\.\.256, got 0", Q[..., :0], K[..., :0], V),
    (ValueError, r"head_dim must be 1\.\.256, got 257", torch.zeros(2, 4, 3, 257), torch.zeros(2, 2, 5, 257), V),
    (ValueError, r"the value's head_dim must be 1\.\.256, got 0", Q, K, V[..., :0]),
    (ValueError, r"the value's head_dim must be 1\.\.256, got 300", Q, K, torch.zeros(2, 2, 5, 300)),
    (TypeError, r"query must be a tensor, got None", None, K, V),
    (TypeError, r"key must be a tensor, got None", Q, None, V),
    (TypeError, r"value must be a tensor, got None", Q, K, None),
]
CALLS = {
    "attention": (functional.attention, "mmca_ext.attention"),
    "mmca": (lambda q, k, v: functional.mmca_attention(q, k, v, IDS), "mmca_ext.mmca_attention"),
    "raw attention": (raw_attention, "mmca_ext.attention"),
    "raw mmca": (raw_mmca, "mmca_ext.mmca_attention"),
    "raw attention_backward": (raw_attention_backward, "mmca_ext.attention"),
    "raw mmca_backward": (raw_mmca_backward, "mmca_ext.mmca_attention"),
    "kernels": (lambda q, k, v: _C.attention_forward(q, k, v), "mmca_ext.attention"),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("case", TENSORS, ids=lambda case: case[1])
def test_query_key_value(name, case):
    (call, operator), (error, message, *tensors) = CALLS[name], case
    if any(t is None for t in tensors):
        message = message.replace("None", "None(Type)?")  # functional says it with the type's name
        if name == "kernels":
            operator, message = "attention_forward()", "incompatible function arguments"  # pybind11's own check
    with refused(error, message, operator + ": "):
        call(*tensors)


# ---------------------------------------------------------------- the other arguments: functional, raw, raw backward

BOTH = [  # of attention and of mmca_attention
    (ValueError, r"dropout_p must be in \[0, 1\], got -0\.1", {"dropout_p": -0.1}),
    (ValueError, r"dropout_p must be in \[0, 1\], got 1\.5", {"dropout_p": 1.5}),
    (ValueError, r"dropout_p must be in \[0, 1\], got nan", {"dropout_p": NAN}),
    (ValueError, r"scale must be finite, got nan", {"scale": NAN}),
    (ValueError, r"scale must be finite, got -?inf", {"scale": -INF}),
    (ValueError, r"scale must be finite in float32, got 1e\+?300", {"scale": 1e300}),
    (ValueError, r"scale must be 0 or at least 1e-30 in size, got 1e-34", {"scale": 1e-34}),
    (ValueError, r"softcap must be 0 \(none\) or positive, from 1e-30 to 1e\+30, got -1", {"softcap": -1.0}),
    (ValueError, r"softcap must be 0 \(none\) or positive, .* got nan", {"softcap": NAN}),
    (ValueError, r"softcap must be 0 \(none\) or positive, .* got inf", {"softcap": INF}),
    (ValueError, r"softcap must be 0 \(none\) or positive, .* got -inf", {"softcap": -INF}),
    (ValueError, r"softcap must be 0 \(none\) or positive, .* got 1e-38", {"softcap": 1e-38}),
    (ValueError, r"softcap must be 0 \(none\) or positive, .* got 1e\+300", {"softcap": 1e300}),
]
ATTENTION = [
    *BOTH,
    (
        ValueError,
        r"attn_mask must broadcast to \(B, Hq, Lq, Lk\) = \[2, 4, 3, 5\], got \[3, 4\]",
        {"attn_mask": ones(3, 4)},
    ),
    (ValueError, r"attn_mask must broadcast .*, got \[2, 2, 3, 5\]", {"attn_mask": ones(2, 2, 3, 5)}),
    (ValueError, r"attn_mask must broadcast .*, got \[2, 2, 3, 5\]", {"attn_mask": ones(2, 2, 3, 5, dtype=F32)}),
    (ValueError, r"attn_mask must broadcast .*, got \[3, 4\]", {"attn_mask": ones(3, 4, dtype=F16)}),
    (ValueError, r"attn_mask must broadcast .*, got \[1, 2, 4, 3, 5\]", {"attn_mask": ones(1, 2, 4, 3, 5)}),
    (ValueError, r"attn_mask must broadcast .*, got \[1, 1, 1, 1, 1\]", {"attn_mask": ones(1, 1, 1, 1, 1, dtype=F32)}),
    (ValueError, r"attn_mask must broadcast .*, got \[0\]", {"attn_mask": ones(0)}),
    (ValueError, r"attn_mask must broadcast .*, got \[0, 5\]", {"attn_mask": ones(0, 5, dtype=F32)}),
    (
        TypeError,
        r"attn_mask must be boolean .* floating-point .*, got Byte",
        {"attn_mask": ones(3, 5, dtype=torch.uint8)},
    ),
    (TypeError, r"attn_mask must be boolean .* floating-point .*, got Long", {"attn_mask": ones(3, 5, dtype=I64)}),
    (
        TypeError,
        r"attn_mask must be boolean .* floating-point .*, got ComplexFloat",
        {"attn_mask": ones(3, 5, dtype=C64)},
    ),
    (
        TypeError,
        r"attn_mask must be float32, float64, bfloat16 or float16, got Float8_e5m2",
        {"attn_mask": ones(3, 5, dtype=F32).to(torch.float8_e5m2)},
    ),
    (ValueError, r"key_mask must have shape \(B, Lk\) = \(2, 5\), got \[5\]", {"key_mask": ones(5)}),
    (ValueError, r"key_mask must have shape \(B, Lk\) = \(2, 5\), got \[1, 5\]", {"key_mask": ones(1, 5)}),
    (ValueError, r"key_mask must have shape \(B, Lk\) = \(2, 5\), got \[2, 4\]", {"key_mask": ones(2, 4)}),
    (TypeError, r"key_mask must be a bool tensor .*, got Long", {"key_mask": ones(2, 5, dtype=I64)}),
    (TypeError, r"key_mask must be a bool tensor .*, got Float", {"key_mask": ones(2, 5, dtype=F32)}),
    (ValueError, r"window must .*, got \(-2, 0\)", {"window": (-2, 0)}),
    (ValueError, r"window must .*, got \(0, -7\)", {"window": (0, -7)}),
    (ValueError, r"max_seqlen belongs to cu_seqlens", {"max_seqlen_q": 3}),
    (ValueError, r"max_seqlen belongs to cu_seqlens", {"max_seqlen_k": 5}),
    (ValueError, r"max_seqlen belongs to cu_seqlens", {"max_seqlen_q": -1, "max_seqlen_k": 5}),
]
MMCA = [
    *BOTH,
    (ValueError, r"modality must have shape \(B, Lk\) = \[2, 5\], got \[5\]", {"modality": IDS[0]}),
    (ValueError, r"modality must have shape \(B, Lk\) = \[2, 5\], got \[2, 3\]", {"modality": IDS[:, :3]}),
    (ValueError, r"modality must have shape \(B, Lk\) = \[2, 5\], got \[1, 5\]", {"modality": IDS[:1]}),
    (ValueError, r"modality must have shape \(B, Lk\) = \[2, 5\], got \[\]", {"modality": IDS[0, 0]}),
    (TypeError, r"modality must be an integer tensor .*, got Float", {"modality": IDS.float()}),
    (TypeError, r"modality must be an integer tensor .*, got Bool", {"modality": IDS.bool()}),
    (TypeError, r"modality must be an integer tensor .*, got ComplexFloat", {"modality": IDS + 0j}),
    (TypeError, r"modality must be an integer tensor .*, got UInt16", {"modality": IDS.to(torch.uint16)}),
    (TypeError, r"modality must be an integer tensor .*, got UInt32", {"modality": IDS.to(torch.uint32)}),
    (TypeError, r"modality must be an integer tensor .*, got UInt64", {"modality": IDS.to(torch.uint64)}),
    (ValueError, r"modality must be 0 \(padding\), 1 \(text\) or >= 2 \(image\), got -1", {"modality": IDS - 2}),
    (ValueError, r"modality must be 0 \(padding\), .*, got -2", {"modality": (IDS - 3).to(torch.int8)}),
    (ValueError, r"modality must fit 32 bits, got 1099511627777", {"modality": IDS + 2**40}),
    (ValueError, r"modality must (fit 32 bits|be 0 .*), got -\d+", {"modality": IDS - 2**40}),
    (ValueError, r"image_id must have shape \(B, Lk\) = \[2, 5\], got \[2, 4\]", {"image_id": IDS[:, 1:]}),
    (ValueError, r"image_id must have shape \(B, Lk\) = \[2, 5\], got \[5\]", {"image_id": IDS[0]}),
    (TypeError, r"image_id must be an integer tensor .*, got Double", {"image_id": IDS.double()}),
    (ValueError, r"image_id must fit 32 bits, got -?\d+", {"image_id": IDS - 2**33}),
    (ValueError, r"image_rows must be .*, got 'rows'", {"image_rows": "rows"}),
    (ValueError, r"merge must be .*, got 'mean'", {"merge": "mean"}),
    (ValueError, r"gate goes with merge 'gate' and only with it, got merge 'sum' and a gate", {"gate": torch.ones(2)}),
    (ValueError, r"gate goes with merge 'gate' .* merge 'none' and a gate", {"gate": torch.ones(2), "merge": "none"}),
    (ValueError, r"gate goes with merge 'gate' .* merge 'lse' and a gate", {"gate": torch.ones(2), "merge": "lse"}),
    (ValueError, r"gate goes with merge 'gate' .* merge 'gate' and no gate", {"merge": "gate"}),
    (
        ValueError,
        r"gate must broadcast to \(B, Hq, Lq, 2\) = \[2, 4, 3, 2\], got \[3\]",
        {"gate": torch.ones(3), "merge": "gate"},
    ),
    (ValueError, r"gate must broadcast to .*, got \[4, 2, 2\]", {"gate": torch.ones(4, 2, 2), "merge": "gate"}),
    (ValueError, r"gate must broadcast to .*, got \[2, 4, 3\]", {"gate": torch.ones(2, 4, 3), "merge": "gate"}),
    (
        ValueError,
        r"gate must broadcast to .*, got \[1, 1, 1, 1, 2\]",
        {"gate": ones(1, 1, 1, 1, 2, dtype=F32), "merge": "gate"},
    ),
    (ValueError, r"gate must broadcast to .*, got \[0\]", {"gate": torch.ones(0), "merge": "gate"}),
    (TypeError, r"gate must be a floating-point tensor, got Long", {"gate": ones(2, dtype=I64), "merge": "gate"}),
    (TypeError, r"gate must be a floating-point tensor, got Bool", {"gate": ones(2), "merge": "gate"}),
    (
        TypeError,
        r"gate must be a floating-point tensor, got ComplexFloat",
        {"gate": ones(2, dtype=C64), "merge": "gate"},
    ),
    (ValueError, r"max_seqlen belongs to cu_seqlens", {"max_seqlen": 5}),
]


def check_everywhere(case, tensors, functions):
    error, message, kwargs = case
    function, raw, raw_backward, operator = functions
    raw_kwargs = as_in_the_schema(kwargs)
    for call, given in ((function, kwargs), (raw, raw_kwargs), (raw_backward, raw_kwargs)):
        python = call is function and {"window", "image_rows", "merge"} & kwargs.keys()  # Python has read it already
        with refused(error, message, "" if python else operator + ": "):
            call(*tensors, **given)


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention(case):
    functions = functional.attention, raw_attention, raw_attention_backward, "mmca_ext.attention"
    check_everywhere(case, (Q, K, V), functions)


def mmca(query, key, value, **kwargs):
    return functional.mmca_attention(query, key, value, **{"modality": IDS, **kwargs})


@pytest.mark.parametrize("case", MMCA, ids=str)
def test_mmca_attention(case):
    functions = mmca, raw_mmca, raw_mmca_backward, "mmca_ext.mmca_attention"
    check_everywhere(case, (Q, K, V), functions)


def test_the_limits_of_float64_are_wider():
    tensors = Q.double(), K.double(), V.double()
    for accepted in ({"softcap": 1e-200}, {"softcap": 1e200}, {"scale": 1e-200}, {"scale": 1e300}):
        functional.attention(*tensors, **accepted)
    for name, value in (("softcap", 1e-300), ("softcap", 1e300), ("scale", 1e-300)):
        with refused(ValueError, rf"{name} must be .*got {value:g}".replace("+", r"\+"), "mmca_ext.attention: "):
            functional.attention(*tensors, **{name: value})


PYTHON = [  # what functional reads itself
    (ValueError, r"window must .*, got 3", {"window": 3}),
    (ValueError, r"window must .*, got \(1,\)", {"window": (1,)}),
    (ValueError, r"window must .*, got \(1, 2, 3\)", {"window": (1, 2, 3)}),
    (TypeError, r"window must hold integers.*0\.5", {"window": (0.5, 1)}),
    (TypeError, r"window must hold integers.*True", {"window": (True, 1)}),
    (TypeError, r"window must hold integers.*'a'", {"window": ("a", 1)}),
    (TypeError, r"unexpected keyword argument 'gate'", {"gate": 1}),
    (TypeError, r"unexpected keyword argument 'modality'", {"modality": IDS}),
]
PYTHON_MMCA = [
    (ValueError, r"image_rows must be .*, got None", {"image_rows": None}),
    (ValueError, r"image_rows must be .*, got \['self'\]", {"image_rows": ["self"]}),
    (ValueError, r"image_rows must be .*, got b'self'", {"image_rows": b"self"}),
    (ValueError, r"merge must be .*, got None", {"merge": None}),
    (ValueError, r"merge must be .*, got \['sum'\]", {"merge": ["sum"]}),
    (TypeError, r"unexpected keyword argument 'attn_mask'", {"attn_mask": ones(3, 5)}),
    (TypeError, r"unexpected keyword argument 'key_mask'", {"key_mask": ones(2, 5)}),
    (TypeError, r"unexpected keyword argument 'is_causal'", {"is_causal": True}),
]


@pytest.mark.parametrize("error, message, kwargs", PYTHON)
def test_what_functional_reads_itself(error, message, kwargs):
    with refused(error, message):
        functional.attention(Q, K, V, **kwargs)


@pytest.mark.parametrize("error, message, kwargs", PYTHON_MMCA)
def test_what_functional_reads_itself_of_mmca(error, message, kwargs):
    with refused(error, message):
        mmca(Q, K, V, **kwargs)


# ---------------------------------------------------------------- what is no tensor, or no number

NO_TENSORS = {"list": [[1.0]], "int": 3, "float": 1.0, "str": "x", "bool": True, "dict": {}}
OPTIONAL = {
    "attention": ("attn_mask", "key_mask", "cu_seqlens_q", "cu_seqlens_k"),
    "mmca_attention": ("gate", "image_id", "cu_seqlens"),
}


@pytest.mark.parametrize("kind", NO_TENSORS)
@pytest.mark.parametrize("name", OPTIONAL)
def test_what_is_no_tensor(name, kind):
    right = {"query": Q, "key": K, "value": V, **({"modality": IDS} if name == "mmca_attention" else {})}
    for argument in (*right, *OPTIONAL[name]):
        with refused(TypeError, rf"mmca_ext\.{name}: {argument} must be a tensor, got {kind}"):
            getattr(functional, name)(**{**right, argument: NO_TENSORS[kind]})
        given = as_in_the_schema({**right, argument: NO_TENSORS[kind]})
        with refused(RuntimeError, rf"'Tensor'|'Optional\[Tensor\]'.* argument '{argument}\w*' .* type '{kind}'"):
            forward(**given)
    for argument in right:
        with refused(TypeError, rf"mmca_ext\.{name}: {argument} must be a tensor, got NoneType"):
            getattr(functional, name)(**{**right, argument: None})


@pytest.mark.parametrize("argument", ["dropout_p", "scale", "softcap", "is_causal", "max_seqlen_q", "max_seqlen_k"])
@pytest.mark.parametrize("value", ["x", [1.0], torch.ones(2)], ids=["str", "list", "tensor of two"])
def test_what_is_no_number(argument, value):
    with refused(RuntimeError, rf"mmca_ext::attention\(\) .*argument '{argument}'"):
        forward(query=Q, key=K, value=V, **{argument: value})
    if argument == "dropout_p" and isinstance(value, torch.Tensor):
        return  # torch says that such a tensor is neither 0 nor not
    with refused(RuntimeError, rf"mmca_ext::attention\(\) .*argument '{argument}'"):
        functional.attention(Q, K, V, **{argument: value})


def test_layers_say_what_is_no_tensor():
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        mmca_ext.MGQA(8, heads=2, dim_head=4)([1.0])


# ---------------------------------------------------------------- what the raw operators alone can be asked

RNG = torch.tensor([1, 2])
RAW = [
    (ValueError, r"dropout needs rng_state", raw_attention, {"dropout_p": 0.5}),
    (ValueError, r"dropout needs rng_state", raw_attention, {"dropout_p": 0.5, "rng_state": torch.zeros(2)}),
    (ValueError, r"dropout needs rng_state", raw_attention, {"dropout_p": 0.5, "rng_state": IDS[0]}),
    (ValueError, r"dropout needs rng_state", raw_mmca, {"dropout_p": 0.5, "rng_state": RNG[:, None]}),
    (ValueError, r"dropout needs rng_state", raw_mmca, {"dropout_p": 0.5, "rng_state": RNG.int()}),
    *(
        (ValueError, r"modality decides what a row sees: attn_mask, key_mask, is_causal and window do not", call, more)
        for call in (raw_mmca, raw_mmca_backward)
        for more in (
            {"attn_mask": ones(3, 5)},
            {"attn_mask": ones(3, 5, dtype=F32)},
            {"key_mask": ones(2, 5)},
            {"is_causal": True},
            {"window_left": 2},
            {"window_right": 0},
        )
    ),
    (ValueError, r"image_id belongs to modality", raw_attention, {"image_id": IDS}),
    (ValueError, r"gate belongs to modality", raw_attention, {"gate": torch.ones(2)}),
    (
        ValueError,
        r"grad_out must have shape .*, got .* \[2, 4, 3, 5\]",
        raw_attention_backward,
        {"grad_out": OUT[..., :5]},
    ),
    (ValueError, r"out and grad_out must have shape", raw_attention_backward, {"out": OUT[:1]}),
    (ValueError, r"out and grad_out must have shape", raw_mmca_backward, {"merge": "none"}),
    (TypeError, r"grad_out must have the query's dtype", raw_attention_backward, {"grad_out": OUT.double()}),
    (TypeError, r"grad_out must have the query's dtype", raw_attention_backward, {"out": OUT.bfloat16()}),
    (ValueError, r"lse and its gradient", raw_attention_backward, {"lse": LSE[..., :2]}),
    (ValueError, r"lse and its gradient", raw_attention_backward, {"lse": LSE.double()}),
    (ValueError, r"lse and its gradient", raw_attention_backward, {"grad_lse": LSES}),
    (ValueError, r"lse and its gradient", raw_mmca_backward, {"lse": LSE}),
    (ValueError, r"lse_low must be", raw_attention_backward, {"lse_low": LSES}),
    (ValueError, r"lse_low must be", raw_mmca_backward, {"lse_low": LSES.double()}),
    (ValueError, r"group_out must be", raw_mmca_backward, {"group_out": torch.zeros(0)}),
    (ValueError, r"group_out must be", raw_mmca_backward, {"group_out": GROUPS.mT.contiguous().mT}),
    (ValueError, r"group_out must be", raw_mmca_backward, {"group_out": GROUPS.double()}),
    *(
        (TypeError, rf"{name} must be a tensor, got None", raw_mmca_backward, {name: None})
        for name in ("grad_out", "out", "lse", "lse_low", "group_out")
    ),
]


@pytest.mark.parametrize("error, message, call, given", RAW)
def test_raw_operators(error, message, call, given):
    operator = "mmca_ext.mmca_attention: " if "mmca" in call.__name__ else "mmca_ext.attention: "
    with refused(error, message, operator):
        call(Q, K, V, **given)


def test_more_queries_than_tokens():
    with refused(ValueError, r"queries are the last Lq of the Lk tokens, got Lq = 5 > Lk = 3"):
        functional.mmca_attention(torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 3, 8), V[:, :, :3], IDS[:, :3])


# ---------------------------------------------------------------- other devices, other kinds of tensors

META = [
    *((raw_attention, name, {name: t}) for name, t in (("attn_mask", ones(3, 5)), ("key_mask", ones(2, 5)))),
    (raw_attention, "attn_mask", {"attn_mask": ones(3, 5, dtype=F32)}),
    *((raw_mmca, name, {name: IDS}) for name in ("modality", "image_id")),
    *((call, "rng_state", {"rng_state": RNG, "dropout_p": 0.5}) for call in (raw_attention, raw_mmca_backward)),
    (raw_mmca, "gate", {"gate": torch.ones(2), "merge": "gate"}),
    *((raw_attention_backward, name, {name: t}) for name, t in (("grad_out", OUT), ("out", OUT), ("lse", LSE))),
    *((raw_attention_backward, name, {name: LSE}) for name in ("lse_low", "grad_lse")),
    *((raw_mmca_backward, name, {name: t}) for name, t in (("group_out", GROUPS), ("image_id", IDS))),
    (functional.attention, "attn_mask", {"attn_mask": ones(3, 5)}),
    (mmca, "modality", {"modality": IDS}),
]


@pytest.mark.parametrize("call, name, given", META)
def test_another_device(call, name, given):
    """A tensor elsewhere is an error, not a result of uninitialised memory."""
    with refused(ValueError, rf"mmca_ext: {name} must be on (query's device cpu|the CPU), got meta"):
        call(Q, K, V, **{**given, name: given[name].to("meta")})


@pytest.mark.parametrize("index", range(3))
def test_query_key_or_value_on_another_device(index):
    tensors = [t.to("meta") if i == index else t for i, t in enumerate((Q, K, V))]
    for call in (functional.attention, mmca, raw_attention_backward):
        with refused(ValueError, r"mmca_ext: \w+ must be on query's device (cpu, got meta|meta, got cpu)"):
            call(*tensors)


def test_kernels_entry_points_want_the_cpu():
    with refused(ValueError, "tensors must be on the CPU or a CUDA device, got meta"):
        mmca_ext._C.attention_forward(Q.to("meta"), K.to("meta"), V.to("meta"))


def test_other_kinds_of_tensors_are_refused_or_right():
    with pytest.raises((NotImplementedError, RuntimeError), match="mmca_ext::attention"):
        functional.attention(Q.to_sparse(), K, V)
    negated = torch._neg_view(torch.randn(2, 4, 3, 8))
    assert torch.equal(functional.attention(negated, K + 1, V + 1), functional.attention(negated.clone(), K + 1, V + 1))


# ---------------------------------------------------------------- nothing ends the process

WILD = r"""
import itertools, math, random, sys, torch
import mmca_ext
ops, rand = torch.ops.mmca_ext, random.Random(int(sys.argv[1]))
generator = torch.Generator().manual_seed(int(sys.argv[1]))

def tensor():
    shape = [rand.choice((0, 1, 1, 2, 2, 3, 5)) for _ in range(rand.choice((0, 1, 2, 3, 3, 4, 4, 4, 5)))]
    dtype = rand.choice((torch.float32,) * 6 + (torch.float64, torch.bool, torch.int64, torch.int32, torch.bfloat16,
                                                torch.float16))
    t = (torch.randn(shape, generator=generator) * rand.choice((1, 1e30))).to(dtype)
    if rand.random() < 0.2 and t.dim() > 1:
        t = t.transpose(0, -1)
    return t

def offsets():
    return torch.tensor([rand.choice((0, 0, 1, 3, 5, -1, 2**40, -2**63)) for _ in range(rand.randrange(5))],
                        dtype=torch.int64)

def argument(a):
    kind = str(a.type)
    if kind.startswith("List"):
        return [None if rand.random() < 0.3 else tensor() for _ in range(rand.choice((5, 5, 5, 0, 3)))]
    if "Tensor" in kind:
        if kind.startswith("Optional") and rand.random() < 0.6:
            return None
        return offsets() if "cu_seqlens" in a.name and rand.random() < 0.8 else tensor()
    if "float" in kind:
        return rand.choice((0.0, 0.5, 1.0, -1.0, 1e300, math.nan, math.inf))
    if "bool" in kind:
        return rand.random() < 0.5
    if "int" in kind.lower():
        return rand.choice((-1, 0, 1, 2**31, 2**62, -2**63, 2**63 - 1))
    return rand.choice(("self", "block", "causal", "self+text", "sum", "lse", "gate", "none", "", "\0", "x" * 10000))

def right(mmca, packed):
    # Arguments that fit together; where none is named here, what changes nothing.
    n, m = (5, 5) if mmca and packed else (3, 5)
    rows = lambda heads, length, dim: torch.randn(*((length, heads, dim) if packed else (2, heads, length, dim)))
    q, k, v = rows(4, n, 8), rows(2, m, 8), rows(2, m, 6)
    lse = torch.randn(*([2] if mmca else []), *([4, n] if packed else [2, 4, n]))
    merge = rand.choice(("sum", "lse", "gate", "none")) if mmca else "sum"
    out = torch.stack((rows(4, n, 6),) * 2) if merge == "none" else rows(4, n, 6)
    ids = torch.randint(0, 4, (m,) if packed else (2, m))
    return {"query": q, "key": k, "value": v, "modality": ids if mmca else None,
            "image_rows": "block", "merge": merge, "gate": torch.randn(2) if merge == "gate" else None,
            "attn_mask": torch.randn(n, m) if not mmca and not packed and rand.random() < 0.5 else None,
            "cu_seqlens_q": torch.tensor([0, 2, n]) if packed else None,
            "cu_seqlens_k": torch.tensor([0, 2, m]) if packed else None, "image_id": None, "key_mask": None,
            "rng_state": torch.tensor([1, 2]), "out": out, "grad_out": torch.randn_like(out), "lse": lse,
            "grad_lse": None, "lse_low": torch.zeros(0), "group_out": torch.randn(*lse.shape, 6), "scale": None,
            "softcap": rand.choice((0.0, 2.0)), "dropout_p": 0.1, "is_causal": False, "window_left": -1,
            "window_right": -1, "max_seqlen_q": None, "max_seqlen_k": None, "attn_mask_gradient": True,
            "grads": [torch.randn_like(q), torch.randn_like(k), torch.randn_like(v), None, None]}

done = failed = 0
compiled = ops.attention.default, ops.attention_backward.default
for op in itertools.islice(itertools.cycle((*compiled, *compiled, ops.attention_double_backward.default)), 4000):
    wild = [argument(a) for a in op._schema.arguments]
    if rand.random() < 0.7:  # mostly right, one argument wrong
        fit = right(rand.random() < 0.5, rand.random() < 0.5)
        wrong = rand.randrange(len(wild))
        wild = [x if i == wrong else fit.get(a.name, x) for i, (a, x) in enumerate(zip(op._schema.arguments, wild))]
    try:
        op(*wild)
        done += 1
    except (ValueError, TypeError, NotImplementedError, RuntimeError):
        failed += 1
    except (AttributeError, IndexError):  # Python's words for it
        if op in compiled:
            raise
        failed += 1
print("survived", done, failed)
"""


@pytest.mark.parametrize("seed", range(3))
def test_wild_arguments_do_not_end_the_process(seed):
    root = str(Path(__file__).parent.parent)
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join((root, os.environ.get("PYTHONPATH", ""))))
    command = [sys.executable, "-c", WILD, str(seed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    calls, errors = map(int, re.fullmatch(r"survived (\d+) (\d+)\n", done.stdout).groups())
    assert calls > 100 and errors > 100
