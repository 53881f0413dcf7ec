"""Path gradients of log weights: by the draws of a guide alone, without those of its log-density at fixed draws."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Delta
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import TransformedDistribution

from pyroflows.bijection import Bijection
from pyroflows.gradients import vjp
from pyroflows.inference.sites import nested

__all__ = ["DrawsAsLeaves", "Particles"]


@dataclass
class _ScoredDensity:
    """The log-density of a flow at its own draw, with its graph and as a leaf, and its gradient by the draw."""

    log_prob: Tensor
    leaf: Tensor
    score: Tensor


@dataclass
class _Draw:
    """A draw of the guide with its graph, and the leaf that replaces it in guide and model."""

    value: Tensor
    leaf: Tensor
    density: _ScoredDensity | None = None

    @classmethod
    def of(cls, fn: Any, *args: Any, **kwargs: Any) -> "_Draw":
        if args or kwargs or not _is_flow(fn):
            value, density = fn(*args, **kwargs), None
        else:
            value, density = _draw_and_score(fn)
        return cls(value, value.detach().requires_grad_(), density)


def _is_flow(fn: Any) -> bool:
    return (
        isinstance(fn, TransformedDistribution)
        and bool(fn.transforms)
        and all(isinstance(transform, Bijection) for transform in fn.transforms)
        and len(fn.base_dist.event_shape) == fn.transforms[0].domain.event_dim
    )


def _draw_and_score(flow: TransformedDistribution) -> tuple[Tensor, _ScoredDensity]:
    """Draw from a flow; return the draw, and its log-density with the score, by one forward pass."""
    x = flow.base_dist.rsample()
    x = x if x.requires_grad else x.requires_grad_()
    log_prob = flow.base_dist.log_prob(x)
    score = vjp(log_prob, None, x, torch.ones_like(log_prob))
    for layer in flow.transforms:
        x, log_det, score = layer.forward_and_score(x, score)  # type: ignore[attr-defined]
        log_prob = log_prob - log_det
    return x, _ScoredDensity(log_prob, log_prob.detach().requires_grad_(), score)


class DrawsAsLeaves(Messenger):
    """Refuses a site of the guide without reparametrised draws and, on request, replaces the draws by leaves."""

    def __init__(self, leaves: bool):
        super().__init__()
        self.leaves = leaves
        self.draws: dict[str, _Draw] = {}

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if site_is_subsample(msg) or any(isinstance(inner, Delta) for inner in nested(fn)):
            return  # an index, or a function of earlier draws and parameters
        if not getattr(fn, "has_rsample", False):
            raise TypeError(f"expected a guide whose sites all have an rsample; got {msg['name']!r} of {type_name(fn)}")
        if self.leaves and not (msg["done"] or msg["is_observed"] or msg["value"] is not None):
            draw = self.draws[msg["name"]] = _Draw.of(fn, *msg["args"], **msg["kwargs"])
            msg["value"], msg["done"] = draw.leaf, True


def type_name(fn: Any) -> str:
    """Return the name of a distribution's class, or of that inside if it is expanded, masked or reinterpreted."""
    fn = next((inner for inner in nested(fn) if isinstance(inner, TransformedDistribution)), [*nested(fn)][-1])
    return type(fn).__name__


@dataclass
class Particles:
    """A run of guide and model, one row for each particle.

    Args:
        joint: the log-joint, minus the log-densities of the guide's Delta sites.
        log_weights: ``joint`` minus the log-densities of the draws.
        draws: of the guide, if they were replaced by leaves.
    """

    joint: Tensor
    log_weights: Tensor
    draws: list[_Draw]

    def surrogate(self, weights: Tensor, path_weights: Tensor) -> Tensor:
        """Return a number with the gradient of the weighted log-weights: by the path, or in total without leaves."""
        if not self.draws:
            return (weights * self.log_weights).sum()
        gradients = self._path_gradients(path_weights)
        terms = [
            (gradient * draw.value).sum()
            for gradient, draw in zip(gradients, self.draws, strict=True)
            if draw.value.requires_grad
        ]
        if _has_other_leaves(self.joint, [draw.leaf for draw in self.draws]):
            terms.append((weights * self.joint).sum())
        return sum(terms, self.joint.new_zeros(()))

    def _path_gradients(self, weights: Tensor) -> list[Tensor]:
        """Return the gradient of the weighted log-weights by every draw, also through the later draws it leads to."""
        leaves = [draw.leaf for draw in self.draws]
        densities = [draw.density for draw in self.draws if draw.density is not None]
        partials = _gradients((weights * self.log_weights).sum(), [*leaves, *(density.leaf for density in densities)])
        of_densities = iter(partials[len(leaves) :])

        totals, paths = [], []
        for draw, partial in zip(self.draws, partials, strict=False):
            paths.append((draw.value, partial))
            if draw.density is not None:
                of_density = next(of_densities)
                # A flow's log-density depends on earlier draws, through its context. The path through its own draw
                # cancels against the score on the way back, so that neither is included.
                paths.append((draw.density.log_prob, of_density))
                event_dim = partial.dim() - of_density.dim()
                partial = partial + of_density.reshape(of_density.shape + (1,) * event_dim) * draw.density.score
            totals.append(partial)

        while len(leaves) > 1 and (paths := [path for path in paths if path[0].requires_grad and path[1] is not None]):
            values, gradients = zip(*paths, strict=True)
            earlier = torch.autograd.grad(values, leaves, gradients, retain_graph=True, allow_unused=True)
            totals = [a if b is None else a + b for a, b in zip(totals, earlier, strict=True)]
            paths = [(draw.value, b) for draw, b in zip(self.draws, earlier, strict=True)]
        return totals


def _gradients(result: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    if not result.requires_grad:
        return tuple(map(torch.zeros_like, leaves))
    return torch.autograd.grad(result, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)


def _has_other_leaves(result: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Whether the result depends on another leaf, a parameter; otherwise a backward pass can be saved."""
    known, seen, stack = {id(leaf) for leaf in leaves}, set(), [result.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            return True
        stack.extend(input_node for input_node, _ in node.next_functions)
    return False
