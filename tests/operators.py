"""The raw operators called by keyword, and a catalogue of small problems that together use every argument of them."""

from contextlib import contextmanager

import pytest
import torch

from mmca_ext import _C

ops = torch.ops.mmca_ext
FORWARD, BACKWARD = ops.attention.default, ops.attention_backward.default
DOUBLE_BACKWARD = ops.attention_double_backward.default
DEFAULTS = {
    "save_for_backward": False,
    "attn_mask_gradient": False,
    "image_rows": "self",
    "merge": "sum",
    "softcap": 0.0,
    "is_causal": False,
    "window_left": -1,
    "window_right": -1,
    "dropout_p": 0.0,
    "deterministic": False,
}
DIFFERENTIABLE = ("query", "key", "value", "attn_mask", "gate")
IMAGE_ROWS, MERGES = ("self", "block", "causal", "self+text"), ("sum", "lse", "gate", "none")


def arguments(op, **given):
    """The operator's arguments in the order of its schema; what is not given is None or what changes nothing."""
    names = [argument.name for argument in op._schema.arguments]
    assert given.keys() <= set(names), given.keys() - set(names)
    return tuple({**DEFAULTS, **given}.get(name) for name in names)


def forward(save_for_backward=False, **given):
    """(out, lse, lse_low, group_out)"""
    return FORWARD(*arguments(FORWARD, save_for_backward=save_for_backward, **given))


