"""Guides learned from draws of a posterior, by maximum likelihood, where the ELBO could not train them."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from pyroflows.inference.coordinates import best_centring, moved, non_centred, recentred
from pyroflows.inference.diagnosis import importance_sample
from pyroflows.inference.evidence import evidence_of_draws, gaussian_of_draws
from pyroflows.inference.guide import AutoFlow
from pyroflows.inference.log_joint import LogJoint
from pyroflows.inference.watch import Watch
from pyroflows.training import fit

__all__ = ["evidence_of_chains", "guide_of_draws", "points_of_draws", "recentred_by_draws"]

_EPOCHS, _PATIENCE, _BATCH = 12, 3, 256
_MANY = 512  # latents, from which on couplings learn nothing from so many draws
_STEPS = 400  # at most, since a guide is a by-product of the draws
_ISLANDS = 4  # parts of a single chain, to tell the error of the evidence
_FEWEST = 50  # draws of a chain
_NUM_DRAWS = 1000  # to say how good the guide is


def guide_of_draws(
    guide: AutoFlow, log_joint: LogJoint, u: Tensor, watch: Watch, *, train: bool = True
) -> tuple[AutoFlow, str]:
    """Return a guide with the same kind of flow, fitted to draws by maximum likelihood, and a note on how good it is.

    It starts at the Gaussian of the draws, and stays there if there is no time.

    Args:
        guide: a guide of the model.
        log_joint: the density, in the coordinates of the draws.
        u: the draws, ``(chains, draws, latents)``.
        watch: bounds the time.
        train: whether to fit more than the Gaussian.
    """
    new = guide.like(log_joint)
    flow, flat = new.require_flow(), u.flatten(0, 1)
    gaussian: Any = gaussian_of_draws(flat).layers[0]
    whitening: Any = flow.layers[-1]
    scale = gaussian.scale.diag() if gaussian.diagonal else gaussian.scale
    whitening.start_at(gaussian.loc, scale)
    if not train or log_joint.dim > _MANY:
        return new, "log_prob is of the Gaussian of the draws"
    held_out = torch.arange(len(flat), device=u.device) % 10 == 9
    rows = flat[~held_out]
    if not watch.is_over("fitting a flow to the draws"):
        watch.hide()
        fit(
            flow,
            rows,
            validation=flat[held_out],
            epochs=max(1, min(_EPOCHS, _STEPS * _BATCH // len(rows))),
            batch_size=min(_BATCH, len(rows)),
            patience=_PATIENCE,
            max_seconds=None if watch.max_seconds is None else max(watch.max_seconds - watch.seconds(), 0.01),
            device=flow.device.type,
            progress="fitting a flow to the draws" if watch.progress is None else watch.progress,
        )
    found = importance_sample(new, log_joint, _NUM_DRAWS)
    return new, f"log_prob is of a flow fitted to the draws, of whose own {found.ess_ratio:.0%} are effective"


@torch.no_grad()
def recentred_by_draws(log_joint: LogJoint, u: Tensor) -> tuple[LogJoint, Tensor]:
    """Return the density in coordinates of hierarchical sites that fit draws, ``(draws, latents)``, and these there."""
    if not log_joint.hierarchical:
        return log_joint, u
    straight = non_centred(log_joint)
    score = straight.value_and_score(moved(u, log_joint, straight))[1]
    informed = recentred(straight, best_centring(straight, score.square().mean(0)))
    return informed, moved(u, log_joint, informed)


def evidence_of_chains(log_joint: LogJoint, u: Tensor, watch: Watch) -> tuple[float, float]:
    """Return the log evidence and its error by draws of a few chains, ``(chains, draws, latents)``.

    The first halves of the chains give the Gaussian, and the second halves the evidence.
    """
    half = u.shape[1] // 2
    used = u[:, half:]
    islands = len(used) if len(used) > 1 else _ISLANDS
    used = used.flatten(0, 1)
    used = used[: len(used) - len(used) % islands].view(islands, -1, used.shape[-1])
    return evidence_of_draws(log_joint, gaussian_of_draws(u[:, :half].flatten(0, 1)), used, watch.is_over)


def points_of_draws(log_joint: LogJoint, draws: Any) -> Tensor:
    """Return the points of draws of the sites, ``(chains, draws, latents)``.

    Args:
        log_joint: the density.
        draws: values of each latent site, ``(draws, *shape)`` or ``(chains, draws, *shape)``; or ArviZ's data, of which
            the group "posterior" is read.

    Raises:
        TypeError: neither of these.
        ValueError: a site is missing, has another shape, or has a value that is not within its support.
    """
    if hasattr(draws, "posterior"):
        draws = {name: draws.posterior[name].values for name in log_joint.names if name in draws.posterior}
    if not isinstance(draws, Mapping):
        expected = "draws as {site: values}, or ArviZ's InferenceData or DataTree"
        raise TypeError(f"expected {expected}; got {type(draws).__name__}")
    if missing := ", ".join(repr(name) for name in log_joint.names if name not in draws):
        raise ValueError(f"expected draws of every latent site; got none of {missing}")
    values, batch = {}, None
    for site in log_joint.latents:
        value = torch.as_tensor(draws[site.name]).to(log_joint.initial)
        ndim = value.dim() - len(site.shape)
        if (
            ndim not in (1, 2)
            or value.shape[ndim:] != site.shape
            or (batch or value.shape[:ndim]) != value.shape[:ndim]
        ):
            shape = "".join(f", {size}" for size in site.shape)
            expected = f"(draws{shape}) or (chains, draws{shape})" if batch is None else str((*batch, *site.shape))
            raise ValueError(f"expected draws of {site.name!r} of shape {expected}; got {tuple(value.shape)}")
        batch = value.shape[:ndim]
        values[site.name] = value.flatten(0, ndim - 1)
    batch = cast(torch.Size, batch)
    chains, number = batch if len(batch) == 2 else (1, *batch)
    if number < _FEWEST:
        raise ValueError(f"expected {_FEWEST} draws or more of each chain; got {number}")
    u = log_joint.unconstrain(values)[0]
    if not (fine := u.isfinite().all(-1) & log_joint.value(u).isfinite()).all():
        row = int((~fine).nonzero()[0])
        got = f"{int((~fine).sum())} of {len(u)}, such as draw {row % number} of chain {row // number}, that have none"
        raise ValueError(f"expected draws with a finite log joint density under the model; got {got}")
    return u.view(chains, number, log_joint.dim)
