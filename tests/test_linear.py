"""Linear attention: the kernels against the reference in fp64, streams, long sequences, memory, PyTorch around it."""

import contextlib
import math
import os
from pathlib import Path

import devices
import linear_cases
import pytest
import torch
from linear_cases import LinearCase, check, run_kernels
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from mmca_ext import functional, reference
from mmca_ext.functional import LinearState, linear_attention

ops = torch.ops.mmca_ext
FORWARD, BACKWARD = ops.linear_attention.default, ops.linear_attention_backward.default
DOUBLE_BACKWARD = ops.linear_attention_double_backward.default
CASES, BATCH = 4_000, 100
FUZZ_BATCH = 1_000
FUZZ_CASES = int(os.environ.get("MMCA_EXT_FUZZ_CASES", 0))
f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (f32, f64, bf16, f16)
# How many tokens are many: so that an emulated GPU is done with them in seconds.
MANY = 100_000 if devices.current != "emulated" else 10_000
cpu_only = pytest.mark.skipif(devices.current != "cpu", reason="of the CPU's threads and memory")


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors of a few elements: threads would only wait for each other. Some tests ask for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randn(*shape, seed=0, dtype=f64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=f64).to(dtype)


def qkv(batch=2, heads=4, kv_heads=2, q_len=5, k_len=7, dim=3, value_dim=4, dtype=f64, rows=False):
    shapes = (heads, q_len, dim), (kv_heads, k_len, dim), (kv_heads, k_len, value_dim)
    if batch is None:
        return [randn(n, h, d, seed=i, dtype=dtype) for i, (h, n, d) in enumerate(shapes)]
    tensors = [randn(batch, *shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    return [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors] if rows else tensors


def state_of(batch=2, kv_heads=2, dim=3, value_dim=4, dtype=f64):
    S, z = randn(batch, kv_heads, dim, value_dim, seed=8), randn(batch, kv_heads, dim, seed=9).abs() + 0.5
    return LinearState(S.to(dtype), z.to(dtype))


# ---------------------------------------------------------------- random problems


def check_all(seeds):
    failures = []
    for seed in seeds:
        try:
            check(LinearCase(seed))
        except AssertionError as failure:
            failures.append(str(failure))
    assert not failures, f"{len(failures)} of {len(seeds)} cases:\n\n" + "\n\n".join(failures[:5])


@pytest.mark.parametrize("first", range(0, CASES, BATCH))
def test_kernels_are_the_reference(first):
    check_all(range(first, first + BATCH))


@pytest.mark.fuzz
@pytest.mark.skipif(not FUZZ_CASES, reason="MMCA_EXT_FUZZ_CASES is not set; make fuzz sets it")
@pytest.mark.parametrize("first", range(CASES, CASES + max(FUZZ_CASES, 1), FUZZ_BATCH))
def test_fuzz(first):
    check_all(range(first, min(first + FUZZ_BATCH, CASES + FUZZ_CASES)))


@pytest.mark.parametrize("name", ["out", "S", "z", "dq", "dk", "dv", "dS", "dz"])
def test_the_check_can_fail(monkeypatch, name):
    """One result a hundredth off is found, and the message says where and how to repeat it."""

    def ordinary(case):
        if case.dtype != f32 or case.magnitude != 1.0:
            return False
        result = run_kernels(case).get(name)
        return result is not None and result.abs().sum() > 1e-3

    case = next(case for case in map(LinearCase, range(2000)) if ordinary(case))
    check(case)

    def a_little_off(case):
        results = run_kernels(case)
        results[name] *= 1.01
        return results

    monkeypatch.setattr(linear_cases, "run_kernels", a_little_off)
    repeat = rf"repeat: python tests/linear_cases.py {case.seed} "
    with pytest.raises(AssertionError, match=rf"{name} is .* times its bound off at .*\n(.*\n)*{repeat}"):
        check(case)


# ---------------------------------------------------------------- gradients

OFFSETS = torch.tensor([0, 2, 2, 5]), torch.tensor([0, 4, 4, 6])
KEY_MASK = torch.tensor([[True] * 5 + [False] * 2, [False, True] * 3 + [True]])
PROBLEMS = {
    "plain": {},
    "causal": {"is_causal": True},
    "masked": {"is_causal": True, "key_mask": KEY_MASK},
    "state": {"is_causal": True, "state": state_of()},
    "all": {"key_mask": KEY_MASK, "state": state_of()},
    "packed": {"cu_seqlens_q": OFFSETS[0], "cu_seqlens_k": OFFSETS[1], "state": state_of(3)},
    "packed causal": {
        "cu_seqlens_q": OFFSETS[0],
        "cu_seqlens_k": OFFSETS[1],
        "is_causal": True,
        "key_mask": KEY_MASK[1],
    },
}


def problem(name, dtype=f64, rows=False, requires_grad=True, **shape):
    """query, key, value and keywords; the state, if any, as S and z."""
    kwargs = dict(PROBLEMS[name])
    packed = "cu_seqlens_q" in kwargs
    tensors = qkv(None if packed else 2, dtype=dtype, rows=rows, **shape)
    state = kwargs.pop("state", None)
    leaves = [t.clone().requires_grad_(requires_grad) for t in (*tensors, *(state or ()))]
    return leaves, kwargs


def call(leaves, kwargs, function=linear_attention):
    """(out, S, z)"""
    state = LinearState(*leaves[3:]) if len(leaves) > 3 else None
    out, (S, z) = function(*leaves[:3], state=state, return_state=True, **kwargs)
    return out, S, z


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradcheck(name):
    leaves, kwargs = problem(name)
    assert torch.autograd.gradcheck(lambda *leaves: call(leaves, kwargs), leaves)
    only_out = lambda *leaves: call(leaves, kwargs)[0]  # noqa: E731
    assert torch.autograd.gradcheck(only_out, leaves)


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradgradcheck(name):
    leaves, kwargs = (
        problem(name, q_len=5, k_len=7, dim=2, value_dim=2) if "state" not in PROBLEMS[name] else (problem(name))
    )
    assert torch.autograd.gradgradcheck(lambda *leaves: call(leaves, kwargs), leaves)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("only", range(5))
def test_only_what_needs_a_gradient_gets_one(name, only):
    leaves, kwargs = problem(name)
    if only >= len(leaves):
        return
    expected = torch.autograd.grad(sum(r.sin().sum() for r in call(leaves, kwargs)), leaves)[only]
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i == only)
    sum(r.sin().sum() for r in call(leaves, kwargs)).backward()
    assert torch.equal(leaves[only].grad, expected)
    assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i != only)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_gradients_that_never_arrive_are_zero(used):
    leaves, kwargs = problem("state")
    results = call(leaves, kwargs)
    found = torch.autograd.grad(sum(results[i].sin().sum() for i in used), leaves, allow_unused=True)
    results = call(leaves, kwargs, reference.linear_attention)
    expected = torch.autograd.grad(sum(results[i].sin().sum() for i in used), leaves, allow_unused=True)
    for a, b, leaf in zip(found, expected, leaves, strict=True):
        torch.testing.assert_close(
            torch.zeros_like(leaf) if a is None else a, torch.zeros_like(leaf) if b is None else b
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state_dtype", [f32, f64])
def test_dtypes_of_states_and_their_gradients(dtype, state_dtype):
    leaves = [t.requires_grad_() for t in (*qkv(dtype=dtype), *state_of(dtype=state_dtype))]
    out, S, z = call(leaves, {"is_causal": True})
    assert out.dtype == dtype and S.dtype == z.dtype == f64
    gradients = torch.autograd.grad((out.float().sum(), S.sum()), leaves)
    assert [g.dtype for g in gradients] == [t.dtype for t in leaves]
    assert [g.shape for g in gradients] == [t.shape for t in leaves]


# ---------------------------------------------------------------- streams: the state in place of a KV cache


def close(actual, expected, terms, dtype):
    """Both are averages of numbers of size 1 (or sums of `terms` of them): two errors of sqrt(terms) roundings."""
    tolerance = 2 * torch.finfo(dtype).eps * (8 + math.sqrt(terms))
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[1] * 130, [100, 30], [0, 1, 47, 0, 48, 34], [129, 1]], ids=str)
def test_a_stream_is_one_call(lengths, dtype):
    total = sum(lengths)
    query, key, value = qkv(q_len=total, k_len=total, dim=16, value_dim=9, dtype=dtype)
    whole, end = linear_attention(query, key, value, True, return_state=True)
    state, parts = None, []
    for q, k, v in zip(*(t.split(lengths, 2) for t in (query, key, value)), strict=True):
        out, state = linear_attention(q, k, v, True, state=state, return_state=True)
        parts.append(out)
    close(torch.cat(parts, 2), whole, total, dtype)
    work = f64 if dtype == f64 else f32
    close(state.S, end.S, total, work)
    close(state.z, end.z, total, work)


