"""Context managers for seeding and module modes, and the state of torch's random number generators."""

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["evaluating", "random_state", "seeded", "set_random_state"]


@contextmanager
def seeded(seed: int | None, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch in a block, and restore its generators, on the device or all GPUs, afterwards; None does neither."""
    if seed is None:
        yield
        return
    if not isinstance(seed, Integral) or isinstance(seed, bool):
        raise TypeError(f"expected seed to be an integer; got {seed!r}")
    devices = None if device is None else [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(int(seed))
        yield


@contextmanager
def evaluating(module: Any) -> Iterator[None]:
    """Put a module and its submodules in evaluation mode, and restore each one's mode; other objects are left alone."""
    modes = [(part, part.training) for part in module.modules()] if isinstance(module, nn.Module) else []
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of torch's generators on the CPU and on the device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Restore the state of torch's generators."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
