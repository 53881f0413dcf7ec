"""Markov chains that mend what a guide lacks: many at once from annealed particles, or a few of NUTS."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyroflows import distributed
from pyroflows.inference.chains import Ensemble, run_ensemble, scale_of_prior
from pyroflows.inference.coordinates import non_centred
from pyroflows.inference.diagnosis import Chains, Weights
from pyroflows.inference.guide import AutoFlow
from pyroflows.inference.learning import with_evidence
from pyroflows.inference.log_joint import LogJoint
from pyroflows.inference.neutra import run_chains
from pyroflows.inference.watch import Watch
from pyroflows.priors import StandardNormal

__all__ = ["REFINEMENTS", "refine_by_ensemble", "refine_by_nuts"]

REFINEMENTS = ("ensemble", "nuts")
_USEFUL = 0.02  # share of effective draws from which on a guide covers the posterior


def refine_by_ensemble(
    guide: AutoFlow,
    log_joint: LogJoint,
    weights: Weights | None,
    missed: Sequence[Tensor],
    watch: Watch,
    **sizes: int | None,
) -> Ensemble:
    """Run many chains from particles annealed from the scale of the prior, with hierarchical sites non-centred.

    If they do not converge, others follow in the latent space of the guide, if its draws cover the posterior at all.
    """
    chosen = {name: size for name, size in sizes.items() if size is not None}
    with distributed.shared_rng():
        recentre = bool(log_joint.hierarchical)
        straight = non_centred(log_joint) if recentre else log_joint
        options: Any = {"out_of_time": watch.is_over, **chosen}
        ensemble = run_ensemble(straight, scale_of_prior(straight), recentre=recentre, **options)
        flow = guide.require_flow()
        covers = weights is not None and weights.ess_ratio >= _USEFUL and not missed
        if ensemble.complete and not ensemble.has_converged and covers and isinstance(flow.prior, StandardNormal):
            bent = run_ensemble(log_joint, scale_of_prior(log_joint, flow), **options)
            ensemble = min(ensemble, bent, key=lambda found: (not found.has_converged, found.rhat))
    return ensemble


def refine_by_nuts(
    guide: AutoFlow,
    log_joint: LogJoint,
    missed: Sequence[Tensor],
    watch: Watch,
    *,
    num_chains: int | None = None,
    num_draws: int | None = None,
    num_warmup: int | None = None,
) -> Chains:
    """Run NUTS in the guide's latent space, each chain from a mode that the guide misses or from a draw of it."""
    watch.hide()  # Pyro shows a bar of its own
    number = num_chains or 4
    with torch.no_grad():
        starts = torch.cat([*(mode[None] for mode in missed), guide.require_flow().sample(number)])[:number]
    chains = Chains.of(run_chains(guide, log_joint, starts, num_draws or 250, num_warmup or 200, watch))
    return with_evidence(chains, log_joint, watch)
