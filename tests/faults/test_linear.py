"""What users may feed linear attention by accident."""

import math
import threading

import pytest
import torch
from operators import refused

from mmca_ext import _C, functional, reference
from mmca_ext.functional import LinearState, linear_attention

from .common import BAD, NAN, assert_same_bits, different, qkv, rand, randn, same_bits

SIZES = {"tokens": (4, 7), "one chunk": (40, 45), "segments": (1600, 1650), "more rows": (130, 60)}
sizes = pytest.mark.parametrize("size", SIZES)
causal = pytest.mark.parametrize("is_causal", [True, False])


def everything(tensors, state=None, keep=True, **kwargs):
    """out, the state and every gradient, for arriving gradients that depend on their shape alone."""
    leaves = {name: t.detach().requires_grad_() for name, t in zip(("query", "key", "value"), tensors, strict=True)}
    if state is not None:
        leaves |= {"S": state[0].detach().requires_grad_(), "z": state[1].detach().requires_grad_()}
        kwargs["state"] = LinearState(leaves["S"], leaves["z"])
    out = linear_attention(*(leaves[n] for n in ("query", "key", "value")), return_state=keep, **kwargs)
    results = {"out": out[0], "state_S": out[1].S, "state_z": out[1].z} if keep else {"out": out}
    grads = [randn(*t.shape, seed=4 + i, dtype=t.dtype) for i, t in enumerate(results.values())]
    gradients = torch.autograd.grad(list(results.values()), list(leaves.values()), grads)
    return {name: t.detach() for name, t in results.items()} | dict(zip(map("d_{}".format, leaves), gradients))


def state_for(tensors, dtype=torch.float64):
    (batch, heads, _, dim), value_dim = tensors[1].shape, tensors[2].shape[3]
    S, z = randn(batch, heads, dim, value_dim, seed=6, dtype=dtype), randn(batch, heads, dim, seed=7, dtype=dtype)
    return S, z.abs() + 0.5


# ---------------------------------------------------------------- rows that see nothing


@sizes
@causal
def test_rows_that_see_nothing_are_zero(isa, size, is_causal, dtype):
    """Masked keys in one sequence, all of them; the first ones in the other."""
    q_len, k_len = SIZES[size]
    tensors = qkv(q_len, k_len, dtype=dtype)
    key_mask = torch.ones(2, k_len, dtype=torch.bool)
    key_mask[0] = False
    key_mask[1, : k_len - 2] = False
    found = everything(tensors, key_mask=key_mask, is_causal=is_causal)
    assert all(t.isfinite().all() for t in found.values())
    empty = slice(None, q_len - 2) if is_causal else slice(0, 0)
    for name in ("out", "d_query"):
        assert (found[name][0] == 0).all() and (found[name][1, :, empty] == 0).all(), name
        assert (found[name][1, :, -1] != 0).any(), name
    assert (found["state_S"][0] == 0).all() and (found["state_z"][0] == 0).all()
    for name in ("d_key", "d_value"):
        assert (found[name][0] == 0).all() and (found[name][1, :, : k_len - 2] == 0).all(), name


@causal
def test_a_state_is_seen_where_no_key_is(isa, is_causal, dtype):
    """By rows before the first key, by rows whose keys are masked, and where there is no key at all."""
    tensors = qkv(9, 5, dtype=dtype)
    S, z = state_for(tensors)
    phi = lambda x: torch.where(x > 0, x + 1, x.exp())  # noqa: E731
    weights = phi(tensors[0].double()).unflatten(1, (2, 2))
    expected = (weights @ S[:, :, None]) / (weights * z[:, :, None, None]).sum(-1, keepdim=True)
    expected = expected.flatten(1, 2)
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
    masked = linear_attention(*tensors, is_causal, state=LinearState(S, z), key_mask=torch.zeros(2, 5) > 0)
    torch.testing.assert_close(masked.double(), expected, **tolerance)
    none = [tensors[0], tensors[1][:, :, :0], tensors[2][:, :, :0]]
    torch.testing.assert_close(
        linear_attention(*none, is_causal, state=LinearState(S, z)).double(), expected, **tolerance
    )
    if is_causal:
        early = linear_attention(*tensors, True, state=LinearState(S, z))[:, :, :4]
        torch.testing.assert_close(early.double(), expected[:, :, :4], **tolerance)


