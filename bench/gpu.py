"""`python -m bench gpu`: our CUDA kernels beside torch's, every peer in turn with ours on one GPU.

Time is the GPU's, between two events around a call, after a write that is larger than the caches (so that nothing is
found there, and so that the host is ahead of the GPU). The measures of this GPU are taken first: a large matrix
product in each dtype, and a copy of a gigabyte. A peer that fails, or whose numbers differ from ours, is noted and left
out. What leaves the GPU without a context (a wild address) costs one case: the next begins in a new process. With
--device cpu everything runs on the CPU, timed by its clock: a dry run, of which the figures say nothing.
"""

import datetime
import os
import shlex
import statistics
import sys
import time

import torch

import mmca_ext
from mmca_ext import _C

from . import results
from .gpu_cases import DTYPES, Cases
from .timing import ratio

BACKWARD_FLOPS = 2.5  # five products instead of two


class Clock:
    """Times calls on a device, in turn."""

    def __init__(self, device):
        self.on_gpu = device == "cuda"
        self.flushed = torch.empty(1 << 30 if self.on_gpu else 1, dtype=torch.uint8, device=device)

    def once(self, call):
        """A function that says how many seconds the call took, once the GPU is done."""
        if not self.on_gpu:
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
            return lambda: seconds
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        begin.record()
        call()
        end.record()
        return lambda: begin.elapsed_time(end) / 1e3

    def per_call(self, call, calls=100):
        """Many calls behind one another, the host included."""
        self.wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        self.wait()
        seconds = (time.perf_counter() - start) / calls
        return lambda: seconds

    def wait(self):
        if self.on_gpu:
            torch.cuda.synchronize()

    def interleave(self, calls, seconds, per_call=False, at_least=5):
        """One list of seconds per call; entry i of every list is of the same round."""
        for _ in range(2):
            for call in calls:
                call()
        self.wait()
        once, times, end = self.per_call if per_call else self.once, [[] for _ in calls], time.perf_counter() + seconds
        while len(times[0]) < at_least or time.perf_counter() < end:
            taken = [once(call) for call in calls]
            self.wait()
            for record, seconds_of in zip(times, taken, strict=True):
                record.append(seconds_of())
        return times


def ceilings(device, clock, seconds):
    """FLOP/s of a matrix product in each dtype, and bytes a second of a copy, read and written."""
    size, count = (8192, 1 << 29) if device == "cuda" else (256, 1 << 20)
    rates = {}
    for name, dtype in DTYPES.items():
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        (times,) = clock.interleave([lambda a=a, b=b: a @ b], seconds)
        rates[name] = 2.0 * size**3 / statistics.median(times)
    source = torch.empty(count, dtype=torch.int16, device=device)
    target = torch.empty_like(source)
    (times,) = clock.interleave([lambda: target.copy_(source)], seconds)
    return rates, 4.0 * count / statistics.median(times)


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def agrees(ours, theirs, dtype):
    """Rounding of 16-bit results and weights: three roundings of values up to the largest; fp32 peers may use tf32-like
    products, which is said by their error, not held against them up to 1e-2."""
    eps = torch.finfo(DTYPES[dtype]).eps if dtype != "fp32" else 0.0
    bound = 3 * eps * ours.abs().max().item() + (1e-4 if dtype != "fp32" else 1e-2)
    error = (ours.float() - theirs.float()).abs().max().item()
    return error <= bound, error


