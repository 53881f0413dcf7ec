"""``pyroflows info``: describe what a model file holds."""

import argparse
from collections import Counter

from pyroflows.cli.model import load_model, model_file, number_of_parameters
from pyroflows.cli.output import print_json
from pyroflows.files import read

__all__ = ["run"]


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    with model_file(options.model) as file:
        model = load_model(file, "cpu")
        header, _ = read(file, "flow")
    notes, parameters = model.flow.notes, number_of_parameters(model.flow)
    if options.json:
        print_json({"model": options.model, "parameters": parameters, **header})
        return
    lines = {"columns": ", ".join(model.names)}
    if model.integers:
        lines["whole numbers"] = ", ".join(model.integers)
    if model.given:
        lines["given"] = ", ".join(name + _labels(model.categories.get(name)) for name in model.given)
    lines["flow"] = notes.get("flow", type(model.flow).__name__)
    layers = Counter(type(layer).__name__ for layer in model.flow.layers)
    lines["layers"] = ", ".join(f"{number} {name}" for name, number in layers.items())
    lines["parameters"] = f"{parameters:,}, {header['dtype']}"
    if "rows" in notes:
        lines["fitted to"] = f"{notes['rows']:,} rows of {notes['data']}"
    if "best_loss" in notes:
        lines["loss"] = f"{notes['best_loss']:.4f} nats a row, of epoch {notes['best_epoch'] + 1} of {notes['epochs']}"
        lines["ended"] = notes["stopped"]
    lines["written by"] = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    for name, value in lines.items():
        print(f"{name:<14}{value}")


def _labels(labels: list[str] | None) -> str:
    return "" if labels is None else f" ({', '.join(labels[:20])}{', ...' if len(labels) > 20 else ''})"
