"""Builds mmca_ext._C: the torch-free kernels (csrc/core, csrc/cpu, csrc/cuda) and their binding to torch (csrc/torch).

What can be declared is declared in pyproject.toml. Here is what must be found out: the torch to build against, the CUDA
compiler, and the facts that the binary carries about its own build.

Environment: FORCE_CUDA (1: CUDA or an error, 0: never), CUDA_HOME, TORCH_CUDA_ARCH_LIST, NVCC_THREADS, MAX_JOBS,
PYTORCH_NVCC; MMCA_EXT_STRICT=1: a CUDA kernel that spills registers is an error (cuda_compiler.py).
"""

import json
import os
import re
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:  # an sdist or the metadata can do without; compiling cannot, and says so below
    torch, why_no_torch = None, error

ROOT = Path(__file__).resolve().parent
GENERATED = "build_info.cpp"

# No -m flags: the binary runs on any machine of its architecture, and a kernel file that needs more says so itself
# (`#pragma GCC target`). -std=c++20 is what torch's headers ask for; csrc/CMakeLists.txt holds the kernels to C++17.
CXX_FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-g0", "-fvisibility=hidden", "-fno-math-errno"]
# What ptxas warns of and how many registers it takes go to cuda_compiler.py, which fails where a kernel spills.
NVCC_FLAGS = ["-O3", "-std=c++17", "-lineinfo", "--expt-relaxed-constexpr"]
NVCC_FLAGS += ["-Xcompiler=-fvisibility=hidden,-fno-math-errno"]
NVCC_FLAGS += ["-Xptxas", "-v,--warn-on-spills,--warn-on-local-memory-usage"]
# 9.0a, not 9.0: wgmma and setmaxnreg exist only there, but no later GPU runs it. nvcc knows 10.0 from 12.8 on.
CUDA_ARCHS, CUDA_ARCHS_BEFORE_12_8 = "8.0;9.0a;10.0+PTX", "8.0;9.0a;9.0+PTX"

# Linked without -fopenmp, so that the OpenMP symbols come from the one runtime torch has loaded, never from a second
# one. -z now: a symbol that is nowhere fails the import, not the first call.
LINK_FLAGS = ["-Wl,-z,now"]


def sources(*patterns):
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def find_cuda_toolkit():
    """The toolkit to compile csrc/cuda with, or None for a CPU build; either way one line that says which, and why.

    Decided by what can be compiled, never by a visible GPU: build machines seldom have one.
    """
    force = os.environ.get("FORCE_CUDA")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        candidates = [Path(home)]
    else:  # nvcc on the PATH may be a wrapper that lives elsewhere
        nvcc = shutil.which("nvcc")
        candidates = [Path(nvcc).resolve().parents[1]] * bool(nvcc) + [Path("/usr/local/cuda")]
    toolkit = next((c for c in candidates if (c / "bin/nvcc").exists() and (c / "include/cuda.h").exists()), None)

    if force == "0":
        missing = "FORCE_CUDA=0"
    elif not sources("csrc/cuda/**/*.cu"):
        missing = "this tree has no CUDA kernels"
    elif toolkit is None:
        missing = f"no nvcc in CUDA_HOME={home}" if home else "no nvcc found; set CUDA_HOME if there is one"
    else:
        print(f"mmca_ext: CUDA kernels for {cuda_archs(toolkit)} with {toolkit}", flush=True)
        return toolkit
    if force == "1":
        raise SetupError(f"FORCE_CUDA=1, but {missing}")
    print(f"mmca_ext: CPU kernels only ({missing})", flush=True)
    return None


def cuda_version(toolkit):
    """(major, minor)"""
    number = int(re.search(r"#define CUDA_VERSION (\d+)", (toolkit / "include/cuda.h").read_text())[1])
    return number // 1000, number % 1000 // 10


def cuda_archs(toolkit):
    ours = CUDA_ARCHS if cuda_version(toolkit) >= (12, 8) else CUDA_ARCHS_BEFORE_12_8
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or ours


def git_commit():
    """The commit checked out here, read from the files of .git; None outside a clone."""
    try:
        git = ROOT / ".git"
        if git.is_file():  # a worktree
            git = ROOT / git.read_text().removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        if (git / "commondir").exists():
            git = git / (git / "commondir").read_text().strip()
        ref = head.removeprefix("ref: ")
        if (git / ref).exists():
            return (git / ref).read_text().strip()
        packed = re.search(rf"^(\w+) {re.escape(ref)}$", (git / "packed-refs").read_text(), re.MULTILINE)
        return packed and packed[1]
    except OSError:
        return None


