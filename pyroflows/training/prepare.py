"""Data for a fit: checked, on the device, and divided into training and held-out rows."""

import math
from collections.abc import Iterable
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyroflows import distributed
from pyroflows.arguments import as_tensor, check_finite, check_number, check_sizes, check_varying
from pyroflows.contexts import evaluating
from pyroflows.flow import Flow
from pyroflows.networks.one_hot import OneHot
from pyroflows.training.batches import Batches, MappedArray, Rows, Steps
from pyroflows.training.options import FitOptions

__all__ = ["prepare", "rows_of_share"]

_CHECKED_NUMBERS = 2**22  # of a memory-mapped array at a time


def prepare(
    flow: Flow, data: tuple[Any, Any, Any], validation: Any, batch_size: int | None, options: FitOptions
) -> tuple[Rows | Batches | Steps, Rows | None]:
    """Return what to train on, of data, context and weights, and the held-out rows, if any."""
    x, context, weights = data
    is_share = isinstance(validation, Real)
    if is_share:
        check_number("the share of validation rows", validation, "[0, 1)")
    held_out = None if validation is None or is_share else _held_out(flow, validation)
    if not hasattr(x, "__array__"):
        steps = None if x is None else options.steps_per_epoch
        of_arrays = {"context": context, "weights": weights, "batch_size": batch_size, "steps_per_epoch": steps}
        for name, option in of_arrays.items():
            if option is not None:
                raise ValueError(f"expected {name} only with a tensor or an array; got it with {type(x).__name__}")
        if x is None:
            return Steps(options.steps_per_epoch or 100), held_out
        if not isinstance(x, Iterable) or isinstance(x, str):
            raise TypeError(f"expected data as a tensor, an array or batches; got {type(x).__name__}")
        return Batches(x, partial(_as_rows, flow), flow.device), held_out
    columns = _as_columns(flow, x, context, weights, "data")
    rows = columns[0]
    if batch_size is not None and len(rows) < len(x):  # some have no weight
        batch_size = min(batch_size, len(rows))
    if len(rows) < 2:
        raise ValueError(f"expected at least 2 rows of data; got {len(rows)}")
    discrete = getattr(flow.dequantizer, "discrete", None)
    if is_continuous := flow.dequantizer is None or discrete is not None:  # else all columns are discrete
        check_varying(rows, among=None if discrete is None else ~discrete, chunk_rows=_rows_at_once(rows.shape))
    if is_share and validation:
        vary = is_continuous and isinstance(rows, Tensor)  # not those in a file
        held, trained = _split(rows, columns[2], float(validation), vary=vary)
        held_out = _rows(flow, [_subset(column, held) for column in columns], "the held-out rows")
        columns = [_subset(column, trained) for column in columns]
    train = _rows(flow, columns, "the training rows", batch_size, options.steps_per_epoch)
    if len(train) < train.batch_size:
        raise ValueError(f"expected at least batch_size={train.batch_size} training rows; got {len(train)}")
    if train.batch_size < distributed.world_size():
        raise ValueError(f"expected at least one row of a batch for each process; got batch_size={train.batch_size}")
    if train.batch_size < options.accumulate:
        raise ValueError(f"expected at least accumulate={options.accumulate} rows a batch; got {train.batch_size}")
    return train, held_out


def _split(rows: Any, weights: Tensor | None, share: float, *, vary: bool) -> tuple[Tensor, Tensor]:
    """Draw the rows to hold out, a share of the rows or, with weights, of their weight; return them and the others."""
    # Drawn on the CPU, so that a fit that resumes on another device holds out the same rows.
    order = torch.randperm(len(rows), device="cpu").to(rows.device)
    number = max(1, int(share * len(order))) if weights is None else rows_of_share(weights[order], share)
    held, trained = order[:number], order[number:]
    return _keep_varying(rows, held, trained) if vary and len(trained) else (held, trained)


def rows_of_share(weights: Tensor, share: float) -> int:
    """Return how many of the first rows hold a share of the weight: one at least, and half of the share or more."""
    total = weights.cumsum(0)
    number = int((total <= share * (1 + 1e-9) * total[-1]).sum())
    is_enough = number and total[number - 1] >= share * total[-1] / 2
    return number if is_enough else number + 1  # with a heavy row: those before it weigh too little to judge by


