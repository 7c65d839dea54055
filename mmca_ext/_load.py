"""The one place that imports the compiled extension, and that explains why it cannot be imported."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_MARKER = b"MMCA_EXT_BUILD_INFO{"
_REBUILD = "run `pip install --no-build-isolation --force-reinstall --no-deps .` in mmca_ext's source tree"


def load() -> ModuleType:
    """Imports mmca_ext._C, or raises an ImportError of one line: what it was built for, what is here, what to do."""
    binary = _find_binary()
    built_for = read_build_info(binary)["torch"]
    # Compared before loading: a binary that meets another torch's ABI may well load, and then crash.
    if _release(built_for) != _release(torch.__version__):
        raise _error(f"built for torch {built_for}, but this is torch {torch.__version__}: {_REBUILD}")
    try:
        return importlib.import_module("mmca_ext._C")
    except ImportError as error:
        detail = " ".join(str(error).split())
        raise _error(f"built for torch {built_for}, but does not load here ({detail}): {_REBUILD}") from None


def read_build_info(binary: Path) -> dict[str, Any]:
    """The facts that setup.py put into a binary, read without loading it."""
    content = binary.read_bytes()
    start = content.find(_MARKER)
    if start < 0:
        raise _error(f"{binary} carries no build facts, so it is incomplete or not of this project: {_REBUILD}")
    start += len(_MARKER) - 1
    return json.loads(content[start : content.index(b"\0", start)])


def _find_binary() -> Path:
    spec = importlib.util.find_spec("mmca_ext._C")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin)
    others = sorted(path.name for path in Path(__file__).parent.glob("_C.*.so"))
    if others:
        version = ".".join(map(str, sys.version_info[:2]))
        raise _error(f"built for another Python ({', '.join(others)}), but this is Python {version}: {_REBUILD}")
    raise _error(f"not built (there is no mmca_ext/_C*.so): {_REBUILD}")


def _release(version: str) -> list[str]:
    """The part of torch's version that its C++ ABI goes with; CPU and CUDA builds of one release share it."""
    return version.split(".")[:2]


def _error(message: str) -> ImportError:
    # With the package's name in it, `python -m mmca_ext...` prints this error as one line and no traceback.
    return ImportError(f"mmca_ext._C: {message}", name="mmca_ext")
