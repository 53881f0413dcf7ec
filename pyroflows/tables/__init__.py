"""Flows of tables: built and trained on the rows, with densities in the units of the columns."""

from pyroflows.tables.best import Selection, fit_best
from pyroflows.tables.fitting import fit_table, table_flow

__all__ = ["Selection", "fit_best", "fit_table", "table_flow"]
