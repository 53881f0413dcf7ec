"""What draws tell of a posterior: importance weights of a guide's, statistics of chains, a verdict."""

import math
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyroflows.diagnostics.weights import importance_ess, psis, systematic_rows
from pyroflows.flow import Flow
from pyroflows.inference.evidence import error_of_evidence
from pyroflows.inference.guide import AutoFlow
from pyroflows.inference.init import climb, draws_and_densities, find_init
from pyroflows.inference.log_joint import LogJoint
from pyroflows.inference.sites import MANY_LATENTS
from pyroflows.priors import StandardNormal

__all__ = [
    "Chains",
    "Weights",
    "importance_sample",
    "missed_modes",
    "notes_on",
    "summarize_weights",
]

_CHUNK = 2000  # points evaluated at once
_NUM_SETS = 5  # of draws, each with its k-hat
_SHARE = 0.05  # smallest share of the posterior at a missed mode to report
_SKEW = 5.0  # nats by which the ELBO of the Gaussian at such a mode may fall short, if the posterior is not Gaussian
_DISTANCE = 5.0  # smallest distance of such a mode from the guide's centre, in its latent space
_COLUMNS = 500  # of draws, compared at once
_NUMBERS = 5_000_000  # of deterministic sites, held at once
_EVEN = 0.8  # share of effective draws from which on the weights are even, whatever k-hat
_DIP = 0.5  # nats by which the density falls between two modes
_TAIL_DRAWS, _TAIL_WIDTH = 4000, 3.0  # to look for a tail with, and how much wider a coordinate of theirs is
_TAIL_SHARE = 0.02  # smallest share of the posterior in a tail to report
_UNCOVERED = 20.0  # ratio of the posterior's density to the guide's above which a point counts as not covered