def test_a_state_of_zeros_is_nothing(isa, dtype):
    """What a stream begins with, if one likes: no NaN before the first key, and the same numbers after it."""
    tensors = qkv(9, 5, dtype=dtype)
    zeros = LinearState(*(torch.zeros_like(t) for t in state_for(tensors)))
    found = everything(tensors, zeros, is_causal=True)
    assert (found["out"][:, :, :4] == 0).all() and (found["d_query"][:, :, :4] == 0).all()
    assert all(t.isfinite().all() for t in found.values())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found["out"], linear_attention(*tensors, True), rtol=4 * eps, atol=4 * eps)


# ---------------------------------------------------------------- numbers that are none


@sizes
@causal
@pytest.mark.parametrize("bad", BAD)
def test_keys_hidden_from_all_rows_have_no_influence(isa, size, is_causal, bad, dtype):
    q_len, k_len = SIZES[size]
    tensors = qkv(q_len, k_len, dtype=dtype)
    key_mask = rand(2, k_len, seed=8) < 0.6
    key_mask[:, -1] = True
    expected = everything(tensors, key_mask=key_mask, is_causal=is_causal)
    for t in tensors[1:]:
        t.masked_fill_(~key_mask[:, None, :, None], bad)
    found = everything(tensors, key_mask=key_mask, is_causal=is_causal)
    assert_same_bits(found, expected)
    for name in ("d_key", "d_value"):
        assert (found[name].transpose(1, 2)[~key_mask] == 0).all()


@pytest.mark.parametrize("bad", BAD)
@sizes
def test_the_future_does_not_change_the_past(isa, size, bad, dtype):
    """A key from one position on; the rows before it, and their gradients."""
    q_len, k_len = SIZES[size]
    tensors = qkv(q_len, k_len, dtype=dtype)
    shift = k_len - q_len
    first = max(k_len - 3, 0)
    expected = everything(tensors, is_causal=True)
    tensors[1][:, :, first:, 1] = bad
    tensors[2][:, :, first:, 2] = bad
    found = everything(tensors, is_causal=True)
    past = slice(0, first - shift)
    for name in ("out", "d_query"):
        assert same_bits(found[name][:, :, past], expected[name][:, :, past]), name
    if bad != -math.inf:  # whose phi is 0: only the values are spoilt
        assert not found["out"][:, :, -1].isfinite().any()
    assert not found["out"][:, :, -1, 2].isfinite().any()


@pytest.mark.parametrize("bad", BAD)
@sizes
@causal
def test_a_bad_value_reaches_every_row_that_sees_it(isa, size, is_causal, bad, dtype):
    """However many chunks later, in its feature alone; and the state."""
    q_len, k_len = SIZES[size]
    tensors = qkv(q_len, k_len, dtype=dtype)
    expected, kept = linear_attention(*tensors, is_causal, return_state=True)
    key, shift = 2, k_len - q_len
    tensors[2][:, :, key, 5] = bad
    out, state = linear_attention(*tensors, is_causal, return_state=True)
    seen = torch.ones(q_len, dtype=torch.bool) if not is_causal else torch.arange(q_len) + shift >= key
    assert seen.any() and not out[:, :, seen, 5].isfinite().any()
    assert not state.S[..., 5].isfinite().any()
    assert same_bits(out[:, :, ~seen], expected[:, :, ~seen])
    clean = torch.arange(tensors[2].shape[-1]) != 5
    assert same_bits(out[..., clean], expected[..., clean])
    assert same_bits(state.S[..., clean], kept.S[..., clean]) and same_bits(state.z, kept.z)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("size", ["one chunk", "segments"])
