"""The command line: `python -m mmca_ext.demo train | caption`."""

import argparse
import sys

from .problem import Problem, require


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    try:
        require(numpy="numpy")  # torch installs without it
    except Problem as problem:
        print(f"mmca_ext.demo: {problem}", file=sys.stderr)
        return 1
    from . import caption, train

    parser = argparse.ArgumentParser(prog="python -m mmca_ext.demo", description="Captions for pairs of real digits.")
    commands = parser.add_subparsers(dest="command", required=True)
    for module in (train, caption):
        summary = module.__doc__.splitlines()[0]
        command = commands.add_parser(
            module.__name__.rpartition(".")[2],
            help=summary,
            description=summary,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(argv)
    try:
        options.run(options)
    except Problem as problem:
        print(f"mmca_ext.demo {options.command}: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