def test_streams_of_packed_sequences():
    """Each sequence goes on from its own state."""
    q, k, v = qkv(None, q_len=12, k_len=12, dim=8)
    first, second = torch.tensor([0, 3, 3, 5]), torch.tensor([0, 1, 5, 7])
    out, state = linear_attention(q[:5], k[:5], v[:5], True, cu_seqlens_q=first, cu_seqlens_k=first, return_state=True)
    more = linear_attention(q[5:], k[5:], v[5:], True, cu_seqlens_q=second, cu_seqlens_k=second, state=state)
    together = torch.tensor([*range(3), 5, *range(6, 10), *range(3, 5), *range(10, 12)])
    offsets = torch.tensor([0, 4, 8, 12])
    expected = linear_attention(*(t[together] for t in (q, k, v)), True, cu_seqlens_q=offsets, cu_seqlens_k=offsets)
    torch.testing.assert_close(torch.cat((out, more))[together], expected)


def test_states_of_parts_add_up():
    query, key, value = qkv(q_len=20, k_len=20, dim=8)
    a, b = (
        linear_attention(query[:, :, :0], key[:, :, c], value[:, :, c], return_state=True)[1]
        for c in (slice(0, 13), slice(13, 20))
    )
    none = key[:, :, :0], value[:, :, :0]
    out = linear_attention(query, *none, state=LinearState(a.S + b.S, a.z + b.z))
    torch.testing.assert_close(out, linear_attention(query, key, value))