def _keep_varying(rows: Tensor, held: Tensor, trained: Tensor) -> tuple[Tensor, Tensor]:
    """Move rows from those held out to the others, such that no column is constant in these that is not in all."""
    few = rows[trained[:1000]].flatten(1)
    columns = (few == few[0]).all(0).nonzero().flatten()
    if not len(columns):
        return held, trained
    differs = rows.flatten(1)[:, columns] != few[0, columns]
    alone = differs.any(0) & ~differs[trained].any(0)
    moved = differs[held][:, alone].int().argmax(0)
    stays = torch.ones(len(held), dtype=torch.bool, device=held.device).index_fill(0, moved, False)
    if not stays.any():
        return held, trained
    return held[stays], torch.cat([trained, held[~stays]])


def _held_out(flow: Flow, validation: Any) -> Rows:
    parts = validation if isinstance(validation, tuple) else (validation, None)
    if len(parts) not in (2, 3):
        raise ValueError(f"expected validation as (data, context) or (data, context, weights); got {len(parts)} items")
    x, context, weights = (*parts, None)[:3]
    columns = _as_columns(flow, x, context, weights, "validation data")
    if len(columns[0]) == 0:
        raise ValueError("expected at least one row of validation data; got none")
    return _rows(flow, columns, "validation data")


def _rows(flow: Flow, columns: list[Any], name: str, batch_size: int | None = None, steps: int | None = None) -> Rows:
    """Make rows of data, context and weights, which are scaled to mean 1."""
    x, context, weights = columns
    if weights is not None:
        if not weights.any():
            raise ValueError(f"expected a weight above 0 among those of {name}; got zeros only")
        weights = (weights / weights.mean()).to(flow.dtype)
        x, context, weights = _of_positive_weight([x, context, weights])  # but for those that are rounded to zero
    check_sizes(optional=True, batch_size=batch_size)
    return Rows(x, context, weights, batch_size=int(batch_size or max(1, min(256, len(x)))), steps=steps)


def _of_positive_weight(columns: list[Any]) -> list[Any]:
    """Return the rows that count: another might have no density, and zero times infinity is NaN."""
    weights = columns[2]
    return columns if weights.all() else [_subset(column, weights.nonzero().flatten()) for column in columns]


def _subset(column: Any, rows: Tensor) -> Any:
    return None if column is None else column.subset(rows) if isinstance(column, MappedArray) else column[rows]


def _as_columns(flow: Flow, x: Any, context: Any, weights: Any, name: str) -> list[Any]:
    """Return checked data and context, and weights in float64."""
    x, context = _as_rows(flow, x, context, name)
    if weights is None:
        return [x, context, None]
    weights, of_rows = _as_tensor(weights, f"weights of {name}"), (len(x),)
    if weights.shape != of_rows:
        raise ValueError(f"expected weights of shape {of_rows}, one for each row of {name}; got {tuple(weights.shape)}")
    weights = weights.to(flow.device, torch.float64)
    check_finite(f"weights of {name}", weights)
    if (weights < 0).any():
        row = int((weights < 0).nonzero()[0])
        raise ValueError(f"expected weights of {name} that are at least 0; got {float(weights[row])} in row {row}")
    return _of_positive_weight([x, context, weights]) if weights.any() else [x, context, weights]