def test_a_bad_query_spoils_its_own_row_alone(isa, size, bad, dtype):
    q_len, k_len = SIZES[size]
    tensors = qkv(q_len, k_len, dtype=dtype)
    row = q_len - 5
    expected = everything(tensors, is_causal=True)
    tensors[0][0, 1, row] = bad
    found = everything(tensors, is_causal=True)
    others = torch.ones(2, 4, q_len, dtype=torch.bool)
    others[0, 1, row] = False
    for name in ("out", "d_query"):
        assert same_bits(found[name][others], expected[name][others]), name
    assert not found["out"][0, 1, row].isfinite().any()
    later = row + k_len - q_len + 1  # keys that the row does not see
    for name in ("d_key", "d_value"):
        assert same_bits(found[name][:, :, later:], expected[name][:, :, later:]), name
        assert same_bits(found[name][1], expected[name][1]) and same_bits(found[name][0, 1], expected[name][0, 1]), name


@causal
def test_a_query_that_sees_nothing_has_no_influence(isa, is_causal, dtype):
    tensors = qkv(40, 45, dtype=dtype)
    key_mask = torch.ones(2, 45, dtype=torch.bool)
    key_mask[0] = False
    expected = everything(tensors, key_mask=key_mask, is_causal=is_causal)
    tensors[0][0] = NAN
    assert_same_bits(everything(tensors, key_mask=key_mask, is_causal=is_causal), expected)


@pytest.mark.parametrize("bad", BAD)
def test_a_row_without_weight_passes_no_gradient_on(isa, bad, dtype):
    """phi of -2000 is 0: the row is 0 whatever the values are, and what arrives for it changes nothing."""
    tensors = [t.requires_grad_() for t in qkv(40, 45, dtype=dtype)]
    tensors[1].data[0].fill_(-2000)
    out = linear_attention(*tensors)
    assert (out[0] == 0).all() and (out[1] != 0).any()
    grad = randn(*out.shape, seed=4, dtype=dtype)
    grad[0, :, 3] = bad
    for gradient in torch.autograd.grad(out, tensors, grad)[1:]:
        assert (gradient[0] == 0).all() and gradient[1].isfinite().all() and (gradient[1] != 0).any()


def test_keys_without_rows_have_no_gradient(isa, dtype):
    tensors = qkv(0, 60, dtype=dtype)
    for t in tensors[1:]:
        t[:, :, 50:] = NAN
    found = everything(tensors, keep=False)
    assert (found["d_key"] == 0).all() and (found["d_value"] == 0).all()


@pytest.mark.parametrize("bad", BAD)
def test_packed_sequences_do_not_see_each_other(isa, bad, dtype):
    offsets = torch.tensor([0, 30, 30, 95])
    packed = [t.transpose(1, 2)[0] for t in qkv(100, 100, batch=1, dtype=dtype)]
    kwargs = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "is_causal": True}
    expected = everything(packed, **kwargs)
    for t in packed:
        t[:30] = bad
        t[95:] = bad
    found = everything(packed, **kwargs)
    for name in ("out", "d_query", "d_key", "d_value"):
        assert same_bits(found[name][30:], expected[name][30:]), name
        assert (found[name][95:] == 0).all(), name
    assert same_bits(found["state_S"][1:], expected["state_S"][1:])


