"""Arguments that cannot be right: cast by rule, or one error of the right class that names the argument.

What each argument of each entry point may be is held by tests/test_bad_input.py; here is one line for every check.
"""

import functools
import math
import re

import pytest
import torch

import mmca_ext
from mmca_ext import _C, functional, reference

from .common import DTYPES, qkv, same_bits

ops = torch.ops.mmca_ext
IDS = torch.tensor([[1, 2, 2, 1, 1], [2, 3, 1, 2, 0]])
NAN, INF = math.nan, math.inf


def dense(dtype=torch.float32):
    query, key, value = qkv(3, 5, dtype=dtype)
    return {"query": query, "key": key, "value": value}


def packed(dtype=torch.float32):
    query, key, value = (torch.zeros(n, h, d, dtype=dtype) for n, h, d in ((9, 4, 8), (9, 2, 8), (9, 2, 6)))
    offsets = torch.tensor([0, 4, 9])
    return {"query": query, "key": key, "value": value, "cu_seqlens_q": offsets, "cu_seqlens_k": offsets}


def changed(**kwargs):
    """What to change of dense(): a function of it, or a tensor."""
    return {name: x if callable(x) else functools.partial(lambda value, _: value, x) for name, x in kwargs.items()}


# (error, message, changes): of attention and, where there is a modality to go with it, of mmca_attention.
TENSORS = [
    (ValueError, r"query must be 4-D \(B, Hq, Lq, D\), got shape \[4, 3, 8\]", changed(query=lambda q: q[0])),
    (ValueError, r"key must be 4-D .*, got shape \[2, 5, 8\]", changed(key=lambda k: k[0])),
    (ValueError, r"value must be 4-D .*, got shape \[1, 2, 2, 5, 12\]", changed(value=lambda v: v[None])),
    (TypeError, r"query must be a floating-point tensor, got Long", changed(query=lambda q: q.long())),
    (TypeError, r"value must be a floating-point tensor, got Bool", changed(value=lambda v: v.bool())),
    (TypeError, r"share one dtype, got Float for query and Double for key", changed(key=lambda k: k.double())),
    (TypeError, r"share one dtype, got Float for query and Half for value", changed(value=lambda v: v.half())),
    (ValueError, r"share the batch size, got 2, 1 and 2", changed(key=lambda k: k[:1])),
    (ValueError, r"share the batch size, got 2, 2 and 1", changed(value=lambda v: v[:1])),
    (ValueError, r"key must have the query's head_dim 8, got 7", changed(key=lambda k: k[..., :7])),
    (
        ValueError,
        r"value must have the key's heads and length \(2, 5\), got \(1, 5\)",
        changed(value=lambda v: v[:, :1]),
    ),
    (ValueError, r"value must have the key's heads and .*got \(2, 4\)", changed(value=lambda v: v[:, :, :4])),
    (ValueError, r"multiple of the key/value heads, got 3 and 2", changed(query=lambda q: q[:, :3])),
    (ValueError, r"at least one head is needed, got 0 query", changed(query=lambda q: q[:, :0])),
    (
        ValueError,
        r"at least one head is needed, got 4 query heads and 0",
        changed(key=lambda k: k[:, :0], value=lambda v: v[:, :0]),
    ),
    (
        ValueError,
        r": head_dim must be 1\.\.256, got 0",
        changed(query=lambda q: q[..., :0], key=lambda k: k[..., :0]),
    ),
    (
        ValueError,
        r": head_dim must be 1\.\.256, got 264",
        changed(query=lambda q: q.repeat(1, 1, 1, 33), key=lambda k: k.repeat(1, 1, 1, 33)),
    ),
    (ValueError, r"the value's head_dim must be 1\.\.256, got 0", changed(value=lambda v: v[..., :0])),
    (ValueError, r"the value's head_dim must be 1\.\.256, got 264", changed(value=lambda v: v.repeat(1, 1, 1, 22))),
    (ValueError, r"scale must be finite, got nan", changed(scale=NAN)),
    (ValueError, r"scale must be finite, got -?inf", changed(scale=-INF)),
    (ValueError, r"scale must be finite in float32, got 1e\+?300", changed(scale=1e300)),
    (ValueError, r"scale must be 0 or at least 1e-30 in size, got 1e-34", changed(scale=1e-34)),
    (ValueError, r"softcap must be 0 \(none\) or positive, .* got -1", changed(softcap=-1.0)),
    (ValueError, r"softcap must be 0 \(none\) or positive, .* got nan", changed(softcap=NAN)),
    (ValueError, r"softcap must be 0 \(none\) or positive, .* got inf", changed(softcap=INF)),
    (ValueError, r"softcap must be 0 \(none\) or positive, .* got 1e-40", changed(softcap=1e-40)),
    (ValueError, r"dropout_p must be in \[0, 1\], got -0\.1", changed(dropout_p=-0.1)),
    (ValueError, r"dropout_p must be in \[0, 1\], got nan", changed(dropout_p=NAN)),
]
ATTENTION = [
    (ValueError, r"attn_mask must broadcast to \(B, Hq, Lq, Lk\) = \[2, 4, 3, 5\], got \[3, 4\]", torch.ones(3, 4)),
    (ValueError, r"attn_mask must broadcast .*, got \[2, 2, 3, 5\]", torch.ones(2, 2, 3, 5) > 0),
    (ValueError, r"attn_mask must broadcast .*, got \[1, 2, 4, 3, 5\]", torch.ones(1, 2, 4, 3, 5)),
    (TypeError, r"attn_mask must be boolean .* or floating-point .*, got Byte", torch.ones(3, 5).byte()),
    (TypeError, r"attn_mask must be boolean .* or floating-point .*, got ComplexFloat", torch.ones(3, 5) + 0j),
    (TypeError, r"attn_mask must be float32, .* got Float8_e5m2", torch.ones(3, 5).to(torch.float8_e5m2)),
]
ATTENTION = [(error, message, changed(attn_mask=mask)) for error, message, mask in ATTENTION] + [
    (ValueError, r"key_mask must have shape \(B, Lk\) = \(2, 5\), got \[5\]", changed(key_mask=torch.ones(5) > 0)),
    (ValueError, r"key_mask must have shape .*, got \[1, 5\]", changed(key_mask=torch.ones(1, 5) > 0)),
    (ValueError, r"key_mask must have shape .*, got \[2, 4\]", changed(key_mask=torch.ones(2, 4) > 0)),
    (TypeError, r"key_mask must be a bool tensor .*, got Long", changed(key_mask=torch.ones(2, 5).long())),
    (ValueError, r"max_seqlen belongs to cu_seqlens", changed(max_seqlen_q=3)),
    (ValueError, r"max_seqlen belongs to cu_seqlens", changed(max_seqlen_k=3)),
]
MMCA = [
    (ValueError, r"modality must have shape \(B, Lk\) = \[2, 5\], got \[5\]", changed(modality=IDS[0])),
    (ValueError, r"modality must have shape .*, got \[2, 3\]", changed(modality=IDS[:, :3])),
    (ValueError, r"modality must have shape .*, got \[1, 5\]", changed(modality=IDS[:1])),
    (TypeError, r"modality must be an integer tensor .*, got Float", changed(modality=IDS.float())),
    (TypeError, r"modality must be an integer tensor .*, got UInt32", changed(modality=IDS.to(torch.uint32))),
    (ValueError, r"modality must be 0 \(padding\), 1 \(text\) or >= 2 \(image\), got -1", changed(modality=IDS - 2)),
    (ValueError, r"modality must fit 32 bits, got 1099511627777", changed(modality=IDS + 2**40)),
    (ValueError, r"modality must fit 32 bits, got -", changed(modality=IDS - 2**40)),
    (ValueError, r"image_id must have shape .*, got \[2, 4\]", changed(image_id=IDS[:, 1:])),
    (ValueError, r"image_id must fit 32 bits, got -?\d+", changed(image_id=IDS - 2**33)),
    (ValueError, r"image_rows must be .*, got 'rows'", changed(image_rows="rows")),
    (ValueError, r"merge must be .*, got 'mean'", changed(merge="mean")),
    (ValueError, r"image_rows must be .*, got None", changed(image_rows=None)),
    (ValueError, r"merge must be .*, got \['sum'\]", changed(merge=["sum"])),
    (TypeError, r"modality must be .* ?tensor, got list", changed(modality=[[1] * 5] * 2)),
    (ValueError, r"gate goes with merge 'gate' .* got merge 'sum' and a gate", changed(gate=torch.ones(2))),
    (ValueError, r"gate goes with merge 'gate' .* got merge 'gate' and no gate", changed(merge="gate")),
    (TypeError, r"gate must be a floating-point tensor, got Long", changed(merge="gate", gate=torch.ones(2).long())),
    (
        ValueError,
        r"gate must broadcast to \(B, Hq, Lq, 2\) = \[2, 4, 3, 2\], got \[3\]",
        changed(merge="gate", gate=torch.ones(3)),
    ),
    (ValueError, r"gate must broadcast to .*, got \[3, 4, 3, 2\]", changed(merge="gate", gate=torch.ones(3, 4, 3, 2))),
    (
        ValueError,
        r"gate must broadcast to .*, got \[1, 2, 4, 3, 2\]",
        changed(merge="gate", gate=torch.ones(1, 2, 4, 3, 2)),
    ),
    (
        ValueError,
        r"queries are the last Lq of the Lk tokens, got Lq = 6 > Lk = 5",
        changed(query=lambda q: q.repeat(1, 1, 2, 1)),
    ),
    (ValueError, r"max_seqlen belongs to cu_seqlens", changed(max_seqlen=3)),
]


