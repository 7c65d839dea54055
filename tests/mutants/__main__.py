"""Does every guard have a test that fails without it? Removes the guards one by one: `make mutants`.

    arguments   every TORCH_CHECK_* of csrc/torch (checks.py)
    kernels     the table of guards.py: a piece of csrc, what it becomes, and the tests that must notice (kernels.py)
    amx         likewise, for what only processors with AMX run
    python      every `raise` of the Python halves (raises.py)

All of it in copies of the tree under build/mutants. Prints one line for each: killed, and by which test, or SURVIVED;
exit status 1 if any survived. An hour or two for all; --only and the kinds take parts.

    python -m tests.mutants [arguments] [kernels] [amx] [python] [--only WORDS]
"""

import argparse
import sys
from pathlib import Path

from . import checks, kernels, raises
from .copies import ROOT, Copy

KINDS = {
    "arguments": checks.mutants,
    "kernels": kernels.portable,
    "amx": kernels.amx,
    "python": raises.mutants,
}


class Options(argparse.Namespace):
    def selects(self, label):
        return any(words in label for words in self.only.split(","))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="all by default")
    parser.add_argument("--folder", default=ROOT / "build" / "mutants", type=Path, help="where the copies are made")
    parser.add_argument("--trust", action="store_true", help="do not run the tests with every guard in its place first")
    parser.add_argument("--only", default="", help="guards whose line holds one of these, between commas")
    options = parser.parse_args(namespace=Options())
    kinds = options.kinds or KINDS
    if unknown := set(kinds) - KINDS.keys():
        parser.error(f"kinds are {', '.join(KINDS)}, got {', '.join(sorted(unknown))}")
    folder = options.folder.resolve()

    survivors, count = [], 0
    for kind in kinds:
        copy = Copy(folder / ("every_isa" if kind == "amx" else "portable"), portable=kind != "amx")
        copy.make()
        for label, by in KINDS[kind](copy, options):
            count += 1
            print(f"{label:90} {'SURVIVED' if by is None else by}", flush=True)
            if by is None or by.startswith("DOES NOT COMPILE"):
                survivors.append(label)
    print(f"{count} guards, {len(survivors)} survivors", *survivors, sep="\n  ")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
