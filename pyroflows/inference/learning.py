"""Guides learned from draws of a posterior, by maximum likelihood, where the ELBO could not train them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from pyroflows import distributed
from pyroflows.inference.diagnosis import Chains, importance_sample
from pyroflows.inference.evidence import evidence_of_draws, gaussian_of_draws
from pyroflows.inference.guide import AutoFlow
from pyroflows.inference.guide_fit import FEW_TRAINED
from pyroflows.inference.log_joint import LogJoint
from pyroflows.inference.moves import scale_of_draws
from pyroflows.inference.sites import MANY_LATENTS
from pyroflows.inference.watch import Watch
from pyroflows.training import fit

__all__ = ["guide_of_draws", "points_of_draws", "with_evidence"]

_EPOCHS, _PATIENCE, _BATCH = 12, 3, 256
_STEPS, _STEPS_OF_MANY = 400, 200  # at most, and with many latents: a guide is a by-product of the draws
_ISLANDS = 4  # parts of the draws, to tell the error of the evidence
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
    whitening: Any = flow.layers[-1]
    whitening.start_at(flat.mean(0), scale_of_draws(flat))
    if not train or log_joint.dim > MANY_LATENTS or watch.is_over("fitting a flow to the draws"):
        return new, "log_prob is of the Gaussian of the draws"
    steps = _STEPS if log_joint.dim <= FEW_TRAINED else _STEPS_OF_MANY
    held_out = torch.arange(len(flat), device=u.device) % 10 == 9
    rows = flat[~held_out]
    watch.hide()  # the fit shows a bar of its own
    fit(
        flow,
        rows,
        validation=flat[held_out],
        epochs=max(1, min(_EPOCHS, steps * _BATCH // len(rows))),
        batch_size=min(_BATCH, len(rows)),
        patience=_PATIENCE,
        max_seconds=None if watch.max_seconds is None else max(watch.max_seconds - watch.seconds(), 0.01),
        device=flow.device.type,
        progress="fitting a flow to the draws" if watch.progress is None else watch.progress,
    )
    found = importance_sample(new, log_joint, _NUM_DRAWS)
    return new, f"log_prob is of a flow fitted to the draws, of whose own {found.ess_ratio:.0%} are effective"


def with_evidence(chains: Chains, log_joint: LogJoint, watch: Watch) -> Chains:
    """Return a few chains with the evidence by their draws, which is unknown if these or the time are too short.

    The first halves of the chains give the Gaussian, and the second halves the evidence.
    """
    half, dim = chains.u.shape[1] // 2, chains.u.shape[2]
    if chains.u.shape[1] < _FEWEST or watch.is_over("finding the evidence"):
        return chains
    used = chains.u[:, half:].flatten(0, 1)
    islands = used[: len(used) - len(used) % _ISLANDS].view(_ISLANDS, -1, dim)
    with distributed.shared_rng():
        base = gaussian_of_draws(chains.u[:, :half].flatten(0, 1))
        value, error = evidence_of_draws(log_joint, base, islands, watch.is_over)
    return replace(chains, log_evidence=value, log_evidence_error=error)


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
