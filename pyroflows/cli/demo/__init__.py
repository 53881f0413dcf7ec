"""``pyroflows demo``: a first look, on bundled data."""

import argparse

from pyroflows.cli.demo.report import write_report

__all__ = ["run"]


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    write_report(options.output, seed=options.seed, quick=options.quick)
