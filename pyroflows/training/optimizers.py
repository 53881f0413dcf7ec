"""Adam and Adamax of torch, without its compiler, and the schedule of the learning rate."""

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pyroflows.training.options import FitOptions

__all__ = ["Adam", "Adamax", "build_optimizer", "schedule_factor"]


def _without_compiler(optimizer: type[torch.optim.Optimizer]) -> Any:
    """Derive an optimizer that does not import torch's compiler, which takes seconds.

    Torch wraps these methods so that the compiler leaves them alone, and the wrappers import it at the first call.
    """
    names = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
    methods: dict[str, Any] = {name: inspect.unwrap(getattr(optimizer, name)) for name in names}
    methods["step"] = torch.no_grad()(inspect.unwrap(optimizer.step))
    return type(optimizer.__name__, (optimizer,), methods)


Adam = _without_compiler(torch.optim.Adam)
Adamax = _without_compiler(torch.optim.Adamax)


def build_optimizer(
    parameters: Iterable[nn.Parameter], learning_rate: float, options: FitOptions
) -> torch.optim.Optimizer:
    """Build the optimizer; Adam is fused, so that it can skip a step without waiting for the device."""
    if options.optimizer == "adamax":
        return Adamax(parameters, learning_rate, weight_decay=float(options.weight_decay), foreach=True)
    return Adam(parameters, learning_rate, weight_decay=float(options.weight_decay), fused=True)


def schedule_factor(steps: int, total_steps: int | None, elapsed: float, options: FitOptions) -> float:
    """Return the learning rate of the next step as a share of the highest.

    It depends on the steps taken out of all, if their number is known, or on the share of the time that has elapsed.
    """
    done = min(max(steps / total_steps if total_steps else 0.0, elapsed), 1.0)
    # Until the number of steps is known, a hundred warm up.
    step = 1 / total_steps if total_steps else options.warmup * (steps + 1) / 100
    rise = min(1.0, (done + step) / options.warmup) if options.warmup else 1.0
    return rise * (1 + math.cos(math.pi * done)) / 2 if options.schedule == "cosine" else rise
