"""Marks by which a module's numbers are known to be as they were, and whether ``torch.func`` stands before them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["inside_functorch", "marks_of", "version"]

_optimizer_steps = 0


def _count_optimizer_step(*_: Any) -> None:
    """Fused optimizers and Pyro's own write to ``p.data`` and leave ``p._version`` alone; their step is seen here."""
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)


def version(tensor: Tensor) -> int:
    """Give the number of writes to a tensor, as far as torch counts them."""
    return 0 if tensor.is_inference() else tensor._version


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a tensor that is sparse, or under torch.func, has no memory of its own
        return 0


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Assigning to ``p.data`` moves no version, but the numbers."""
    try:
        return [tensor.data_ptr() for tensor in tensors]
    except RuntimeError:
        return [_address(tensor) for tensor in tensors]


def marks_of(module: nn.Module) -> list[int]:
    """Give what an evaluation of ``module`` depends on beside its input: modes, and tensors with their versions."""
    modes, tensors, parts = [], [], [module]
    for part in parts:
        modes.append(part.training)
        for held in (part._parameters, part._buffers):
            tensors += [tensor for tensor in held.values() if tensor is not None]
        parts += [child for child in part._modules.values() if child is not None]
    return [_optimizer_steps, *modes, *map(id, tensors), *map(version, tensors), *_addresses(tensors)]


def inside_functorch() -> bool:
    """Whether ``torch.func`` is at work, under which no buffer may be written; dynamo cannot look, and writes well."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
