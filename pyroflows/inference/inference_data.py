"""Posteriors as ArviZ holds them, and ArviZ's diagnostics of Markov chains."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyroflows.diagnostics.weights import psis
from pyroflows.flow import Flow
from pyroflows.inference.log_joint import LogJoint

__all__ = ["chain_statistics", "diagnose_chains", "inference_data"]

_CHUNK = 2000  # points evaluated at once


@torch.no_grad()
def inference_data(log_joint: LogJoint, u: Tensor, num_chains: int, flow: Flow | None) -> Any:
    """Return draws, chain after chain, with their statistics as ArviZ holds them, and weights if they are a flow's."""
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
        group: {name: v.detach().cpu().unflatten(0, (num_chains, -1)).numpy() for name, v in values.items()}
        for group, values in groups.items()
    }
    if observations:
        arrays["observed_data"] = {name: value.detach().cpu().numpy() for name, value in observations.items()}
    return _from_dict(arrays)


def chain_statistics(chains: Tensor) -> tuple[float, float]:
    """Return the largest split R-hat and the smallest effective sample size of chains ``(chains, draws, latents)``."""
    import arviz as az

    data = _from_dict({"posterior": {"u": chains.cpu().numpy()}})
    rhat, ess = (_posterior(statistic(data))["u"] for statistic in (az.rhat, az.ess))
    return float(rhat.max()), float(ess.min())


def diagnose_chains(chains: Tensor) -> tuple[str, str]:
    """Return a verdict on chains, and the reason."""
    rhat, ess = chain_statistics(chains)
    number = len(chains)
    reason = f"the largest R-hat of {number} chains is {rhat:.3f} and the smallest effective sample size {ess:.0f}"
    if rhat < 1.02 and ess >= 50 * number:
        return "trust", reason
    return "do not trust", f"{reason}: run longer chains"


def _from_dict(groups: Mapping[str, Any]) -> Any:
    import arviz as az

    if "InferenceData" in vars(az):  # ArviZ 1.x warns if the name is looked up
        return az.from_dict(**groups)
    return az.from_dict(dict(groups))


def _posterior(result: Any) -> Any:
    """Return a statistic's dataset, which ArviZ 1.x puts into a tree."""
    return result["posterior"] if "posterior" in getattr(result, "children", {}) else result
