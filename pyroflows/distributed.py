"""Data-parallel work under torchrun: ranks, collectives, and random numbers that are shared or each rank's own."""

import atexit
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyroflows.contexts import random_state, set_random_state
from pyroflows.private import inside_functorch

__all__ = [
    "all_gather",
    "all_reduce",
    "broadcast",
    "broadcast_",
    "choose_device",
    "in_turn",
    "initialize",
    "on_first_rank",
    "rank",
    "rank_rng",
    "rank_slice",
    "shared_rng",
    "synchronize",
    "together",
    "var_mean",
    "weighted_rows",
    "world_size",
]

# The functions below reach other processes only within `together`: elsewhere, as in evaluation by one process alone,
# the others would never answer.
_together = False
_streams: "_Streams | None" = None
_row_weights: Tensor | None = None


def choose_device(name: str | torch.device = "auto", near: torch.device | None = None) -> torch.device:
    """Return the device of a name, "auto" being the accelerator if torch sees one.

    Its index is the local rank under torchrun, else that of the name, else that of ``near``, where the work is now.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        device = (accelerator or torch.device("cpu")) if name == "auto" else torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(f"expected device to be 'auto' or one that torch knows, such as 'cpu'; got {name!r}") from None
    if device.type == "cpu":
        return device
    index = int(os.environ["LOCAL_RANK"]) if _launched() else device.index
    if index is None and near is not None and near.type == device.type:
        index = near.index
    if accelerator is None or accelerator.type != device.type or (index or 0) >= torch.accelerator.device_count():
        got = device.type if index is None else f"{device.type}:{index}"
        raise ValueError(f"expected a device that torch sees; got {got!r}, of which there is none")
    return torch.device(device.type, torch.accelerator.current_device_index() if index is None else index)


def initialize(device: torch.device) -> None:
    """Join the process group of the processes that torchrun has started; do nothing in a process alone."""
    if not _launched() or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    options: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        # Torchrun's store still has the addresses of processes that died before a restart (PyTorch's issue 135712), so
        # each attempt gets its own keys; on several machines, by an option of torchrun that the README names, a store.
        store, options["rank"], options["world_size"] = next(dist.rendezvous("env://"))
        options["store"] = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **options)
    if device.type == "cuda":
        atexit.register(dist.destroy_process_group)  # or NCCL warns at exit


def _launched() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


@contextmanager
def together(device: torch.device, streams: Any = None) -> Iterator[Any]:
    """Let all processes work on the same thing in a block: the functions below then reach all of them.

    All draw the first one's random numbers, except within :func:`rank_rng`. Yields the streams, for a later block.
    """
    global _together, _streams, _var_mean_uncompiled
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield None
        return
    before = _together, _streams
    _together = True
    _var_mean_uncompiled = torch.compiler.disable(_var_mean)  # only here, as it imports the compiler
    try:
        if streams is None:
            set_random_state(broadcast(random_state(device)), device)
            streams = _Streams(device)
        _streams = streams
        yield streams
    finally:
        _together, _streams = before


def world_size() -> int:
    """Return the number of processes that work together; 1 outside :func:`together`."""
    return dist.get_world_size() if _together else 1


def rank() -> int:
    """Return this process's number among those that work together."""
    return dist.get_rank() if _together else 0


def rank_slice(rows: int) -> slice:
    """Return this rank's slice of rows; slices follow one another, and differ by one row at most."""
    size, remainder = divmod(rows, world_size())
    start = rank() * size + min(rank(), remainder)
    return slice(start, start + size + (rank() < remainder))


def all_reduce(x: Tensor) -> Tensor:
    """Sum a tensor over the ranks, in place, and return it."""
    if _together:
        dist.all_reduce(x)
    return x


def broadcast(value: Any) -> Any:
    """Return the first rank's value, of any type that can be pickled."""
    values = [value]
    if _together:
        dist.broadcast_object_list(values)
    return values[0]


@torch.no_grad()
def broadcast_(x: Tensor) -> None:
    """Overwrite a tensor with the first rank's."""
    if _together:
        dist.broadcast(x, 0)


