"""Bad arguments: one error of the right class that names the argument and what it got. Nothing ends the process."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmca_ext
from mmca_ext import functional

ops = torch.ops.mmca_ext
Q, K, V = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 5, 6)
IDS = torch.tensor([[1, 2, 2, 1, 1], [2, 3, 1, 2, 0]])
OUT, LSE, LSES, GROUPS = (
    torch.zeros(2, 4, 3, 6),
    torch.zeros(2, 4, 3),
    torch.zeros(2, 2, 4, 3),
    torch.zeros(2, 2, 4, 3, 6),
)
BOOL = torch.bool


def ones(*shape, dtype=BOOL, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


# What query, key and value must be is the same for every entry point: (error, message, query, key, value).
TENSORS = [
    (ValueError, r"query must be 4-D \(B, Hq, Lq, D\), got shape \[4, 3, 8\]", Q[0], K, V),
    (ValueError, r"key must be 4-D \(B, Hkv, Lk, D\), got shape \[2, 5, 8\]", Q, K[0], V),
    (ValueError, r"value must be 4-D \(B, Hkv, Lk, Dv\), got shape \[1, 2, 2, 5, 6\]", Q, K, V[None]),
    (TypeError, r"query must be a floating-point tensor, got Long", Q.long(), K.long(), V.long()),
    (TypeError, r"query must be a floating-point tensor, got Bool", Q.bool(), K, V),
    (TypeError, r"query must be a floating-point tensor, got ComplexFloat", Q + 0j, K + 0j, V + 0j),
    (TypeError, r"share one dtype, got Float for query and Double for key", Q, K.double(), V),
    (TypeError, r"share one dtype, got Float for query and BFloat16 for value", Q, K, V.bfloat16()),
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
]


def raw_attention(q, k, v, mask=None, key_mask=None, rng=None, scale=None, causal=False, left=-1, right=-1, p=0.0):
    return ops.attention(q, k, v, mask, key_mask, rng, scale, causal, left, right, p, False)


def raw_mmca(q, k, v, ids=IDS, image=None, rng=None, rows="self", merge="sum", scale=None, p=0.0, save=False):
    return ops.mmca_attention(q, k, v, ids, image, rng, rows, merge, scale, p, save)


def raw_attention_backward(
    q, k, v, grad=OUT, grad_lse=None, out=OUT, lse=LSE, low=LSE, mask=None, key_mask=None, p=0.0, rng=None
):
    return ops.attention_backward(grad, grad_lse, q, k, v, out, lse, low, mask, key_mask, rng, None, False, -1, -1, p)


def raw_mmca_backward(
    q, k, v, grad=OUT, grad_lse=None, out=OUT, lse=LSES, low=LSES, groups=GROUPS, ids=IDS, image=None, rows="self"
):
    return ops.mmca_attention_backward(
        grad, grad_lse, q, k, v, out, lse, low, groups, ids, image, None, rows, "sum", None, 0.0
    )


CALLS = {
    "attention": (functional.attention, "mmca_ext.attention"),
    "mmca": (lambda q, k, v: functional.mmca_attention(q, k, v, IDS), "mmca_ext.mmca_attention"),
    "raw attention": (raw_attention, "mmca_ext.attention"),
    "raw mmca": (raw_mmca, "mmca_ext.mmca_attention"),
    "raw attention_backward": (raw_attention_backward, "mmca_ext.attention"),
    "raw mmca_backward": (raw_mmca_backward, "mmca_ext.mmca_attention"),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("case", TENSORS, ids=lambda case: case[1])
def test_query_key_value(name, case):
    (call, operator), (error, message, *tensors) = CALLS[name], case
    with pytest.raises(error, match=message) as caught:
        call(*tensors)
    assert type(caught.value) is error and str(caught.value).startswith(operator)


# ---------------------------------------------------------------- the other arguments

NAN, INF = math.nan, math.inf
ATTENTION = [
    (
        ValueError,
        r"attn_mask must broadcast to \(B, Hq, Lq, Lk\) = \[2, 4, 3, 5\], got \[3, 4\]",
        {"attn_mask": ones(3, 4)},
    ),
    (ValueError, r"attn_mask must broadcast .*, got \[2, 2, 3, 5\]", {"attn_mask": ones(2, 2, 3, 5)}),
    (ValueError, r"attn_mask must broadcast .*, got \[1, 2, 4, 3, 5\]", {"attn_mask": ones(1, 2, 4, 3, 5)}),
    (ValueError, r"attn_mask must broadcast .*, got \[0\]", {"attn_mask": ones(0)}),
    (TypeError, r"attn_mask must be a bool tensor .*, got Byte", {"attn_mask": ones(3, 5, dtype=torch.uint8)}),
    (TypeError, r"attn_mask must be a bool tensor .*, got ComplexFloat", {"attn_mask": ones(3, 5, dtype=torch.cfloat)}),
    (NotImplementedError, r"float attn_mask", {"attn_mask": ones(3, 5, dtype=torch.float32)}),
    (NotImplementedError, r"float attn_mask", {"attn_mask": ones(3, 5, dtype=torch.float16)}),
    (ValueError, r"key_mask must have shape \(B, Lk\) = \(2, 5\), got \[5\]", {"key_mask": ones(5)}),
    (ValueError, r"key_mask must have shape \(B, Lk\) = \(2, 5\), got \[1, 5\]", {"key_mask": ones(1, 5)}),
    (ValueError, r"key_mask must have shape \(B, Lk\) = \(2, 5\), got \[2, 4\]", {"key_mask": ones(2, 4)}),
    (TypeError, r"key_mask must be a bool tensor .*, got Long", {"key_mask": ones(2, 5, dtype=torch.int64)}),
    (TypeError, r"key_mask must be a bool tensor .*, got Float", {"key_mask": ones(2, 5, dtype=torch.float32)}),
    (ValueError, r"dropout_p must be in \[0, 1\], got -0\.1", {"dropout_p": -0.1}),
    (ValueError, r"dropout_p must be in \[0, 1\], got 1\.5", {"dropout_p": 1.5}),
    (ValueError, r"dropout_p must be in \[0, 1\], got nan", {"dropout_p": NAN}),
    (ValueError, r"scale must be finite, got nan", {"scale": NAN}),
    (ValueError, r"scale must be finite, got -?inf", {"scale": -INF}),
    (ValueError, r"scale must be finite.*1e\+?300", {"scale": 1e300}),  # infinite in float32
    (ValueError, r"scale must be 0 or at least 1e-30 in size, got 1e-34", {"scale": 1e-34}),
    (TypeError, r"attn_mask must be a tensor, got list", {"attn_mask": [[True]]}),
    (ValueError, r"window must .*, got 3", {"window": 3}),
    (ValueError, r"window must .*, got \(1,\)", {"window": (1,)}),
    (ValueError, r"window must .*, got \(-2, 0\)", {"window": (-2, 0)}),
    (ValueError, r"window must .*, got \(0, -7\)", {"window": (0, -7)}),
    (TypeError, r"window must hold integers.*0\.5", {"window": (0.5, 1)}),
    (TypeError, r"window must hold integers.*True", {"window": (True, 1)}),
    (TypeError, r"window must hold integers.*'a'", {"window": ("a", 1)}),
    (NotImplementedError, r"softcap is not built", {"softcap": 5.0}),
    (
        NotImplementedError,
        r"cu_seqlens_q",
        {"cu_seqlens_q": torch.tensor([0, 3]), "cu_seqlens_k": torch.tensor([0, 5])},
    ),
    (ValueError, r"max_seqlen_q", {"max_seqlen_q": 3}),
    (TypeError, r"gate", {"gate": 1}),
]
MMCA = [
    (ValueError, r"modality must have shape \(B, Lk\) = \(2, 5\), got \[5\]", {"modality": IDS[0]}),
    (ValueError, r"modality must have shape \(B, Lk\) = \(2, 5\), got \[2, 3\]", {"modality": IDS[:, :3]}),
    (TypeError, r"modality must be an integer tensor .*, got Float", {"modality": IDS.float()}),
    (TypeError, r"modality must be an integer tensor .*, got Bool", {"modality": IDS.bool()}),
    (ValueError, r"modality must be 0 \(padding\), 1 \(text\) or >= 2 \(image\), got -1", {"modality": IDS - 2}),
    (ValueError, r"modality must fit 32 bits, got 1099511627777", {"modality": IDS + 2**40}),
    (ValueError, r"modality must (fit 32 bits|be 0 .*), got -\d+", {"modality": IDS - 2**40}),
    ((TypeError, RuntimeError), r"modality", {"modality": None}),
    ((TypeError, RuntimeError), r"modality", {"modality": [[1] * 5] * 2}),
    (ValueError, r"image_id must have shape \(B, Lk\) = \(2, 5\), got \[2, 4\]", {"image_id": IDS[:, 1:]}),
    (TypeError, r"image_id must be an integer tensor .*, got Double", {"image_id": IDS.double()}),
    (ValueError, r"image_id must fit 32 bits, got -?\d+", {"image_id": IDS - 2**33}),
    (ValueError, r"image_rows must be .*, got 'rows'", {"image_rows": "rows"}),
    (ValueError, r"image_rows must be .*, got None", {"image_rows": None}),
    (ValueError, r"image_rows must be .*, got \['self'\]", {"image_rows": ["self"]}),
    (ValueError, r"merge must be .*, got 'mean'", {"merge": "mean"}),
    (ValueError, r"merge must be .*, got None", {"merge": None}),
    (ValueError, r"merge must be .*, got \['sum'\]", {"merge": ["sum"]}),
    (NotImplementedError, r"merge='none'", {"merge": "none"}),
    (NotImplementedError, r"merge='gate'", {"merge": "gate", "gate": torch.ones(2)}),
    (ValueError, r"gate", {"gate": torch.ones(2)}),
    (NotImplementedError, r"softcap", {"softcap": 2.0}),
    (NotImplementedError, r"cu_seqlens", {"cu_seqlens": torch.tensor([0, 5])}),
    (ValueError, r"dropout_p must be in \[0, 1\], got 2", {"dropout_p": 2.0}),
    (ValueError, r"scale must be finite, got inf", {"scale": INF}),
]


@pytest.mark.parametrize("error, message, kwargs", ATTENTION)
def test_attention(error, message, kwargs):
    with pytest.raises(error, match=message):
        functional.attention(Q, K, V, **kwargs)


@pytest.mark.parametrize("error, message, kwargs", MMCA)
def test_mmca_attention(error, message, kwargs):
    with pytest.raises(error, match=message):
        functional.mmca_attention(Q, K, V, **{"modality": IDS, **kwargs})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_dtypes_without_kernels(dtype):
    tensors = [t.to(dtype) for t in (Q, K, V)]
    for call, _ in CALLS.values():
        with pytest.raises(NotImplementedError, match=str(dtype)[6:11] + "|BFloat16|Half|Float8"):
            call(*tensors)


def test_what_is_no_tensor():
    with pytest.raises(TypeError, match="query must be a tensor, got list"):
        functional.attention([1.0], K, V)
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        mmca_ext.MGQA(8, heads=2, dim_head=4)([1.0])


def test_kernels_entry_points_want_the_cpu():
    with pytest.raises(ValueError, match="tensors must be on the CPU, got meta"):
        mmca_ext._C.attention_forward(Q.to("meta"), K.to("meta"), V.to("meta"))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_modality_of_unusual_integers(dtype):
    with pytest.raises(TypeError, match="modality must be an integer tensor"):
        functional.mmca_attention(Q, K, V, IDS.to(dtype))


def test_more_queries_than_tokens():
    with pytest.raises(ValueError, match=r"queries are the last Lq of the Lk tokens, got Lq = 5 > Lk = 3"):
        functional.mmca_attention(torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 3, 8), V[:, :, :3], IDS[:, :3])


RAW = [
    (ValueError, r"window must be \(left, right\).*\(-2, -1\)", lambda: raw_attention(Q, K, V, left=-2)),
    (ValueError, r"window must be \(left, right\).*\(-1, -9\)", lambda: raw_attention(Q, K, V, right=-9)),
    (ValueError, r"dropout needs rng_state", lambda: raw_attention(Q, K, V, p=0.5)),
    (ValueError, r"dropout needs rng_state", lambda: raw_attention(Q, K, V, p=0.5, rng=torch.zeros(2))),
    (ValueError, r"dropout needs rng_state", lambda: raw_attention(Q, K, V, p=0.5, rng=IDS[0])),
    (ValueError, r"dropout needs rng_state", lambda: raw_mmca(Q, K, V, p=0.5, rng=torch.zeros(2, 1).long())),
    (ValueError, r"image_rows must be .* got 'x'", lambda: raw_mmca(Q, K, V, rows="x")),
    (ValueError, r"merge must be .* got 'x'", lambda: raw_mmca(Q, K, V, merge="x")),
    (NotImplementedError, r"merge 'gate'", lambda: raw_mmca(Q, K, V, merge="gate")),
    (NotImplementedError, r"float attn_mask", lambda: raw_attention(Q, K, V, torch.zeros(3, 5))),
    (ValueError, r"grad_out must have shape", lambda: raw_attention_backward(Q, K, V, grad=OUT[..., :5])),
    (ValueError, r"out and grad_out must have shape", lambda: raw_attention_backward(Q, K, V, out=OUT[:1])),
    (TypeError, r"grad_out must have the query's dtype", lambda: raw_attention_backward(Q, K, V, grad=OUT.double())),
    (ValueError, r"lse and its gradient", lambda: raw_attention_backward(Q, K, V, lse=LSE[..., :2])),
    (ValueError, r"lse and its gradient", lambda: raw_attention_backward(Q, K, V, lse=LSE.double())),
    (ValueError, r"lse and its gradient", lambda: raw_attention_backward(Q, K, V, grad_lse=LSES)),
    (ValueError, r"lse and its gradient", lambda: raw_mmca_backward(Q, K, V, lse=LSE)),
    (ValueError, r"lse_low must be", lambda: raw_attention_backward(Q, K, V, low=LSES)),
    (ValueError, r"lse_low must be", lambda: raw_mmca_backward(Q, K, V, low=LSES.double())),
    (ValueError, r"group_out must be", lambda: raw_mmca_backward(Q, K, V, groups=torch.zeros(0))),
    (ValueError, r"group_out must be", lambda: raw_mmca_backward(Q, K, V, groups=GROUPS.mT.contiguous().mT)),
    (ValueError, r"group_out must be", lambda: raw_mmca_backward(Q, K, V, groups=GROUPS.double())),
]


@pytest.mark.parametrize("error, message, call", RAW)
def test_raw_operators(error, message, call):
    with pytest.raises(error, match=message):
        call()


META = {
    "key": lambda: functional.attention(Q, K.to("meta"), V),
    "value": lambda: functional.attention(Q, K, V.to("meta")),
    "attn_mask": lambda: functional.attention(Q, K, V, ones(3, 5, device="meta")),
    "key_mask": lambda: functional.attention(Q, K, V, key_mask=ones(2, 5, device="meta")),
    "modality": lambda: functional.mmca_attention(Q, K, V, IDS.to("meta")),
    "image_id": lambda: functional.mmca_attention(Q, K, V, IDS, image_id=IDS.to("meta")),
    "out": lambda: raw_attention_backward(Q, K, V, out=OUT.to("meta")),
    "lse": lambda: raw_attention_backward(Q, K, V, lse=LSE.to("meta")),
}


@pytest.mark.parametrize("name", META)
def test_another_device(name):
    """A tensor elsewhere is an error, not a result of uninitialised memory."""
    with pytest.raises((ValueError, RuntimeError), match=rf"{name}|device"):
        META[name]()


def test_other_kinds_of_tensors_are_refused_or_right():
    with pytest.raises((NotImplementedError, RuntimeError), match="mmca_ext::attention"):
        functional.attention(Q.to_sparse(), K, V)
    negated = torch._neg_view(torch.randn(2, 4, 3, 8))
    assert torch.equal(functional.attention(negated, K + 1, V + 1), functional.attention(negated.clone(), K + 1, V + 1))


# ---------------------------------------------------------------- nothing ends the process

WILD = r"""
import itertools, math, random, sys, torch
import mmca_ext
from mmca_ext import functional
ops, rand = torch.ops.mmca_ext, random.Random(int(sys.argv[1]))
generator = torch.Generator().manual_seed(int(sys.argv[1]))

