"""The operators under autograd and its neighbours: gradients, saved tensors, transforms, checkpoints, autocast."""

import warnings
from itertools import combinations

import pytest
import torch
from operators import (
    BACKWARD,
    DIFFERENTIABLE,
    MODALITY,
    PROBLEMS,
    arguments,
    bias,
    finite,
    forward,
    gate,
    leaves,
    problem,
    qkv,
)
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from mmca_ext import functional, reference

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SOME = ["bias and all", "bias (5, 7)", "packed and all", "mmca causal gate", "mmca packed gate and all"]
SOME += ["mmca none and all", "mmca block lse"]


def loss(given):
    out, lse, _, _ = forward(**given)
    return out.sin().sum() + finite(lse).cos().sum()


def gradients(given, **kwargs):
    """Of the arguments that need one, by name."""
    wanted = leaves(given)
    return dict(zip(wanted, torch.autograd.grad(loss(given), wanted.values(), **kwargs), strict=True))


# ---------------------------------------------------------------- which gradients there are


def subsets(name):
    names = list(leaves(problem(name)))
    return [(name, chosen) for n in range(1, len(names) + 1) for chosen in combinations(names, n)]


@pytest.mark.parametrize("name, wanted", [case for name in SOME for case in subsets(name)])
def test_only_what_needs_a_gradient_gets_one(name, wanted):
    expected = gradients(problem(name))
    given = problem(name, requires_grad=wanted)
    loss(given).backward()
    for argument in DIFFERENTIABLE:
        tensor = given.get(argument)
        if argument in wanted:
            assert torch.equal(tensor.grad, expected[argument]), argument
        else:
            assert tensor is None or tensor.grad is None, argument


@pytest.mark.parametrize("name, wanted", [case for name in SOME for case in subsets(name) if len(case[1]) < 3])
def test_second_derivatives_of_what_needs_one(name, wanted):
    """By the chosen arguments alone they are what they are among all."""
    seconds = []
    for requires_grad in (DIFFERENTIABLE, wanted):
        given = problem(name, requires_grad=requires_grad)
        first = gradients(given, create_graph=True)
        penalty = sum(first[argument].square().sum() for argument in wanted)
        chosen = [given[argument] for argument in wanted]
        seconds.append(torch.autograd.grad(penalty, chosen, materialize_grads=True))
        assert all(given[a].grad is None for a in DIFFERENTIABLE if a in given)
    torch.testing.assert_close(*seconds)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
def test_undefined_gradients_are_zero(name, used):
    """A loss that uses only out, or only lse, gives what zeros for the other would."""
    given = problem(name)
    tensors = list(leaves(given).values())
    out, lse, _, _ = forward(**given)
    results = out, finite(lse)
    some = torch.autograd.grad(sum(results[i].sin().sum() for i in used), tensors, retain_graph=True)
    full = torch.autograd.grad(sum(r.sin().sum() * (i in used) for i, r in enumerate(results)), tensors)
    for a, b in zip(some, full, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("where", ["out", "lse"])
@pytest.mark.parametrize(
    "name",
    ["boolean masks", "bias (5, 7)", "packed and all", "mmca causal gate", "mmca none and all", "mmca packed lse"],
)
def test_what_arrives_at_empty_rows_goes_nowhere(name, where):
    """A NaN there, of a normalised zero for instance, reaches no gradient, the gate's included."""
    given = problem(name)
    out, lse, _, _ = forward(**given)
    empty = lse == -torch.inf
    if where == "out" and "modality" in given and given["merge"] != "none":
        empty = empty.all(0)
    if where == "out" and "cu_seqlens_q" in given:
        empty = empty.mT
    assert empty.any()
    found = []
    for arriving in (torch.nan, 0.0):
        grads = {"out": torch.ones_like(out), "lse": torch.ones_like(lse)}
        grads[where][empty] = arriving
        found.append(torch.autograd.grad((out, lse), leaves(given).values(), grads.values(), retain_graph=True))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [f32, bf16, f16])
