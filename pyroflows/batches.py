"""What a fit takes its batches from: rows on the device, batches of the user's own, or no data at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyroflows.arguments import check_number, check_sizes
from pyroflows.conditioners.classes import OneHot
from pyroflows.data.dequantize import ColumnDequantizer

if TYPE_CHECKING:
    from pyroflows.flow import Flow

__all__ = ["Batches", "Rows", "Steps", "prepare"]

Batch = tuple[Tensor | None, Tensor | None]

_EVALUATION_ROWS = 8192
_EVALUATION_NUMBERS = 2**19


class Rows:
    """Data that lie on the device, in batches by index shuffle.

    An epoch is a whole pass, whose leftover rows wait for another shuffle; or, with ``steps``, so many steps of one
    shuffle after another, each of which goes through all rows.
    """

    def __init__(self, x: Tensor, context: Tensor | None, batch_size: int, steps: int | None = None):
        self.x, self.context, self.batch_size = x, context, batch_size
        self.steps = steps or len(x) // batch_size
        self.runs_on = steps is not None
        self.waiting = torch.empty(0, dtype=torch.long, device=x.device)  # the rows of a shuffle not seen yet

    def __iter__(self) -> Iterator[Batch]:
        if not self.runs_on:
            self.waiting = self.waiting[:0]
        for _ in range(self.steps):
            while len(self.waiting) < self.batch_size:
                self.waiting = torch.cat([self.waiting, torch.randperm(len(self.x), device=self.x.device)])
            rows, self.waiting = self.waiting[: self.batch_size], self.waiting[self.batch_size :]
            yield self.x[rows], None if self.context is None else self.context[rows]

    def slices(self) -> list[slice]:
        """Parts to be evaluated at a time: fewer rows where a row is large, as an image's activations are larger."""
        rows = max(1, min(_EVALUATION_ROWS, _EVALUATION_NUMBERS // max(1, self.x[:1].numel())))
        return [slice(i, i + rows) for i in range(0, len(self.x), rows)]

    def chunks(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for rows in self.slices():
            yield self.x[rows], None if self.context is None else self.context[rows]


class Batches:
    """Batches that come from the user, such as a DataLoader's."""

    def __init__(self, batches: Iterable[Any], flow: Flow, device: torch.device):
        self.batches, self.flow, self.device = batches, flow, device
        try:
            self.steps: int | None = len(batches)  # type: ignore[arg-type]
        except TypeError:  # a stream, or a DataLoader over one
            self.steps = None

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(self.batches):
            x, context = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
            if isinstance(x, (tuple, list)) and len(x) == 1:
                x = x[0]
            if not isinstance(x, Tensor) and not hasattr(x, "__array__"):
                raise TypeError(
                    f"expected batches that are tensors or arrays, or pairs of them; got {type(x).__name__}"
                )
            yield _data(self.flow, x, context, self.device, name=f"batch {number}")


class Steps:
    """Steps without data."""

    def __init__(self, steps: int):
        self.steps = steps

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.steps):
            yield None, None


def prepare(
    flow: Flow,
    x: Any,
    context: Any,
    validation: Any,
    batch_size: int | None,
    steps_per_epoch: int | None,
    device: torch.device,
) -> tuple[Rows | Batches | Steps, Rows | None]:
    """Give what a fit trains on and what it validates on, or say what is wrong with the data."""
    if batch_size is not None:
        check_sizes(batch_size=batch_size)
    share = 0.0
    if isinstance(validation, (Real, bool)):
        check_number("the share of validation rows", validation, "[0, 1)")
        share, validation = float(validation), None
    held_out = None
    if isinstance(validation, tuple) and len(validation) != 2:
        raise ValueError(f"expected validation as (data, context); got {len(validation)} items")
    if validation is not None:
        rows, its_context = validation if isinstance(validation, tuple) else (validation, None)
        held_out = Rows(*_data(flow, rows, its_context, device, name="validation data"), 1)
        if len(held_out.x) == 0:
            raise ValueError("expected at least one row of validation data; got none")
    if not isinstance(x, Tensor) and not hasattr(x, "__array__"):
        alone = {"context": context, "batch_size": batch_size}
        if x is not None:
            alone["steps_per_epoch"] = steps_per_epoch
        for name, given in alone.items():
            if given is not None:
                raise ValueError(f"expected {name} beside a tensor or an array alone; got it beside {type(x).__name__}")
        if x is None:
            return Steps(steps_per_epoch or 100), held_out
        if not isinstance(x, Iterable) or isinstance(x, str):
            raise TypeError(f"expected data as a tensor, an array or batches; got {type(x).__name__}")
        return Batches(x, flow, device), held_out
    data, its_context = _data(flow, x, context, device, name="data")
    if len(data) < 2:
        raise ValueError(f"expected at least 2 rows of data; got {len(data)}")
    if flow.dequantizer is None:
        _refuse_constant_columns(data)
    elif isinstance(flow.dequantizer, ColumnDequantizer):
        _refuse_constant_columns(data, flow.dequantizer.steps == 0)
    if share and held_out is None:
        # Drawn on the CPU, so that a fit that goes on elsewhere holds out the same rows.
        order = torch.randperm(len(data)).to(device)
        number = max(1, int(share * len(data)))
        kept, held = order[number:], order[:number]
        held_out = Rows(data[held], None if its_context is None else its_context[held], 1)
        data, its_context = data[kept], None if its_context is None else its_context[kept]
    if batch_size is None:
        batch_size = min(256, len(data))
    if len(data) < batch_size or len(data) == 0:
        raise ValueError(f"expected at least batch_size={batch_size} training rows; got {len(data)}")
    return Rows(data, its_context, batch_size, steps_per_epoch), held_out


def _data(flow: Flow, x: Any, context: Any, device: torch.device, *, name: str) -> tuple[Tensor, Tensor | None]:
    """Give data and context on the device, numbers in the flow's dtype, or say what is wrong with them."""
    discrete = flow.dequantizer is not None
    data = _as_tensor(x, flow, device, name, integers=discrete)
    if data.shape[1:] != flow.event_shape:
        expected = "(rows, " + ", ".join(map(str, flow.event_shape)) + ")"
        raise ValueError(f"expected {name} of shape {expected}; got {tuple(data.shape)}")
    shape = getattr(flow.dequantizer, "event_shape", flow.event_shape)
    if shape != flow.event_shape:  # one of fewer dimensions would count the constants of these alone
        raise ValueError(f"expected a dequantizer of the flow's shape {tuple(flow.event_shape)}; got {tuple(shape)}")
    if discrete and hasattr(flow.dequantizer, "check"):
        flow.dequantizer.check(data)  # type: ignore[union-attr, operator]
    if not discrete:
        _refuse_outside(flow, data, name)
    embedded = flow.embedding is not None
    if context is not None and not flow.context_features:
        raise ValueError(f"expected no context, or labels, beside {name}, since context_features=0; got one")
    given = None if context is None else _as_tensor(context, flow, device, f"context of {name}", integers=embedded)
    if not embedded:
        flow.bijection._batch_shape(data.shape[:1], given)
    elif given is None:
        flow._embed(None)  # says that it is missing
    elif isinstance(flow.embedding, OneHot):
        flow.embedding.check(given)  # a GPU would look a label up beyond the table, and be of no use from then on
    if given is not None and given.shape[: 1 if embedded else -1] != data.shape[:1]:
        raise ValueError(f"expected a context for each of {len(data)} rows; got {tuple(given.shape)}")
    return data, given


def _as_tensor(x: Any, flow: Flow, device: torch.device, name: str, *, integers: bool = False) -> Tensor:
    try:
        given = x.detach() if isinstance(x, Tensor) else torch.from_numpy(np.ascontiguousarray(np.asarray(x)))
    except TypeError:
        raise TypeError(f"expected {name} as a tensor or an array of numbers; got {type(x).__name__}") from None
    if integers and not given.is_floating_point():
        return given.to(device)
    if not given.is_floating_point():
        raise TypeError(
            f"expected {name} of floating-point numbers; got {given.dtype}: "
            f"convert them, or give the flow {'an embedding' if name.startswith('context') else 'a dequantizer'}"
        )
    tensor = given.to(device, flow.dtype)
    finite = tensor.isfinite()
    if not finite.all():
        where = (~finite).nonzero()
        row, *column = where[0].tolist()
        number = given[(row, *column)]
        raise ValueError(
            f"expected finite numbers in {name}; got {float(number)} in row {row}, column {', '.join(map(str, column))}"
            f"{f', beyond the range of {flow.dtype}' if number.isfinite() else ''} ({len(where)} such numbers in all)"
        )
    return tensor


def _refuse_outside(flow: Flow, data: Tensor, name: str) -> None:
    """Refuse data outside the flow's support, such as pixels beyond [0, 1] of a flow with a logit."""
    support = getattr(flow.bijection.codomain, "base_constraint", flow.bijection.codomain)
    inside = support.check(data)
    if not inside.all():
        where = (~inside).nonzero()
        row, *place = where[0].tolist()
        raise ValueError(
            f"expected {name} in the flow's support, {support}; got {float(data[(row, *place)]):.6g} in row {row} "
            f"({len(where)} such numbers in all)"
        )


def _refuse_constant_columns(data: Tensor, of: Tensor | None = None) -> None:
    same = (data == data[0]).all(0)
    constant = (same if of is None else same & of.to(same.device)).flatten().nonzero()[:, 0].tolist()
    if constant:
        shown = ", ".join(map(str, constant[:10])) + (", ..." if len(constant) > 10 else "")
        raise ValueError(f"expected columns that vary, since a constant one has no density; got column {shown}")