@dataclass(frozen=True)
class Weights:
    """Importance weights of a guide's draws, and what they show.

    Args:
        u: the draws, in unconstrained space, ``(draws, latents)``.
        log_weights: log joint density minus the guide's log-density, ``(draws,)``; -inf where the former is not finite.
        elbo, elbo_error: the mean of the finite ones, in nats, and its standard error.
        log_evidence, log_evidence_error: the logarithm of the mean weight, and its standard error to first order.
        khat: Pareto shapes of the weights, one for each of several sets of the draws.
        ess: Kish's effective number of draws.
        infinite: the share of draws whose log joint density is not finite.
        mean_error: the largest error of a mean of the sites, deterministic ones included, in standard deviations, by
            comparison with the reweighted draws; NaN if values of sites are beyond the range of their dtype.
        sd_error: the largest relative error of a standard deviation, likewise; in constrained space only what exceeds
            its own error, since a deviation may be infinite there.
        tail: the share of the posterior in a tail that the guide does not reach, if there is one.
    """

    u: Tensor
    log_weights: Tensor
    elbo: float
    elbo_error: float
    log_evidence: float
    log_evidence_error: float
    khat: tuple[float, ...]
    ess: float
    infinite: float
    mean_error: float
    sd_error: float
    tail: float = 0.0

    @property
    def ess_ratio(self) -> float:
        """The effective number of draws as a share of the draws."""
        return self.ess / len(self.u)

    def resample(self, n: int) -> Tensor:
        """Resample draws by their smoothed weights (PSIS)."""
        rows = systematic_rows(psis(self.log_weights)[0].exp().cpu(), n)
        return self.u[rows[torch.randperm(n, device="cpu")].to(self.u.device)]

    @property
    def median_khat(self) -> float:
        """The median of the Pareto shapes."""
        return sorted(self.khat)[len(self.khat) // 2]

    @property
    def is_uneven(self) -> bool:
        """Whether a few draws have most of the weight, so that the weights correct nothing."""
        return self.ess_ratio < _EVEN and (self.median_khat >= 0.7 or self.ess_ratio <= 0.1)

    @property
    def _figures(self) -> str:
        """The figures that decide whether the weights are uneven, as text."""
        # A k-hat is noisy: if nearly all draws are effective, the weights have no tail to speak of, whatever it says.
        ess_decides = self.ess_ratio >= _EVEN or (self.ess_ratio <= 0.1 and self.median_khat < 0.7)
        ess = f"ESS {self.ess:.0f} of {len(self.u)}"
        return f"({ess})" if ess_decides else f"(median k-hat {self.median_khat:.2f}, {ess})"

    def verdict(self, missed: Sequence[Tensor]) -> tuple[str, str]:
        """Return the verdict on the guide, given the modes that it misses, and the reason."""
        if missed:
            modes = "1 other mode" if len(missed) == 1 else f"{len(missed)} other modes"
            advice = "refine() runs Markov chains, from there too"
            return "do not trust", f"{modes} with a share of the posterior not covered by the guide: {advice}"
        if self.tail:
            reason = f"about {self.tail:.0%} of the posterior is in a tail that the guide does not reach"
            return "do not trust", f"{reason}: train for longer, or run refine()"
        if self.infinite > 0.01:
            reason = f"{self.infinite:.1%} of the draws have no finite density"
            return "do not trust", f"{reason}: declare the support by the priors, or run refine()"
        if self.is_uneven:
            advice = "train for longer, take a larger flow, or run refine()"
            return "do not trust", f"the weights are too uneven {self._figures}: {advice}"
        if not math.isfinite(self.mean_error):
            dtype = str(self.u.dtype).removeprefix("torch.")
            advice = "" if dtype == "float64" else ": pass the data in float64"
            return "do not trust", f"some values of the draws are beyond the range of {dtype}, and have no mean{advice}"
        errors = f"errors of {self.mean_error:.2f} sd in the means and {self.sd_error:.0%} in the deviations at most"
        reason = f"the weights {self._figures} show {errors}"
        if self.ess_ratio >= 0.5 and self.mean_error <= 0.1 and self.sd_error <= 0.1:
            return "trust", reason
        return "resample", f"{reason}, which resampling mends"

    def evidence_error(self, missed: Sequence[Tensor]) -> tuple[float, str]:
        """Return the standard error of the log evidence, given the modes that the guide misses, and what is wrong."""
        if missed or self.tail:
            return math.inf, "a lower bound, since the draws are from a part of the posterior only"
        if self.is_uneven and (self.median_khat >= 0.7 or self.ess < 100):
            return math.inf, "not to be trusted, and without a standard error, since the weights are too uneven"
        if self.infinite > 0.01:
            return self.log_evidence_error, f"with a weight of zero for {self.infinite:.1%} of the draws"
        is_trusted = self.verdict(missed)[0] == "trust"
        return self.log_evidence_error, "" if is_trusted else f"by uneven weights {self._figures}"


@torch.no_grad()
def importance_sample(guide: AutoFlow, log_joint: LogJoint, num_draws: int) -> Weights:
    """Draw from a guide, and compute the importance weights of the draws."""
    flow = guide.require_flow()
    parts = [flow.rsample_and_log_prob(min(_CHUNK, num_draws - begin)) for begin in range(0, num_draws, _CHUNK)]
    u, log_q = torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts])
    weights = summarize_weights(log_joint, u, (log_joint.value(u) - log_q).double())
    return weights if weights.is_uneven else replace(weights, tail=_missed_tail(flow, log_joint, weights))


def _missed_tail(flow: Flow, log_joint: LogJoint, weights: Weights) -> float:
    """Return the share of the posterior in a tail that the guide's draws do not show, and that wider ones do, or 0.

    New draws, four times as many, must show it too: of a thousand guides without such a tail, noise gives one to some.
    """
    if not isinstance(flow.prior, StandardNormal) or not math.isfinite(weights.log_evidence):
        return 0.0
    number = min(_TAIL_DRAWS, len(weights.u))
    return _share_beyond(flow, log_joint, weights, number) and _share_beyond(flow, log_joint, weights, 4 * number)


