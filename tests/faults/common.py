"""Problems with every feature of the operators, all their results at once, and comparison bit by bit."""

import math

import torch
from cases import ISAS, check, given

from mmca_ext import _C, functional

__all__ = ["BAD", "DTYPES", "FEATURES", "ISAS", "MERGES", "NAN", "ROWS", "SIZES", "WIDE", "Problem"]
__all__ += ["assert_same_bits", "different", "everything", "in_bound", "problem", "qkv", "randn", "same_bits"]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WIDE = (torch.float64, torch.float32)
ROWS = ("self", "block", "causal", "self+text")
MERGES = ("sum", "lse", "gate", "none")
# Query and key lengths. The kernels take few rows and, without masks, biases and dropout, small heads another way, and
# one block of keys another way than several.
SIZES = {"few rows": (4, 70), "small": (20, 34), "one tile": (40, 50), "many tiles": (210, 400)}
NAN, BAD = math.nan, (math.nan, math.inf, -math.inf)
TENSORS = ("query", "key", "value", "attn_mask", "gate")  # that may have a gradient


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def qkv(q_len, k_len, batch=2, heads=4, kv_heads=2, dim=8, value_dim=12, dtype=torch.float32):
    return [
        randn(batch, heads, q_len, dim, seed=1, dtype=dtype),
        randn(batch, kv_heads, k_len, dim, seed=2, dtype=dtype),
        randn(batch, kv_heads, k_len, value_dim, seed=3, dtype=dtype),
    ]


class Problem(dict):
    """The arguments of one call: of mmca_attention if there is a modality."""

    def copy(self):
        return Problem({name: x.clone() if torch.is_tensor(x) else x for name, x in self.items()})

    def differentiable(self):
        return [name for name in TENSORS if torch.is_tensor(self.get(name)) and self[name].is_floating_point()]


FEATURES = (
    "plain",
    "causal",
    "window",
    "masks",
    "bias",
    "softcap",
    "dropout",
    "self sum",
    "block gate",
    "causal lse",
    "self+text none",
    "mmca dropout",
    "packed",
    "packed mmca",
)


