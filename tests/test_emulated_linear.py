"""Linear attention's CUDA kernels on the emulated GPU, forward and backward, against the reference in fp64: a sample.
Heads of more than 512 writers are cut into segments where there are too few of them to fill the GPU."""

import emulated_device
import pytest
import torch
from cpp_suites import Unavailable
from devices import on
from emulator import BOUNDS, DESCENDING, RANDOM
from linear_cases import LinearCase, bounds, check, given, run_reference

from mmca_ext import reference
from mmca_ext.functional import LinearState, linear_attention

f32, f64 = torch.float32, torch.float64
SEEDS, BATCH = 600, 50
DTYPES = (f32, f64)
HALF = (torch.bfloat16, torch.float16)
# Multiprocessors: two heads are whole; some segments at a time; all segments at once.
GPUS = (1, 2, 100)


@pytest.fixture(scope="module", autouse=True)
def library():
    try:
        device = emulated_device.load()
    except Unavailable as reason:
        pytest.skip(str(reason))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with on("emulated"):
        yield device
    torch.set_num_threads(threads)
    device.reset()


@pytest.fixture
def device(library):
    yield library
    library.reset()


@pytest.fixture(autouse=True)
def unchecked_offsets(monkeypatch):
    monkeypatch.delenv("MMCA_EXT_VALIDATE", raising=False)


def randn(*shape, seed=0, dtype=f64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=f64).to(dtype)


