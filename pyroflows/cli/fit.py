"""``pyroflows fit``: a density of the rows of a table, in a model file."""

from __future__ import annotations

import argparse
import ast
import math
import sys
from typing import TYPE_CHECKING, Any

from pyroflows.cli.options import (
    add_data,
    add_device,
    add_json,
    add_output,
    add_quiet,
    add_seed,
    count,
    finite,
    is_first,
    names,
    positive,
    print_json,
    say,
    share,
    widths,
)

if TYPE_CHECKING:
    from pyroflows.flow import Flow
    from pyroflows.training import FitResult

__all__ = ["add_fit"]

_FLOWS = ("maf", "nsf", "realnvp", "glow", "nice", "iaf", "planar", "radial")
# The least spread of a column beside the rounding of its numbers.
_ROUNDING = 1e-3


def add_fit(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser(
        "fit",
        help="fit a flow to the rows of a table",
        description="Fit a normalizing flow to the rows of a table, by maximum likelihood, and write it to a file. "
        "A share of the rows is held out, by which the best weights are kept and training ends. Whole numbers are "
        "dequantised. Densities are in nats in the units of the columns. Ctrl-C ends training and keeps the best model "
        "so far.",
    )
    add_data(parser)
    add_output(parser, 'the model file, such as model.safetensors, or "-" for standard output')
    parser.add_argument("--columns", type=names, metavar="A,B", help="the columns to model (default: all not given)")
    parser.add_argument(
        "--given", type=names, default=[], metavar="C,D", help="columns to condition on: p(A, B | C, D)"
    )
    parser.add_argument(
        "--categories", type=names, default=[], metavar="D", help="those of the given columns that hold labels"
    )
    parser.add_argument(
        "--integer-columns",
        default="auto",
        metavar="NAMES",
        help='columns of whole numbers, to be dequantised: names, "auto" for those that hold no others, or "none" '
        "(default: %(default)s)",
    )
    parser.add_argument("--flow", choices=_FLOWS, default="nsf", help="which flow (default: %(default)s)")
    parser.add_argument("--num-layers", type=count, metavar="N", help="its number of layers")
    parser.add_argument("--hidden-features", type=widths, metavar="N,N", help="widths of its networks' hidden layers")
    parser.add_argument(
        "--set",
        type=_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another of its options, such as dropout=0.1 or, of nsf, num_bins=16; may be repeated",
    )
    parser.add_argument("--epochs", type=count, default=100, metavar="N", help="most epochs (default: %(default)s)")
    parser.add_argument("--minutes", type=positive, metavar="M", help="most minutes; the learning rate falls with them")
    parser.add_argument("--batch-size", type=count, metavar="N", help="rows a step (default: 256)")
    parser.add_argument("--learning-rate", type=positive, default=1e-3, metavar="R", help="default: %(default)s")
    parser.add_argument("--patience", type=count, default=30, metavar="N", help="epochs without gain (default: 30)")
    parser.add_argument(
        "--validation", type=share, default=0.1, metavar="P", help="share of rows held out (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="default: %(default)s")
    parser.add_argument("--checkpoint", metavar="FILE", help="where a fit that is killed goes on from")
    add_seed(parser, 0, "seed of weights, split and shuffles (default: 0)")
    add_device(parser)
    add_json(parser)
    add_quiet(parser)
    parser.set_defaults(command=_fit, parser=parser)


def _fit(options: argparse.Namespace) -> None:
    _check(options)
    import torch

    import pyroflows
    from pyroflows.cli.model import check_device, check_target, context_of, save_model
    from pyroflows.cli.progress import Log
    from pyroflows.contexts import seeded
    from pyroflows.data.table_files import CellError, open_table
    from pyroflows.tables import table_flow

    check_device(options.device)
    check_target(options.output, options.data)
    table = open_table(options.data, categories=dict.fromkeys(options.categories), dtype=options.dtype)
    columns = options.columns or [name for name in table.columns if name not in options.given]
    if not columns:
        raise ValueError(f"expected a column to model in {table.name}; got none that is not given")
    table.select([*columns, *options.given])
    try:
        rows = table.read()
    except CellError as error:
        if not error.is_text:
            raise
        labels = f"--categories {error.column!r} takes labels"
        hint = labels if error.column in options.given else f"--columns leaves it out, --given with {labels}"
        raise ValueError(f"{error}: {hint}") from None
    categories = {name: table.categories[name] for name in options.given if name in options.categories}
    _check_columns(rows, table, columns, options.dtype)
    x = torch.from_numpy(rows[:, : len(columns)]).to(getattr(torch, options.dtype))
    integers = _integers(options, x, columns)
    context = context_of(rows[:, len(columns) :], options.given, categories) if options.given else None
    if context is not None and context.is_floating_point():
        context = context.to(x.dtype)
    validation: Any = options.validation
    held = None if len(integers) == len(columns) else _held_out(rows, validation, options.seed)
    del rows
    sizes = {"num_layers": options.num_layers, "hidden_features": options.hidden_features, **dict(options.set)}
    sizes = {name: value for name, value in sizes.items() if value is not None}
    with seeded(options.seed):
        try:
            flow = table_flow(x, options.flow, context=context, integer_columns=integers, **sizes)
        except TypeError as error:
            options.parser.error(str(error))
    notes: dict[str, Any] = {
        "columns": columns,
        "given": options.given,
        "categories": categories,
        "integer_columns": [columns[place] for place in integers],
        "data": table.name,
        "rows": len(x),
        "flow": options.flow,
        "seed": options.seed,
        "log_prob": "nats, in the units of the columns",
    }
    say(options, _what(options.flow, flow, notes))
    objective = Log(options.quiet)
    if held is not None:
        validation = x[held] if context is None else (x[held], context[held])
        x, context = x[~held], None if context is None else context[~held]
    try:
        with objective.ended_by_interrupts():
            result = pyroflows.fit(
                flow,
                x,
                context=context,
                validation=validation,
                epochs=options.epochs,
                batch_size=options.batch_size,
                learning_rate=options.learning_rate,
                patience=options.patience,
                max_seconds=None if options.minutes is None else 60 * options.minutes,
                objective=objective,
                checkpoint=options.checkpoint,
                seed=options.seed,
                device=options.device,
                progress=False if options.quiet else "fit",
            )
    except KeyboardInterrupt:
        if not objective.steps:
            raise
        if is_first():
            save_model(flow.cpu(), options.output, {**notes, "stopped": "interrupted"})
        raise KeyboardInterrupt(f"the best model so far is in {options.output}") from None
    if result.best_epoch is None:
        raise RuntimeError(f"expected a finite loss; got none: {result.stopped}")
    if is_first():
        _finish(options, flow, result, notes)


def _finish(options: argparse.Namespace, flow: Flow, result: FitResult, notes: dict[str, Any]) -> None:
    """Save the model, and say how the fit went."""
    from pyroflows.cli.model import save_model

    found = {
        "best_loss": result.best_loss,
        "best_epoch": result.best_epoch,
        "epochs": len(result.history["train"]),
        "steps": result.steps,
        "skipped_steps": result.skipped_steps,
        "seconds": result.seconds,
        "stopped": result.stopped,
    }
    save_model(flow, options.output, finite({**notes, **found, "history": result.history}))
    if options.json:
        print_json({"model": options.output, **notes, "parameters": _number_of_parameters(flow), **found})
    rows = "validation" if result.history.get("validation") else "training"
    epoch = f"epoch {(result.best_epoch or 0) + 1} of {found['epochs']}"
    say(
        options,
        f"{rows} loss {result.best_loss:.4f} nats a row, of {epoch}; {result.stopped}, in {result.seconds:.1f} s\n"
        f"model: {options.output}",
    )


def _check(options: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    both = set(options.columns or ()) & set(options.given)
    if both:
        options.parser.error(
            f"expected columns that are either modelled or given; got {', '.join(sorted(both))} as both"
        )
    strange = set(options.categories) - set(options.given)
    if strange:
        options.parser.error(f"expected --categories among the columns of --given; got {', '.join(sorted(strange))}")
    if options.json and options.output == "-":
        options.parser.error("expected --json, or a model on standard output; got both")
    if options.output == "-" and sys.stdout.isatty():
        options.parser.error("expected standard output to lead to a file or a pipe, for a model; got a terminal")


def _check_columns(rows: Any, table: Any, columns: list[str], dtype: str) -> None:
    """Refuse columns without a density, and numbers that rounding blurs."""
    import numpy as np

    if len(rows) < 2:
        raise ValueError(f"expected at least 2 rows in {table.name}, to fit to and to hold out; got {len(rows)}")
    for place, name in enumerate(columns):
        cells = rows[:, place]
        if (cells == cells[0]).all():
            raise ValueError(
                f"expected columns that vary, since a constant one has no density; "
                f"got {cells[0]:g} in all {len(cells)} rows of column {name!r} of {table.name}"
            )
        largest = float(np.abs(cells).max())
        if largest > math.sqrt(np.finfo(dtype).max):
            raise ValueError(
                f"expected numbers whose squares {dtype} holds; got {largest:.6g} in column {name!r} of {table.name}"
            )
        # The rounding of numbers far from zero, such as times in seconds, must be small beside their spread.
        if largest * float(np.finfo(dtype).eps) > _ROUNDING * cells.std():
            hint = ": --dtype float64 does" if dtype == "float32" else ""
            raise ValueError(
                f"expected {dtype} to tell the numbers of a column apart; got numbers up to "
                f"{largest:.6g} that spread by {cells.std():.3g} in column {name!r} of {table.name}{hint}"
            )


def _integers(options: argparse.Namespace, x: Any, columns: list[str]) -> list[int]:
    """Give the places of the columns of whole numbers."""
    from pyroflows.dequantizers import ColumnDequantizer

    if options.integer_columns == "none":
        return []
    if options.integer_columns == "auto":
        return ColumnDequantizer.from_data(x).steps.nonzero()[:, 0].tolist()
    wanted = names(options.integer_columns)
    for name in wanted:
        if name not in columns:
            raise ValueError(f"expected --integer-columns among the columns {', '.join(columns)}; got {name!r}")
        cells = x[:, columns.index(name)]
        bad = (cells != cells.round()).nonzero()[:, 0].tolist()
        if bad:
            raise ValueError(
                f"expected whole numbers in column {name!r}; got {float(cells[bad[0]]):g} in row {bad[0] + 1}"
            )
    return sorted(columns.index(name) for name in wanted)


def _held_out(rows: Any, share: float, seed: int) -> Any:
    """Say which rows to hold out where some are copies of others, which go together; None where there are none.

    Copies of a row that alone are more than that share, such as the zero of most rows, are held out one by one.
    """
    import numpy as np
    import pandas as pd
    import torch

    table = pd.DataFrame(rows)
    if not table.duplicated().any():
        return None
    kinds = table.groupby(list(table.columns), sort=False).ngroup().to_numpy()
    most = share * len(rows)
    many = np.bincount(kinds)[kinds] > most
    kinds = np.where(many, len(rows) + np.arange(len(rows)), kinds)
    copies = np.bincount(kinds)
    order = np.random.default_rng(seed).permutation(copies.nonzero()[0])
    held = np.isin(kinds, order[copies[order].cumsum() <= most])
    return torch.from_numpy(held) if held.any() else None


def _what(name: str, flow: Flow, notes: dict[str, Any]) -> str:
    shown = ", ".join(notes["columns"][:8]) + (", ..." if len(notes["columns"]) > 8 else "")
    number = len(notes["columns"])
    text = f"{name} of {number} column{'s' * (number > 1)} ({shown})"
    if notes["given"]:
        text += f" given {', '.join(notes['given'])}"
    if notes["integer_columns"]:
        text += f", whole numbers in {', '.join(notes['integer_columns'])}"
    return f"{text}: {_number_of_parameters(flow):,} parameters, {notes['rows']:,} rows of {notes['data']}"


def _number_of_parameters(flow: Flow) -> int:
    return sum(parameter.numel() for parameter in flow.parameters())


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name.isidentifier() or not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE; got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
