"""``pyroflows check``: does a model invert, and are its log-determinants right, on rows of a table?"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from pyroflows.cli.options import add_data, add_device, add_json, add_model, add_quiet, count, positive, print_json, say

__all__ = ["add_check"]


def add_check(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser(
        "check",
        help="check that a model inverts and that its log-determinants are right",
        description="Take rows of a table to the latent and back, and compare the log-determinants with those of the "
        "Jacobian that automatic differentiation gives. Exit status 1 if an error is above the tolerance.",
    )
    add_model(parser)
    add_data(parser)
    parser.add_argument("--rows", type=count, default=100, metavar="N", help="rows to look at (default: %(default)s)")
    parser.add_argument(
        "--tolerance", type=positive, metavar="E", help="largest error (default: 1e-3 of float32, 1e-6 of float64)"
    )
    add_device(parser)
    add_json(parser)
    add_quiet(parser)
    parser.set_defaults(command=_check, parser=parser)


def _check(options: argparse.Namespace) -> int:
    if options.model == options.data == "-":
        options.parser.error("expected the model or the data on standard input; got both")
    import pyroflows
    from pyroflows.cli.model import load_model, model_file, some_rows
    from pyroflows.contexts import seeded

    with model_file(options.model) as file:
        model = load_model(file, options.device)
    x, context = model.split(some_rows(model.open(options.data), options.rows, seed=0))
    if model.flow.dequantizer is not None:
        with seeded(0, model.flow.device):
            x = model.flow.dequantizer(x)[0]
    report = pyroflows.check(model.flow, x, context=context, tolerance=options.tolerance)
    if options.json:
        print_json({**asdict(report), "ok": report.ok})
    say(options, str(report))
    return 0 if report.ok else 1
