"""Markov chains in the latent space of a trained guide (NeuTra)."""

import copy
import math
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.reparam import NeuTraReparam
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyroflows.bijection import Bijection
from pyroflows.inference.guide import AutoFlow
from pyroflows.inference.log_joint import LogJoint
from pyroflows.inference.sites import Model, initial_value
from pyroflows.inference.watch import Watch
from pyroflows.private import make_plates

__all__ = ["neutra", "run_chains"]

_LEAST_DRAWS = 4  # of a chain, to tell its R-hat


def neutra(model: Model, guide: AutoFlow) -> tuple[Model, Callable[[Tensor], dict[str, Tensor]]]:
    r"""Reparametrise a model by a trained guide, in whose latent space a sampler meets a simple geometry.

    .. math:: z \mapsto x(f(z)), \qquad \log p(y, x) + \log|\det dx/dz|

    Args:
        model: the Pyro model that the guide was made for.
        guide: a trained guide; a copy of it is used, which does not train.

    Returns:
        A model, for ``MCMC``, whose one latent site is z, ``(latents,)``, and has a name that ends in
        ``_shared_latent``; and a function from draws of z, ``(draws, latents)``, to values of the sites.

    Raises:
        ValueError: the guide is not built, or a latent is under a scale or a mask.

    References:
        NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural Transport, Hoffman et al., 2019
        (arXiv:1903.03704).

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, pyro.sample("scale", dist.LogNormal(0.0, 1.0))))
        >>> over_z, sites = neutra(model, AutoFlow(model))
        >>> mcmc = MCMC(NUTS(over_z), num_samples=10, warmup_steps=10, disable_progbar=True)
        >>> mcmc.run()
        >>> (z,) = mcmc.get_samples().values()
        >>> scale = sites(z)["scale"]
    """
    guide.require_flow()
    frozen = copy.deepcopy(guide).requires_grad_(False).eval()
    make_plates(frozen)
    nodes = frozen.prototype_trace.nodes
    for name, node in nodes.items():
        is_masked = node["mask"] is not None and not bool(torch.as_tensor(node["mask"]).all())
        if is_masked or not (torch.as_tensor(node["scale"]) == 1).all():
            reason = "which Pyro would apply to their Jacobians too"
            raise ValueError(f"expected latents under neither a scale nor a mask, {reason}; got {name!r}")
    rows = math.prod(nodes[frozen.latents[0].name]["fn"].batch_shape)

    @torch.no_grad()
    def sites(z: Tensor) -> dict[str, Tensor]:
        return guide.constrain(frozen.require_flow().decode(z))

    return _Reparam(frozen, rows).reparam(_Feasible(guide.require_flow().dtype)(model)), sites


class _Reparam(NeuTraReparam):
    """Pyro's reparametrisation, which adds the flow's log-determinant to each row of the first site: a share each."""

    def __init__(self, guide: AutoFlow, rows: int):
        self.rows = rows
        super().__init__(guide)

    @property
    def transform(self) -> "_SharedLogDet | None":
        """The guide's, which Pyro sets."""
        return self._transform

    @transform.setter
    def transform(self, bijection: Bijection | None) -> None:
        self._transform = None if bijection is None else _SharedLogDet(bijection, self.rows)


class _SharedLogDet:
    """A transform that divides its log-determinant among rows."""

    def __init__(self, bijection: Bijection, rows: int):
        self.bijection, self.rows = bijection, rows

    def __call__(self, z: Tensor) -> Tensor:
        u: Tensor = self.bijection(z)
        return u

    def log_abs_det_jacobian(self, z: Tensor, u: Tensor) -> Tensor:
        return self.bijection.log_abs_det_jacobian(z, u) / self.rows


class _Point(dist.ImproperUniform):
    """An improper prior with a feasible point as its draw, by which Pyro's MCMC learns the shapes of a model."""

    dtype = torch.float32

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return initial_value({"fn": self}, torch.empty((), dtype=self.dtype)).expand((*sample_shape, *self.shape()))


class _Feasible(Messenger):
    """Replaces improper priors by points."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if type(fn) is dist.ImproperUniform and not msg["is_observed"]:
            msg["fn"] = _Point(fn.support, fn.batch_shape, fn.event_shape)
            msg["fn"].dtype = self.dtype


class _OutOfTime(Exception):
    """Ends a chain."""


def run_chains(
    guide: AutoFlow, log_joint: LogJoint, starts: Tensor, num_draws: int, num_warmup: int, watch: Watch
) -> Tensor:
    """Run NUTS from points of unconstrained space; return draws there, ``(chains, draws, latents)``.

    Each chain has an equal share of the time, if that is limited; one without draws is left out, and of the others as
    many draws are returned as the shortest has.
    """
    model, _ = neutra(log_joint.model, guide)
    flow, site, draws = guide.require_flow(), f"{guide.latents[0].name}_shared_latent", []
    with torch.no_grad():
        latents = flow.encode(starts)
    for number, latent in enumerate(latents, 1):
        kept: list[Tensor] = []

        def note(_: Any, point: Any, stage: str, step: int, number: int = number, kept: list[Tensor] = kept) -> None:
            if stage == "Sample":
                kept.append(point[site].clone())
            if watch.is_over(f"chain {number} of {len(starts)}, {stage.lower()} {step}", number / len(starts)):
                raise _OutOfTime

        mcmc = MCMC(
            NUTS(model, full_mass=False, max_tree_depth=8),
            num_samples=num_draws,
            warmup_steps=num_warmup,
            initial_params={site: latent},
            disable_progbar=not (sys.stderr.isatty() if watch.progress is None else watch.progress),
            hook_fn=note,
        )
        with suppress(_OutOfTime):
            mcmc.run(*log_joint.args, **log_joint.kwargs)
        draws += [torch.stack(kept)] if len(kept) >= _LEAST_DRAWS else []
    if not draws:
        expected = f"time for {_LEAST_DRAWS} draws of a chain after its {num_warmup} steps of warm-up"
        raise ValueError(f"expected {expected}; got max_seconds={watch.max_seconds:g}")
    with torch.no_grad():
        return torch.stack([flow.decode(z[: min(map(len, draws))]) for z in draws])
