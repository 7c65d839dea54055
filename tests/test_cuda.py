"""CUDA: what any machine can tell of the kernels' listing and of tensors that they do not serve, and, on a GPU, what
the suites under `pytest --device cuda` cannot see: streams, graphs, waiting, devices, sizes."""

import re

import linear_cases
import pytest
import torch
from cases import Case, check
from linear_cases import LinearCase
from operators import BACKWARD, DIFFERENTIABLE, FORWARD, PROBLEMS, arguments, leaves, problem, refused
from torch._subclasses import FakeTensorMode

from mmca_ext import _C, functional

BUILT = bool(_C.build_info()["cuda"])
KERNELS = [kernel for kernel in _C.kernels() if kernel["device"] == "cuda"]
OPERATIONS = ("attention_forward", "attention_backward", "linear_forward", "linear_backward")
DTYPES = ("f32", "f64", "bf16", "f16")
DTYPES_OF_TORCH = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GPU = torch.cuda.is_available()
on_gpu = pytest.mark.skipif(not (BUILT and GPU), reason="needs a GPU and a build with CUDA kernels")


# ---------------------------------------------------------------- on any machine


def test_the_listing_has_cuda_kernels_if_they_are_built():
    assert bool(KERNELS) == BUILT
    if BUILT:
        assert {(kernel["op"], kernel["dtype"]) for kernel in KERNELS} == {(o, d) for o in OPERATIONS for d in DTYPES}
        assert all(re.fullmatch(rf"cuda\.{k['isa']}\.{k['op']}\.{k['dtype']}", k["name"]) for k in KERNELS)


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_without_a_gpu_the_listing_says_so():
    for kernel in KERNELS:
        assert not kernel["available"] and not kernel["selected"] and kernel["launches"] == 0
        assert kernel["reason"] in ("this torch is built without CUDA", "there is no GPU here")


@on_gpu
def test_one_kernel_serves_each_case():
    for case in ((o, d) for o in OPERATIONS for d in DTYPES):
        (chosen,) = [k for k in KERNELS if (k["op"], k["dtype"]) == case and k["selected"]]
        assert chosen["available"]


@pytest.mark.skipif(BUILT, reason="this build has CUDA kernels")
def test_cuda_tensors_without_cuda_kernels():
    with FakeTensorMode(), refused(RuntimeError, "on cuda:0, but this build of mmca_ext has no CUDA kernels"):
        _C.attention_forward(*(torch.empty(1, 2, 3, 8, device="cuda") for _ in range(3)))
    with (
        FakeTensorMode(),
        refused(RuntimeError, "linear_attention: tensors are on cuda:0, but this build of mmca_ext has"),
    ):
        _C.linear_forward(*(torch.empty(1, 2, 3, 8, device="cuda") for _ in range(3)))


@pytest.mark.parametrize("name", PROBLEMS)
def test_fake_tensors_of_a_gpu(name):
    """What torch.compile sees: results on query's device, and the dropout seed on the CPU is no obstacle."""
    with FakeTensorMode() as mode:
        given = {n: fake(t, mode, n) for n, t in problem(name, requires_grad=()).items()}
        out, lse, lse_low, group_out = FORWARD(*arguments(FORWARD, **given, save_for_backward=True))
        kept = {"out": out, "lse": lse, "lse_low": lse_low, "group_out": group_out}
        gradients = BACKWARD(*arguments(BACKWARD, **given, **kept, grad_out=out, grad_lse=lse))
    assert all(t.device.type == "cuda" for t in (*kept.values(), *gradients))


def fake(value, mode, name):
    if not torch.is_tensor(value):
        return value
    return torch.empty_strided(
        value.shape, value.stride(), dtype=value.dtype, device="cpu" if name == "rng_state" else "cuda"
    )


# ---------------------------------------------------------------- on a GPU


def on(device, given):
    return {n: t.to(device) if torch.is_tensor(t) and n != "rng_state" else t for n, t in given.items()}


def results_of(given):
    """Results and gradients of the raw operators, for arguments whose values the host never looks at."""
    out, lse, lse_low, group_out = FORWARD(*arguments(FORWARD, **given, save_for_backward=True))
    kept = {"out": out, "lse": lse, "lse_low": lse_low, "group_out": group_out}
    arriving = {"grad_out": torch.ones_like(out), "grad_lse": torch.ones_like(lse).masked_fill(lse == -torch.inf, 0.0)}
    gradients = BACKWARD(*arguments(BACKWARD, **given, **kept, **arriving, attn_mask_gradient=True))
    return [out, lse, *gradients]