@sizes
def test_features_that_underflow_or_are_huge(isa, size, dtype):
    """phi of a query may be scaled; a row whose weights all underflow is 0, never NaN."""
    q_len, k_len = SIZES[size]
    query, key, value = qkv(q_len, k_len, dtype=dtype)
    plain = linear_attention(query, key, value, True)
    low = linear_attention(query - 300, key, value, True)
    assert low.isfinite().all() and (low[:, :, -1] != 0).any()
    exact = functional.linear_attention((query - 300).double(), key.double(), value.double(), True)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(low.double(), exact, rtol=16 * eps, atol=16 * eps)
    if dtype != torch.float16:
        for factor in (1e30, torch.finfo(dtype).max / (4 * query.abs().max().item())):
            high = linear_attention(query * factor, key, value, True)
            assert high.isfinite().all() and (high[:, :, -1] != 0).any()
    assert (linear_attention(query, key - 2000, value, True) == 0).all()
    assert all(t.isfinite().all() for t in everything([query, key - 2000, value], is_causal=True).values())
    assert plain.isfinite().all()


# ---------------------------------------------------------------- layouts and limits


LAYOUTS = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "heads inside rows": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced": lambda t: torch.stack((t, torch.full_like(t, NAN)), -1)[..., 0],
    "offset": lambda t: torch.cat((torch.full((3,), NAN, dtype=t.dtype), t.flatten()))[3:].view(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@sizes
def test_every_layout_gives_the_bits_of_the_contiguous_one(isa, size, layout, dtype):
    tensors = qkv(*SIZES[size], dtype=dtype)
    state = state_for(tensors)
    key_mask = rand(2, SIZES[size][1], seed=8) < 0.8
    kwargs = {"is_causal": True, "key_mask": key_mask}
    expected = everything(tensors, state, **kwargs)
    lay = LAYOUTS[layout]
    strided = torch.stack((~key_mask, key_mask), -1)[..., 1]
    other = everything(
        [lay(t) for t in tensors], (lay(state[0]), state[1].mT.contiguous().mT), is_causal=True, key_mask=strided
    )
    assert_same_bits(other, expected)


def test_expanded_tensors(isa, dtype):
    query, key, value = qkv(40, 45, dtype=dtype)
    narrow = [query[:, :1], key[:, :, :1], value[..., :1]]
    shapes = [query.shape, key.shape, value.shape]
    wide = [t.expand(s) for t, s in zip(narrow, shapes, strict=True)]
    assert_same_bits(everything(wide, is_causal=True), everything([t.contiguous() for t in wide], is_causal=True))


@pytest.mark.parametrize("which", ["batch", "head", "row"])
def test_offsets_beyond_32_bits(which, dtype):
    far = 2**31 + 8
    strides = {"batch": (far, 16, 4, 1), "head": (16, far, 4, 1), "row": (16, 4, far, 1)}[which]
    plain = [randn(2, 2, 3, 4, seed=seed, dtype=dtype) for seed in (1, 2, 3)]

    def distant(tensor):
        size = sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True)) + 1
        try:
            memory = torch.empty(size, dtype=tensor.dtype)
        except RuntimeError:
            pytest.skip(f"this machine does not hand out {size * tensor.element_size() >> 30} GiB of untouched memory")
        return memory.as_strided(tensor.shape, strides).copy_(tensor)

    expected = everything(plain, is_causal=True)
    for i in range(3):
        assert_same_bits(
            everything([distant(t) if i == j else t for j, t in enumerate(plain)], is_causal=True), expected
        )


@causal
@pytest.mark.parametrize("empty", ["batch", "q_len", "k_len", "both"])
@pytest.mark.parametrize("with_state", [False, True])
def test_empty_dimensions(isa, empty, is_causal, with_state, dtype):
    shape = {"batch": (5, 6, 0), "q_len": (0, 6, 2), "k_len": (5, 0, 2), "both": (0, 0, 2)}[empty]
    tensors = qkv(*shape, dtype=dtype)
    found = everything(tensors, state_for(tensors) if with_state else None, is_causal=is_causal)
    assert found["out"].shape == (*tensors[0].shape[:3], 12)
    assert all(t.isfinite().all() for t in found.values())
    assert with_state or (found["out"] == 0).all()


