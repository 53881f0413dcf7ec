"""Checks of arguments: each raises one sentence, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from inspect import signature
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Size, Tensor, broadcast_shapes

__all__ = [
    "Shape",
    "as_image_shape",
    "as_sample_shape",
    "as_shape",
    "as_widths",
    "batched_shape",
    "check_context",
    "check_counts",
    "check_event",
    "check_finite",
    "check_names",
    "check_number",
    "check_option",
    "check_placement",
    "check_score",
    "check_sizes",
    "check_varying",
]

Shape = int | Sequence[int]


def _is_size(size: object) -> bool:
    if type(size) is int:  # asking an abstract class takes a hundred times as long, and shapes are read in every step
        return size > 0
    return isinstance(size, Integral) and not isinstance(size, bool) and int(size) > 0


def as_shape(shape: Shape) -> Size:
    """Give an event shape from itself or from a number of features."""
    if type(shape) is Size and min(shape, default=0) > 0:
        return shape
    sizes = tuple(shape) if isinstance(shape, Iterable) else (shape,)
    if not sizes or not all(map(_is_size, sizes)):
        raise ValueError(f"expected a positive number of features or a shape of positive sizes; got {shape!r}")
    return Size(map(int, sizes))


def as_sample_shape(shape: Shape) -> Size:
    """Return a sample shape, which may have sizes of zero, from itself or from a number of draws."""
    sizes = tuple(shape) if isinstance(shape, Iterable) else (shape,)
    if not all(isinstance(size, Integral) and not isinstance(size, bool) and int(size) >= 0 for size in sizes):
        raise ValueError(f"expected a sample shape of non-negative integers; got {shape!r}")
    return Size(map(int, sizes))


def as_image_shape(shape: Shape) -> Size:
    """Give the shape ``(C, H, W)`` of an image."""
    given = as_shape(shape)
    if len(given) != 3:
        raise ValueError(f"expected the shape (C, H, W) of an image; got {tuple(given)}")
    return given


def as_widths(name: str, widths: Iterable[int]) -> tuple[int, ...]:
    """Give the widths of a network's hidden layers; there may be none."""
    if not isinstance(widths, Iterable):
        raise TypeError(f"expected {name} as a sequence of positive integers; got {widths!r}")
    widths = tuple(widths)
    if not all(map(_is_size, widths)):
        raise ValueError(f"expected {name} as a sequence of positive integers; got {widths!r}")
    return widths


def check_sizes(**sizes: int) -> None:
    """Refuse a size that is not a positive integer."""
    for name, size in sizes.items():
        if not _is_size(size):
            raise ValueError(f"expected {name} to be a positive integer; got {size!r}")


def check_counts(**counts: int) -> None:
    """Refuse a number that is not a non-negative integer."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, Integral) or int(count) < 0:
            raise ValueError(f"expected {name} to be a non-negative integer; got {count!r}")


def check_number(name: str, value: object, interval: str) -> None:
    """Refuse what is not a number in an interval such as ``"[0, 1)"`` or ``"(0, inf)"``."""
    low, high = map(float, interval[1:-1].split(","))
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"expected {name} in {interval}; got {value!r}")
    number = float(value)
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    if math.isnan(number) or not (above and below):
        raise ValueError(f"expected {name} in {interval}; got {value!r}")


def check_option(name: str, option: object, options: Iterable[str]) -> None:
    """Refuse an option that is not among those offered."""
    options = list(options)
    if option not in options:
        raise ValueError(f"expected {name} to be one of {', '.join(map(repr, options))}; got {option!r}")


def check_names(given: dict[str, Any], takes: Callable[..., Any], *, but: Iterable[str] = ()) -> None:
    """Refuse a keyword that the callable does not take, or that is not the caller's to give."""
    offered = [name for name in signature(takes).parameters if name not in (*but, "self")]
    for name in given:
        if name not in offered:
            raise TypeError(f"expected options among {', '.join(offered)}; got {name!r}")


