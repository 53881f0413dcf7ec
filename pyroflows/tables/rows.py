"""Rows of a table, with a context and with weights."""

import numpy as np

__all__ = ["merge_rows", "with_context"]

_Rows = np.ndarray | None


def merge_rows(x: np.ndarray, context: _Rows, weights: np.ndarray) -> tuple[np.ndarray, _Rows, np.ndarray]:
    """Make one row of equal rows, with the sum of their weights, in sorted order."""
    first, group = np.unique(with_context(x, context), axis=0, return_index=True, return_inverse=True)[1:]
    if len(first) < 2:
        raise ValueError(f"expected at least 2 different rows of a weight above zero; got {len(first)}")
    return x[first], None if context is None else context[first], np.bincount(group.ravel(), weights)


def with_context(x: np.ndarray, context: _Rows) -> np.ndarray:
    """Return rows with their context as more columns."""
    return x if context is None else np.column_stack((x, context))
