"""The density of a model in coordinates of hierarchical sites between centred and non-centred ones."""

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pyroflows.inference.log_joint import LogJoint

__all__ = ["best_centring", "moved", "non_centred", "recentred", "recentred_by_draws"]


def recentred(log_joint: LogJoint, centring: Mapping[str, Tensor]) -> LogJoint:
    """Return a density in coordinates between centred (1) and non-centred (0) ones, see :func:`transform_of`.

    Args:
        log_joint: the density, in any coordinates.
        centring: of each entry of a hierarchical site, of its unconstrained shape; sites left out are centred.
    """
    if unknown := ", ".join(map(repr, sorted(centring.keys() - log_joint.hierarchical.keys()))):
        raise ValueError(f"expected centring of sites among {list(log_joint.hierarchical)}; got {unknown}")
    new = copy.copy(log_joint)
    supports = {name: node["fn"].support for name, node in log_joint.structure.latent_nodes.items()}
    new.centring = {name: value.to(log_joint.initial) for name, value in centring.items()}
    new.latents = list(log_joint.latents)
    for index, site in enumerate(new.latents):
        if site.name in log_joint.hierarchical:
            new.latents[index] = replace(site, support=None if site.name in centring else supports[site.name])
    new.initial = moved(log_joint.initial[None], log_joint, new)[0]
    if log_joint.vectorize != "loop":
        new.vectorize = new.fastest_mode()
    return new


def non_centred(log_joint: LogJoint) -> LogJoint:
    """Return a density in non-centred coordinates of all hierarchical sites."""
    sites = [site for site in log_joint.latents if site.name in log_joint.hierarchical]
    return recentred(log_joint, {site.name: torch.zeros(site.unconstrained_shape) for site in sites})


def best_centring(log_joint: LogJoint, precision: Tensor) -> dict[str, Tensor]:
    r"""Return how far each entry of the sites in non-centred coordinates is better centred.

    What the data say of an entry adds to its precision, about 1 by the prior, and centres it by as much: c = 1 - 1 /
    precision makes entry and location independent in a Gaussian model.

    Args:
        log_joint: the density, in non-centred coordinates.
        precision: of each of these given the others, ``(dim,)``.
    """
    best = (1 - 1 / precision.clamp(min=1.0)).nan_to_num(0.0)
    sites = [site for site in log_joint.latents if site.name in log_joint.centring]
    return {site.name: site.slice_of(best) * (not log_joint.hierarchical[site.name]) for site in sites}


@torch.no_grad()
def recentred_by_draws(log_joint: LogJoint, u: Tensor) -> tuple[LogJoint, Tensor]:
    """Return the density in coordinates that fit draws, ``(draws, dim)``, and these there.

    Args:
        log_joint: the density, in non-centred coordinates.
        u: the draws, in these.
    """
    precision = log_joint.value_and_score(u)[1].square().mean(0)  # the mean square of a score is the mean curvature
    informed = recentred(log_joint, best_centring(log_joint, precision))
    return informed, moved(u, log_joint, informed)


@torch.no_grad()
def moved(u: Tensor, log_joint: LogJoint, other: LogJoint) -> Tensor:
    """Return points in the coordinates of one density, ``(points, dim)``, in those of another of the same model."""
    return u if other.centring is log_joint.centring else other.unconstrain(log_joint.constrain(u))[0]
