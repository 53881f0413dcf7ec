"""Many Markov chains at once: annealed from a flow to a posterior, then Hamiltonian Monte Carlo in its latent space."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyroflows.diagnostics.arrays import NumPyArray
from pyroflows.diagnostics.chains import bridge_evidence, ensemble_ess, nested_rhat
from pyroflows.diagnostics.weights import systematic_rows
from pyroflows.flow import Flow
from pyroflows.inference.log_joint import LogJoint
from pyroflows.layers import TriangularAffine
from pyroflows.priors import StandardNormal

__all__ = ["Ensemble", "run_ensemble", "scale_of_prior"]

_NUM_DRAWS = 12_800  # of all chains
_ISLANDS = 4
_CHUNK = 1024  # points evaluated at once
_MAX_THIN = 8
_RHAT, _DRIFT, _ESS, _BFMI = 1.02, 0.05, 400, 0.2  # of an ensemble that has converged
_MAX_STEP_SIZE = 1.5

_ESS_SHARE = 0.6  # of the particles, at which the next temperature is chosen
_MOVES = 3  # at each temperature
_MAX_STEPS = 64  # of the leapfrog integrator in a move
_LENGTH = 1.5  # mean length of a trajectory, in standard deviations, before it is adapted
_WINDOWS = (15, 35, 65, 110, 170, 240, 330)  # ends of the windows whose draws give the metric


class _Points(NamedTuple):
    """Points in the latent space of the flow, with the posterior's log-density there and its gradient."""

    z: Tensor
    log_p: Tensor
    score: Tensor

    def at(self, rows: Tensor) -> "_Points":
        return _Points(self.z[rows], self.log_p[rows], self.score[rows])

    def replaced(self, accepted: Tensor, others: "_Points") -> "_Points":
        keep = accepted[:, None]
        log_p = torch.where(accepted, others.log_p, self.log_p)
        return _Points(torch.where(keep, others.z, self.z), log_p, torch.where(keep, others.score, self.score))

    def tempered(self, beta: float) -> tuple[Tensor, Tensor]:
        """Return log-density and gradient between those of the standard normal (0) and of the posterior (1)."""
        if beta == 1:
            return self.log_p, self.score
        return beta * self.log_p + (1 - beta) * _standard_normal(self.z), beta * self.score - (1 - beta) * self.z


def _standard_normal(z: Tensor) -> Tensor:
    return -0.5 * z.square().sum(-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)


class _Density:
    """The log joint density in the latent space of a flow."""

    def __init__(self, log_joint: LogJoint, flow: Flow):
        self.log_joint, self.flow = log_joint, flow

    def value(self, z: Tensor) -> Tensor:
        u, log_det = self.flow.bijection.forward_and_log_det(z)
        return self.log_joint.value(u) + log_det

    def __call__(self, z: Tensor) -> _Points:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            u, log_det = self.flow.bijection.forward_and_log_det(z)
            log_p, score = self.log_joint.value_and_score(u.detach())
            (gradient,) = torch.autograd.grad((score * u).sum() + log_det.sum(), z)
        log_p = log_p + log_det.detach()
        fine = log_p.isfinite() & gradient.isfinite().all(-1)
        return _Points(z.detach(), torch.where(fine, log_p, -torch.inf), torch.where(fine[:, None], gradient, 0.0))


class _Move(NamedTuple):
    """A Hamiltonian proposal for each chain."""

    proposal: _Points
    momentum: Tensor
    acceptance: Tensor  # probability
    energy: Tensor  # at the start, negative


def _hamiltonian(
    density: _Density, points: _Points, beta: float, scale: Tensor, step_size: float, num_steps: int
) -> _Move:
    """Integrate Hamilton's equations by leapfrog steps, with a momentum in units of ``scale``."""
    start = torch.randn_like(points.z)
    before = points.tempered(beta)[0] - 0.5 * start.square().sum(-1)
    momentum, moved = start, points
    force = moved.tempered(beta)[1] * scale
    for _ in range(num_steps):
        momentum = momentum + 0.5 * step_size * force
        moved = density(moved.z + step_size * scale * momentum)
        force = moved.tempered(beta)[1] * scale
        momentum = momentum + 0.5 * step_size * force
    after = moved.tempered(beta)[0] - 0.5 * momentum.square().sum(-1)
    return _Move(moved, momentum, (after - before).nan_to_num(-torch.inf).exp().clamp(max=1.0), before)


def _accept(points: _Points, move: _Move) -> _Points:
    return points.replaced(torch.rand_like(move.acceptance) < move.acceptance, move.proposal)


def _halton(index: int) -> float:
    """Return a number of Halton's sequence in base 2."""
    share, number = 1.0, 0.0
    while index:
        share /= 2
        number += share * (index % 2)
        index //= 2
    return number


