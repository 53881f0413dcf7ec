"""``pyroflows score``: compute the log-density of each row of a table."""

import argparse
import math
import sys
from collections.abc import Iterator
from functools import partial

import numpy as np

from pyroflows.cli.model import TableModel, check_target, load_model, model_file
from pyroflows.cli.output import is_first, print_json, say
from pyroflows.cli.progress import Progress
from pyroflows.data.table_files import write_table
from pyroflows.distributed import together

__all__ = ["run"]

_ROWS = 65536


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    if options.output is not None:
        check_target(options.output, options.model, options.data)
    with model_file(options.model) as file:
        model = load_model(file, options.device)
        content = file.read_bytes() if options.pass_model else b""
    moments, speed = _score(model, options)
    if content and is_first():
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    integers = ", ".join(model.integers)
    bound = f"log-mean-exp over {options.draws} draws of noise on {integers}" if integers else None
    if options.json:
        print_json(
            {
                "rows": moments.rows,
                "mean_log_prob": moments.mean,
                "standard_error": moments.standard_error,
                "not_finite": moments.not_finite,
                "unit": "nats",
                "lower_bound": bound,
                "rows_per_second": speed,
            }
        )
    say(options, _describe(moments, bound, speed))


def _score(model: TableModel, options: argparse.Namespace) -> "tuple[_Moments, float]":
    """Score the rows, write the scores, and return their moments and the rows per second."""
    table, moments, score = model.open(options.data), _Moments(), partial(model.log_prob, draws=options.draws)
    with together(model.flow.device), Progress("scored", table.num_rows, options.quiet) as progress:

        def scores() -> Iterator[np.ndarray]:
            for log_probs in model.map_chunks(score, table.chunks(_ROWS), options.seed, progress):
                moments.add(log_probs)
                yield log_probs[:, None]

        if options.output is None or not is_first():
            for _ in scores():
                pass
        else:
            write_table(options.output, ["log_prob"], scores())
        return moments, progress.rows_per_second


def _describe(moments: "_Moments", bound: str | None, speed: float) -> str:
    what = "mean log-density" if bound is None else f"mean log-probability, a lower bound by {bound}:"
    error = "" if moments.rows == 1 else f" +- {moments.standard_error:.4f}"
    rows = "1 row" if moments.rows == 1 else f"{moments.rows:,} rows"
    lost = f", {moments.not_finite:,} of them without a finite value" if moments.not_finite else ""
    return f"{what} {moments.mean:.4f}{error} nats a row; {rows}{lost}, {speed:,.0f} a second"


class _Moments:
    """Mean and standard error of numbers that come in chunks; nan if a number is not finite."""

    def __init__(self) -> None:
        self.rows, self.not_finite, self._mean, self._squares = 0, 0, 0.0, 0.0

    def add(self, numbers: np.ndarray) -> None:
        """Take in a chunk, by the difference of its mean, so that no digits cancel."""
        finite = numbers[np.isfinite(numbers)]
        before, rows = self.rows - self.not_finite, len(finite)
        self.rows, self.not_finite = self.rows + len(numbers), self.not_finite + len(numbers) - rows
        if rows:
            difference = float(finite.mean(dtype=float)) - self._mean
            self._mean += difference * rows / (before + rows)
            self._squares += rows * float(finite.var(dtype=float)) + difference**2 * before * rows / (before + rows)

    @property
    def mean(self) -> float:
        return math.nan if self.not_finite else self._mean

    @property
    def standard_error(self) -> float:
        known = self.rows > 1 and not self.not_finite
        return math.sqrt(self._squares / (self.rows - 1) / self.rows) if known else math.nan
