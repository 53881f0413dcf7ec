"""Objectives for Pyro's SVI: the ELBO with its path gradient, a tempered one, and the importance-weighted bound."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from pyro.util import check_model_guide_match, check_site_shape, warn_if_nan
from torch import Tensor

from pyroflows.arguments import check_number, check_option, check_sizes
from pyroflows.inference.path_gradient import DrawsAsLeaves, Particles, type_name

__all__ = ["ImportanceWeightedELBO", "PathELBO", "TemperedELBO"]


class _ReparameterizedELBO(ELBO):
    """An objective by one run of the guide, whose draws are replaced by leaves."""

    gradient = "path"
    likelihood = entropy = 1.0  # weights

    def __init__(
        self,
        num_particles: int = 1,
        *,
        vectorize_particles: bool = False,
        max_plate_nesting: float = math.inf,
        retain_graph: bool | None = None,
    ):
        check_sizes(num_particles=num_particles)
        super().__init__(
            num_particles=num_particles,
            vectorize_particles=vectorize_particles,
            max_plate_nesting=max_plate_nesting,
            retain_graph=retain_graph,
        )

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Return an estimate of the loss."""
        with torch.no_grad():
            runs = list(self._get_traces(model, guide, args, kwargs))
            loss = -self._bound(torch.cat([run.log_weights for run in runs])).item()
        warn_if_nan(loss, "loss")
        return loss

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return an estimate of the loss as a tensor, whose gradient is the objective's."""
        loss: Any = 0.0
        for bound, surrogate in self._terms(model, guide, args, kwargs):
            loss = loss - bound - (surrogate - surrogate.detach())
        warn_if_nan(loss, "loss")
        return loss

    def loss_and_grads(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Return an estimate of the loss, and add its gradient to that of every parameter."""
        loss = 0.0
        for bound, surrogate in self._terms(model, guide, args, kwargs):
            loss -= bound.item()
            if surrogate.requires_grad:
                (-surrogate).backward(retain_graph=self.retain_graph)
        warn_if_nan(loss, "loss")
        return loss

    def _bound(self, log_weights: Tensor) -> Tensor:
        return log_weights.mean()

    def _terms(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the terms of the bound, each with its surrogate: one for each run, so that its memory can be freed."""
        for run in self._get_traces(model, guide, args, kwargs):
            weights = torch.full_like(run.log_weights, 1 / self.num_particles)
            yield (weights * run.log_weights.detach()).sum(), run.surrogate(weights, weights)

    def _get_trace(self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any) -> Particles:
        if isinstance(unwrapped := poutine.unwrap(guide), Messenger):
            raise TypeError(
                f"expected a guide that is a function or a module; got the messenger {type(unwrapped).__name__}"
            )
        messenger = DrawsAsLeaves(leaves=self.gradient == "path" and torch.is_grad_enabled())
        guide_trace = poutine.trace(messenger(guide)).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        for name, site in model_trace.iter_stochastic_nodes():
            if name not in guide_trace and not site_is_subsample(site):
                raise ValueError(
                    f"expected a guide that draws every latent of the model, none of them enumerated; got none for "
                    f"{name!r} of {type_name(site['fn'])}"
                )
        if is_validation_enabled():
            check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
        model_trace, guide_trace = prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)
        draws = messenger.draws
        for name, draw in draws.items():
            if draw.density is not None:
                site = guide_trace.nodes[name]
                site["log_prob"] = scale_and_mask(draw.density.leaf, site["scale"], site["mask"])
                site["log_prob_sum"] = site["log_prob"].sum()
        model_trace.compute_log_prob()
        guide_trace.compute_log_prob()
        model_sites, guide_sites = _samples(model_trace), _samples(guide_trace)
        if is_validation_enabled():
            for site in (*model_sites.values(), *guide_sites.values()):
                check_site_shape(site, self.max_plate_nesting)

        joint = [(site["log_prob"], self.likelihood if site["is_observed"] else 1.0) for site in model_sites.values()]
        joint += [(site["log_prob"], -self.entropy) for name, site in guide_sites.items() if name not in draws]
        rows = self._sum(joint)
        entropies = [(guide_sites[name]["log_prob"], -self.entropy) for name in draws]
        return Particles(rows, rows + self._sum(entropies) if draws else rows, list(draws.values()))

    def _sum(self, terms: Iterable[tuple[Tensor, float]]) -> Tensor:
        """Sum weighted log-densities to one number for each particle."""
        vectorized = self.vectorize_particles and self.num_particles > 1
        rows: Any = 0.0
        for term, weight in terms:
            row = term[:, None].flatten(1).sum(-1) if vectorized else term.sum()[None]
            rows = rows + (row if weight == 1 else weight * row)
        return rows if isinstance(rows, Tensor) else torch.zeros(self.num_particles if vectorized else 1)


def _samples(trace: Any) -> dict[str, Any]:
    return {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}