def offsets(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


def both(cu_seqlens):
    return changed(cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)


PACKED = [
    (
        ValueError,
        r"with cu_seqlens query must be packed, 3-D .*, got shape \[1, 9, 4, 8\]",
        changed(query=lambda q: q[None]),
    ),
    (ValueError, r"with cu_seqlens value must be packed, 3-D", changed(value=lambda v: v[0])),
    (ValueError, r"go together, got only cu_seqlens_q", changed(cu_seqlens_k=None)),
    (ValueError, r"go together, got only cu_seqlens_k", changed(cu_seqlens_q=None)),
    (TypeError, r"cu_seqlens_q must be an int32 or int64 tensor, got Float", both(torch.tensor([0.0, 9.0]))),
    (TypeError, r"cu_seqlens_q must be an int32 or int64 tensor, got Short", both(offsets(0, 9, dtype=torch.int16))),
    (ValueError, r"cu_seqlens_q must have shape \(sequences \+ 1,\), got \[0\]", both(offsets())),
    (ValueError, r"cu_seqlens_q must have shape \(sequences \+ 1,\), got \[1, 3\]", both(offsets(0, 4, 9)[None])),
    (ValueError, r"cu_seqlens_q must have shape \(sequences \+ 1,\), got \[\]", both(torch.tensor(0))),
    (ValueError, r"cu_seqlens_q must start at 0, got 1", both(offsets(1, 9))),
    (ValueError, r"cu_seqlens_q must start at 0, got -1", both(offsets(-1, 9))),
    (ValueError, r"cu_seqlens_q must not decrease, got 3 after 5 at 2", both(offsets(0, 5, 3, 9))),
    (
        ValueError,
        r"cu_seqlens_q must not decrease, got -9223372036854775808 after 0 at 1",
        both(offsets(0, -(2**63), 9)),
    ),
    (ValueError, r"cu_seqlens_q must end at most at the 9 tokens there are, got 10 at 2", both(offsets(0, 4, 10))),
    (ValueError, r"cu_seqlens_q must end at most .*, got 9223372036854775807 at 1", both(offsets(0, 2**63 - 1))),
    (ValueError, r"cu_seqlens_k must end at most at the 9 tokens", changed(cu_seqlens_k=offsets(0, 4, 10))),
    (ValueError, r"same number of sequences, got 2 and 1", changed(cu_seqlens_k=offsets(0, 9))),
    (ValueError, r"max_seqlen_q must be at least the longest sequence's 5 tokens, got 4", changed(max_seqlen_q=4)),
    (ValueError, r"max_seqlen_k must be at least the longest sequence's 5 tokens, got -1", changed(max_seqlen_k=-1)),
    (ValueError, r"packed sequences take no attn_mask", changed(attn_mask=torch.ones(9, 9) > 0)),
    (ValueError, r"packed sequences take no key_mask", changed(key_mask=torch.ones(2, 9) > 0)),
]


def apply(arguments, changes):
    return {**arguments, **{name: change(arguments.get(name)) for name, change in changes.items()}}


def parameters(cases):
    return pytest.mark.parametrize("error, message, changes", cases, ids=[message for _, message, _ in cases])


def assert_refused(error, message, call):
    with pytest.raises(error, match=message) as caught:
        call()
    assert type(caught.value) is error


@parameters(TENSORS + ATTENTION)
def test_attention(error, message, changes):
    assert_refused(error, message, lambda: functional.attention(**apply(dense(), changes)))


@parameters(TENSORS + MMCA)
def test_mmca_attention(error, message, changes):
    arguments = apply({**dense(), "modality": IDS}, changes)
    assert_refused(error, message, lambda: functional.mmca_attention(**arguments))


@parameters(PACKED)
def test_packed(error, message, changes):
    assert_refused(error, message, lambda: functional.attention(**apply(packed(), changes)))


@pytest.mark.parametrize("offsets", [[0, 4, 10], [0, 5, 3], [1, 9], [0, -1], [0, 2**62]], ids=str)
def test_packed_mmca(offsets):
    arguments = {name: x for name, x in packed().items() if not name.startswith("cu")}
    arguments.update(modality=torch.ones(9, dtype=torch.int64), cu_seqlens=torch.tensor(offsets))
    assert_refused(ValueError, r": cu_seqlens must (start|not|end)", lambda: functional.mmca_attention(**arguments))
    arguments.update(cu_seqlens=torch.tensor([0, 9]), modality=torch.ones(1, 9, dtype=torch.int64))
    message = r"modality must have shape \(T,\) = \[9\], got \[1, 9\]"
    assert_refused(ValueError, message, lambda: functional.mmca_attention(**arguments))
    arguments["query"] = arguments["query"][:8]
    arguments["cu_seqlens"] = torch.tensor([0, 8])
    message = r"packed query and key must be the same tokens, got 8 and 9"
    assert_refused(ValueError, message, lambda: functional.mmca_attention(**arguments))


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fn])
def test_dtypes_without_kernels(dtype):
    arguments = {name: t.to(dtype) for name, t in dense().items()}
    message = r"query must be float32, float64, bfloat16 or float16, got Float8"
    assert_refused(TypeError, message, lambda: functional.attention(**arguments))


