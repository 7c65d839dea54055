"""Where things lie in memory: every layout has the bits of the contiguous one, and what is not its own is not read."""

import pytest
import torch
from cases import LAYOUTS, Case

from mmca_ext import functional

from .common import (
    NAN,
    SIZES,
    Problem,
    assert_same_bits,
    everything,
    problem,
    qkv,
    rand,
    randn,
    same_bits,
)

pytestmark = pytest.mark.usefixtures("isa")


def laid_out(tensor, layout, seed=1):
    """The same numbers in another layout (four dimensions), among NaN where there is room between them."""
    case = Case(seed)
    case.dtype = tensor.dtype
    return case._lay_out(tensor.clone(), layout, None)


def gradients_for(arguments):
    out_shape = (*arguments["query"].shape[:-1], arguments["value"].shape[-1])
    if arguments.get("merge") == "none":
        out_shape = (2, *out_shape)
    rows = arguments["query"].shape[:3]
    if arguments["query"].dim() == 3:
        rows = (arguments["query"].shape[1], arguments["query"].shape[0])
    groups = (2,) if "modality" in arguments else ()
    dtype = arguments["query"].dtype
    statistic = torch.float64 if dtype == torch.float64 else torch.float32
    return [randn(*out_shape, seed=4, dtype=dtype), randn(*groups, *rows, seed=5, dtype=statistic)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("feature", ["bias", "block gate"])
def test_every_layout_gives_the_bits_of_the_contiguous_one(layout, size, feature, dtype):
    arguments = problem(feature, dtype, *SIZES[size])
    extra = "attn_mask" if feature == "bias" else "gate"
    arguments[extra] = arguments[extra].expand(2, 4, -1, -1)
    for which in ("query", "key", "value", extra, "grad_out"):
        grads = gradients_for(arguments)
        changed = arguments.copy()
        if which == "grad_out":
            grads[0] = laid_out(grads[0], layout)
        else:
            changed[which] = laid_out(changed[which], layout)
        plain = Problem({name: x.contiguous() if torch.is_tensor(x) else x for name, x in changed.items()})
        actual, expected = everything(changed, grads), everything(plain, [g.contiguous() for g in grads])
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("shift", range(1, 8))
def test_every_storage_offset(shift, dtype):
    arguments = problem("bias", dtype)
    expected = everything(arguments)
    for name in ("query", "key", "value", "attn_mask"):
        memory = torch.full((arguments[name].numel() + shift,), NAN, dtype=dtype)
        moved = memory[shift:].view(arguments[name].shape).copy_(arguments[name])
        assert_same_bits(everything({**arguments, name: moved}), expected)


@pytest.mark.parametrize("feature", ["packed", "packed mmca"])
@pytest.mark.parametrize("layout", ["heads outside", "features apart", "slices of one", "offset", "expanded"])
def test_packed_layouts(feature, layout, dtype):
    """Also the slices of one fused (T, 3, H, D) projection, and a gradient that is a slice."""
    arguments = problem(feature, dtype, q_len=50, k_len=50, value_dim=8, kv_heads=4)
    names, grads = ("query", "key", "value"), gradients_for(arguments)
    tensors = [arguments[name] for name in names] + [grads[0]]
    if layout == "heads outside":
        tensors = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in tensors]
    elif layout == "features apart":
        tensors = [torch.stack((t, torch.full_like(t, NAN)), -1)[..., 0] for t in tensors]
    elif layout == "slices of one":
        one = torch.full((len(tensors[0]) + 5, 5, 4, 8), NAN, dtype=dtype)
        for i, t in enumerate(tensors):
            one[3:-2, i] = t
        tensors = list(one[3:-2, :4].unbind(1))
    elif layout == "offset":
        tensors = [torch.cat((t.new_full((3,), NAN), t.flatten()))[3:].view(t.shape) for t in tensors]
    else:
        tensors = [t[:, :1].expand(-1, 4, -1) for t in tensors]
    changed = {**arguments, **dict(zip(names, tensors[:3], strict=True))}
    plain = {**arguments, **{name: changed[name].contiguous() for name in names}}
    actual = everything(changed, [tensors[3], grads[1]])
    assert_same_bits(actual, everything(plain, [tensors[3].contiguous(), grads[1]]))


def test_slices_of_a_concatenation(dtype):
    """The heads of a fused QKV projection, (B, L, 3 H D), cut and viewed: no copy, the same bits."""
    fused = randn(2, 50, 3 * 4 * 8, dtype=dtype)
    query, key, value = (t.view(2, 50, 4, 8).transpose(1, 2) for t in fused.split(32, -1))
    arguments = Problem(query=query, key=key, value=value, is_causal=True)
    plain = Problem(query=query.contiguous(), key=key.contiguous(), value=value.contiguous(), is_causal=True)
    grads = gradients_for(plain)
    joined = torch.cat((grads[0], grads[0]), -1)
    assert_same_bits(everything(arguments, [joined[..., :12][..., :8], grads[1]]), everything(plain, grads))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 1, 50), (1, 4, 40, 1), (1, 1, 40, 50), (4, 1, 50), (50,), ()])
