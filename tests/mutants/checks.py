"""Every TORCH_CHECK_* of csrc/torch, each behind a number that MMCA_GUARD_OFF switches off: compiled once."""

import re

from .guards import FAULTS

CHECK = re.compile(r"\b(TORCH_CHECK_\w+)\((?!\.\.\.)")
TESTS = [
    FAULTS + "test_arguments.py",
    FAULTS + "test_autograd.py",
    FAULTS + "test_linear.py",
    "tests/test_bad_input.py",
    "tests/test_bad_packing.py",
]
HEADER = """#pragma once
#include <c10/util/Exception.h>
#include <cstdlib>
inline bool mmca_guard_is_off(int number) {
  const char* off = std::getenv("MMCA_GUARD_OFF");
  return off && std::atoi(off) == number;
}
#define MMCA_GUARD(check, number, condition, ...) check(mmca_guard_is_off(number) || (condition), __VA_ARGS__)
"""


def numbered(name, text, labels):
    """A source with each of its checks behind its number; `labels` takes their names."""
    if name.parts[:2] != ("csrc", "torch") or name.suffix != ".cpp" or name.name == "cuda.cpp":
        return text

    def number(match):
        line = text.count("\n", 0, match.start()) + 1
        condition = re.split(r",\s|\n", text[match.end() : match.end() + 200].strip())[0]
        kind = match[1].removeprefix("TORCH_CHECK_").lower()
        labels.append(f"{name.name}:{line} {kind} {condition}")
        return f"MMCA_GUARD({match[1]}, {len(labels)}, "

    guarded = CHECK.sub(number, text)
    # Else the compiler concludes from the end of that function that the check cannot be off.
    guarded = guarded.replace('bfloat16 or float16, got ", type);', 'bfloat16 or float16, got ", type); return {};')
    return '#include "guards.h"\n#line 1\n' + guarded


def mutants(copy, options):
    copy.must_build()
    copy.require_passing(TESTS, options)
    for number, label in enumerate(copy.checks, 1):
        if options.selects(label):
            yield label, copy.killer(TESTS, MMCA_GUARD_OFF=str(number))
