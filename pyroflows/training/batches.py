"""Batches for training: rows of an array, batches of the user's own, or steps without data."""

from collections.abc import Callable, Iterable, Iterator
from copy import copy
from typing import Any, NamedTuple

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
    """A batch, or a part of it, with the part's share of the rows of the whole batch."""

    x: Tensor | None
    context: Tensor | None = None
    weights: Tensor | None = None
    share: float = 1.0

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """What an objective takes after the flow: data, context, and the weights of rows if there are any."""
        return (self.x, self.context) if self.weights is None else (self.x, self.context, self.weights)


def parts_of(batch: Batch, options: FitOptions) -> Iterator[Batch]:
    """Augment a batch, and yield the parts of it that are run one after another."""
    number, x = options.accumulate, batch.x
    if x is None:
        for _ in range(number):
            yield Batch(None, share=1 / number)
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
    columns = (batch.x, batch.context, batch.weights)
    parts = [[None] * number if column is None else column.tensor_split(number) for column in columns]
    for part, context, weights in zip(*parts, strict=True):
        yield Batch(part, context, weights, len(part) / len(x))


def as_channels_last(batch: Batch, options: FitOptions) -> Batch:
    """Return a batch of images in the layout that the options ask for."""
    if not options.channels_last or batch.x is None:
        return batch
    return batch._replace(x=batch.x.contiguous(memory_format=torch.channels_last))


class MappedArray:
    """A memory-mapped array that is indexed like a tensor, and read only where it is indexed."""

    def __init__(self, array: np.memmap[Any, Any], dtype: torch.dtype, device: torch.device):
        self.array, self.device = array, device
        empty = as_tensor(np.array(array[:0]))
        self.dtype = dtype if empty.is_floating_point() else empty.dtype
        self.rows: Tensor | None = None  # a subset of the array's rows; None for all

    def subset(self, rows: Tensor) -> "MappedArray":
        """Return a view of these rows, without reading them."""
        view = copy(self)
        view.rows = rows.cpu() if self.rows is None else self.rows[rows.cpu()]
        return view

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
    """Rows on the device, or in a memory-mapped file, in batches drawn by shuffling their indices.

    An epoch is a pass over the rows; those left over by its last batch wait for another shuffle. With ``steps``, an
    epoch has this number of steps, and a shuffle runs on through epochs until all rows were seen. Each rank takes its
    slice of every batch.
    """

    def __init__(
        self,
        x: Tensor | MappedArray,
        context: Tensor | MappedArray | None = None,
        weights: Tensor | None = None,
        *,
        batch_size: int = 1,
        steps: int | None = None,
    ):
        self.x, self.context, self.weights, self.batch_size = x, context, weights, batch_size
        self.steps = steps or len(x) // batch_size
        self.shuffle_runs_on = steps is not None
        self.unseen = torch.empty(0, dtype=torch.long, device=x.device)  # what is left of a shuffle

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor | slice) -> Batch:
        context = None if self.context is None else self.context[rows]
        return Batch(self.x[rows], context, None if self.weights is None else self.weights[rows])

    def epoch(self, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, from step ``start`` on."""
        if not self.shuffle_runs_on and not start:
            self.unseen = self.unseen[:0]
        own = distributed.rank_slice(self.batch_size)
        share = (own.stop - own.start) / self.batch_size
        for _ in range(self.steps - start):
            while len(self.unseen) < self.batch_size:
                self.unseen = torch.cat([self.unseen, torch.randperm(len(self), device=self.x.device)])
            rows, self.unseen = self.unseen[: self.batch_size][own], self.unseen[self.batch_size :]
            yield self[rows]._replace(share=share)

    @property
    def position(self) -> Tensor:
        """Where in the data a fit is, for its checkpoint."""
        return self.unseen

    def seek(self, position: Tensor) -> None:
        self.unseen = position.to(self.x.device)

    def slices(self, part: slice = slice(None)) -> list[slice]:
        """Return slices of rows to evaluate one at a time: fewer rows if a row is large, such as an image."""
        size = max(1, min(_EVALUATION_ROWS, _EVALUATION_NUMBERS // max(1, self.x[:1].numel())))
        start, stop, _ = part.indices(len(self))
        return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]

    def sample(self, most: int) -> "Rows":
        """Return at most this number of rows, evenly spaced, if they are in a file; else all."""
        if isinstance(self.x, Tensor) or len(self) <= most:
            return self
        rows = torch.linspace(0, len(self) - 1, most, dtype=torch.float64).long()
        return Rows(*self[rows].inputs)  # type: ignore[arg-type]


class Batches:
    """Batches that come from the user, such as a DataLoader's.

    Each is the batch of all ranks, of which each takes its slice of the rows; if the batches are sharded, each rank
    reads batches of its own.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        as_rows: Callable[[Any, Any, str], tuple[Tensor, Tensor | None]],
        device: torch.device,
    ):
        self.batches, self.as_rows, self.device = batches, as_rows, device
        sampler = getattr(batches, "sampler", None)
        self.sampler = sampler if isinstance(sampler, DistributedSampler) else None
        self.sharded = bool(getattr(batches, "sharded", self.sampler is not None))
        try:
            self.steps: int | None = min(distributed.all_gather(len(batches)))  # type: ignore[arg-type]
        except TypeError:  # a stream, or a DataLoader over one
            self.steps = None
        self.position: dict[str, Tensor] | None = None  # the random state at the start of the epoch

    def seek(self, position: dict[str, Tensor] | None) -> None:
        self.position = position

    def epoch(self, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, from step ``start`` on."""
        state = random_state(self.device)
        if start and self.position is not None:
            set_random_state(self.position, self.device)  # so that the same batches come first
        else:
            self.position = state
        if self.sampler is not None:
            self.sampler.set_epoch(int(torch.randint(2**31, ())))  # or every epoch would have the same order
        numbered = enumerate(self.batches)
        whole = (self._slice(batch, number) for number, batch in numbered)
        batches = self._slices(numbered) if distributed.world_size() > 1 else whole
        for _ in range(start):
            next(batches, None)
        if start:
            set_random_state(state, self.device)
        yield from batches

    def _slices(self, numbered: Iterator[tuple[int, Any]]) -> Iterator[Batch]:
        """Yield this rank's slices; a batch with too few rows for all ranks is left out by all."""
        while True:
            number, batch = next(numbered, (0, None))
            own = None if batch is None else self._slice(batch, number)
            rows = 0 if own is None else len(own.x)  # type: ignore[arg-type]
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
        if not isinstance(x, Tensor) and not hasattr(x, "__array__"):
            raise TypeError(f"expected batches that are tensors or arrays, or pairs of them; got {type(x).__name__}")
        x, context = self.as_rows(x, context, f"batch {number}")
        own = slice(None) if self.sharded else distributed.rank_slice(len(x))
        return Batch(x[own], None if context is None else context[own])


class Steps:
    """Steps without data."""

    position = None

    def __init__(self, steps: int):
        self.steps = steps

    def seek(self, position: None) -> None: ...

    def epoch(self, start: int = 0) -> Iterator[Batch]:
        """Yield batches without data for the steps of an epoch, from ``start`` on."""
        for _ in range(self.steps - start):
            yield Batch(None, share=1 / distributed.world_size())