def test_lengths_beyond_32_bits():
    """Refused before anything is read: memory that is not there."""
    tensors = {name: torch.zeros(1, 1, 1, 1).expand(1, 1, 2**31, 1) for name in ("query", "key", "value")}
    assert_refused(ValueError, r"lengths must stay below 2\^31, got", lambda: functional.attention(**tensors))


RAW = {
    "both kinds": (r"modality decides what a row sees", {"modality": IDS, "is_causal": True}),
    "a mask": (r"modality decides what a row sees", {"modality": IDS, "attn_mask": torch.ones(3, 5) > 0}),
    "a window": (r"modality decides what a row sees", {"modality": IDS, "window_left": 3}),
    "a lonely gate": (r"gate belongs to modality", {"gate": torch.ones(2)}),
    "lonely rows": (r"image_rows and merge belong to modality, got 'block' and 'sum'", {"image_rows": "block"}),
    "lonely merge": (r"image_rows and merge belong to modality, got 'self' and 'x'", {"merge": "x"}),
    "lonely images": (r"image_id belongs to modality", {"image_id": IDS}),
    "window": (r"window must be \(left, right\).*\(-2, -1\)", {"window_left": -2}),
    "right window": (r"window must be \(left, right\).*\(-1, -9\)", {"window_right": -9}),
    "no state": (r"dropout needs rng_state", {"dropout_p": 0.5}),
    "float state": (r"dropout needs rng_state", {"dropout_p": 0.5, "rng_state": torch.zeros(2)}),
    "long state": (r"dropout needs rng_state", {"dropout_p": 0.5, "rng_state": IDS[0]}),
    "rows": (r"image_rows must be .* got 'x'", {"modality": IDS, "image_rows": "x"}),
    "merge": (r"merge must be .* got 'x'", {"modality": IDS, "merge": "x"}),
}


