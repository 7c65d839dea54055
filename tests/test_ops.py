"""The operators as citizens of PyTorch: what the dispatcher knows of them, their memory, threads and processes."""

import copy
import os
import pickle
import time

import pytest
import torch
import torch.multiprocessing
from cases import follows_layout
from operators import (
    BACKWARD,
    DIFFERENTIABLE,
    DOUBLE_BACKWARD,
    FORWARD,
    PROBLEMS,
    arguments,
    forward,
    problem,
)

import mmca_ext
from mmca_ext import functional


def qkv(batch=2, heads=4, kv_heads=2, q_len=6, k_len=9, dim=8, value_dim=5, dtype=torch.float32, rows=False, grad=True):
    generator = torch.Generator().manual_seed(0)
    shapes = (heads, q_len, dim), (kv_heads, k_len, dim), (kv_heads, k_len, value_dim)
    tensors = [torch.randn(batch, h, n, d, generator=generator, dtype=torch.float64).to(dtype) for h, n, d in shapes]
    if rows:
        tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    return [t.requires_grad_(grad) for t in tensors]


def modality(batch=2, k_len=9):
    return torch.randint(0, 4, (batch, k_len), generator=torch.Generator().manual_seed(1))


def gradients(out, tensors):
    return torch.autograd.grad(out.sin().sum(), tensors)


# ---------------------------------------------------------------- dispatcher

QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")
TRACED = (*QUICK, "test_aot_dispatch_dynamic")
# Tracing takes most of the time: one problem for each argument of the schema.
REPRESENTATIVE = ["plain", "boolean masks", "bias and all", "bias (7,)", "packed and all", "mmca self sum"]
REPRESENTATIVE += ["mmca causal lse", "mmca none and all", "mmca gate and all", "mmca packed gate and all"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
KINDS = [(torch.float32, False), (torch.float64, True), (torch.bfloat16, True)]


def backward_arguments(name, grad_lse=True, attn_mask_gradient=True, requires_grad=(), **kwargs):
    """Those of attention_backward, by name, with the results of the forward."""
    given = problem(name, requires_grad=requires_grad, **kwargs)
    with torch.no_grad():
        results = dict(zip(("out", "lse", "lse_low", "group_out"), forward(True, **given)))
    arriving = {"grad_out": torch.ones_like(results["out"])}
    if grad_lse:
        arriving["grad_lse"] = torch.ones_like(results["lse"])
    return {**arriving, **results, **given, "attn_mask_gradient": attn_mask_gradient}


@pytest.mark.parametrize("name", PROBLEMS)
def test_opcheck(name):
    for save in (False, True):
        for requires_grad in ((), DIFFERENTIABLE):
            given = problem(name, dtype=torch.float32, requires_grad=requires_grad)
            args = arguments(FORWARD, **given, save_for_backward=save)
            torch.library.opcheck(FORWARD, args, test_utils=QUICK)


@pytest.mark.parametrize("dtype, rows", KINDS)
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_opcheck_traced(name, dtype, rows):
    args = arguments(FORWARD, **problem(name, dtype=dtype, rows=rows))
    torch.library.opcheck(FORWARD, args, test_utils=TRACED)


@pytest.mark.parametrize("name", PROBLEMS)
def test_opcheck_backward(name):
    for grad_lse in (False, True):
        for wanted in (False, True):
            args = arguments(BACKWARD, **backward_arguments(name, grad_lse, wanted, dtype=torch.float32))
            torch.library.opcheck(BACKWARD, args, test_utils=QUICK)


@pytest.mark.parametrize("dtype, rows", KINDS)
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_opcheck_backward_traced(name, dtype, rows):
    args = arguments(BACKWARD, **backward_arguments(name, dtype=dtype, rows=rows))
    torch.library.opcheck(BACKWARD, args, test_utils=TRACED)


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("name", PROBLEMS)
def test_opcheck_differentiated_backward(name, wanted):
    """Not traced: PyTorch's compilers stop at the first derivative, and the second looks at values."""
    given = backward_arguments(name, attn_mask_gradient=wanted, requires_grad=DIFFERENTIABLE, dtype=torch.float32)
    given["grad_out"].requires_grad_()
    torch.library.opcheck(BACKWARD, arguments(BACKWARD, **given), test_utils=QUICK)
    # A gradient arriving at results that are empty because nobody wants them is no obstacle.
    results = BACKWARD(*arguments(BACKWARD, **given))
    torch.autograd.grad(sum(r.sum() for r in results), given["query"], allow_unused=True)


@pytest.mark.parametrize("requires_grad", [(), DIFFERENTIABLE], ids=["plain", "differentiable"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_opcheck_double_backward(name, requires_grad):
    given = problem(name, dtype=torch.float32, requires_grad=requires_grad)
    with torch.no_grad():
        out, lse, _, _ = forward(**given)
    tensors = [given.get(argument) for argument in DIFFERENTIABLE]
    given["grads"] = [torch.ones_like(t) if t is not None and t.is_floating_point() else None for t in tensors]
    given |= {"grad_out": torch.ones_like(out), "grad_lse": torch.ones_like(lse)}
    torch.library.opcheck(DOUBLE_BACKWARD, arguments(DOUBLE_BACKWARD, **given), test_utils=QUICK)


@pytest.mark.parametrize("layout", ["contiguous", "rows", "sliced", "expanded", "features", "one token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_follow_the_layout_rule(layout, dtype):
    query, key, value = qkv(q_len=9, value_dim=8, grad=False, rows=layout == "rows", dtype=dtype)
    if layout == "sliced":
        query, key, value = query[:, ::2, 4:], key[:, :, ::2], value[:, :, ::2]
    elif layout == "expanded":
        query, key, value = (t[:, :1].expand(-1, t.shape[1], -1, -1) for t in (query, key, value))
    elif layout == "features":
        query, key, value = (t.mT.contiguous().mT for t in (query, key, value))
    elif layout == "one token":
        query = query[:, :, :1]
    ids = modality(k_len=key.shape[2])
    tensors = [t.requires_grad_() for t in (query, key, value)]
    weights = torch.ones(2, requires_grad=True)
    for out in (
        functional.attention(*tensors, torch.zeros(key.shape[2], dtype=dtype)),
        functional.mmca_attention(*tensors, ids),
        functional.mmca_attention(*tensors, ids, merge="gate", gate=weights),
        functional.mmca_attention(*tensors, ids, merge="none")[0],
    ):
        assert all(follows_layout(part, query) for part in (out if out.dim() == 5 else (out,)))
        for gradient, tensor in zip(gradients(out, tensors), tensors, strict=True):
            assert follows_layout(gradient, tensor), (gradient.stride(), tensor.stride())


@pytest.mark.parametrize("name", PROBLEMS)
def test_results_own_their_memory(name):
    """No result shares memory with an input or another result."""
    given = backward_arguments(name)
    tensors = [t for t in given.values() if isinstance(t, torch.Tensor)]
    count = len({t.untyped_storage().data_ptr() for t in tensors if t.numel()})
    results = [t for t in BACKWARD(*arguments(BACKWARD, **given)) if t.numel()]
    assert len({t.untyped_storage().data_ptr() for t in (*tensors, *results) if t.numel()}) == count + len(results)


@pytest.mark.parametrize("name", PROBLEMS)
def test_nothing_is_written_to(name):
    """Neither arguments nor results of the forward change."""
    given = backward_arguments(name)
    before = {argument: t.clone() for argument, t in given.items() if isinstance(t, torch.Tensor)}
    forward(True, **{argument: t for argument, t in given.items() if argument in problem(name)})
    BACKWARD(*arguments(BACKWARD, **given))
    for argument, t in before.items():
        assert torch.equal(t, given[argument]), argument


# ---------------------------------------------------------------- layers


LAYERS = {
    "MGQA": (lambda: mmca_ext.MGQA(16, heads=4, kv_heads=2, dim_head=4), lambda layer, x: layer(x)),
    "SimpleMMCA": (lambda: mmca_ext.SimpleMMCA(16, 4, dropout=0.0, dim_head=4), lambda layer, x: layer(x, x)[1]),
    "MultiModalCrossAttention": (
        lambda: mmca_ext.MultiModalCrossAttention(16, 2, 16, dim_head=8, dropout=0.0),
        lambda layer, x: layer(x, x),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_layers_copy(name, clone):
    make, call = LAYERS[name]
    layer, x = make(), torch.randn(2, 5, 16)
    assert torch.equal(call(clone(layer), x), call(layer, x))


# ---------------------------------------------------------------- threads and processes


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "shape",
    [
        {"batch": 1, "heads": 1, "kv_heads": 1, "q_len": 500, "k_len": 500},
        {"batch": 3, "heads": 6, "kv_heads": 2, "q_len": 97, "k_len": 193},
        {"batch": 1, "heads": 2, "kv_heads": 2, "q_len": 1, "k_len": 900},
        {"batch": 2, "heads": 8, "kv_heads": 1, "q_len": 33, "k_len": 1000, "dim": 64},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(threads, shape, dtype):
    key_len = shape["k_len"]
    tensors, ids = qkv(dtype=dtype, **shape), modality(shape["batch"], key_len)
    results = []
    for count in (1, 2, 3, 1, 2):
        threads(count)
        outs = (
            functional.attention(*tensors, is_causal=True),
            functional.attention(*tensors, dropout_p=0.3, generator=torch.Generator().manual_seed(1)),
            *(functional.mmca_attention(*tensors, ids, image_rows=rows) for rows in ("self", "block", "causal")),
            functional.attention(*tensors, torch.linspace(-3, 3, key_len, dtype=dtype), softcap=2.0),
            functional.mmca_attention(*tensors, ids, merge="none", image_rows="causal")[0],
            functional.mmca_attention(*tensors, ids, merge="gate", gate=torch.tensor([0.3, -2.0]), image_rows="block"),
        )
        results.append([t for out in outs for t in (out, *gradients(out, tensors))])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_fork_after_use():
    """A child that sets one thread, as DataLoader's workers do, computes; with more, PyTorch's own OpenMP hangs."""
    tensors = qkv(q_len=300, k_len=400, dim=32)
    expected = functional.attention(*tensors)
    expected_gradients = gradients(expected, tensors)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            out = functional.attention(*tensors)
            same = torch.equal(out, expected)
            # Autograd refuses its own engine in a forked child, so the backward operator is called itself.
            given = dict(zip(DIFFERENTIABLE, (t.detach() for t in tensors)))
            given |= zip(("out", "lse", "lse_low", "group_out"), forward(True, **given))
            actual = BACKWARD(*arguments(BACKWARD, **given, grad_out=given["out"].cos()))[:3]
            same &= all(torch.equal(a, b) for a, b in zip(actual, expected_gradients, strict=True))
            status = 0 if same else 2
        finally:
            os._exit(status)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")


def _train(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    layer = mmca_ext.MGQA(16, heads=4, kv_heads=2, dim_head=4)
    parallel = torch.nn.parallel.DistributedDataParallel(layer)
    x = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        parallel.zero_grad()
        parallel(x[2 * rank : 2 * rank + 2]).square().sum().backward()
    torch.save([p.grad for p in layer.parameters()], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_distributed_data_parallel(tmp_path):
    """Two processes with half the batch each hold the mean of their gradients: half of one process with all of it."""
    torch.multiprocessing.spawn(_train, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    layer = mmca_ext.MGQA(16, heads=4, kv_heads=2, dim_head=4)
    x = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(1))
    layer(x).square().sum().backward()
    for rank in range(2):
        for parameter, grad in zip(layer.parameters(), torch.load(tmp_path / f"{rank}.pt"), strict=True):
            torch.testing.assert_close(grad, parameter.grad / 2)
