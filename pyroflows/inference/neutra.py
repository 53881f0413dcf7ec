"""Markov chains in the latent space of a trained guide (NeuTra)."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.reparam import NeuTraReparam
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyroflows.bijection import Bijection
from pyroflows.flow import Flow
from pyroflows.inference.guide import AutoFlow
from pyroflows.inference.log_joint import initial_value

__all__ = ["neutra", "run_chains"]


def neutra(
    model: Callable[..., Any], guide: AutoFlow
) -> tuple[Callable[..., Any], Callable[[Tensor], dict[str, Tensor]]]:
    r"""Put a trained, frozen guide between a model and its sampler, which then moves in a space of simple geometry.

    .. math:: z \mapsto x(f(z)), \qquad \log p(y, x) + \log|\det dx/dz|

    Args:
        model: the Pyro model that the guide was made for.
        guide: a trained guide; a frozen copy of it is used.

    Shapes:
        z: ``(latents,)``, the one latent site of the new model, whose name ends in ``_shared_latent``.

    Returns:
        The model over z, for ``MCMC``; and a function from draws of z, ``(draws, latents)``, to values of the sites.

    Raises:
        ValueError: the guide is not built, or a latent stands under a scale or a mask.

    References:
        NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural Transport, Hoffman et al., 2019
        (arXiv:1903.03704).

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyroflows import AutoFlow, neutra
        >>> def model():
        ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(0.0, scale))
        >>> guide = AutoFlow(model)
        >>> over_z, sites = neutra(model, guide)
        >>> mcmc = MCMC(NUTS(over_z), num_samples=10, warmup_steps=10, disable_progbar=True)
        >>> mcmc.run()
        >>> (z,) = mcmc.get_samples().values()
        >>> sites(z)["scale"].shape
        torch.Size([10])
    """
    guide._built()
    frozen = copy.deepcopy(guide).requires_grad_(False).eval()
    frozen._create_plates()
    latents = frozen.prototype_trace.nodes
    for name, site in latents.items():
        if not (torch.as_tensor(site["scale"]) == 1).all() or not _is_whole(site["mask"]):
            raise ValueError(
                f"expected latents under neither a scale nor a mask, which Pyro would put on their Jacobians too; got "
                f"{name!r}"
            )
    rows = math.prod(latents[frozen.latents[0].name]["fn"].batch_shape)
    reparam = NeuTraReparam(frozen)
    frozen.get_transform = lambda: _Once(frozen.flow.bijection, rows)

    @torch.no_grad()
    def sites(z: Tensor) -> dict[str, Tensor]:
        return guide._constrain(_pushed(frozen.flow, z))

    return reparam.reparam(_Feasible(guide.flow.dtype)(model)), sites


class _Point(dist.ImproperUniform):
    """An improper prior that gives a feasible point, by which Pyro's MCMC learns the shapes of a model."""

    dtype = torch.float32

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return initial_value({"fn": self}, torch.empty((), dtype=self.dtype)).expand((*sample_shape, *self.shape()))


class _Feasible(Messenger):
    """Puts points in the place of improper priors."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if type(fn) is dist.ImproperUniform and not msg["is_observed"]:
            msg["fn"] = _Point(fn.support, fn.batch_shape, fn.event_shape)
            msg["fn"].dtype = self.dtype


def _is_whole(mask: Any) -> bool:
    return mask is None or bool(torch.as_tensor(mask).all())


class _Once:
    """A transform whose log-determinant Pyro adds to every row of the first site's plates."""

    def __init__(self, bijection: Bijection, rows: int):
        self.bijection, self.rows = bijection, rows

    def __call__(self, z: Tensor) -> Tensor:
        u: Tensor = self.bijection(z)
        return u

    def log_abs_det_jacobian(self, z: Tensor, u: Tensor) -> Tensor:
        return self.bijection.log_abs_det_jacobian(z, u) / self.rows


@torch.no_grad()
def _pushed(flow: Flow, z: Tensor) -> Tensor:
    return flow.bijection.forward_and_log_det(z)[0]


def run_chains(guide: AutoFlow, places: Tensor, num_draws: int, num_warmup: int, progress: bool | None) -> Tensor:
    """Run NUTS from places in unconstrained space; give draws there, ``(chains, draws, latents)``."""
    log_joint = guide.log_joint
    if log_joint is None:
        raise ValueError("expected a guide with its model; got one without, as after unpickling")
    model, _ = neutra(log_joint.model, guide)
    flow: Flow = guide.flow
    chains = []
    with torch.no_grad():
        starts = flow.bijection.inverse_and_log_det(places)[0]
    for start in starts:
        kernel = NUTS(model, full_mass=False, max_tree_depth=8)
        site = f"{guide.latents[0].name}_shared_latent"
        mcmc = MCMC(
            kernel,
            num_samples=num_draws,
            warmup_steps=num_warmup,
            initial_params={site: start},
            disable_progbar=not (progress or (progress is None and _on_terminal())),
        )
        mcmc.run(*log_joint.args, **log_joint.kwargs)
        chains.append(_pushed(flow, mcmc.get_samples()[site]))
    return torch.stack(chains)


def _on_terminal() -> bool:
    return sys.stderr.isatty()
