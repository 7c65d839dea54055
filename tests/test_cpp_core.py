"""The C++ suite of the torch-free core (tests/cpp, GoogleTest): built once, shown and run case by case."""

import functools
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "cpp"
BINARY = BUILD / "mmca_core_tests"

pytestmark = pytest.mark.cpp


class Unavailable(Exception):
    """Something outside the project is missing: a reason to skip, not to fail."""


def run(*command, timeout):
    return subprocess.run(
        command, timeout=timeout, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
    )


@functools.cache
def cases():
    """Builds the suite, or what changed of it, and asks the binary for its cases."""
    if shutil.which("cmake") is None:
        raise Unavailable("cmake is not installed")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configured = run("cmake", "-S", str(ROOT / "tests/cpp"), "-B", str(BUILD), *generator, timeout=300)
    if configured.returncode != 0:
        if "GoogleTest is not installed" in configured.stdout:
            raise Unavailable("GoogleTest is not installed (Debian: libgtest-dev) and could not be fetched")
        raise RuntimeError(configured.stdout)
    built = run("cmake", "--build", str(BUILD), "--parallel", timeout=1200)
    if built.returncode != 0:
        raise RuntimeError(built.stdout)

    names, suite = [], ""
    for line in run(str(BINARY), "--gtest_list_tests", timeout=60).stdout.splitlines():
        name = line.split("#")[0].rstrip()  # what follows "#" describes a parameter
        if line.startswith("  "):
            names.append(suite + name.strip())
        elif name.endswith("."):
            suite = name
    return names


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
    done = run(str(BINARY), f"--gtest_filter={case}", timeout=600)
    if done.returncode != 0:
        pytest.fail(f"exit status {done.returncode}\n{done.stdout}", pytrace=False)
    if "[  SKIPPED ]" in done.stdout:
        pytest.skip(done.stdout.split("[ RUN      ]")[1].split("[  SKIPPED ]")[0].strip())
    assert "[  PASSED  ] 1 test." in done.stdout, done.stdout
