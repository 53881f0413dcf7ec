"""``pyroflows score``: compute the log-density of each row of a table."""

import argparse
import math
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from pyroflows.cli.model import check_target, load_model, model_file, write_chunks
from pyroflows.cli.output import Progress, is_first, print_json, say
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
    table = model.open(options.data)
    score = partial(model.log_prob, draws=options.draws)
    moments: list[tuple[int, int, float, float]] = []  # of each chunk: rows, those not finite, mean and variance
    with together(model.flow.device), Progress("scored", table.num_rows, options.quiet) as progress:

        def scores() -> Iterator[np.ndarray]:
            for log_probs in model.map_chunks(score, table.chunks(_ROWS), options.seed, progress):
                is_finite = np.isfinite(log_probs)
                known = np.where(is_finite, log_probs, 0.0)
                moments.append((len(known), (~is_finite).sum(), known.mean(dtype=float), known.var(dtype=float)))
                yield log_probs[:, None]

        write_chunks(options.output, ["log_prob"], scores())
        speed = progress.rows_per_second
    if not is_first():
        return
    if content:
        sys.stdout.buffer.write(content)
    integers = ", ".join(model.integers)
    results = {
        **_combine(moments),
        "unit": "nats",
        "lower_bound": f"log-mean-exp over {options.draws} draws of noise on {integers}" if integers else None,
        "rows_per_second": speed,
    }
    if options.json:
        print_json(results)
    say(options, _describe(results))


def _combine(moments: list[tuple[int, int, float, float]]) -> dict[str, float]:
    """Return number, mean and standard error of the numbers of all chunks; nan if one is not finite."""
    counts, not_finite, means, variances = np.array(moments).T
    rows, mean, error = int(counts.sum()), math.nan, math.nan
    if not not_finite.any():
        mean = float(np.average(means, weights=counts))
        variance = float(np.average(variances + (means - mean) ** 2, weights=counts))
        error = math.sqrt(variance / (rows - 1)) if rows > 1 else math.nan
    return {"rows": rows, "mean_log_prob": mean, "standard_error": error, "not_finite": int(not_finite.sum())}


def _describe(results: dict[str, Any]) -> str:
    bound, number, not_finite = results["lower_bound"], results["rows"], results["not_finite"]
    what = "mean log-density" if bound is None else f"mean log-probability, a lower bound by {bound}:"
    error = "" if number == 1 else f" +- {results['standard_error']:.4f}"
    rows = "1 row" if number == 1 else f"{number:,} rows"
    lost = f", {not_finite:,} of them without a finite value" if not_finite else ""
    speed = f"{results['rows_per_second']:,.0f} a second"
    return f"{what} {results['mean_log_prob']:.4f}{error} nats a row; {rows}{lost}, {speed}"