def tensors(batch=1, heads=2, kv_heads=1, q_len=9, k_len=9, dim=8, value_dim=5, dtype=f32):
    """query, key, value, grad_out"""
    shapes = (heads, q_len, dim), (kv_heads, k_len, dim), (kv_heads, k_len, value_dim), (heads, q_len, value_dim)
    return [randn(batch, *shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def state_of(batch=1, kv_heads=1, dim=8, value_dim=5):
    return LinearState(randn(batch, kv_heads, dim, value_dim, seed=8), randn(batch, kv_heads, dim, seed=9).abs() + 0.5)


def everything(query, key, value, grad_out, state=None, **kwargs):
    """out, S, z, and the gradients of all inputs."""
    leaves = [t.detach().clone().requires_grad_() for t in (query, key, value, *(state or ()))]
    state = LinearState(*leaves[3:]) if state else None
    out, (S, z) = linear_attention(*leaves[:3], state=state, return_state=True, **kwargs)
    gradients = torch.autograd.grad((out, S, z), leaves, (grad_out, S.cos(), z.sin()))
    return [out, S, z, *gradients]


def same_bits(results, others):
    return all(torch.equal(a, b) for a, b in zip(results, others, strict=True))


def check_all(device, first, dtypes):
    """Each batch in an order of its own: on a GPU there is none."""
    device.order(RANDOM, first + 1)
    failures, count = [], 0
    for seed in range(first, first + BATCH):
        case = LinearCase(seed, device="emulated")
        if case.dtype not in dtypes:
            continue
        count += 1
        device.device(90, GPUS[seed % len(GPUS)])
        try:
            check(case)
        except AssertionError as failure:
            failures.append(str(failure))
    assert count
    assert not failures, f"{len(failures)} of {count} cases:\n\n" + "\n\n".join(failures[:5])


@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_kernels_are_the_reference(device, first):
    check_all(device, first, DTYPES)


LONG = {
    "many keys": {"kv_heads": 1, "heads": 1, "q_len": 20, "k_len": 1300},
    "many rows": {"kv_heads": 1, "heads": 7, "q_len": 330, "k_len": 170},
    "both": {"kv_heads": 2, "heads": 2, "q_len": 1100, "k_len": 1100},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("name", LONG)
def test_segments(device, name, is_causal, dtype):
    """Within the bound, and the same bits however many segments are in flight, in any order of blocks."""
    shape = LONG[name]
    rows = tensors(**shape, dtype=dtype)
    state = state_of(kv_heads=shape["kv_heads"])
    options = {"state": state, "is_causal": is_causal}
    if name == "many keys":
        options["key_mask"] = torch.arange(shape["k_len"])[None] % 5 != 0
    case = given(*rows, **options)
    results = []
    for multiprocessors in GPUS:
        device.device(90, multiprocessors)
        device.order(RANDOM, multiprocessors)
        results.append(everything(*rows, **options))
    check(case)
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


def test_errors_do_not_grow_with_the_position(device):
    """Values have a mean: the sums grow all along, and no errors cancel. Beside the CPU's kernels in fp64."""
    rows = tensors(heads=1, q_len=12_000, k_len=12_000)[:3]
    rows[2] += 1.0
    out, end = linear_attention(*rows, True, return_state=True)
    with on("cpu"):
        exact, exact_end = linear_attention(*(t.double() for t in rows), True, return_state=True)
    errors = [float(e.square().mean().sqrt()) for e in (out.double() - exact).split(1200, 2)]
    eps = torch.finfo(f32).eps
    assert max(errors[1:]) < 1.5 * errors[0] and errors[0] < 2 * eps, errors
    torch.testing.assert_close(tuple(end), tuple(exact_end), rtol=2 * eps, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_order_of_blocks_and_warps_changes_nothing(device, dtype):
    rows = tensors(batch=2, heads=4, kv_heads=2, q_len=70, k_len=90, dim=33, value_dim=70, dtype=dtype)
    options = {"is_causal": True, "state": state_of(2, 2, 33, 70)}
    first = everything(*rows, **options)
    for mode, seed in ((DESCENDING, 0), (RANDOM, 1), (RANDOM, 2), (RANDOM, 3)):
        device.order(mode, seed)
        assert same_bits(first, everything(*rows, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(256, 256), (256, 1), (1, 256), (97, 130)], ids=str)
@pytest.mark.parametrize("is_causal", [True, False])
def test_widths(device, dims, is_causal, dtype):
    device.device(86, 4)  # the least shared memory there is
    rows = tensors(q_len=37, k_len=41, heads=1, dim=dims[0], value_dim=dims[1], dtype=dtype)
    check(given(*rows, is_causal=is_causal, state=state_of(1, 1, *dims)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [[1] * 20, [40, 30], [0, 1, 31, 0, 32, 34]], ids=str)
def test_a_stream_is_one_call(device, lengths, dtype):
    """Steps of one token, chunks, and empty ones, through states in fp64."""
    rows = tensors(q_len=sum(lengths), k_len=sum(lengths), dtype=dtype)[:3]
    whole, end = linear_attention(*rows, True, return_state=True)
    parts, state = [], None
    for q, k, v in zip(*(t.split(lengths, 2) for t in rows), strict=True):
        out, state = linear_attention(q, k, v, True, state=state, return_state=True)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-5 if dtype == f32 else 1e-12, atol=1e-6)
    torch.testing.assert_close(tuple(state), tuple(end), rtol=1e-6 if dtype == f32 else 1e-13, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(9, 9), (5, 12), (12, 5)], ids=str)
@pytest.mark.parametrize("is_causal", [True, False])
def test_more_heads_than_run_at_once(device, lengths, is_causal, dtype):
    """Sixteen blocks a multiprocessor; the memory of their sums serves the next ones again."""
    q_len, k_len = lengths
    rows = tensors(6, 6, 3, q_len, k_len, 8, 33, dtype=dtype)
    mask = torch.arange(k_len) % 4 != torch.arange(6)[:, None] % 5
    options = {"is_causal": is_causal, "key_mask": mask, "state": state_of(6, 3, 8, 33)}
    device.device(90, 100)
    first = everything(*rows, **options)
    device.device(90, 1)
    check(given(*rows, **options))
    assert same_bits(first, everything(*rows, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbours_do_not_change_a_bit(device, dtype):
    """Alone, in a batch, or packed, where other sequences fill the GPU."""
    rows = tensors(3, 4, 2, 50, 50, 16, 9, dtype=dtype)
    together = everything(*rows, is_causal=True)
    for b in range(3):
        alone = everything(*(t[b : b + 1] for t in rows), is_causal=True)
        assert same_bits([t[0] for t in alone], [t[b] for t in together])
    packed = [t.transpose(1, 2).flatten(0, 1) for t in rows]
    offsets = torch.tensor([0, 50, 100, 150])
    results = everything(*packed, is_causal=True, cu_seqlens_q=offsets, cu_seqlens_k=offsets)
    for a, t in zip(results, together, strict=True):
        assert torch.equal(a if a.dim() != 3 or a.shape[0] == 3 else a.view(3, 50, *a.shape[1:]).transpose(1, 2), t)


# ---------------------------------------------------------------- what is hidden, and what cu_seqlens may hold


@pytest.mark.parametrize("is_causal", [True, False])
def test_hidden_keys_may_hold_anything(device, is_causal):
    query, key, value, grad_out = tensors(batch=2, q_len=40, k_len=45)
    mask = torch.rand(2, 45, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[1, :20] = False
    clean = everything(query, key, value, grad_out, is_causal=is_causal, key_mask=mask)
    key, value = (t.masked_fill(~mask[:, None, :, None], torch.nan) for t in (key, value))
    assert same_bits(clean, everything(query, key, value, grad_out, is_causal=is_causal, key_mask=mask))
    assert all(t.isfinite().all() for t in clean)


def test_values_that_no_row_sees_yet_may_hold_anything(device):
    """Causal: what is not finite reaches the rows from its own on, and no row before."""
    query, key, value, _ = tensors(q_len=70, k_len=70)
    value[0, 0, 40, 2] = torch.inf
    key[0, 0, 50, 1] = torch.nan
    out = linear_attention(query, key, value, True)
    before = linear_attention(*(t[:, :, :40] for t in (query, key, value)), True)
    assert torch.equal(before, out[:, :, :40]) and before.isfinite().all()
    assert (out[:, :, 40:50, 2] == torch.inf).all() and out[:, :, 50:].isnan().all()
    assert out[:, :, 40:50, [0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("first", [0, 31, 257, 600, 690])
def test_rows_before_the_first_key_are_zero_whatever_they_hold(device, first):
    query, key, value, grad_out = tensors(q_len=640, k_len=640, dim=3, value_dim=2)
    mask = torch.arange(640)[None] >= first
    check(given(query, key, value, grad_out, is_causal=True, key_mask=mask))
    query[:, :, :first] = torch.nan
    results = everything(query, key, value, grad_out, is_causal=True, key_mask=mask)
    assert not results[0][:, :, :first].any() and not results[3][:, :, :first].any()
    assert all(t.isfinite().all() for t in results)


def test_rows_that_see_nothing_are_zero(device):
    query, key, value, grad_out = tensors(q_len=60, k_len=20)
    results = everything(query, key, value, grad_out, is_causal=True)
    assert not results[0][:, :, :40].any() and not results[3][:, :, :40].any() and results[0][:, :, 40:].all()
    nothing = everything(query, key, value, grad_out, key_mask=torch.zeros(1, 20, dtype=torch.bool))
    assert not any(t.any() for t in nothing)


NONSENSE = [0, 5, 2, 10**12], [7, 3, -(2**62), 6], [0, 2, 2, 4000], [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", NONSENSE, ids=str)
@pytest.mark.parametrize("side", ["cu_seqlens_q", "cu_seqlens_k"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_offsets_of_any_value_are_survived(device, values, side, is_causal, dtype):
    """No access outside the tensors: the emulation would see it. Nobody waits to look at the values."""
    rows = [t[0].transpose(0, 1) for t in tensors(q_len=12, k_len=14, dtype=dtype)]
    options = {"cu_seqlens_q": torch.tensor([0, 3, 3, 12]), "cu_seqlens_k": torch.tensor([0, 5, 9, 13])}
    options |= {side: torch.tensor(values), "key_mask": torch.arange(14) % 3 != 1}
    assert all(t.isfinite().all() for t in everything(*rows, state=state_of(3), is_causal=is_causal, **options))


def test_every_kernel_has_run(library):
    for dtype in DTYPES:
        everything(*tensors(dtype=dtype))
    names = {"f32" if dtype == f32 else "f64" for dtype in DTYPES}
    for operation in ("linear_forward", "linear_backward"):
        for name, count in library.launches().items():
            if operation in name and name.rsplit(".", 1)[1] in names:
                assert count, name


# ---------------------------------------------------------------- 16 bits: tensor cores


@pytest.mark.parametrize("first", range(0, SEEDS // 2, BATCH))
def test_16_bits_are_the_reference(device, first):
    check_all(device, first, HALF)


PIECES = {
    "many keys": {"kv_heads": 2, "heads": 2, "q_len": 20, "k_len": 700},
    "many rows": {"kv_heads": 2, "heads": 6, "q_len": 330, "k_len": 170},
    "both": {"kv_heads": 2, "heads": 2, "q_len": 600, "k_len": 600},
}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("name", PIECES)
def test_pieces(device, name, is_causal, dtype):
    """Within the bound in however many pieces: one on a GPU of one multiprocessor, of 256 tokens on a large one."""
    shape = PIECES[name]
    rows = tensors(**shape, dtype=dtype)
    options = {"state": state_of(kv_heads=shape["kv_heads"]), "is_causal": is_causal}
    if name == "many keys":
        options["key_mask"] = torch.arange(shape["k_len"])[None] % 5 != 0
    results = []
    for multiprocessors in (1, 100):
        device.device(90, multiprocessors)
        device.order(RANDOM, multiprocessors)
        check(given(*rows, **options))
        results.append(everything(*rows, **options))
    assert not same_bits(*results)  # else both were one piece


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("is_causal", [True, False])
def test_16_bits_are_the_same_in_every_order(device, is_causal, dtype):
    rows = tensors(heads=4, kv_heads=2, q_len=100, k_len=300, dim=33, value_dim=70, dtype=dtype)
    options = {"is_causal": is_causal, "state": state_of(1, 2, 33, 70)}
    device.device(90, 100)
    first = everything(*rows, **options)
    for mode, seed in ((DESCENDING, 0), (RANDOM, 1), (RANDOM, 2)):
        device.order(mode, seed)
        assert same_bits(first, everything(*rows, **options))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("dims", [(256, 256), (256, 1), (1, 256), (64, 64), (97, 130)], ids=str)
@pytest.mark.parametrize("is_causal", [True, False])
def test_widths_of_16_bits(device, dims, is_causal, dtype):
    """Also on GPUs whose blocks have less than 100 KB of shared memory."""
    rows = tensors(q_len=137, k_len=141, heads=2, dim=dims[0], value_dim=dims[1], dtype=dtype)
    device.device(86, 4)
    check(given(*rows, is_causal=is_causal, state=state_of(1, 1, *dims)))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("lengths", [[1] * 20, [40, 70], [0, 1, 31, 0, 32, 34]], ids=str)
def test_a_stream_of_16_bits_is_as_exact_as_one_call(device, lengths, dtype):
    query, key, value, grad_out = tensors(q_len=sum(lengths), k_len=sum(lengths), dtype=dtype)
    case = given(query, key, value, grad_out, is_causal=True)
    exact = run_reference(case, f64)
    bound = bounds(case, exact)
    parts, state = [], None
    for q, k, v in zip(*(t.split(lengths, 2) for t in (query, key, value)), strict=True):
        out, state = linear_attention(q, k, v, True, state=state, return_state=True)
        parts.append(out)
    for name, found in {"out": torch.cat(parts, 2), "S": state.S, "z": state.z}.items():
        assert ((found.double() - exact[name]).abs() <= bound[name]).all(), name


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_errors_of_16_bits_do_not_grow_with_position(device, dtype):
    """Values with a mean, else the outputs themselves shrink."""
    query, key, value, _ = tensors(heads=1, q_len=6000, k_len=6000, dtype=dtype)
    value = value + 1.0
    device.device(90, 1)
    device.check_level(BOUNDS)
    out = linear_attention(query, key, value, True).double()
    parts = [slice(i, i + 500) for i in range(0, 6000, 500)]
    exact = torch.cat([exact_rows(query, key, value, rows) for rows in parts])
    alone = (exact.to(dtype).double() - exact).square()
    error = (out[0, 0] - exact).square()
    for first in (0, 1000, 5000):
        assert error[first : first + 1000].mean() < 1.5**2 * alone[first : first + 1000].mean()


def exact_rows(query, key, value, rows):
    key, value = (t[:, :, : rows.stop].double() for t in (key, value))
    return reference.linear_attention(query[:, :, rows].double(), key, value, True)[0, 0]


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_neighbours_do_not_change_a_bit_of_16(device, dtype):
    rows = tensors(3, 4, 2, 50, 50, 16, 9, dtype=dtype)
    together = everything(*rows, is_causal=True)
    for b in range(3):
        alone = everything(*(t[b : b + 1] for t in rows), is_causal=True)
        assert same_bits([t[0] for t in alone], [t[b] for t in together])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("is_causal", [True, False])
def test_hidden_keys_of_16_bits_may_hold_anything(device, is_causal, dtype):
    query, key, value, grad_out = tensors(batch=2, q_len=40, k_len=145, dtype=dtype)
    mask = torch.rand(2, 145, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[1, :120] = False
    clean = everything(query, key, value, grad_out, is_causal=is_causal, key_mask=mask)
    key, value = (t.masked_fill(~mask[:, None, :, None], torch.nan) for t in (key, value))
    query = query.clone()
    for i in range(40 if is_causal else 0):
        if not mask[1, : i + 106].any():
            query[1, :, i] = torch.nan  # sees nothing
    assert query.isnan().any() or not is_causal
    assert same_bits(clean, everything(query, key, value, grad_out, is_causal=is_causal, key_mask=mask))
    assert all(t.isfinite().all() for t in clean)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("values", NONSENSE, ids=str)
@pytest.mark.parametrize("side", ["cu_seqlens_q", "cu_seqlens_k"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_offsets_of_any_value_are_survived_in_16_bits(device, values, side, is_causal, dtype):
    test_offsets_of_any_value_are_survived(device, values, side, is_causal, dtype)


LARGE = {"keys": (0, 60000.0), "queries": (60000.0, 0), "small queries": (-60000.0, 0)}


@pytest.mark.parametrize("name", LARGE)
def test_large_features_of_float16(device, name):
    """Sums beyond 65504: of products, of weights and in the state."""
    query, key, value, grad_out = tensors(q_len=150, k_len=150, dim=16)
    query, key = query + LARGE[name][0], key + LARGE[name][1]
    rows = [t.to(torch.float16) for t in (query, key, 1000 * value, grad_out)]
    check(given(*rows, is_causal=True))


def test_every_kernel_of_16_bits_has_run(library):
    for dtype in HALF:
        everything(*tensors(dtype=dtype))
    for operation in ("linear_forward", "linear_backward"):
        for name in ("bf16", "f16"):
            assert library.launches()[f"cuda.sm80.{operation}.{name}"]


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_single_row_of_any_stride(device, dtype):
    """What arrives for one row is an odd number of elements from the next that there would be."""
    query, key, value, grad_out = tensors(q_len=1, k_len=20, value_dim=8, dtype=dtype)
    expected = everything(query, key, value, grad_out)
    as_columns = grad_out.as_strided(grad_out.shape, (16, 8, 1, 1))
    assert same_bits(expected, everything(query, key, value, as_columns))
