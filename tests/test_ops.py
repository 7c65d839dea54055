"""The operators as citizens of PyTorch: dispatcher, autograd, compilers, autocast, threads and processes."""

import copy
import os
import pickle
import time
import warnings
from itertools import combinations

import pytest
import torch
import torch.multiprocessing
from cases import follows_layout
from torch.utils.checkpoint import checkpoint

import mmca_ext
from mmca_ext import functional, reference

ops = torch.ops.mmca_ext
RNG_STATE = torch.tensor([77, 3])


def qkv(batch=2, heads=4, kv_heads=2, q_len=6, k_len=9, dim=8, value_dim=5, dtype=torch.float32, rows=False, grad=True):
    generator = torch.Generator().manual_seed(0)
    shapes = (heads, q_len, dim), (kv_heads, k_len, dim), (kv_heads, k_len, value_dim)
    tensors = [torch.randn(batch, h, n, d, generator=generator, dtype=torch.float64).to(dtype) for h, n, d in shapes]
    if rows:
        tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    return [t.requires_grad_(grad) for t in tensors]


def modality(batch=2, k_len=9):
    return torch.randint(0, 4, (batch, k_len), generator=torch.Generator().manual_seed(1))


MASK = torch.rand(2, 1, 6, 9, generator=torch.Generator().manual_seed(2)) < 0.7
KEY_MASK = torch.arange(9) < torch.tensor([[9], [4]])
ATTENTION = {
    "plain": (None, None, None, None, False, -1, -1, 0.0),
    "masks": (MASK, KEY_MASK, None, 0.3, True, 4, 0, 0.0),
    "dropout": (None, KEY_MASK, RNG_STATE, None, True, -1, -1, 0.3),
}
MMCA = {
    "self sum": (None, None, "self", "sum", None, 0.0),
    "block lse": (modality() // 2, None, "block", "lse", 0.5, 0.0),
    "causal dropout": (None, RNG_STATE, "causal", "sum", None, 0.4),
    "self+text": (None, None, "self+text", "lse", None, 0.0),
}


def gradients(out, tensors):
    return torch.autograd.grad(out.sin().sum(), tensors)


# ---------------------------------------------------------------- dispatcher

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("options", ATTENTION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_attention(options, rows, dtype):
    tensors = qkv(dtype=dtype, rows=rows)
    for save in (False, True):
        torch.library.opcheck(ops.attention.default, (*tensors, *ATTENTION[options], save), test_utils=CHECKS)
    tensors = [t.detach() for t in tensors]
    results = ops.attention(*tensors, *ATTENTION[options], True)
    for grad_lse in (None, torch.ones_like(results[1])):
        args = (torch.ones_like(results[0]), grad_lse, *tensors, *results, *ATTENTION[options])
        torch.library.opcheck(ops.attention_backward.default, args, test_utils=CHECKS)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("options", MMCA)
def test_opcheck_mmca_attention(options, rows):
    tensors, ids = qkv(rows=rows), modality()
    for save in (False, True):
        args = (*tensors, ids, *MMCA[options], save)
        torch.library.opcheck(ops.mmca_attention.default, args, test_utils=CHECKS)
    tensors = [t.detach() for t in tensors]
    results = ops.mmca_attention(*tensors, ids, *MMCA[options], True)
    for grad_lse in (None, torch.ones_like(results[1])):
        args = (torch.ones_like(results[0]), grad_lse, *tensors, *results, ids, *MMCA[options])
        torch.library.opcheck(ops.mmca_attention_backward.default, args, test_utils=CHECKS)


@pytest.mark.parametrize("layout", ["contiguous", "rows", "sliced", "expanded", "features", "one token"])
def test_results_follow_the_layout_rule(layout):
    query, key, value = qkv(q_len=9, value_dim=8, grad=False, rows=layout == "rows")
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
    for out in (functional.attention(*tensors), functional.mmca_attention(*tensors, ids)):
        assert follows_layout(out, query)
        for gradient, tensor in zip(gradients(out, tensors), tensors, strict=True):
            assert follows_layout(gradient, tensor), (gradient.stride(), tensor.stride())


def test_results_own_their_memory():
    """No result shares memory with an input or another result."""
    tensors = qkv(grad=False)
    results = [*tensors, *ops.attention(*tensors, *ATTENTION["plain"], True)]
    results += ops.mmca_attention(*tensors, modality(), *MMCA["self sum"], True)
    assert len({t.untyped_storage().data_ptr() for t in results}) == len(results)


# ---------------------------------------------------------------- autograd


@pytest.mark.parametrize("call", ["attention", "mmca"])
@pytest.mark.parametrize("wanted", [c for n in (1, 2, 3) for c in combinations(range(3), n)])
def test_only_what_needs_a_gradient_gets_one(call, wanted):
    def run(tensors):
        if call == "mmca":
            return functional.mmca_attention(*tensors, modality())
        return functional.attention(*tensors, MASK)

    every = qkv(dtype=torch.float64)
    expected = gradients(run(every), every)
    some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(every)]
    run(some).sin().sum().backward()
    for i, tensor in enumerate(some):
        assert (tensor.grad is None) == (i not in wanted)
        assert tensor.grad is None or torch.equal(tensor.grad, expected[i])


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
def test_undefined_gradients_are_zero(used):
    """A loss that uses only out, or only lse, gives what zeros for the other would."""
    tensors = qkv(dtype=torch.float64)
    ids = modality()
    for results in (
        functional.attention(*tensors, return_lse=True),
        functional.mmca_attention(*tensors, ids, image_rows="causal", return_lse=True),
    ):
        finite = [torch.where(r.isfinite(), r, 0.0) for r in results]
        some = torch.autograd.grad(sum(finite[i].sin().sum() for i in used), tensors, retain_graph=True)
        full = torch.autograd.grad(sum(r.sin().sum() * (i in used) for i, r in enumerate(finite)), tensors)
        for a, b in zip(some, full, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


NOT_TWICE = "double backward of attention and mmca_attention is not built yet"


@pytest.mark.parametrize("call", ["attention", "mmca"])
def test_double_backward_is_a_named_error(call):
    """A gradient penalty must not silently lose its own gradient."""
    tensors = qkv()
    out = functional.attention(*tensors) if call == "attention" else functional.mmca_attention(*tensors, modality())
    (first,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=NOT_TWICE):
        torch.autograd.grad(first.square().sum(), tensors[0])


@pytest.mark.parametrize("leaf", [True, False])
def test_forward_mode_is_right_or_a_named_error(leaf):
    query, key, value = qkv(grad=False)
    tangent = torch.ones_like(query)
    _, expected = torch.func.jvp(lambda q: reference.attention(q, key, value), (query,), (tangent,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query.clone().requires_grad_(leaf), tangent)
        try:
            out = functional.attention(dual, key, value)
        except (NotImplementedError, RuntimeError) as error:
            assert "jvp" in str(error) or "forward" in str(error)
            return
        actual = torch.autograd.forward_ad.unpack_dual(out).tangent
    assert actual is not None, "the tangent was lost in silence"
    torch.testing.assert_close(actual, expected)


def test_vmap_of_the_forward():
    query, key, value = qkv(grad=False)
    queries = torch.stack((query, -query, 2 * query))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's note that it loops over the batch
        out = torch.vmap(lambda q: functional.attention(q, key, value))(queries)
    assert torch.equal(out, torch.stack([functional.attention(q, key, value) for q in queries]))


def test_functional_gradients_are_right_or_a_named_error():
    query, key, value = qkv(grad=False)
    try:
        actual = torch.func.grad(lambda q: functional.attention(q, key, value).sin().sum())(query)
    except RuntimeError as error:
        assert "functorch" in str(error)
        return
    leaf = query.clone().requires_grad_()
    torch.testing.assert_close(actual, gradients(functional.attention(leaf, key, value), [leaf])[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    tensors, ids = qkv(), modality()
    with mode():
        outs = functional.attention(*tensors), functional.mmca_attention(*tensors, ids)
    expected = functional.attention(*tensors), functional.mmca_attention(*tensors, ids)
    for out, other in zip(outs, expected, strict=True):
        assert not out.requires_grad and other.requires_grad and torch.equal(out, other)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_the_dropout(use_reentrant):
    tensors = qkv(dtype=torch.float64)

    def block(query, key, value):
        out = functional.attention(query, key, value, dropout_p=0.5)
        return out + functional.mmca_attention(query, key, value, modality(), image_rows="causal", dropout_p=0.5)

    results = []
    for run in (block, lambda *t: checkpoint(block, *t, use_reentrant=use_reentrant)):
        torch.manual_seed(5)
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = run(*leaves)
        out.sin().sum().backward()
        results.append((out, *(t.grad for t in leaves)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    torch.manual_seed(6)
    assert not torch.equal(block(*tensors), results[0][0])


# ---------------------------------------------------------------- compilers


def both(query, key, value, ids):
    out, lse = functional.attention(query, key, value, is_causal=True, window=(5, None), return_lse=True)
    return out + functional.mmca_attention(query, key, value, ids, image_rows="block"), lse


@pytest.mark.parametrize(
    "backend, dynamic",
    [("aot_eager", False), ("aot_eager", True), pytest.param("inductor", None, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("rows", [False, True])
def test_compile(backend, dynamic, rows):
    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend=backend, dynamic=dynamic)
    for length, batch in ((9, 2), (12, 2), (17, 3)):
        tensors, ids = qkv(batch=batch, k_len=length, rows=rows), modality(batch, length)
        expected, actual = both(*tensors, ids), compiled(*tensors, ids)
        for e, a in zip(expected, actual, strict=True):
            torch.testing.assert_close(a, e)
        assert actual[0].stride() == expected[0].stride()
        torch.testing.assert_close(gradients(actual[0], tensors), gradients(expected[0], tensors))


def test_dynamic_shapes_compile_once():
    torch._dynamo.reset()
    graphs = []

    def count(module, _):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(both, fullgraph=True, backend=count, dynamic=True)
    for length in (9, 12, 17, 30):
        compiled(*qkv(k_len=length, grad=False), modality(k_len=length))
    assert len(graphs) == 1


def test_export():
    class Block(torch.nn.Module):
        def forward(self, query, key, value, ids):
            return both(query, key, value, ids)

    length = torch.export.Dim("length", min=7, max=100)
    shapes = ({}, {2: length}, {2: length}, {1: length})
    program = torch.export.export(Block(), (*qkv(grad=False), modality()), dynamic_shapes=shapes)
    names = {str(node.target) for node in program.graph.nodes}
    assert {"mmca_ext.attention.default", "mmca_ext.mmca_attention.default"} <= names
    args = (*qkv(k_len=31, grad=False), modality(k_len=31))
    for actual, expected in zip(program.module()(*args), both(*args), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# ---------------------------------------------------------------- autocast


@pytest.mark.parametrize("inputs", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("call", ["attention", "mmca"])
def test_autocast(inputs, call):
    tensors = qkv(dtype=inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = functional.attention(*tensors) if call == "attention" else functional.mmca_attention(*tensors, modality())
    assert out.dtype == torch.float32
    actual = gradients(out, tensors)
    assert [g.dtype for g in actual] == [inputs] * 3
    wide = [t.detach().float().requires_grad_() for t in tensors]
    other = functional.attention(*wide) if call == "attention" else functional.mmca_attention(*wide, modality())
    assert torch.equal(out, other)
    for a, b in zip(actual, gradients(other, wide), strict=True):
        assert torch.equal(a, b.to(inputs))


def test_autocast_leaves_float64():
    with torch.autocast("cpu"):
        assert functional.attention(*qkv(dtype=torch.float64)).dtype == torch.float64


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_do_not_change_a_bit(threads, shape, dtype):
    tensors, ids = qkv(dtype=dtype, **shape), modality(shape["batch"], shape["k_len"])
    results = []
    for count in (1, 2, 3, 1, 2):
        threads(count)
        outs = (
            functional.attention(*tensors, is_causal=True),
            functional.attention(*tensors, dropout_p=0.3, generator=torch.Generator().manual_seed(1)),
            *(functional.mmca_attention(*tensors, ids, image_rows=rows) for rows in ("self", "block", "causal")),
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
            detached = [t.detach() for t in tensors]
            results = ops.attention(*detached, *ATTENTION["plain"], True)
            actual = ops.attention_backward(results[0].cos(), None, *detached, *results, *ATTENTION["plain"])
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
