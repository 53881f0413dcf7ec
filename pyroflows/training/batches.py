"""Batches for training: rows of an array, batches of the user's own, or steps without data.

Each kind has the number of ``steps`` of an epoch (None if unknown), yields the batches of an ``epoch`` from a step on,
and has a ``position`` in the data, which a checkpoint saves and sets.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import count, repeat
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from pyroflows import distributed
from pyroflows.arguments import as_tensor
from pyroflows.contexts import random_state, set_random_state
from pyroflows.training.options import FitOptions

__all__ = ["Batch", "Batches", "MappedArray", "Rows", "Steps", "as_channels_last", "parts_of"]

_EVALUATION_ROWS = 8192
_EVALUATION_NUMBERS = 2**19


class Batch(NamedTuple):
    """A batch, or a part of it with its share of the rows."""

    x: Any  # a tensor; None in steps without data
    context: Tensor | None = None
    weights: Tensor | None = None
    share: float = 1.0

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What an objective takes after the flow; the weights of rows only if there are any."""
        return (self.x, self.context) if self.weights is None else (self.x, self.context, self.weights)


def parts_of(batch: Batch, options: FitOptions) -> Iterator[Batch]:
    """Augment a batch, and yield the parts of it that are run one after another."""
    number, x = options.accumulate, batch.x
    if x is None:
        yield from repeat(Batch(None, share=1 / number), number)
        return
    if options.augment is not None:
        shape, dtype = x.shape, x.dtype
        x = options.augment(x)
        if not isinstance(x, Tensor) or x.shape != shape or x.dtype != dtype:
            got = f"{x.dtype} of {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"expected augment to return {dtype} of {tuple(shape)}, as it gets; got {got}")
    batch = as_channels_last(batch._replace(x=x), options)
    if number > 1:  # the same number on every rank, since norms in training sum over all ranks in each part
        number = min(distributed.all_gather(min(number, len(x))))
    parts = [[None] * number if column is None else column.tensor_split(number) for column in batch[:3]]
    for part, context, weights in zip(*parts, strict=True):
        yield Batch(part, context, weights, len(part) / len(x))


def as_channels_last(batch: Batch, options: FitOptions) -> Batch:
    """Return a batch of images in the layout that the options ask for."""
    if options.channels_last and batch.x is not None:
        batch = batch._replace(x=batch.x.contiguous(memory_format=torch.channels_last))
    return batch


class MappedArray:
    """A memory-mapped array that is indexed like a tensor, and read only where it is indexed."""

    def __init__(self, array: Any, dtype: torch.dtype, device: torch.device, rows: Tensor | None = None):
        self.array, self.device, self.rows = array, device, rows  # without rows, all of the array's
        empty = as_tensor(np.array(array[:0]))
        self.dtype = dtype if empty.is_floating_point() else empty.dtype

    def subset(self, rows: Tensor) -> "MappedArray":
        """Return a view of these rows, without reading them."""
        rows = rows.cpu() if self.rows is None else self.rows[rows.cpu()]
        return MappedArray(self.array, self.dtype, self.device, rows)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self.array.shape[1:])

    def __len__(self) -> int:
        return len(self.array) if self.rows is None else len(self.rows)

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        index = rows if isinstance(rows, slice) else rows.cpu()
        if self.rows is not None:
            index = self.rows[index]
        values = np.array(self.array[index if isinstance(index, slice) else index.numpy()])
        return as_tensor(values).to(self.device, self.dtype)


