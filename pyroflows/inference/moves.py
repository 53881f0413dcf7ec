"""Moves of many Markov chains at once: Hamiltonian proposals in the latent space of a flow, at any temperature."""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyroflows.diagnostics.weights import systematic_rows
from pyroflows.flow import Flow
from pyroflows.inference.log_joint import LogJoint
from pyroflows.layers import TriangularAffine
from pyroflows.priors import StandardNormal

__all__ = [
    "FEW_LATENTS",
    "LENGTH",
    "MAX_STEPS",
    "Density",
    "Metric",
    "Move",
    "Points",
    "Temperatures",
    "accept",
    "affine_flow",
    "halton",
    "hamiltonian",
    "number_of_steps",
    "scale_of_draws",
    "standard_normal",
]

_DRAWS_PER_LATENT = 5  # from which on they tell the correlations
FEW_LATENTS = 16  # up to which there are many more points, since modes need them
MAX_STEPS = 64  # of the leapfrog integrator in a move
_MAX_STEP_SIZE = 1.5
LENGTH = 1.5  # mean length of a trajectory, in standard deviations, if it is not adapted
_ESS_SHARE = 0.6  # of the points, at which the next temperature is chosen


class Points(NamedTuple):
    """Points in the latent space of the flow, with the posterior's log-density there and its gradient."""

    z: Tensor
    log_p: Tensor
    score: Tensor

    def at(self, rows: Tensor) -> "Points":
        return Points(self.z[rows], self.log_p[rows], self.score[rows])

    def replaced(self, accepted: Tensor, others: "Points") -> "Points":
        keep = accepted[:, None]
        log_p = torch.where(accepted, others.log_p, self.log_p)
        return Points(torch.where(keep, others.z, self.z), log_p, torch.where(keep, others.score, self.score))

    def tempered(self, beta: float) -> tuple[Tensor, Tensor]:
        """Return log-density and gradient between those of the standard normal (0) and of the posterior (1)."""
        if beta == 1:
            return self.log_p, self.score
        if beta == 0:
            return standard_normal(self.z), -self.z
        return beta * self.log_p + (1 - beta) * standard_normal(self.z), beta * self.score - (1 - beta) * self.z


def standard_normal(z: Tensor) -> Tensor:
    """Return the log-density of standard normal draws, ``(points,)``."""
    return -0.5 * z.square().sum(-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)


class Density:
    """The log joint density in the latent space of a flow."""

    def __init__(self, log_joint: LogJoint, flow: Flow):
        self.log_joint, self.flow = log_joint, flow

    def __call__(self, z: Tensor) -> Points:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            u, log_det = self.flow.bijection.forward_and_log_det(z)
            log_p, score = self.log_joint.value_and_score(u.detach())
            (gradient,) = torch.autograd.grad((score * u).sum() + log_det.sum(), z)
        log_p = log_p + log_det.detach()
        fine = log_p.isfinite() & gradient.isfinite().all(-1)
        return Points(z.detach(), torch.where(fine, log_p, -torch.inf), torch.where(fine[:, None], gradient, 0.0))


def affine_flow(loc: Tensor, scale: Tensor, coordinates: Flow | None = None) -> Flow:
    """Return a flow that maps standard normal draws to a Gaussian.

    Args:
        loc: its mean, ``(dim,)``.
        scale: deviations ``(dim,)``, or the Cholesky factor of the covariance ``(dim, dim)``.
        coordinates: a flow in whose latent space the Gaussian is, and a copy of which then is a part of the result.
    """
    layer = TriangularAffine(len(loc), diagonal=scale.dim() == 1)
    others = [] if coordinates is None else copy.deepcopy(coordinates).layers
    flow = Flow(StandardNormal(len(loc)), [layer, *others]).to(loc.device, loc.dtype)
    layer.start_at(loc, scale)
    return flow.requires_grad_(False).eval()


def scale_of_draws(z: Tensor, smallest: float = 1e-8) -> Tensor:
    """Return the Cholesky factor of the covariance of draws, or deviations alone if they are too few to tell it."""
    scale = z.std(0).clamp(min=smallest)
    number, dim = z.shape
    if number < _DRAWS_PER_LATENT * dim:
        return scale
    x = (z - z.mean(0)) / scale
    shrink = dim / (dim + number)
    correlation = (1 - shrink) * (x.mT @ x) / number
    correlation.diagonal().add_(shrink)
    factor, info = torch.linalg.cholesky_ex(correlation)
    return scale if info else scale[:, None] * factor


class Move(NamedTuple):
    """A Hamiltonian proposal for each chain."""

    proposal: Points
    momentum: Tensor
    acceptance: Tensor  # probability
    energy: Tensor  # at the start, negative