def measure(work, device, clock, limits, seconds, failures):
    """Rows of one piece of work: a row a peer and direction."""
    inputs = work.tensors(device)
    calls = {"ours": work.ours}
    with torch.no_grad():
        expected = work.ours(*inputs)
    for name, call in work.peers.items():
        try:
            out = call(*inputs)
            if work.backward:
                torch.autograd.grad(out, inputs, torch.ones_like(out))
            same, error = agrees(expected, out.detach(), work.dtype)
            if not (same or work.random):
                raise RuntimeError(f"differs from ours by {error:.1e}")
            calls[name] = call
        except Exception as error:  # torch's compilers have errors of many kinds
            failures.append({"case": work.name, "peer": name, "error": first_line(error)})
            print(f"{work.name:52} {name:18} left out: {first_line(error)}", flush=True)
    with torch.no_grad():
        times = clock.interleave([lambda c=c: c(*inputs) for c in calls.values()], seconds, work.per_call)
    yield from rows(work, "forward", calls, times, limits, 1.0)
    if not work.backward:
        return
    outputs = [call(*inputs) for call in calls.values()]
    arriving = torch.randn_like(outputs[0])
    turns = [lambda out=out: torch.autograd.grad(out, inputs, arriving, retain_graph=True) for out in outputs]
    yield from rows(work, "backward", calls, clock.interleave(turns, seconds, work.per_call), limits, BACKWARD_FLOPS)


def rows(work, direction, calls, times, limits, factor):
    rates, bandwidth = limits
    ours, flops = statistics.median(times[0]), work.flops * factor
    shared = {
        "case": work.name,
        "group": work.group,
        "dtype": work.dtype,
        "direction": direction,
        "ours_us": ours * 1e6,
        "ours_tflops": flops / ours / 1e12,
        "matmul_share": flops / ours / rates[work.dtype],
        "copy_share": work.bytes / ours / bandwidth if work.bytes else None,
        "goal": work.goal[direction == "backward"],
        "rounds": len(times[0]),
    }
    if len(calls) == 1:  # every peer was left out: ours alone
        yield {**shared, "peer": "none", "ratio": 1.0, "low": 1.0, "high": 1.0, "peer_us": None, "peer_tflops": None}
    for name, theirs in list(zip(calls, times, strict=True))[1:]:
        middle, low, high = ratio(theirs, times[0])
        peer = statistics.median(theirs)
        measured = {
            "ratio": middle,
            "low": low,
            "high": high,
            "peer_us": peer * 1e6,
            "peer_tflops": flops / peer / 1e12,
        }
        yield {**shared, "peer": name, **measured}


def best_peers(all_rows):
    """The fastest peer's row of each case and direction."""
    best = {}
    for row in all_rows:
        key = row["case"], row["direction"]
        if key not in best or row["ratio"] < best[key]["ratio"]:
            best[key] = row
    return list(best.values())


def line(row):
    share = row["copy_share"] if row["copy_share"] is not None else row["matmul_share"]
    return (
        f"{row['case']:52} {row['peer']:18} {row['direction']:9} {row['ratio']:6.2f}x  "
        f"ours {row['ours_us']:9.1f} us {row['ours_tflops']:7.1f} TFLOP/s {share:5.0%}"
    )


def facts(argv, device, limits):
    gpu = torch.cuda.get_device_properties(0).name if device == "cuda" else "none: a dry run on the CPU"
    rates, bandwidth = limits
    return {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", "bench", *argv]),
        "gpu": gpu,
        "matmul_tflops": {name: rate / 1e12 for name, rate in rates.items()},
        "copy_gb_per_s": bandwidth / 1e9,
        "threads": torch.get_num_threads(),
        "isa": ", ".join(sorted({k["isa"] for k in _C.kernels() if k["selected"] and k["device"] == device})),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "mmca_ext": mmca_ext.__version__,
        "commit": _C.build_info().get("commit"),
    }


