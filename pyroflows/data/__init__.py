"""Data to fit flows to: toy densities whose true log density is known, tables, and two benchmark sets."""

from pyroflows.data.bsds300 import load_bsds300
from pyroflows.data.power import load_power
from pyroflows.data.tables import TABLES, Table, load_table, make_table
from pyroflows.data.toy import (
    TOY_DENSITIES,
    Checkerboard,
    Circles,
    EightGaussians,
    Pinwheel,
    RandomGaussianMixture,
    Spirals,
    ToyDensity,
    TwoMoons,
)

__all__ = [  # noqa: RUF022 - grouped by file
    # toy
    "TOY_DENSITIES",
    "Checkerboard",
    "Circles",
    "EightGaussians",
    "Pinwheel",
    "RandomGaussianMixture",
    "Spirals",
    "ToyDensity",
    "TwoMoons",
    # tables
    "TABLES",
    "Table",
    "load_table",
    "make_table",
    # power, bsds300
    "load_bsds300",
    "load_power",
]