class Rows:
    """Rows in memory or in a file: an epoch is a pass over them or, with ``steps``, part of a shuffle that runs on."""

    def __init__(
        self, x: Any, context: Any = None, weights: Any = None, *, batch_size: int = 1, steps: int | None = None
    ):
        self.x, self.context, self.weights, self.batch_size = x, context, weights, batch_size
        self.steps = steps or len(x) // batch_size
        self.shuffle_runs_on = steps is not None
        self.position = torch.empty(0, dtype=torch.long)  # what is left of a shuffle

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor | slice) -> Batch:
        context = None if self.context is None else self.context[rows]
        return Batch(self.x[rows], context, None if self.weights is None else self.weights[rows])

    def epoch(self, start: int = 0) -> Iterator[Batch]:
        unseen = self.position[: None if start or self.shuffle_runs_on else 0].to(self.x.device)
        own = distributed.rank_slice(self.batch_size)
        share = (own.stop - own.start) / self.batch_size
        for _ in range(self.steps - start):
            while len(unseen) < self.batch_size:
                unseen = torch.cat([unseen, torch.randperm(len(self), device=self.x.device)])
            rows, unseen = unseen.tensor_split([self.batch_size])
            self.position = unseen
            yield self[rows[own]]._replace(share=share)

    def slices(self) -> list[slice]:
        """Return slices of this rank's rows to evaluate one at a time: fewer rows if a row is large."""
        size, own = self._rows_at_once(), distributed.rank_slice(len(self))
        return [slice(i, min(i + size, own.stop)) for i in range(own.start, own.stop, size)]

    def by_weight(self) -> Batch:
        """Return this rank's part of all rows with their weights or, if they are many, of rows drawn by weight."""
        weights = cast(Tensor, self.weights)
        number = max(self.batch_size, self._rows_at_once())
        if len(self) <= number:
            return self[distributed.rank_slice(len(self))]
        total = weights.double().cumsum(0)
        places = total[-1] * torch.rand(number, dtype=torch.float64, device="cpu").to(total.device)
        rows = torch.searchsorted(total, places).clamp(max=len(self) - 1)
        return self[rows[distributed.rank_slice(number)]]._replace(weights=None)

    def _rows_at_once(self) -> int:
        return max(1, min(_EVALUATION_ROWS, _EVALUATION_NUMBERS // max(1, self.x[:1].numel())))

    def sample(self, most: int) -> "Rows":
        """Return at most this number of rows, evenly spaced, if they are in a file; else all."""
        if isinstance(self.x, Tensor) or len(self) <= most:
            return self
        rows = torch.linspace(0, len(self) - 1, most, dtype=torch.float64).long()
        return Rows(*self[rows].inputs)


class Batches:
    """Batches that come from the user: each rank takes its slice of each or, if they are sharded, reads its own."""

    def __init__(self, batches: Iterable[Any], as_rows: Callable[[Any, Any, str], Any], device: torch.device):
        self.batches, self.as_rows, self.device = batches, as_rows, device
        sampler = getattr(batches, "sampler", None)
        self.sampler = sampler if isinstance(sampler, DistributedSampler) else None
        self.sharded = bool(getattr(batches, "sharded", self.sampler is not None))
        try:
            self.steps: int | None = min(distributed.all_gather(len(batches)))  # type: ignore[arg-type]
        except TypeError:  # a stream, or a DataLoader over one
            self.steps = None
        self.position: dict[str, Tensor] | None = None  # the random state at the start of the epoch

    def epoch(self, start: int = 0) -> Iterator[Batch]:
        state = random_state(self.device)
        if start and self.position is not None:
            set_random_state(self.position, self.device)  # so that the same batches come first
        else:
            self.position = state
        if self.sampler is not None:
            self.sampler.set_epoch(int(torch.randint(2**31, ())))  # or every epoch would have the same order
        batches: Iterator[Batch] = map(self._slice, self.batches, count())
        if distributed.world_size() > 1:
            batches = self._shared(batches)
        for _ in range(start):
            next(batches, None)
        if start:
            set_random_state(state, self.device)
        yield from batches

    def _shared(self, slices: Iterator[Batch]) -> Iterator[Batch]:
        """Yield this rank's slices, except for those of batches with too few rows for all ranks."""
        while True:
            own = next(slices, None)
            rows = 0 if own is None else len(own.x)
            counts = torch.tensor([own is not None, rows > 0, rows], device=self.device)
            batches, filled, total = distributed.all_reduce(counts).tolist()
            if batches < distributed.world_size():
                return
            if own is not None and filled == distributed.world_size():
                yield own._replace(share=rows / total)

    def _slice(self, batch: Any, number: int) -> Batch:
        x, context = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
        if isinstance(x, (tuple, list)) and len(x) == 1:
            x = x[0]
        if not hasattr(x, "__array__"):
            raise TypeError(f"expected batches that are tensors or arrays, or pairs of them; got {type(x).__name__}")
        x, context = self.as_rows(x, context, f"batch {number}")
        own = slice(None) if self.sharded else distributed.rank_slice(len(x))
        return Batch(x[own], None if context is None else context[own])


class Steps:
    """Steps without data."""

    position = None

    def __init__(self, steps: int):
        self.steps = steps

    def epoch(self, start: int = 0) -> Iterator[Batch]:
        return repeat(Batch(None, share=1 / distributed.world_size()), self.steps - start)
