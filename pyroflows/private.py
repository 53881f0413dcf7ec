"""The private names of libraries that this package uses, each because no public name does the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["contents", "inside_functorch", "version"]


def inside_functorch() -> bool:
    """Whether ``torch.func`` is transforming the call, so that no buffer may be written; False while compiling."""
    # torch.func has no public way to ask.
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def version(tensor: Tensor) -> int:
    """Return the number of in-place writes that torch has counted; an inference tensor counts none."""
    # The counter by which autograd itself detects in-place writes; it is documented but has no public name.
    return 0 if tensor.is_inference() else tensor._version


def contents(module: nn.Module) -> tuple[list[bool], list[Tensor]]:
    """Return the modes of a module and its parts, and all their parameters and buffers."""
    # The public iterators build names and remove duplicates, which takes as long as a small network.
    modes: list[bool] = []
    tensors: list[Tensor] = []
    parts: list[Any] = [module]
    for part in parts:
        modes.append(part.training)
        tensors += [tensor for tensor in part._parameters.values() if tensor is not None]
        tensors += [tensor for tensor in part._buffers.values() if tensor is not None]
        parts += [child for child in part._modules.values() if child is not None]
    return modes, tensors
