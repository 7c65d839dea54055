"""A small set of everything for compute-sanitizer (bench/gpu.sh): every problem of the catalogue and some random cases,
forward and backward, on the GPU.."""

import sys

import torch
from cases import Case, run_kernels
from operators import PROBLEMS, problem
from test_cuda import DTYPES_OF_TORCH, on, results_of

from mmca_ext import _C


def main(arguments):
    device = "cpu" if "--dry-run" in arguments else "cuda"
    for dtype in DTYPES_OF_TORCH:
        for name in PROBLEMS:
            results_of(on(device, problem(name, dtype=dtype, requires_grad=())))
    for seed in range(40):
        run_kernels(Case(seed, device="cuda" if device == "cuda" else "cpu"))
    if device == "cuda":
        torch.cuda.synchronize()
    ran = [kernel["name"] for kernel in _C.kernels() if kernel["device"] == device and kernel["launches"]]
    print(f"{len(ran)} kernels have run: {', '.join(ran)}")


if __name__ == "__main__":
    main(sys.argv[1:])
