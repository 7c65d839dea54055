"""Gradients in fp64 against finite differences: first, second and third, every argument, lse included, at small sizes.

The first derivative is a kernel per instruction set; the second goes through the reference and is held to differences
of the first.
"""

import devices
import pytest
import torch
from cases import ISAS
from operators import DIFFERENTIABLE, MMCA, PROBLEMS, finite, forward, leaves, problem, qkv
from torch.autograd.gradcheck import GradcheckError, gradcheck, gradgradcheck

from mmca_ext import _C, functional, reference


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors of a few elements: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=ISAS)
def isa(request):
    _C.force_isa(request.param)
    yield request.param
    _C.force_isa(None)


def check(function, tensors):
    assert gradcheck(function, tensors, eps=1e-6, atol=1e-7, rtol=1e-6, nondet_tol=0.0)


def check_twice(function, tensors):
    assert gradgradcheck(function, tensors, eps=1e-6, atol=1e-6, rtol=1e-5, nondet_tol=0.0)


def function_of(given):
    """(out, lse) as a function of the arguments that need a gradient, and these."""
    names, tensors = zip(*leaves(given).items(), strict=True)

    def function(*values):
        out, lse, _, _ = forward(**{**given, **dict(zip(names, values, strict=True))})
        return out, finite(lse)

    return function, tensors


# ---------------------------------------------------------------- first derivatives


@pytest.mark.parametrize("name", PROBLEMS)
def test_first_derivatives(isa, name):
    check(*function_of(problem(name)))


SHAPES = {
    "heads inside rows": ("plain", {"rows": True}),
    "one query head for each key head": ("window", {"heads": 2, "kv_heads": 2}),
    "wide values": ("softcap", {"dim": 1, "value_dim": 17}),
    "wide keys": ("window", {"dim": 19, "value_dim": 1}),
    "more keys than a vector": ("softcap", {"heads": 1, "kv_heads": 1, "q_len": 11, "k_len": 19, "batch": 1}),
    "no keys": ("plain", {"k_len": 0}),
    "one query": ("mmca causal none", {"q_len": 1}),
    "whole sequence": ("mmca block sum", {"q_len": 7, "rows": True}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(isa, shape):
    name, options = SHAPES[shape]
    check(*function_of(problem(name, **options)))


def test_more_queries_than_keys(isa):
    """Causal, the first rows see nothing."""
    given = dict(zip(DIFFERENTIABLE, (t.requires_grad_() for t in qkv(q_len=9, k_len=4))), is_causal=True)
    assert (forward(**given)[1][:, :, :5] == -torch.inf).all()
    check(*function_of(given))


ALONE = ["bias (2, 4, 5, 7)", "bias (5, 7)", "bias (2, 4, 5, 1)", "bias and all"]
ALONE += ["mmca causal gate", "mmca gate (2,)", "mmca packed gate and all", "mmca none and all"]


@pytest.mark.parametrize("name, wanted", [(name, wanted) for name in ALONE for wanted in leaves(problem(name))])
def test_one_argument_alone(name, wanted):
    check(*function_of(problem(name, requires_grad=(wanted,))))


# ---------------------------------------------------------------- second and third derivatives

# An hour on the emulated GPU, and little to learn: the second derivative is the reference's, and what the kernels give,
# the first, has been held to differences by then.
not_emulated = pytest.mark.skipif(devices.current == "emulated", reason="an hour on the emulated GPU")


@not_emulated
@pytest.mark.parametrize("name", PROBLEMS)
def test_second_derivatives(name):
    check_twice(*function_of(problem(name, dim=1, value_dim=2)))


@not_emulated
@pytest.mark.parametrize("name", ["softcap", "bias (5, 7)", "packed and all", "mmca causal lse", "mmca gate (4, 1, 2)"])
def test_second_derivatives_of_longer_heads(name):
    check_twice(*function_of(problem(name, dim=5, value_dim=3, rows=True)))


@not_emulated
@pytest.mark.parametrize("wanted", [("attn_mask",), ("query",), ("key", "attn_mask")])
def test_second_derivatives_of_some_arguments(wanted):
    check_twice(*function_of(problem("bias and all", dim=1, value_dim=2, requires_grad=wanted)))


@not_emulated
@pytest.mark.parametrize("wanted", [("gate",), ("value",), ("key", "gate")])
def test_second_derivatives_of_some_arguments_of_mmca(wanted):
    check_twice(*function_of(problem("mmca gate and all", dim=1, value_dim=2, requires_grad=wanted)))


@not_emulated
@pytest.mark.parametrize(
    "name", ["plain", "bias (1, 5, 7)", "dropout", "softcap", "packed and all", "mmca causal sum", "mmca gate (2,)"]
)
def test_third_derivatives(name):
    """The gradient of the second derivative, in random directions."""
    function, tensors = function_of(problem(name, dim=1, value_dim=1))

    def second(*values):
        out, lse = function(*values)
        first = torch.autograd.grad(out.sin().sum() + lse.cos().sum(), values, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in first), values, create_graph=True)

    assert gradcheck(second, tensors, eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=True)


def test_a_gradient_penalty_is_the_references():
    """What double backward is for, in fp32: the norm of the input's gradient, in the loss."""
    results = []
    for module in (functional, reference):
        tensors = [t.float().requires_grad_() for t in qkv()]
        out = module.attention(*tensors, is_causal=True)
        (first,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
        results.append(torch.autograd.grad(out.sum() + first.square().sum(), tensors))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MMCA)
def test_rows_that_see_nothing_have_no_second_derivative(name):
    """Padding alone: everything is 0, and finite all the way down."""
    given = problem(name)
    given["modality"] = torch.zeros_like(given["modality"])
    function, tensors = function_of(given)
    out, lse = function(*tensors)
    first = torch.autograd.grad(out.sum() + lse.sum(), tensors, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), tensors, materialize_grads=True)
    assert all((t == 0).all() for t in (out, lse, *first, *second))


# ---------------------------------------------------------------- these checks can fail


class Wrong(torch.autograd.Function):
    """A gradient for another dropout mask than the forward's."""

    @staticmethod
    def forward(ctx, query, key, value):
        ctx.save_for_backward(query, key, value)
        return forward(query=query, key=key, value=value, rng_state=torch.tensor([1, 2]), dropout_p=0.5)[0]

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            tensors = dict(zip(DIFFERENTIABLE, (t.detach().requires_grad_() for t in ctx.saved_tensors)))
            out = forward(**tensors, rng_state=torch.tensor([1, 3]), dropout_p=0.5)[0]
        return torch.autograd.grad(out, tensors.values(), grad)


class HalfRight(torch.autograd.Function):
    """The right gradient, which does not know that it depends on the inputs."""

    @staticmethod
    def forward(ctx, query, key, value):
        ctx.save_for_backward(query, key, value)
        return functional.attention(query, key, value)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            tensors = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            out = functional.attention(*tensors)
        return torch.autograd.grad(out, tensors, grad, create_graph=True)


def test_the_checks_can_fail():
    tensors = [t.requires_grad_() for t in qkv(dim=1, value_dim=2)]
    with pytest.raises(GradcheckError):
        check(Wrong.apply, tensors)
    check(HalfRight.apply, tensors)
    with pytest.raises(GradcheckError):
        check_twice(HalfRight.apply, tensors)
