"""The kernels against the reference in fp64: ten thousand seeded cases here, as many as asked for by `make fuzz`."""

import os

import accuracy
import cases
import devices
import pytest
import torch
from cases import Case, check, run_kernels

# The emulated GPU is some thousand times slower, and test_emulated_kernels.py has its own cases: the first tenth there.
CASES, BATCH = 1_000 if devices.current == "emulated" else 10_000, 100
MEASURED = 3_000 if devices.current == "emulated" else 6_000  # a hundred of each dtype and result
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


def first_case_with(name):
    """An ordinary one, of which that result is not zero."""
    for seed in range(5000):
        case = Case(seed)
        ordinary = case.dtype == torch.float32 and case.magnitude == 1.0 and case.kwargs.get("dropout_p", 0) < 0.6
        if ordinary and case.grads_arrive == "out":
            result = run_kernels(case).get(name)
            if result is not None and result.dtype == torch.float32 and result.abs().sum() > 1e-3:
                return case


@pytest.mark.parametrize("name", ["out", *cases.GRADIENTS.values()])
def test_the_check_can_fail(monkeypatch, name):
    """One result a hundredth off is found, and the message says where and how to repeat it."""
    case = first_case_with(name)
    check(case)

    def a_little_off(case):
        results = run_kernels(case)
        results[name] *= 1.01
        return results

    monkeypatch.setattr(cases, "run_kernels", a_little_off)
    repeat = rf"repeat: python tests/cases.py {case.seed} "
    with pytest.raises(AssertionError, match=rf"{name} is .* times its bound off at .*\n(.*\n)*{repeat}"):
        check(case)


@pytest.fixture(scope="module")
def measured():
    return accuracy.measure(range(MEASURED))


@pytest.mark.parametrize("dtype", accuracy.DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", accuracy.NAMES)
def test_errors_are_no_larger_than_the_standard_implementations(measured, dtype, name):
    """Accuracy promise: the geometric mean of our RMS error over the standard's is at most 1."""
    logarithms = measured[0][dtype, name]
    assert len(logarithms) > 100
    assert accuracy.geometric_mean(logarithms) <= 1.0, f"over {len(logarithms)} cases"


def test_no_single_case_is_past_twice_the_standard_and_the_bound(measured):
    assert not measured[1]


def test_accuracy_is_printed(capsys):
    accuracy.main(["300"])
    printed = capsys.readouterr().out
    assert all(str(dtype)[6:] in printed for dtype in accuracy.DTYPES) and "geometric mean" in printed
