"""``pyroflows plot``: pictures of a model."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from pyroflows.cli.options import (
    add_data,
    add_device,
    add_json,
    add_model,
    add_output,
    add_quiet,
    add_seed,
    count,
    print_json,
    say,
)

__all__ = ["add_plot"]


def add_plot(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser(
        "plot",
        help="draw a model's samples beside the data, or its training",
        description="Draw marginals and pairs of columns, rows of a table beside as many that the model draws; without "
        "a table, how the loss fell in training.",
    )
    add_model(parser)
    add_data(parser, required=False)
    add_output(parser, "the picture, a .png, .pdf or .svg")
    parser.add_argument("--rows", type=count, default=2000, metavar="N", help="rows to draw (default: %(default)s)")
    parser.add_argument("--columns", type=count, default=8, metavar="N", help="most columns (default: %(default)s)")
    add_seed(parser, 0, "seed of rows and samples (default: 0)")
    add_device(parser)
    add_json(parser)
    add_quiet(parser)
    parser.set_defaults(command=_plot, parser=parser)


def _plot(options: argparse.Namespace) -> None:
    if options.model == options.data == "-":
        options.parser.error("expected the model or the data on standard input; got both")
    if Path(options.output).suffix not in (".png", ".pdf", ".svg"):
        options.parser.error(f"expected --output that ends in .png, .pdf or .svg; got {options.output}")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from pyroflows import plots
    from pyroflows.cli.model import check_target, load_model, model_file, some_rows
    from pyroflows.contexts import seeded
    from pyroflows.training import FitResult

    check_target(options.output, options.model, options.data)
    with model_file(options.model) as file:
        model = load_model(file, options.device)
    if options.data is None:
        history = model.flow.notes.get("history")
        if not history:
            raise ValueError(
                f"expected a model with its training in the notes, or DATA; got neither in {options.model}"
            )
        losses = {name: [math.nan if loss is None else loss for loss in values] for name, values in history.items()}
        fitted = FitResult(losses, model.flow.notes["best_epoch"])
        plots.training_curves({model.flow.notes["flow"]: fitted})
    else:
        chunk = some_rows(model.open(options.data), options.rows, options.seed)
        features = len(model.names)
        with seeded(options.seed, model.flow.device):
            drawn = model.sample(chunk[:, features:])
        shown = slice(min(features, options.columns))
        plots.pair_plot(chunk[:, shown], drawn[:, shown], names=model.names[shown])
    plt.savefig(options.output, dpi=150, bbox_inches="tight")
    plt.close("all")
    if options.json:
        print_json({"picture": options.output})
    say(options, f"picture: {options.output}")
