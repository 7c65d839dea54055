"""The package as people get it: the sdist is the whole project, the wheel runs next to its torch and pulls no other,
and every way to get it wrong ends in one clear line.

`make packaging` (MMCA_EXT_PACKAGING=all) adds every way to build and install, which takes minutes and needs a package
index.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SITE = Path(torch.__file__).parents[1]
TORCH_PIN = "torch=={}.{}.*".format(*torch.__version__.split(".")[:2])

pytestmark = pytest.mark.packaging
thorough = pytest.mark.skipif(os.environ.get("MMCA_EXT_PACKAGING") != "all", reason="only in `make packaging`")

SMOKE = """
import importlib.metadata, mmca_ext, torch
assert mmca_ext.__version__ == importlib.metadata.version("mmca_ext")
qkv = torch.randn(3, 2, 4, 9, 16)
expected = torch.nn.functional.scaled_dot_product_attention(*qkv)
torch.testing.assert_close(mmca_ext.functional.attention(*qkv), expected)
print(mmca_ext.__file__)
"""


def run(*command, cwd=ROOT, check=True, **environment):
    """Runs a command as a person would who has not activated an environment and sets no Python variables."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | environment
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, text=True, capture_output=True, timeout=1800)
    if check and done.returncode != 0:
        pytest.fail(f"{command}: exit status {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done


class Environment:
    """A virtual environment that borrows torch, and what it needs, from the one the tests run in."""

    def __init__(self, path, with_torch=True):
        venv.create(path, with_pip=True)
        self.python = path / "bin" / "python"
        site = next(path.glob("lib/python*/site-packages"))
        if with_torch:
            for entry in site.iterdir():  # the setuptools that older versions of Python put there is too old
                if entry.is_dir() and not entry.name.startswith("pip"):
                    shutil.rmtree(entry)
            for entry in SITE.iterdir():
                ours = "mmca_ext" in entry.name or entry.name.endswith(".pth")
                if not ours and not (site / entry.name).exists():
                    (site / entry.name).symlink_to(entry)

    def pip(self, *arguments, **options):
        return run(self.python, "-m", "pip", "--no-cache-dir", *arguments, **options)

    def check(self, tmp_path):
        """What is installed here works, from outside the source tree, with one OpenMP runtime and its own torch."""
        location = run(self.python, "-c", SMOKE, cwd=tmp_path).stdout.strip()
        facts = json.loads(run(self.python, "-m", "mmca_ext.info", "--json", cwd=tmp_path).stdout)
        assert len(facts["openmp"]) == 1, facts["openmp"]
        assert facts["torch"]["built_against"].split(".")[:2] == facts["torch"]["running"].split(".")[:2]
        self.pip("check")
        return Path(location)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "--no-cache-dir", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, ROOT)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-c", f"import build_backend; build_backend.build_sdist({str(folder)!r})")
    (path,) = folder.glob("*.tar.gz")
    return path


def test_sdist_holds_every_file_of_the_repository(sdist):
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git clone")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard").stdout.splitlines()
    wanted = {name for name in listed if (ROOT / name).exists()}
    with tarfile.open(sdist) as archive:
        held = {member.name.split("/", 1)[1] for member in archive if member.isfile()}
    assert not wanted - held, "missing: see MANIFEST.in"
    assert not {name for name in held if name.endswith((".so", ".pyc", ".o"))}


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "mmca_ext").rglob("*.py")}
    extras = {"mmca_ext/py.typed", "mmca_ext/_C.pyi", "mmca_ext/_C" + sysconfig.get_config_var("EXT_SUFFIX")}
    assert {name for name in names if ".dist-info/" not in name} == modules | extras
    assert re.findall(r"^Requires-Dist: (torch\S*)$", metadata, re.MULTILINE) == [TORCH_PIN]
    assert wheel.stat().st_size < 20e6


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
def test_binary_needs_torch_and_the_system_only(wheel, tmp_path):
    """No libgomp of its own above all: two OpenMP runtimes in a process fight for the cores."""
    with zipfile.ZipFile(wheel) as archive:
        binary = archive.extract(next(n for n in archive.namelist() if n.endswith(".so")), tmp_path)
    needed = set(re.findall(r"\(NEEDED\).*\[(.*?)\.so", run("readelf", "-d", binary).stdout))
    system = {"libstdc++", "libm", "libgcc_s", "libc", "libdl", "librt", "libpthread"}
    needed = {name for name in needed - system if not name.startswith("ld-linux")}
    assert needed <= {"libc10", "libtorch", "libtorch_cpu", "libtorch_python"}


@pytest.fixture(scope="module")
def with_torch(tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("with_torch") / "env")


def test_wheel_runs_next_to_its_torch_and_pulls_no_other(wheel, with_torch, tmp_path):
    with_torch.pip("install", "--no-index", wheel)  # with its dependencies: all must be there already
    try:
        assert with_torch.check(tmp_path).is_relative_to(with_torch.python.parents[1])
    finally:
        with_torch.pip("uninstall", "-y", "mmca_ext")