@dataclass(frozen=True)
class Ensemble:
    """Draws of many chains, which began at particles annealed to the posterior.

    Args:
        u: the draws in unconstrained space, ``(chains, draws, latents)``, chains of an island next to each other.
        num_islands: groups of chains whose particles were resampled among themselves.
        log_evidence: in nats, by bridge sampling from a Gaussian in the latent space; NaN if the chains did not run.
        log_evidence_error: its standard error.
        nested_rhat, ess: the largest and the smallest over the latents.
        drift: the largest change of a mean or a standard deviation from the first half of the draws to the second, in
            standard deviations, by as much as it is beyond three standard errors.
        bfmi: the energy's mean squared change over its variance: low where chains hardly reach a neck or a tail.
        complete: whether there was time for all of it.
    """

    u: Tensor
    num_islands: int
    log_evidence: float
    log_evidence_error: float
    nested_rhat: float
    ess: float
    drift: float
    bfmi: float
    complete: bool

    @property
    def has_converged(self) -> bool:
        """Whether islands and halves agree, and there are enough effective draws."""
        moves = self.bfmi >= _BFMI or self.ess >= 10 * len(self.u)
        return self.complete and moves and self.nested_rhat < _RHAT and self.drift < _DRIFT and self.ess >= _ESS


def scale_of_prior(log_joint: LogJoint) -> Flow:
    """Return a flow that maps standard normal draws to the place and the width of the prior of each latent."""
    draws = log_joint.prior_draws(512)
    median = draws.median(0).values
    width = (draws - median).abs().quantile(0.6827, dim=0).clamp(min=1e-3)
    layer = TriangularAffine(log_joint.dim, diagonal=True)
    flow = Flow(StandardNormal(log_joint.dim), [layer]).to(log_joint.device, log_joint.dtype)
    layer.start_at(median, width.diag())
    return flow.requires_grad_(False)