def check_finite(
    name: str, numbers: Any, columns: Sequence[Any] | None = None, *, first_row: int = 0, source: Any = None
) -> None:
    """Refuse numbers that are not finite, naming the row and the column of the first.

    Args:
        name: what the numbers are.
        numbers: a tensor or an array; the first dimension counts rows.
        columns: the names of columns, if they have any.
        first_row: the number of the first row.
        source: the numbers before a conversion to a dtype that may not hold them.
    """
    finite = numbers.isfinite() if isinstance(numbers, Tensor) else np.isfinite(numbers)
    if finite.all():
        return
    places = np.argwhere(~_as_array(finite))
    row, *column = places[0].tolist()
    value = float((numbers if source is None else source)[(row, *column)])
    where = f"row {first_row + row}"
    if column:
        where += f", column {', '.join(map(str, column)) if columns is None else repr(columns[column[0]])}"
    got = "NaN" if math.isnan(value) else value
    beyond = f", beyond the range of {numbers.dtype}" if math.isfinite(value) else ""
    raise ValueError(
        f"expected finite numbers in {name}; got {got} in {where}{beyond} ({len(places)} such numbers in all)"
    )


def check_varying(
    rows: Any, columns: Sequence[Any] | None = None, *, among: Any = None, chunk_rows: int | None = None
) -> None:
    """Refuse constant columns, which have no density.

    Args:
        rows: a tensor or an array; the first dimension counts rows.
        columns: the names of columns, if they have any.
        among: a mask of the columns to look at; by default all.
        chunk_rows: rows to read at a time; by default all.
    """
    constant = None
    for start in range(0, len(rows), chunk_rows or len(rows)):
        same = _as_array((rows[start : start + (chunk_rows or len(rows))] == rows[:1]).all(0))
        constant = same if constant is None else constant & same
        if not constant.any():
            return
    if constant is None:
        return
    places = np.flatnonzero(constant if among is None else constant & _as_array(among))
    if len(places):
        names = [str(place) if columns is None else repr(columns[place]) for place in places[:10]]
        more = ", ..." if len(places) > 10 else ""
        raise ValueError(
            f"expected columns that vary, since a constant one has no density; got column {', '.join(names)}{more}"
        )


def _as_array(values: Any) -> np.ndarray[Any, Any]:
    return np.asarray(values.cpu() if isinstance(values, Tensor) else values)


def batched_shape(shape: Sequence[int]) -> str:
    """Return the text of a shape with any batch dimensions, for messages."""
    return f"(*batch, {', '.join(map(str, shape))})"


def check_event(x: Any, shape: Size) -> None:
    """Refuse what is not a floating-point tensor whose last dimensions are an event's."""
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a tensor of shape {batched_shape(shape)}; got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"expected a floating-point tensor; got {x.dtype}")
    if x.shape[-len(shape) :] != shape:
        raise ValueError(f"expected a tensor of shape {batched_shape(shape)}; got {tuple(x.shape)}")


def check_context(context: Any, features: int, batch: Size) -> Size:
    """Refuse a context that is missing, not expected or of another shape; return the broadcast batch shape."""
    if context is None and features == 0:
        return batch
    expected = f"expected a context of shape {batched_shape((features,))}"
    if context is None:
        raise ValueError(f"{expected}; got none")
    if not isinstance(context, Tensor):
        raise TypeError(f"expected a context that is a tensor; got {type(context).__name__}")
    if features == 0:
        raise ValueError(f"expected no context, since context_features=0; got one of shape {tuple(context.shape)}")
    if not context.is_floating_point():
        raise TypeError(f"expected a floating-point context; got {context.dtype}")
    if context.dim() == 0 or context.shape[-1] != features:
        raise ValueError(f"{expected}; got {tuple(context.shape)}")
    try:
        return broadcast_shapes(batch, context.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"expected a context whose batch shape broadcasts with {tuple(batch)}; got {tuple(context.shape)}"
        ) from None


def check_placement(name: str, tensor: Any, number: Tensor) -> None:
    """Refuse a tensor of another floating-point dtype than a flow's numbers, or on another device."""
    if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != number.dtype:
        raise TypeError(f"expected {name} of the flow's {number.dtype}; got {tensor.dtype}")
    if isinstance(tensor, Tensor) and tensor.device != number.device:
        raise ValueError(f"expected {name} on the flow's device, {number.device}; got {tensor.device}")


def check_score(score: Any, x: Tensor) -> Tensor:
    """Refuse a score that does not have the shape of its point; return it expanded and detached."""
    expected = f"expected a score of shape {tuple(x.shape)}, that of the point"
    if not isinstance(score, Tensor):
        raise TypeError(f"{expected}; got {type(score).__name__}")
    try:
        return score.detach().expand(x.shape)
    except RuntimeError:
        raise ValueError(f"{expected}; got {tuple(score.shape)}") from None