def test_gradients_flow_through_the_states_of_a_stream():
    """Backpropagation through time gives what one call gives."""
    leaves = [t.requires_grad_() for t in qkv(q_len=70, k_len=70, dim=5)]
    grad = randn(2, 4, 70, 4, seed=5)
    expected = torch.autograd.grad(linear_attention(*leaves, True), leaves, grad)
    state, parts = None, []
    for q, k, v in zip(*(t.split(9, 2) for t in leaves), strict=True):
        out, state = linear_attention(q, k, v, True, state=state, return_state=True)
        parts.append(out)
    torch.testing.assert_close(torch.autograd.grad(torch.cat(parts, 2), leaves, grad), expected)


# ---------------------------------------------------------------- long sequences


def exact_by_blocks(query, key, value, block=1024):
    """Causal linear attention in fp64, written apart from everything else here."""
    phi = lambda x: torch.where(x > 0, x + 1, x.exp())  # noqa: E731
    query, key, value = phi(query.double()), phi(key.double()), value.double()
    S, z, parts = 0.0, 0.0, []
    for q, k, v in zip(*(t.split(block, 2) for t in (query, key, value)), strict=True):
        weights = (q @ k.mT).tril()
        parts.append(
            (weights @ v + q @ (S + torch.zeros_like(k.mT @ v)))
            / (weights.sum(-1, keepdim=True) + (q * z).sum(-1, keepdim=True))
        )
        S, z = S + k.mT @ v, z + k.sum(2, keepdim=True)
    return torch.cat(parts, 2), S, z[:, :, 0]


@pytest.fixture(scope="module")
def long():
    """Tokens whose values have a mean: the sums grow all along, and no errors cancel."""
    query, key = (randn(1, 1, MANY, 16, seed=seed, dtype=f32) for seed in (0, 1))
    value = randn(1, 1, MANY, 16, seed=2, dtype=f32) + 1.0
    return (query, key, value), exact_by_blocks(query, key, value)


def rms(t):
    return float(t.double().square().mean().sqrt())