@torch.no_grad()
def run_ensemble(
    log_joint: LogJoint,
    flow: Flow,
    *,
    num_chains: int | None = None,
    num_draws: int | None = None,
    num_warmup: int = 50,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Ensemble:
    r"""Anneal particles from a flow to the posterior, and let each start a chain of Hamiltonian Monte Carlo.

    All particles move at once, in the latent space of the flow. The temperatures of

    .. math:: q(z)^{1 - \beta} \, p(z)^\beta

    are chosen such that most particles stay effective; they are resampled within islands, which shows the error. The
    chains adapt their step size and the length of their trajectories; while islands or halves disagree, they go on for
    as long again, four times at most.

    Args:
        log_joint: the density of the posterior.
        flow: whose latent space the chains run in, and whose prior, a standard normal, they are annealed from.
        num_chains, num_draws: by default more chains, of fewer draws, the fewer latents there are.
        num_warmup: draws of each chain that adapt it.
        out_of_time: asked before each move.

    Raises:
        ValueError: the flow has another prior.

    References:
        Sequential Monte Carlo Samplers, Del Moral et al., 2006; An Adaptive-MCMC Scheme for Setting Trajectory Lengths
        in Hamiltonian Monte Carlo, Hoffman, Radul and Sountsov, 2021 (ChEES).
    """
    if not isinstance(flow.prior, StandardNormal):
        raise ValueError(f"expected a flow with a StandardNormal prior; got {type(flow.prior).__name__}")
    density = _Density(log_joint, flow)
    num_chains = num_chains or _number_of_chains(log_joint.dim)
    num_draws = num_draws or max(10, _NUM_DRAWS // num_chains)
    points, step_size, complete = _anneal(density, num_chains, out_of_time)
    sampler = _Sampler(density, points, step_size)
    complete = complete and sampler.warm_up(num_warmup, out_of_time)
    thin, ensemble = 1, None
    while complete or ensemble is None:
        states = sampler.run(num_draws, thin, out_of_time) if complete else []
        complete = len(states) == num_draws
        ensemble = _summarize(density, states or [sampler.points], sampler.energies, complete)
        if ensemble.has_converged or thin >= _MAX_THIN:
            break
        thin *= 2
    return ensemble


def _number_of_chains(dim: int) -> int:
    return int(min(max(2 ** round(math.log2(2**14 / dim)), 128), 4096))


def _summarize(density: "_Density", states: list[_Points], energies: list[Tensor], complete: bool) -> Ensemble:
    z = torch.stack([state.z for state in states], 1)
    chains = z.double().cpu().numpy()
    ess = ensemble_ess(chains)
    evidence = math.nan, math.inf
    if complete:
        evidence = _bridge(density, z, torch.stack([state.log_p for state in states], 1), ess)
    u = density.flow.decode(z.flatten(0, 1)).view_as(z)
    return Ensemble(
        u,
        _ISLANDS,
        *evidence,
        float(nested_rhat(chains, _ISLANDS).max()),
        float(ess.min()),
        _drift(chains),
        _bfmi(energies),
        complete,
    )


def _drift(chains: NumPyArray) -> float:
    """Return the largest change of a mean or a standard deviation from the first half of the draws to the second.

    In standard deviations, by as much as it is larger than three of its standard errors over the chains.
    """
    half = chains.shape[1] // 2
    if not half:
        return math.inf
    centred = (chains - chains.mean((0, 1))) / chains.std((0, 1))
    changes = []
    for values in (centred, centred**2 / 2):  # to first order, half the change of a variance is that of the deviation
        change = values[:, half:].mean(1) - values[:, :half].mean(1)
        error = change.std(0, ddof=1) / len(change) ** 0.5
        changes.append(float((abs(change.mean(0)) - 3 * error).max()))
    return max(*changes, 0.0)


def _bfmi(energies: list[Tensor]) -> float:
    """Return the Bayesian fraction of missing information, of energies at successive moves (Betancourt, 2016)."""
    if len(energies) < 2:
        return math.nan
    energy = torch.stack(energies)
    return float(energy.diff(dim=0).square().mean() / energy.var())


def _bridge(density: "_Density", z: Tensor, log_p: Tensor, ess: NumPyArray) -> tuple[float, float]:
    """Estimate the evidence twice: from the Gaussian of either half of the chains, and the draws of the other half."""
    estimates = []
    for fitted, used in ((0, 1), (1, 0)):
        gaussian = _gaussian_of(z[fitted::2].flatten(0, 1))
        x, u = z[used::2].flatten(0, 1), gaussian.sample((len(z) * z.shape[1] // 2,))
        at_u = torch.cat([density.value(part) for part in u.split(_CHUNK)])
        log_q, log_q_of_q = gaussian.log_prob(x), gaussian.log_prob(u)
        effective = min(max(float(ess.min()) / 2, 1.0), float(len(x)))
        estimates.append(bridge_evidence(log_p[used::2].flatten(), log_q, at_u, log_q_of_q, ess=effective))
    (first, first_error), (second, second_error) = estimates
    return (first + second) / 2, max(math.hypot(first_error, second_error) / 2, abs(first - second) / 2)


def _gaussian_of(z: Tensor) -> MultivariateNormal:
    """Return the Gaussian of draws; without correlations if these are too few to tell."""
    mean, centred = z.mean(0), z - z.mean(0)
    if len(z) < 4 * z.shape[1]:
        factor = centred.std(0).diag()
    else:
        factor, info = torch.linalg.cholesky_ex(centred.mT @ centred / (len(z) - 1))
        factor = centred.std(0).diag() if info else factor
    return MultivariateNormal(mean, scale_tril=factor, validate_args=False)


def _anneal(density: _Density, num_particles: int, out_of_time: Callable[[], bool]) -> tuple[_Points, float, bool]:
    """Return particles annealed to the posterior, the step size in the end, and whether there was time."""
    points = density(density.flow.prior.sample((num_particles,)))
    beta, step_size, index = 0.0, 0.3, 0
    while beta < 1:
        log_ratio = (points.log_p - _standard_normal(points.z)).clamp(min=-1e30)
        new = _next_temperature(log_ratio, beta)
        points, beta = points.at(_resampled(((new - beta) * log_ratio).view(_ISLANDS, -1))), new
        scale = points.z.std(0).clamp(min=1e-4)
        for _ in range(_MOVES):
            if out_of_time():
                return points, step_size, False
            index += 1
            length = max(2 * _halton(index) * _LENGTH, step_size)
            move = _hamiltonian(density, points, beta, scale, step_size, _number_of_steps(length, step_size))
            points = _accept(points, move)
            step_size = min(_MAX_STEP_SIZE, step_size * math.exp(float(move.acceptance.mean()) - 0.8))
    return points, step_size, True


def _number_of_steps(length: float, step_size: float) -> int:
    return max(1, min(_MAX_STEPS, math.ceil(length / step_size)))


def _next_temperature(log_ratio: Tensor, beta: float) -> float:
    """Return the largest inverse temperature at which enough particles remain effective, by bisection."""

    def is_fine(new: float) -> bool:
        log_w = (new - beta) * log_ratio.double()
        ess = 2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)
        return float(ess) >= math.log(_ESS_SHARE * len(log_w))

    low, high = beta, 1.0
    if is_fine(high):
        return high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if is_fine(middle) else (low, middle)
    return max(low, beta + 1e-12)


def _resampled(log_w: Tensor) -> Tensor:
    """Return rows drawn by weights, systematically within each island, ``(islands * particles,)``."""
    islands, size = log_w.shape
    rows = systematic_rows(log_w.double().softmax(-1), size)
    return (rows + size * torch.arange(islands, device=rows.device)[:, None]).flatten()


class _DualAveraging:
    """Adapts a step size to a target acceptance probability (Hoffman and Gelman, 2014)."""

    def __init__(self, step_size: float, target: float = 0.75, factor: float = 3.0):
        self.target = target
        self.log_step = self.log_mean = math.log(step_size)
        self.restart(factor)

    def restart(self, factor: float = 3.0) -> None:
        self.centre = math.log(factor) + self.log_mean
        self.log_step, self.error, self.count = self.log_mean, 0.0, 0

    def update(self, acceptance: float) -> None:
        self.count += 1
        share = 1 / (self.count + 10)
        self.error = (1 - share) * self.error + share * (self.target - acceptance)
        self.log_step = min(self.centre - math.sqrt(self.count) / 0.05 * self.error, math.log(2.0))
        share = self.count**-0.75
        self.log_mean = share * self.log_step + (1 - share) * self.log_mean


class _Length:
    """Adapts the mean length of trajectories by the ChEES criterion (Hoffman, Radul and Sountsov, 2021)."""

    def __init__(self, length: float):
        self.log, self.second_moment, self.count = math.log(length), 0.0, 0

    def update(self, points: _Points, move: _Move, scale: Tensor, time: float, bounds: tuple[float, float]) -> None:
        fine = move.acceptance > 1e-20
        if int(fine.sum()) <= len(fine) // 4:
            return
        weight = torch.where(fine, move.acceptance, 0.0)
        weight = weight / weight.sum()
        before, after = points.z / scale, torch.where(fine[:, None], move.proposal.z / scale, 0.0)
        before = before - before.mean(0)
        after = after - (weight[:, None] * after).sum(0)
        momentum = torch.where(fine[:, None], move.momentum, 0.0)
        change = after.square().sum(-1) - before.square().sum(-1)
        gradient = float((weight * change * (after * momentum).sum(-1)).sum()) * time
        if math.isfinite(gradient):
            self.count += 1
            self.second_moment = 0.95 * self.second_moment + 0.05 * gradient**2
            self.log += 0.05 * gradient / math.sqrt(self.second_moment / (1 - 0.95**self.count) + 1e-20)
            self.log = min(max(self.log, math.log(bounds[0])), math.log(bounds[1]))


class _Sampler:
    """Chains of Hamiltonian Monte Carlo that share a step size, a mean length of trajectories, and a metric."""

    def __init__(self, density: _Density, points: _Points, step_size: float):
        self.density, self.points = density, points
        self.step, self.length, self.index = _DualAveraging(min(step_size, 1.0), factor=1.5), _Length(_LENGTH), 0
        self.scale = points.z.std(0).clamp(min=1e-4)
        self.energies: list[Tensor] = []  # of the last run

    def _propose(self, step_size: float) -> tuple[_Move, float]:
        self.index += 1
        length = max(2 * _halton(self.index) * math.exp(self.length.log), step_size)
        num_steps = _number_of_steps(length, step_size)
        move = _hamiltonian(self.density, self.points, 1.0, self.scale, step_size, num_steps)
        return move, num_steps * step_size

    def warm_up(self, number: int, out_of_time: Callable[[], bool]) -> bool:
        """Adapt the chains; return whether there was time."""
        recent: list[Tensor] = []
        for index in range(number):
            if out_of_time():
                return False
            size = math.exp(self.step.log_step)
            move, time = self._propose(size)
            self.step.update(1 / float((1 / move.acceptance.clamp(min=0.05)).mean()))  # chains that stick count most
            if index >= 5:
                self.length.update(self.points, move, self.scale, time, (size, _MAX_STEPS * size / 2))
            self.points = _accept(self.points, move)
            recent.append(self.points.z)
            if index + 1 in _WINDOWS and index + 1 <= 0.8 * number:
                self.scale = torch.cat(recent[len(recent) // 3 :]).std(0).clamp(min=1e-4)
                self.step.restart()
                recent = []
        return True

    def run(self, num_draws: int, thin: int, out_of_time: Callable[[], bool]) -> list[_Points]:
        """Return every ``thin``-th state of the chains, fewer if time is out."""
        states: list[_Points] = []
        self.energies = []
        for index in range(num_draws * thin):
            if out_of_time():
                break
            move, _ = self._propose(math.exp(self.step.log_mean))
            self.points = _accept(self.points, move)
            self.energies.append(move.energy)
            if (index + 1) % thin == 0:
                states.append(self.points)
        return states
