"""Gradients summed over ranks, and FSDP: parameters, gradients and optimizer state sharded over ranks."""

from typing import Any

import torch
from torch import Tensor, nn

from pyroflows import distributed
from pyroflows.compose import Compose
from pyroflows.flow import Flow
from pyroflows.training.modes import METHODS

__all__ = ["gather", "shard", "shard_like", "sum_gradients"]

_DIRECTIONS = ("forward_and_log_det", "inverse_and_log_det", "forward_and_score", "inverse_and_score")


def shard(flow: Flow) -> Any:
    """Shard a flow by PyTorch's FSDP2: the innermost stacks one by one, then the rest.

    A stack's parameters are gathered while it runs, forward and again backward.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for part in list(flow.modules()):
        if not isinstance(part, Compose) or part is flow.bijection:
            continue
        if not any(isinstance(inner, Compose) and inner is not part for inner in part.modules()):
            fully_shard(part)
            for direction in _DIRECTIONS:
                register_fsdp_forward_method(part, direction)
                register_fsdp_forward_method(part, f"unchecked_{direction}")  # what an outer stack calls
    fully_shard(flow)
    for method in METHODS:
        register_fsdp_forward_method(flow, method)
    return flow


def gather(tree: Any) -> Any:
    """Return a tree of lists and dicts with sharded tensors gathered; called on all ranks at once."""
    if isinstance(tree, dict):
        return {name: gather(value) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [gather(value) for value in tree]
    return tree.full_tensor() if hasattr(tree, "full_tensor") else tree


@torch.no_grad()
def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a tensor sharded as another is, if it is; called on all ranks at once."""
    from torch.distributed.tensor import distribute_tensor

    if not hasattr(other, "placements"):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)  # type: ignore[attr-defined]


def sum_gradients(parameters: list[nn.Parameter], loss: Tensor) -> Tensor:
    """Sum gradients, in place, and the loss over the ranks.

    Not by DistributedDataParallel, which sees only calls of a module's ``forward``, and expects a gradient of every
    parameter: an objective may call any of a flow's methods, several times, and leave parameters out.
    """
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    parts = [*(gradient.flatten() for gradient in gradients), loss.to(gradients[0])[None]]
    sums = distributed.all_reduce(torch.cat(parts)).split([len(part) for part in parts])
    for parameter, gradient, total in zip(parameters, gradients, sums, strict=False):
        parameter.grad = gradient.copy_(total.view_as(gradient))  # in its layout, the one that a fused optimizer knows
    return sums[-1][0]
