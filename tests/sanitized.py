"""A small set of everything for compute-sanitizer (bench/gpu.sh): every problem of the catalogue and some random cases,
forward and backward, on the GPU, as many of them as the time allows.

    python tests/sanitized.py [--dry-run] [--seconds SECONDS]
"""

import argparse
import itertools
import random
import time

import torch
from cases import Case, run_kernels
from operators import PROBLEMS, problem
from test_cuda import DTYPES_OF_TORCH, on, results_of

from mmca_ext import _C

RANDOM_CASES = 40


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry-run", action="store_true", help="on the CPU")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which nothing more is begun")
    options = parser.parse_args()
    device = "cpu" if options.dry_run else "cuda"

    def run_problem(name, dtype):
        results_of(on(device, problem(name, dtype=dtype, requires_grad=())))

    calls = [(run_problem, pair) for pair in itertools.product(PROBLEMS, DTYPES_OF_TORCH)]
    calls += [(run_kernels, (Case(seed, device=device),)) for seed in range(RANDOM_CASES)]
    random.Random(0).shuffle(calls)  # whatever the time cuts off, some of everything has run
    end, done = time.monotonic() + options.seconds, 0
    for call, given in calls:
        if time.monotonic() > end:
            break
        call(*given)
        done += 1
    if device == "cuda":
        torch.cuda.synchronize()
    ran = [kernel["name"] for kernel in _C.kernels() if kernel["device"] == device and kernel["launches"]]
    print(f"{done} of {len(calls)} problems, {len(ran)} kernels have run: {', '.join(ran)}", flush=True)


if __name__ == "__main__":
    main()
