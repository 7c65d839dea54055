"""The kernels against the reference in fp64: ten thousand seeded cases here, as many as asked for by `make fuzz`."""

import math
import os

import cases
import pytest
import torch
from cases import Case, check, rms_error, run_kernels, run_reference

CASES, BATCH = 10_000, 100
FUZZ_BATCH = 1_000
FUZZ_CASES = int(os.environ.get("MMCA_EXT_FUZZ_CASES", 0))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors of a few elements: threads would only wait for each other. A case may ask for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check_all(seeds):
    failures = []
    for seed in seeds:
        try:
            check(Case(seed))
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


@pytest.mark.parametrize("name", ["out", "dq", "dk", "dv"])
def test_the_check_can_fail(monkeypatch, name):
    """One element a ten-thousandth off is found, and the message says where and how to repeat it."""
    case = Case(3)
    check(case)

    def a_little_off(case):
        results = run_kernels(case)
        results[name].select(3, 0).select(2, 0).sub_(1e-4 * results[name].abs().max())
        return results

    monkeypatch.setattr(cases, "run_kernels", a_little_off)
    with pytest.raises(
        AssertionError, match=rf"{name} is .* times its bound off at .*\n(.*\n)*repeat: python -m tests.cases 3 "
    ):
        check(case)


@pytest.fixture(scope="module")
def error_ratios():
    """RMS error over that of the standard (materialised, float32) implementation: name -> logarithms, over the cases.

    Scores of ordinary size: where they are hundreds, weights are 0 and 1, and an RMS error near 0 says nothing. For the
    same reason a result that the standard has all but exactly (a tenth of a rounding) is left out.
    """
    logarithms = {name: [] for name in ("out", "dq", "dk", "dv")}
    for seed in range(4000):
        case = Case(seed)
        if case.dtype != torch.float32 or case.integers or case.magnitude > 1.0 or not case.grad_out.numel():
            continue
        exact, standard = run_reference(case, torch.float64), run_reference(case, torch.float32)
        ours, zeros = run_kernels(case), {name: torch.zeros_like(t) for name, t in exact.items()}
        for name in exact.keys() & logarithms.keys():
            a, b = rms_error(ours[name], exact[name]), rms_error(standard[name], exact[name])
            rounding = torch.finfo(torch.float32).eps / 2 * rms_error(zeros[name], exact[name])
            if a > 0 and b > 0.1 * rounding:
                logarithms[name].append(math.log(a / b))
    return logarithms


@pytest.mark.parametrize("name", ["out", "dq", "dk", "dv"])
def test_errors_are_those_of_the_standard_implementation(error_ratios, name):
    """Accuracy promise: the geometric mean of our RMS error over the standard's is at most 1."""
    values = error_ratios[name]
    assert len(values) > 500
    mean = math.exp(sum(values) / len(values))
    deviation = torch.tensor(values).std().item() / math.sqrt(len(values))  # the cases are a sample
    assert math.log(mean) <= 3 * deviation, f"geometric mean {mean:.3f} over {len(values)} cases"
