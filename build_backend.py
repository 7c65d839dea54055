"""The setuptools build backend, told which torch to build against.

A C++ extension works only with the torch it was compiled against. A bare "torch" among the build requirements would
have pip fetch the newest one into its isolated build environment and compile against that. Isolation hides the
environment's own packages from sys.path, but `site` still knows where they are: a torch found there is the one to use,
and only where there is none does pip fetch the pinned one.
"""

import importlib.machinery
import site
import sys

from setuptools import build_meta
from setuptools.build_meta import build_sdist, get_requires_for_build_sdist  # noqa: F401 (part of this backend)

FALLBACK = "torch==2.13.0"


def find_torch():
    """True if torch can be imported, if need be from the packages that build isolation hides."""
    hidden = site.getsitepackages()
    if sys.prefix == sys.base_prefix:  # not in a virtual environment: `pip install --user` may have put it there
        hidden.append(site.getusersitepackages())
    if importable(None):
        return True
    for path in hidden:
        if importable([path]):
            sys.path.append(path)  # at the end: what pip put into the isolated environment goes first
            return True
    return False


def importable(path):
    spec = importlib.machinery.PathFinder.find_spec("torch", path)
    return spec is not None and spec.origin is not None  # no origin: a left-over folder without an __init__.py


def get_requires_for_build_wheel(config_settings=None):
    torch = [] if find_torch() else [FALLBACK]
    return build_meta.get_requires_for_build_wheel(config_settings) + torch


def prepare_metadata_for_build_wheel(*args, **kwargs):
    find_torch()
    return build_meta.prepare_metadata_for_build_wheel(*args, **kwargs)


def build_wheel(*args, **kwargs):
    find_torch()
    return build_meta.build_wheel(*args, **kwargs)


get_requires_for_build_editable = get_requires_for_build_wheel


def prepare_metadata_for_build_editable(*args, **kwargs):
    find_torch()
    return build_meta.prepare_metadata_for_build_editable(*args, **kwargs)


def build_editable(*args, **kwargs):
    find_torch()
    return build_meta.build_editable(*args, **kwargs)
