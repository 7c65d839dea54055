"""The C++ suite of the torch-free core (tests/cpp, GoogleTest): built once, shown and run case by case."""

import functools
import subprocess

import pytest
from cpp_suites import ROOT, Unavailable, build, list_cases, run

BUILD = ROOT / "build" / "cpp"
BINARY = BUILD / "mmca_core_tests"

pytestmark = pytest.mark.cpp


@functools.cache
def cases():
    build(ROOT / "tests/cpp", BUILD)
    return list_cases(BINARY)


def pytest_generate_tests(metafunc):
    try:
        parameters = cases()
    except Unavailable as reason:
        parameters = [pytest.param(None, id="unavailable", marks=pytest.mark.skip(reason=str(reason)))]
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        parameters = [pytest.param(error, id="build")]
    metafunc.parametrize("case", parameters)


def test_cpp(case):
    if isinstance(case, Exception):
        pytest.fail(f"the C++ suite does not build:\n{case}", pytrace=False)
    done = run(BINARY, f"--gtest_filter={case}", timeout=600)
    if done.returncode != 0:
        pytest.fail(f"exit status {done.returncode}\n{done.stdout}", pytrace=False)
    if "[  SKIPPED ]" in done.stdout:
        pytest.skip(done.stdout.split("[ RUN      ]")[1].split("[  SKIPPED ]")[0].strip())
    assert "[  PASSED  ] 1 test." in done.stdout, done.stdout
