"""The processes that torchrun has started: what each works on, sums over all of them, and their random numbers."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
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
    "in_turn",
    "launch",
    "on_first_rank",
    "rank",
    "rank_random_state",
    "rank_rng",
    "rank_slice",
    "set_rank_random_state",
    "shared_rng",
    "synchronize",
    "together",
    "var_mean",
    "world_size",
]

# Only inside `together` do layers and objectives look beyond their own process: elsewhere, as where one process alone
# looks at a flow, the others would never answer.
_together = False
_random: _Random | None = None


def launch(accelerator: str, device: torch.device, precision: str) -> Any:
    """Give the Lightning Fabric of this process: one of several under torchrun, else one alone."""
    from lightning_fabric import Fabric

    world = int(os.environ.get("WORLD_SIZE", 1)) if dist.is_available() and dist.is_torchelastic_launched() else 1
    if world == 1:
        devices = [device.index] if device.type == "cuda" and accelerator in ("auto", "cuda", "gpu") else 1
        return Fabric(accelerator=accelerator, devices=devices, precision=precision)
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    fabric = Fabric(accelerator=accelerator, devices=here, num_nodes=world // here, strategy="ddp", precision=precision)
    if not int(os.environ.get("LT_CLI_USED", 0)):  # `fabric run` has done it
        if world == here and not dist.is_initialized():
            _connect(fabric.device)
        fabric.launch()
    return fabric


def _connect(device: torch.device) -> None:
    """Find the other processes of this machine in a store of this attempt alone.

    In the one that torchrun keeps there are still the addresses of those that died before a restart (PyTorch's issue
    135712). Over several machines the attempts have no number in common; there an option of torchrun's, which the
    README names, gives each attempt its own store.
    """
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    if device.type == "cuda":
        dist.init_process_group("nccl", store=store, rank=rank, world_size=world, device_id=device)
        atexit.register(dist.destroy_process_group)  # or it warns at the end
    else:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)


@contextmanager
def together(device: torch.device, streams: Any = None) -> Iterator[Any]:
    """Work on one thing with all processes for the length of a block.

    The random numbers of the first process are those of all, but for what is drawn :func:`rank_rng`. The block gets the
    streams of random numbers, with which another can go on.
    """
    global _together, _random, _outside_compiled
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield None
        return
    before = _together, _random
    _together = True
    _outside_compiled = torch.compiler.disable(_var_mean)  # here, as the compiler takes seconds to import
    try:
        if streams is None:
            set_random_state(broadcast(random_state(device)), device)
            streams = _Random(device)
        _random = streams
        yield streams
    finally:
        _together, _random = before


def world_size() -> int:
    """Give the number of processes that work together; 1 outside of :func:`together`."""
    return dist.get_world_size() if _together else 1


def rank() -> int:
    """Give the number of this process among those that work together."""
    return dist.get_rank() if _together else 0


def rank_slice(rows: int) -> slice:
    """Give this process its part of so many rows; the parts of all are in order, and differ by one row at most."""
    size, more = divmod(rows, world_size())
    start = rank() * size + min(rank(), more)
    return slice(start, start + size + (rank() < more))


# What all processes know


def all_reduce(x: Tensor) -> Tensor:
    """Give the sum over the processes, in place."""
    if _together:
        dist.all_reduce(x)
    return x


def broadcast(thing: Any) -> Any:
    """Give what the first process has."""
    if not _together:
        return thing
    things = [thing]
    dist.broadcast_object_list(things)
    return things[0]


@torch.no_grad()
def broadcast_(x: Tensor) -> None:
    """Put the first process's numbers into a tensor."""
    if _together:
        dist.broadcast(x, 0)


def all_gather(thing: Any) -> list[Any]:
    """Give what each process has, in order."""
    if not _together:
        return [thing]
    things: list[Any] = [None] * world_size()
    dist.all_gather_object(things, thing)
    return things


def on_first_rank(method: Callable[[], Any]) -> Any:
    """Give what the first process finds; an error that it meets is raised by all."""
    if not _together:
        return method()
    found = error = None
    if rank() == 0:
        try:
            found = method()
        except Exception as caught:
            error = caught
    found, error = broadcast((found, error))
    if error is not None:
        raise error
    return found


@torch.no_grad()
def synchronize(module: nn.Module) -> None:
    """Give the module the parameters and buffers that it has in the first process."""
    if not _together:
        return
    state = module.state_dict()
    for value in state.values():
        if isinstance(value, Tensor):
            broadcast_(value)
    module.load_state_dict(state)  # for what a module keeps beside its tensors


class _Sum(torch.autograd.Function):
    """The sum over the processes, whose gradient is the sum of the gradients that they have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduce(x.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        found: Tensor = _Sum.apply(gradient)
        return found


def var_mean(x: Tensor, dims: list[int] | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Give variance and mean over these dimensions and over the processes, as ``torch.var_mean`` without correction."""
    if not _together or inside_functorch():
        return torch.var_mean(x, dims, correction=0)
    return _outside_compiled(x, tuple(dims))


def _var_mean(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    sums = x.sum(dims, keepdim=True)
    found = _Sum.apply(torch.cat([sums.flatten(), x.new_tensor([x.numel() / max(1, sums.numel())])]))
    mean = (found[:-1] / found[-1]).view_as(sums)
    variance = _Sum.apply((x - mean).square().sum(dims, keepdim=True)) / found[-1]
    return variance.squeeze(dims), mean.squeeze(dims)


_outside_compiled = _var_mean


# Random numbers


class _Random:
    """Two streams of random numbers: one that all processes have alike, in place, and one of this process's own."""

    def __init__(self, device: torch.device):
        self.device = device
        common = random_state(device)
        torch.manual_seed(int(torch.randint(2**62, ())) + rank())
        self.other = random_state(device)
        self.is_apart = False
        set_random_state(common, device)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        in_place = random_state(self.device)
        set_random_state(self.other, self.device)
        self.other, self.is_apart = in_place, not self.is_apart


def rank_rng() -> Any:
    """Give a context in which each process draws random numbers of its own."""
    return nullcontext() if _random is None or _random.is_apart else _random.swapped()


def shared_rng() -> Any:
    """Give a context, also within :func:`rank_rng`, in which all processes draw the same random numbers."""
    return _random.swapped() if _random is not None and _random.is_apart else nullcontext()


def rank_random_state() -> dict[str, Tensor] | None:
    """Give the state of this process's own random numbers; None where it is alone. To be called outside of apart."""
    return None if _random is None else _random.other


def set_rank_random_state(state: dict[str, Tensor] | None) -> None:
    """Go on with this process's own random numbers."""
    if _random is not None and state is not None:
        _random.other = state


# Work on a stream


def in_turn(function: Callable[[Any], Any], things: Iterable[Any]) -> Iterator[Any]:
    """Give the function of each thing, in order, on the first process; each process computes its share of them.

    All processes go through the things, of which there are few at a time in memory.
    """
    group: list[Any] = []
    for thing in things:
        group.append(thing)
        if len(group) == world_size():
            yield from _computed(function, group)
            group = []
    if group:
        yield from _computed(function, group)


def _computed(function: Callable[[Any], Any], group: list[Any]) -> list[Any]:
    found = all_gather(function(group[rank()]) if rank() < len(group) else None)
    return found[: len(group)] if rank() == 0 else []
