"""What the importance weights of a guide's draws say of it: evidence, errors, missed modes, and a verdict in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyroflows.diagnostics.weights import importance_ess, psis
from pyroflows.flow import Flow
from pyroflows.inference.guide import AutoFlow
from pyroflows.inference.log_joint import LogJoint

__all__ = ["Weights", "judge", "missed_modes", "weigh", "weights_of"]

CHUNK = 2000  # points evaluated at once
SETS = 5  # of draws, each with a k-hat of its own
_SHARE = 0.05  # of the posterior that a missed mode must hold to be named
_SKEWED = 5.0  # nats that the Gaussian at such a mode may lack, as where the posterior is not one there
_APART = 5.0  # from the guide's centre in its latent space, where such a mode must lie
_UNCOVERED = 20.0  # times the guide's density, where the posterior counts as not covered


@dataclass(frozen=True)
class Weights:
    """What the importance weights of fresh draws say of a guide.

    Args:
        u: the draws, in unconstrained space, ``(draws, latents)``.
        log_weights: log joint density minus the guide's log-density, ``(draws,)``; -inf where the former is not finite.
        elbo: the mean of the finite ones, in nats.
        elbo_error: its standard error.
        log_evidence: the logarithm of the mean weight.
        log_evidence_error: its standard error, to first order.
        khat: Pareto shapes of the weights, one for each of several sets of the draws.
        ess: Kish's effective number of draws.
        infinite: the share of draws whose log joint density is not finite.
        mean_error: the largest error of a mean, in standard deviations, as reweighting the draws shows it; NaN where
            values of sites are beyond the range of their dtype.
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


@torch.no_grad()
def weigh(guide: AutoFlow, log_joint: LogJoint, draws: int) -> Weights:
    """Draw from a guide and weigh the draws."""
    flow: Flow = guide.flow
    parts = [flow.rsample_and_log_prob(min(CHUNK, draws - begin)) for begin in range(0, draws, CHUNK)]
    u, log_q = torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts])
    return weights_of(log_joint, u, (log_joint.value(u) - log_q).double())


@torch.no_grad()
def weights_of(log_joint: LogJoint, u: Tensor, log_w: Tensor) -> Weights:
    """Say what the log weights of draws show."""
    draws, dim = u.shape
    finite = log_w[log_w.isfinite()]
    if len(finite) < 2:
        inf = math.inf
        return Weights(u, log_w, -inf, inf, -inf, inf, (inf,) * SETS, 0.0, 1 - len(finite) / draws, inf, inf)
    log_mean = float(finite.logsumexp(0)) - math.log(draws)
    smoothed = psis(log_w)[0].exp()[:, None]
    # Means of the values as users read them; deviations of the unconstrained ones, which always exist.
    values = [value.reshape(draws, -1) for value in log_joint.constrain(u).values()]
    columns = torch.cat([u, *(value[:, (value != value[0]).any(0)] for value in values)], -1).to(smoothed)
    mean, sd, right = columns.mean(0), columns.std(0), (smoothed * columns).sum(0)
    right_sd = (smoothed * (columns - right) ** 2).sum(0).sqrt()
    return Weights(
        u=u,
        log_weights=log_w,
        elbo=float(finite.mean()),
        elbo_error=float(finite.std()) / len(finite) ** 0.5,
        log_evidence=log_mean,
        log_evidence_error=float((log_w - log_mean).exp().std()) / draws**0.5,
        khat=tuple(psis(part)[1] for part in log_w.chunk(SETS)),
        ess=importance_ess(log_w),
        infinite=1 - len(finite) / draws,
        mean_error=float(((mean - right) / right_sd).abs().max()),
        sd_error=float((sd / right_sd - 1).abs()[:dim].max()),
    )


@torch.no_grad()
def missed_modes(guide: AutoFlow, log_joint: LogJoint, weights: Weights) -> list[Tensor]:
    """Give modes that the search for a start came upon, which hold a share of the posterior the guide does not.

    A guide's own draws cannot show what it never draws. Draws from the Gaussian around another mode can: there the
    weight of a posterior that the guide covers is near one.
    """
    flow: Flow = guide.flow
    missed: list[Tensor] = []
    if not math.isfinite(weights.log_evidence):
        return missed
    for start in guide.starts:
        z = flow.bijection.inverse_and_log_det(start.loc.to(log_joint.dtype))[0]
        if start.elbo < weights.log_evidence + math.log(_SHARE) - _SKEWED or float(z.norm()) < _APART:
            continue
        noise = torch.randn(256, log_joint.dim, dtype=start.loc.dtype, device=start.loc.device)
        u = (start.loc + noise @ start.scale_tril.mT).to(log_joint.dtype)
        log_p = log_joint.value(u)
        log_g = torch.distributions.MultivariateNormal(
            start.loc, scale_tril=start.scale_tril, validate_args=False
        ).log_prob(u.to(start.loc))
        uncovered = log_p - weights.log_evidence - flow.log_prob(u) > math.log(_UNCOVERED)
        share = (log_p - log_g)[uncovered].logsumexp(0) - math.log(len(u)) - weights.log_evidence
        apart = all(float(((start.loc - mode) / start.scale_tril.norm(dim=-1)).abs().max()) > 1 for mode in missed)
        if uncovered.any() and float(share) > math.log(_SHARE) and apart:
            missed.append(start.loc.to(log_joint.dtype))
    return missed


def judge(weights: Weights, missed: Sequence[Tensor], notes: Sequence[str]) -> tuple[str, str]:
    """Give the verdict, and why."""
    khat = sorted(weights.khat)[len(weights.khat) // 2]
    errors = f"errors of {weights.mean_error:.2f} sd in the means and {weights.sd_error:.0%} in the deviations"
    shown = f"the weights (median k-hat {khat:.2f}, ESS {weights.ess_ratio:.0%}) show {errors} at most"
    noted = "".join(f"; {note}" for note in notes)
    if missed:
        return (
            "do not trust",
            f"{len(missed)} other mode(s) with a share of the posterior are not covered: refine{noted}",
        )
    if weights.infinite > 0.01:
        return "do not trust", f"{weights.infinite:.1%} of the draws have no finite density{noted}"
    # One k-hat is a noisy number: where nearly all draws count, no tail of the weights has been seen.
    if not (weights.ess_ratio >= 0.8 or (khat < 0.7 and weights.ess_ratio > 0.1)):
        return (
            "do not trust",
            f"the weights are too uneven (median k-hat {khat:.2f}, ESS {weights.ess_ratio:.0%}){noted}",
        )
    if not math.isfinite(weights.mean_error):
        dtype = str(weights.u.dtype).removeprefix("torch.")
        return "do not trust", f"some values of the draws are beyond the range of {dtype}, and have no mean{noted}"
    if weights.ess_ratio >= 0.5 and weights.mean_error <= 0.1 and weights.sd_error <= 0.1:
        return "trust", f"{shown}{noted}"
    return "resample", f"{shown}, which resampling mends{noted}"