@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_have_their_arguments_shape_and_dtype(name, dtype):
    given = problem(name, dtype=dtype)
    for other in (f32, f64, bf16):  # a bias or a gate may have a dtype of its own
        for argument in ("attn_mask", "gate"):
            if argument in leaves(given):
                given[argument] = given[argument].detach().to(other).requires_grad_()
        found = gradients(given)
        for argument, tensor in leaves(given).items():
            assert (found[argument].shape, found[argument].dtype) == (tensor.shape, tensor.dtype), argument


def test_kept_graphs_give_the_same_twice():
    given = problem("mmca gate and all")
    total = loss(given)
    first = torch.autograd.grad(total, leaves(given).values(), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(total, leaves(given).values()), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, leaves(given).values())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", SOME)
def test_without_gradients(name, mode):
    given = problem(name)
    with mode():
        out = forward(**given)[0]
    expected = forward(**given)[0]
    assert not out.requires_grad and expected.requires_grad
    exact = {} if "packed" in name else {"rtol": 0, "atol": 0}  # few rows: products that no backward follows are direct
    torch.testing.assert_close(out, expected.detach(), **exact)


# ---------------------------------------------------------------- saved tensors

SAVED = [
    (name, argument)
    for name in ("boolean masks", "bias and all", "packed and all", "mmca gate and all", "mmca packed gate and all")
    for argument, value in problem(name).items()
    if isinstance(value, torch.Tensor)
]


@pytest.mark.parametrize("name, argument", SAVED)
def test_saved_arguments_changed_in_place(name, argument):
    """The backward would compute with something else than the forward did."""
    given = problem(name)
    for other, value in given.items():
        if isinstance(value, torch.Tensor):  # not leaves, and none the catalogue's own
            given[other] = value.clone()
    total = loss(given)
    with torch.no_grad():
        given[argument].copy_(given[argument].clone())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("index", [0, 1], ids=["out", "lse"])
def test_results_changed_in_place(index):
    given = problem("mmca causal gate")
    results = forward(**given)
    total = results[0].sum() + finite(results[1]).sum()
    with torch.no_grad():
        results[index].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("name", SOME)
def test_saved_tensors_can_be_offloaded(name):
    """Everything the backward needs goes through the hooks, and comes back as it was."""
    given = problem(name)
    expected = gradients(given)
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor.detach().numpy().copy()

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        total = forward(**given)[0].sin().sum()
    assert len(sizes) >= len([t for t in given.values() if isinstance(t, torch.Tensor)])
    plain = torch.autograd.grad(forward(**given)[0].sin().sum(), leaves(given).values())
    for a, b in zip(torch.autograd.grad(total, leaves(given).values()), plain, strict=True):
        assert torch.equal(a, b)

    with torch.autograd.graph.save_on_cpu():
        found = gradients(given)
    assert all(torch.equal(found[argument], expected[argument]) for argument in expected)