@pytest.mark.parametrize("name", RAW)
def test_kernels_entry_points(name):
    """What the functions of mmca_ext.functional cannot even ask for."""
    message, kwargs = RAW[name]
    assert_refused(ValueError, message, lambda: _C.attention_forward(**dense(), **kwargs))


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_nothing_where_a_tensor_has_to_be(name):
    """None arrives at an operator as a tensor without shape, dtype and device."""
    arguments, message = {**dense(), name: None}, f"{name} must be a tensor, got None"
    assert_refused(TypeError, message, lambda: functional.attention(**arguments))
    numbers = (False, "self", "sum", None, 0.0, False, -1, -1, None, None, 0.0, False)
    assert_refused(TypeError, message, lambda: ops.attention(*arguments.values(), *[None] * 8, *numbers))


OUT, LSE = torch.zeros(2, 4, 3, 12), torch.zeros(2, 4, 3)
RESULTS = [
    (ValueError, r"results and gradients must be on", {"out": OUT.to("meta")}),
    (ValueError, r"results and gradients must be on", {"grad_out": OUT.to("meta")}),
    (ValueError, r"results and gradients must be on", {"lse": LSE.to("meta")}),
    (ValueError, r"lse_low must be", {"lse_low": LSE.to("meta")}),
    (ValueError, r"out and grad_out must have shape", {"grad_out": OUT[..., :5]}),
    (ValueError, r"out and grad_out must have shape", {"out": OUT[:1]}),
    (TypeError, r"out and grad_out must have the query's dtype", {"grad_out": OUT.double()}),
    (TypeError, r"out and grad_out must have the query's dtype", {"out": OUT.double()}),
    (ValueError, r"lse and its gradient must be", {"lse": LSE[..., :2]}),
    (ValueError, r"lse and its gradient must be", {"lse": LSE.double()}),
    (ValueError, r"lse and its gradient must be", {"grad_lse": LSE[None]}),
    (ValueError, r"lse_low must be", {"lse_low": LSE[None]}),
    (ValueError, r"lse_low must be", {"lse_low": LSE.double()}),
]


