"""``pyroflows check``: check that a model inverts, and that its log-determinants are right, on rows of a table."""

import argparse
from dataclasses import asdict

from pyroflows.cli.model import load_model, sample_rows
from pyroflows.cli.output import print_json, say
from pyroflows.contexts import seeded
from pyroflows.diagnostics import check

__all__ = ["run"]


def run(options: argparse.Namespace) -> int:
    """Run the command, and return its exit status."""
    model = load_model(options.model, options.device)
    x, context = model.split(sample_rows(model.open(options.data), options.rows, seed=0))
    if model.flow.dequantizer is not None:
        with seeded(0, model.flow.device):
            x = model.flow.dequantizer(x)[0]
    report = check(model.flow, x, context=context, tolerance=options.tolerance)
    if options.json:
        print_json({**asdict(report), "ok": report.ok})
    say(options, str(report))
    return 0 if report.ok else 1