@pytest.mark.parametrize("isa", linear_cases.ISAS)
def test_errors_do_not_grow_with_the_position(long, isa):
    tensors, (exact, S, z) = long
    with forced(isa):
        out, state = linear_attention(*tensors, True, return_state=True)
    errors = [rms(e) for e in (out - exact).split(MANY // 10, 2)]
    # The first tenth is where the sums are shortest; their rounding is that of one number at every position.
    assert max(errors[1:]) < 1.5 * errors[0], errors
    assert max(errors) < 2 * torch.finfo(f32).eps, errors
    assert rms(state.S - S) < 2 * torch.finfo(f32).eps * rms(S)
    assert rms(state.z - z) < 2 * torch.finfo(f32).eps * rms(z)


def test_errors_of_a_token_by_token_stream_do_not_grow(long):
    tensors, (exact, _, _) = long
    with torch.no_grad():
        first = MANY - MANY // 10
        _, state = linear_attention(*(t[:, :, :first] for t in tensors), True, return_state=True)
        parts = []
        for i in range(first, MANY):
            out, state = linear_attention(*(t[:, :, i : i + 1] for t in tensors), True, state=state, return_state=True)
            parts.append(out)
    errors = [rms(e) for e in (torch.cat(parts, 2) - exact[:, :, first:]).split(MANY // 100, 2)]
    assert max(errors) < 2 * torch.finfo(f32).eps, errors
    assert errors[-1] < 1.5 * errors[0], errors


def test_errors_of_gradients_do_not_grow_with_the_position():
    """By the kernels in fp64, which other tests hold to the reference."""
    length = MANY * 6 // 10
    tensors = [randn(1, 1, length, 8, seed=seed, dtype=f32) for seed in (0, 1, 2)]
    tensors[2] += 1.0
    grad = randn(1, 1, length, 8, seed=3, dtype=f32)
    found = []
    for dtype in (f32, f64):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        found.append(torch.autograd.grad(linear_attention(*leaves, True), leaves, grad.to(dtype)))
    for name, actual, exact in zip(("dq", "dk", "dv"), *found, strict=True):
        errors = [rms(e) for e in (actual - exact).split(length // 10, 2)]
        assert max(errors) < 1.1 * errors[0] < 0.5 * torch.finfo(f32).eps, (name, errors)


def resident(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(what))


@cpu_only
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak resident size from /proc")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_million_tokens_in_bounded_memory(threads):
    """Besides the result nothing grows with the length: the peak is that of the tensors and 48 MiB, most of which are
    the states of segments that threads share."""
    torch.set_num_threads(threads)
    length, dim = 2**20, 16
    query, key, value = (randn(1, 1, 1, dim, seed=seed, dtype=f32).repeat(1, 1, length, 1) for seed in (0, 1, 2))
    value += torch.linspace(0, 1, length)[:, None]
    linear_attention(*(t[:, :, :5000] for t in (query, key, value)), True)  # threads and their memory are there
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    out = linear_attention(query, key, value, True)
    grown = resident("VmHWM") - before
    assert out.numel() * 4 <= grown + 2**20 < out.numel() * 4 + (48 << 20), f"grew by {grown >> 20} MiB"
    # All keys are equal, so every row is the mean of the values so far.
    row = torch.tensor([0, 1, 1000, 2**19, length - 1])
    expected = value[0, 0, 0].double() + row[:, None] / 2 / (length - 1)
    torch.testing.assert_close(out[0, 0, row].double(), expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- the same bits


@contextlib.contextmanager
def forced(isa):
    before = linear_cases._C.forced_isa()
    linear_cases._C.force_isa(isa)
    try:
        yield
    finally:
        linear_cases._C.force_isa(before)


def everything(tensors, **kwargs):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out, (S, z) = linear_attention(*leaves, return_state=True, **kwargs)
    return [out, S, z, *torch.autograd.grad((out.sin().sum(), S.cos().sum(), z.sum()), leaves)]


@cpu_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 5000), (3, 6, 2, 97), (1, 4, 2, 3100)], ids=str)
@pytest.mark.parametrize("is_causal", [True, False])
def test_threads_do_not_change_a_bit(shape, is_causal, dtype):
    batch, heads, kv_heads, length = shape
    tensors = qkv(batch, heads, kv_heads, length, length, 16, 9, dtype=dtype)
    results = []
    for count in (1, 2, 3, 7, 1):
        torch.set_num_threads(count)
        results.append(everything(tensors, is_causal=is_causal))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_do_not_change_a_bit(dtype):
    tensors = qkv(3, 4, 2, 100, 100, 16, 9, dtype=dtype)
    together = everything(tensors, is_causal=True)
    for b in range(3):
        alone = everything([t[b : b + 1] for t in tensors], is_causal=True)
        for a, t in zip(alone, together, strict=True):
            assert torch.equal(a[0], t[b])
    packed = [t.transpose(1, 2).flatten(0, 1) for t in tensors]
    offsets = torch.tensor([0, 100, 200, 300])
    out = linear_attention(*packed, True, cu_seqlens_q=offsets, cu_seqlens_k=offsets)
    assert torch.equal(out.view(3, 100, 4, 9).transpose(1, 2), together[0])


# ---------------------------------------------------------------- as a citizen of PyTorch


def raw(name, dtype=f32, rows=False, requires_grad=False, return_state=True):
    """The operator's arguments in the order of its schema."""
    leaves, kwargs = problem(name, dtype, rows, requires_grad)
    state = leaves[3:] or (None, None)
    rest = [kwargs.get(key) for key in ("key_mask", "cu_seqlens_q", "cu_seqlens_k")]
    return (*leaves[:3], *state, *rest, return_state, kwargs.get("is_causal", False))


def raw_backward(name, dtype=f32, rows=False, requires_grad=False, with_state=True):
    args = raw(name, dtype, rows)
    with torch.no_grad():
        out, S, z = FORWARD(*args)
    arriving = [torch.ones_like(t) for t in (out, S, z)]
    args = raw(name, dtype, rows, requires_grad)
    if not with_state:
        arriving[1:] = None, None
    return (*arriving, *args[:8], args[9])


QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")
TRACED = (*QUICK, "test_aot_dispatch_dynamic")
KINDS = [(f32, False), (f64, True), (bf16, True)]


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("return_state", [False, True])
def test_opcheck(name, requires_grad, return_state):
    args = raw(name, requires_grad=requires_grad, return_state=return_state)
    torch.library.opcheck(FORWARD, args, test_utils=QUICK)
    args = raw_backward(name, requires_grad=requires_grad, with_state=return_state)
    torch.library.opcheck(BACKWARD, args, test_utils=QUICK)
    grads = [torch.ones_like(t) if t is not None else None for t in args[3:8]]
    torch.library.opcheck(DOUBLE_BACKWARD, (grads, *args), test_utils=QUICK)


@pytest.mark.parametrize("dtype, rows", KINDS)
@pytest.mark.parametrize("name", ["masked", "all", "packed"])
def test_opcheck_traced(name, dtype, rows):
    torch.library.opcheck(FORWARD, raw(name, dtype, rows, True), test_utils=TRACED)
    torch.library.opcheck(BACKWARD, raw_backward(name, dtype, rows), test_utils=TRACED)


@pytest.mark.parametrize("dtype, rows", KINDS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_fake_results_are_like_real_ones(name, dtype, rows):
    for op, args in ((FORWARD, raw(name, dtype, rows)), (BACKWARD, raw_backward(name, dtype, rows))):
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
        for real, other in zip(op(*args), fake, strict=True):
            assert (real.shape, real.dtype, real.stride()) == (other.shape, other.dtype, other.stride())


def stepwise(query, key, value, mask):
    out, state = linear_attention(query, key, value, True, key_mask=mask, return_state=True)
    more = linear_attention(query, key, value, state=state)
    return out + more


def tensors_of(length, dtype=f32):
    tensors = qkv(3, 4, 2, 6, length, 8, 5, dtype=dtype)
    return (*(t.requires_grad_() for t in tensors), torch.arange(length).expand(3, length) != 2)


def results_and_gradients(function, args):
    out = function(*args)
    return out, torch.autograd.grad(out.sin().sum(), args[:3])


@pytest.fixture
def fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [f32, bf16])
def test_one_graph_for_all_lengths(fresh, dtype):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(stepwise, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for length in (9, 12, 17, 31):
        args = tensors_of(length, dtype)
        torch.testing.assert_close(results_and_gradients(compiled, args), results_and_gradients(stepwise, args))
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 4


@pytest.mark.slow
def test_inductor(fresh):
    compiled = torch.compile(stepwise, fullgraph=True, backend="inductor")
    args = tensors_of(9)
    torch.testing.assert_close(results_and_gradients(compiled, args), results_and_gradients(stepwise, args))


@pytest.mark.parametrize("strict", [False, True])
def test_export(fresh, strict):
    class Block(torch.nn.Module):
        def forward(self, *args):
            return stepwise(*args)

    def args(length):
        return tuple(t.detach() for t in tensors_of(length))

    length = torch.export.Dim("length", min=7, max=100)
    shapes = ({}, {2: length}, {2: length}, {1: length})
    program = torch.export.export(Block(), args(9), dynamic_shapes=(shapes,), strict=strict)
    assert "mmca_ext.linear_attention.default" in {str(n.target) for n in program.graph.nodes}
    for n in (9, 31):
        assert torch.equal(program.module()(*args(n)), stepwise(*args(n)))


@pytest.mark.parametrize("dtype", [bf16, f16])
@pytest.mark.parametrize("inputs", DTYPES)
def test_autocast(inputs, dtype):
    """Queries, keys and values are cast, float64 and states are not."""
    leaves = [t.requires_grad_() for t in (*qkv(dtype=inputs), *state_of())]
    with torch.autocast("cpu", dtype=dtype):
        results = call(leaves, {"is_causal": True})
        expected = call(leaves, {"is_causal": True}, reference.linear_attention)
    work = inputs if inputs == f64 else dtype
    assert results[0].dtype == expected[0].dtype == work and results[1].dtype == f64
    close(results[0], expected[0], 7, work)
    rounded = work if devices.current != "cpu" else f32  # tensor cores take phi in 16 bits
    for actual, other in zip(results[1:], expected[1:], strict=True):
        close(actual, other, 7, f64 if work == f64 else rounded)
    gradients = torch.autograd.grad(results[0].sum(), leaves)
    assert [g.dtype for g in gradients] == [t.dtype for t in leaves]


def test_vmap():
    leaves, kwargs = problem("state", requires_grad=False)
    stack = torch.stack((leaves[0], leaves[0].flip(1)))
    found = torch.vmap(lambda q: call([q, *leaves[1:]], kwargs)[0])(stack)
    assert torch.equal(found, torch.stack([call([q, *leaves[1:]], kwargs)[0] for q in stack]))


@pytest.mark.parametrize("argument", range(5))
@pytest.mark.parametrize("leaf", [True, False])
def test_forward_mode_is_a_named_error(argument, leaf):
    leaves, kwargs = problem("state", requires_grad=False)
    with forward_ad.dual_level():
        leaves[argument] = forward_ad.make_dual(leaves[argument].requires_grad_(leaf), leaves[argument].detach())
        with pytest.raises(NotImplementedError, match=r"\(jvp\) of linear_attention is not built yet"):
            call(leaves, kwargs)


def test_torch_func_is_a_named_error():
    query, key, value = qkv()
    with pytest.raises(NotImplementedError, match=r"do not reach through linear_attention"):
        torch.func.grad(lambda q: linear_attention(q, key, value).sum())(query)


def test_autograd_functional_serves_where_torch_func_does_not():
    query, key, value = qkv(1, 2, 1, 2, 3, 2, 2)
    found = torch.autograd.functional.hessian(lambda q: linear_attention(q, key, value).square().sum(), query)
    expected = torch.autograd.functional.hessian(
        lambda q: reference.linear_attention(q, key, value).square().sum(), query
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("module", [functional, reference], ids=["functional", "reference"])
def test_without_a_state_none_is_returned(module):
    query, key, value = qkv()
    assert isinstance(module.linear_attention(query, key, value), torch.Tensor)
    state = module.linear_attention(query, key, value, return_state=True)[1]
    assert isinstance(state, LinearState) and state.S.shape == (2, 2, 3, 4) and state.z.shape == (2, 2, 3)
