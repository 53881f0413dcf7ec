"""``pyroflows plot``: draw a model's samples next to the data, or its training."""

import argparse
import math

import matplotlib
from matplotlib import pyplot as plt

from pyroflows import plots
from pyroflows.cli.model import TableModel, check_target, load_model, sample_rows
from pyroflows.cli.output import print_json, say
from pyroflows.contexts import seeded
from pyroflows.training import FitResult

__all__ = ["run"]


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    matplotlib.use("Agg")
    check_target(options.output, options.model, options.data)
    model = load_model(options.model, options.device)
    if options.data is None:
        _plot_training(model, options.model)
    else:
        cells = sample_rows(model.open(options.data), options.rows, options.seed)
        features = len(model.names)
        with seeded(options.seed, model.flow.device):
            samples = model.sample(cells[:, features:])
        shown = slice(min(features, options.columns))
        plots.pair_plot(cells[:, shown], samples[:, shown], names=model.names[shown])
    plt.savefig(options.output, dpi=150, bbox_inches="tight")
    plt.close("all")
    if options.json:
        print_json({"picture": options.output})
    say(options, f"picture: {options.output}")


def _plot_training(model: TableModel, path: str) -> None:
    notes = model.flow.notes
    if not notes.get("history"):
        raise ValueError(f"expected a model with its training in the notes, or DATA; got neither in {path}")
    losses = {name: [math.nan if x is None else x for x in values] for name, values in notes["history"].items()}
    plots.training_curves({notes["flow"]: FitResult(losses, notes["best_epoch"])})
