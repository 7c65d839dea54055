"""What is installed, how it was built, and which kernel serves what here: `python -m mmca_ext.info [--json]`."""

import argparse
import json
import os
import platform
import sys
from itertools import groupby
from typing import Any

import torch

from mmca_ext._load import load


def collect() -> dict[str, Any]:
    extension = load()
    build = extension.build_info()
    return {
        "mmca_ext": build["version"],
        "python": platform.python_version(),
        "torch": {"running": str(torch.__version__), "built_against": build["torch"]},
        "build": build,
        "cpu": {
            "machine": platform.machine(),
            "features": extension.cpu_features(),
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
        },
        "openmp": _openmp_runtimes(),
        "cuda": _cuda_devices(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)},
        "kernels": extension.kernels(),
    }


_VARIABLES = ("MMCA_EXT_", "OMP_NUM_THREADS", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "CUDA_VISIBLE_DEVICES")


def _openmp_runtimes() -> list[str]:
    """The OpenMP libraries in this process. More than one is a fault: each would start threads of its own."""
    with open("/proc/self/maps") as maps:
        paths = {line.split(maxsplit=5)[-1].strip() for line in maps}
    return sorted(p for p in paths if os.path.basename(p).startswith(("libgomp", "libomp", "libiomp")))


def _cuda_devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [
        f"{p.name} (sm_{p.major}{p.minor})"
        for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]


def render(facts: dict[str, Any]) -> str:
    build, cpu = facts["build"], facts["cpu"]
    features = " ".join(name for name, present in cpu["features"].items() if present)
    rows = [
        ("mmca_ext", f"{facts['mmca_ext']}, commit {(build['commit'] or 'unknown')[:12]}"),
        ("python", facts["python"]),
        ("torch", f"{facts['torch']['running']}, built against {facts['torch']['built_against']}"),
        ("compiler", f"{build['compiler']}, {build['flags']}"),
        ("built for", f"CUDA {build['cuda']}, {build['cuda_archs']}" if build["cuda"] else "CPU only"),
        ("cpu", f"{cpu['machine']}: {features or 'no feature that a kernel uses'}"),
        ("threads", f"{cpu['threads']} on {cpu['cores']} cores"),
        ("openmp", ", ".join(facts["openmp"]) or "none"),
        ("gpu", ", ".join(facts["cuda"]) or "none"),
        *(("environment", f"{name}={value}") for name, value in facts["environment"].items()),
    ]
    lines = [f"{name:12}{value}" for name, value in rows]
    return "\n".join([*lines, "", *_kernel_table(facts["kernels"])])


def _kernel_table(kernels: list[dict[str, Any]]) -> list[str]:
    """For each case the kernel that serves it, then the others with the reason why not."""

    def case(kernel: dict[str, Any]) -> tuple[str, str, str]:
        return kernel["device"], kernel["op"], kernel["dtype"]

    table = [("case", "", "kernel", "isa", "runs", "")]
    for key, group in groupby(sorted(kernels, key=lambda k: (case(k), not k["selected"])), key=case):
        device, op, dtype = key
        for i, kernel in enumerate(group):
            title = f"{op} {dtype} {device}" if i == 0 else ""
            mark = "*" if kernel["selected"] else "" if kernel["available"] else "-"
            table.append((title, mark, kernel["name"], kernel["isa"], str(kernel["launches"]), kernel["reason"]))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return [*lines, "", "* serves the case    - refuses"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mmca_ext.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="the same facts, for programs and bug reports")
    options = parser.parse_args(arguments)
    try:
        facts = collect()
    except ImportError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(facts, indent=2) if options.json else render(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