def test_offloaded_tensors_have_second_derivatives():
    seconds = []
    for hooks in (False, True):
        given = problem("bias and all")
        with torch.autograd.graph.save_on_cpu() if hooks else torch.enable_grad():
            first = gradients(given, create_graph=True)
            total = sum(g.square().sum() for g in first.values())
        seconds.append(torch.autograd.grad(total, leaves(given).values()))
    for a, b in zip(*seconds, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_the_dropout(use_reentrant):
    given = problem("mmca causal gate")
    tensors = *(given[name] for name in ("query", "key", "value", "gate")), bias(4, 5, 7)

    def block(query, key, value, weights, attn_mask):
        out = functional.attention(query, key, value, attn_mask, dropout_p=0.5, softcap=2.0)
        kwargs = {"image_rows": "causal", "dropout_p": 0.5}
        gated = functional.mmca_attention(query, key, value, MODALITY, merge="gate", gate=weights, **kwargs)
        return out + gated + functional.mmca_attention(query, key, value, MODALITY, merge="none", **kwargs)[0].sum(0)

    results = []
    for run in (block, lambda *t: checkpoint(block, *t, use_reentrant=use_reentrant)):
        torch.manual_seed(5)
        args = [t.detach().clone().requires_grad_() for t in tensors]
        out = run(*args)
        out.sin().sum().backward()
        results.append((out, *(t.grad for t in args)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    torch.manual_seed(6)
    assert not torch.equal(block(*tensors), results[0][0])


# ---------------------------------------------------------------- transforms

NO_FORWARD_MODE = r"forward-mode differentiation \(jvp\) of attention and mmca_attention is not built yet"
NO_FUNCTORCH = r"torch\.func's grad, vjp and their like do not reach through attention and mmca_attention"


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("name, argument", [(name, a) for name in SOME for a in leaves(problem(name))])
def test_forward_mode_is_a_named_error(name, argument, leaf):
    """A tangent must not be lost in silence."""
    given = problem(name, requires_grad=())
    with forward_ad.dual_level():
        given[argument] = forward_ad.make_dual(given[argument].clone().requires_grad_(leaf), given[argument])
        with pytest.raises(NotImplementedError, match=NO_FORWARD_MODE):
            forward(**given)


@pytest.mark.parametrize("argument", ["grad_out", "grad_lse", "query", "gate"])
def test_forward_mode_through_the_backward_is_a_named_error(argument):
    given = problem("mmca causal gate", requires_grad=())
    given |= zip(("out", "lse", "lse_low", "group_out"), forward(True, **given))
    given |= {"grad_out": torch.ones_like(given["out"]), "grad_lse": torch.ones_like(given["lse"])}
    with forward_ad.dual_level():
        given[argument] = forward_ad.make_dual(given[argument], torch.ones_like(given[argument]))
        with pytest.raises(NotImplementedError, match=NO_FORWARD_MODE):
            BACKWARD(*arguments(BACKWARD, **given))


QUERY, KEY, VALUE = qkv()


def bias_alone(attn_mask):
    return functional.attention(QUERY, KEY, VALUE, attn_mask)


def gate_alone(weights):
    return functional.mmca_attention(QUERY, KEY, VALUE, MODALITY, merge="gate", gate=weights)


def query_alone(query):
    return functional.attention(query, KEY, VALUE)


ALONE = {
    "query": (query_alone, QUERY),
    "bias": (bias_alone, bias(4, 5, 7, hidden=False)),
    "gate": (gate_alone, gate(4, 1, 2)),
}


@pytest.mark.parametrize("name", ALONE)
def test_torch_func_is_a_named_error(name):
    function, argument = ALONE[name]

    def scalar(x):
        return function(x).sum()

    for transform in (torch.func.grad, torch.func.jacrev, torch.func.hessian):
        with pytest.raises(NotImplementedError, match=NO_FUNCTORCH):
            transform(scalar)(argument)
    with pytest.raises(NotImplementedError, match=NO_FUNCTORCH):
        torch.func.vjp(function, argument)
    for transform in (torch.func.jacfwd(scalar), lambda x: torch.func.jvp(function, (x,), (x,))):
        with pytest.raises(NotImplementedError, match=NO_FORWARD_MODE):
            transform(argument)


@pytest.mark.parametrize("name", ALONE)
def test_autograd_functional_is_right(name):
    """Jacobian, its vectorised form (a batch of backward calls), Hessian: what torch.func refuses."""
    function, argument = ALONE[name]
    jacobian = torch.autograd.functional.jacobian(function, argument)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's note that it loops over the batch
        vectorized = torch.autograd.functional.jacobian(function, argument, vectorize=True)
    assert torch.equal(jacobian, vectorized)

    def scalar(x):
        return function(x).sin().sum()

    hessian = torch.autograd.functional.hessian(scalar, argument).reshape(argument.numel(), argument.numel())
    assert hessian.abs().max() > 0
    torch.testing.assert_close(hessian, hessian.T)


def other(t):
    """A second value of an argument."""
    return 0.5 - t if t.is_floating_point() and t.isfinite().all() else t.flip(-1)


VMAPPED = [("bias and all", n) for n in ("query", "key", "value", "attn_mask", "key_mask")]
VMAPPED += [("packed", n) for n in ("query", "value")]
VMAPPED += [("mmca gate and all", n) for n in ("query", "gate", "modality", "image_id")]
VMAPPED += [("mmca none and all", n) for n in ("key", "modality")] + [("mmca packed gate", "gate")]


@pytest.mark.parametrize("name, argument", VMAPPED)
@pytest.mark.parametrize("requires_grad", [(), DIFFERENTIABLE], ids=["plain", "differentiable"])
def test_vmap(name, argument, requires_grad):
    given = problem(name, requires_grad=())
    stack = torch.stack((given[argument], other(given[argument]), given[argument]))
    stack.requires_grad_(argument in requires_grad)

    def function(x):
        return forward(**{**given, argument: x})[:2]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's note that it loops over the batch
        results = torch.vmap(function)(stack)
    expected = [torch.stack(r) for r in zip(*map(function, stack))]
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)
    if stack.requires_grad:
        found = [torch.autograd.grad(out.sin().sum() + finite(lse).sum(), stack)[0] for out, lse in (results, expected)]
        assert torch.equal(*found)


def test_vmap_says_how_it_draws_dropout():
    queries = torch.stack((QUERY, QUERY))

    def function(query):
        return functional.attention(query, KEY, VALUE, dropout_p=0.5)

    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(function)(queries)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same = torch.vmap(function, randomness="same")(queries)
        different = torch.vmap(function, randomness="different")(queries)
    assert torch.equal(same[0], same[1]) and not torch.equal(different[0], different[1])


# ---------------------------------------------------------------- autocast


def cast(given, dtype):
    """The problem as autocast makes it: query, key and value in its dtype, the rest as it is."""
    return {name: t.to(dtype) if name in DIFFERENTIABLE[:3] else t for name, t in given.items()}


@pytest.mark.parametrize("dtype", [bf16, f16])
@pytest.mark.parametrize("inputs", [(f32, f32, f32), (bf16, bf16, bf16), (f16, f16, f16), (f32, bf16, f16)], ids=str)
@pytest.mark.parametrize("name", SOME)
def test_autocast(name, inputs, dtype):
    """Computes in autocast's dtype, whatever came in, as scaled_dot_product_attention does."""
    given = problem(name, dtype=f32, requires_grad=())
    for argument, own in zip(DIFFERENTIABLE, inputs):
        given[argument] = given[argument].to(own)
    for argument in DIFFERENTIABLE:
        if argument in given and given[argument].is_floating_point():
            given[argument].requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out, lse, _, _ = forward(**given)
    expected, other_lse, _, _ = forward(**cast(given, dtype))
    assert out.dtype == dtype and lse.dtype == f32
    assert torch.equal(out, expected) and torch.equal(lse, other_lse)
    tensors = list(leaves(given).values())
    found, others = (torch.autograd.grad(r.float().sin().sum(), tensors) for r in (out, expected))
    assert [g.dtype for g in found] == [t.dtype for t in tensors]
    assert all(torch.equal(a, b) for a, b in zip(found, others, strict=True))


@pytest.mark.parametrize("module", [functional, reference], ids=["functional", "reference"])
def test_autocast_leaves_float64(module):
    tensors = qkv()
    with torch.autocast("cpu"):
        assert module.attention(*tensors).dtype == f64
        assert module.mmca_attention(*tensors, MODALITY).dtype == f64
        with pytest.raises(TypeError, match="dtype"):
            module.attention(tensors[0].float(), *tensors[1:])


def test_autocast_off_inside_autocast():
    tensors = qkv(dtype=f32)
    with torch.autocast("cpu"), torch.autocast("cpu", enabled=False):
        assert functional.attention(*tensors).dtype == f32


@pytest.mark.parametrize("name", SOME)
def test_a_backward_under_autocast_keeps_the_forwards_dtypes(name):
    """First and second derivatives are those of the forward that ran, whatever surrounds them."""
    found = []
    for enabled in (False, True):
        given = problem(name, dtype=f32)
        total = loss(given)
        with torch.autocast("cpu", enabled=enabled):
            first = torch.autograd.grad(total, leaves(given).values(), create_graph=True)
            penalty = sum(g.square().sum() for g in first)
            found.append((*first, *torch.autograd.grad(penalty, leaves(given).values(), allow_unused=True)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
