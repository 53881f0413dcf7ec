"""``pyroflows demo``: a first look, on bundled data."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pyroflows.cli.options import add_seed

__all__ = ["add_demo"]


def add_demo(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser(
        "demo",
        help="fit flows to bundled data and write figures and a short report",
        description="Fit flows to a bundled table and to two moons, beside a Gaussian, a Gaussian mixture and a kernel "
        "density, to images of digits, beside a Gaussian mixture, and to the posterior of a model, beside a mean-field "
        "guide; write figures and a short report. It needs no network, and at most two and a half minutes.",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("pyroflows-demo"),
        metavar="DIR",
        help="where to write (default: %(default)s)",
    )
    add_seed(parser, 0, "seed of split, data and fits (default: 0)")
    parser.add_argument(
        "--quick", action="store_true", help="a few seconds to see that it runs; its numbers mean little"
    )
    parser.set_defaults(command=_demo)


def _demo(options: argparse.Namespace) -> None:
    from pyroflows.cli.demo.report import run

    run(options.output, seed=options.seed, quick=options.quick)
