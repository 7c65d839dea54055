"""`python -m bench [--filter TEXT] [--seconds S] [--json FILE] [--readme] [--isa NAME] [--threads N]`

Every case is checked first (the peers must agree within rounding), then all are timed in turn in this process.
Printed: the peer's time over ours (median, quartiles in brackets), forward and backward, beside the goal.
"""

import argparse
import datetime
import json
import platform
import re
from pathlib import Path

import torch

import mmca_ext
from mmca_ext import _C

from .cases import all_cases
from .timing import interleave, ratio


def check(case, outputs, names):
    """Rounding of float32 sums: 2^-24 * 64 steps * values of order 1 leaves 1e-4 out of reach of any right answer.
    16-bit results are rounded, and the peer's weights too: three roundings of values up to `largest`."""
    if case.random:
        return
    largest, eps = outputs[0].abs().max().item(), torch.finfo(case.dtype).eps
    bound = 1e-4 if case.dtype == torch.float32 else 1e-4 + 3 * eps * largest
    for name, output in zip(names[1:], outputs[1:], strict=True):
        error = (outputs[0].float() - output.float()).abs().max().item()
        if not error < bound:
            raise SystemExit(f"{case.name}: ours and {name} differ by {error:.1e}; not timed")


def measure(case, seconds):
    tensors = case.tensors()
    names, calls = ["ours"], [case.ours]
    for name, call in case.peers.items():
        try:
            call(*tensors)
        except RuntimeError as error:
            print(f"{case.name:52} {name:16} fails: {error}")
        else:
            names.append(name), calls.append(call)
    with torch.no_grad():
        forward = interleave([lambda call=call: call(*tensors) for call in calls], seconds)
    outputs = [call(*tensors) for call in calls]
    check(case, outputs, names)
    gradient = torch.randn_like(outputs[0])
    backward = interleave(
        [lambda out=out: torch.autograd.grad(out, tensors, gradient, retain_graph=True) for out in outputs], seconds
    )
    rows = []
    for index, name in enumerate(names[1:], 1):
        for direction, times, factor in (("forward", forward, 1.0), ("backward", backward, 2.5)):
            middle, low, high = ratio(times[index], times[0])
            ours = sorted(times[0])[len(times[0]) // 2]
            goal = case.goal.get(name, (None, None))[direction == "backward"]
            rows.append(
                {
                    "case": case.name,
                    "direction": direction,
                    "peer": name,
                    "ratio": middle,
                    "low": low,
                    "high": high,
                    "goal": goal,
                    "ours_us": ours * 1e6,
                    "gflops": case.flops * factor / ours / 1e9 or None,
                    "rounds": len(times[0]),
                }
            )
    return rows


def facts():
    return {
        "date": datetime.date.today().isoformat(),
        "mmca_ext": mmca_ext.__version__,
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "isa": next(k["isa"] for k in _C.kernels() if k["selected"]),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "commit": _C.build_info().get("commit"),
    }


def write_readme_table(about, rows, source):
    """Puts the results between the README's markers."""
    figures = {(row["case"], row["peer"], row["direction"]): row["ratio"] for row in rows}

    def shown(ratio):
        return f"{ratio:.1f}x" if ratio >= 10 else f"{ratio:.2f}x"

    lines = [
        f"Times faster than the peer, {about['threads']} threads of a shared virtual machine, our "
        f"{about['isa']} kernels against\ntorch {about['torch']} ({about['torch_cpu_capability']}), {about['date']} "
        f"([all figures]({source})):\n",
        "| work | peer | forward | backward |",
        "|---|---|---|---|",
    ]
    for case, peer in dict.fromkeys((row["case"], row["peer"]) for row in rows):
        forward, backward = (shown(figures[case, peer, direction]) for direction in ("forward", "backward"))
        lines.append(f"| {case} | {peer} | {forward} | {backward} |")
    readme = Path("README.md")
    table = f"<!-- results: {source} -->\n" + "\n".join(lines) + "\n<!-- /results -->"
    text = re.sub(r"<!-- results: .*? -->\n.*?<!-- /results -->", lambda _: table, readme.read_text(), flags=re.DOTALL)
    readme.write_text(text)


def main():
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=2.0, help="per case and direction")
    parser.add_argument("--json", type=Path, help="write the results here too")
    parser.add_argument("--readme", action="store_true", help="and into the README's table (needs --json)")
    parser.add_argument("--isa", help="force our kernels to one instruction set")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.isa:
        _C.force_isa(options.isa)
    if options.threads:
        torch.set_num_threads(options.threads)

    about = facts()
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    print(
        f"{'case':52} {'peer':16} {'direction':9} {'ratio':>7} {'quartiles':>15} {'goal':>6} {'ours':>11} {'GF/s':>6}"
    )
    rows = []
    for case in all_cases():
        if options.filter not in case.name:
            continue
        for row in measure(case, options.seconds):
            rows.append(row)
            quartiles = f"[{row['low']:.2f} {row['high']:.2f}]"
            goal = f"{row['goal']:g}" if row["goal"] else "-"
            gflops = f"{row['gflops']:.0f}" if row["gflops"] else "-"
            print(
                f"{row['case']:52} {row['peer']:16} {row['direction']:9} {row['ratio']:7.2f} {quartiles:>15} {goal:>6} "
                f"{row['ours_us']:9.0f}us {gflops:>6}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        if options.readme:
            write_readme_table(about, rows, options.json)


if __name__ == "__main__":
    main()
