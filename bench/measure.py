"""Every case is checked first (the peers must agree within rounding), then all are timed in turn in this process.

Printed: the peer's time over ours (median, quartiles in brackets), forward and backward, beside the goal; and ours as a
share of the rate of a large float32 matmul that took its turns with them.
"""

import datetime
import os
import platform
import shlex
import statistics

import torch

import mmca_ext
from mmca_ext import _C

from . import linear, memory, results, scaling
from .cases import all_cases
from .timing import interleave, ratio

MATMUL = 1024  # rows, columns and depth of the matmul whose rate is the measure of this machine
LARGE = 5e8  # flops from which on a case is compared with it
VARIABLES = ("ATEN_", "DNNL_", "ONEDNN_", "MKL_", "OMP_", "KMP_", "MMCA_EXT_")


def run(options, argv):
    """The commands `run`, `scaling` and `linear`."""
    if options.command == "linear":
        memory.give_back()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.json and options.json.exists():
        results.load(options.json)  # refused now rather than after minutes
    try:
        about = facts(argv, "linear_forward" if options.command == "linear" else "")
    except ValueError as error:  # an MMCA_EXT_ISA that this processor or binary lacks
        raise results.Problem(str(error)) from None
    part, cases = {
        "run": ("rows", lambda: [({}, case) for case in all_cases()]),
        "scaling": ("scaling", scaling.all_series),
        "linear": ("linear", linear.all_series),
    }[options.command]
    cases = [(place, case) for place, case in cases() if options.filter in case.name]
    if not cases:
        raise results.Problem(f"no case has {options.filter!r} in its name")
    print("\n".join(f"{key}: {value}" for key, value in about.items()), flush=True)
    peaks = {}
    if part == "linear":  # first, with an allocator that gives back; time needs one that keeps
        peaks = {case.name: peaks_of(case) for _, case in cases}
        about["memory_kept"] = memory.keep()
    print(
        f"{'case':52} {'peer':24} {'direction':9} {'ratio':>7} {'quartiles':>15} {'goal':>6} {'ours':>11} {'GF/s':>6} "
        f"{'of matmul':>9}"
    )
    rows, failures = [], []
    for place, case in cases:
        for row in measure(case, options.seconds, failures):
            rows.append({**row, **place})
            if case.name in peaks:
                of_case = peaks[case.name][row["direction"]]
                rows[-1] |= {"ours_bytes": of_case["ours"], "peer_bytes": of_case[row["peer"]]}
            print(line(rows[-1]), flush=True)
    reached = [row["ratio"] >= row["goal"] for row in rows if row["goal"]]
    if reached:
        print(f"goals reached: {sum(reached)} of {len(reached)}")
    measured = {"about": about, "rows": rows, "failures": failures}
    if part == "linear":
        measured["exponents"] = linear.exponents(rows, options.seconds)
        for fit in measured["exponents"]:
            goal = f", goal {fit['goal']:g} at most" if fit["goal"] else ""
            print(
                f"{fit['series']}, {fit['direction']}, {fit['what']}: "
                f"time grows with the length to the power {fit['exponent']:.3f} ({fit['from']} to {fit['to']}{goal})"
            )
    if options.json:
        results.save(options.json, part, measured)


def line(row):
    quartiles = f"[{row['low']:.2f} {row['high']:.2f}]"
    goal = f"{row['goal']:.3g}" if row["goal"] else "-"
    gflops = f"{row['gflops']:.0f}" if row["gflops"] else "-"
    share = f"{row['matmul_share']:.0%}" if row["matmul_share"] else "-"
    return (
        f"{row['case']:52} {row['peer']:24} {row['direction']:9} {row['ratio']:7.2f} {quartiles:>15} {goal:>6} "
        f"{row['ours_us']:9.0f}us {gflops:>6} {share:>9}{of_memory(row)}"
    )


def of_memory(row):
    if row.get("ours_bytes") is None or row.get("peer_bytes") is None:
        return ""
    return f"   {row['ours_bytes'] / 1e6:.1f} MB, the peer {row['peer_bytes'] / 1e6:.1f} MB"


