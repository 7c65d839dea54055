"""Packed sequences: offsets, bounds and what goes with them are checked, value by value, before any kernel runs."""

import pytest
import torch
from operators import BACKWARD, arguments, as_in_the_schema, forward, problem, refused

from mmca_ext import functional

Q, K, V = torch.zeros(6, 4, 8), torch.zeros(7, 2, 8), torch.zeros(7, 2, 5)
Q_OFFSETS, K_OFFSETS, OFFSETS = torch.tensor([0, 2, 2, 5]), torch.tensor([0, 4, 4, 6]), torch.tensor([0, 3, 3, 7])
IDS = torch.tensor([2, 2, 1, 3, 3, 0, 1])
HUGE, LOWEST = 2**62, -(2**63)


def attention_arguments(**changes):
    right = {"query": Q, "key": K, "value": V, "cu_seqlens_q": Q_OFFSETS, "cu_seqlens_k": K_OFFSETS}
    return {**right, **changes}


def mmca_arguments(**changes):
    return {"query": torch.zeros(7, 4, 8), "key": K, "value": V, "modality": IDS, "cu_seqlens": OFFSETS, **changes}


def backward(query, **given):
    """The raw backward, with results of the shapes that a packed forward gives."""
    tokens, heads = query.shape[:2]
    lse = torch.zeros(*((2,) if "modality" in given else ()), heads, tokens)
    out = torch.zeros(*((2,) if given.get("merge") == "none" else ()), tokens, heads, 5)
    results = {"grad_out": out, "out": out, "lse": lse, "lse_low": lse, "group_out": lse.new_zeros(*lse.shape, 5)}
    return BACKWARD(*arguments(BACKWARD, query=query, **results, **given))


def check(error, message, function, given, operator):
    for call, kwargs in (
        (function, given),
        (forward, as_in_the_schema(given)),
        (backward, as_in_the_schema(given)),
    ):
        with refused(error, message, f"mmca_ext.{operator}: "):
            call(**kwargs)


# ---------------------------------------------------------------- cu_seqlens


def values(*offsets):
    return torch.tensor(offsets)


BAD_OFFSETS = [  # (error, message, offsets) of three sequences; {n}: how many tokens there are
    (TypeError, "must be an int32 or int64 tensor, got Float", values(0.0, 2, 2, 5)),
    (TypeError, "must be an int32 or int64 tensor, got Short", values(0, 2, 2, 5).short()),
    (TypeError, "must be an int32 or int64 tensor, got Char", values(0, 2, 2, 5).to(torch.int8)),
    (TypeError, "must be an int32 or int64 tensor, got Bool", values(0, 2, 2, 5).bool()),
    (TypeError, "must be an int32 or int64 tensor, got UInt32", values(0, 2, 2, 5).to(torch.uint32)),
    (TypeError, "must be an int32 or int64 tensor, got ComplexFloat", values(0, 2, 2, 5) + 0j),
    (ValueError, r"must have shape \(sequences \+ 1,\), got \[1, 4\]", values(0, 2, 2, 5)[None]),
    (ValueError, r"must have shape \(sequences \+ 1,\), got \[4, 1\]", values(0, 2, 2, 5)[:, None]),
    (ValueError, r"must have shape \(sequences \+ 1,\), got \[\]", torch.tensor(0)),
    (ValueError, r"must have shape \(sequences \+ 1,\), got \[0\]", torch.zeros(0, dtype=torch.int64)),
    (ValueError, "must start at 0, got 1", values(1, 2, 2, 5)),
    (ValueError, "must start at 0, got -1", values(-1, 2, 2, 5)),
    (ValueError, f"must start at 0, got {LOWEST}", values(LOWEST, 2, 2, 5)),
    (ValueError, "must not decrease, got 1 after 2 at 2", values(0, 2, 1, 5)),
    (ValueError, "must not decrease, got -2 after 0 at 1", values(0, -2, 2, 5)),
    (ValueError, "must not decrease, got 4 after 5 at 3", values(0, 2, 5, 4).int()),
    (ValueError, f"must not decrease, got {LOWEST} after 2 at 3", values(0, 2, 2, LOWEST)),
    (ValueError, "must end at most at the {n} tokens there are, got 8 at 3", values(0, 2, 2, 8)),
    (ValueError, "must end at most at the {n} tokens there are, got 8 at 2", values(0, 2, 8, 8).int()),
    (ValueError, f"must end at most at the {{n}} tokens there are, got {HUGE} at 1", values(0, HUGE, HUGE, HUGE)),
    (
        ValueError,
        f"must end at most at the {{n}} tokens there are, got {2**31 - 1} at 3",
        values(0, 2, 2, 2**31 - 1).int(),
    ),
    (ValueError, f"must end at most at the {{n}} tokens there are, got {2**32 + 5} at 3", values(0, 2, 2, 2**32 + 5)),
]


@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("error, message, offsets", BAD_OFFSETS)
def test_offsets(error, message, offsets, side):
    name = f"cu_seqlens_{side}"
    message = f"{name} {message}".replace("{n}", {"q": "6", "k": "7"}[side])
    check(error, message, functional.attention, attention_arguments(**{name: offsets}), "attention")


