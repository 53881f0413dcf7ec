"""Checks of arguments: each raises one sentence, what was expected and what came."""

import math
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from inspect import signature
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Size, Tensor, bfloat16, broadcast_shapes, float16

__all__ = [
    "Shape",
    "as_float_tensor",
    "as_image_shape",
    "as_mask",
    "as_permutation",
    "as_sample_shape",
    "as_shape",
    "as_tensor",
    "as_widths",
    "batched_shape",
    "brief_shape",
    "check_context",
    "check_counts",
    "check_event",
    "check_event_shape",
    "check_finite",
    "check_integer",
    "check_log_det",
    "check_names",
    "check_number",
    "check_option",
    "check_placement",
    "check_precision",
    "check_score",
    "check_sizes",
    "check_type",
    "check_varying",
    "is_integer",
]

Shape = int | Sequence[int]


def is_integer(value: object, minimum: float = -math.inf) -> bool:
    """Return whether a value is an integer of any library, not a boolean, and at least ``minimum``."""
    if type(value) is int:  # checking against an abstract class takes a hundred times as long, and shapes are hot
        return value >= minimum
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= minimum


def as_shape(shape: Shape) -> Size:
    """Return the event shape for a shape or a number of features."""
    if type(shape) is Size and min(shape, default=0) > 0:
        return shape
    sizes = tuple(shape) if isinstance(shape, Iterable) else (shape,)
    if not sizes or not all(is_integer(size, 1) for size in sizes):
        raise ValueError(f"expected a positive number of features or a shape of positive sizes; got {shape!r}")
    return Size(map(int, sizes))


def as_sample_shape(shape: Shape) -> Size:
    """Return the sample shape, possibly with sizes of zero, for a shape or a number of draws."""
    sizes = tuple(shape) if isinstance(shape, Iterable) else (shape,)
    if not all(is_integer(size, 0) for size in sizes):
        raise ValueError(f"expected a sample shape of non-negative integers; got {shape!r}")
    return Size(map(int, sizes))


def as_image_shape(shape: Shape) -> Size:
    """Return the shape ``(C, H, W)`` of an image."""
    sizes = as_shape(shape)
    if len(sizes) != 3:
        raise ValueError(f"expected the shape (C, H, W) of an image; got {tuple(sizes)}")
    return sizes


def as_widths(name: str, widths: Iterable[int]) -> tuple[int, ...]:
    """Return the widths of a network's hidden layers, possibly none."""
    if not isinstance(widths, Iterable):
        raise TypeError(f"expected {name} as a sequence of positive integers; got {widths!r}")
    widths = tuple(widths)
    if not all(is_integer(width, 1) for width in widths):
        raise ValueError(f"expected {name} as a sequence of positive integers; got {widths!r}")
    return widths


def as_float_tensor(value: Any) -> Tensor:
    """Return a detached tensor of floating-point numbers; other numbers take torch's default dtype."""
    tensor = torch.as_tensor(value).detach()
    return tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())


def as_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """Return an array as a tensor; torch takes no other byte order or negative stride, and warns of locked memory."""
    return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ("C", "W")))


def as_mask(mask: str | Sequence[bool] | Tensor, size: int, *, flip: bool) -> Tensor:
    """Return a coupling's mask of features, "halves", "checkerboard" or booleans, as a tensor of booleans."""
    if isinstance(mask, str):
        check_option("mask", mask, ("halves", "checkerboard"))
        positions = torch.arange(size)
        named = positions >= size // 2 if mask == "halves" else positions % 2 == 0
        return ~named if flip and size > 1 else named  # a single feature is always transformed
    if not isinstance(mask, Sequence) and not hasattr(mask, "__array__"):
        raise TypeError(f"expected a mask by name or of {size} booleans; got {mask!r}")
    booleans = torch.as_tensor(mask)
    if booleans.dtype != torch.bool or booleans.shape != (size,):
        raise ValueError(f"expected a mask of {size} booleans; got {booleans.tolist()!r} ({booleans.dtype})")
    booleans = ~booleans if flip else booleans
    if not booleans.any():
        raise ValueError(f"expected a mask that transforms at least one of {size} features; got none")
    return booleans


def as_permutation(order: str | Sequence[int] | Tensor, size: int, seed: int | None = None) -> Tensor:
    """Return a new tensor with a permutation of ``0, ..., size - 1``: the one given, or one random or reversed."""
    if isinstance(order, str):
        if order == "random":
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            return torch.randperm(size, generator=generator, device="cpu").to(torch.get_default_device())
        return torch.arange(size).flip(0) if order.startswith("reverse") else torch.arange(size)
    indices = torch.as_tensor(order).detach().cpu()
    if indices.is_floating_point() or not torch.equal(indices.sort().values.long(), torch.arange(size, device="cpu")):
        raise ValueError(f"expected order to be a permutation of 0, ..., {size - 1}; got {indices.tolist()}")
    return indices.long().clone()


def brief_shape(shape: Size) -> str:
    """Return the text of an event shape, which for a vector is its number of features."""
    return str(shape[0] if len(shape) == 1 else tuple(shape))


def batched_shape(shape: Sequence[int]) -> str:
    """Return the text of a shape with any batch dimensions, for messages."""
    return f"({', '.join(['*batch', *map(str, shape)])})"


def check_type(expected: str, value: object, kind: type) -> None:
    """Raise a TypeError unless a value is of a class."""
    if not isinstance(value, kind):
        raise TypeError(f"expected {expected}; got {type(value).__name__}")


