"""Arguments of diagnostics and plots as NumPy arrays, names of columns, and text tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["Array", "NumPyArray", "Values", "as_array", "as_columns", "as_rows", "column_names", "labels", "table_text"]

NumPyArray = np.ndarray[Any, Any]
Array = NumPyArray | Tensor
Values = Array | Mapping[str, Array]


def as_array(name: str, values: Any, dims: int, *, finite: bool = True) -> NumPyArray:
    """Return numbers as a float64 array with ``dims`` dimensions."""
    try:
        array = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values)
        array = array.astype(np.float64, casting="same_kind")
    except (TypeError, ValueError):
        raise TypeError(f"expected {name} as an array or a tensor of numbers; got {type(values).__name__}") from None
    if array.ndim != dims:
        raise ValueError(f"expected {name} with {dims} dimension{'s' if dims > 1 else ''}; got shape {array.shape}")
    if finite and not np.isfinite(array).all():
        index = tuple(map(int, np.argwhere(~np.isfinite(array))[0]))
        raise ValueError(f"expected finite numbers in {name}; got {array[index]} at {index}")
    return array


def as_rows(name: str, values: Any) -> NumPyArray:
    """Return finite numbers as a float64 array of at least one row and one column."""
    rows = as_array(name, values, 2)
    if 0 in rows.shape:
        raise ValueError(f"expected {name} of at least one row and one column; got shape {rows.shape}")
    return rows


def as_columns(draws: Values, reference: Values) -> tuple[NumPyArray, NumPyArray, list[str]]:
    """Return draws and reference draws as arrays of the same columns, those of the reference if both have names."""
    if isinstance(draws, Mapping) and isinstance(reference, Mapping):
        if missing := sorted(set(reference) - set(draws)):
            raise ValueError(f"expected draws of every name in the reference; got none of {missing[0]!r}")
        draws = {name: values for name, values in draws.items() if name in reference}
        reference = {name: reference[name] for name in draws}
    (x, x_names), (y, y_names) = _columns("draws", draws), _columns("reference", reference)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"expected as many columns as the reference's {y.shape[1]}; got {x.shape[1]}")
    return x, y, y_names if isinstance(reference, Mapping) else x_names


def _columns(name: str, values: Values) -> tuple[NumPyArray, list[str]]:
    """Return an array, or arrays by name, as one array of rows, and the names of its columns."""
    if not isinstance(values, Mapping):
        rows = as_array(name, values, 2)
        return rows, [f"x[{i}]" for i in range(rows.shape[1])]
    if not values:
        raise ValueError(f"expected {name} of at least one name; got none")
    columns, names = [], []
    for key, value in values.items():
        if not (shape := np.shape(value)):
            raise ValueError(f"expected {name} of {key!r} of shape (n, *shape); got a single number")
        columns.append(as_array(f"{name} of {key!r}", value, len(shape)).reshape(shape[0], -1))
        names += labels(key, shape[1:])
    if len(lengths := {len(column) for column in columns}) > 1:
        raise ValueError(f"expected as many draws of each name; got {' and '.join(map(str, sorted(lengths)))}")
    return np.concatenate(columns, 1), names


def labels(name: str, shape: Sequence[int]) -> list[str]:
    """Name each number of an array: ``theta``, or ``theta[0,0]``, ``theta[0,1]`` and so on."""
    return [name + (f"[{','.join(map(str, index))}]" if index else "") for index in np.ndindex(*shape)]


def column_names(names: Iterable[str] | None, default: Sequence[str]) -> tuple[str, ...]:
    """Return the names of columns, by default those of ``default``."""
    names = tuple(map(str, default if names is None else names))
    if len(names) != len(default):
        raise ValueError(f"expected a name for each of {len(default)} columns; got {len(names)}")
    return names


def table_text(names: Sequence[str], columns: Sequence[str], numbers: Sequence[Any], formats: Sequence[str]) -> str:
    """Return a text table: a row for each name, and a column of numbers for each title."""
    from pandas import DataFrame

    table = DataFrame(np.transpose(numbers), names, columns)
    return table.to_string(formatters=[f"{{:{form}}}".format for form in formats])
