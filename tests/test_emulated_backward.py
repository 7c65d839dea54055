"""The backward of the 16-bit kernels in every shape it has: which one runs depends on head_dim, on the options, on the
GPU's shared memory, and on how many blocks fill it."""

import emulated_device
import pytest
import torch
from cases import check, given, rms_error, run_kernels, run_reference
from cpp_suites import Unavailable
from devices import on
from emulator import RANDOM
from operators import randn

# Compute capability and multiprocessors: much, some and little shared memory; 100 of them want keys shared by blocks.
GPUS = [(90, 4), (90, 100), (80, 4), (86, 4)]


@pytest.fixture
def device():
    try:
        device = emulated_device.load()
    except Unavailable as reason:
        pytest.skip(str(reason))
    with on("emulated"):
        yield device
    device.reset()


def tensors(head_dim, dtype):
    generator = torch.Generator().manual_seed(head_dim)
    rows = 130 if head_dim == 64 else 70  # two tiles
    shapes = [(1, 8, rows, head_dim), (1, 1, 135, head_dim), (1, 1, 135, head_dim), (1, 8, rows, head_dim)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def options(name):
    generator = torch.Generator().manual_seed(1)
    modality = torch.randint(0, 3, (1, 27), generator=generator).repeat_interleave(5, 1)
    return {
        "plain": ("attention", {}),
        "causal": ("attention", {"is_causal": True}),
        "keys without rows": ("attention", {"window": (3, 0)}),
        "softcap": ("attention", {"softcap": 5.0}),
        "deterministic": ("attention", {"deterministic": True, "is_causal": True}),
        "groups apart": ("mmca_attention", {"modality": modality, "merge": "none", "deterministic": True}),
        "groups": ("mmca_attention", {"modality": modality, "merge": "lse"}),
    }[name]


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: f"sm{gpu[0]}x{gpu[1]}")
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    "name", ["plain", "causal", "keys without rows", "softcap", "deterministic", "groups apart", "groups"]
)
def test_every_shape(device, gpu, head_dim, name):
    dtype = (torch.bfloat16, torch.float16)[GPUS.index(gpu) % 2]
    op, kwargs = options(name)
    query, key, value, grad_out = tensors(head_dim, dtype)
    if kwargs.get("merge") == "none":
        grad_out = torch.stack((grad_out, grad_out.flip(-1)))
    case = given(op, query, key, value, grad_out, **kwargs)
    case.device = "emulated"
    device.order(RANDOM, head_dim)
    device.device(*gpu)
    actual = run_kernels(case)
    exact, standard = run_reference(case, torch.float64), run_reference(case, dtype)
    for result in ("dq", "dk", "dv"):
        error, limit = rms_error(actual[result], exact[result]), 2 * rms_error(standard[result], exact[result])
        assert error <= limit, f"{result}: RMS error {error:.3g}, twice the standard's {limit:.3g}"


def test_keys_without_rows_in_blocks_of_their_own(device):
    """Few rows, so that no blocks share a tile of keys: what no row sees has a gradient of zero."""
    shapes = (1, 2, 10, 64), (1, 1, 400, 64), (1, 1, 400, 64), (1, 2, 10, 64)
    query, key, value, grad_out = (randn(*shape, seed=i, dtype=torch.bfloat16) for i, shape in enumerate(shapes))
    case = given("attention", query, key, value, grad_out, window=(10, 0))
    check(case)
    actual = run_kernels(case)
    assert not actual["dk"][:, :, :380].any() and not actual["dv"][:, :, :380].any()