@pytest.mark.parametrize("error, message, changes", RESULTS)
def test_results_given_back_to_the_backward(error, message, changes):
    arguments = {**dense(), "grad_out": OUT, "grad_lse": None, "out": OUT, "lse": LSE, "lse_low": LSE}
    arguments["group_out"] = torch.zeros(0)
    _C.attention_backward(**arguments)
    assert_refused(error, message, lambda: _C.attention_backward(**{**arguments, **changes}))


@pytest.mark.parametrize("shape", ["none", "transposed", "double", "one group", "meta"])
def test_group_outputs_given_back_to_the_backward(shape):
    groups = torch.zeros(2, 2, 4, 3, 12)
    lse = torch.zeros(2, 2, 4, 3)
    arguments = {**dense(), "grad_out": OUT, "grad_lse": None, "out": OUT, "lse": lse, "lse_low": lse}
    arguments.update(group_out=groups, modality=IDS)
    _C.attention_backward(**arguments)
    wrong = {
        "none": groups[:0],
        "meta": groups.to("meta"),
        "transposed": groups.mT.contiguous().mT,
        "double": groups.double(),
    }
    arguments["group_out"] = wrong.get(shape, groups[:1])
    assert_refused(ValueError, r"group_out must be", lambda: _C.attention_backward(**arguments))


DEVICES = [
    "key",
    "value",
    "attn_mask",
    "bias",
    "key_mask",
    "modality",
    "image_id",
    "gate",
    "cu_seqlens_q",
    "cu_seqlens_k",
]


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("entry", ["operator", "kernel"])
def test_another_device(name, entry):
    """A tensor elsewhere is an error, not a result of uninitialised memory."""
    arguments = packed() if name.startswith("cu") else dense()
    if name in ("modality", "image_id", "gate"):
        arguments["modality"] = IDS
    extra = {
        "attn_mask": torch.ones(3, 5) > 0,
        "bias": torch.ones(3, 5),
        "key_mask": torch.ones(2, 5) > 0,
        "image_id": IDS,
        "gate": torch.ones(2),
    }
    wrong = (extra | arguments)[name].to("meta")
    arguments["attn_mask" if name == "bias" else name] = wrong
    if name == "gate":
        arguments["merge"] = "gate"
    call = functional.mmca_attention if "modality" in arguments else functional.attention
    with pytest.raises((ValueError, RuntimeError), match=rf"{'attn_mask' if name == 'bias' else name}|device"):
        (call if entry == "operator" else _C.attention_forward)(**arguments)


