"""Flows of tables: a density for columns of a table, and the estimators of scikit-learn over it."""

from pyroflows.tables.flow import table_flow

__all__ = ["table_flow"]
