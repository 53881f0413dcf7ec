"""A flow whose parameters, with their gradients and what the optimizer keeps of them, are spread over processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyroflows.compose import Compose
from pyroflows.flow import Flow
from pyroflows.training.modes import METHODS

__all__ = ["gather", "shard", "spread"]

_DIRECTIONS = ("forward_and_log_det", "inverse_and_log_det", "forward_and_score", "inverse_and_score")


def shard(flow: Flow) -> Any:
    """Give the flow as one that is spread, by PyTorch's FSDP2: the stacks within it one by one, then the rest.

    A stack's parameters are gathered for the time it runs, forward and again backward.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for part in list(flow.modules()):
        if not isinstance(part, Compose) or part is flow.bijection:
            continue
        if not any(isinstance(inner, Compose) and inner is not part for inner in part.modules()):
            fully_shard(part)
            for direction in _DIRECTIONS:
                register_fsdp_forward_method(part, direction)
    fully_shard(flow)
    for method in METHODS:
        register_fsdp_forward_method(flow, method)
    return flow


def gather(tree: Any) -> Any:
    """Give whole tensors in the place of those that are spread, in lists and dicts; by all processes at once."""
    if isinstance(tree, dict):
        return {name: gather(value) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [gather(value) for value in tree]
    return tree.full_tensor() if hasattr(tree, "full_tensor") else tree


@torch.no_grad()
def spread(whole: Tensor, like: Tensor) -> Tensor:
    """Give a tensor spread as another is; by all processes at once."""
    from torch.distributed.tensor import distribute_tensor

    if not hasattr(like, "placements"):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]
