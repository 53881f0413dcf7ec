"""Many Markov chains at once: annealed from a flow to a posterior, then Hamiltonian Monte Carlo in its latent space."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyroflows.diagnostics.arrays import NumPyArray
from pyroflows.diagnostics.chains import ensemble_ess, nested_rhat
from pyroflows.flow import Flow
from pyroflows.inference.coordinates import recentred_by_draws
from pyroflows.inference.evidence import error_of_evidence, evidence_of_draws, gaussian_of_draws
from pyroflows.inference.log_joint import LogJoint
from pyroflows.inference.moves import (
    FEW_LATENTS,
    LENGTH,
    MAX_STEPS,
    Density,
    Metric,
    Move,
    Points,
    Temperatures,
    accept,
    affine_flow,
    halton,
    hamiltonian,
    number_of_steps,
)
from pyroflows.inference.sites import MANY_LATENTS
from pyroflows.priors import StandardNormal

__all__ = ["Ensemble", "run_ensemble", "scale_of_prior"]

_NUM_DRAWS = 12_800  # of all chains; half as many if there are many latents
_ISLANDS = 4
_MAX_THIN = 8
_MIN_DRAWS, _ENOUGH = 50, 2000  # of each chain, and effective ones of all, with which chains that have converged end
_RHAT, _DRIFT, _ESS, _BFMI = 1.02, 0.05, 400, 0.2  # of an ensemble that has converged
_ARRIVED = 1.1, 0.1  # R-hat and drift of one whose draws are kept while it goes on

_CAREFUL = 50  # latents, up to which particles are moved thrice at each temperature; of many, chains do the rest
_PARTICLES = 16  # for each chain, if there are few latents
_WINDOWS = (15, 35, 65, 110, 170, 240, 330)  # ends of the windows whose draws give the metric


@dataclass(frozen=True)
class Ensemble:
    """Draws of many chains, which began at particles annealed to the posterior.

    Args:
        log_joint: the density, in the coordinates of the draws.
        u: the draws in unconstrained space, ``(chains, draws, latents)``, chains of an island next to each other.
        num_islands: groups of chains whose particles were resampled among themselves.
        log_evidence: in nats, see :func:`evidence_of_draws`; NaN if there was no time for it.
        log_evidence_error: its standard error.
        rhat, ess: the largest nested R-hat and the smallest effective number of draws over the latents.
        drift: the largest change of a mean or a standard deviation from the first half of the draws to the second, in
            standard deviations, by as much as it is beyond three standard errors.
        bfmi: the energy's mean squared change over its variance: low where chains hardly reach a neck or a tail.
        complete: whether there was time for all of it.
    """

    log_joint: LogJoint
    u: Tensor
    num_islands: int
    log_evidence: float
    log_evidence_error: float
    rhat: float
    ess: float
    drift: float
    bfmi: float
    complete: bool

    @property
    def has_converged(self) -> bool:
        """Whether islands and halves agree, and there are enough effective draws."""
        return not self._faults

    @property
    def has_arrived(self) -> bool:
        """Whether islands and halves agree so far that what is missing is length: what was drawn can be kept."""
        return self.rhat < _ARRIVED[0] and self.drift < _ARRIVED[1]

    @property
    def _faults(self) -> list[str]:
        if not self.complete:
            return ["there was no time for them to reach the posterior"]
        faults = []
        if not self.rhat < _RHAT:
            faults.append(f"groups of chains disagree (nested R-hat {self.rhat:.3f})")
        if not self.drift < _DRIFT:
            faults.append(f"moments drift by {self.drift:.2f} sd from the first half of the draws to the second")
        if not self.ess >= _ESS:
            faults.append(f"only {self.ess:.0f} draws are effective")
        if not (self.bfmi >= _BFMI or self.ess >= 10 * len(self.u)):
            faults.append(f"they hardly reach a neck or a tail (BFMI {self.bfmi:.2f})")
        return faults

    def verdict(self) -> tuple[str, str]:
        """Return "trust" or "do not trust", and the reason."""
        if self._faults:
            return "do not trust", f"of {len(self.u)} chains: {', '.join(self._faults)}"
        figures = f"nested R-hat {self.rhat:.3f}, ESS {self.ess:.0f} of {self.u.shape[0] * self.u.shape[1]} draws"
        return "trust", f"{len(self.u)} chains from {self.num_islands} groups of particles agree ({figures})"

    def evidence_error(self) -> tuple[float, str]:
        """Return the standard error of the log evidence, and what is wrong with it."""
        return error_of_evidence(self.log_evidence, self.log_evidence_error, has_converged=self.has_converged)

    def figures(self) -> dict[str, Any]:
        """Return all but density and draws."""
        names = [field.name for field in fields(self) if field.name not in ("log_joint", "u")]
        return {name: getattr(self, name) for name in names}


@torch.no_grad()
def scale_of_prior(log_joint: LogJoint, coordinates: Flow | None = None) -> Flow:
    """Return a flow that maps standard normal draws to the place and the width of the prior of each latent.

    Args:
        log_joint: the density of the model.
        coordinates: a flow in whose latent space the place and the width are, and which then is a part of the result.
    """
    draws = log_joint.prior_draws(512)
    if len(draws) < 2:  # a prior that cannot be drawn from
        draws = torch.stack([log_joint.initial - 1, log_joint.initial, log_joint.initial + 1])
    if coordinates is not None:
        draws = coordinates.encode(draws)
        draws = draws[draws.isfinite().all(-1)]
    median = draws.median(0).values
    width = (draws - median).abs().quantile(0.6827, dim=0).clamp(min=1e-3)
    return affine_flow(median, width, coordinates)


@torch.no_grad()
def run_ensemble(
    log_joint: LogJoint,
    flow: Flow,
    *,
    num_chains: int | None = None,
    num_draws: int | None = None,
    num_warmup: int = 50,
    recentre: bool = False,
    out_of_time: Callable[[str], bool] = lambda _: False,
) -> Ensemble:
    r"""Anneal particles from a flow to the posterior, and let each start a chain of Hamiltonian Monte Carlo.

    All particles move at once, in the latent space of the flow. The temperatures of

    .. math:: q(z)^{1 - \beta} \, p(z)^\beta

    are chosen such that most particles stay effective; they are resampled within islands, which shows the error. The
    chains adapt their step size, the length of their trajectories and, if there are enough draws for it, a dense
    metric. They end after half of their draws if 2,000 are effective. While islands or halves disagree, or too few
    draws are effective, they go on for as long again, three times at most.

    Args:
        log_joint: the density of the posterior.
        flow: whose latent space the chains run in, and whose prior, a standard normal, they are annealed from.
        num_chains, num_draws: by default more chains, of fewer draws, the fewer latents there are. A given number of
            draws is made.
        num_warmup: draws of each chain that adapt it.
        recentre: whether the chains run in coordinates of hierarchical sites that fit the annealed particles, see
            :func:`recentred_by_draws`; the density must be in non-centred ones, and the flow that of the prior's scale.
        out_of_time: asked before each move, and told what is being done.

    Raises:
        ValueError: the flow has another prior, or the chains make no groups of one size.

    References:
        Sequential Monte Carlo Samplers, Del Moral et al., 2006; An Adaptive-MCMC Scheme for Setting Trajectory Lengths
        in Hamiltonian Monte Carlo, Hoffman, Radul and Sountsov, 2021 (ChEES).
    """
    if not isinstance(flow.prior, StandardNormal):
        raise ValueError(f"expected a flow with a StandardNormal prior; got {type(flow.prior).__name__}")
    density = Density(log_joint, flow)
    num_chains = num_chains or _number_of_chains(log_joint.dim)
    if num_chains < 16 or num_chains % _ISLANDS:
        raise ValueError(f"expected a multiple of {_ISLANDS} chains, 16 or more; got num_chains={num_chains}")
    default = max(10, _NUM_DRAWS // (num_chains if log_joint.dim <= MANY_LATENTS else 2 * num_chains))
    least = num_draws or min(default, max(default // 2, _MIN_DRAWS))
    num_draws = num_draws or default
    num_particles = num_chains * (_PARTICLES if log_joint.dim <= FEW_LATENTS else 1)
    points, step_size, complete = _anneal(density, num_particles, out_of_time)
    points = points.at(torch.arange(0, len(points.z), len(points.z) // num_chains, device=points.z.device))
    if complete and recentre:
        density, points = _recentred(density, points)
    sampler = _Sampler(density, points, step_size)
    complete = complete and sampler.warm_up(num_warmup, out_of_time)
    thin, states = 1, list[Tensor]()
    while True:
        if complete:
            states += sampler.run(least - len(states), thin, out_of_time)
            complete = len(states) == least
        ensemble = _summarize(density, torch.stack(states or [sampler.points.z], 1), sampler.energies, complete)
        is_half = least < num_draws
        is_enough = ensemble.has_converged and (ensemble.ess >= _ENOUGH or not is_half)
        if not complete or is_enough or thin >= _MAX_THIN:
            break
        if is_half:
            least = num_draws
        else:  # what has not yet arrived is left out; else the chains go on, with every second state of theirs
            states = states[1::2] if ensemble.has_arrived else []
            thin *= 2
    return _with_evidence(density, ensemble, out_of_time) if ensemble.complete else ensemble


@torch.no_grad()
def _recentred(density: Density, points: Points) -> tuple[Density, Points]:
    """Return the density in coordinates that fit the particles, and the particles there."""
    informed, u = recentred_by_draws(density.log_joint, density.flow.decode(points.z))
    density = Density(informed, affine_flow(u.median(0).values, u.std(0).clamp(min=1e-6)))
    return density, density(density.flow.encode(u))


def _number_of_chains(dim: int) -> int:
    return int(min(max(2 ** round(math.log2(2**14 / dim)), 128), 4096))


def _summarize(density: Density, z: Tensor, energies: list[Tensor], complete: bool) -> Ensemble:
    chains = z.double().cpu().numpy()
    ess = ensemble_ess(chains)
    return Ensemble(
        density.log_joint,
        density.flow.decode(z.flatten(0, 1)).view_as(z),
        _ISLANDS,
        math.nan,
        math.inf,
        float(nested_rhat(chains, _ISLANDS).max()),
        float(ess.min()),
        _drift(chains),
        _bfmi(energies),
        complete,
    )


def _with_evidence(density: Density, ensemble: Ensemble, out_of_time: Callable[[str], bool]) -> Ensemble:
    """Return the ensemble with the evidence, which half of its chains give with the Gaussian of the others."""
    chains = ensemble.u.view(_ISLANDS, -1, *ensemble.u.shape[1:])
    base = gaussian_of_draws(chains[:, ::2].flatten(0, 2), density.flow)
    value, error = evidence_of_draws(density.log_joint, base, chains[:, 1::2].flatten(1, 2), out_of_time)
    return replace(ensemble, log_evidence=value, log_evidence_error=error)


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


def _anneal(density: Density, num_particles: int, out_of_time: Callable[[str], bool]) -> tuple[Points, float, bool]:
    """Return particles annealed to the posterior, the step size in the end, and whether there was time."""
    points = density(density.flow.prior.sample((num_particles,)))
    moves = 3 - (density.log_joint.dim > _CAREFUL) - (density.log_joint.dim > MANY_LATENTS)
    path = Temperatures(density, points, 0.0, _ISLANDS, moves=moves)
    complete = True
    while path.beta < 1 and complete:
        beta = path.next(1.0)
        complete = path.move_to(beta, partial(out_of_time, f"annealing {num_particles} particles, {beta:.0%}"))
    return path.points, path.step_size, complete


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

    def update(self, points: Points, move: Move, metric: Metric, time: float, bounds: tuple[float, float]) -> None:
        fine = move.acceptance > 1e-20
        if int(fine.sum()) <= len(fine) // 4:
            return
        weight = torch.where(fine, move.acceptance, 0.0)
        weight = weight / weight.sum()
        before = metric.whiten(points.z)
        after = metric.whiten(torch.where(fine[:, None], move.proposal.z, 0.0))
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

    def __init__(self, density: Density, points: Points, step_size: float):
        self.density, self.points = density, points
        self.step, self.length, self.index = _DualAveraging(min(step_size, 1.0), factor=1.5), _Length(LENGTH), 0
        self.metric = Metric.of(points.z)
        self.energies: list[Tensor] = []  # at each move of the last run

    def _propose(self, step_size: float) -> tuple[Move, float]:
        self.index += 1
        length = max(2 * halton(self.index) * math.exp(self.length.log), step_size)
        num_steps = number_of_steps(length, step_size)
        move = hamiltonian(self.density, self.points, 1.0, self.metric, step_size, num_steps)
        return move, num_steps * step_size

    def warm_up(self, number: int, out_of_time: Callable[[str], bool]) -> bool:
        """Adapt the chains; return whether there was time."""
        recent: list[Tensor] = []
        for index in range(number):
            if out_of_time(f"adapting {len(self.points.z)} chains, {index} of {number}"):
                return False
            size = math.exp(self.step.log_step)
            move, time = self._propose(size)
            self.step.update(1 / float((1 / move.acceptance.clamp(min=0.05)).mean()))  # chains that stick count most
            if index >= 5:
                self.length.update(self.points, move, self.metric, time, (size, MAX_STEPS * size / 2))
            self.points = accept(self.points, move)
            recent.append(self.points.z)
            if index + 1 in _WINDOWS and index + 1 <= 0.8 * number:
                self.metric = Metric.of(torch.cat(recent[len(recent) // 3 :]))
                self.step.restart()
                recent = []
        return True

    def run(self, num_draws: int, thin: int, out_of_time: Callable[[str], bool]) -> list[Tensor]:
        """Return every ``thin``-th state of the chains, fewer if time is out."""
        states: list[Tensor] = []
        self.energies = []
        for index in range(num_draws * thin):
            if out_of_time(f"moving {len(self.points.z)} chains, {index} of {num_draws * thin}"):
                break
            move, _ = self._propose(math.exp(self.step.log_mean))
            self.points = accept(self.points, move)
            self.energies.append(move.energy)
            if (index + 1) % thin == 0:
                states.append(self.points.z)
        return states
