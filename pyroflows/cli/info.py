"""``pyroflows info``: what a model file holds."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from pyroflows.cli.options import add_json, add_model, print_json

__all__ = ["add_info"]


def add_info(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser(
        "info",
        help="say what a model file holds",
        description="Say what a model file holds: columns, layers, number of parameters, fit, and versions of the "
        "libraries that wrote it; as JSON also the recipe by which it is built, and all notes.",
    )
    add_model(parser)
    add_json(parser)
    parser.set_defaults(command=_info, parser=parser)


def _info(options: argparse.Namespace) -> None:
    from pyroflows.cli.model import load_model, model_file
    from pyroflows.files import read

    with model_file(options.model) as file:
        model = load_model(file, "cpu")
        header, _ = read(file, "flow")
    flow, notes = model.flow, model.flow.notes
    parameters = sum(parameter.numel() for parameter in flow.parameters())
    if options.json:
        print_json({"model": options.model, "parameters": parameters, **header})
        return
    kinds = Counter(type(layer).__name__ for layer in flow.layers)
    lines = {"columns": ", ".join(model.names)}
    if model.integers:
        lines["whole numbers"] = ", ".join(model.integers)
    if model.given:
        lines["given"] = ", ".join(name + _labels(model.categories.get(name)) for name in model.given)
    lines["flow"] = notes.get("flow", type(flow).__name__)
    lines["layers"] = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
    lines["parameters"] = f"{parameters:,}, {header['dtype']}"
    if "rows" in notes:
        lines["fitted to"] = f"{notes['rows']:,} rows of {notes['data']}"
    if "best_loss" in notes:
        lines["loss"] = f"{notes['best_loss']:.4f} nats a row, of epoch {notes['best_epoch'] + 1} of {notes['epochs']}"
        lines["ended"] = f"{notes['stopped']}, in {notes['seconds']:.1f} s"
    lines["written by"] = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    for name, value in lines.items():
        print(f"{name:<14}{value}")


def _labels(labels: list[str] | None) -> str:
    return "" if labels is None else f" ({', '.join(labels[:20])}{', ...' if len(labels) > 20 else ''})"
