"""Does every guard have a test that fails without it? Removes the guards one by one: `make mutants`, 20 to 40 minutes.

Three kinds, all in one copy of the package under build/mutants, with the portable kernels alone:

    arguments   every TORCH_CHECK_* of csrc/torch: compiled once, each behind a number that MMCA_GUARD_OFF switches off
    kernels     the list below: a piece of csrc, what it becomes, and the tests that must notice; compiled one by one
    python      every `raise` of the Python halves, replaced by `pass`

Prints one line for each: killed, and by which test, or SURVIVED; exit status 1 if any survived.

    python tests/mutants.py [arguments] [kernels] [python] [--only WORDS]
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build" / "mutants"
CHECK = re.compile(r"\b(TORCH_CHECK_\w+)\((?!\.\.\.)")
FAULTS = "tests/faults/"


@dataclass
class Mutant:
    name: str
    tests: list
    file: str = ""
    old: str = ""
    new: str = ""


# ---------------------------------------------------------------- the guards of csrc/torch

GUARD_HEADER = """#pragma once
#include <c10/util/Exception.h>
#include <cstdlib>
inline bool mmca_guard_is_off(int number) {
  const char* off = std::getenv("MMCA_GUARD_OFF");
  return off && std::atoi(off) == number;
}
#define MMCA_GUARD(check, number, condition, ...) check(mmca_guard_is_off(number) || (condition), __VA_ARGS__)
"""
BAD_INPUT = [FAULTS + "test_arguments.py", FAULTS + "test_autograd.py", "tests/test_bad_input.py"]


def with_numbered_checks(text, guards, path):
    """The source with every check behind its number; `guards` takes their names."""

    def number(match):
        line = text.count("\n", 0, match.start()) + 1
        condition = re.split(r",\s|\n", text[match.end() : match.end() + 200].strip())[0]
        guards.append(f"{path.name}:{line} {match[1].removeprefix('TORCH_CHECK_').lower()} {condition}")
        return f"MMCA_GUARD({match[1]}, {len(guards)}, "

    return '#include "guards.h"\n#line 1\n' + CHECK.sub(number, text)


# ---------------------------------------------------------------- the guards of the kernels

NAN, EMPTY, EXTREME = (FAULTS + f"test_{name}.py" for name in ("nan_and_inf", "empty_rows", "extreme_numbers"))
LIMITS, SUBSETS, RANDOM = (FAULTS + f"test_{name}.py" for name in ("limits", "gradient_subsets", "randomness"))
REPEAT, PROCESS, LAYOUT = (FAULTS + f"test_{name}.py" for name in ("determinism", "process", "memory_layout"))
FORWARD, BACKWARD, SOFTMAX, SMALL = (f"csrc/cpu/{name}.h" for name in ("forward", "backward", "softmax", "small"))
PLAN, SCHEDULE = "csrc/core/plan.cpp", "csrc/cpu/schedule.cpp"

KERNELS = [
    Mutant("zero_non_finite", [NAN], "csrc/cpu/pack.h", "if (!is_finite(panels[i])) panels[i] = T(0);", ";"),
    Mutant("add_non_finite", [NAN], "csrc/cpu/pack.h", "if (!is_finite(row[d])) out[d] += weight * row[d];", ";"),
    Mutant(
        "forward: values that are not finite are noticed",
        [NAN],
        FORWARD,
        "values_finite_ = is_finite(S::reduce_add(finite));\n      if (!values_finite_) zero",
        "values_finite_ = true;\n      if (!values_finite_) zero",
    ),
    Mutant(
        "forward: non-finite values are added back",
        [NAN],
        FORWARD,
        "if (!values_finite_) add_hidden_non_finite(group, block, rows, first, keys, live);",
        "",
    ),
    Mutant(
        "forward: only for the rows that see them",
        [NAN],
        FORWARD,
        " && visibility.sees(begin_ + block + r, first + c))",
        ")",
    ),
    Mutant("few rows: sums are looked at", [NAN], FORWARD, "if (values_finite_) return;", "return;"),
    Mutant("few rows: sums are taken again", [NAN], FORWARD, "std::copy_n(before_, elements, out);", ""),
    Mutant(
        "few rows: copies without NaN",
        [NAN],
        FORWARD,
        "zero_non_finite(copy, padded_value_dim_);",
        "",
    ),
    Mutant(
        "forward: maximum of a row that sees nothing",
        [EMPTY],
        FORWARD,
        "maximum[r] = best == -infinity<T> ? T(0) : best;",
        "maximum[r] = best;",
    ),
    Mutant(
        "forward: divisor of a row that sees nothing",
        [EMPTY],
        FORWARD,
        "S::broadcast(l == T(0) ? T(1) : l)",
        "S::broadcast(l)",
    ),
    Mutant(
        "forward: hidden scores",
        [EMPTY, NAN],
        FORWARD,
        "if (tile == Visibility::some)\n            visibility.hide",
        "if (false)\n            visibility.hide",
    ),
    Mutant(
        "forward: tiles that nobody sees",
        [EMPTY],
        FORWARD,
        "if (tile == Visibility::none) continue;",
        "",
    ),
    Mutant(
        "a smallest number is no -inf",
        [EMPTY],
        SOFTMAX,
        "natural ? maximum + log2_sum * ln_2 : lse2 * ln_2",
        "lse2 * ln_2",
    ),
    Mutant("forward: not before a backward", [REPEAT], FORWARD, " && !problem_.lse_low.data;", ";"),
    Mutant("small: hidden scores", [EMPTY, NAN], SMALL, "hide<registers>(weights, -infinity<T>);", ""),
    Mutant(
        "small: maximum of a row that sees nothing",
        [EMPTY],
        SMALL,
        "S::select_less(S::broadcast(-infinity<T>), best[x], best[x], S::zero())",
        "best[x]",
    ),
    Mutant(
        "small: divisor of a row that sees nothing",
        [EMPTY],
        SMALL,
        "S::select_less(l[x], S::broadcast(T(0.5)), S::broadcast(T(1)), l[x])",
        "l[x]",
    ),
    Mutant(
        "small: copies without NaN",
        [NAN],
        SMALL,
        "if (all) return as_they_are;",
        "return as_they_are;",
    ),
    Mutant(
        "small: non-finite values are added back",
        [NAN],
        SMALL,
        "if (value_ != values_as_they_are_) add",
        "if (false) add",
    ),
    Mutant(
        "small: non-finite keys are added back", [NAN], SMALL, "if (key_ != keys_as_they_are_) add", "if (false) add"
    ),
    Mutant("small: only for the rows that see them", [NAN], SMALL, "if (sees(first + r, c))", "if (true)"),
    Mutant("small: hidden products with values", [NAN], SMALL, "hide<registers>(grads, T(0));\n\n", "\n\n"),
    Mutant(
        "small: hidden weights of a row with NaN",
        [NAN],
        SMALL,
        "hide<registers>(weights, T(0)), hide<registers>(grads, T(0));",
        "hide<registers>(grads, T(0));",
    ),
    Mutant(
        "small: hidden gradients of a row with NaN",
        [NAN],
        SMALL,
        "hide<registers>(weights, T(0)), hide<registers>(grads, T(0));",
        "hide<registers>(weights, T(0));",
    ),
    Mutant("small: rows without NaN", [NAN], SMALL, "finite = false, zero_non_finite(panel, feature_panel);", ";"),
    Mutant("small: non-finite rows are added back", [NAN], SMALL, "!finite && r < count_", "false && r < count_"),
    Mutant("small: only to the keys that they see", [NAN], SMALL, "if (sees(r, c))", "if (true)"),
    Mutant("weighted", [NAN], SOFTMAX, "return weight == T(0) ? T(0) : weight * x;", "return weight * x;"),
    Mutant(
        "an only group has weight 1",
        [EXTREME, EMPTY, NAN],
        SOFTMAX,
        "if (lse2[1 - g] == -infinity<double>) {",
        "if (false) {",
    ),
    Mutant("clamp of SplitLse", [EXTREME], SOFTMAX, "high = std::clamp(high, -largest, largest);", ";"),
    Mutant(
        "low part of an empty row",
        [EMPTY, LIMITS],
        SOFTMAX,
        "if (lse == -infinity<T>) return T(0);",
        "",
    ),
    Mutant(
        "weights are at most 1",
        [EXTREME],
        SOFTMAX,
        "p[u] = S::min(S::zero(), S::sub(exponent, rest));",
        "p[u] = S::sub(exponent, rest);",
    ),
    Mutant(
        "whole rows: maximum of one that sees nothing",
        [EMPTY],
        SOFTMAX,
        "S::broadcast(maximum == -infinity<T> ? T(0) : maximum)",
        "S::broadcast(maximum)",
    ),
    Mutant(
        "whole rows: divisor of one that sees nothing",
        [EMPTY],
        SOFTMAX,
        "const T divisor = total == T(0) ? T(1) : total;",
        "const T divisor = total;",
    ),
    Mutant(
        "whole rows: say when they are not finite",
        [NAN],
        SOFTMAX,
        "return is_finite(total) && is_finite(offset);",
        "return true;",
    ),
    Mutant(
        "backward: hidden scores",
        [EMPTY, NAN],
        BACKWARD,
        "visibility_.hide<width>(first_entry, count, strip_rows, key, visible, scores, stride, -infinity<T>);",
        "",
    ),
    Mutant(
        "backward: tiles that nobody sees",
        [EMPTY],
        BACKWARD,
        "std::fill_n(scores + r * stride, width, -infinity<T>);",
        "",
    ),
    Mutant(
        "backward: hidden products with values",
        [NAN],
        BACKWARD,
        "visibility_.hide<width>(first_entry, count, strip_rows, key, visible, grads, stride, T(0));",
        "",
    ),
    Mutant(
        "backward: hide again after differentiating",
        [NAN],
        BACKWARD,
        "if (!visibility_.sees(entry, first + k)) weights[k] = grads[k] = T(0);",
        ";",
    ),
    Mutant(
        "backward: rows that see nothing have weights 0",
        [EMPTY, LIMITS],
        BACKWARD,
        "lse2_[r0 + i] = g.lse2.high == -infinity<T> ? SplitLse<T>(infinity<T>, T(0), natural_) : g.lse2;",
        "lse2_[r0 + i] = g.lse2;",
    ),
    Mutant(
        "backward: gradients of hidden keys are written",
        [NAN, EMPTY],
        BACKWARD,
        "if (item_.part == 0) write_hidden_keys();",
        "",
    ),
    Mutant(
        "backward: whole rows only where one block holds all keys",
        [SUBSETS, EXTREME],
        BACKWARD,
        "if (keys_.size > key_block) return false;",
        "",
    ),
    Mutant(
        "backward: whole rows only where one group is seen",
        [LIMITS, EXTREME, RANDOM],
        BACKWARD,
        "if (problem_.groups() == 1 || !problem_.joint()) return true;",
        "return true;",
    ),
    Mutant(
        "backward: keys that are not finite",
        [NAN],
        BACKWARD,
        "keys_finite_ = is_finite(S::reduce_add(finite));",
        "keys_finite_ = true;",
    ),
    Mutant(
        "backward: queries that are not finite",
        [NAN],
        BACKWARD,
        "queries_finite_ = is_finite(S::reduce_add(query_finite));",
        "queries_finite_ = true;",
    ),
    Mutant(
        "backward: gradients that are not finite",
        [NAN],
        BACKWARD,
        "grads_finite_ = is_finite(S::reduce_add(grad_finite));",
        "grads_finite_ = true;",
    ),
    Mutant(
        "backward: non-finite numbers are added back to those who see them",
        [NAN],
        BACKWARD,
        "if (!visibility_.sees(entry + r, first + c + k)) continue;",
        "",
    ),
    Mutant(
        "backward: a slope of NaN stays hidden",
        [NAN],
        BACKWARD,
        "grads[k] = weighted(grads[k], slopes_[r * stride + k]);",
        "grads[k] = grads[k] * slopes_[r * stride + k];",
    ),
    Mutant(
        "backward: a weight of 0 hides the output",
        [NAN],
        BACKWARD,
        "product = weighted(w, product);",
        "product = w * product;",
    ),
    Mutant(
        "backward: an out too large for its storage where no gradient arrives",
        [EXTREME],
        BACKWARD,
        "product += weighted(grad[d], out[d]);",
        "product += grad[d] * out[d];",
    ),
    Mutant(
        "backward: partials start from zero",
        [SUBSETS, REPEAT],
        BACKWARD,
        "if (!*touched) std::fill_n(block, rows * padded_head_dim_, T(0));",
        "",
    ),
    Mutant(
        "backward: shared biases one after the other",
        [SUBSETS, REPEAT],
        SCHEDULE,
        "if (alone || waves.back()",
        "if (waves.empty() || waves.back()",
    ),
    Mutant(
        "a bias of -inf hides",
        [EMPTY, NAN],
        "csrc/cpu/rows.h",
        "for (int c = 0; c < width; ++c) out[c] &= bias[r][c] != -infinity<T>;",
        ";",
    ),
    Mutant(
        "one pair: a bias of -inf hides",
        [EMPTY, NAN],
        "csrc/cpu/rows.h",
        "return !hidden;",
        "return true;",
    ),
    Mutant(
        "one pair: a mask hides",
        [NAN],
        "csrc/cpu/rows.h",
        "* mask.feature]) return false;",
        "* mask.feature]) return true;",
    ),
    Mutant(
        "a bias that is not finite is noticed",
        [NAN],
        "csrc/cpu/scores.h",
        "return is_finite(S::reduce_add(finite));",
        "return true;",
    ),
    Mutant(
        "rows past the last offset",
        [LIMITS, NAN],
        PLAN,
        "if (rest.q_len || rest.k_len) plan.sequences",
        "if (false) plan.sequences",
    ),
    Mutant(
        "windows do not overflow",
        [LIMITS],
        PLAN,
        "left = std::min(left, reach), right = std::min(right, reach);",
        "",
    ),
    Mutant(
        "a forked child runs on one thread",
        [PROCESS],
        "csrc/torch/executor.h",
        "at::in_parallel_region() || is_forked_child ? 1",
        "at::in_parallel_region() ? 1",
    ),
    Mutant(
        "no gradient of an empty bias",
        [LIMITS],
        "csrc/torch/arguments.cpp",
        "attn_mask_gradient && attn_mask_.defined() && attn_mask_.is_floating_point()",
        "attn_mask_gradient && p.bias.data",
    ),
]


# ---------------------------------------------------------------- the guards in Python

PYTHON = {
    "mmca_ext/functional.py": [*BAD_INPUT, "tests/test_functional_api.py"],
    "mmca_ext/reference/inputs.py": [
        FAULTS + "test_arguments.py",
        "tests/test_reference.py",
        "tests/test_bad_input.py",
    ],
    "mmca_ext/nn/_heads.py": ["tests/test_layers.py", "tests/test_bad_input.py", FAULTS + "test_arguments.py"],
}


def without_raise(text, index):
    """The module without its raise statement number `index`, and that statement; None past the last."""
    tree, found = ast.parse(text), []

    class Remove(ast.NodeTransformer):
        def visit_Raise(self, node):  # the name is ast's
            found.append(node)
            return ast.copy_location(ast.Pass(), node) if len(found) == index + 1 else node

    changed = Remove().visit(tree)
    if index >= len(found):
        return None
    return ast.unparse(ast.fix_missing_locations(changed)), found[index]


# ---------------------------------------------------------------- the copy


def write(path, text):
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def make_copy():
    """The tree, its checks numbered and only the portable kernels left; returns the names of the checks."""
    wanted, guards = set(), []
    sources = [p for folder in ("csrc", "mmca_ext", "tests") for p in sorted((ROOT / folder).rglob("*"))]
    sources += [ROOT / name for name in ("setup.py", "pyproject.toml", "build_backend.py", "README.md", "LICENSE")]
    for path in sources:
        name = path.relative_to(ROOT)
        if path.suffix not in (".py", ".pyi", ".cpp", ".h", ".toml", ".md", ".txt", ".typed", "") or path.is_dir():
            continue
        if re.search(r"(isa|simd)_(avx|neon)", path.name) or name.parts[:2] == ("csrc", "cuda"):
            continue
        text = path.read_text()
        if name.parts[0] == "csrc":
            text = text.replace("#if defined(__x86_64__)", "#if 0").replace("#if defined(__aarch64__)", "#if 0")
            if name.parts[1] == "torch" and path.suffix == ".cpp":
                text = with_numbered_checks(text, guards, path)
                # Else the compiler concludes from the end of that function that the check cannot be off.
                text = text.replace(
                    'bfloat16 or float16, got ", type);', 'bfloat16 or float16, got ", type); return {};'
                )
        write(COPY / name, text)
        wanted.add(COPY / name)
    write(COPY / "csrc/guards.h", GUARD_HEADER)
    wanted.add(COPY / "csrc/guards.h")
    for folder in ("csrc", "mmca_ext", "tests"):  # what is no longer there
        for path in (COPY / folder).rglob("*"):
            if path.is_file() and path not in wanted and path.suffix in (".py", ".cpp", ".h"):
                path.unlink()
    return guards


def run(*command, timeout, **environment):
    path = os.pathsep.join((str(COPY), str(COPY / "tests")))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    environment.setdefault("OMP_NUM_THREADS", "1")
    return subprocess.run(
        [sys.executable, *command], cwd=COPY, env=environment, timeout=timeout, text=True, capture_output=True
    )


def build():
    """None, or what the compiler says."""
    done = run("setup.py", "build_ext", "--inplace", timeout=1800)
    return None if done.returncode == 0 else (done.stdout + done.stderr)[-3000:]


def killer(tests, **environment):
    """The first test that fails, or None."""
    present = [test for test in tests if (COPY / test).exists()]
    arguments = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not packaging and not fuzz"]
    try:
        done = run("-m", "pytest", *arguments, *present, timeout=900, **environment)
    except subprocess.TimeoutExpired:
        return "it hangs"
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if failed:
        return failed[1]
    if done.returncode == 5:
        raise SystemExit(f"no tests in {present}")
    return f"exit status {done.returncode}" if done.returncode < 0 else done.stdout[-300:]


# ---------------------------------------------------------------- the kinds


def arguments_mutants(guards, selected):
    for number, guard in enumerate(guards, 1):
        if selected(guard):
            yield guard, killer(BAD_INPUT, MMCA_GUARD_OFF=str(number))


def kernel_mutants(selected):
    for mutant in KERNELS:
        if not selected(mutant.name):
            continue
        path = COPY / mutant.file
        text = path.read_text()
        try:
            path.write_text(text.replace(mutant.old, mutant.new))
            complaint = build()
            yield mutant.name, f"DOES NOT COMPILE: {complaint}" if complaint else killer(mutant.tests)
        finally:
            path.write_text(text)
    if complaint := build():
        raise SystemExit(complaint)


def python_mutants(selected):
    for name, tests in PYTHON.items():
        path = COPY / name
        text, index = path.read_text(), 0
        while changed := without_raise(text, index):
            index += 1
            guard = f"{name}:{changed[1].lineno} {ast.unparse(changed[1])[:60]}"
            if selected(guard):
                try:
                    path.write_text(changed[0])
                    yield guard, killer(tests)
                finally:
                    path.write_text(text)


def main():
    global COPY
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="arguments, kernels, python; all by default")
    parser.add_argument("--folder", default=COPY, type=Path, help="where the copy is made")
    parser.add_argument("--trust", action="store_true", help="do not run the tests with every guard in its place first")
    parser.add_argument("--only", default="", help="guards whose line holds one of these, between commas")
    options = parser.parse_args()
    COPY = options.folder.resolve()
    kinds = options.kinds or ["arguments", "kernels", "python"]
    guards = make_copy()
    for mutant in KERNELS:
        if (COPY / mutant.file).read_text().count(mutant.old) != 1:
            raise SystemExit(f"{mutant.name}: {mutant.file} does not hold this once any more: {mutant.old}")
    if complaint := build():
        raise SystemExit(complaint)

    tests = {"arguments": set(BAD_INPUT), "python": {t for tests in PYTHON.values() for t in tests}}
    tests["kernels"] = {t for mutant in KERNELS for t in mutant.tests}
    unmutated = None if options.trust else killer(sorted(set().union(*(tests[kind] for kind in kinds))))
    if unmutated:
        raise SystemExit(f"a test fails with every guard in its place: {unmutated}")

    def selected(name):
        return any(words in name for words in options.only.split(","))

    survivors, count = [], 0
    results = {
        "arguments": lambda: arguments_mutants(guards, selected),
        "kernels": lambda: kernel_mutants(selected),
        "python": lambda: python_mutants(selected),
    }
    for kind in kinds:
        for guard, by in results[kind]():
            count += 1
            print(f"{guard:90} {'SURVIVED' if by is None else by}", flush=True)
            if by is None or by.startswith("DOES NOT COMPILE"):
                survivors.append(guard)
    print(f"{count} guards, {len(survivors)} survivors", *survivors, sep="\n  ")
    shutil.rmtree(COPY / ".pytest_cache", ignore_errors=True)
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
