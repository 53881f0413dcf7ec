"""What a fit takes its batches from: rows on the device, batches of the user's own, or no data at all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from copy import copy
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from pyroflows import distributed
from pyroflows.arguments import check_number, check_sizes, check_varying
from pyroflows.contexts import random_state, set_random_state
from pyroflows.dequantizers import ColumnDequantizer
from pyroflows.networks.one_hot import OneHot

if TYPE_CHECKING:
    from pyroflows.flow import Flow

__all__ = ["Batches", "Mapped", "Rows", "Steps", "prepare"]


class Batch(NamedTuple):
    """A batch, or this rank's slice of it, and the share of the batch's rows that the slice has."""

    x: Tensor | None
    context: Tensor | None = None
    weights: Tensor | None = None
    share: float = 1.0

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """What an objective takes after the flow: data, context, and the weights of rows if there are any."""
        return (self.x, self.context) if self.weights is None else (self.x, self.context, self.weights)


_EVALUATION_ROWS = 8192
_EVALUATION_NUMBERS = 2**19
_CHECKED_NUMBERS = 2**22  # of a memory-mapped array at a time


class Mapped:
    """Rows of a memory-mapped array, of which only those that are asked for are read; a tensor's few uses of a fit."""

    def __init__(self, array: np.memmap[Any, Any], dtype: torch.dtype, device: torch.device):
        self.array, self.device = array, device
        first = _numbers(np.array(array[:0]))
        self.dtype = dtype if first.is_floating_point() else first.dtype
        self.rows: Tensor | None = None  # where not all are meant

    def among(self, rows: Tensor) -> Mapped:
        """Give these rows alone."""
        part = copy(self)
        part.rows = rows.cpu() if self.rows is None else self.rows[rows.cpu()]
        return part

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self.array.shape[1:])

    def __len__(self) -> int:
        return len(self.array) if self.rows is None else len(self.rows)

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        wanted = rows if isinstance(rows, slice) else rows.cpu()
        if self.rows is not None:
            wanted = self.rows[wanted]
        found = np.array(self.array[wanted if isinstance(wanted, slice) else wanted.numpy()])
        return _numbers(found).to(self.device, self.dtype)