@pytest.mark.parametrize("offsets", [[0], [0, 0], [0, 0, 5, 5], [0, 3]], ids=str)
def test_packed_sequences_of_nothing(isa, offsets, dtype):
    packed = [t.transpose(1, 2)[0] for t in qkv(5, 5, batch=1, dtype=dtype)]
    offsets = torch.tensor(offsets)
    found = everything(packed, cu_seqlens_q=offsets, cu_seqlens_k=offsets, is_causal=True)
    assert found["state_S"].shape == (len(offsets) - 1, 2, 8, 12)
    for name in ("out", "d_query", "d_key", "d_value"):
        assert found[name].isfinite().all() and (found[name][int(offsets[-1]) :] == 0).all()


@pytest.mark.parametrize("batch, heads", [(65_536, 1), (1, 65_536), (2, 40_000)])
def test_many_heads(isa, batch, heads, dtype):
    tensors = [randn(batch, heads, 2, 1, seed=seed, dtype=dtype) for seed in (1, 2, 3)]
    out = linear_attention(*tensors, True)
    assert torch.equal(out[:, :, 0].isfinite(), torch.ones(batch, heads, 1, dtype=torch.bool))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out[:, :, 0], tensors[2][:, :, 0], rtol=4 * eps, atol=4 * eps)  # one key: its value


@pytest.mark.parametrize("start", range(4))
def test_every_head_dim(isa, start, dtype):
    """Random problems whose head_dims are set by hand."""
    for dim in range(1 + start, 257, 4):
        leaves = [randn(1, 2, 3, dim, seed=dim, dtype=dtype), randn(1, 1, 5, dim, seed=1, dtype=dtype)]
        leaves += [randn(1, 1, 5, 257 - dim, seed=2, dtype=dtype)]
        found, exact = everything(leaves, is_causal=True), everything([t.double() for t in leaves], is_causal=True)
        tolerance = 16 * torch.finfo(dtype).eps * (1 if dtype.itemsize == 2 else math.sqrt(dim))
        for name, t in found.items():
            size = max(1.0, float(exact[name].abs().max()))
            torch.testing.assert_close(t.double(), exact[name], rtol=0, atol=tolerance * size, msg=f"{name} {dim}")


# ---------------------------------------------------------------- arguments


def dense(**changes):
    query, key, value = qkv(3, 5)
    return {"query": query, "key": key, "value": value, **changes}


def packed(**changes):
    offsets = torch.tensor([0, 2, 5])
    tensors = {name: t.transpose(1, 2)[0] for name, t in dense().items()}
    return {**tensors, "cu_seqlens_q": torch.tensor([0, 1, 3]), "cu_seqlens_k": offsets, **changes}