def measure(case, seconds, failures):
    """The rows of a case. A peer that fails is printed, noted in `failures` and left out."""
    inputs = case.tensors()
    wanted = [*inputs, *case.parameters]
    calls = {"ours": case.ours}
    for name, call in case.peers.items():
        try:
            attempt(call, inputs, wanted if case.backward else None)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            print(f"{case.name:52} {name:24} fails: {reason}", flush=True)
            failures.append({"case": case.name, "peer": name, "error": reason})
        else:
            calls[name] = call
    matmul = square_matmul() if case.flops >= LARGE else None

    with torch.no_grad():
        beside = {**calls, **case.beside}
        turns = [lambda call=call: call(*inputs) for call in beside.values()]
        times = interleave(turns + [matmul] * bool(matmul), seconds, case.rounds)
    rows = list(as_rows(case, "forward", beside, times, 1.0))
    outputs = {name: as_tuple(call(*inputs)) for name, call in calls.items()}
    check(case, outputs)
    if case.backward:
        gradients = [torch.randn_like(output) for output in outputs["ours"]]
        turns = [
            lambda output=output: torch.autograd.grad(output, wanted, gradients, retain_graph=True)
            for output in outputs.values()
        ]
        times = interleave(turns + [matmul] * bool(matmul), seconds, case.rounds)
        rows += as_rows(case, "backward", calls, times, 2.5)
    return rows


def as_rows(case, direction, names, times, factor):
    """`times` of ours, of the peers in `names`, and of the matmul where it took part."""
    ours = statistics.median(times[0])
    shares = [None] * len(names)
    if len(times) > len(names):
        work = case.flops * factor / (2.0 * MATMUL**3)
        shares = [work * ratio(times[-1], theirs)[0] for theirs in times[:-1]]
    for index, name in enumerate(names):
        if index == 0:
            continue
        middle, low, high = ratio(times[index], times[0])
        yield {
            "case": case.name,
            "group": case.group,
            "label": case.label or case.name,
            "size": case.size,
            "direction": direction,
            "peer": name,
            "same_result": name not in case.beside,
            "ratio": middle,
            "low": low,
            "high": high,
            "goal": case.goal.get(name, (None, None))[direction == "backward"],
            "ours_us": ours * 1e6,
            "peer_us": statistics.median(times[index]) * 1e6,
            "gflops": case.flops * factor / ours / 1e9 or None,
            "matmul_share": shares[0],
            "peer_matmul_share": None if name in case.beside else shares[index],
            "rounds": len(times[0]),
        }


def attempt(call, inputs, wanted, gradients=None):
    """A forward, and a backward where something is wanted of it; all that they return."""
    outputs = as_tuple(call(*inputs))
    if not wanted:
        return outputs
    gradients = gradients or [torch.ones_like(output) for output in outputs]
    return *outputs, *torch.autograd.grad(outputs, wanted, gradients)


def peaks_of(case):
    """{direction: {ours and the peers: what a call needs at most beyond inputs and results}}; the backward's with a
    forward before it."""
    inputs = case.tensors()
    wanted = [*inputs, *case.parameters]

    def forward(call):
        with torch.no_grad():
            return call(*inputs)

    calls = {"ours": case.ours, **case.peers}
    peaks = {"forward": {name: peak_beside(lambda c=c: forward(c)) for name, c in {**calls, **case.beside}.items()}}
    if case.backward:
        gradients = [torch.randn_like(output) for output in as_tuple(forward(case.ours))]
        peaks["backward"] = {
            name: peak_beside(lambda c=c: attempt(c, inputs, wanted, gradients)) for name, c in calls.items()
        }
    return peaks


def peak_beside(call):
    """Of memory, in bytes; None: cannot be measured here, or the call fails, which measure() says."""
    try:
        call()  # its code, and what the autograd engine sets up, are there now
    except RuntimeError:
        return None
    returned = []
    peak = memory.peak(lambda: returned.extend(as_tuple(call())))
    return peak and max(0, peak - sum(tensor.nbytes for tensor in returned))


def as_tuple(outputs):
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


def check(case, outputs):
    """Rounding of float32 sums: 2^-24 * 64 steps * values of order 1 leaves 1e-4 out of reach of any right answer.
    16-bit results are rounded, and the peer's weights too: three roundings of values up to `largest`."""
    if case.random:
        return
    for name, theirs in outputs.items():
        for ours, other in zip(outputs["ours"], theirs, strict=True):
            eps = torch.finfo(case.dtype).eps if case.dtype != torch.float32 else 0.0
            bound = 1e-4 + 3 * eps * ours.abs().max().item()
            error = (ours.float() - other.float()).abs().max().item()
            if not error < bound:
                raise results.Problem(f"{case.name}: ours and {name} differ by {error:.1e}; not timed")


def square_matmul():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, MATMUL, MATMUL, generator=generator)
    out = torch.empty(MATMUL, MATMUL)

    def call():
        with torch.no_grad():
            torch.mm(a, b, out=out)

    return call


def facts(argv, op=""):
    """Of this run; `isa` is that of the first kernel chosen for `op`, or for anything."""
    return {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", "bench", *argv]),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
        "cpu": cpu_model(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "isa": next(k["isa"] for k in _C.kernels() if k["selected"] and op in k["op"]),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "mmca_ext": mmca_ext.__version__,
        "commit": _C.build_info().get("commit"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def cpu_model():
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