@pytest.mark.parametrize("error, message, offsets", BAD_OFFSETS)
def test_offsets_of_mmca(error, message, offsets):
    message = f"mmca_attention: cu_seqlens {message}".replace("{n}", "7")
    check(error, message, functional.mmca_attention, mmca_arguments(cu_seqlens=offsets), "mmca_attention")


def test_both_sides_list_the_same_sequences():
    message = "cu_seqlens_q and cu_seqlens_k must list the same number of sequences, got 2 and 3"
    given = attention_arguments(cu_seqlens_q=values(0, 2, 5))
    check(ValueError, message, functional.attention, given, "attention")
    given = attention_arguments(cu_seqlens_k=values(0))
    message = "cu_seqlens_q and cu_seqlens_k must list the same number of sequences, got 3 and 0"
    check(ValueError, message, functional.attention, given, "attention")


@pytest.mark.parametrize("side", ["q", "k"])
def test_one_side_alone(side):
    message = f"cu_seqlens_q and cu_seqlens_k go together, got only cu_seqlens_{'kq'[side == 'k']}"
    given = attention_arguments(**{f"cu_seqlens_{side}": None})
    check(ValueError, message, functional.attention, given, "attention")


def test_offsets_on_another_device():
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        given = attention_arguments(**{name: Q_OFFSETS.to("meta")})
        for call in (functional.attention, forward, backward):
            with refused(ValueError, f"mmca_ext: {name} must be on query's device cpu, got meta"):
                call(**given)
    with refused(ValueError, r"mmca_ext: cu_seqlens_q must be on query's device cpu, got meta"):
        functional.mmca_attention(**mmca_arguments(cu_seqlens=OFFSETS.to("meta")))


def test_any_layout_of_offsets():
    """Strided, expanded, either integer: read as they are."""
    given = problem("packed and all")
    expected = forward(**given)[0]
    wide = torch.stack((given["cu_seqlens_q"], given["cu_seqlens_q"] - 9), -1)
    for q_offsets, k_offsets in (
        (wide[:, 0], given["cu_seqlens_k"].long()),
        (wide[:, 0].int(), given["cu_seqlens_k"].flip(0).contiguous().flip(0)),
    ):
        assert torch.equal(forward(**{**given, "cu_seqlens_q": q_offsets, "cu_seqlens_k": k_offsets})[0], expected)
    empty = torch.zeros(1, dtype=torch.int64).expand(4)
    out, lse, _, _ = forward(**{**given, "cu_seqlens_q": empty, "cu_seqlens_k": empty})
    assert (out == 0).all() and (lse == -torch.inf).all()


# ---------------------------------------------------------------- shapes


def dense(*tensors):
    return [t.transpose(0, 1)[None] for t in tensors]


@pytest.mark.parametrize("index", range(3))
def test_four_dimensions_with_offsets(index):
    names = ("query", "key", "value")
    shape = (r"\(Tq, Hq, D\)", r"\(Tk, Hkv, D\)", r"\(Tk, Hkv, Dv\)")[index]
    message = rf"with cu_seqlens {names[index]} must be packed, 3-D {shape}, got shape \[1, \d, \d, \d\]"
    tensors = [dense(t)[0] if i == index else t for i, t in enumerate((Q, K, V))]
    for function, right, operator in (
        (functional.attention, attention_arguments, "attention"),
        (functional.mmca_attention, mmca_arguments, "mmca_attention"),
    ):
        given = right(**dict(zip(names, tensors)))
        for call, kwargs in ((function, given), (forward, as_in_the_schema(given))):
            with refused(ValueError, message, f"mmca_ext.{operator}: "):
                call(**kwargs)


def test_three_dimensions_without_offsets():
    given = {"query": Q, "key": K, "value": V}
    for call, operator in ((functional.attention, "attention"), (forward, "attention")):
        with refused(ValueError, r"query must be 4-D \(B, Hq, Lq, D\), got shape", f"mmca_ext.{operator}: "):
            call(**given)
    with refused(ValueError, r"query must be 4-D \(B, Hq, Lq, D\), got shape", "mmca_ext.mmca_attention: "):
        functional.mmca_attention(**mmca_arguments(cu_seqlens=None))


@pytest.mark.parametrize(
    "message, changes",
    [
        (r"key must have the query's head_dim 8, got 7", {"key": K[..., :7]}),
        (r"value must have the key's heads and length \(2, 7\), got \(1, 7\)", {"value": V[:, :1]}),
        (r"value must have the key's heads and length \(2, 7\), got \(2, 6\)", {"value": V[:6]}),
        (r"multiple of the key/value heads, got 3 and 2", {"query": torch.zeros(7, 3, 8)}),
        (r"at least one head is needed, got 0 query heads", {"query": torch.zeros(7, 0, 8)}),
        (r"head_dim must be 1\.\.256, got 0", {"query": torch.zeros(7, 4, 0), "key": K[..., :0]}),
    ],
)
def test_shapes(message, changes):
    check(ValueError, message, functional.attention, attention_arguments(**changes), "attention")
    check(ValueError, message, functional.mmca_attention, mmca_arguments(**changes), "mmca_attention")


