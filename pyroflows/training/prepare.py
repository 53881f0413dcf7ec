"""Data for a fit: checked, on the device, and divided into training and held-out rows."""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyroflows import distributed
from pyroflows.arguments import as_tensor, check_finite, check_number, check_sizes, check_varying
from pyroflows.flow import Flow
from pyroflows.networks.one_hot import OneHot
from pyroflows.training.batches import Batches, MappedArray, Rows, Steps
from pyroflows.training.options import FitOptions

__all__ = ["prepare"]

_CHECKED_NUMBERS = 2**22  # of a memory-mapped array at a time


def prepare(
    flow: Flow,
    data: tuple[Any, Any, Any],
    validation: Any,
    batch_size: int | None,
    options: FitOptions,
    device: torch.device,
) -> tuple[Rows | Batches | Steps, Rows | None]:
    """Return what to train on, of data, context and weights, and the held-out rows, if any."""
    x, context, weights = data
    share = 0.0
    if isinstance(validation, (Real, bool)):
        check_number("the share of validation rows", validation, "[0, 1)")
        share, validation = float(validation), None
    held_out = None if validation is None else _held_out(flow, validation, device)
    if not isinstance(x, Tensor) and not hasattr(x, "__array__"):
        of_arrays = {"context": context, "weights": weights, "batch_size": batch_size}
        if x is not None:
            of_arrays["steps_per_epoch"] = options.steps_per_epoch
        for name, option in of_arrays.items():
            if option is not None:
                raise ValueError(f"expected {name} only with a tensor or an array; got it with {type(x).__name__}")
        if x is None:
            return Steps(options.steps_per_epoch or 100), held_out
        if not isinstance(x, Iterable) or isinstance(x, str):
            raise TypeError(f"expected data as a tensor, an array or batches; got {type(x).__name__}")
        return Batches(x, partial(_as_rows, flow, device), device), held_out
    x, context = _as_rows(flow, device, x, context, "data")
    weights = _as_weights(weights, len(x), device, "data")
    if len(x) < 2:
        raise ValueError(f"expected at least 2 rows of data; got {len(x)}")
    _check_varying(flow, x)
    columns = (x, context, weights)
    if share and held_out is None:
        # Drawn on the CPU, so that a fit that resumes on another device holds out the same rows.
        order = torch.randperm(len(x)).to(device)
        number = max(1, int(share * len(x)))
        held_out = _rows(flow, [_subset(column, order[:number]) for column in columns], "the held-out rows")
        columns = tuple(_subset(column, order[number:]) for column in columns)
    train = _rows(flow, columns, "the training rows", batch_size, options.steps_per_epoch)
    if len(train) < train.batch_size:
        raise ValueError(f"expected at least batch_size={train.batch_size} training rows; got {len(train)}")
    if train.batch_size < distributed.world_size():
        raise ValueError(f"expected at least one row of a batch for each process; got batch_size={train.batch_size}")
    if train.batch_size < options.accumulate:
        raise ValueError(f"expected at least accumulate={options.accumulate} rows a batch; got {train.batch_size}")
    return train, held_out


def _rows(
    flow: Flow, columns: Sequence[Any], name: str, batch_size: int | None = None, steps: int | None = None
) -> Rows:
    """Make rows of data, context and weights, which are scaled to mean 1."""
    x, context, weights = columns
    if weights is not None:
        if not weights.any():
            raise ValueError(f"expected a weight above 0 among those of {name}; got zeros only")
        weights = (weights / weights.mean()).to(flow.dtype)
    batch_size = max(1, min(256, len(x))) if batch_size is None else batch_size
    check_sizes(batch_size=batch_size)
    return Rows(x, context, weights, batch_size=int(batch_size), steps=steps)


def _held_out(flow: Flow, validation: Any, device: torch.device) -> Rows:
    parts = validation if isinstance(validation, tuple) else (validation, None)
    if len(parts) not in (2, 3):
        raise ValueError(f"expected validation as (data, context) or (data, context, weights); got {len(parts)} items")
    x, context, weights = (*parts, None)[:3]
    x, context = _as_rows(flow, device, x, context, "validation data")
    if len(x) == 0:
        raise ValueError("expected at least one row of validation data; got none")
    weights = _as_weights(weights, len(x), device, "validation data")
    return _rows(flow, (x, context, weights), "validation data")


def _subset(column: Any, rows: Tensor) -> Any:
    return None if column is None else column.subset(rows) if isinstance(column, MappedArray) else column[rows]