def all_gather(value: Any) -> list[Any]:
    """Return each rank's value, in order."""
    values = [value] * world_size()
    if _together:
        dist.all_gather_object(values, value)
    return values


def on_first_rank(function: Callable[[], Any]) -> Any:
    """Call a function on the first rank, and return its result, or raise its error, on all."""
    result = error = None
    if rank() == 0:
        try:
            result = function()
        except Exception as caught:
            error = caught
    result, error = broadcast((result, error))
    if error is not None:
        raise error
    return result


def synchronize(module: nn.Module) -> None:
    """Overwrite a module's parameters and buffers with the first rank's."""
    if _together:
        state = module.state_dict()
        for value in state.values():
            if isinstance(value, Tensor):
                broadcast_(value)
        module.load_state_dict(state)  # for modules that read more from a state than its tensors


class _AllReduce(torch.autograd.Function):
    """Differentiable all-reduce; its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduce(x.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _AllReduce.apply(gradient)


@contextmanager
def weighted_rows(weights: Tensor | None) -> Iterator[None]:
    """Weigh the rows of a batch, ``(rows,)``, in the statistics that :func:`var_mean` computes from it in a block."""
    global _row_weights
    outer, _row_weights = _row_weights, weights
    try:
        yield
    finally:
        _row_weights = outer


def var_mean(x: Tensor, dims: list[int] | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Compute variance and mean over dimensions and ranks, as ``torch.var_mean`` does without Bessel's correction.

    The dimensions include the first, that of the rows; within :func:`weighted_rows` each counts by its weight.
    """
    weights = None if _row_weights is None or len(_row_weights) != len(x) else _row_weights
    if inside_functorch() or (weights is None and not _together):
        return torch.var_mean(x, dims, correction=0)
    return _var_mean_uncompiled(x, tuple(dims), weights)


def _var_mean(x: Tensor, dims: tuple[int, ...], weights: Tensor | None) -> tuple[Tensor, Tensor]:
    shares = x.new_ones(len(x)) if weights is None else weights.to(x)
    shares = shares.view(-1, *(1,) * (x.dim() - 1))
    sums = (shares * x).sum(dims, keepdim=True)
    count = shares.sum() * (x.numel() / max(1, sums.numel() * len(x)))
    totals = _AllReduce.apply(torch.cat([sums.flatten(), count.reshape(1)]))
    mean = (totals[:-1] / totals[-1]).view_as(sums)
    variance = _AllReduce.apply((shares * (x - mean).square()).sum(dims, keepdim=True)) / totals[-1]
    return variance.squeeze(dims), mean.squeeze(dims)


_var_mean_uncompiled = _var_mean


class _Streams:
    """Two streams of random numbers: one shared by all ranks, which is in use, and this rank's own."""

    def __init__(self, device: torch.device):
        self.device, self.own_in_use = device, False
        shared = random_state(device)
        torch.manual_seed(int(torch.randint(2**62, ())) + rank())
        self.other = random_state(device)
        set_random_state(shared, device)

    def switch(self, *, own: bool) -> None:
        if own != self.own_in_use:
            in_use = random_state(self.device)
            set_random_state(self.other, self.device)
            self.other, self.own_in_use = in_use, own

    @contextmanager
    def use(self, *, own: bool) -> Iterator[None]:
        before = self.own_in_use
        self.switch(own=own)
        try:
            yield
        finally:
            self.switch(own=before)


def rank_rng() -> Any:
    """Return a context in which each rank draws random numbers of its own."""
    return nullcontext() if _streams is None else _streams.use(own=True)


def shared_rng() -> Any:
    """Return a context in which all ranks draw the same random numbers, also within :func:`rank_rng`."""
    return nullcontext() if _streams is None else _streams.use(own=False)


def in_turn(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Map a function over items, which all ranks read and take in turn; the first rank yields the results, in order."""
    items = iter(items)
    while group := list(islice(items, world_size())):
        results = all_gather(function(group[rank()]) if rank() < len(group) else None)
        if rank() == 0:
            yield from results[: len(group)]
