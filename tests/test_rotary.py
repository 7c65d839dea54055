"""Rotary embedding against complex multiplication written out from the papers, its accuracy, and its positions."""

import copy
import math

import numpy as np
import pytest
import torch
from layers import assert_same, make, randn

from mmca_ext import MGQA, KVCache, MultiModalCausalAttention, RotaryEmbedding
from mmca_ext.nn import Llama3Scaling, rotary_positions

# (arguments, axis of each pair, exponent of its frequency base^-e), written out by hand for 8 pairs.
SPECTRUM = [i / 8 for i in range(8)]
KINDS = {
    "one axis": ({}, [0] * 8, SPECTRUM),
    "sections": ({"sections": (2, 3, 3)}, [0, 0, 1, 1, 1, 2, 2, 2], SPECTRUM),
    "interleaved": ({"sections": (4, 2, 2), "axes": "interleaved"}, [0, 1, 2, 0, 1, 2, 0, 0], SPECTRUM),
    "axial": ({"sections": (4, 4), "axes": "axial"}, [0] * 4 + [1] * 4, [0, 0.25, 0.5, 0.75] * 2),
}
kinds = pytest.mark.parametrize("kind", KINDS)
pairings = pytest.mark.parametrize("pairs", ["half", "interleaved"])


def rotary_of(kind, **kwargs):
    return RotaryEmbedding(kwargs.pop("dim", 16), base=500.0, **KINDS[kind][0], **kwargs)


def draw_positions(kind, *shape, seed=3):
    axes = max(KINDS[kind][1]) + 1
    shape = shape if axes == 1 else (axes, *shape)
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed))


def complex_rotation(x, positions, kind, pairs):
    """The first 16 features of x (B, H, N, D) times exp(i angle), pair by pair; positions as RotaryEmbedding.table."""
    _, axis_of_pair, exponents = KINDS[kind]
    out = x.clone()
    for pair, (axis, exponent) in enumerate(zip(axis_of_pair, exponents)):
        first, second = (pair, pair + 8) if pairs == "half" else (2 * pair, 2 * pair + 1)
        place = (positions if max(axis_of_pair) == 0 else positions[axis]).double()
        place = place if place.dim() == 1 else place[:, None]
        turned = torch.complex(x[..., first], x[..., second]) * torch.exp(1j * place * 500.0**-exponent)
        out[..., first], out[..., second] = turned.real, turned.imag
    return out


@kinds
@pairings
@pytest.mark.parametrize("per_sequence", [False, True])
def test_rotation_is_complex_multiplication(kind, pairs, per_sequence):
    x = randn(3, 4, 5, 16)
    positions = draw_positions(kind, *((3, 5) if per_sequence else (5,)))
    assert_same(rotary_of(kind, pairs=pairs)(x, positions), complex_rotation(x, positions, kind, pairs))


@kinds
@pairings
def test_packed_rotation_and_one_position_for_all_sequences(kind, pairs):
    x, positions, rotary = randn(1, 4, 5, 16), draw_positions(kind, 5), rotary_of(kind, pairs=pairs)
    expected = complex_rotation(x, positions, kind, pairs)
    assert_same(rotary(x[0].transpose(0, 1), positions), expected[0].transpose(0, 1))
    batch = positions[..., None, :]  # B = 1 stands for every sequence
    assert_same(rotary(x.expand(3, 4, 5, 16), batch), expected.expand(3, 4, 5, 16))


@pytest.mark.parametrize("kind", ["sections", "interleaved", "axial"])
def test_axes_that_agree_are_one(kind):
    x, positions, rotary = randn(2, 4, 5, 16), torch.arange(5) + 3, rotary_of(kind)
    count = len(rotary.sections)
    expected = rotary(x, positions.expand(count, 5))
    assert torch.equal(rotary(x, positions), expected)
    assert torch.equal(rotary(x, positions.expand(1, 2, 5)), expected)
    if kind != "axial":  # text in M-RoPE is plain rotary embedding
        assert torch.equal(expected, rotary_of("one axis")(x, positions))