def _share_beyond(flow: Flow, log_joint: LogJoint, weights: Weights, number: int) -> float:
    """Return the share of the posterior that draws wider than the guide's show beyond these, or 0 if it may be noise.

    In the flow's latent space half of the draws are the guide's, and half have one coordinate three times as wide:
    their weights are at most twice as large, and their mean estimates the same evidence if the guide leaves out
    nothing.
    """
    z = flow.prior.sample((number,))
    rows = torch.arange(number // 2, device=z.device)
    z[rows, torch.randint(z.shape[1], (len(rows),), device=z.device)] *= _TAIL_WIDTH
    stretched = (z.square() * (1 - _TAIL_WIDTH**-2) / 2 - math.log(_TAIL_WIDTH)).logsumexp(-1) - math.log(z.shape[1])
    log_q = flow.prior.log_prob(z) + torch.logaddexp(stretched, torch.zeros_like(stretched)) - math.log(2)
    u, log_det = flow.bijection.forward_and_log_det(z)
    log_w = (log_joint.value(u) - log_q + log_det).double()
    log_evidence = float(log_w.logsumexp(0)) - math.log(number)
    error = float((log_w - log_evidence).exp().std()) / number**0.5
    share = 1 - math.exp(min(weights.log_evidence - log_evidence, 0.0))
    beyond_error = log_evidence - weights.log_evidence > 3 * math.hypot(error, weights.log_evidence_error)
    return share if share > _TAIL_SHARE and beyond_error else 0.0


@torch.no_grad()
def summarize_weights(log_joint: LogJoint, u: Tensor, log_w: Tensor) -> Weights:
    """Compute evidence and errors from the log weights of draws."""
    draws = len(u)
    finite = log_w[log_w.isfinite()]
    if len(finite) < 2:
        inf = math.inf
        return Weights(u, log_w, -inf, inf, -inf, inf, (inf,) * _NUM_SETS, 0.0, 1 - len(finite) / draws, inf, inf)
    log_mean = float(finite.logsumexp(0)) - math.log(draws)
    smoothed = psis(log_w)[0].exp()
    mean_error, sd_error = _moment_errors(log_joint, u, smoothed)
    return Weights(
        u=u,
        log_weights=log_w,
        elbo=float(finite.mean()),
        elbo_error=float(finite.std()) / len(finite) ** 0.5,
        log_evidence=log_mean,
        log_evidence_error=float((log_w - log_mean).exp().std()) / draws**0.5,
        khat=tuple(psis(part)[1] if part.isfinite().any() else math.inf for part in log_w.chunk(_NUM_SETS)),
        ess=importance_ess(log_w),
        infinite=1 - len(finite) / draws,
        mean_error=mean_error,
        sd_error=sd_error,
    )


def _moment_errors(log_joint: LogJoint, u: Tensor, weights: Tensor) -> tuple[float, float]:
    """Return the largest errors of means and deviations of all sites, by comparison of draws with weighted draws."""
    errors = [_largest_errors(u, weights)]
    latents = log_joint.constrain(u)
    errors += [_largest_errors(value, weights, constrained=True) for value in latents.values()]
    if functions := log_joint.structure.deterministic:
        entries = sum(log_joint.structure.shapes[name].numel() for name in functions)
        most = len(u) if log_joint.vectorize == "plate" else 2000  # runs of the model, if each draw takes one
        rows = min(most, max(1000, _NUMBERS // max(entries, 1)), len(u))
        weights = weights[:rows] / weights[:rows].sum()
        for name, value in log_joint.constrain(u[:rows], deterministic=True).items():
            if name not in latents and not value.is_complex():
                # A function may have no mean, such as one that is infinite somewhere, which is no fault of the guide.
                value = value.reshape(rows, -1)
                errors.append(_largest_errors(value[:, value.isfinite().all(0)], weights, constrained=True))
    mean_errors, sd_errors = zip(*errors, strict=True)
    return max(mean_errors, key=_nan_last), max(sd_errors)


def _largest_errors(values: Tensor, weights: Tensor, *, constrained: bool = False) -> tuple[float, float]:
    """Return the largest error of a mean, in deviations, and the largest relative error of a deviation."""
    values = values.reshape(len(values), -1)
    values = values[:, (values != values[0]).any(0)]
    largest = 0.0, 0.0
    for x in values.split(_COLUMNS, 1) if values.numel() else ():
        x = x.to(weights)
        mean, true_mean = x.mean(0), weights @ x
        square, true_square = (x - mean) ** 2, (x - true_mean) ** 2
        variance, true_variance = square.mean(0), weights @ true_square
        mean_error = (mean - true_mean).abs() / torch.where(true_variance > 0, true_variance, variance).sqrt()
        ratio = (variance / true_variance).sqrt()
        sd_error = (ratio - 1).abs()
        if constrained:
            # A variance may be infinite here, and its estimates noise: only what exceeds three of its errors counts.
            influence = (square / variance - 1) / len(x) - weights[:, None] * (true_square / true_variance - 1)
            counts = sd_error > 1.5 * ratio * influence.square().sum(0).sqrt()
            sd_error = torch.where(counts & sd_error.isfinite(), sd_error, 0.0)
        found = float(mean_error.max()), float(sd_error.max())
        largest = max(largest[0], found[0], key=_nan_last), max(largest[1], found[1])
    return largest


def _nan_last(x: float) -> float:
    """Return a key by which NaN is the largest."""
    return math.inf if math.isnan(x) else x


@torch.no_grad()
def missed_modes(guide: AutoFlow, log_joint: LogJoint, weights: Weights) -> list[Tensor]:
    """Return the modes of the guide's ``inits`` with a share of the posterior that the guide does not cover.

    If the guide has not searched for modes, they are searched for here. A guide's own draws cannot show what it never
    draws. Draws from the Gaussian around another mode can: if the guide covers that mode, the ratio of the posterior's
    density to the guide's is near one there.
    """
    flow = guide.require_flow()
    missed: list[Tensor] = []
    peaks: list[Tensor] = []
    if not math.isfinite(weights.log_evidence):
        return missed
    inits = guide.inits
    if all(init.method == "none" for init in inits) and log_joint.dim <= MANY_LATENTS and not weights.is_uneven:
        with suppress(ValueError):  # no Gaussian with a finite ELBO
            inits = find_init(log_joint)
    for init in inits:
        z = flow.bijection.inverse_and_log_det(init.loc.to(log_joint.dtype))[0]
        if init.elbo < weights.log_evidence + math.log(_SHARE) - _SKEW or float(z.norm()) < _DISTANCE:
            continue
        u, log_p, log_g = draws_and_densities(init, log_joint)
        uncovered = log_p - weights.log_evidence - flow.log_prob(u) > math.log(_UNCOVERED)
        share = (log_p - log_g)[uncovered].logsumexp(0) - math.log(len(u)) - weights.log_evidence
        if not (uncovered.any() and float(share) > math.log(_SHARE)):
            continue
        # Several Gaussians may be around one mode: it is the same if the climbs from there reach the same peak.
        start = u[log_p.where(uncovered, -torch.inf).argmax()]
        paths = climb(log_joint, start.double()[None])
        peak = paths[0][-1][0] if paths else start.double()
        if not any(_are_connected(log_joint, peak, other) for other in peaks):
            missed.append(init.loc.to(log_joint.dtype))
            peaks.append(peak)
    return missed


def _are_connected(log_joint: LogJoint, first: Tensor, second: Tensor) -> bool:
    """Whether the density does not fall on the straight way between two peaks."""
    steps = torch.linspace(0, 1, 21, dtype=first.dtype, device=first.device)
    log_p = log_joint.value((first + steps[:, None] * (second - first)).to(log_joint.dtype))
    return bool(log_p.min() > log_p[[0, -1]].min() - _DIP)


def notes_on(log_joint: LogJoint) -> list[str]:
    """Return what a verdict should mention of a model."""
    notes = []
    if not log_joint.structure.observations and not log_joint.structure.factors:
        notes.append("the model observes nothing, so that this is its prior")
    if log_joint.vectorize == "loop":
        notes.append("the model was run for one point at a time, since it cannot run for many at once")
    return notes


@dataclass(frozen=True)
class Chains:
    """Draws of a few long Markov chains in unconstrained space, ``(chains, draws, latents)``, and what they show.

    ``rhat`` is the largest split R-hat over the latents, ``ess`` the smallest effective number of draws, and
    ``log_evidence`` NaN if it was not found.
    """

    u: Tensor
    rhat: float
    ess: float
    log_evidence: float = math.nan
    log_evidence_error: float = math.inf

    @staticmethod
    def of(u: Tensor) -> "Chains":
        """Return the chains with their statistics."""
        import arviz as az

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # more chains than draws are no mistake here
            data = az.convert_to_dataset(u.cpu().numpy())
        return Chains(u, float(az.rhat(data)["x"].max()), float(az.ess(data)["x"].min()))

    def verdict(self) -> tuple[str, str]:
        """Return "trust" or "do not trust", and the reason."""
        number = len(self.u)
        sizes = f"the smallest effective sample size {self.ess:.0f}"
        reason = f"the largest R-hat of {number} chains is {self.rhat:.3f} and {sizes}"
        if self.rhat < 1.02 and self.ess >= 50 * number:
            return "trust", reason
        return "do not trust", f"{reason}: run longer chains"

    def evidence_error(self) -> tuple[float, str]:
        """Return the standard error of the log evidence, and what is wrong with it."""
        has_converged = self.verdict()[0] == "trust"
        return error_of_evidence(self.log_evidence, self.log_evidence_error, has_converged=has_converged)

    def figures(self) -> dict[str, float]:
        """Return all but the draws."""
        names = ("rhat", "ess", "log_evidence", "log_evidence_error")
        return {name: getattr(self, name) for name in names}