def _as_rows(flow: Flow, x: Any, context: Any, name: str, first_row: int = 0) -> tuple[Any, Any]:
    """Return checked data and context on the flow's device and in its dtype; memory-mapped ones stay in their files."""
    if isinstance(x, np.memmap) and x.ndim > 1:
        return _as_mapped_rows(flow, x, context, name)
    discrete, embedded = flow.dequantizer is not None, flow.embedding is not None
    data = _as_numbers(flow, x, name, first_row, integers=discrete)
    if data.shape[1:] != flow.event_shape:
        expected = "(rows, " + ", ".join(map(str, flow.event_shape)) + ")"
        raise ValueError(f"expected {name} of shape {expected}; got {tuple(data.shape)}")
    shape = getattr(flow.dequantizer, "event_shape", flow.event_shape)
    if shape != flow.event_shape:  # a shape of fewer dimensions would leave factors out of the log-density
        raise ValueError(f"expected a dequantizer of the flow's shape {tuple(flow.event_shape)}; got {tuple(shape)}")
    if not discrete:
        _check_support(flow, data, name, first_row)
    elif hasattr(flow.dequantizer, "check"):
        flow.dequantizer.check(data)  # type: ignore[union-attr, operator]
    if context is not None and not flow.context_features:
        raise ValueError(f"expected no context or labels with {name}, since context_features=0; got one")
    if context is not None:
        context = _as_numbers(flow, context, f"context of {name}", first_row, integers=embedded)
    if not embedded:
        flow.bijection.broadcast_batch(data.shape[:1], context)
    elif context is None:
        flow.embed(None)  # raises the error of a missing context
    elif isinstance(flow.embedding, OneHot):
        flow.embedding.check(context)  # on a GPU, a label outside the table would break the process for good
    if context is not None and context.shape[: 1 if embedded else -1] != data.shape[:1]:
        raise ValueError(f"expected a context for each of {len(data)} rows; got {tuple(context.shape)}")
    return data, context


def _as_mapped_rows(flow: Flow, x: Any, context: Any, name: str) -> tuple[Any, Any]:
    if context is not None and not isinstance(context, np.memmap):
        context = _as_numbers(flow, context, f"context of {name}", integers=flow.embedding is not None)
    if context is not None and len(context) != len(x):
        raise ValueError(f"expected a context for each of {len(x)} rows; got {tuple(context.shape)}")
    size = _rows_at_once(x.shape)
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        _as_rows(flow, np.array(x[rows]), None if context is None else context[rows], name, start)
    context = MappedArray(context, flow.dtype, flow.device) if isinstance(context, np.memmap) else context
    return MappedArray(x, flow.dtype, flow.device), context


def _as_numbers(flow: Flow, values: Any, name: str, first_row: int = 0, *, integers: bool) -> Tensor:
    source = _as_tensor(values, name)
    if source.is_floating_point():
        numbers = source.to(flow.device, flow.dtype)
        check_finite(name, numbers, first_row=first_row, source=source)
        return numbers
    if integers:
        return source.to(flow.device)
    part = "an embedding" if name.startswith("context") else "a dequantizer"
    raise TypeError(
        f"expected {name} of floating-point numbers; got {source.dtype}: convert them, or give the flow {part}"
    )


def _as_tensor(values: Any, name: str) -> Tensor:
    try:
        return values.detach() if isinstance(values, Tensor) else as_tensor(np.asarray(values))
    except TypeError:
        raise TypeError(f"expected {name} as a tensor or an array of numbers; got {type(values).__name__}") from None


def _check_support(flow: Flow, data: Tensor, name: str, first_row: int) -> None:
    """Refuse data outside the flow's support, such as pixels outside [0, 1] for a flow with a logit."""
    support = getattr(flow.bijection.codomain, "base_constraint", flow.bijection.codomain)
    outside = ~support.check(data)
    outside = outside | _at_dead_end(flow, data, outside, support)
    if outside.any():
        places = outside.nonzero()
        row, *place = places[0].tolist()
        raise ValueError(
            f"expected {name} in the flow's support, {support}; got {float(data[(row, *place)]):.6g} in row "
            f"{first_row + row}, column {', '.join(map(str, place))} ({len(places)} such numbers in all)"
        )


def _at_dead_end(flow: Flow, data: Tensor, outside: Tensor, support: Any) -> Tensor:
    """Return which numbers lie on an end of an interval where the density is zero, though the constraint holds it."""
    ends = [getattr(support, f"{side}_bound", math.nan) for side in ("lower", "upper")]
    at_end = ((data == ends[0]) | (data == ends[1])) & ~outside
    rows = at_end.flatten(1).any(1) & ~outside.flatten(1).any(1)
    if rows.any():
        context = data.new_zeros(flow.context_features) if flow.context_features else None
        with evaluating(flow), torch.no_grad():
            _, log_det = flow.bijection.inverse_and_log_det(data[rows], context)
        at_end[rows] &= log_det.isneginf().reshape(-1, *[1] * (data.dim() - 1))
    return at_end


def _rows_at_once(shape: tuple[int, ...]) -> int:
    return max(1, _CHECKED_NUMBERS // max(1, math.prod(shape[1:])))