@kinds
@pairings
def test_partial_rotation_leaves_the_rest(kind, pairs):
    x, positions = randn(3, 4, 5, 21), draw_positions(kind, 5)
    out = rotary_of(kind, pairs=pairs, dim=21, rotary_dim=16)(x, positions)
    assert_same(out, complex_rotation(x, positions, kind, pairs))
    assert torch.equal(out[..., 16:], x[..., 16:])


@kinds
def test_products_depend_on_the_distance_alone(kind):
    query, key, rotary = randn(1, 4, 5, 16), randn(1, 4, 5, 16, seed=1), rotary_of(kind)
    near, far = draw_positions(kind, 5), draw_positions(kind, 5, seed=4)
    scores = rotary(query, near) @ rotary(key, far).mT
    shifted = rotary(query, near + 1000) @ rotary(key, far + 1000).mT
    torch.testing.assert_close(shifted, scores, rtol=0, atol=1e-11)  # angles of 1000 are right to 1000 * 2^-53
    assert not torch.allclose(rotary(query, near + 1) @ rotary(key, far).mT, scores)


@pytest.mark.parametrize("position", [1, 4095, 131_071, 1_000_003, 16_777_217])
def test_angles_are_exact_at_far_positions(position):
    table = RotaryEmbedding(128).table(torch.tensor([position]))
    # np.longdouble has 11 bits more than float64: the exponent, and with it the angle, is right to 2^-40 here.
    frequencies = np.longdouble(10000) ** (-np.arange(64, dtype=np.longdouble) / 64)
    angles = position * frequencies
    rounding = 2.0**-25 + position * 2.0**-51
    for actual, exact in ((table.cos[0, :64], np.cos(angles)), (table.sin[0], np.sin(angles))):
        assert np.abs(actual.double().numpy() - exact).max() <= rounding
    if position > 100_000:  # and the obvious way is not good enough, so this test can fail
        naive = (position * torch.tensor(frequencies.astype(np.float32))).cos()
        assert np.abs(naive.double().numpy() - np.cos(angles)).max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_result_is_rounded_once_to_the_input_dtype(dtype):
    x, positions = randn(2, 4, 5, 16, dtype=dtype), torch.arange(5) * 999
    out = rotary_of("one axis")(x, positions)
    exact = complex_rotation(x.double(), positions, "one axis", "half")
    assert out.dtype == dtype
    rounding = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 4 * torch.finfo(dtype).eps
    assert ((out.double() - exact).abs() <= rounding * exact.abs() + 1e-6).all()


def test_memory_layout_is_kept():
    rotary = RotaryEmbedding(16)
    fused = randn(2, 5, 12, 16).transpose(1, 2)[:, :8]
    out = rotary(fused, torch.arange(5))
    assert out.transpose(1, 2).is_contiguous()
    assert rotary(fused.contiguous(), torch.arange(5)).is_contiguous()


def test_casts_of_the_model_do_not_round_the_frequencies():
    rotary = RotaryEmbedding(64)
    before, x = rotary.frequencies, randn(1, 1, 3, 64, dtype=torch.float32)
    expected = rotary(x, torch.arange(3))
    for cast in (rotary.half(), rotary.bfloat16(), copy.deepcopy(rotary).to("meta").to_empty(device="cpu")):
        assert cast.frequencies.dtype == torch.float64 and torch.equal(cast.frequencies, before)
        assert torch.equal(cast(x, torch.arange(3)), expected)
    assert rotary.state_dict() == {} and list(rotary.parameters()) == []