def table(about, all_rows, failures):
    """Markdown: a line a case and direction, ours beside the best peer, then all the others."""
    lines = [
        f"# {about['gpu']}, {about['date']}",
        "",
        f"`{about['command']}`, torch {about['torch']}, cuDNN {about['cudnn']}, "
        f"commit {(about['commit'] or '?')[:12]}. "
        f"Measured limits: matrix products {', '.join(f'{n} {r:.0f}' for n, r in about['matmul_tflops'].items())} "
        f"TFLOP/s, copy {about['copy_gb_per_s']:.0f} GB/s. Arithmetic is that of visible pairs, "
        f"{BACKWARD_FLOPS} forwards for a backward.",
        "",
        "| work | direction | ours | of the limit | best peer | its time over ours | goal | all peers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    group = None
    for best in best_peers(all_rows):
        if best["group"] != group:
            group = best["group"]
            lines.append(f"| **{group}** | | | | | | | |")
        here = [r for r in all_rows if (r["case"], r["direction"]) == (best["case"], best["direction"])]
        others = ", ".join(f"{r['peer']} {r['ratio']:.2f}x" for r in here if r["peer"] != "none")
        limit = (
            f"{best['copy_share']:.0%} of a copy" if best["copy_share"] is not None else f"{best['matmul_share']:.0%}"
        )
        rate = f"{best['ours_us']:.0f} us, {best['ours_tflops']:.0f} TFLOP/s"
        goal = f"{best['goal']:g}x" if best["goal"] else ""
        lines.append(
            f"| {best['case']} | {best['direction']} | {rate} | {limit} | {best['peer']} | {best['ratio']:.2f}x "
            f"| {goal} | {others} |"
        )
    if failures:
        lines += ["", "Left out:", ""]
        lines += [f"- {f['case']}, {f['peer']}: {f['error']}" for f in failures]
    return "\n".join(lines) + "\n"


def compile_peers(works, device):
    """Calls once whatever has a compiler of its own, forward and backward: it leaves its code on disk."""
    for work in works:
        for name, call in work.peers.items():
            if "FlexAttention" not in name:
                continue
            began = time.monotonic()
            try:
                inputs = work.tensors(device)
                out = call(*inputs)
                if work.backward:
                    torch.autograd.grad(out, inputs, torch.ones_like(out))
                result = f"{time.monotonic() - began:.1f} s"
            except Exception as error:
                result = first_line(error)
            print(f"{work.name:52} {name:18} {result}", flush=True)


def is_lost(device):
    """Whether an error has left the process without its GPU."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def run(options, argv):
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        raise results.Problem("torch sees no GPU here; --device cpu is a dry run")
    works = [work for work in Cases(device, options.shrink).all() if options.filter in work.name]
    if options.compile:
        return compile_peers(works, device)
    measured, failures, began = [], [], time.monotonic()
    if options.resume and options.json and options.json.exists():
        kept = results.load(options.json)
        measured, failures = kept["rows"], kept["failures"]
    seen = {entry["case"] for entry in (*measured, *failures)}
    done = max((i + 1 for i, work in enumerate(works) if work.name in seen), default=0)
    clock = Clock(device)
    limits = ceilings(device, clock, min(options.seconds, 0.5))
    about = facts(argv, device, limits)
    print("\n".join(f"{key}: {value}" for key, value in about.items()), flush=True)

    def seconds_left():
        return float("inf") if options.budget is None else max(0.0, options.budget - (time.monotonic() - began))

    def keep():
        if options.json:
            results.save(options.json, "rows", {"about": about, "rows": measured, "failures": failures})
            options.json.with_suffix(".md").write_text(table(about, measured, failures))

    for work in works[done:]:
        if seconds_left() == 0:
            failures.append({"case": work.name, "peer": "ours", "error": "the time was up"})
            continue
        try:
            for row in measure(work, device, clock, limits, options.seconds, failures):
                measured.append(row)
                print(line(row), flush=True)
        except Exception as error:
            failures.append({"case": work.name, "peer": "ours", "error": first_line(error)})
            print(f"{work.name:52} ours fails: {first_line(error)}", flush=True)
            if options.json and is_lost(device):
                keep()
                left = [] if options.budget is None else ["--budget", f"{seconds_left():.0f}"]
                os.execv(sys.executable, [sys.executable, "-m", "bench", *argv, "--resume", *left])
        keep()  # after every case: whatever ends the run, these are kept
    keep()
    if not measured:
        raise results.Problem(f"nothing measured for {options.filter!r}")
    reached = [row["ratio"] >= row["goal"] for row in best_peers(measured) if row["goal"]]
    print(f"goals reached: {sum(reached)} of {len(reached)}")