STATE = state_for(qkv(3, 5))
WRONG = {
    "rank": (ValueError, r"query must be 4-D", dense(query=torch.zeros(3, 8))),
    "heads": (ValueError, r"multiple of the key/value heads, got 3 and 2", dense(query=torch.zeros(2, 3, 3, 8))),
    "batch": (ValueError, r"share the batch size", dense(query=torch.zeros(3, 4, 3, 8))),
    "head_dim": (ValueError, r"head_dim 9", dense(query=torch.zeros(2, 4, 3, 9))),
    "huge head_dim": (ValueError, r"must be 1\.\.256, got 257", dense(value=torch.zeros(2, 2, 5, 257))),
    "length": (ValueError, r"value must have the key's heads and length", dense(value=torch.zeros(2, 2, 4, 8))),
    "dtype": (TypeError, r"share one dtype", dense(key=torch.zeros(2, 2, 5, 8).double())),
    "integers": (TypeError, r"floating-point", {n: t.long() for n, t in dense().items()}),
    "no tensor": (TypeError, r"query must be a tensor, got list", dense(query=[1])),
    "None": (TypeError, r"value must be a tensor, got NoneType", dense(value=None)),
    "key_mask shape": (ValueError, r"key_mask must have shape \(B, Lk\)", dense(key_mask=torch.ones(2, 4) > 0)),
    "key_mask dtype": (TypeError, r"key_mask must be a bool tensor", dense(key_mask=torch.ones(2, 5))),
    "packed key_mask": (ValueError, r"key_mask must have shape \(Tk,\)", packed(key_mask=torch.ones(1, 5) > 0)),
    "packed key_mask dtype": (TypeError, r"key_mask must be a bool tensor", packed(key_mask=torch.ones(5))),
    "one offset list": (ValueError, r"go together", packed(cu_seqlens_k=None)),
    "falling offsets": (ValueError, r"must not decrease", packed(cu_seqlens_k=torch.tensor([0, 3, 2]))),
    "offsets too far": (ValueError, r"must end at most", packed(cu_seqlens_k=torch.tensor([0, 3, 6]))),
    "state kind": (TypeError, r"state must be a LinearState\(S, z\), got Tensor", dense(state=torch.zeros(2))),
    "state parts": (TypeError, r"state must be a LinearState", dense(state=(STATE[0], None))),
    "state shape": (ValueError, r"state must be LinearState\(S, z\) of shapes", dense(state=(STATE[0][:1], STATE[1]))),
    "state of a batch": (ValueError, r"of shapes \[2, 2, 8, 12\]", packed(state=(STATE[0][:1], STATE[1][:1]))),
    "state dtype": (TypeError, r"state must be float64 or float32", dense(state=tuple(t.half() for t in STATE))),
    "device": (ValueError, r"must be on", dense(key=torch.zeros(2, 2, 5, 8, device="meta"))),
    "state device": (ValueError, r"must be on", dense(state=tuple(t.to("meta") for t in STATE))),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_one_clear_error(name):
    error, message, arguments = WRONG[name]
    with refused(error, message, "" if message.startswith("state must be a LinearState") else "mmca_ext"):
        linear_attention(**arguments)


@pytest.mark.parametrize("name", WRONG)
def test_the_reference_refuses_them_too(name):
    error, _, arguments = WRONG[name]
    if name in ("huge head_dim", "no tensor", "None", "device", "state device"):
        return  # it has no such limit; PyTorch says the others itself
    with pytest.raises(error):
        reference.linear_attention(**arguments)


@pytest.mark.parametrize("what", ["shape", "dtype", "state", "half a state"])
def test_gradients_given_to_the_backward(what):
    arguments = dense()
    grad_out, grad_S, grad_z = torch.zeros(2, 4, 3, 12), STATE[0], STATE[1]
    if what == "shape":
        grad_out = grad_out[:, :, :2]
    elif what == "dtype":
        grad_out = grad_out.double()
    elif what == "state":
        grad_S = grad_S[..., :3]
    else:
        grad_z = None
    with refused((TypeError if what == "dtype" else ValueError), r"grad", "mmca_ext.linear_attention"):
        _C.linear_backward(grad_out, grad_S, grad_z, *arguments.values())


@pytest.mark.parametrize("which", range(5))
def test_modified_saved_tensors_are_noticed(which, dtype):
    tensors = [t.requires_grad_() for t in (*qkv(3, 5, dtype=dtype), *state_for(qkv(3, 5)))]
    used = [t * 1.0 for t in tensors]
    out = linear_attention(*used[:3], state=LinearState(*used[3:]))
    used[which].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_several_python_threads_train_at_once(dtype):
    """Each its own problem, forward and backward, kernels on two threads each: scratch is nobody else's."""
    torch.set_num_threads(2)  # which the fixture of this folder takes back
    problems = [qkv(n, n, batch=1, heads=2, kv_heads=1, dtype=dtype) for n in (100, 1700, 3200, 4000)]
    expected, failures = [everything(p, is_causal=True) for p in problems], []

    def work(index):
        try:
            for _ in range(5):
                found = everything(problems[index], is_causal=True)
                failures.extend((index, name) for name in different(found, expected[index]))
        except Exception as error:
            failures.append((index, error))

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(problems))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert not any(worker.is_alive() for worker in workers), "a thread hangs"
    assert not failures, failures