def tensor():
    shape = [rand.choice((0, 1, 1, 2, 2, 3, 5)) for _ in range(rand.choice((0, 1, 2, 3, 4, 4, 4, 4, 5)))]
    dtype = rand.choice((torch.float32,) * 6 + (torch.float64, torch.bool, torch.int64, torch.int32, torch.bfloat16))
    t = (torch.randn(shape, generator=generator) * rand.choice((1, 1e30))).to(dtype)
    if rand.random() < 0.2 and t.dim() > 1:
        t = t.transpose(0, -1)
    return t

def argument(kind):
    if "Tensor" in kind:
        return None if kind.startswith("Optional") and rand.random() < 0.6 else tensor()
    if "float" in kind:
        return rand.choice((0.0, 0.5, 1.0, -1.0, 1e300, math.nan, math.inf))
    if "bool" in kind:
        return rand.random() < 0.5
    if "int" in kind:
        return rand.choice((-1, 0, 1, 2**31, 2**62, -2**63, 2**63 - 1))
    return rand.choice(("self", "block", "causal", "self+text", "sum", "lse", "", "\0", "x" * 10000))

done = failed = 0
for op in itertools.islice(itertools.cycle((ops.attention.default, ops.attention_backward.default,
                                            ops.mmca_attention.default, ops.mmca_attention_backward.default)), 4000):
    arguments = [argument(str(a.type)) for a in op._schema.arguments]
    if rand.random() < 0.7:  # mostly right, one argument wrong
        q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 6)
        right = {"query": q, "key": k, "value": v, "modality": torch.randint(0, 4, (2, 5)), "image_id": None,
                 "image_rows": "block", "merge": "sum", "rng_state": torch.tensor([1, 2]), "attn_mask": None,
                 "key_mask": None, "out": torch.randn(2, 4, 3, 6), "grad_out": torch.randn(2, 4, 3, 6),
                 "lse": torch.randn((2, 2, 4, 3) if "mmca_a" in str(op) else (2, 4, 3)), "grad_lse": None,
                 "lse_low": torch.zeros(0),
                 "group_out": torch.randn(2, 2, 4, 3, 6), "scale": None, "dropout_p": 0.1}
        wrong = rand.randrange(len(arguments))
        arguments = [x if i == wrong else right.get(a.name, x) for i, (a, x) in
                     enumerate(zip(op._schema.arguments, arguments))]
    try:
        op(*arguments)
        done += 1
    except (ValueError, TypeError, NotImplementedError, RuntimeError):
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