def assert_close(actual, expected, dtype=torch.float32):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.cpu().double(), b.cpu().double(), rtol=64 * torch.finfo(dtype).eps, atol=2e-4)


@on_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_gpu_gives_what_the_cpu_gives(name):
    """Dropout masks too: the seed is drawn on the CPU, and the mask is a function of it."""
    given = problem(name, dtype=torch.float32, requires_grad=())
    assert_close(results_of(on("cuda", given)), results_of(given))


@on_gpu
@pytest.mark.cuda
def test_one_seed_is_one_mask_on_every_device():
    query, key, value = (torch.randn(2, 4, 70, 16) for _ in range(3))
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(3)
        moved = (t.to(device) for t in (query, key, value))
        results.append(functional.attention(*moved, dropout_p=0.4).cpu())
    assert_close(results[:1], results[1:])


@on_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("first", range(0, 2000, 100))
def test_random_cases(first):
    for seed in range(first, first + 100):
        check(Case(seed, device="cuda"))


@on_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("first", range(0, 1000, 100))
def test_random_cases_of_linear_attention(first):
    for seed in range(first, first + 100):
        linear_cases.check(LinearCase(seed, device="cuda"))


@on_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 600])
def test_linear_attention_over_many_tokens(heads, dtype):
    """Heads in segments, and heads enough to fill the GPU: without waiting, the same bits each time, and none of them
    more exact for being early."""
    generator = torch.Generator("cuda").manual_seed(0)
    tokens = 100_000 if heads == 1 else 3000
    query, key, value = (
        torch.randn(1, heads, tokens, 64, device="cuda", dtype=dtype, generator=generator).requires_grad_()
        for _ in range(3)
    )

    def results():
        out, state = functional.linear_attention(query, key, value + 1, is_causal=True, return_state=True)
        return [out, *state, *torch.autograd.grad(out, (query, key, value), torch.ones_like(out))]

    first = results()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = results()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    leaves = [t.detach().cpu()[:, :2].double() for t in (query, key, value)]
    exact = functional.linear_attention(*leaves[:2], (value.detach().cpu()[:, :2] + 1).double(), is_causal=True)
    errors = (first[0][:, :2].cpu().double() - exact).split(tokens // 10, 2)
    errors = [float(e.square().mean().sqrt()) for e in errors]
    assert max(errors) < 1.5 * errors[0] and errors[0] < 2 * torch.finfo(dtype).eps, errors


@on_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PROBLEMS)
def test_nothing_waits_for_the_gpu(name, dtype):
    given = on("cuda", problem(name, dtype=dtype, requires_grad=()))
    results_of(given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results_of(given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_graph_repeats_the_call_with_new_contents(name):
    given = on("cuda", problem(name, dtype=torch.float32, requires_grad=()))
    others = {n: torch.randn_like(t) for n, t in given.items() if n in ("query", "key", "value")}
    expected = results_of({**given, **others})
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results_of(given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = results_of(given)
    for n, t in others.items():
        given[n].copy_(t)
    graph.replay()
    torch.cuda.synchronize()
    assert_close(results, expected)


@on_gpu
@pytest.mark.cuda
def test_work_goes_to_the_current_stream():
    """Tensors that a slow stream has yet to fill are waited for by that stream and no other."""
    shape = 2, 4, 300, 64
    side, tensors = torch.cuda.Stream(), [torch.zeros(shape, device="cuda") for _ in range(3)]
    filled = [torch.randn(shape, device="cuda") for _ in range(3)]
    expected = functional.attention(*filled)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        for t, values in zip(tensors, filled, strict=True):
            t.copy_(values)
        out = functional.attention(*tensors)
        assert not side.query()  # nothing has waited
    side.synchronize()
    assert torch.equal(out, expected)


@on_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("name", ["bias (5, 7)", "mmca gate and all", "packed and all"])
def test_deterministic_is_the_same_bits(name):
    given = on("cuda", problem(name, dtype=torch.bfloat16, requires_grad=()))
    first = results_of({**given, "deterministic": True})
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, results_of({**given, "deterministic": True}), strict=True))


@on_gpu
@pytest.mark.cuda
def test_deterministic_algorithms_ask_for_the_same():
    query, key, value = (torch.randn(2, 8, 900, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    bias = torch.randn(900, 900, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    query.requires_grad_()

    def gradients():
        out = functional.attention(query, key, value, bias)
        return torch.autograd.grad(out.float().sin().sum(), (query, bias))

    torch.use_deterministic_algorithms(True)
    try:
        first = gradients()
        for _ in range(10):
            assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@on_gpu
@pytest.mark.cuda
def test_autocast():
    query, key, value = (torch.randn(1, 2, 30, 16, device="cuda", requires_grad=True) for _ in range(3))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = functional.attention(query, key, value)
    assert out.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(out.sum(), query)
    assert gradient.dtype == torch.float32 and gradient.abs().sum() > 0


@on_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("name", ["plain", "bias and all", "packed and all", "mmca gate and all"])
def test_compiled(name):
    given = on("cuda", problem(name, dtype=torch.float32))

    def step(given):
        out, lse, _, _ = FORWARD(*arguments(FORWARD, **given))
        return out.sin().sum() + lse.masked_fill(lse == -torch.inf, 0.0).sum()

    inputs = list(leaves(given).values())
    expected = torch.autograd.grad(step(given), inputs)
    actual = torch.autograd.grad(torch.compile(step, fullgraph=True)(given), inputs)
    assert_close(actual, expected)


@on_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("name", ["key", "value", "attn_mask", "key_mask"])
def test_tensors_on_two_devices(name):
    given = {**on("cuda", problem("boolean masks", requires_grad=()))}
    given[name] = given[name].cpu()
    with refused(ValueError, "must be on"):
        FORWARD(*arguments(FORWARD, **given))


@on_gpu
@pytest.mark.cuda
def test_values_are_checked_on_request(monkeypatch):
    """Otherwise nonsense in index tensors touches nothing outside the tensors, and nobody waits to look at it."""
    given = on("cuda", problem("packed", dtype=torch.float32, requires_grad=()))
    given["cu_seqlens_q"] = torch.tensor([0, 5, 2, 10**12], device="cuda")
    ids = on("cuda", problem("mmca self sum", dtype=torch.float32, requires_grad=()))
    ids["modality"] = ids["modality"] - 1
    for arguments_of in (given, ids):
        results_of(arguments_of)
        torch.cuda.synchronize()
    monkeypatch.setenv("MMCA_EXT_VALIDATE", "1")
    with refused(ValueError, "cu_seqlens_q must not decrease, got 2 after 5"):
        FORWARD(*arguments(FORWARD, **given))
    with refused(ValueError, "modality must be 0"):
        FORWARD(*arguments(FORWARD, **ids))


@on_gpu
@pytest.mark.cuda
def test_memory_is_given_back():
    given = on("cuda", problem("mmca gate and all", dtype=torch.float32, requires_grad=DIFFERENTIABLE))

    def step():
        out, lse, _, _ = FORWARD(*arguments(FORWARD, **given))
        torch.autograd.grad(out.sum() + lse.masked_fill(lse == -torch.inf, 0.0).sum(), list(leaves(given).values()))

    step()
    before = torch.cuda.memory_allocated()
    for _ in range(100):
        step()
    assert torch.cuda.memory_allocated() == before


@on_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch, heads", [(70_000, 1), (1, 70_000), (300, 300)])
def test_more_than_65535_blocks_each_way(batch, heads, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(batch, heads, 3, 8, device="cuda", dtype=dtype, generator=generator) for _ in range(3)
    )
    query.requires_grad_()
    out = functional.attention(query, key, value)
    (gradient,) = torch.autograd.grad(out, query, torch.ones_like(out))
    for b, h in ((0, 0), (batch - 1, heads - 1), (batch // 2, heads // 2)):
        part = [t[b : b + 1, h : h + 1].detach().cpu().double() for t in (query, key, value)]
        part[0].requires_grad_()
        expected = torch.nn.functional.scaled_dot_product_attention(*part)
        (expected_gradient,) = torch.autograd.grad(expected.sum(), part[0])
        assert_close([out[b : b + 1, h : h + 1]], [expected], dtype)
        assert_close([gradient[b : b + 1, h : h + 1]], [expected_gradient], dtype)


@on_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offsets_beyond_32_bits(dtype):
    """Rows so far apart that their offsets, in elements, pass 2^31."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free memory on the GPU")
    rows, dim, step = 5, 16, 2**29
    memory = torch.zeros(rows * step, dtype=dtype, device="cuda")
    far = memory.as_strided((1, 1, rows, dim), (0, 0, step, 1))
    near = torch.randn(1, 1, rows, dim, device="cuda", dtype=dtype)
    far.copy_(near)
    assert torch.equal(functional.attention(far, far, far), functional.attention(near, near, near))