def test_linear_scaling_divides_positions():
    x, positions = randn(1, 2, 5, 16), torch.arange(5) * 4
    assert_same(RotaryEmbedding(16, scaling=4.0)(x, positions), RotaryEmbedding(16)(x, positions // 4))
    assert_same(RotaryEmbedding(16)(x, positions / 4.0), RotaryEmbedding(16)(x, positions // 4))


def test_llama3_scaling():
    scaling = Llama3Scaling(factor=8.0)
    original = RotaryEmbedding(128, base=500000.0).frequencies
    scaled = RotaryEmbedding(128, base=500000.0, scaling=scaling).frequencies
    wavelength = 2 * math.pi / original
    low, high = wavelength > 8192 / 1.0, wavelength < 8192 / 4.0
    smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
    expected = torch.where(
        high, original, torch.where(low, original / 8, (1 - smooth) * original / 8 + smooth * original)
    )
    torch.testing.assert_close(scaled, expected, rtol=1e-14, atol=0)
    assert high.any() and low.any() and not (high | low).all()


@kinds
def test_a_table_serves_many_calls(kind):
    rotary, positions = rotary_of(kind), draw_positions(kind, 2, 5)
    for x in (randn(2, 4, 5, 16), randn(2, 4, 5, 16, dtype=torch.float32)):
        table = rotary.table(positions, x.dtype)
        assert torch.equal(rotary(x, table), rotary(x, positions))
    with pytest.raises(TypeError, match=r"table.*float64"):
        rotary(randn(2, 4, 5, 16), rotary.table(positions))


@kinds
def test_gradients_and_graphs(kind):
    rotary, positions = rotary_of(kind, dim=20, rotary_dim=16), draw_positions(kind, 3)
    x = randn(2, 2, 3, 20).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rotary(x, positions), x)
    torch.compiler.reset()
    compiled = torch.compile(rotary, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x, positions), rotary(x, positions))


@pytest.mark.parametrize(
    "error, says, call",
    [
        (ValueError, "dim.*0", lambda: RotaryEmbedding(0)),
        (ValueError, "rotary_dim.*even.*15", lambda: RotaryEmbedding(16, rotary_dim=15)),
        (ValueError, "rotary_dim.*dim=16.*18", lambda: RotaryEmbedding(16, rotary_dim=18)),
        (ValueError, "base.*-1", lambda: RotaryEmbedding(16, base=-1)),
        (ValueError, "scaling.*0", lambda: RotaryEmbedding(16, scaling=0)),
        (ValueError, "scaling: factor.*-8", lambda: RotaryEmbedding(16, scaling=Llama3Scaling(-8.0))),
        (
            ValueError,
            "low_freq_factor must be below",
            lambda: RotaryEmbedding(16, scaling=Llama3Scaling(8.0, 4.0, 1.0)),
        ),
        (ValueError, "pairs.*'adjacent'", lambda: RotaryEmbedding(16, pairs="adjacent")),
        (ValueError, "axes.*'mixed'", lambda: RotaryEmbedding(16, axes="mixed")),
        (ValueError, "axes='axial' needs sections", lambda: RotaryEmbedding(16, axes="axial")),
        (ValueError, "sections.*two axes", lambda: RotaryEmbedding(16, sections=(8,))),
        (ValueError, "sections.*add up.*8 pairs", lambda: RotaryEmbedding(16, sections=(2, 3, 4))),
        (ValueError, r"sections\[1\].*0", lambda: RotaryEmbedding(16, sections=(8, 0))),
        (ValueError, "sections.*interleaved", lambda: RotaryEmbedding(16, sections=(2, 3, 3), axes="interleaved")),
        (TypeError, "positions.*list", lambda: RotaryEmbedding(16)(randn(1, 2, 3, 16), [0, 1, 2])),
        (TypeError, "positions.*bool", lambda: RotaryEmbedding(16)(randn(1, 2, 3, 16), torch.ones(3).bool())),
        (ValueError, r"positions.*\(B, N\)", lambda: RotaryEmbedding(16)(randn(1, 2, 3, 16), torch.zeros(3, 1, 3))),
        (
            ValueError,
            r"positions.*\(3\|1, B, N\)",  # (B, N) is not guessed to mean all axes
            lambda: RotaryEmbedding(16, sections=(2, 3, 3))(randn(2, 2, 3, 16), torch.zeros(2, 3)),
        ),
        (
            ValueError,
            r"positions must be those of.*\(4,\)",
            lambda: RotaryEmbedding(16)(randn(1, 2, 3, 16), torch.arange(4)),
        ),
        (ValueError, "positions must be those of", lambda: RotaryEmbedding(16)(randn(3, 2, 3, 16), torch.zeros(2, 3))),
        (ValueError, "positions must be those of", lambda: RotaryEmbedding(16)(randn(3, 2, 16), torch.zeros(2, 3))),
        (ValueError, r"heads must have shape.*\(3, 8\)", lambda: RotaryEmbedding(8)(randn(3, 8), torch.arange(3))),
        (ValueError, "heads must have shape.*16", lambda: RotaryEmbedding(16)(randn(1, 2, 3, 8), torch.arange(3))),
    ],
)
def test_errors_name_the_argument_and_its_value(error, says, call):
    with pytest.raises(error, match=says):
        call()


# ---------------------------------------------------------------- positions of text and images


def test_positions_of_an_image_between_text():
    modality = torch.tensor([[1, 1, 2, 2, 2, 2, 2, 2, 1, 1]])
    expected = [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],  # time: one frame
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],  # height: 2
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],  # width: 3; the text goes on behind the largest
    ]
    assert rotary_positions(modality, [(1, 2, 3)])[:, 0].tolist() == expected
    assert rotary_positions(modality[0], torch.tensor([[1, 2, 3]])).tolist() == expected


