"""``pyroflows info``: what a model file holds."""

from __future__ import annotations

import argparse
from typing import Any

from pyroflows.cli.options import add_json, print_json

__all__ = ["add_info"]


def add_info(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser(
        "info",
        help="say what a model file holds",
        description="Say what a model file holds: recipe, columns, versions, notes and numbers of parameters.",
    )
    parser.add_argument("model", metavar="MODEL", help='a model file, or "-" for standard input')
    add_json(parser)
    parser.set_defaults(command=_info, parser=parser, quiet=False)


def _info(options: argparse.Namespace) -> None:
    from pyroflows.cli.model import load_model, model_file

    with model_file(options.model) as file:
        model = load_model(file, "cpu")
    flow = model.flow
    print_json({"parameters": sum(p.numel() for p in flow.parameters()), "notes": flow.notes})
