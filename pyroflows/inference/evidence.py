"""The evidence of a model by draws of its posterior, from whatever sampler."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pyroflows.diagnostics.chains import bridge_evidence
from pyroflows.flow import Flow
from pyroflows.inference.log_joint import LogJoint
from pyroflows.inference.moves import FEW_LATENTS, Density, Points, Temperatures, affine_flow, scale_of_draws

__all__ = ["error_of_evidence", "evidence_of_draws", "gaussian_of_draws"]

_MOVED = 128, 256, 4096  # points: at least, at most, and at most if there are few latents
_CHUNK = 1024  # points evaluated at once


@torch.no_grad()
def gaussian_of_draws(u: Tensor, coordinates: Flow | None = None) -> Flow:
    """Return a flow that maps standard normal draws to the Gaussian of draws, ``(draws, latents)``.

    Args:
        u: the draws.
        coordinates: a flow in whose latent space the Gaussian is, and which then is a part of the result.
    """
    z = u if coordinates is None else coordinates.encode(u)
    return affine_flow(z.mean(0), scale_of_draws(z), coordinates)


@torch.no_grad()
def evidence_of_draws(
    log_joint: LogJoint, base: Flow, u: Tensor, out_of_time: Callable[[str], bool] = lambda _: False
) -> tuple[float, float]:
    """Return the log evidence, in nats, and its standard error, by draws of the posterior and a flow near it.

    The draws are moved to the flow over as many temperatures as are needed for most of them to stay effective, and the
    constants of neighbouring temperatures are compared by bridge sampling. The error is that between islands of draws,
    or that of the bridges, whichever is larger.

    Args:
        log_joint: the density of the posterior.
        base: the flow, with a standard normal prior, fitted to other draws than those passed here.
        u: the draws in unconstrained space, in islands that are independent of each other, ``(islands, draws, dim)``.
        out_of_time: asked before each move, and told what is being done.
    """
    islands = len(u)
    density = Density(log_joint, base)
    parts = [density(base.encode(part)) for part in u.flatten(0, 1).split(_CHUNK)]
    points = Points(*map(torch.cat, zip(*parts, strict=True)))
    path = Temperatures(density, points, 1.0, islands, step_size=0.5, unit_metric=True)
    number = min(max(2**17 // log_joint.dim, _MOVED[0]), _MOVED[1] if log_joint.dim > FEW_LATENTS else _MOVED[2])
    total, variance, totals = 0.0, 0.0, torch.zeros(islands, dtype=torch.float64, device="cpu")
    while path.beta > 0:
        points, betas = path.points, (path.beta, path.next(0.0))
        label = f"finding the evidence, {1 - betas[1]:.0%}"
        if betas[1] and not path.move_to(betas[1], partial(out_of_time, label), number):
            return math.nan, math.inf
        others = path.points if betas[1] else density(base.prior.sample((len(points.z),)))
        path.beta = betas[1]
        values = [part.tempered(beta)[0].double().view(islands, -1) for part in (points, others) for beta in betas]
        value, error = bridge_evidence(*(part.flatten() for part in values))
        total, variance = total + value, variance + error**2
        totals += torch.tensor([bridge_evidence(*parts)[0] for parts in zip(*values, strict=True)]).to(totals)
    return total, max(math.sqrt(variance), float(totals.std()) / islands**0.5)


def error_of_evidence(value: float, error: float, *, has_converged: bool) -> tuple[float, str]:
    """Return the standard error of the log evidence by chains, infinite if unknown, and what is wrong with it."""
    if math.isnan(value):
        return math.inf, "unknown, since there was no time to find it, or there were too few draws"
    if has_converged:
        return error, ""
    return math.inf, "not to be trusted, and without a standard error, since the chains have not converged"