def test_positions_of_a_batch_with_padding_and_neighbouring_images():
    modality = torch.tensor([[0, 0, 1, 2, 2, 1], [2, 2, 3, 2, 2, 0]])
    positions = rotary_positions(modality, [(1, 1, 2), (2, 1, 1), (3, 1, 1)])  # the last: a video of three frames
    assert positions.shape == (3, 2, 6) and positions.dtype == torch.int64
    assert positions[:, 0].tolist() == [[0, 0, 0, 1, 1, 3], [0, 0, 0, 1, 1, 3], [0, 0, 0, 1, 2, 3]]
    assert positions[:, 1].tolist() == [[0, 1, 2, 3, 4, 0], [0, 0, 2, 2, 2, 0], [0, 0, 2, 2, 2, 0]]


def test_positions_of_packed_sequences_are_each_sequence_s():
    rows = [[1, 2, 2, 1], [2, 2, 2, 2, 1], [1]]
    grids = [[(1, 1, 2)], [(1, 2, 2)], []]
    packed = torch.cat([torch.tensor(row) for row in rows])
    packed = rotary_positions(packed, [g for row in grids for g in row], torch.tensor([0, 4, 9, 10]))
    alone = [rotary_positions(torch.tensor(row), grid) for row, grid in zip(rows, grids)]
    assert torch.equal(packed, torch.cat(alone, 1))
    assert rotary_positions(torch.ones(0, 7, dtype=torch.int64), []).shape == (3, 0, 7)
    assert rotary_positions(torch.ones(2, 0, dtype=torch.int64), []).shape == (3, 2, 0)


@pytest.mark.parametrize(
    "says, call",
    [
        ("grids has no grid.*token 1 of sequence 0", lambda: rotary_positions(torch.tensor([1, 2]), [])),
        (
            r"\(1, 2, 2\) = 4 tokens.*token 0 of sequence 1",
            lambda: rotary_positions(torch.tensor([[1], [2]]), [(1, 2, 2)]),
        ),
        (r"\(1, 1, 2\) = 2 tokens", lambda: rotary_positions(torch.tensor([2, 1, 2]), [(1, 1, 2)])),
        ("grids names 2 images.*tokens of 1", lambda: rotary_positions(torch.tensor([2, 1]), [(1, 1, 1), (1, 1, 1)])),
        (r"grids.*\(1, 2\)", lambda: rotary_positions(torch.tensor([2, 2]), [(1, 2)])),
        (r"grids.*0", lambda: rotary_positions(torch.tensor([2, 2]), [(1, 0, 2)])),
        ("modality", lambda: rotary_positions(torch.ones(1, 2, 3).int(), [])),
        ("cu_seqlens.*end at most at 2", lambda: rotary_positions(torch.tensor([1, 1]), [], torch.tensor([0, 3]))),
        (r"modality.*\(T,\)", lambda: rotary_positions(torch.tensor([[1, 1]]), [], torch.tensor([0, 2]))),
    ],
)
def test_errors_of_positions(says, call):
    with pytest.raises(ValueError, match=says):
        call()


