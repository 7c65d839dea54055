"""The command line. Nothing imports torch before the environment is as --isa asks."""

import argparse
import os
import sys
from pathlib import Path

# What makes torch and the libraries below it, and our kernels, choose an instruction set; all are read at start.
# ATEN_CPU_CAPABILITY alone is not enough: oneDNN would still use AMX, which torch's bfloat16 attention then trips over.
HELD = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "MMCA_EXT_ISA": "avx2",
    },
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "MMCA_EXT_ISA": "avx512",
    },
}
COMMANDS = {
    "run": "time every case of the table against its peers (the default command)",
    "scaling": "time against length, image share and number of keys",
    "linear": "time and memory of linear attention against length",
    "gpu": "time our CUDA kernels against torch's on a GPU",
    "plot": "draw the figures of a results file",
    "compare": "what differs between two results files",
    "readme": "put a results file into the README's table",
}


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Our operators and layers beside what one would write without them."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    added = {name: commands.add_parser(name, help=text, description=text) for name, text in COMMANDS.items()}
    for name, seconds in (("run", 2.0), ("scaling", 1.0), ("linear", 0.5)):
        timed = added[name]
        timed.add_argument("--filter", default="", help="only cases whose name contains this")
        timed.add_argument("--seconds", type=float, default=seconds, help="per case and direction")
        timed.add_argument("--threads", type=int, help="for both sides")
        timed.add_argument(
            "--isa",
            choices=HELD,
            help="hold torch and our kernels to this instruction set (ours alone: the environment's MMCA_EXT_ISA)",
        )
        timed.add_argument(
            "--json", type=Path, help="write the results here; what run, scaling or linear wrote there before is kept"
        )
    gpu = added["gpu"]
    gpu.add_argument("--filter", default="", help="only cases whose name contains this")
    gpu.add_argument("--seconds", type=float, default=0.4, help="per case and direction")
    gpu.add_argument("--budget", type=float, help="seconds after which no further case is begun")
    gpu.add_argument("--json", type=Path, help="write the results here, and a table beside it (.md)")
    gpu.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run")
    gpu.add_argument("--compile", action="store_true", help="time nothing: fill the cache of the peers' compilers")
    gpu.add_argument(
        "--resume", action="store_true", help="keep what --json has, and begin with the case after its last"
    )
    gpu.add_argument("--shrink", type=int, default=1, help="divide lengths by this, for a dry run")
    added["plot"].add_argument("results", type=Path)
    added["plot"].add_argument("--format", default="svg", choices=("svg", "png"))
    added["plot"].add_argument("--out", type=Path, help="folder of the figures; default: beside the results")
    added["compare"].add_argument("before", type=Path)
    added["compare"].add_argument("after", type=Path)
    added["readme"].add_argument("results", type=Path)
    if not argv or (argv[0] not in COMMANDS and argv[0] not in ("-h", "--help")):
        argv = ["run", *argv]
    return parser.parse_args(argv)


def hold_to(isa, argv):
    """Starts this process anew where the environment does not yet say what --isa asks."""
    wanted = HELD[isa]
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, "-m", "bench", *argv], {**os.environ, **wanted})


def main(argv=None):
    """Runs a command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    if getattr(options, "isa", None):
        hold_to(options.isa, argv)
    from . import results

    try:
        if options.command in ("run", "scaling", "linear"):
            from . import measure

            measure.run(options, argv)
        elif options.command == "gpu":
            from . import gpu

            gpu.run(options, argv)
        elif options.command == "plot":
            from . import plots

            plots.draw(options.results, options.out or options.results.parent, options.format)
        elif options.command == "compare":
            from . import compare

            compare.show(results.load(options.before), results.load(options.after))
        else:
            from . import readme

            readme.write(results.load(options.results), options.results)
    except results.Problem as problem:
        print(f"bench {options.command}: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; no results written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
