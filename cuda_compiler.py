"""nvcc for setup.py: what ptxas says of every kernel is kept beside the object, and a kernel that spills is told of: in
one line, or, with MMCA_EXT_STRICT=1 (as the Makefile has it), as an error.

python cuda_compiler.py NVCC ARGUMENT...     compiles; ARGUMENTs name one object (-o) and ask ptxas to be verbose
python cuda_compiler.py --report [FOLDER]    registers, stack and spills of all kernels compiled there
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

# Kernels that may use a stack or spill: the pattern of their (demangled) names, and why. A warning of ptxas is accepted
# in the same way, by its text.
ACCEPTED = {}

COLUMNS = ("registers", "stack", "spill_stores", "spill_loads", "shared")


def parse(output):
    """(kernels, warnings) of ptxas -v: a dict per kernel and architecture, and the lines that warn."""
    kernels, warnings, kernel = [], [], {}
    for line in output.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            kernel = {"kernel": match[1], "arch": match[2], **dict.fromkeys(COLUMNS, 0)}
            kernels.append(kernel)
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernel.update(zip(("stack", "spill_stores", "spill_loads"), map(int, match.groups())))
        elif match := re.search(r"Used (\d+) registers", line):
            kernel["registers"] = int(match[1])
            kernel["shared"] = int((re.search(r"(\d+) bytes smem", line) or [0, 0])[1])
        elif re.search(r"\bwarning\b", line):
            warnings.append(line.strip())
    return kernels, warnings


def demangle(names):
    if not names or shutil.which("c++filt") is None:
        return list(names)
    done = subprocess.run(["c++filt"], input="\n".join(names), text=True, capture_output=True, check=True)
    return [re.sub(r"\(anonymous namespace\)::|mmca::", "", name) for name in done.stdout.splitlines()]


def accepted(text):
    return any(re.search(pattern, text) for pattern in ACCEPTED)


def faults(kernels, warnings):
    """What is wrong with them, a line each."""
    lines = [line for line in warnings if not accepted(line)]
    for kernel in kernels:
        used = {name: kernel[name] for name in COLUMNS[1:4] if kernel[name]}
        if used and not accepted(kernel["kernel"]):
            listing = ", ".join(f"{name.replace('_', ' ')} {count} bytes" for name, count in used.items())
            lines.append(f"{kernel['kernel']} for {kernel['arch']}: {listing}")
    return lines


def compile_one(command):
    target = Path(command[command.index("-o") + 1])
    if "-MF" not in command:  # torch's ninja rules follow a .cu file's headers only if torch itself has CUDA
        command = [*command, "-MMD", "-MF", f"{target}.d"]
    begin = time.monotonic()
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    seconds = time.monotonic() - begin
    kernels, warnings = parse(done.stdout)
    for kernel, name in zip(kernels, demangle([kernel["kernel"] for kernel in kernels])):
        kernel["kernel"] = name
    if done.returncode != 0:
        print(done.stdout, file=sys.stderr)
        return done.returncode
    wrong = faults(kernels, warnings)
    if wrong and os.environ.get("MMCA_EXT_STRICT") == "1":
        target.unlink(missing_ok=True)
        print("\n".join([f"cuda_compiler.py: {target.name}", *wrong, "(exceptions: ACCEPTED)"]), file=sys.stderr)
        return 1
    if wrong:
        print(f"mmca_ext: {target.name}: {len(wrong)} remarks of ptxas on speed, the first: {wrong[0]}", flush=True)
    facts = {"object": target.name, "seconds": round(seconds, 1), "kernels": kernels}
    Path(f"{target}.kernels.json").write_text(json.dumps(facts, indent=1))
    return 0


def report(folder):
    """The table of all kernels below a folder."""
    rows, times = [("kernel", "arch", *(name.replace("_", " ") for name in COLUMNS))], []
    for path in sorted(Path(folder).rglob("*.kernels.json")):
        if not path.with_name(path.name.removesuffix(".kernels.json")).exists():
            continue
        facts = json.loads(path.read_text())
        times.append(f"{facts['object']}: {facts['seconds']} s to compile")
        rows += [(k["kernel"], k["arch"], *(str(k[name]) for name in COLUMNS)) for k in facts["kernels"]]
    if len(rows) == 1:
        return f"no CUDA kernels have been compiled below {folder}"
    rows = [rows[0], *sorted(rows[1:])]
    name = min(110, max(len(row[0]) for row in rows))
    lines = [f"{row[0][:name]:{name}}" + "".join(f"{cell:>13}" for cell in row[1:]) for row in rows]
    return "\n".join([*lines, "", *times])


def main(arguments):
    if arguments[:1] == ["--report"]:
        print(report(*(arguments[1:] or ["build"])))
        return 0
    return compile_one(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