def test_kernels_entry_points_want_the_cpu():
    arguments = {name: t.to("meta") for name, t in dense().items()}
    assert_refused(
        ValueError, r"tensors must be on the CPU or a CUDA device, got meta", lambda: _C.attention_forward(**arguments)
    )


REFERENCE = [
    (ValueError, r"key must be on query's device cpu, got meta", {"key": torch.zeros(2, 2, 5, 8, device="meta")}),
    (ValueError, r"value must be on query's device cpu, got meta", {"value": torch.zeros(2, 2, 5, 12, device="meta")}),
    (TypeError, r"key_mask must be boolean .*, got torch.int64", {"key_mask": torch.ones(2, 5).long()}),
    (TypeError, r"attn_mask must be boolean .* or floating point .*, got torch.int64", {"attn_mask": IDS[:1]}),
]


REFERENCE_PACKED = [
    (
        ValueError,
        r"cu_seqlens_q must be a 1-D int32 or int64 tensor of offsets, got torch.float32",
        torch.tensor([0.0, 4, 9]),
    ),
    (
        ValueError,
        r"cu_seqlens_q must be a 1-D int32 or int64 tensor of offsets, got torch.int16",
        torch.tensor([0, 4, 9]).short(),
    ),
    (ValueError, r"cu_seqlens_q must start at 0, never decrease and end at most at 9", torch.tensor([0, 4, 10])),
]


@pytest.mark.parametrize("error, message, offsets", REFERENCE_PACKED)
def test_packed_reference(error, message, offsets):
    assert_refused(error, message, lambda: reference.attention(**{**packed(), "cu_seqlens_q": offsets}))
    message = r"the longest sequence of cu_seqlens_q has 5 tokens, more than max_seqlen 4"
    assert_refused(ValueError, message, lambda: reference.attention(**packed(), max_seqlen_q=4))


@pytest.mark.parametrize("error, message, changes", REFERENCE)
def test_the_reference(error, message, changes):
    assert_refused(error, message, lambda: reference.attention(**{**dense(), **changes}))


X = torch.zeros(2, 3, 8)
LAYERS = [
    (TypeError, r"x must be a tensor, got list", lambda mgqa, _: mgqa([1.0])),
    (ValueError, r"x and context differ in batch: 2 and 1", lambda mgqa, _: mgqa(X, X[:1])),
    (ValueError, r"modality must have shape \(2, 3\), got \(2, 4\)", lambda _, mmca: mmca(X, torch.ones(2, 4).long())),
]


@pytest.mark.parametrize("error, message, call", LAYERS)
def test_layers(error, message, call):
    layers = mmca_ext.MGQA(8, heads=2, dim_head=4), mmca_ext.MultiModalCausalAttention(8, heads=2, dim_head=4)
    assert_refused(error, message, lambda: call(*layers))


# ---------------------------------------------------------------- cast by rule


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", DTYPES)
@pytest.mark.parametrize("mmca", [False, True])
def test_autocast(kind, inputs, mmca):
    """What autocast casts is what a cast by hand gives, gradients in the inputs' own dtype; float64 stays."""
    arguments = {name: t.requires_grad_() for name, t in dense(inputs).items()}
    call = functional.mmca_attention if mmca else functional.attention
    extra = {"modality": IDS} if mmca else {"attn_mask": torch.ones(3, 5)}
    with torch.autocast("cpu", dtype=kind):
        out = call(**arguments, **extra)
    assert out.dtype == (torch.float64 if inputs == torch.float64 else kind)
    other = {name: t.detach().to(out.dtype).requires_grad_() for name, t in arguments.items()}
    expected = call(**other, **extra)
    assert same_bits(out.detach(), expected.detach())
    (out.double().sum() + expected.double().sum()).backward()
    for name, t in arguments.items():
        assert t.grad.dtype == inputs and same_bits(t.grad, other[name].grad.to(inputs))


def test_every_message_names_the_operator():
    for call, name in ((functional.attention, "attention"), (functional.mmca_attention, "mmca_attention")):
        extra = {"modality": IDS} if name == "mmca_attention" else {}
        with pytest.raises(ValueError) as caught:
            call(**apply(dense(), changed(query=lambda q: q[0])), **extra)
        assert re.match(rf"mmca_ext\.{name}: ", str(caught.value))
