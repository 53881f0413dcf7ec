"""Rows of a table, with a context and with weights."""

from collections.abc import Sequence
from numbers import Integral

import numpy as np
from torch import Tensor

from pyroflows.dequantizers import ColumnDequantizer

__all__ = ["dequantizer_of", "merge_rows", "with_context"]

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


def dequantizer_of(x: Tensor, columns: Sequence[int]) -> ColumnDequantizer:
    """Return the dequantizer of columns of whole numbers."""
    for column in columns:
        if not isinstance(column, Integral) or not 0 <= column < x.shape[1]:
            raise ValueError(f"expected integer_columns from 0 to {x.shape[1] - 1}; got {column!r}")
    steps = x.new_zeros(x.shape[1])
    steps[[int(column) for column in columns]] = 1
    dequantizer = ColumnDequantizer(steps)
    dequantizer.check(x)
    return dequantizer