def build_info_source(facts):
    """C++ that defines mmca::build_info_json(). The compiler names itself; mmca_ext/_load.py finds the facts by their
    marker, in a binary that it then need not load."""
    marker, head = "MMCA_EXT_BUILD_INFO", json.dumps(facts)[:-1]
    return f"""// Generated by setup.py.
#include "torch/build_info.h"
#ifdef __clang__
#define COMPILER __VERSION__
#else
#define COMPILER "gcc " __VERSION__
#endif
namespace mmca {{
static const char info[] = "{marker}" R"json({head}, "compiler": ")json" COMPILER R"json("}})json";
const char* build_info_json() {{ return info + {len(marker)}; }}
}}  // namespace mmca
"""


def write_if_changed(path, text):
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def is_stale(compiled):
    """Whether a header that a CUDA object was made from has changed. torch's ninja rules see to it only if torch itself
    has CUDA; else cuda_compiler.py leaves the list."""
    rule = Path(f"{compiled}.d")
    if not rule.exists():
        return torch.version.cuda is None
    made = compiled.stat().st_mtime
    files = [Path(name) for name in rule.read_text().replace("\\\n", " ").split(" : ", 1)[1].split()]
    return not all(file.exists() and file.stat().st_mtime <= made for file in files)


class BuildExtension(cpp_extension.BuildExtension if torch else build_ext):
    def finalize_options(self):
        super().finalize_options()
        # One folder of objects per interpreter and torch, shared by every way to build (an editable install would use
        # a temporary one): a rebuild compiles what changed and nothing else.
        if torch:
            platform = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
            self.build_temp = f"build/objects-{platform}-torch{torch.__version__}"

    def run(self):
        if torch is None:
            raise SetupError(
                f"mmca_ext is compiled against torch, which cannot be imported here ({why_no_torch}): install torch, "
                "then build with `pip install --no-build-isolation .`"
            )
        os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")  # ninja, in an environment not activated
        super().run()

    def build_extensions(self):
        (extension,) = self.extensions
        extension.extra_compile_args = {"cxx": list(CXX_FLAGS), "nvcc": list(NVCC_FLAGS)}
        extension.extra_link_args = list(LINK_FLAGS)
        toolkit = find_cuda_toolkit()
        if toolkit:
            self.add_cuda(extension, toolkit)
        facts = {
            "version": self.distribution.get_version(),
            "torch": str(torch.__version__),
            "python": sysconfig.get_python_version(),
            "flags": " ".join(CXX_FLAGS),
            "cuda": toolkit and "{}.{}".format(*cuda_version(toolkit)),
            "cuda_archs": toolkit and cuda_archs(toolkit),
            "commit": git_commit(),
        }
        generated = Path(self.build_temp) / GENERATED
        write_if_changed(generated, build_info_source(facts))
        extension.sources.append(str(generated))
        super().build_extensions()

    def add_cuda(self, extension, toolkit):
        """Needs nothing of torch's CUDA build (the binding takes devices and streams from c10's generic interface), so
        that one binary serves CPU and CUDA builds of torch."""
        for compiled in Path(self.build_temp, "csrc/cuda").rglob("*.o"):
            if is_stale(compiled):
                compiled.unlink()
        nvcc = shlex.split(os.environ.get("PYTORCH_NVCC", str(toolkit / "bin/nvcc")))
        os.environ["PYTORCH_NVCC"] = shlex.join([sys.executable, str(ROOT / "cuda_compiler.py"), *nvcc])
        cpp_extension.CUDA_HOME = str(toolkit)
        os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_archs(toolkit)
        extension.sources += sources("csrc/cuda/**/*.cu", "csrc/cuda/**/*.cpp")
        extension.include_dirs.append(str(toolkit / "include"))
        extension.library_dirs += [str(toolkit / "lib64"), str(toolkit / "lib")]
        extension.libraries += ["cudart_static", "rt", "dl", "pthread"]
        extension.extra_link_args.append("-Wl,--exclude-libs,ALL")
        extension.extra_compile_args["cxx"].append("-DMMCA_EXT_WITH_CUDA")
        extension.extra_compile_args["nvcc"] += ["--threads", os.environ.get("NVCC_THREADS", "1")]


class BuildPython(build_py):
    def run(self):
        # The wheel is whatever lies in build_lib, so modules deleted since the last build must not lie there still.
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def make_extension():
    files = sources("csrc/core/**/*.cpp", "csrc/cpu/**/*.cpp", "csrc/torch/**/*.cpp")
    make = cpp_extension.CppExtension if torch else Extension
    return make("mmca_ext._C", files, include_dirs=[str(ROOT / "csrc")])


def requirements():
    """The wheel fits the torch it was built against, up to the patch release, and asks for no other."""
    if torch is None:
        return ["einops", "torch"]
    major, minor = torch.__version__.split(".")[:2]
    return ["einops", f"torch=={major}.{minor}.*"]


setup(
    ext_modules=[make_extension()],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
    install_requires=requirements(),
)
