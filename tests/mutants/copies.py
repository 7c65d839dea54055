"""A copy of the tree to mutate, build and test in."""

import os
import re
import subprocess
import sys
from pathlib import Path

from . import checks

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = (".py", ".pyi", ".cpp", ".h", ".toml", ".md", ".txt", ".typed", "")


class Copy:
    """`portable`: without the kernels of one instruction set, which take minutes to compile."""

    def __init__(self, folder, portable=True):
        self.folder = folder
        self.portable = portable
        self.checks = []  # their names: checks.py

    def make(self):
        self.checks.clear()
        wanted = {self.write("csrc/guards.h", checks.HEADER)}
        names = ("setup.py", "cuda_compiler.py", "pyproject.toml", "build_backend.py", "README.md", "LICENSE")
        sources = [p for folder in ("csrc", "mmca_ext", "tests") for p in sorted((ROOT / folder).rglob("*"))]
        for path in [*sources, *(ROOT / name for name in names)]:
            name = path.relative_to(ROOT)
            if path.suffix not in SUFFIXES or path.is_dir() or name.parts[:2] == ("csrc", "cuda"):
                continue
            if self.portable and re.search(r"(isa|simd)_(avx|amx|neon)|^amx_", path.name):
                continue
            text = path.read_text()
            if self.portable and name.parts[0] == "csrc":
                text = text.replace("#if defined(__x86_64__)", "#if 0").replace("#if defined(__aarch64__)", "#if 0")
            wanted.add(self.write(name, checks.numbered(name, text, self.checks)))
        for folder in ("csrc", "mmca_ext", "tests"):  # what is no longer there
            for path in (self.folder / folder).rglob("*"):
                if path.is_file() and path not in wanted and path.suffix in (".py", ".cpp", ".h"):
                    path.unlink()

    def write(self, name, text):
        path = self.folder / name
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return path

    def run(self, *command, timeout, **environment):
        path = os.pathsep.join((str(self.folder), str(self.folder / "tests")))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **environment}
        environment.setdefault("OMP_NUM_THREADS", "1")
        command = [sys.executable, *command]
        return subprocess.run(
            command, cwd=self.folder, env=environment, timeout=timeout, text=True, capture_output=True
        )

    def build(self):
        """None, or what the compiler says."""
        done = self.run("setup.py", "build_ext", "--inplace", timeout=1800, FORCE_CUDA="0")
        return None if done.returncode == 0 else (done.stdout + done.stderr)[-3000:]

    def killer(self, tests, *options, **environment):
        """The first test that fails, or None."""
        arguments = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not packaging and not fuzz", *options, *tests]
        try:
            done = self.run("-m", "pytest", *arguments, timeout=1800, **environment)
        except subprocess.TimeoutExpired:
            return "it hangs"
        if done.returncode == 0:
            return None
        if failed := re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE):
            return failed[1]
        if done.returncode in (4, 5):
            raise SystemExit(f"no such tests: {' '.join(arguments)}\n{done.stderr[-1000:]}")
        return f"exit status {done.returncode}" if done.returncode < 0 else done.stdout[-300:]

    def must_build(self):
        if complaint := self.build():
            raise SystemExit(complaint)

    def require_passing(self, tests, options, *pytest_options):
        """With every guard in its place."""
        if not options.trust and (failed := self.killer(tests, *pytest_options)):
            raise SystemExit(f"a test fails with every guard in its place: {failed}")