class Rows:
    """Data that lie on the device, or in a memory-mapped file, in batches by index shuffle.

    An epoch is a whole pass, whose leftover rows wait for another shuffle; or, with ``steps``, so many steps of one
    shuffle after another, each of which goes through all rows. Each process takes its part of every batch.
    """

    def __init__(
        self,
        x: Tensor | Mapped,
        context: Tensor | Mapped | None = None,
        weights: Tensor | None = None,
        *,
        batch_size: int = 1,
        steps: int | None = None,
    ):
        self.x, self.context, self.weights, self.batch_size = x, context, weights, batch_size
        self.steps = steps or len(x) // batch_size
        self.runs_on = steps is not None
        self.waiting = torch.empty(0, dtype=torch.long, device=x.device)  # the rows of a shuffle not seen yet

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor | slice) -> Batch:
        context = None if self.context is None else self.context[rows]
        return Batch(self.x[rows], context, None if self.weights is None else self.weights[rows])

    def after(self, done: int) -> Iterator[Batch]:
        """Give the batches of an epoch of which so many are done."""
        if not self.runs_on and not done:
            self.waiting = self.waiting[:0]
        mine = distributed.rank_slice(self.batch_size)
        share = (mine.stop - mine.start) / self.batch_size
        for _ in range(self.steps - done):
            while len(self.waiting) < self.batch_size:
                self.waiting = torch.cat([self.waiting, torch.randperm(len(self.x), device=self.x.device)])
            rows, self.waiting = self.waiting[: self.batch_size][mine], self.waiting[self.batch_size :]
            yield self[rows]._replace(share=share)

    @property
    def place(self) -> Tensor:
        """Where in the data a fit is."""
        return self.waiting

    def go_to(self, place: Tensor) -> None:
        self.waiting = place.to(self.x.device)

    def slices(self, part: slice = slice(None)) -> list[slice]:
        """Parts to be evaluated at a time: fewer rows where a row is large, as an image's activations are larger."""
        rows = max(1, min(_EVALUATION_ROWS, _EVALUATION_NUMBERS // max(1, self.x[:1].numel())))
        start, stop, _ = part.indices(len(self.x))
        return [slice(i, min(i + rows, stop)) for i in range(start, stop, rows)]

    def sample(self, most: int) -> Rows:
        """Give so many rows, evenly spaced, where they are not in memory and more."""
        if isinstance(self.x, Tensor) or len(self.x) <= most:
            return self
        rows = torch.linspace(0, len(self.x) - 1, most, dtype=torch.float64).long()
        return Rows(*self[rows].inputs)  # type: ignore[arg-type]


class Batches:
    """Batches that come from the user, such as a DataLoader's.

    Each is the batch of all processes, of which each takes its part of the rows; unless they are sharded, so that each
    process reads batches of its own.
    """

    def __init__(self, batches: Iterable[Any], flow: Flow, device: torch.device):
        self.batches, self.flow, self.device = batches, flow, device
        sampler = getattr(batches, "sampler", None)
        self.sampler = sampler if isinstance(sampler, DistributedSampler) else None
        self.sharded = bool(getattr(batches, "sharded", self.sampler is not None))
        try:
            self.steps: int | None = min(distributed.all_gather(len(batches)))  # type: ignore[arg-type]
        except TypeError:  # a stream, or a DataLoader over one
            self.steps = None
        self.place: dict[str, Tensor] | None = None  # the random numbers at the start of the epoch

    def go_to(self, place: dict[str, Tensor] | None) -> None:
        self.place = place

    def after(self, done: int) -> Iterator[Batch]:
        """Give the batches of an epoch of which so many are done."""
        now = random_state(self.device)
        if done and self.place is not None:
            set_random_state(self.place, self.device)  # so that the same batches come first
        else:
            self.place = now
        if self.sampler is not None:
            self.sampler.set_epoch(int(torch.randint(2**31, ())))  # or every epoch would have the order of the first
        batches = self._shared(enumerate(self.batches)) if distributed.world_size() > 1 else self._whole()
        for _ in range(done):
            next(batches, None)
        if done:
            set_random_state(now, self.device)
        yield from batches

    def _whole(self) -> Iterator[Batch]:
        for number, batch in enumerate(self.batches):
            yield Batch(*self._checked(batch, number))

    def _shared(self, numbered: Iterator[tuple[int, Any]]) -> Iterator[Batch]:
        """Give this process's parts; a batch that does not give every process a row is left out by all."""
        while True:
            number, batch = next(numbered, (0, None))
            x = context = None
            if batch is not None:
                x, context = self._checked(batch, number)
            rows = torch.tensor([batch is not None, x is not None and len(x) > 0, 0 if x is None else len(x)])
            some, filled, total = distributed.all_reduce(rows.to(self.device)).tolist()
            if some < distributed.world_size():
                return
            if x is not None and filled == distributed.world_size():
                yield Batch(x, context, share=len(x) / total)

    def _checked(self, batch: Any, number: int) -> tuple[Tensor, Tensor | None]:
        x, context = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
        if isinstance(x, (tuple, list)) and len(x) == 1:
            x = x[0]
        if not isinstance(x, Tensor) and not hasattr(x, "__array__"):
            raise TypeError(f"expected batches that are tensors or arrays, or pairs of them; got {type(x).__name__}")
        found, its_context = _data(self.flow, x, context, self.device, name=f"batch {number}")
        mine = slice(None) if self.sharded else distributed.rank_slice(len(found))
        return found[mine], None if its_context is None else its_context[mine]


class Steps:
    """Steps without data."""

    place = None

    def __init__(self, steps: int):
        self.steps = steps

    def go_to(self, place: None) -> None: ...

    def after(self, done: int) -> Iterator[Batch]:
        """Give the batches of an epoch of which so many are done."""
        for _ in range(self.steps - done):
            yield Batch(None, share=1 / distributed.world_size())


def prepare(
    flow: Flow,
    x: Any,
    context: Any,
    weights: Any,
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
    if isinstance(validation, tuple) and len(validation) not in (2, 3):
        raise ValueError(
            f"expected validation as (data, context) or (data, context, weights); got {len(validation)} items"
        )
    if validation is not None:
        held_x, held_context, held_weights, *_ = (
            *(validation if isinstance(validation, tuple) else (validation,)),
            None,
            None,
        )
        held_x, held_context = _data(flow, held_x, held_context, device, name="validation data")
        if len(held_x) == 0:
            raise ValueError("expected at least one row of validation data; got none")
        held_weights = _weights(held_weights, len(held_x), device, name="validation data")
        held_out = Rows(held_x, held_context, _scaled(held_weights, "validation data", flow.dtype))
    if not isinstance(x, Tensor) and not hasattr(x, "__array__"):
        alone = {"context": context, "weights": weights, "batch_size": batch_size}
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
    weights = _weights(weights, len(data), device, name="data")
    if flow.dequantizer is None:
        _refuse_constant_columns(data)
    elif isinstance(flow.dequantizer, ColumnDequantizer):
        _refuse_constant_columns(data, flow.dequantizer.steps == 0)
    if share and held_out is None:
        # Drawn on the CPU, so that a fit that goes on elsewhere holds out the same rows.
        order = torch.randperm(len(data)).to(device)
        number = max(1, int(share * len(data)))
        columns = (data, its_context, weights)
        data, its_context, weights = (_among(column, order[number:]) for column in columns)
        held_x, held_context, held_weights = (_among(column, order[:number]) for column in columns)
        held_out = Rows(held_x, held_context, _scaled(held_weights, "the rows held out", flow.dtype))
    if batch_size is None:
        batch_size = min(256, len(data))
    if len(data) < batch_size or len(data) == 0:
        raise ValueError(f"expected at least batch_size={batch_size} training rows; got {len(data)}")
    if batch_size < distributed.world_size():
        raise ValueError(f"expected at least a row a batch for each process; got batch_size={batch_size}")
    weights = _scaled(weights, "the training rows", flow.dtype)
    return Rows(data, its_context, weights, batch_size=batch_size, steps=steps_per_epoch), held_out


def _weights(weights: Any, rows: int, device: torch.device, *, name: str) -> Tensor | None:
    """Return the weights of rows as float64 on the device."""
    if weights is None:
        return None
    try:
        tensor = weights.detach() if isinstance(weights, Tensor) else _numbers(np.asarray(weights))
    except TypeError:
        raise TypeError(f"expected weights of {name} as a tensor or an array; got {type(weights).__name__}") from None
    if tensor.shape != (rows,):
        raise ValueError(f"expected weights of shape ({rows},), one for each row of {name}; got {tuple(tensor.shape)}")
    tensor = tensor.to(device, torch.float64)
    bad = ~(tensor.isfinite() & (tensor >= 0))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"expected finite weights of at least 0 for {name}; got {float(tensor[row])} in row {row}")
    return tensor


def _scaled(weights: Tensor | None, name: str, dtype: torch.dtype) -> Tensor | None:
    """Scale the weights of rows to mean 1."""
    if weights is None:
        return None
    mean = weights.mean()
    if not mean > 0:
        raise ValueError(f"expected a weight above 0 among those of {name}; got zeros only")
    return (weights / mean).to(dtype)


def _among(data: Any, rows: Tensor) -> Any:
    if data is None:
        return None
    return data.among(rows) if isinstance(data, Mapped) else data[rows]


def _data(flow: Flow, x: Any, context: Any, device: torch.device, *, name: str, first: int = 0) -> tuple[Any, Any]:
    """Give data and context on the device, numbers in the flow's dtype, or say what is wrong with them.

    What is memory-mapped stays where it is, and is looked at in chunks; the first row's number is for messages.
    """
    if isinstance(x, np.memmap) and x.ndim > 1:
        return _mapped(flow, x, context, device, name)
    discrete = flow.dequantizer is not None
    data = _as_tensor(x, flow, device, name, integers=discrete, first=first)
    if data.shape[1:] != flow.event_shape:
        expected = "(rows, " + ", ".join(map(str, flow.event_shape)) + ")"
        raise ValueError(f"expected {name} of shape {expected}; got {tuple(data.shape)}")
    shape = getattr(flow.dequantizer, "event_shape", flow.event_shape)
    if shape != flow.event_shape:  # one of fewer dimensions would count the constants of these alone
        raise ValueError(f"expected a dequantizer of the flow's shape {tuple(flow.event_shape)}; got {tuple(shape)}")
    if discrete and hasattr(flow.dequantizer, "check"):
        flow.dequantizer.check(data)  # type: ignore[union-attr, operator]
    if not discrete:
        _refuse_outside(flow, data, name, first)
    embedded = flow.embedding is not None
    if context is not None and not flow.context_features:
        raise ValueError(f"expected no context, or labels, beside {name}, since context_features=0; got one")
    given = (
        None
        if context is None
        else _as_tensor(context, flow, device, f"context of {name}", integers=embedded, first=first)
    )
    if not embedded:
        flow.bijection.broadcast_batch(data.shape[:1], given)
    elif given is None:
        flow.embed(None)  # says that it is missing
    elif isinstance(flow.embedding, OneHot):
        flow.embedding.check(given)  # a GPU would look a label up beyond the table, and be of no use from then on
    if given is not None and given.shape[: 1 if embedded else -1] != data.shape[:1]:
        raise ValueError(f"expected a context for each of {len(data)} rows; got {tuple(given.shape)}")
    return data, given


def _mapped(flow: Flow, x: Any, context: Any, device: torch.device, name: str) -> tuple[Any, Any]:
    """Look at memory-mapped data, and a context beside them, chunk by chunk."""
    if context is not None and not isinstance(context, np.memmap):
        context = _as_tensor(context, flow, device, f"context of {name}", integers=flow.embedding is not None)
    if context is not None and len(context) != len(x):
        raise ValueError(f"expected a context for each of {len(x)} rows; got {tuple(context.shape)}")
    size = max(1, _CHECKED_NUMBERS // max(1, math.prod(x.shape[1:])))
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        _data(flow, np.array(x[rows]), None if context is None else context[rows], device, name=name, first=start)
    context = Mapped(context, flow.dtype, device) if isinstance(context, np.memmap) else context
    return Mapped(x, flow.dtype, device), context


def _as_tensor(
    x: Any, flow: Flow, device: torch.device, name: str, *, integers: bool = False, first: int = 0
) -> Tensor:
    try:
        given = x.detach() if isinstance(x, Tensor) else _numbers(np.asarray(x))
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
            f"expected finite numbers in {name}; got {float(number)} in row {first + row}, "
            f"column {', '.join(map(str, column))}"
            f"{f', beyond the range of {flow.dtype}' if number.isfinite() else ''} ({len(where)} such numbers in all)"
        )
    return tensor


def _numbers(array: np.ndarray[Any, Any]) -> Tensor:
    """Give an array's numbers, in the machine's order of bytes, which alone torch takes."""
    return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ("C", "W")))


def _refuse_outside(flow: Flow, data: Tensor, name: str, first: int) -> None:
    """Refuse data outside the flow's support, such as pixels beyond [0, 1] of a flow with a logit."""
    support = getattr(flow.bijection.codomain, "base_constraint", flow.bijection.codomain)
    inside = support.check(data)
    if not inside.all():
        where = (~inside).nonzero()
        row, *place = where[0].tolist()
        raise ValueError(
            f"expected {name} in the flow's support, {support}; got {float(data[(row, *place)]):.6g} "
            f"in row {first + row} ({len(where)} such numbers in all)"
        )


def _refuse_constant_columns(data: Tensor | Mapped, of: Tensor | None = None) -> None:
    size = len(data) if isinstance(data, Tensor) else max(1, _CHECKED_NUMBERS // max(1, data[:1].numel()))
    first = data[:1]
    same = (first == first)[0]
    for start in range(0, len(data), size):
        same &= (data[start : start + size] == first).all(0)
        if not same.any():
            return
    check_varying((same if of is None else same & of.to(same.device)).flatten().nonzero()[:, 0].tolist())
