"""``pyroflows score``: the log-density of each row of a table."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
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
    is_first,
    print_json,
    say,
)

__all__ = ["add_score"]

_ROWS = 65536


def add_score(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser(
        "score",
        help="give the log-density of each row of a table",
        description="Give the log-density of each row of a table, in nats, in the units of the columns, and the mean. "
        "Of whole numbers, which a model dequantises, it is a lower bound on the log-probability: the logarithm of the "
        "mean over draws of noise. Rows are read, scored and written in chunks, so that a file of any size will do; "
        "the processes of torchrun take turns.",
    )
    add_model(parser)
    add_data(parser)
    add_output(parser, 'a table of one column, log_prob, or "-" for CSV on standard output', required=False)
    parser.add_argument("--draws", type=count, default=8, metavar="N", help="draws of noise (default: %(default)s)")
    parser.add_argument(
        "--pass-model", action="store_true", help="write the model to standard output, for the next command in a pipe"
    )
    add_seed(parser, 0, "seed of the noise (default: 0)")
    add_device(parser)
    add_json(parser)
    add_quiet(parser)
    parser.set_defaults(command=_score, parser=parser)


def _score(options: argparse.Namespace) -> None:
    if options.model == options.data == "-":
        options.parser.error("expected the model or the data on standard input; got both")
    taken = [options.json, options.output == "-", options.pass_model]
    if sum(taken) > 1:
        options.parser.error("expected one of --json, --output - and --pass-model, which all write to standard output")
    import numpy as np

    from pyroflows.cli.model import check_target, load_model, model_file
    from pyroflows.cli.progress import Progress
    from pyroflows.contexts import seeded
    from pyroflows.data.table_files import write_table
    from pyroflows.distributed import in_turn, together

    if options.output is not None:
        check_target(options.output, options.model, options.data)
    with model_file(options.model) as file:
        model = load_model(file, options.device)
        content = file.read_bytes() if options.pass_model else b""
    table, moments = model.open(options.data), _Moments()

    def score(part: tuple[int, Any]) -> Any:
        number, chunk = part
        seed = int(np.random.SeedSequence([options.seed, number]).generate_state(1)[0])
        with seeded(seed, model.flow.device):
            return model.log_prob(chunk, options.draws)

    with together(model.flow.device), Progress("scored", table.num_rows, options.quiet) as progress:

        def scores() -> Iterator[Any]:
            for found in in_turn(score, enumerate(table.chunks(_ROWS))):
                moments.add(found)
                progress.add(len(found))
                yield found[:, None]

        if options.output is None or not is_first():
            for _ in scores():
                pass
        else:
            write_table(options.output, ["log_prob"], scores())
        speed = progress.rows_per_second
    if content and is_first():
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    bound = (
        f"log-mean-exp over {options.draws} draws of noise on {', '.join(model.integers)}" if model.integers else None
    )
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
    what = "mean log-density" if bound is None else "mean log-probability, a lower bound by " + bound + ":"
    error = "" if moments.rows == 1 else f" +- {moments.standard_error:.4f}"
    number = "1 row" if moments.rows == 1 else f"{moments.rows:,} rows"
    lost = f", {moments.not_finite:,} of them without a finite value" if moments.not_finite else ""
    say(options, f"{what} {moments.mean:.4f}{error} nats a row; {number}{lost}, {speed:,.0f} a second")


class _Moments:
    """Mean and standard error of numbers that come in parts; none where a number is not finite."""

    def __init__(self) -> None:
        self.rows, self.not_finite, self._mean, self._squares = 0, 0, 0.0, 0.0

    def add(self, found: Any) -> None:
        """Take in a part, by the difference of its mean, so that no digits cancel."""
        finite = found[abs(found) < math.inf]
        before, rows = self.rows - self.not_finite, len(finite)
        self.rows, self.not_finite = self.rows + len(found), self.not_finite + len(found) - rows
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
