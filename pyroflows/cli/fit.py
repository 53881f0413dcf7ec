"""``pyroflows fit``: fit a density to the rows of a table, and write it to a model file."""

import argparse
import math
from typing import Any

import numpy as np
import torch

from pyroflows.cli.model import check_target, context_of, number_of_parameters, save_model
from pyroflows.cli.output import TrainingLog, finite, is_first, print_json, say
from pyroflows.data.table_files import CellError, TableFile, open_table
from pyroflows.dequantizers import ColumnDequantizer
from pyroflows.distributed import choose_device
from pyroflows.flow import Flow
from pyroflows.tables import fit_best, fit_table
from pyroflows.training import FitResult

__all__ = ["run"]

# The least spread of a column, relative to the rounding of its numbers.
_ROUNDING = 1e-3


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    choose_device(options.device)
    check_target(options.output, options.data)
    table, columns = _open(options)
    cells, dtype = _read(table, options), getattr(torch, options.dtype)
    x, given = cells[:, : len(columns)], cells[:, len(columns) :]
    _check_precision(x, columns, table.name, options.dtype)
    integers = sorted(map(columns.index, table.integers))
    if options.integer_columns == "auto":
        integers = ColumnDequantizer.from_data(torch.from_numpy(x).to(dtype)).steps.nonzero()[:, 0].tolist()
    categories = {name: table.categories[name] for name in options.given if name in options.categories}
    notes: dict[str, Any] = {
        "columns": columns,
        "given": options.given,
        "categories": categories,
        "integer_columns": [columns[place] for place in integers],
        "data": table.name,
        "rows": len(x),
        "flow": "nsf" if options.flow == "auto" and (options.given or options.checkpoint) else options.flow,
        "seed": options.seed,
        "log_prob": "nats, in the units of the columns",
    }
    log = TrainingLog(options.quiet)
    started: list[Flow] = []

    def start(flow: Flow) -> None:
        started.append(flow)
        say(options, _describe(flow, notes))

    sizes = {"num_layers": options.num_layers, "hidden_features": options.hidden_features, **dict(options.set)}
    passed = ("validation", "batch_size", "seed", "device", "epochs", "learning_rate", "patience")
    settings = {name: value for name in passed if (value := getattr(options, name)) is not None}
    settings |= {
        "columns": columns,
        "integer_columns": integers,
        "flow_options": {name: size for name, size in sizes.items() if size is not None},
        "on_start": start,
        "on_step": log,
        "max_seconds": None if options.minutes is None else 60 * options.minutes,
        "progress": False if options.quiet else "fit",
    }
    try:
        with log.interruptible():
            if notes["flow"] == "auto":
                flow, result, selection = fit_best(x, np.ones(len(x)), **settings)
                notes["selection"] = repr(selection)
            else:
                settings |= {"dtype": dtype, "checkpoint": options.checkpoint}
                context = context_of(given, options.given, categories) if options.given else None
                flow, result = fit_table(x, notes["flow"], context=context, **settings)
    except TypeError as error:
        if started:
            raise
        options.parser.error(str(error))  # an option that the flow does not take
    except KeyboardInterrupt:
        if not log.steps:
            raise
        if is_first():
            save_model(started[0].to("cpu", dtype), options.output, {**notes, "stopped": "interrupted"})
        raise KeyboardInterrupt(f"the best model so far is in {options.output}") from None
    if is_first():
        _finish(options, flow.to(dtype), result, notes)


def _open(options: argparse.Namespace) -> tuple[TableFile, list[str]]:
    """Open the table, and return it with the names of the columns to model."""
    table = open_table(options.data, categories=dict.fromkeys(options.categories), dtype=options.dtype)
    columns = options.columns or [name for name in table.columns if name not in options.given]
    if not columns:
        raise ValueError(f"expected a column to model in {table.name}; got only columns that are given")
    table.select([*columns, *options.given])
    if options.integer_columns != "auto":
        table.integers = set(options.integer_columns)
        if unknown := sorted(table.integers - set(columns)):
            raise ValueError(f"expected --integer-columns among the columns {', '.join(columns)}; got {unknown[0]!r}")
    return table, columns


def _read(table: TableFile, options: argparse.Namespace) -> np.ndarray:
    """Read the table, with a hint on columns of text."""
    try:
        return table.read()
    except CellError as error:
        if not error.is_text:
            raise
        labels = f"--categories {error.column!r} takes labels"
        hint = labels if error.column in options.given else f"--columns leaves it out, --given with {labels}"
        raise ValueError(f"{error}: {hint}") from None


def _check_precision(x: np.ndarray, columns: list[str], table: str, dtype: str) -> None:
    """Refuse columns whose numbers the dtype does not tell apart, or whose squares it does not hold."""
    for cells, name in zip(x.T, columns, strict=True):
        largest, where = float(np.abs(cells).max()), f"in column {name!r} of {table}"
        if largest > math.sqrt(np.finfo(dtype).max):
            raise ValueError(f"expected numbers whose squares {dtype} holds; got {largest:.6g} {where}")
        # The rounding of numbers far from zero, such as times in seconds, must be small next to their spread.
        if np.ptp(cells) and largest * float(np.finfo(dtype).eps) > _ROUNDING * cells.std():
            hint = ": --dtype float64 does" if dtype == "float32" else ""
            raise ValueError(
                f"expected {dtype} to tell the numbers of a column apart; got numbers up to "
                f"{largest:.6g} that spread by {cells.std():.3g} {where}{hint}"
            )


def _describe(flow: Flow, notes: dict[str, Any]) -> str:
    columns = notes["columns"]
    shown = ", ".join(columns[:8]) + (", ..." if len(columns) > 8 else "")
    text = f"{notes['flow']} of {len(columns)} column{'s' * (len(columns) > 1)} ({shown})"
    if notes["given"]:
        text += f" given {', '.join(notes['given'])}"
    if notes["integer_columns"]:
        text += f", whole numbers in {', '.join(notes['integer_columns'])}"
    size = "Gaussian mixtures" if notes["flow"] == "auto" else f"{number_of_parameters(flow):,} parameters"
    return f"{text}: {size}, {notes['rows']:,} rows of {notes['data']}"


def _finish(options: argparse.Namespace, flow: Flow, result: FitResult, notes: dict[str, Any]) -> None:
    """Save the model, and say how the fit went."""
    kept = ("best_loss", "best_epoch", "steps", "skipped_steps", "stopped")
    summary = {"epochs": len(result.history["train"]), **{name: getattr(result, name) for name in kept}}
    if result.stopped.startswith("max_seconds"):
        summary["stopped"] = f"--minutes {options.minutes:g} reached"
    # Without seconds, so that the same seed gives the same file.
    history = {name: values for name, values in result.history.items() if name != "seconds"}
    save_model(flow, options.output, finite({**notes, **summary, "history": history}))
    if options.json:
        parameters = {"parameters": number_of_parameters(flow), "seconds": result.seconds}
        print_json({"model": options.output, **notes, **parameters, **summary})
    is_held_out = result.history.get("validation") or result.best_epoch is None
    rows = "validation" if is_held_out else "training"
    if "selection" in notes:
        say(options, notes["selection"])
    epoch = f"epoch {(result.best_epoch or 0) + 1} of {summary['epochs']}; {summary['stopped']}"
    of = epoch if result.best_epoch is not None else "the simple density"
    how = f"{rows} loss {result.best_loss:.4f} nats a row, of {of}, in {result.seconds:.1f} s"
    say(options, f"{how}\nmodel: {options.output}")