class PathELBO(_ReparameterizedELBO):
    r"""The ELBO with its path gradient, which is zero if guide and posterior agree ("sticking the landing").

    .. math::
        \nabla_\phi = \mathbb E\left[\left(\frac{\partial z}{\partial \phi}\right)^\top
        \nabla_z \left(\log p(y, z) - \log q_\phi(z)\right)\right], \qquad z = z(\epsilon; \phi)

    Compared to the total gradient of Pyro's ``Trace_ELBO`` it leaves out :math:`\nabla_\phi \log q_\phi(z)` at a fixed
    z, whose expectation is zero: both are unbiased; the path gradient has the smaller variance near the optimum and the
    larger one far from it. Parameters of the model get their ordinary gradient, and so do those of the guide that enter
    through ``Delta`` sites.

    The guide may be any whose sites have an ``rsample``: Pyro's autoguides, hierarchical guides, flows. It runs once,
    and no parameter is copied. A flow of this package computes the gradient of its log-density in the forward pass
    (:meth:`Bijection.forward_and_score`); any other transformed distribution is inverted.

    Args:
        num_particles: number of draws in a step.
        vectorize_particles: whether guide and model run once for all of them, in an outermost plate.
        max_plate_nesting: number of nested plates; by default found by a run.
        retain_graph: whether the graph is kept after a step.

    Raises:
        TypeError: the guide has a site without ``rsample``, or is a messenger.
        ValueError: num_particles is not positive, or the guide does not draw a latent of the model, for example an
            enumerated one.

    References:
        Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational Inference, Roeder et al.,
        2017 (arXiv:1703.09194);
        Fast and Unified Path Gradient Estimators for Normalizing Flows, Vaitl et al., 2024 (arXiv:2403.15881).

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> from pyroflows import realnvp
        >>> _ = torch.manual_seed(0)
        >>> flow = realnvp(2, num_layers=2, hidden_features=(8,))
        >>> def model():
        ...     pyro.sample("z", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        >>> def guide():
        ...     pyro.module("flow", flow)
        ...     pyro.sample("z", flow())
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), PathELBO(32, vectorize_particles=True))
        >>> losses = [svi.step() for _ in range(100)]
        >>> losses[0] > 0.5, losses[-1] < 0.1
        (True, True)
    """


class TemperedELBO(_ReparameterizedELBO):
    r"""An ELBO with weights on the log-likelihood and on the entropy, which may be changed between steps.

    .. math:: \mathbb E_q\left[\beta \log p(y \mid z) + \log p(z) - \tau \log q(z)\right]

    A likelihood weight that grows to one anneals the posterior from the prior; an entropy weight that falls from above
    to one keeps a guide wide while it searches for modes. The likelihood is that of all observed sites, including
    ``pyro.factor``.

    Args:
        num_particles: number of draws in a step.
        entropy: the weight :math:`\tau`.
        likelihood: the weight :math:`\beta`.
        gradient: "path", as in :class:`PathELBO`, or "total".
        options: other arguments of :class:`PathELBO`.

    Raises:
        TypeError: as for :class:`PathELBO`, or a weight is not a number.
        ValueError: as for :class:`PathELBO`, or a weight is negative, or the gradient is unknown.

    References:
        Variational Inference with Normalizing Flows, Rezende and Mohamed, 2015 (arXiv:1505.05770).

    Example:
        >>> elbo = TemperedELBO(likelihood=0.1)
        >>> elbo.likelihood = 0.2  # before the next step
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        entropy: float = 1.0,
        likelihood: float = 1.0,
        gradient: str = "path",
        **options: Any,
    ):
        super().__init__(num_particles, **options)
        check_option("gradient", gradient, ("path", "total"))
        self.gradient = gradient
        self.entropy, self.likelihood = entropy, likelihood

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("entropy", "likelihood"):
            check_number(name, value, "[0, inf)")
            value = float(value)
        super().__setattr__(name, value)


class ImportanceWeightedELBO(_ReparameterizedELBO):
    r"""The importance-weighted bound, with the doubly reparameterised gradient for the guide.

    .. math::
        \mathbb E\left[\log \frac1K \sum_k w_k\right], \quad w_k = \frac{p(y, z_k)}{q_\phi(z_k)}, \qquad
        \nabla_\phi = \mathbb E\left[\sum_k \tilde w_k^2 \left(\frac{\partial z_k}{\partial \phi}\right)^\top
        \nabla_{z_k} \log w_k\right], \quad \tilde w_k = \frac{w_k}{\sum_j w_j}

    Parameters of the model, and those of the guide that enter through ``Delta`` sites, get the bound's own gradient,
    with the weights :math:`\tilde w_k`. A weight is that of a particle's joint draw, over all rows of all plates. If
    the rows of a plate are independent given the rest, as in a VAE, this is looser than the sum of bounds row by row;
    with subsampling, which scales the logarithms, it does not bound the evidence of all rows.

    Args:
        num_particles: the number K of draws in the bound.
        vectorize_particles: as for :class:`PathELBO`, like the arguments after it.
        max_plate_nesting: likewise.
        retain_graph: likewise.

    Raises:
        TypeError: as for :class:`PathELBO`.
        ValueError: as for :class:`PathELBO`.

    References:
        Importance Weighted Autoencoders, Burda et al., 2016 (arXiv:1509.00519);
        Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives, Tucker et al., 2019 (arXiv:1810.04152).

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> def guide():
        ...     pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 1.0))
        >>> _ = torch.manual_seed(0)
        >>> ImportanceWeightedELBO(1000, vectorize_particles=True).loss(model, guide) < 0.05  # KL of 0.125
        True
    """

    def _bound(self, log_weights: Tensor) -> Tensor:
        return log_weights.logsumexp(0) - math.log(self.num_particles)

    def _terms(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
    ) -> Iterator[tuple[Tensor, Tensor]]:
        runs = list(self._get_traces(model, guide, args, kwargs))
        log_weights = torch.cat([run.log_weights.detach() for run in runs])
        shares = log_weights.softmax(0).split([len(run.log_weights) for run in runs])
        surrogates = [run.surrogate(share, share.square()) for run, share in zip(runs, shares, strict=True)]
        yield self._bound(log_weights), torch.stack(surrogates).sum()