# How a broken installation shows: `python -m mmca_ext.info` in a copy of the package with something wrong.

OWN_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


@pytest.fixture
def info_of_copy(with_torch, tmp_path):
    """Takes the binary's suffix and a change to its content; returns the one line that is printed."""
    import mmca_ext._C as extension

    def info(suffix=None, change=lambda content: content):
        package = shutil.copytree(ROOT / "mmca_ext", tmp_path / "mmca_ext", ignore=shutil.ignore_patterns("*.so"))
        if suffix:
            (package / f"_C{suffix}").write_bytes(change(Path(extension.__file__).read_bytes()))
        done = run(with_torch.python, "-m", "mmca_ext.info", cwd=tmp_path, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        return line

    return info


def test_not_built(info_of_copy):
    assert "not built" in info_of_copy()


def test_built_for_another_torch(info_of_copy):
    here = f'"torch": "{torch.__version__}"'
    other = '"torch": "1.99.' + "0" * (len(here) - len('"torch": "1.99."')) + '"'
    line = info_of_copy(OWN_SUFFIX, lambda content: content.replace(here.encode(), other.encode()))
    assert "built for torch 1.99" in line
    assert f"but this is torch {torch.__version__}" in line
    assert "pip install" in line


def test_built_for_another_python(info_of_copy):
    assert "built for another Python" in info_of_copy(".cpython-27-x86_64-linux-gnu.so")


def test_truncated_binary(info_of_copy):
    assert "carries no build facts" in info_of_copy(OWN_SUFFIX, lambda content: content[:100])


def test_unloadable_binary(info_of_copy):
    assert "does not load here" in info_of_copy(OWN_SUFFIX, lambda content: b"not ELF" + content[7:])


# How a build that cannot be done shows.


def failing_build(tmp_path, prelude="pass", **environment):
    code = f"import sys, runpy; {prelude}; sys.argv[:] = ['setup.py', 'build_ext', '-b', {str(tmp_path)!r}]; " + (
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    done = run(sys.executable, "-c", code, check=False, **environment)
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


def test_build_without_torch_is_one_clear_error(tmp_path):
    line = failing_build(tmp_path, "sys.modules['torch'] = None")
    assert line.startswith("error: mmca_ext is compiled against torch, which cannot be imported here")


def test_forced_cuda_without_a_compiler_is_an_error(tmp_path):
    line = failing_build(tmp_path, FORCE_CUDA="1", CUDA_HOME="/nowhere")
    assert line.startswith("error: FORCE_CUDA=1, but ")


# Every way to build and install (`make packaging`), from an unpacked sdist.


@pytest.fixture(scope="module")
def tree(sdist):
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent)
    return sdist.parent / sdist.name.removesuffix(".tar.gz")


PIP = ["-m", "pip", "--no-cache-dir"]
WAYS_TO_INSTALL = {
    "install": [*PIP, "install", "."],
    "install, no isolation": [*PIP, "install", "--no-build-isolation", "."],
    "editable": [*PIP, "install", "-e", "."],
    "editable, no isolation": [*PIP, "install", "--no-build-isolation", "-e", "."],
}
WAYS_TO_BUILD = {
    "pip wheel": [*PIP, "wheel", "--no-deps", "-w", "dist", "."],
    "pip wheel, no isolation": [*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", "dist", "."],
    "setup.py": ["setup.py", "bdist_wheel"],
    "build": ["-m", "build", "--wheel"],
    "build, no isolation": ["-m", "build", "--wheel", "--no-isolation"],
}


@thorough
@pytest.mark.parametrize("way", WAYS_TO_INSTALL)
def test_install(way, with_torch, tree, tmp_path):
    run(with_torch.python, *WAYS_TO_INSTALL[way], cwd=tree)
    try:
        location = with_torch.check(tmp_path)
        assert location.is_relative_to(tree) == way.startswith("editable")
    finally:
        with_torch.pip("uninstall", "-y", "mmca_ext")


@thorough
@pytest.mark.parametrize("way", WAYS_TO_BUILD)
def test_build(way, with_torch, tree, tmp_path):
    shutil.rmtree(tree / "dist", ignore_errors=True)
    run(with_torch.python, *WAYS_TO_BUILD[way], cwd=tree)
    (built,) = (tree / "dist").glob("*.whl")
    with_torch.pip("install", "--no-index", built)
    try:
        assert with_torch.check(tmp_path).is_relative_to(with_torch.python.parents[1])
    finally:
        with_torch.pip("uninstall", "-y", "mmca_ext")


@thorough
def test_install_where_there_is_no_torch(tree, tmp_path):
    """pip fetches the pinned torch to build against and, for what it asks for, the same to run with."""
    environment = Environment(tmp_path / "env", with_torch=False)
    refused = environment.pip("install", "--no-build-isolation", ".", cwd=tree, check=False)
    assert refused.returncode != 0
    environment.pip("install", ".", cwd=tree)
    environment.check(tmp_path)