@pytest.mark.parametrize("name", ["attn_mask", "key_mask"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_do_not_go_with_offsets(name, dtype):
    given = attention_arguments(**{name: torch.ones(6, 7, dtype=dtype)})
    message = f"packed sequences take no {name}: leave hidden tokens out of the sequences"
    check(ValueError, message, functional.attention, given, "attention")


@pytest.mark.parametrize(
    "error, message, changes",
    [
        (ValueError, r"modality must have shape \(T,\) = \[7\], got \[1, 7\]", {"modality": IDS[None]}),
        (ValueError, r"modality must have shape \(T,\) = \[7\], got \[6\]", {"modality": IDS[1:]}),
        (ValueError, r"modality must be 0 .*, got -1", {"modality": IDS - 1}),
        (ValueError, r"modality must fit 32 bits, got \d+", {"modality": IDS + 2**33}),
        (TypeError, r"modality must be an integer tensor .*, got Double", {"modality": IDS.double()}),
        (ValueError, r"image_id must have shape \(T,\) = \[7\], got \[1, 7\]", {"image_id": IDS[None]}),
        (ValueError, r"image_id must have shape \(T,\) = \[7\], got \[3\]", {"image_id": IDS[:3]}),
        (TypeError, r"image_id must be an integer tensor .*, got Half", {"image_id": IDS.half()}),
        (
            ValueError,
            r"gate must broadcast to \(T, Hq, 2\) = \[7, 4, 2\], got \[1, 7, 4, 2\]",
            {"gate": torch.ones(1, 7, 4, 2), "merge": "gate"},
        ),
        (ValueError, r"gate must broadcast to .*, got \[4, 7, 2\]", {"gate": torch.ones(4, 7, 2), "merge": "gate"}),
        (ValueError, r"gate must broadcast to .*, got \[7, 4, 3\]", {"gate": torch.ones(7, 4, 3), "merge": "gate"}),
        (ValueError, r"gate goes with merge 'gate' .* merge 'gate' and no gate", {"merge": "gate"}),
        (
            ValueError,
            r"packed query and key must be the same tokens, got 6 and 7",
            {"query": Q, "cu_seqlens": values(0, 3, 6)},
        ),
    ],
)
def test_what_goes_with_packed_mmca(error, message, changes):
    check(error, message, functional.mmca_attention, mmca_arguments(**changes), "mmca_attention")


def test_packed_mmca_has_one_list_of_sequences():
    given = as_in_the_schema(mmca_arguments())
    with refused(ValueError, "packed query and key must be the same tokens", "mmca_ext.mmca_attention: "):
        forward(**{**given, "cu_seqlens_k": values(0, 3, 4, 7)})


# ---------------------------------------------------------------- max_seqlen


@pytest.mark.parametrize("side, longest", [("q", 3), ("k", 4)])
@pytest.mark.parametrize("value", [2, 1, 0, -1, LOWEST])
def test_bounds_that_are_too_small(side, longest, value):
    message = f"max_seqlen_{side} must be at least the longest sequence's {longest} tokens, got {value}"
    given = attention_arguments(**{f"max_seqlen_{side}": value})
    check(ValueError, message, functional.attention, given, "attention")


@pytest.mark.parametrize("value", [3, 0, -1, LOWEST])
def test_bounds_of_mmca_that_are_too_small(value):
    message = f"mmca_attention: max_seqlen must be at least the longest sequence's 4 tokens, got {value}"
    check(ValueError, message, functional.mmca_attention, mmca_arguments(max_seqlen=value), "mmca_attention")


@pytest.mark.parametrize("value", [2.5, "3", [3], 2**63, 3j], ids=str)
def test_bounds_that_are_no_integers(value):
    for name in ("max_seqlen_q", "max_seqlen_k"):
        for call in (functional.attention, forward, backward):
            with refused(RuntimeError, rf"argument '{name}'"):
                call(**attention_arguments(**{name: value}))
    with refused(RuntimeError, r"argument 'max_seqlen_q'"):
        functional.mmca_attention(**mmca_arguments(max_seqlen=value))


def test_bounds_that_are_large_enough_change_nothing():
    given = problem("packed")
    expected = forward(**given)[0]
    for bound in (4, 100, 2**40, 2**63 - 1):
        assert torch.equal(forward(**given, max_seqlen_q=bound, max_seqlen_k=bound)[0], expected)


def test_bounds_without_offsets():
    message = "max_seqlen belongs to cu_seqlens, and there are no cu_seqlens"
    query, key, value = dense(Q, K, V)
    for name in ("max_seqlen_q", "max_seqlen_k"):
        for call in (functional.attention, forward):
            with refused(ValueError, message, "mmca_ext.attention: "):
                call(query=query, key=key, value=value, **{name: 9})