# ---------------------------------------------------------------- in the layers

X = randn(2, 5, 24)
MODALITY = torch.tensor([[1, 2, 2, 1, 1], [0, 1, 2, 2, 1]])


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_mgqa_rotates_queries_and_keys(flash, qk_norm):
    rotary = RotaryEmbedding(8, base=100.0)
    layer = make(MGQA, 24, 4, 2, 8, True, qk_norm=qk_norm, flash=flash, rotary=rotary)
    query, key, value = (p(X).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (layer.to_q, layer.to_k, layer.to_v))
    if qk_norm:
        query, key = query / query.norm(dim=-1, keepdim=True) * 10 * math.sqrt(8), key / key.norm(dim=-1, keepdim=True)
    query, key = rotary(query, torch.arange(5)), rotary(key, torch.arange(5))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert_same(layer(X), layer.to_out(out.transpose(1, 2).flatten(2)))
    assert sorted(layer.state_dict()) == sorted(make(MGQA, 24, 4, 2, 8).state_dict())


class Recording(RotaryEmbedding):
    def table(self, positions, dtype=torch.float32):
        self.positions = positions.tolist()
        return super().table(positions, dtype)


def test_default_positions():
    """In each packed sequence from 0, so that its bits do not depend on those before it; behind a cache they go on."""
    layer = make(MGQA, 24, 4, 2, 8, True, flash=False, rotary=Recording(8))
    layer(X)
    assert layer.rotary.positions == [0, 1, 2, 3, 4]
    layer(X.flatten(0, 1), cu_seqlens=torch.tensor([0, 4, 4, 9]))
    assert layer.rotary.positions == [0, 1, 2, 3, 0, 1, 2, 3, 4, 0]
    with torch.no_grad():
        cache = KVCache.for_layer(layer, 2, 7)
        layer(X, cache=cache)
        layer(X[:, :2], cache=cache)
    assert layer.rotary.positions == [5, 6]


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("image_rows", ["self", "causal"])
def test_layers_take_positions(flash, image_rows):
    rotary = RotaryEmbedding(8, sections=(2, 1, 1))
    layer = make(MultiModalCausalAttention, 24, 4, 2, 8, image_rows=image_rows, flash=flash, rotary=rotary)
    positions = rotary_positions(MODALITY, [(1, 1, 2), (1, 2, 1)])
    out = layer(X, MODALITY, positions=positions)
    assert_same(layer(X, MODALITY, positions=positions + 17), out)
    assert_same(layer(X, MODALITY, positions=rotary.table(positions, torch.float64)), out)
    assert not torch.allclose(layer(X, MODALITY, positions=torch.arange(5)), out)
    plain = make(MultiModalCausalAttention, 24, 4, 2, 8, image_rows=image_rows, flash=flash)
    assert_same(layer(X, MODALITY, positions=torch.zeros(5)), plain(X, MODALITY))


@pytest.mark.parametrize(
    "error, says, call",
    [
        (ValueError, "layer with rotary", lambda: make(MGQA, 24, 4)(X, positions=torch.arange(5))),
        (ValueError, "self-attention", lambda: make(MGQA, 24, 4)(X, X, positions=torch.arange(5))),
        (ValueError, "self-attention", lambda: make(MGQA, 24, 4, rotary=RotaryEmbedding(64))(X, X)),
        (
            ValueError,
            "positions must be those",
            lambda: make(MGQA, 24, 4, rotary=RotaryEmbedding(64))(X, positions=torch.arange(4)),
        ),
        (
            ValueError,
            "positions must be given",
            lambda: make(MGQA, 24, 4, rotary=RotaryEmbedding(64, sections=(16, 16)))(X),
        ),
    ],
)
def test_errors_of_layers(error, says, call):
    with pytest.raises(error, match=says):
        call()