def check_event_shape(expected: str, x: Tensor, shape: Size) -> None:
    """Raise a ValueError unless a tensor, expected such as "data of shape", has the shape ``(*batch, *shape)``."""
    if x.shape[-len(shape) :] != shape:
        raise ValueError(f"expected {expected} {batched_shape(shape)}; got {tuple(x.shape)}")


def check_integer(name: str, value: object, minimum: int) -> None:
    """Raise a ValueError unless a value is an integer of at least ``minimum``."""
    if not is_integer(value, minimum):
        kind = {0: "a non-negative integer", 1: "a positive integer"}.get(minimum, f"an integer of at least {minimum}")
        raise ValueError(f"expected {name} to be {kind}; got {value!r}")


def check_sizes(*, optional: bool = False, **sizes: int | None) -> None:
    """Raise a ValueError for a size that is not a positive integer or, if it is optional, None."""
    for name, size in sizes.items():
        if size is not None or not optional:
            check_integer(name, size, 1)


def check_counts(**counts: int) -> None:
    """Raise a ValueError for a number that is not a non-negative integer."""
    for name, count in counts.items():
        check_integer(name, count, 0)


def check_number(name: str, value: object, interval: str, *, optional: bool = False) -> None:
    """Raise an error unless a value is a number in an interval such as ``"[0, 1)"``, or None if it is optional."""
    if optional and value is None:
        return
    low, high = map(float, interval[1:-1].split(","))
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"expected {name} in {interval}; got {value!r}")
    number = float(value)
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    if math.isnan(number) or not (above and below):
        raise ValueError(f"expected {name} in {interval}; got {value!r}")


def check_option(name: str, option: object, options: Iterable[str]) -> None:
    """Raise a ValueError for an unknown option."""
    options = list(options)
    if option not in options:
        raise ValueError(f"expected {name} to be one of {', '.join(map(repr, options))}; got {option!r}")


def check_names(
    arguments: dict[str, Any], function: Callable[..., Any], *, exclude: Iterable[str], also: Iterable[str] = ()
) -> None:
    """Raise a TypeError for a keyword that is none of the function's, except the excluded, and none of ``also``."""
    names = [name for name in (*signature(function).parameters, *also) if name not in (*exclude, "self")]
    for name in arguments:
        if name not in names:
            near = get_close_matches(name, names, 1, 0.5)
            hint = f": perhaps {near[0]!r}" if near else ""
            raise TypeError(f"expected options among {', '.join(names)}; got {name!r}{hint}")


def check_finite(
    name: str, numbers: Any, columns: Sequence[Any] | None = None, *, first_row: int = 0, source: Any = None
) -> None:
    """Raise a ValueError that names the first number that is not finite.

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
    """Raise a ValueError for constant columns, which have no density.

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


def check_event(x: Any, shape: Size) -> None:
    """Raise an error unless a value is a floating-point tensor of shape ``(*batch, *shape)``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a tensor of shape {batched_shape(shape)}; got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"expected a floating-point tensor; got {x.dtype}")
    check_event_shape("a tensor of shape", x, shape)


def check_context(context: Any, features: int, batch: Size) -> Size:
    """Return the batch shape of input and context; raise an error for a missing, unexpected or ill-shaped context."""
    if context is None and features == 0:
        return batch
    expected = f"expected a context of shape {batched_shape((features,))}"
    if context is None:
        raise ValueError(f"{expected}; got none")
    check_type("a context that is a tensor", context, Tensor)
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


def check_precision(number: Tensor) -> None:
    """Refuse a flow of half precision, by one of its numbers."""
    if number.dtype in (float16, bfloat16):
        raise TypeError(
            f"expected a flow of float32 or float64, since densities need their digits; got {number.dtype}: call "
            "flow.float(), and train networks in bfloat16 by FitOptions(precision='bf16-mixed')"
        )


def check_placement(name: str, tensor: Any, number: Tensor) -> None:
    """Raise an error for a tensor of another floating-point dtype than a flow's numbers, or on another device."""
    if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != number.dtype:
        raise TypeError(f"expected {name} of the flow's {number.dtype}; got {tensor.dtype}")
    if isinstance(tensor, Tensor) and tensor.device != number.device:
        raise ValueError(f"expected {name} on the flow's device, {number.device}; got {tensor.device}")


def check_log_det(layer: Any, log_det: Any, batch: Size) -> None:
    """Refuse a layer's log-determinant that is not one number for each point, which would broadcast."""
    if not isinstance(log_det, Tensor) or log_det.shape != batch:
        while hasattr(layer, "bijection"):  # what an inverse or a fixed context wraps
            layer = layer.bijection
        got = tuple(log_det.shape) if isinstance(log_det, Tensor) else type(log_det).__name__
        raise ValueError(
            f"expected {type(layer).__name__} to return a log-determinant of shape {tuple(batch)}, one number for each "
            f"point, summed over its features; got {got}"
        )


def check_score(score: Any, x: Tensor) -> Tensor:
    """Return a score expanded to the shape of its point and detached; raise an error for another shape."""
    expected = f"expected a score of shape {tuple(x.shape)}, that of the point"
    if not isinstance(score, Tensor):
        raise TypeError(f"{expected}; got {type(score).__name__}")
    try:
        return score.detach().expand(x.shape)
    except RuntimeError:
        raise ValueError(f"{expected}; got {tuple(score.shape)}") from None
