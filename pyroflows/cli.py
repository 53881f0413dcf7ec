"""The command line: ``pyroflows demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pyroflows._version import __version__

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit status: 0 done, 1 it failed, 2 the arguments were wrong.

    Args:
        arguments: the words after the program's name; by default those it was started with.

    Example:
        >>> main([])  # doctest: +ELLIPSIS
        usage: pyroflows ...
        2
    """
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:  # argparse has said why, or printed its help
        return int(stop.code or 0)
    if options.command is None:
        parser.print_help()
        return 2
    try:
        options.command(options)
    except KeyboardInterrupt:
        print("pyroflows: interrupted", file=sys.stderr)
        return 1
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        print(f"pyroflows: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pyroflows", description="Normalizing flows for Pyro.")
    parser.add_argument("--version", action="version", version=f"pyroflows {__version__}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="fit flows to bundled data and write figures and a short report",
        description="Fit flows to a bundled table and to two moons, beside a Gaussian, a Gaussian mixture and a kernel "
        "density, to images of digits, beside a Gaussian mixture, and to the posterior of a model, beside a mean-field "
        "guide; write figures and a short report. It needs no network, and at most two and a half minutes.",
    )
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("pyroflows-demo"),
        metavar="DIR",
        help="where to write (default: %(default)s)",
    )
    demo.add_argument("--seed", type=_seed, default=0, metavar="N", help="seed of split, data and fits (default: 0)")
    demo.add_argument("--quick", action="store_true", help="a few seconds to see that it runs; its numbers mean little")
    demo.set_defaults(command=_demo)
    return parser


def _demo(options: argparse.Namespace) -> None:
    from pyroflows.demo import run  # here, so that help and wrong arguments do not wait for matplotlib

    run(options.output, seed=options.seed, quick=options.quick)


def _seed(text: str) -> int:
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 2**32 - 1; got {text!r}")
    return seed