class Metric:
    """The scale of the momentum: the factor of a covariance, or deviations alone, ``(dim,)``."""

    def __init__(self, factor: Tensor):
        self.factor, self.is_diagonal = factor, factor.dim() == 1

    @staticmethod
    def of(z: Tensor) -> "Metric":
        """Return the metric of draws."""
        return Metric(scale_of_draws(z, smallest=1e-4))

    def stretch(self, x: Tensor) -> Tensor:
        """Map standard normal numbers to the metric's covariance."""
        return x * self.factor if self.is_diagonal else x @ self.factor.mT

    def pull(self, score: Tensor) -> Tensor:
        """Return the gradient by numbers that are stretched."""
        return score * self.factor if self.is_diagonal else score @ self.factor

    def whiten(self, z: Tensor) -> Tensor:
        """Undo :meth:`stretch`."""
        if self.is_diagonal:
            return z / self.factor
        return torch.linalg.solve_triangular(self.factor.mT, z, upper=True, left=False)


def hamiltonian(
    density: Density, points: Points, beta: float, metric: Metric, step_size: float, num_steps: int
) -> Move:
    """Integrate Hamilton's equations by leapfrog steps."""
    start = torch.randn_like(points.z)
    before = points.tempered(beta)[0] - 0.5 * start.square().sum(-1)
    momentum, moved = start, points
    force = metric.pull(moved.tempered(beta)[1])
    for _ in range(num_steps):
        momentum = momentum + 0.5 * step_size * force
        moved = density(moved.z + step_size * metric.stretch(momentum))
        force = metric.pull(moved.tempered(beta)[1])
        momentum = momentum + 0.5 * step_size * force
    after = moved.tempered(beta)[0] - 0.5 * momentum.square().sum(-1)
    return Move(moved, momentum, (after - before).nan_to_num(-torch.inf).exp().clamp(max=1.0), before)


def accept(points: Points, move: Move) -> Points:
    """Return the proposals that are accepted, and the points where they are not."""
    return points.replaced(torch.rand_like(move.acceptance) < move.acceptance, move.proposal)


def halton(index: int) -> float:
    """Return a number of Halton's sequence in base 2."""
    share, number = 1.0, 0.0
    while index:
        share /= 2
        number += share * (index % 2)
        index //= 2
    return number


def number_of_steps(length: float, step_size: float) -> int:
    """Return the number of leapfrog steps for a trajectory of a length."""
    return max(1, min(MAX_STEPS, math.ceil(length / step_size)))


class Temperatures:
    r"""Moves points, in islands, between the temperatures of :math:`q(z)^{1 - \beta} \, p(z)^\beta`.

    Each next temperature leaves most points effective; they are resampled within their islands, and moved ``moves``
    times.

    The moves have the metric of the points themselves, which changes what they leave invariant a little: by nats of
    the evidence if 128 points have 2,000 latents. ``unit_metric`` takes the same for all, where the flow is as wide as
    the posterior.
    """

    def __init__(
        self,
        density: Density,
        points: Points,
        beta: float,
        islands: int,
        *,
        step_size: float = 0.3,
        moves: int = 3,
        unit_metric: bool = False,
    ):
        self.density, self.points, self.beta, self.islands = density, points, beta, islands
        self.metric = Metric(torch.ones_like(points.z[0])) if unit_metric else None
        self.step_size, self.moves, self.index = step_size, moves, 0

    def next(self, end: float) -> float:
        """Return the temperature that is nearest to ``end`` with enough effective points."""

        def is_fine(new: float) -> bool:
            log_w = (new - self.beta) * log_ratio
            ess = 2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)
            return float(ess) >= math.log(_ESS_SHARE * len(log_w))

        log_ratio = self._log_ratio().double()
        near, far = self.beta, end
        if is_fine(far):
            return far
        for _ in range(40):
            middle = (near + far) / 2
            near, far = (middle, far) if is_fine(middle) else (near, middle)
        return near if near != self.beta else far

    def move_to(self, beta: float, is_over: Callable[[], bool], most: int | None = None) -> bool:
        """Resample the points, ``most`` of them if there are more, and move them; return whether there was time."""
        log_w = ((beta - self.beta) * self._log_ratio()).view(self.islands, -1)
        rows = _resampled(log_w, min(log_w.shape[1], most // self.islands) if most else log_w.shape[1])
        self.points, self.beta = self.points.at(rows), beta
        metric = self.metric or Metric.of(self.points.z)
        for _ in range(self.moves):
            if is_over():
                return False
            self.index += 1
            length = max(2 * halton(self.index) * LENGTH, self.step_size)
            steps = number_of_steps(length, self.step_size)
            move = hamiltonian(self.density, self.points, beta, metric, self.step_size, steps)
            self.points = accept(self.points, move)
            self.step_size = min(_MAX_STEP_SIZE, self.step_size * math.exp(float(move.acceptance.mean()) - 0.8))
        return True

    def _log_ratio(self) -> Tensor:
        return (self.points.log_p - standard_normal(self.points.z)).clamp(min=-1e30)


def _resampled(log_w: Tensor, number: int) -> Tensor:
    """Return rows drawn by weights, systematically within each island, ``(islands * number,)``."""
    islands, size = log_w.shape
    rows = systematic_rows(log_w.double().softmax(-1), number)
    return (rows + size * torch.arange(islands, device=rows.device)[:, None]).flatten()
