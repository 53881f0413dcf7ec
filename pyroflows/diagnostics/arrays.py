"""Arrays in, and tables of numbers out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

__all__ = [
    "Array",
    "NumPyArray",
    "Values",
    "as_array",
    "as_columns",
    "labels",
    "table_text",
]

NumPyArray = np.ndarray[Any, Any]
Array = NumPyArray | Tensor
Values = Array | Mapping[str, Array]


def as_array(name: str, values: Any, dims: int, *, finite: bool = True) -> NumPyArray:
    """Give numbers as an array in float64, or say what is wrong with them."""
    try:
        given = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values)
        array = given.astype(np.float64, casting="same_kind")
    except (TypeError, ValueError):
        raise TypeError(f"expected {name} as an array or a tensor of numbers; got {type(values).__name__}") from None
    if array.ndim != dims:
        raise ValueError(f"expected {name} with {dims} dimension{'s' if dims > 1 else ''}; got shape {array.shape}")
    if finite and not np.isfinite(array).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(f"expected finite numbers in {name}; got {array[where]} at {where}")
    return array


def as_columns(name: str, values: Values) -> tuple[NumPyArray, list[str]]:
    """Give values as rows of columns, with the columns' names."""
    if not isinstance(values, Mapping):
        rows = as_array(name, values, 2)
        return rows, [f"x[{i}]" for i in range(rows.shape[1])]
    if not values:
        raise ValueError(f"expected {name} of at least one name; got none")
    parts, names = [], []
    for key, value in values.items():
        shape = tuple(np.shape(value.detach().cpu() if isinstance(value, Tensor) else value))
        if not shape:
            raise ValueError(f"expected {name} of {key!r} of shape (n, *shape); got a single number")
        parts.append(as_array(f"{name} of {key!r}", value, len(shape)).reshape(shape[0], -1))
        names += labels(key, shape[1:])
    lengths = {len(part) for part in parts}
    if len(lengths) > 1:
        raise ValueError(f"expected as many draws of each name; got {' and '.join(map(str, sorted(lengths)))}")
    return np.concatenate(parts, 1), names


def labels(name: str, shape: Sequence[int]) -> list[str]:
    """Name every number of an array: ``theta`` itself, or ``theta[0,0]``, ``theta[0,1]`` and so on."""
    return [name + (f"[{','.join(map(str, at))}]" if at else "") for at in np.ndindex(*shape)]


def table_text(names: Sequence[str], columns: Sequence[str], numbers: Sequence[Any], formats: Sequence[str]) -> str:
    """Align names to the left, numbers to the right."""
    cells = [
        [title, *(format(float(number), form) for number in column)]
        for title, column, form in zip(columns, numbers, formats, strict=True)
    ]
    widths = [max(map(len, column)) for column in cells]
    first = max(map(len, names))
    rows = zip(["", *names], *cells, strict=True)
    return "\n".join(
        " ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(row, widths, strict=True))])
        for name, *row in rows
    )
