"""The command line: ``pyroflows COMMAND``, each command in a file of its own."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from pyroflows._version import __version__
from pyroflows.cli.bench import add_bench
from pyroflows.cli.check import add_check
from pyroflows.cli.demo import add_demo
from pyroflows.cli.fit import add_fit
from pyroflows.cli.info import add_info
from pyroflows.cli.plot import add_plot
from pyroflows.cli.sample import add_sample
from pyroflows.cli.score import add_score

__all__ = ["main"]

_DESCRIPTION = """\
Normalizing flows for Pyro: fit a density to a table, score rows, draw new ones.

  pyroflows fit data.csv --output model.safetensors
  pyroflows score model.safetensors data.csv --output scores.csv
  pyroflows sample model.safetensors -n 1000 --output new.csv
"""

_EPILOG = """\
Tables end in .csv (with a line of names), .parquet, .npy or .npz (file.npz:name of several arrays); "-" is CSV on
standard input or output, and a model of "-" is a model there. So commands go in a pipe:

  pyroflows sample a.safetensors -n 1000 --output - | pyroflows score b.safetensors -
  pyroflows fit data.csv --output - | pyroflows score - data.csv --output scores.csv --pass-model \\
    | pyroflows sample - -n 1000 --output new.csv

Exit status: 0 done, 1 it failed (with one line on standard error that says why), 2 wrong use.
"""


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
        if options.command is None:
            parser.print_help()
            return 2
        status = int(options.command(options) or 0)
        sys.stdout.flush()
        return status
    except SystemExit as stop:  # argparse has said why, or printed its help
        return int(stop.code or 0)
    except KeyboardInterrupt as interrupt:
        print(": ".join(["pyroflows: interrupted", *map(str, interrupt.args)]), file=sys.stderr)
    except BrokenPipeError:  # what reads from this has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        print(f"pyroflows: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pyroflows",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pyroflows {__version__}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for add in (add_demo, add_fit, add_score, add_sample, add_check, add_plot, add_info, add_bench):
        add(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    """A parser, also of each command, whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")
