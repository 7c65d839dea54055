"""What can go wrong for a user of the demo, told in one line."""

import importlib.util


class Problem(Exception):
    """Its text is for the user: the command line prints it without a traceback and exits with status 1."""


def require(**packages: str) -> None:
    """Checks that packages, as import name = distribution name, are installed."""
    missing = [name for module, name in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise Problem(f"needs {', '.join(missing)}: pip install mmca_ext[demo]")