def finite(lse):
    """-inf of an empty row has neither a finite difference nor a sine."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def as_in_the_schema(kwargs):
    """Keywords of `functional` as those of the raw operator."""
    given = dict(kwargs)
    if "window" in given:
        given["window_left"], given["window_right"] = given.pop("window")
    for name in ("cu_seqlens", "max_seqlen"):
        if name in given:
            given[f"{name}_q"] = given[f"{name}_k"] = given.pop(name)
    return given


@contextmanager
def refused(error, message, operator=""):
    """One error, of this very class, and no kernel ran."""
    before = sum(kernel["launches"] for kernel in _C.kernels())
    with pytest.raises(error, match=message) as caught:
        yield
    assert type(caught.value) is error and str(caught.value).startswith(operator), caught.value
    assert sum(kernel["launches"] for kernel in _C.kernels()) == before


# ---------------------------------------------------------------- tensors


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(batch=2, heads=4, kv_heads=2, q_len=5, k_len=7, dim=3, value_dim=4, dtype=torch.float64, rows=False, seed=0):
    """query, key and value; `rows`: heads inside rows, as projections give them. batch=None: packed."""
    shapes = (heads, q_len, dim), (kv_heads, k_len, dim), (kv_heads, k_len, value_dim)
    if batch is None:
        return [randn(n, h, d, seed=seed + i, dtype=dtype) for i, (h, n, d) in enumerate(shapes)]
    tensors = [randn(batch, *shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(shapes)]
    return [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors] if rows else tensors


# One sequence per batch element: image first, text, two images side by side, padding in the middle and at the end.
MODALITY = torch.tensor([[2, 2, 1, 3, 3, 1, 1], [1, 2, 0, 2, 1, 2, 0]])
IMAGE_ID = torch.tensor([[1, 2, 0, 3, 3, 0, 0], [0, 5, 0, 5, 0, 6, 7]])
MASK = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(1)) < 0.6
MASK[0, 0, 2] = False  # a row that sees nothing
KEY_MASK = torch.tensor([[True] * 5 + [False] * 2, [False, True] * 3 + [True]])
RNG_STATE = torch.tensor([1234, 5])
# Three sequences, the second empty, the first with fewer queries than keys; the last tokens belong to none.
Q_OFFSETS, K_OFFSETS = torch.tensor([0, 2, 2, 5]), torch.tensor([0, 4, 4, 6], dtype=torch.int32)
OFFSETS = torch.tensor([0, 3, 3, 6])
BIAS_SHAPES = [(2, 4, 5, 7), (1, 4, 5, 7), (2, 1, 1, 7), (4, 5, 7), (1, 5, 7), (5, 7), (7,)]
BIAS_SHAPES += [(2, 4, 5, 1), (4, 1, 1), ()]  # the same for all keys: only lse notices
GATE_SHAPES = [(2, 4, 5, 2), (1, 4, 1, 2), (4, 1, 2), (2, 1, 5, 1), (2,), ()]


def bias(*shape, dtype=torch.float64, hidden=True):
    """With `hidden`, some entries are -inf; in a bias of all pairs, one whole row."""
    values = randn(*shape, seed=11, dtype=dtype)
    if hidden and len(shape) and shape[-1] > 1:
        values[..., 1] = -torch.inf
        if len(shape) > 1 and shape[-2] > 1:
            values[..., 3, :] = -torch.inf
    return values


def gate(*shape, dtype=torch.float64):
    return randn(*shape, seed=12, dtype=dtype)


# ---------------------------------------------------------------- the catalogue: name -> the arguments besides q, k, v


def _attention():
    yield "plain", {}
    yield "boolean masks", {"attn_mask": MASK, "key_mask": KEY_MASK, "is_causal": True, "window_left": 4, "scale": 0.3}
    yield "window", {"window_left": 2, "window_right": 1}
    yield "softcap", {"softcap": 1.5}
    yield "dropout", {"is_causal": True, "key_mask": KEY_MASK, "rng_state": RNG_STATE, "dropout_p": 0.3}
    for shape in BIAS_SHAPES:
        yield f"bias {shape}", {"attn_mask": bias(*shape)}
    everything = {"is_causal": True, "window_left": 3, "key_mask": KEY_MASK, "softcap": 1.5, "scale": 1.3}
    yield "bias and all", {"attn_mask": bias(4, 5, 7), "rng_state": RNG_STATE, "dropout_p": 0.3, **everything}
    packed = {"cu_seqlens_q": Q_OFFSETS, "cu_seqlens_k": K_OFFSETS}
    yield "packed", packed
    everything = {"is_causal": True, "window_left": 3, "softcap": 2.0, "max_seqlen_q": 3, "max_seqlen_k": 100}
    yield "packed and all", {**packed, **everything, "rng_state": RNG_STATE, "dropout_p": 0.3}


def _mmca():
    for image_rows in IMAGE_ROWS:
        for merge in MERGES:
            options = {"modality": MODALITY, "image_rows": image_rows, "merge": merge}
            if merge == "gate":
                options["gate"] = gate(2, 4, 5, 2)
            yield f"mmca {image_rows} {merge}", options
    block = {"modality": MODALITY.int(), "image_id": IMAGE_ID, "image_rows": "block"}
    for shape in GATE_SHAPES[1:]:
        yield f"mmca gate {shape}", {**block, "merge": "gate", "gate": gate(*shape)}
    for merge in MERGES:
        extra = {"gate": gate(2, 4, 5, 2)} if merge == "gate" else {}
        every = {"softcap": 1.5, "rng_state": RNG_STATE, "dropout_p": 0.3, "scale": 0.7, "merge": merge, **extra}
        yield f"mmca {merge} and all", {**block, **every}
        packed = {"modality": MODALITY[0], "cu_seqlens_q": OFFSETS, "cu_seqlens_k": OFFSETS.clone(), "merge": merge}
        if merge == "gate":
            packed["gate"] = gate(7, 4, 2)
        yield f"mmca packed {merge}", {**packed, "image_rows": "causal"}
        all_packed = {**packed, "image_id": IMAGE_ID[0], "image_rows": "block", "softcap": 1.5}
        yield f"mmca packed {merge} and all", {**all_packed, "rng_state": RNG_STATE, "dropout_p": 0.3}


ATTENTION, MMCA = dict(_attention()), dict(_mmca())
PROBLEMS = {**ATTENTION, **MMCA}


def problem(name, dtype=torch.float64, rows=False, requires_grad=DIFFERENTIABLE, **shape):
    """All arguments of one problem of the catalogue, by name; those in requires_grad are leaves with a gradient."""
    options = dict(PROBLEMS[name])
    packed = "cu_seqlens_q" in options
    if packed:
        shape = {"batch": None, "q_len": 7 if "modality" in options else 6, **shape}
    given = dict(zip(DIFFERENTIABLE, qkv(dtype=dtype, rows=rows and not packed, **shape)))
    for argument in ("attn_mask", "gate"):
        if argument in options and options[argument].is_floating_point():
            options[argument] = options[argument].to(dtype)
    given |= options
    for argument in requires_grad:
        if argument in given and given[argument].is_floating_point():
            given[argument] = given[argument].clone().requires_grad_()
    return given


def leaves(given):
    """The arguments that need a gradient: name -> tensor."""
    return {name: given[name] for name in DIFFERENTIABLE if name in given and given[name].requires_grad}
