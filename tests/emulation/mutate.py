"""Is every synchronisation of the CUDA kernels needed, and would the emulation notice if it were missing?

Takes each call of syncthreads, syncwarp, cp_async_commit and cp_async_wait away in turn, lets each cp_async_wait wait
for one group fewer, and runs the tests that TESTS names for its file, of which one must then fail. All in a copy of the
tree under build/emulation_mutants, with a build folder of its own.

    python tests/emulation/mutate.py [--files FILE ...] [--calls NAME,...] [--only WORDS,...] [--sample N] [--list]
                                     [-- COMMAND]

Without --files: everything in csrc/cuda. --calls: further functions without a result whose calls are taken away. A
COMMAND runs in the place of all tests. One line each: by what it was found, or SURVIVED; exit status 1 if any survived
that EQUIVALENT does not list, or if one was found that it does list.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPY = ROOT / "build" / "emulation_mutants"
CALLS = ("syncthreads", "syncwarp", "cp_async_commit", "cp_async_wait")
# The tests of a file's mutants, by the first name that fits: few and small, so that a mutant takes seconds.
SHAPES, CATALOGUE, NOT_FINITE, FORWARD, BACKWARD, LINEAR = (
    "tests/test_emulated_kernels.py::test_shapes_of_every_gpu",
    "tests/test_emulated_kernels.py::test_problems_of_the_catalogue",
    "tests/test_emulated_kernels.py::test_a_row_that_is_not_finite_stays_with_the_keys_it_sees",
    "tests/test_emulated_forward.py::test_",
    "tests/test_emulated_backward.py::test_every_shape",
    "tests/test_emulated_linear.py::test_",
)
TESTS = {
    "csrc/cuda/plan.cu": [f"tests/test_emulated_plan.py::test_plans_agree[{seed}]" for seed in (0, 20, 40)],
    "csrc/cuda/linear_plan.cu": [
        f"{LINEAR}rows_before_the_first_key_are_zero_whatever_they_hold[{n}]" for n in (31, 257)
    ],
    "csrc/cuda/generic/linear": [
        *(f"{LINEAR}segments[many keys-{is_causal}-torch.float32]" for is_causal in (True, False)),
        *(
            f"{LINEAR}{name}"
            for name in (
                "the_order_of_blocks_and_warps_changes_nothing[torch.float32]",
                "hidden_keys_may_hold_anything[True]",
            )
        ),
        f"{LINEAR}a_stream_is_one_call[[40, 30]-torch.float32]",
    ],
    "csrc/cuda/sm80/linear": [
        *(
            f"{LINEAR}pieces[{name}-{is_causal}-torch.bfloat16]"
            for name in ("both", "many rows")
            for is_causal in (True, False)
        ),
        *(f"{LINEAR}widths_of_16_bits[{is_causal}-(256, 256)-torch.bfloat16]" for is_causal in (True, False)),
        f"{LINEAR}16_bits_are_the_same_in_every_order[True-torch.bfloat16]",
    ],
    "csrc/cuda/generic/": [
        *(f"{SHAPES}[float32-{name}-{dim}-80]" for name in ("plain", "mask", "groups apart") for dim in (64, 256)),
        *(f"{CATALOGUE}[mmca {name}]" for name in ("self sum", "block lse")),
        *(f"{NOT_FINITE}[{bad}-float32]" for bad in ("query", "grad_out")),
    ],
    "csrc/cuda/sm80/backward": [
        f"{SHAPES}[bfloat16-plain-64-80]",
        "tests/test_emulated_backward.py::test_keys_without_rows_in_blocks_of_their_own",
        *(
            f"{BACKWARD}[{case}]"
            for case in (
                "causal-64-sm90x4",
                "keys without rows-64-sm90x4",
                "deterministic-64-sm90x4",
                "groups apart-128-sm86x4",
                "causal-128-sm90x100",
            )
        ),
    ],
    "csrc/cuda/sm80/decode": [
        *(f"{FORWARD}keys_shared_by_blocks[{name}-{dim}]" for name in ("plain", "mask") for dim in (64, 256)),
        f"{FORWARD}few_rows_of_groups[64-lse]",
    ],
    "csrc/cuda/sm80/": [
        *(f"{FORWARD}tiles[{name}-{dim}]" for name in ("causal", "mask") for dim in (64, 128, 256)),
        f"{FORWARD}tiles[nothing to see-256]",
        *(f"{FORWARD}tiles_of_groups[lse-{softcap}-64]" for softcap in (0.0, 5.0)),
    ],
}
ALL_TESTS = [f"tests/test_emulated_{suite}.py" for suite in ("plan", "forward", "backward", "kernels")]


def command_for(file):
    tests = next((tests for name, tests in TESTS.items() if file.startswith(name)), ALL_TESTS)
    return [sys.executable, "-m", "pytest", "-x", "-q", *tests]


@dataclass(frozen=True)
class Equivalent:
    """A mutant that may survive: `line` holds the call, the line before it with code on it is `after`."""

    file: str
    after: str
    line: str
    what: str  # Mutant.what
    reason: str


EQUIVALENT: list[Equivalent] = []


@dataclass
class Mutant:
    file: str
    number: int  # of the line
    after: str
    line: str
    what: str
    text: str  # of the whole file

    def __str__(self):
        return f"{self.file}:{self.number} {self.what}"

    def reason(self):
        """Why it may survive, or None."""
        for entry in EQUIVALENT:
            if (entry.file, entry.after, entry.line, entry.what) == (self.file, self.after, self.line, self.what):
                return entry.reason
        return None


# ---------------------------------------------------------------- finding calls


def without_comments(text):
    """The same length, with blanks for comments and what strings hold."""

    def blank(match):
        return re.sub(r"[^\n]", " ", match[0])

    return re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', blank, text, flags=re.DOTALL)


def closing(text, at, pair):
    """Where the bracket that opens at `at` closes."""
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] == pair[0]) - (text[i] == pair[1])
        if depth == 0:
            return i
    raise ValueError(f"unbalanced {pair}")


def mutants_of(file, text, further_calls=()):
    code = without_comments(text)
    lines = [line.strip() for line in code.split("\n")]
    names = "|".join(map(re.escape, (*CALLS, "syncthreads_or", *further_calls)))
    for match in re.finditer(rf"\b((?:[a-z_]+::)*)({names})\b\s*(?=[<(])", code):
        before = code[: match.start()].rstrip()
        word = re.search(r"(\w+|\.|->|::|&)$", before)
        if word and word[0] not in ("else", "do"):  # a declaration, a member, an address
            continue
        after_name, argument = match.end(), ""
        if code[after_name] == "<":
            end = closing(code, after_name, "<>")
            argument, after_name = code[after_name + 1 : end], end + 1
        end = closing(code, after_name, "()") + 1
        number = code.count("\n", 0, match.start())
        place = next((line for line in reversed(lines[:number]) if line), ""), lines[number]
        call = " ".join(code[match.start() : end].split())

        changes = {f"without {call}": "((void)0)"}
        if match[2] == "syncthreads_or":
            changes = {f"{call} of each thread alone": text[after_name:end]}
        if match[2] == "cp_async_wait":
            changes[f"{call} for one group fewer"] = f"{match[1]}cp_async_wait<({argument}) + 1>()"
        for what, instead in changes.items():
            yield Mutant(file, number + 1, *place, what, text[: match.start()] + instead + text[end:])


def all_mutants(files, further_calls):
    for file in files:
        yield from mutants_of(file, (ROOT / file).read_text(), further_calls)


# ---------------------------------------------------------------- the copy


def make_copy():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, text=True, check=True, capture_output=True,
    )  # fmt: skip
    names = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    names |= {str(path.relative_to(ROOT)) for path in (ROOT / "mmca_ext").glob("*.so")}
    for name in names:
        source, target = ROOT / name, COPY / name
        if not target.exists() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    for path in [p for p in COPY.rglob("*") if p.is_file()]:  # what is no longer there
        name = path.relative_to(COPY)
        if str(name) not in names and name.parts[0] not in ("build", ".pytest_cache"):
            path.unlink()


def failure(command, timeout):
    """What made the command fail, or None."""
    path = os.pathsep.join((str(COPY), str(COPY / "tests")))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=COPY, env=environment, timeout=timeout, text=True, capture_output=True)
    except subprocess.TimeoutExpired:
        return "it hangs"
    if done.returncode == 0:
        return None
    output = done.stdout + done.stderr
    if re.search(r"\.cuh?:\d+:\d+: error:", output):
        return f"DOES NOT COMPILE: {output[-2000:]}"
    found = re.search(r"\w+\.cuh?:\d+: block .*", output) or re.search(r"^(?:FAILED|ERROR) .*", output, re.MULTILINE)
    return found[0][:150] if found else f"exit status {done.returncode}: {output[-300:]}"


# ---------------------------------------------------------------- the run


def parse(arguments):
    command = None
    if "--" in arguments:
        at = arguments.index("--")
        arguments, command = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", default=None)
    parser.add_argument("--calls", default="")
    parser.add_argument("--only", default="", help="mutants whose line of output holds one of these, between commas")
    parser.add_argument("--sample", type=int, help="that many of them, at random")
    parser.add_argument("--list", action="store_true", help="print them and stop")
    options = parser.parse_args(arguments)
    if options.files is None:
        files = (p for p in (ROOT / "csrc" / "cuda").rglob("*") if p.suffix in (".cu", ".cuh"))
        options.files = sorted(str(p.relative_to(ROOT)) for p in files if p.name != "primitives.cuh")
    return options, command


def unknown_equivalents(mutants, files):
    """Entries of EQUIVALENT that no mutant answers to any more, or more than one does."""
    for entry in EQUIVALENT:
        places = [(m.file, m.after, m.line, m.what) for m in mutants]
        if entry.file in files and places.count((entry.file, entry.after, entry.line, entry.what)) != 1:
            yield f"{entry.file}: {entry.line!r} after {entry.after!r}"


def main():
    options, command = parse(sys.argv[1:])
    mutants = list(all_mutants(options.files, [call for call in options.calls.split(",") if call]))
    for entry in unknown_equivalents(mutants, options.files):
        raise SystemExit(f"EQUIVALENT lists what is not there, or not once: {entry}")
    mutants = [m for m in mutants if any(words in str(m) for words in options.only.split(","))]
    if options.sample is not None and options.sample < len(mutants):
        mutants = random.sample(mutants, options.sample)
    if options.list:
        print(*mutants, sep="\n")
        return False
    make_copy()
    wrong, found, timeouts = [], 0, {}
    for mutant in mutants:
        path = COPY / mutant.file
        text, run = path.read_text(), command or command_for(mutant.file)
        if tuple(run) not in timeouts:
            start = time.monotonic()
            if unmutated := failure(run, None):
                raise SystemExit(f"the command fails without a mutation: {unmutated}")
            timeouts[tuple(run)] = 120 + 5 * (time.monotonic() - start)  # it compiled, too
        try:
            path.write_text(mutant.text)
            by = failure(run, timeouts[tuple(run)])
        finally:
            path.write_text(text)
        reason = mutant.reason()
        invalid = by is not None and by.startswith("DOES NOT COMPILE")
        found += by is not None and not invalid
        if invalid or (by is None) != (reason is not None):
            wrong.append(str(mutant))
        print(f"{mutant!s:70} {by or ('survives: ' + reason if reason else 'SURVIVED')}", flush=True)
    print(f"{len(mutants)} mutants, {found} found, {len(wrong)} not as they should be", *wrong, sep="\n  ")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
