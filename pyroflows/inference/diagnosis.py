"""What draws tell of a posterior: importance weights of a guide's, statistics of chains, a verdict, ArviZ's data."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyroflows.diagnostics.weights import importance_ess, psis
from pyroflows.flow import Flow
from pyroflows.inference.guide import AutoFlow
from pyroflows.inference.log_joint import LogJoint

__all__ = [
    "Weights",
    "chain_statistics",
    "diagnose_chains",
    "importance_sample",
    "inference_data",
    "missed_modes",
    "summarize_weights",
]

_CHUNK = 2000  # points evaluated at once
_NUM_SETS = 5  # of draws, each with its k-hat
_SHARE = 0.05  # smallest share of the posterior at a missed mode to report
_SKEW = 5.0  # nats by which the ELBO of the Gaussian at such a mode may fall short, if the posterior is not Gaussian
_DISTANCE = 5.0  # smallest distance of such a mode from the guide's centre, in its latent space
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
        mean_error: the largest error of a mean, in standard deviations, by comparison with the reweighted draws; NaN
            if values of sites are beyond the range of their dtype.
        sd_error: the largest relative error of a standard deviation, likewise.
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

    @property
    def ess_ratio(self) -> float:
        """The effective number of draws as a share of the draws."""
        return self.ess / len(self.u)

    def resample(self, n: int) -> Tensor:
        """Resample draws by their smoothed weights (PSIS)."""
        smoothed = psis(self.log_weights)[0].exp()
        # Systematic resampling: each draw comes up in proportion to its weight, to the nearest integer.
        steps = torch.arange(n, dtype=torch.float64, device="cpu")
        positions = (steps + torch.rand((), dtype=torch.float64, device="cpu")) / n
        rows = torch.searchsorted(smoothed.cpu().cumsum(0), positions).clamp(max=len(self.u) - 1)
        return self.u[rows[torch.randperm(n, device="cpu")].to(self.u.device)]

    def verdict(self, missed: Sequence[Tensor]) -> tuple[str, str]:
        """Return the verdict on the guide, given the modes that it misses, and the reason."""
        if missed:
            return "do not trust", f"{len(missed)} other mode(s) with a share of the posterior are not covered: refine"
        if self.infinite > 0.01:
            return "do not trust", f"{self.infinite:.1%} of the draws have no finite density"
        khat = sorted(self.khat)[len(self.khat) // 2]
        figures = f"(median k-hat {khat:.2f}, ESS {self.ess_ratio:.0%})"
        # A k-hat is noisy: if nearly all draws are effective, the weights have no tail to speak of.
        if not (self.ess_ratio >= 0.8 or (khat < 0.7 and self.ess_ratio > 0.1)):
            return "do not trust", f"the weights are too uneven {figures}"
        if not math.isfinite(self.mean_error):
            dtype = str(self.u.dtype).removeprefix("torch.")
            return "do not trust", f"some values of the draws are beyond the range of {dtype}, and have no mean"
        errors = f"errors of {self.mean_error:.2f} sd in the means and {self.sd_error:.0%} in the deviations at most"
        reason = f"the weights {figures} show {errors}"
        if self.ess_ratio >= 0.5 and self.mean_error <= 0.1 and self.sd_error <= 0.1:
            return "trust", reason
        return "resample", f"{reason}, which resampling mends"


@torch.no_grad()
def importance_sample(guide: AutoFlow, log_joint: LogJoint, num_draws: int) -> Weights:
    """Draw from a guide, and compute the importance weights of the draws."""
    flow = guide.require_flow()
    parts = [flow.rsample_and_log_prob(min(_CHUNK, num_draws - begin)) for begin in range(0, num_draws, _CHUNK)]
    u, log_q = torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts])
    return summarize_weights(log_joint, u, (log_joint.value(u) - log_q).double())


@torch.no_grad()
def summarize_weights(log_joint: LogJoint, u: Tensor, log_w: Tensor) -> Weights:
    """Compute evidence and errors from the log weights of draws."""
    draws, dim = u.shape
    finite = log_w[log_w.isfinite()]
    if len(finite) < 2:
        inf = math.inf
        return Weights(u, log_w, -inf, inf, -inf, inf, (inf,) * _NUM_SETS, 0.0, 1 - len(finite) / draws, inf, inf)
    log_mean = float(finite.logsumexp(0)) - math.log(draws)
    smoothed = psis(log_w)[0].exp()[:, None]
    # Means of the constrained values, which users read; deviations of the unconstrained ones, which always exist.
    values = [value.reshape(draws, -1) for value in log_joint.constrain(u).values()]
    columns = torch.cat([u, *(value[:, (value != value[0]).any(0)] for value in values)], -1).to(smoothed)
    mean, sd, true_mean = columns.mean(0), columns.std(0), (smoothed * columns).sum(0)
    true_sd = (smoothed * (columns - true_mean) ** 2).sum(0).sqrt()
    return Weights(
        u=u,
        log_weights=log_w,
        elbo=float(finite.mean()),
        elbo_error=float(finite.std()) / len(finite) ** 0.5,
        log_evidence=log_mean,
        log_evidence_error=float((log_w - log_mean).exp().std()) / draws**0.5,
        khat=tuple(psis(part)[1] for part in log_w.chunk(_NUM_SETS)),
        ess=importance_ess(log_w),
        infinite=1 - len(finite) / draws,
        mean_error=float(((mean - true_mean) / true_sd).abs().max()),
        sd_error=float((sd / true_sd - 1).abs()[:dim].max()),
    )


@torch.no_grad()
def missed_modes(guide: AutoFlow, log_joint: LogJoint, weights: Weights) -> list[Tensor]:
    """Return the modes of the guide's ``inits`` with a share of the posterior that the guide does not cover.

    A guide's own draws cannot show what it never draws. Draws from the Gaussian around another mode can: if the guide
    covers that mode, the ratio of the posterior's density to the guide's is near one there.
    """
    flow = guide.require_flow()
    missed: list[Tensor] = []
    if not math.isfinite(weights.log_evidence):
        return missed
    for init in guide.inits:
        z = flow.bijection.inverse_and_log_det(init.loc.to(log_joint.dtype))[0]
        if init.elbo < weights.log_evidence + math.log(_SHARE) - _SKEW or float(z.norm()) < _DISTANCE:
            continue
        noise = torch.randn(256, log_joint.dim, dtype=init.loc.dtype, device=init.loc.device)
        u = (init.loc + noise @ init.scale_tril.mT).to(log_joint.dtype)
        log_p = log_joint.value(u)
        gaussian = MultivariateNormal(init.loc, scale_tril=init.scale_tril, validate_args=False)
        log_g = gaussian.log_prob(u.to(init.loc))
        uncovered = log_p - weights.log_evidence - flow.log_prob(u) > math.log(_UNCOVERED)
        share = (log_p - log_g)[uncovered].logsumexp(0) - math.log(len(u)) - weights.log_evidence
        is_new = all(float(((init.loc - mode) / init.scale_tril.norm(dim=-1)).abs().max()) > 1 for mode in missed)
        if uncovered.any() and float(share) > math.log(_SHARE) and is_new:
            missed.append(init.loc.to(log_joint.dtype))
    return missed


def chain_statistics(chains: Tensor) -> tuple[float, float]:
    """Return the largest split R-hat and the smallest effective sample size of chains ``(chains, draws, latents)``."""
    import arviz as az

    data = az.convert_to_dataset(chains.cpu().numpy())
    return float(az.rhat(data)["x"].max()), float(az.ess(data)["x"].min())


def diagnose_chains(chains: Tensor) -> tuple[str, str]:
    """Return a verdict on chains, and the reason."""
    rhat, ess = chain_statistics(chains)
    number = len(chains)
    reason = f"the largest R-hat of {number} chains is {rhat:.3f} and the smallest effective sample size {ess:.0f}"
    if rhat < 1.02 and ess >= 50 * number:
        return "trust", reason
    return "do not trust", f"{reason}: run longer chains"


@torch.no_grad()
def inference_data(log_joint: LogJoint, u: Tensor, num_chains: int, flow: Flow | None) -> Any:
    """Return draws, chain after chain, with their statistics as ArviZ holds them, and weights if they are a flow's."""
    import arviz as az

    log_p = log_joint.value(u)
    stats = {"lp": log_p}
    if flow is not None:
        stats["log_q"] = torch.cat([flow.log_prob(part) for part in u.split(_CHUNK)])
        if len(u) >= 32:
            stats["log_weight"] = psis(log_p - stats["log_q"])[0]
    groups: dict[str, Any] = {"posterior": log_joint.constrain(u, deterministic=True), "sample_stats": stats}
    observations = log_joint.structure.observations
    if observations and not log_joint.structure.discrete:
        parts = [log_joint.log_likelihood(part) for part in u.split(_CHUNK)]
        groups["log_likelihood"] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    arrays = {
        group: {name: value.detach().cpu().unflatten(0, (num_chains, -1)).numpy() for name, value in values.items()}
        for group, values in groups.items()
    }
    if observations:
        arrays["observed_data"] = {name: value.detach().cpu().numpy() for name, value in observations.items()}
    return az.from_dict(**arrays) if "InferenceData" in vars(az) else az.from_dict(arrays)  # ArviZ 0.x, and 1.x
