"""``pyroflows sample``: draw new rows of a table."""

import argparse
import math
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from pyroflows.cli.model import TableModel, check_target, load_model, write_chunks
from pyroflows.cli.output import Progress, print_json, say
from pyroflows.distributed import broadcast, together

__all__ = ["run"]

# Limits of a chunk.
_ROWS = 65536
_NUMBERS = 2**22


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    check_target(options.output, options.model, options.given)
    model = load_model(options.model, options.device)
    columns = [*model.names, *model.given]
    given, total = _given(model, options.given)
    total = None if total is None else total * options.num_samples
    with together(model.flow.device), Progress("drawn", total, options.quiet) as progress:
        seed = broadcast(int.from_bytes(os.urandom(4), "big") if options.seed is None else options.seed)
        size = max(1, min(_ROWS, _NUMBERS // len(columns)))
        chunks = model.map_chunks(model.sample, _repeated(given, options.num_samples, size), seed, progress)
        write_chunks(options.output, columns, chunks, integers=model.integers, categories=model.categories)
        rows, speed = progress.rows, progress.rows_per_second
    if options.json:
        print_json({"rows": rows, "output": options.output, "rows_per_second": speed})
    if options.output != "-":
        say(options, f"{rows:,} rows in {options.output}, {speed:,.0f} a second")


def _given(model: TableModel, text: str | None) -> tuple[Iterable[np.ndarray], int | None]:
    """Return the cells that the draws are conditioned on, in chunks, and their number of rows if it is known."""
    if not model.given:
        if text is not None:
            raise ValueError(f"expected no --given for a model that is not conditional; got {text}")
        return [np.empty((1, 0))], 1
    if text is None:
        raise ValueError(f"expected --given with {', '.join(model.given)}, on which the model is conditioned; got none")
    if "=" not in text:
        table = model.open(text, given_alone=True)
        return table.chunks(_ROWS), table.num_rows
    values = _values(text, model.given)
    if set(values) != set(model.given):
        raise ValueError(f"expected --given with a value of each of {', '.join(model.given)}; got {text}")
    return [np.array([[_cell(model, name, values[name]) for name in model.given]])], 1


def _values(text: str, names: Sequence[str]) -> dict[str, str]:
    """Parse ``NAME=VALUE,...``; a value may hold commas if quoted, as in CSV, or if what follows is no other name."""
    values: dict[str, str] = {}
    last = ""
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if values and not (equals and name.strip() in names):
            values[last] += f",{part}"
        else:
            last = name.strip()
            values[last] = value
    values = {name: value.strip() for name, value in values.items()}
    return {n: v[1:-1] if len(v) > 1 and v[0] == v[-1] == '"' else v for n, v in values.items()}


def _cell(model: TableModel, name: str, value: str) -> float:
    if name in model.categories:
        labels = model.categories[name]
        if value not in labels:
            known = ", ".join(map(repr, labels[:10])) + (", ..." if len(labels) > 10 else "")
            raise ValueError(f"expected one of the categories {known} as {name}; got {value!r}")
        return float(labels.index(value))
    try:
        number = float({"true": "1", "false": "0"}.get(value.lower(), value))  # as tables are read
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"expected a number as {name}; got {value!r}")
    return number


def _repeated(given: Iterable[np.ndarray], times: int, size: int) -> Iterator[np.ndarray]:
    """Repeat each row, in chunks of at most a size."""
    step = max(1, size // times)
    for cells in given:
        for start in range(0, len(cells), step):
            for first in range(0, times, size):
                yield cells[start : start + step].repeat(min(size, times - first), axis=0)
