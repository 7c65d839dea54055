"""Building the C++ suites (tests/cpp, bench/cpp) with CMake, and asking a GoogleTest binary for its cases."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Unavailable(Exception):
    """Something outside the project is missing: a reason to skip, not to fail."""


def run(*command, timeout, env=None):
    return subprocess.run(
        [str(part) for part in command],
        timeout=timeout,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
    )


def build(source, folder):
    """Builds the suite, or what changed of it. Raises Unavailable, or RuntimeError with the compiler's words."""
    if shutil.which("cmake") is None:
        raise Unavailable("cmake is not installed")
    generator = ["-G", "Ninja"] if shutil.which("ninja") and not (folder / "CMakeCache.txt").exists() else []
    configured = run("cmake", "-S", source, "-B", folder, *generator, timeout=300)
    if configured.returncode != 0:
        if "GoogleTest is not installed" in configured.stdout:
            raise Unavailable("GoogleTest is not installed (Debian: libgtest-dev) and could not be fetched")
        raise RuntimeError(configured.stdout)
    built = run("cmake", "--build", folder, "--parallel", timeout=1200)
    if built.returncode != 0:
        raise RuntimeError(built.stdout)


def list_cases(binary):
    names, suite = [], ""
    for line in run(binary, "--gtest_list_tests", timeout=60).stdout.splitlines():
        name = line.split("#")[0].rstrip()  # what follows "#" describes a parameter
        if line.startswith("  "):
            names.append(suite + name.strip())
        elif name.endswith("."):
            suite = name
    return names