@pytest.mark.parametrize("kind", ["mask", "bias"])
def test_broadcast_masks_give_the_bits_of_expanded_ones(shape, kind, dtype):
    query, key, value = qkv(40, 50, dtype=dtype)
    mask = randn(*shape, seed=7, dtype=dtype)
    if kind == "mask":
        mask = mask > -0.5
    arguments = Problem(query=query, key=key, value=value)
    actual = everything({**arguments, "attn_mask": mask})
    expected = everything({**arguments, "attn_mask": mask.expand(2, 4, 40, 50).contiguous()})
    actual.pop("d_attn_mask", None), expected.pop("d_attn_mask", None)
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("name", ["modality", "image_id", "key_mask", "cu_seqlens", "gate"])
def test_strided_options(name, dtype):
    """Token ids, masks and offsets may be slices of something larger, of any integer type."""
    arguments = problem("packed mmca" if name == "cu_seqlens" else "block gate", dtype)
    if name == "key_mask":
        arguments = problem("masks", dtype)
    if name == "image_id":
        arguments["image_id"] = torch.randint(0, 3, (2, 50), generator=torch.Generator().manual_seed(1))
    expected = everything(arguments)
    tensor = arguments[name]
    garbage = ~tensor if tensor.dtype == torch.bool else torch.full_like(tensor, NAN if name == "gate" else -7)
    strided = torch.stack((garbage, tensor, garbage), -1)[..., 1]
    assert_same_bits(everything({**arguments, name: strided}), expected)
    for integers in (torch.int32, torch.int16, torch.int8, torch.uint8):
        if name in ("modality", "image_id") or (name == "cu_seqlens" and integers == torch.int32):
            assert_same_bits(everything({**arguments, name: tensor.to(integers)}), expected)


@pytest.mark.parametrize("which", ["batch", "head", "row"])
def test_offsets_beyond_32_bits(which, dtype):
    """Strides of 2^31 elements and more, over memory of which only a few pages are ever touched."""
    far = 2**31 + 8
    shape = (2, 2, 3, 4)
    strides = {"batch": (far, 16, 4, 1), "head": (16, far, 4, 1), "row": (16, 4, far, 1)}[which]
    plain = [randn(*shape, seed=seed, dtype=dtype) for seed in (1, 2, 3, 4)]
    options = {
        "mask": rand(2, 2, 3, 3, seed=5) < 0.8,
        "bias": randn(2, 2, 3, 3, seed=5, dtype=dtype),
    }

    def distant(tensor, strides):
        size = sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True)) + 1
        try:
            memory = torch.empty(size, dtype=tensor.dtype)
        except RuntimeError:
            pytest.skip(f"this machine does not hand out {size * tensor.element_size() >> 30} GiB of untouched memory")
        return memory.as_strided(tensor.shape, strides).copy_(tensor)

    arguments = Problem(zip(("query", "key", "value"), plain[:3], strict=True), attn_mask=options["mask"])
    grads = [plain[3], randn(2, 2, 3, seed=6, dtype=torch.float64 if dtype == torch.float64 else torch.float32)]
    expected = everything(arguments, grads)
    for name in ("query", "key", "value"):
        assert_same_bits(everything({**arguments, name: distant(arguments[name], strides)}, grads), expected)
    assert_same_bits(everything(arguments, [distant(grads[0], strides), grads[1]]), expected)
    strides = {"batch": (far, 9, 3, 1), "head": (9, far, 3, 1), "row": (9, 3, far, 1)}[which]
    assert_same_bits(everything({**arguments, "attn_mask": distant(options["mask"], strides)}, grads), expected)
    arguments["attn_mask"] = options["bias"]
    expected = everything(arguments, grads)
    assert_same_bits(everything({**arguments, "attn_mask": distant(options["bias"], strides)}, grads), expected)


@pytest.mark.parametrize("which", ["token", "head"])
def test_packed_offsets_beyond_32_bits(which, dtype):
    strides = {"token": (2**31 + 8, 4, 1), "head": (4, 2**31 + 40, 1)}[which]
    size = sum((n - 1) * s for n, s in zip((2, 2, 4), strides, strict=True)) + 1
    try:
        memory = torch.empty(size, dtype=dtype)
    except RuntimeError:
        pytest.skip(f"this machine does not hand out {size * 8 >> 30} GiB of untouched memory")
    plain = randn(2, 2, 4, dtype=dtype)
    far, offsets = memory.as_strided((2, 2, 4), strides).copy_(plain), torch.tensor([0, 1, 2])
    kwargs = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    expected = functional.attention(plain, plain, plain, **kwargs)
    assert same_bits(functional.attention(far, far, far, **kwargs), expected)
