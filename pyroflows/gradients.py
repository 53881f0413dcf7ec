"""Gradients of a map times a vector, and scores of densities behind a map."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["pull_back_score", "vjp"]


def vjp(result: Tensor, log_det: Tensor | None, at: Tensor, direction: Tensor) -> Tensor:
    """Return the gradient at ``at`` of ``result`` times ``direction`` plus the log-determinant; the graph is kept."""
    results, directions = [result], [direction]
    if log_det is not None and log_det.requires_grad:
        results.append(log_det)
        directions.append(torch.ones_like(log_det))
    if not result.requires_grad or not at.numel():
        return torch.zeros_like(at)
    gradient = torch.autograd.grad(results, at, directions, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(at) if gradient is None else gradient


def pull_back_score(
    inverse: Callable[..., tuple[Tensor, Tensor]], y: Tensor, score: Tensor, context: Tensor | None
) -> Tensor:
    """Return the score at ``y``, given that at the point to which ``inverse`` maps ``y``; detached."""
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        return vjp(*inverse(y, context), y, score)