def _as_rows(flow: Flow, device: torch.device, x: Any, context: Any, name: str, first_row: int = 0) -> tuple[Any, Any]:
    """Return checked data and context on the device, floating-point numbers in the flow's dtype.

    Memory-mapped arrays stay in their files, and are checked in chunks.
    """
    if isinstance(x, np.memmap) and x.ndim > 1:
        return _as_mapped_rows(flow, device, x, context, name)
    discrete, embedded = flow.dequantizer is not None, flow.embedding is not None
    data = _as_tensor(flow, device, x, name, integers=discrete, first_row=first_row)
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
        context = _as_tensor(flow, device, context, f"context of {name}", integers=embedded, first_row=first_row)
    if not embedded:
        flow.bijection.broadcast_batch(data.shape[:1], context)
    elif context is None:
        flow.embed(None)  # raises the error of a missing context
    elif isinstance(flow.embedding, OneHot):
        flow.embedding.check(context)  # on a GPU, a label outside the table would break the process for good
    if context is not None and context.shape[: 1 if embedded else -1] != data.shape[:1]:
        raise ValueError(f"expected a context for each of {len(data)} rows; got {tuple(context.shape)}")
    return data, context


def _as_mapped_rows(flow: Flow, device: torch.device, x: Any, context: Any, name: str) -> tuple[Any, Any]:
    if context is not None and not isinstance(context, np.memmap):
        context = _as_tensor(flow, device, context, f"context of {name}", integers=flow.embedding is not None)
    if context is not None and len(context) != len(x):
        raise ValueError(f"expected a context for each of {len(x)} rows; got {tuple(context.shape)}")
    size = _rows_at_once(x.shape)
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        _as_rows(flow, device, np.array(x[rows]), None if context is None else context[rows], name, start)
    context = MappedArray(context, flow.dtype, device) if isinstance(context, np.memmap) else context
    return MappedArray(x, flow.dtype, device), context


def _as_tensor(
    flow: Flow, device: torch.device, values: Any, name: str, *, integers: bool, first_row: int = 0
) -> Tensor:
    source = _source(values, name)
    if integers and not source.is_floating_point():
        return source.to(device)
    if not source.is_floating_point():
        part = "an embedding" if name.startswith("context") else "a dequantizer"
        raise TypeError(
            f"expected {name} of floating-point numbers; got {source.dtype}: convert them, or give the flow {part}"
        )
    numbers = source.to(device, flow.dtype)
    check_finite(name, numbers, first_row=first_row, source=source)
    return numbers


def _source(values: Any, name: str) -> Tensor:
    try:
        return values.detach() if isinstance(values, Tensor) else as_tensor(np.asarray(values))
    except TypeError:
        raise TypeError(f"expected {name} as a tensor or an array of numbers; got {type(values).__name__}") from None


def _as_weights(weights: Any, rows: int, device: torch.device, name: str) -> Tensor | None:
    """Return checked weights of rows on the device, in float64."""
    if weights is None:
        return None
    tensor = _source(weights, f"weights of {name}")
    if tensor.shape != (rows,):
        raise ValueError(f"expected weights of shape ({rows},), one for each row of {name}; got {tuple(tensor.shape)}")
    tensor = tensor.to(device, torch.float64)
    check_finite(f"weights of {name}", tensor)
    if (tensor < 0).any():
        row = int((tensor < 0).nonzero()[0])
        raise ValueError(f"expected weights of {name} that are at least 0; got {float(tensor[row])} in row {row}")
    return tensor


def _check_support(flow: Flow, data: Tensor, name: str, first_row: int) -> None:
    """Refuse data outside the flow's support, such as pixels outside [0, 1] for a flow with a logit."""
    support = getattr(flow.bijection.codomain, "base_constraint", flow.bijection.codomain)
    inside = support.check(data)
    if not inside.all():
        places = (~inside).nonzero()
        row, *place = places[0].tolist()
        raise ValueError(
            f"expected {name} in the flow's support, {support}; got {float(data[(row, *place)]):.6g} "
            f"in row {first_row + row} ({len(places)} such numbers in all)"
        )


def _check_varying(flow: Flow, data: Tensor | MappedArray) -> None:
    """Refuse constant columns among those that the dequantizer, if any, leaves continuous."""
    among = None
    if flow.dequantizer is not None:
        discrete = getattr(flow.dequantizer, "discrete", None)
        if discrete is None:  # all columns are
            return
        among = ~discrete
    check_varying(data, among=among, chunk_rows=None if isinstance(data, Tensor) else _rows_at_once(data.shape))


def _rows_at_once(shape: tuple[int, ...]) -> int:
    return max(1, _CHECKED_NUMBERS // max(1, math.prod(shape[1:])))
