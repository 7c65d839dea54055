"""The readable reference against loops written straight from the formulas, against PyTorch, and by gradcheck."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from mmca_ext import reference
from mmca_ext.reference.philox import philox_4x32_10

INF = math.inf


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for a few elements, threads would only wait for each other
    yield
    torch.set_num_threads(threads)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---------------------------------------------------------------- the formulas as loops


def philox(c, k):
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def drop_factor(b, h, heads, p_i, j, p, seed, offset):
    counter = (j // 8, p_i % 2**32, b * heads + h, offset % 2**32)
    word = philox(counter, (seed % 2**32, seed >> 32))[j % 8 // 2]
    lane, threshold = word >> 16 * (j % 2) & 0xFFFF, round(65536 * p)
    return 65536 / (65536 - threshold) if lane >= threshold else 0.0


def loop_softmax(s, keys, values, z):
    """O and lse over the chosen keys; s, z map a key to its score and dropout factor."""
    if not keys:
        return [0.0] * values.shape[1], -INF
    top = max(s[j] for j in keys)
    lse = top + math.log(sum(math.exp(s[j] - top) for j in keys))
    return [sum(math.exp(s[j] - lse) * z(j) * values[j, d].item() for j in keys) for d in range(values.shape[1])], lse


def loop_scores(query, key, b, h, i, scale, softcap, bias):
    g = h // (query.shape[1] // key.shape[1])
    result = []
    for j in range(key.shape[2]):
        t = scale * sum(query[b, h, i, d].item() * key[b, g, j, d].item() for d in range(query.shape[3]))
        s = softcap * math.tanh(t / softcap) if softcap else t
        result.append(s + (bias[b, h, i, j].item() if bias is not None else 0.0))
    return g, result


def loop_attention(query, key, value, sees, scale=None, softcap=None, bias=None, dropout=None):
    (batch, heads, q_len, head_dim), k_len = query.shape, key.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    out, lse = torch.empty(batch, heads, q_len, value.shape[3]).double(), torch.empty(batch, heads, q_len).double()
    for b, h, i in itertools.product(range(batch), range(heads), range(q_len)):
        p_i = i + k_len - q_len
        g, s = loop_scores(query, key, b, h, i, scale, softcap, bias)
        keys = [j for j in range(k_len) if sees(b, h, i, p_i, j) and s[j] != -INF]
        z = (lambda j: drop_factor(b, h, heads, p_i, j, *dropout)) if dropout else (lambda j: 1.0)  # noqa: B023
        row, lse[b, h, i] = loop_softmax(s, keys, value[b, g], z)
        out[b, h, i] = torch.tensor(row, dtype=torch.float64)
    return out, lse


def loop_mmca(query, key, value, modality, image_rows, merge, gate, image_id, scale, softcap, dropout):
    (batch, heads, q_len, _), k_len = query.shape, key.shape[2]
    out = torch.zeros(2, batch, heads, q_len, value.shape[3]).double()
    lse = torch.full((2, batch, heads, q_len), -INF).double()
    joint = torch.zeros_like(out[0])
    for b, h, i in itertools.product(range(batch), range(heads), range(q_len)):
        p = i + k_len - q_len
        kind = modality[b].tolist()
        ids = kind if image_id is None else image_id[b].tolist()
        row_kind = kind[p]
        text = [j for j in range(k_len) if j <= p and kind[j] == 1]
        image = [j for j in range(k_len) if j <= p and kind[j] >= 2]
        alone = False
        if row_kind == 0:
            text, image = [], []
        elif row_kind >= 2 and image_rows == "self":
            text, image, alone = [], [p], True
        elif row_kind >= 2 and image_rows == "self+text":
            image, alone = [p], True
        elif row_kind >= 2 and image_rows == "block":
            first = last = p
            while first > 0 and kind[first - 1] >= 2 and ids[first - 1] == ids[p]:
                first -= 1
            while last + 1 < k_len and kind[last + 1] >= 2 and ids[last + 1] == ids[p]:
                last += 1
            text, image = [], list(range(first, last + 1))

        g, s = loop_scores(query, key, b, h, i, scale, softcap, None)

        def z(j, b=b, h=h, p=p, alone=alone):
            return 1.0 if dropout is None or (alone and j == p) else drop_factor(b, h, heads, p, j, *dropout)

        for r, keys in enumerate((text, image)):
            row, lse[r, b, h, i] = loop_softmax(s, keys, value[b, g], z)
            out[r, b, h, i] = torch.tensor(row, dtype=torch.float64)
        joint[b, h, i] = torch.tensor(loop_softmax(s, text + image, value[b, g], z)[0], dtype=torch.float64)
    if merge == "sum":
        return out[0] + out[1], lse
    if merge == "lse":
        return joint, lse
    if merge == "gate":
        gate = gate.expand(batch, heads, q_len, 2)
        return gate[..., :1] * out[0] + gate[..., 1:] * out[1], lse
    return out, lse


# ---------------------------------------------------------------- dropout


@pytest.mark.parametrize(
    "counter, key, words",
    [  # known answers of the Random123 distribution
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    ours = philox_4x32_10([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert tuple(int(w) for w in ours) == words
    assert tuple(philox(counter, key)) == words


def test_dropout_mask_lanes():
    seed, offset, p = 0x1234567_89ABCDEF, 2**32 + 7, 0.3
    for q_len, k_len in ((3, 19), (5, 2)):  # the second has rows at negative positions
        mask = reference.dropout_mask(2, 3, q_len, k_len, p, seed, offset)
        assert mask.dtype == torch.bool and mask.shape == (2, 3, q_len, k_len)
        for b, h, i, j in itertools.product(range(2), range(3), range(q_len), range(k_len)):
            assert mask[b, h, i, j].item() == (drop_factor(b, h, 3, i + k_len - q_len, j, p, seed, offset) > 0)


def test_dropout_mask_keeps_one_minus_p():
    assert abs(reference.dropout_mask(4, 4, 128, 128, 0.25, 1, 2).double().mean() - 0.75) < 2e-3
    assert reference.dropout_mask(1, 1, 8, 8, 0.0, 1, 2).all()
    assert not reference.dropout_mask(1, 1, 8, 8, 1.0, 1, 2).any()


# ---------------------------------------------------------------- attention

ATTENTION_CASES = [
    {},
    {"q_len": 1},
    {"is_causal": True},
    {"is_causal": True, "q_len": 7, "k_len": 4},
    {"q_len": 7, "k_len": 4, "dropout_p": 0.4},
    {"window": (1, None)},
    {"window": (-1, 0), "q_len": 6, "k_len": 6},
    {"window": (2, 1), "is_causal": True, "softcap": 1.5},
    {"mask": "bool"},
    {"mask": "bool", "key_mask": True, "is_causal": True},
    {"mask": "bias"},
    {"mask": "bias", "softcap": 0.7, "window": (3, 2)},
    {"mask": "row bias", "key_mask": True},
    {"key_mask": True, "dropout_p": 0.3, "scale": 0.3},
    {"dropout_p": 0.2, "is_causal": True, "kv_heads": 1},
    {"dropout_p": 1.0},
    {"kv_heads": 4, "softcap": 2.0, "scale": -1.0},
    {"q_len": 0},
    {"k_len": 0},
    {"batch": 0},
]


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_attention_against_loops(case):
    case = dict(case)
    batch, heads, kv_heads = case.pop("batch", 2), 4, case.pop("kv_heads", 2)
    q_len, k_len = case.pop("q_len", 3), case.pop("k_len", 10)
    query = randn(batch, heads, q_len, 5)
    key, value = randn(batch, kv_heads, k_len, 5, seed=1), randn(batch, kv_heads, k_len, 3, seed=2)
    shape, kwargs = (batch, heads, q_len, k_len), dict(case)
    kind, use_key_mask = kwargs.pop("mask", None), kwargs.pop("key_mask", False)
    allowed = bias = None
    if kind == "bool":
        allowed = randn(*shape, seed=3) > 0
        allowed[:, :, :1] = False  # one empty row
        kwargs["attn_mask"] = allowed
    elif kind:
        bias = randn(*(shape if kind == "bias" else shape[2:]), seed=3)
        bias[..., 1] = -INF
        kwargs["attn_mask"], bias = bias, bias.expand(shape)
    key_mask = randn(batch, k_len, seed=4) > -0.3 if use_key_mask else None
    left, right = kwargs.get("window", (None, None))

    def sees(b, h, i, p, j):
        return (
            (not kwargs.get("is_causal") or j <= p)
            and (left in (None, -1) or p - left <= j)
            and (right in (None, -1) or j <= p + right)
            and (allowed is None or allowed[b, h, i, j].item())
            and (key_mask is None or key_mask[b, j].item())
        )

    p, rng_state = kwargs.get("dropout_p", 0.0), torch.tensor([12345, 678])
    expected, expected_lse = loop_attention(
        query, key, value, sees, kwargs.get("scale"), kwargs.get("softcap"), bias, (p, 12345, 678) if p else None
    )
    out, lse = reference.attention(query, key, value, key_mask=key_mask, return_lse=True, rng_state=rng_state, **kwargs)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("q_len, causal", [(6, False), (6, True), (4, False)])
def test_attention_agrees_with_sdpa(dtype, q_len, causal):
    query, key, value = randn(2, 4, q_len, 8), randn(2, 2, 6, 8, seed=1), randn(2, 2, 6, 8, seed=2)
    query, key, value = (t.to(dtype).requires_grad_() for t in (query, key, value))
    ours = reference.attention(query, key, value, is_causal=causal)
    theirs = F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    assert ours.dtype == dtype
    grad = randn(2, 4, q_len, 8, seed=3).to(dtype)
    tolerance = {"atol": 5e-2, "rtol": 2e-2} if dtype.itemsize == 2 else {}
    ours, theirs = ((o, *torch.autograd.grad(o, (query, key, value), grad)) for o in (ours, theirs))
    torch.testing.assert_close(ours, theirs, **tolerance)


def test_causal_is_bottom_right():
    query, key, value = randn(1, 1, 2, 4), randn(1, 1, 5, 4, seed=1), randn(1, 1, 5, 4, seed=2)
    expected = F.scaled_dot_product_attention(query, key, value, torch.ones(2, 5, dtype=torch.bool).tril(3))
    torch.testing.assert_close(reference.attention(query, key, value, is_causal=True), expected)


def test_packed_attention_is_its_sequences():
    offsets = {"cu_seqlens_q": torch.tensor([0, 0, 3, 5]), "cu_seqlens_k": torch.tensor([0, 2, 6, 9]).int()}
    query, key, value = randn(7, 4, 5), randn(10, 2, 5, seed=1), randn(10, 2, 3, seed=2)
    kwargs = {"dropout_p": 0.3, "is_causal": True, "window": (2, None), "softcap": 3.0, "return_lse": True}
    kwargs["rng_state"] = torch.tensor([5, 6])
    out, lse = reference.attention(query, key, value, max_seqlen_q=3, max_seqlen_k=4, **offsets, **kwargs)
    assert out.shape == (7, 4, 3) and lse.shape == (4, 7)
    assert (out[5:] == 0).all() and (lse[:, 5:] == -INF).all()  # tokens behind the last sequence
    for n, (qs, ks) in enumerate((((0, 0), (0, 2)), ((0, 3), (2, 6)), ((3, 5), (6, 9)))):
        q, k, v = (t.transpose(0, 1)[None] for t in (query[slice(*qs)], key[slice(*ks)], value[slice(*ks)]))
        repeated = (t.expand(n + 1, -1, -1, -1) for t in (q, k, v))  # so that the sequence is batch n of the mask
        o, s = reference.attention(*repeated, **kwargs)
        torch.testing.assert_close(out[slice(*qs)], o[n].transpose(0, 1))
        torch.testing.assert_close(lse[:, slice(*qs)], s[n])


# ---------------------------------------------------------------- MMCA

MODALITY = torch.tensor([[1, 2, 2, 1, 1, 3, 3, 2, 1, 0], [0, 2, 1, 0, 2, 2, 2, 2, 1, 1]])
IMAGE_ID = torch.tensor([[0, 4, 5, 0, 0, 6, 6, 6, 0, 0], [0, 1, 0, 0, 2, 2, 3, 3, 0, 0]])


@pytest.mark.parametrize("merge", ["sum", "lse", "gate", "none"])
@pytest.mark.parametrize("image_rows", ["self", "block", "causal", "self+text"])
@pytest.mark.parametrize("q_len, with_id, p", [(10, False, 0.0), (6, True, 0.3), (9, False, 0.2)])
def test_mmca_against_loops(image_rows, merge, q_len, with_id, p):
    query, key, value = randn(2, 4, q_len, 5), randn(2, 2, 10, 5, seed=1), randn(2, 2, 10, 3, seed=2)
    gate = randn(4, q_len, 2, seed=3) if merge == "gate" else None
    image_id, softcap = (IMAGE_ID, 2.0) if with_id else (None, None)
    dropout = (p, 2**40 + 9, 3) if p else None
    expected, expected_lse = loop_mmca(
        query, key, value, MODALITY, image_rows, merge, gate, image_id, 0.6, softcap, dropout
    )
    kwargs = {"gate": gate, "image_id": image_id, "dropout_p": p, "scale": 0.6, "softcap": softcap, "return_lse": True}
    kwargs |= {"image_rows": image_rows, "merge": merge, "rng_state": torch.tensor([2**40 + 9, 3])}
    result = reference.mmca_attention(query, key, value, MODALITY, **kwargs)
    torch.testing.assert_close(result[0], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result[1], expected_lse, rtol=1e-12, atol=1e-12)


def test_mmca_of_text_alone_is_causal_attention():
    query, key, value = randn(2, 4, 3, 5), randn(2, 2, 6, 5, seed=1), randn(2, 2, 6, 3, seed=2)
    ours = reference.mmca_attention(query, key, value, torch.ones(2, 6, dtype=torch.int32))
    torch.testing.assert_close(ours, reference.attention(query, key, value, is_causal=True))


def test_mmca_merge_lse_is_the_merge_of_the_groups():
    query, key, value = randn(2, 4, 10, 5), randn(2, 2, 10, 5, seed=1), randn(2, 2, 10, 3, seed=2)
    for image_rows in ("self", "block", "causal", "self+text"):
        parts, lse = reference.mmca_attention(query, key, value, MODALITY, image_rows=image_rows, merge="none")
        joint = reference.mmca_attention(query, key, value, MODALITY, image_rows=image_rows, merge="lse")
        torch.testing.assert_close(reference.merge_attention(parts, lse)[0], joint)


def test_packed_mmca_is_its_sequences():
    query, key, value = randn(12, 4, 5), randn(12, 2, 5, seed=1), randn(12, 2, 3, seed=2)
    modality = torch.tensor([1, 2, 2, 1, 1, 2, 3, 3, 1, 0, 1, 1])
    offsets, rng_state = torch.tensor([0, 4, 4, 10]), torch.tensor([5, 6])
    for merge in ("sum", "lse", "none", "gate"):
        gate = randn(12, 4, 2, seed=5) if merge == "gate" else None
        kwargs = {"image_rows": "block", "merge": merge, "dropout_p": 0.3, "rng_state": rng_state, "return_lse": True}
        out, lse = reference.mmca_attention(query, key, value, modality, cu_seqlens=offsets, gate=gate, **kwargs)
        assert out.shape == ((2, 12, 4, 3) if merge == "none" else (12, 4, 3)) and lse.shape == (2, 4, 12)
        assert (out[..., 10:, :, :] == 0).all() and (lse[..., 10:] == -INF).all()
        for n, (a, b) in ((0, (0, 4)), (2, (4, 10))):
            q, k, v = (t[a:b].transpose(0, 1).expand(n + 1, -1, -1, -1) for t in (query, key, value))
            g = None if gate is None else gate[a:b].transpose(0, 1).expand(n + 1, -1, -1, -1)
            o, s = reference.mmca_attention(q, k, v, modality[a:b].expand(n + 1, -1), gate=g, **kwargs)
            torch.testing.assert_close(out[..., a:b, :, :], o.select(-4, n).transpose(-3, -2))
            torch.testing.assert_close(lse[..., a:b], s[:, n])


# ---------------------------------------------------------------- what is hidden has no influence


def results_and_gradients(function, *tensors):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    results = function(*tensors)
    results = results if isinstance(results, tuple) else (results,)
    total = sum((r.masked_fill(r == -INF, 0.0) * randn(*r.shape, seed=9)).sum() for r in results)
    return [r.detach() for r in results], torch.autograd.grad(total, tensors)


KEY_MASK = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1, 0]]).bool()
EMPTY_ROW_MASK = torch.ones(6, 8, dtype=torch.bool)
EMPTY_ROW_MASK[:, 7], EMPTY_ROW_MASK[2] = False, False
BIAS = torch.zeros(6, 8, dtype=torch.float64).masked_fill(~EMPTY_ROW_MASK, -INF)
PADDED = torch.tensor([[1, 2, 2, 1, 1, 2, 1, 0]] * 2)
HIDING = {  # each hides key 7 from every row
    "key_mask": lambda q, k, v: reference.attention(q, k, v, key_mask=KEY_MASK, return_lse=True),
    "attn_mask": lambda q, k, v: reference.attention(q, k, v, EMPTY_ROW_MASK, return_lse=True),
    "bias": lambda q, k, v: reference.attention(q, k, v, BIAS, softcap=2.0, return_lse=True),
    "window": lambda q, k, v: reference.attention(q[:, :, :3], k, v, window=(1, 0), attn_mask=EMPTY_ROW_MASK[3:]),
    "mmca": lambda q, k, v: reference.mmca_attention(q, k, v, PADDED, image_rows="block", return_lse=True),
    "mmca causal": lambda q, k, v: reference.mmca_attention(q, k, v, PADDED, image_rows="causal", merge="none"),
    "linear": lambda q, k, v: reference.linear_attention(q, k, v, key_mask=KEY_MASK),
    "linear causal": lambda q, k, v: reference.linear_attention(q, k, v, True, key_mask=KEY_MASK),
}


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("function", HIDING.values(), ids=HIDING)
def test_keys_hidden_from_all_rows(function, bad):
    query, key, value = randn(2, 4, 6, 5), randn(2, 2, 8, 5, seed=1), randn(2, 2, 8, 3, seed=2)
    clean, clean_grads = results_and_gradients(function, query, key, value)
    key[:, :, 7], value[:, :, 7] = bad, bad
    dirty, dirty_grads = results_and_gradients(function, query, key, value)
    for a, b in zip((*dirty, *dirty_grads), (*clean, *clean_grads), strict=True):
        assert not a.isnan().any()
        assert torch.equal(a, b)
    assert (dirty_grads[1][:, :, 7] == 0).all() and (dirty_grads[2][:, :, 7] == 0).all()


CAUSAL = {  # each shows key 7 to the last row only
    "attention": lambda q, k, v: reference.attention(q, k, v, is_causal=True),
    "mmca": lambda q, k, v: reference.mmca_attention(q, k, v, PADDED.clamp(min=1), image_rows="causal"),
    "linear": lambda q, k, v: reference.linear_attention(q, k, v, True),
}


@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize("function", CAUSAL.values(), ids=CAUSAL)
def test_keys_hidden_from_some_rows(function, bad):
    query, key, value = randn(2, 4, 6, 5), randn(2, 2, 8, 5, seed=1), randn(2, 2, 8, 3, seed=2)
    (clean,), (clean_dq, _, _) = results_and_gradients(function, query, key, value)
    key[:, :, 7], value[:, :, 7] = bad, bad
    (dirty,), (dirty_dq, _, _) = results_and_gradients(function, query, key, value)
    torch.testing.assert_close(dirty[:, :, :5], clean[:, :, :5])
    torch.testing.assert_close(dirty_dq[:, :, :5], clean_dq[:, :, :5])
    assert not dirty[:, :, 5].isfinite().any()


def test_nan_query_stays_in_its_row():
    query, key, value = randn(1, 2, 6, 5), randn(1, 2, 6, 5, seed=1), randn(1, 2, 6, 3, seed=2)
    clean = reference.attention(query, key, value, is_causal=True)
    query[:, :, 2] = math.nan
    dirty, (_, dk, dv) = results_and_gradients(
        lambda q, k, v: reference.attention(q, k, v, is_causal=True), query, key, value
    )
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(dirty[0][:, :, others], clean[:, :, others])
    assert dirty[0][:, :, 2].isnan().all()
    assert dk[:, :, 3:].isfinite().all() and dv[:, :, 3:].isfinite().all()  # keys that row 2 does not see


def test_empty_rows_have_zero_gradients():
    query, key, value = randn(1, 2, 3, 4), randn(1, 2, 3, 4, seed=1), randn(1, 2, 3, 4, seed=2)
    bias = torch.full((3, 3), -INF, dtype=torch.float64)
    out, grads = results_and_gradients(
        lambda q, k, v, b: reference.attention(q, k, v, b, return_lse=True), query, key, value, bias
    )
    assert (out[0] == 0).all() and (out[1] == -INF).all()
    assert all((g == 0).all() for g in grads)
    lowest = torch.full((3, 3), torch.finfo(torch.float32).min)  # a number, not a mask: uniform weights
    out = reference.attention(query.float(), key.float(), value.float(), lowest)
    torch.testing.assert_close(out, value.float().mean(2, keepdim=True).expand_as(out))


def test_huge_scores_are_finite():
    query, key, value = (randn(1, 2, 5, 4, seed=n, dtype=torch.float32) for n in range(3))
    assert all(r.isfinite().all() for r in reference.attention(query * 5e8, key * 5e8, value, return_lse=True))


# ---------------------------------------------------------------- gradients


def gradcheck(function, *tensors):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


RNG_STATE = torch.tensor([77, 3])


def test_gradcheck_attention():
    query, key, value = randn(1, 2, 2, 3), randn(1, 1, 4, 3, seed=1), randn(1, 1, 4, 2, seed=2)
    bias = randn(2, 1, 4, seed=3)
    kwargs = {"dropout_p": 0.3, "window": (2, 1), "softcap": 1.5, "return_lse": True, "rng_state": RNG_STATE}
    gradcheck(lambda q, k, v, b: reference.attention(q, k, v, b, **kwargs), query, key, value, bias)


def test_gradcheck_attention_with_empty_rows():
    query, key, value = randn(1, 2, 4, 3), randn(1, 2, 2, 3, seed=1), randn(1, 2, 2, 2, seed=2)
    gradcheck(lambda q, k, v: reference.attention(q, k, v, is_causal=True), query, key, value)


@pytest.mark.parametrize("image_rows", ["self", "block", "causal", "self+text"])
@pytest.mark.parametrize("merge", ["sum", "lse", "gate", "none"])
def test_gradcheck_mmca(image_rows, merge):
    modality = torch.tensor([[1, 2, 2, 1, 0]])
    tensors = [randn(1, 2, 4, 2), randn(1, 1, 5, 2, seed=1), randn(1, 1, 5, 2, seed=2)]
    if merge == "gate":
        tensors.append(torch.zeros(2, 1, 2, dtype=torch.float64))  # zero gates have a gradient

    kwargs = {"image_rows": image_rows, "merge": merge, "dropout_p": 0.2, "return_lse": True, "rng_state": RNG_STATE}

    def function(q, k, v, gate=None):
        out, lse = reference.mmca_attention(q, k, v, modality, gate=gate, **kwargs)
        return out, lse.masked_fill(lse == -INF, 0.0)

    gradcheck(function, *tensors)


def test_gradcheck_linear_and_merge():
    query, key, value = randn(1, 2, 3, 2), randn(1, 1, 4, 2, seed=1), randn(1, 1, 4, 2, seed=2)
    S, z = randn(1, 1, 2, 2, seed=3), randn(1, 1, 2, seed=4).abs() + 1

    key_mask = torch.tensor([[True, False, True, True]])

    def linear(q, k, v, S, z):
        before = reference.LinearState(S, z)
        out, state = reference.linear_attention(q, k, v, True, key_mask=key_mask, state=before, return_state=True)
        return out, *state

    gradcheck(linear, query, key, value, S, z)
    absent = torch.tensor([[False, True], [False, True], [True, True]])
    outputs, lses = randn(3, 2, 4), randn(3, 2, seed=1)
    gradcheck(reference.merge_attention, outputs, lses)
    gradcheck(lambda o, s: reference.merge_attention(o, s.masked_fill(absent, -INF))[0], outputs, lses)


# ---------------------------------------------------------------- linear attention, merging, maps


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("q_len, k_len", [(4, 6), (5, 5), (6, 4), (3, 0)])
def test_linear_attention_against_loops(causal, q_len, k_len):
    query, key, value = randn(2, 4, q_len, 3), randn(2, 2, k_len, 3, seed=1), randn(2, 2, k_len, 2, seed=2)
    key_mask, phi = randn(2, k_len, seed=3) > -0.5, (F.elu(query) + 1, F.elu(key) + 1)
    expected = torch.zeros(2, 4, q_len, 2).double()
    for b, h, i in itertools.product(range(2), range(4), range(q_len)):
        keys = [j for j in range(k_len) if key_mask[b, j] and (not causal or j <= i + k_len - q_len)]
        weights = [torch.dot(phi[0][b, h, i], phi[1][b, h // 2, j]) for j in keys]
        for w, j in zip(weights, keys, strict=True):
            expected[b, h, i] += w / sum(weights) * value[b, h // 2, j]
    out = reference.linear_attention(query, key, value, causal, key_mask=key_mask)
    torch.testing.assert_close(out, expected)


def test_linear_attention_state_and_packing():
    query, key, value = randn(2, 4, 7, 3), randn(2, 2, 7, 3, seed=1), randn(2, 2, 7, 2, seed=2)
    whole, end = reference.linear_attention(query, key, value, True, return_state=True)
    first, state = reference.linear_attention(*(t[:, :, :4] for t in (query, key, value)), True, return_state=True)
    assert state.S.shape == (2, 2, 3, 2) and state.z.shape == (2, 2, 3)
    rest, state = reference.linear_attention(
        *(t[:, :, 4:] for t in (query, key, value)), True, state=state, return_state=True
    )
    torch.testing.assert_close(torch.cat((first, rest), 2), whole)
    torch.testing.assert_close(tuple(state), tuple(end))
    offsets = torch.tensor([0, 7, 7, 14])
    packed = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    out, state = reference.linear_attention(
        *packed, True, cu_seqlens_q=offsets, cu_seqlens_k=offsets, return_state=True
    )
    torch.testing.assert_close(out.view(2, 7, 4, 2).transpose(1, 2), whole)
    torch.testing.assert_close(state.S[[0, 2]], end.S)
    assert (state.z[1] == 0).all()


def test_linear_attention_survives_underflow():
    query, key, value = (randn(1, 1, 4, 3, seed=n, dtype=torch.float32) for n in range(3))
    out = reference.linear_attention(query - 200, key, value)
    expected = reference.linear_attention((query - 200).double(), key.double(), value.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)


def test_merge_attention_of_split_keys():
    query, key, value = randn(2, 4, 5, 4), randn(2, 2, 9, 4, seed=1), randn(2, 2, 9, 3, seed=2)
    parts = [
        reference.attention(query, key[:, :, a:b], value[:, :, a:b], return_lse=True)
        for a, b in ((0, 4), (4, 4), (4, 9))
    ]
    merged = reference.merge_attention([o for o, _ in parts], [s for _, s in parts])
    torch.testing.assert_close(merged, reference.attention(query, key, value, return_lse=True))
    out, lse = reference.merge_attention(torch.full((2, 3, 4), math.nan), torch.full((2, 3), -INF))
    assert (out == 0).all() and (lse == -INF).all()


def test_attention_map_gives_the_output_back():
    query, key, value = randn(2, 4, 6, 4), randn(2, 4, 8, 4, seed=1), randn(2, 4, 8, 3, seed=2)
    mask, key_mask = randn(4, 1, 8, seed=3), randn(2, 8, seed=4) > -0.5
    kwargs = {"attn_mask": mask, "is_causal": True, "key_mask": key_mask, "window": (4, 0), "softcap": 1.5}
    out, lse = reference.attention(query, key, value, **kwargs, return_lse=True)
    torch.testing.assert_close(reference.attention_map(query, key, lse, **kwargs) @ value, out)
    some = reference.attention_map(query, key, lse, rows=[1, -1], **kwargs)
    torch.testing.assert_close(some @ value, out[:, :, [1, 5]])
    modality = torch.tensor([[1, 2, 2, 1, 1, 3, 1, 0]] * 2)
    image_id = torch.tensor([[0, 4, 5, 0, 0, 5, 0, 0]] * 2)
    for image_rows in ("self", "block", "causal", "self+text"):
        for merge in ("sum", "lse"):
            kwargs = {"modality": modality, "image_rows": image_rows, "image_id": image_id, "softcap": 2.0}
            out, lse = reference.mmca_attention(query, key, value, merge=merge, return_lse=True, **kwargs)
            level = lse if merge == "sum" else lse.logsumexp(0)
            weights = reference.attention_map(query, key, level, **kwargs)
            torch.testing.assert_close(weights @ value, out)


# ---------------------------------------------------------------- errors

Q, K, V = randn(2, 4, 3, 8), randn(2, 2, 5, 8), randn(2, 2, 5, 6)
M = torch.ones(2, 5, dtype=torch.int64)
OFFSETS = torch.tensor([0, 2])


@pytest.mark.parametrize(
    "error, says, call",
    [
        (ValueError, "shape", lambda: reference.attention(Q[0], K, V)),
        (TypeError, "dtype", lambda: reference.attention(Q, K.float(), V)),
        (TypeError, "floating", lambda: reference.attention(Q.long(), K.long(), V.long())),
        (ValueError, "multiple", lambda: reference.attention(Q[:, :3], K, V)),
        (ValueError, "head_dim", lambda: reference.attention(Q[..., :4], K, V)),
        (ValueError, "length", lambda: reference.attention(Q, K, V[:, :, :4])),
        (ValueError, "batch", lambda: reference.attention(Q[:1], K, V)),
        (ValueError, "broadcastable", lambda: reference.attention(Q, K, V, torch.ones(3, 4, dtype=torch.bool))),
        (TypeError, "attn_mask", lambda: reference.attention(Q, K, V, torch.ones(3, 5, dtype=torch.int64))),
        (ValueError, "key_mask", lambda: reference.attention(Q, K, V, key_mask=torch.ones(2, 4, dtype=torch.bool))),
        (ValueError, "scale", lambda: reference.attention(Q, K, V, scale=math.nan)),
        (ValueError, "softcap", lambda: reference.attention(Q, K, V, softcap=-1.0)),
        (ValueError, "dropout_p", lambda: reference.attention(Q, K, V, dropout_p=1.5)),
        (ValueError, "window", lambda: reference.attention(Q, K, V, window=3)),
        (ValueError, "window", lambda: reference.attention(Q, K, V, window=(-2, 0))),
        (TypeError, "window", lambda: reference.attention(Q, K, V, window=(1.5, 0))),
        (ValueError, "together", lambda: reference.attention(Q[0], Q[0], Q[0], cu_seqlens_q=OFFSETS)),
        (ValueError, "image_rows", lambda: reference.mmca_attention(Q, K, V, M, image_rows="own")),
        (ValueError, "merge", lambda: reference.mmca_attention(Q, K, V, M, merge="mean")),
        (ValueError, "gate", lambda: reference.mmca_attention(Q, K, V, M, merge="gate")),
        (ValueError, "gate", lambda: reference.mmca_attention(Q, K, V, M, gate=torch.ones(2))),
        (ValueError, "last", lambda: reference.mmca_attention(Q, K[:, :, :2], V[:, :, :2], M[:, :2])),
        (ValueError, "modality", lambda: reference.mmca_attention(Q, K, V, M - 2)),
        (ValueError, "modality", lambda: reference.mmca_attention(Q, K, V, M[:, :4])),
        (TypeError, "modality", lambda: reference.mmca_attention(Q, K, V, M.float())),
        (ValueError, "rows", lambda: reference.attention_map(Q, K, Q[..., 0], rows=3)),
        (ValueError, "fit", lambda: reference.merge_attention(Q, K[..., 0])),
    ],
)
def test_errors_name_the_argument(error, says, call):
    with pytest.raises(error, match=says):
        call()


def test_wrong_offsets():
    q, k, v = (t[0].transpose(0, 1) for t in (K, K, V))
    for offsets in ([1, 2], [0, 3, 2], [0, 9], [0, -1, 2]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            reference.mmca_attention(q, k, v, M[0], cu_seqlens=torch.tensor(offsets))


def test_generator_draws_the_mask():
    a, b = (torch.Generator().manual_seed(3) for _ in range(2))
    first, second = (reference.attention(Q, K, V, dropout_p=0.5, generator=g) for g in (a, b))
    assert torch.equal(first, second)
    assert not torch.equal(first, reference.attention(Q, K, V, dropout_p=0.5, generator=a))