def problem(feature, dtype, q_len=40, k_len=50, batch=2, **sizes):
    """A problem of one feature; packed ones hold `batch` sequences of these lengths and a few tokens past the last."""
    tensors = qkv(q_len, k_len, batch, dtype=dtype, **sizes)
    heads = tensors[0].shape[1]
    ids = torch.randint(0, 4, (batch, k_len), generator=torch.Generator().manual_seed(6))
    kwargs = {
        "plain": {},
        "causal": {"is_causal": True},
        "window": {"window": (k_len // 3, 2)},
        "masks": {
            "attn_mask": rand(1, heads, q_len, k_len, seed=7) < 0.7,
            "key_mask": rand(batch, k_len, seed=8) < 0.8,
            "is_causal": True,
        },
        "bias": {"attn_mask": randn(batch, 1, q_len, k_len, seed=9, dtype=dtype), "is_causal": True},
        "softcap": {"softcap": 2.0, "scale": 1.0},
        "dropout": {"dropout_p": 0.3, "is_causal": True},
        "self sum": {"modality": ids},
        "block gate": {
            "modality": ids.clamp(max=2),
            "image_rows": "block",
            "merge": "gate",
            "gate": randn(batch, 1, q_len, 2, seed=10, dtype=dtype),
        },
        "causal lse": {"modality": ids, "image_rows": "causal", "merge": "lse"},
        "self+text none": {"modality": ids, "image_rows": "self+text", "merge": "none"},
        "mmca dropout": {"modality": ids, "image_rows": "causal", "dropout_p": 0.3, "softcap": 3.0},
        "packed": {"is_causal": True},
        "packed mmca": {
            "modality": torch.cat((ids.flatten(), torch.ones(3, dtype=torch.int64))),
            "image_rows": "block",
            "merge": "lse",
        },
    }[feature]
    if feature.startswith("packed"):
        lengths = [(q_len if feature == "packed" else k_len), k_len, k_len]
        if feature == "packed mmca":
            tensors[0] = randn(batch, heads, k_len, tensors[1].shape[-1], seed=1, dtype=dtype)
        past = [torch.cat((t.transpose(1, 2).flatten(0, 1), randn(3, *t.shape[1::2], dtype=dtype))) for t in tensors]
        tensors, offsets = past, [torch.arange(batch + 1) * n for n in lengths]
        names = ("cu_seqlens_q", "cu_seqlens_k") if feature == "packed" else ("cu_seqlens",)
        kwargs.update(zip(names, offsets))
    return Problem(zip(("query", "key", "value"), tensors, strict=True), **kwargs)


def call(arguments):
    """out and lse."""
    arguments = dict(arguments, return_lse=True)
    if arguments.get("dropout_p"):
        arguments.setdefault("generator", torch.Generator().manual_seed(9))
    return (functional.attention if "modality" not in arguments else functional.mmca_attention)(**arguments)


def few_rows(query, key):
    """csrc/cpu/few_rows.h: at most 8 rows of a KV head."""
    share = query.shape[1] // max(1, key.shape[1])
    return query.dim() == 3 or query.shape[2] * share <= 8


def everything(arguments, grads=None):
    """out, lse and every gradient (d_query, ...), for gradients of out and lse that depend on their shape alone. Where
    few rows take another way when nothing is to be differentiated, also that way's inferred_out and inferred_lse."""
    names = Problem(arguments).differentiable()
    leaves = {name: arguments[name].detach().requires_grad_() for name in names}
    out, lse = call({**arguments, **leaves})
    if grads is None:
        grads = randn(*out.shape, seed=4, dtype=out.dtype), randn(*lse.shape, seed=5, dtype=lse.dtype)
    gradients = torch.autograd.grad((out, lse), list(leaves.values()), grads)
    results = {"out": out.detach(), "lse": lse.detach()}
    if few_rows(arguments["query"], arguments["key"]):
        with torch.no_grad():
            results["inferred_out"], results["inferred_lse"] = call(arguments)
    return results | {f"d_{name}": gradient for name, gradient in zip(names, gradients, strict=True)}


def same_bits(a, b):
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def different(actual, expected):
    """The names of the results that are not the same to the last bit."""
    assert actual.keys() == expected.keys()
    return [name for name in expected if not same_bits(actual[name], expected[name])]


def assert_same_bits(actual, expected, names=None):
    names = expected.keys() if names is None else names
    found = different({name: actual[name] for name in names}, {name: expected[name] for name in names})
    assert not found, found


def in_bound(arguments, isa, threads=1, lse=True):
    """Results and gradients are where the reference in fp64 and the a-priori bound say (cases.py)."""
    arguments = dict(arguments)
    query, key, value = (arguments.pop(name) for name in ("query", "key", "value"))
    for name in TENSORS:
        if torch.is_tensor(arguments.get(name)) and arguments[name].is_floating_point():
            arguments[name] = arguments[name].detach().requires_grad_()
    mmca, packed = "modality" in arguments, query.dim() == 3
    if mmca:
        arguments.setdefault("image_rows", "self")
    statistic = torch.float64 if query.dtype == torch.float64 else torch.float32
    rows = (query.shape[1], query.shape[0]) if packed else query.shape[:3]
    groups = (2,) if arguments.get("merge") == "none" else ()
    grad_out = randn(*groups, *query.shape[:-1], value.shape[-1], seed=4, dtype=query.dtype)
    grad_lse = randn(*((2,) if mmca else ()), *rows, seed=5, dtype=statistic) if lse else None
    op = "mmca_attention" if mmca else "attention"
    case = given(op, query, key, value, grad_out, grad_lse, isa=isa, threads=threads, **arguments)
    forced = _C.forced_isa()
    try:
        check(case)
        if few_rows(query, key):
            case.wanted = ()  # out and lse as they are when nothing is to be differentiated
            check(case)
    finally:
        _C.force_isa(forced)  # cases.py leaves none
