"""Objectives for Pyro's SVI: the ELBO with its path gradient, a tempered one, and the importance-weighted bound."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from pyro.util import check_model_guide_match, check_site_shape, warn_if_nan
from torch import Tensor
from torch.distributions import TransformedDistribution

from pyroflows.arguments import check_number, check_option, check_sizes
from pyroflows.bijection import Bijection
from pyroflows.gradients import vjp
from pyroflows.inference.sites import nested

__all__ = ["ImportanceWeightedELBO", "PathELBO", "TemperedELBO"]

_Program = Callable[..., Any]


# Path gradients of log weights: by the draws of a guide alone, without those of its log-density at fixed draws


class _ScoredDensity(NamedTuple):
    """The log-density of a flow at its own draw, with its graph and as a leaf, and its gradient by the draw."""

    log_prob: Tensor
    leaf: Tensor
    score: Tensor


class _Draw(NamedTuple):
    """A draw of the guide with its graph, the leaf that replaces it in guide and model, and a flow's density."""

    value: Tensor
    leaf: Tensor
    density: _ScoredDensity | None


def _is_flow(fn: Any) -> bool:
    return (
        isinstance(fn, TransformedDistribution)
        and bool(fn.transforms)
        and all(isinstance(transform, Bijection) for transform in fn.transforms)
        and len(fn.base_dist.event_shape) == fn.transforms[0].domain.event_dim
    )


def _draw_and_score(flow: TransformedDistribution) -> tuple[Tensor, _ScoredDensity]:
    """Draw from a flow; return the draw, and its log-density with the score, by one forward pass."""
    x = flow.base_dist.rsample()
    x = x if x.requires_grad else x.requires_grad_()
    log_prob = flow.base_dist.log_prob(x)
    score = vjp(log_prob, None, x, torch.ones_like(log_prob))
    for layer in flow.transforms:
        x, log_det, score = layer.forward_and_score(x, score)  # type: ignore[attr-defined]
        log_prob = log_prob - log_det
    return x, _ScoredDensity(log_prob, log_prob.detach().requires_grad_(), score)


class _DrawsAsLeaves(Messenger):
    """Refuses a site of the guide without reparametrised draws and, on request, replaces the draws by leaves."""

    def __init__(self, leaves: bool):
        super().__init__()
        self.leaves = leaves
        self.draws: dict[str, _Draw] = {}

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if site_is_subsample(msg) or any(isinstance(inner, Delta) for inner in nested(fn)):
            return  # an index, or a function of earlier draws and parameters
        if not getattr(fn, "has_rsample", False):
            got = f"{msg['name']!r} of {_type_name(fn)}"
            raise TypeError(f"expected a guide whose sites all have an rsample; got {got}")
        if self.leaves and not (msg["done"] or msg["is_observed"] or msg["value"] is not None):
            args, kwargs = msg["args"], msg["kwargs"]
            plain = args or kwargs or not _is_flow(fn)
            value, density = (fn(*args, **kwargs), None) if plain else _draw_and_score(fn)
            draw = self.draws[msg["name"]] = _Draw(value, value.detach().requires_grad_(), density)
            msg["value"], msg["done"] = draw.leaf, True


def _type_name(fn: Any) -> str:
    """Return the name of a distribution's class, or of that inside if it is expanded, masked or reinterpreted."""
    fn = next((inner for inner in nested(fn) if isinstance(inner, TransformedDistribution)), [*nested(fn)][-1])
    return type(fn).__name__


class _Particles(NamedTuple):
    """A run of guide and model, one row for each particle."""

    joint: Tensor  # the log-joint, minus the log-densities of the guide's Delta sites
    log_weights: Tensor  # ``joint`` minus the log-densities of the draws
    draws: list[_Draw]  # of the guide, if they were replaced by leaves

    def surrogate(self, weights: Tensor, path_weights: Tensor) -> Tensor:
        """Return a number with the gradient of the weighted log-weights: by the path, or in total without leaves."""
        if not self.draws:
            return (weights * self.log_weights).sum()
        pairs = zip(self._path_gradients(path_weights), self.draws, strict=True)
        terms = [(gradient * draw.value).sum() for gradient, draw in pairs if draw.value.requires_grad]
        if _has_other_leaves(self.joint, [draw.leaf for draw in self.draws]):
            terms.append((weights * self.joint).sum())
        return sum(terms, self.joint.new_zeros(()))

    def _path_gradients(self, weights: Tensor) -> list[Tensor]:
        """Return the gradient of the weighted log-weights by every draw, also through the later draws it leads to."""
        leaves = [draw.leaf for draw in self.draws]
        densities = [draw.density for draw in self.draws if draw.density is not None]
        partials = _gradients((weights * self.log_weights).sum(), [*leaves, *(density.leaf for density in densities)])
        of_densities = iter(partials[len(leaves) :])

        totals, paths = [], []
        for draw, partial in zip(self.draws, partials, strict=False):
            paths.append((draw.value, partial))
            if draw.density is not None:
                of_density = next(of_densities)
                # A flow's log-density depends on earlier draws, through its context. The path through its own draw
                # cancels against the score on the way back, so that neither is included.
                paths.append((draw.density.log_prob, of_density))
                event_dim = partial.dim() - of_density.dim()
                partial = partial + of_density.reshape(of_density.shape + (1,) * event_dim) * draw.density.score
            totals.append(partial)

        while len(leaves) > 1 and (paths := [path for path in paths if path[0].requires_grad and path[1] is not None]):
            values, gradients = zip(*paths, strict=True)
            earlier = torch.autograd.grad(values, leaves, gradients, retain_graph=True, allow_unused=True)
            totals = [a if b is None else a + b for a, b in zip(totals, earlier, strict=True)]
            paths = [(draw.value, b) for draw, b in zip(self.draws, earlier, strict=True)]
        return totals


def _gradients(result: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    if not result.requires_grad:
        return tuple(map(torch.zeros_like, leaves))
    return torch.autograd.grad(result, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)


def _has_other_leaves(result: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Whether the result depends on another leaf, a parameter; otherwise a backward pass can be saved."""
    known, seen, stack = {id(leaf) for leaf in leaves}, set(), [result.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            return True
        stack.extend(input_node for input_node, _ in node.next_functions)
    return False


class _ReparameterizedELBO(ELBO):
    """An objective by one run of the guide, whose draws are replaced by leaves."""

    gradient = "path"
    likelihood = entropy = 1.0  # weights

    def __init__(self, num_particles: int = 1, **options: Any):
        check_sizes(num_particles=num_particles)
        super().__init__(num_particles, **options)

    def loss(self, model: _Program, guide: _Program, *args: Any, **kwargs: Any) -> float:
        """Return an estimate of the loss."""
        with torch.no_grad():
            return self.loss_and_grads(model, guide, *args, **kwargs)

    def differentiable_loss(self, model: _Program, guide: _Program, *args: Any, **kwargs: Any) -> Tensor:
        """Return an estimate of the loss as a tensor, whose gradient is the objective's."""
        loss: Any = 0.0
        for bound, surrogate in self._terms(model, guide, args, kwargs):
            loss = loss - bound - (surrogate - surrogate.detach())
        warn_if_nan(loss, "loss")
        return loss

    def loss_and_grads(self, model: _Program, guide: _Program, *args: Any, **kwargs: Any) -> float:
        """Return an estimate of the loss, and add its gradient to that of every parameter."""
        loss = 0.0
        for bound, surrogate in self._terms(model, guide, args, kwargs):
            loss -= bound.item()
            if surrogate.requires_grad:
                (-surrogate).backward(retain_graph=self.retain_graph)
        warn_if_nan(loss, "loss")
        return loss

    def _terms(self, model: _Program, guide: _Program, args: Any, kwargs: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the terms of the bound, each with its surrogate: one for each run, so that its memory can be freed."""
        for run in self._get_traces(model, guide, args, kwargs):
            weights = torch.full_like(run.log_weights, 1 / self.num_particles)
            yield (weights * run.log_weights.detach()).sum(), run.surrogate(weights, weights)

    def _get_trace(self, model: _Program, guide: _Program, args: Any, kwargs: Any) -> _Particles:
        if isinstance(inner := poutine.unwrap(guide), Messenger):
            got = f"the messenger {type(inner).__name__}"
            raise TypeError(f"expected a guide that is a function or a module; got {got}")
        messenger = _DrawsAsLeaves(leaves=self.gradient == "path" and torch.is_grad_enabled())
        guide_trace = poutine.trace(messenger(guide)).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        for name, site in model_trace.iter_stochastic_nodes():
            if name not in guide_trace and not site_is_subsample(site):
                expected = "a guide that draws every latent of the model, none of them enumerated"
                raise ValueError(f"expected {expected}; got none for {name!r} of {_type_name(site['fn'])}")
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
        model_sites, guide_sites = (
            {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
            for trace in (model_trace, guide_trace)
        )
        if is_validation_enabled():
            for site in (*model_sites.values(), *guide_sites.values()):
                check_site_shape(site, self.max_plate_nesting)

        joint = [(site["log_prob"], self.likelihood if site["is_observed"] else 1.0) for site in model_sites.values()]
        joint += [(site["log_prob"], -self.entropy) for name, site in guide_sites.items() if name not in draws]
        rows = self._sum(joint)
        entropies = [(guide_sites[name]["log_prob"], -self.entropy) for name in draws]
        return _Particles(rows, rows + self._sum(entropies) if draws else rows, list(draws.values()))

    def _sum(self, terms: Iterable[tuple[Tensor, float]]) -> Tensor:
        """Sum weighted log-densities to one number for each particle."""
        vectorized = self.vectorize_particles and self.num_particles > 1
        rows: Any = 0.0
        for term, weight in terms:
            row = term[:, None].flatten(1).sum(-1) if vectorized else term.sum()[None]
            rows = rows + (row if weight == 1 else weight * row)
        return rows if isinstance(rows, Tensor) else torch.zeros(self.num_particles if vectorized else 1)


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
        options: of Pyro's ``ELBO``: ``vectorize_particles`` (guide and model run once for all draws, in an outermost
            plate), ``max_plate_nesting`` (by default found by a run), ``retain_graph``.

    Raises:
        TypeError: the guide has a site without ``rsample``, or is a messenger.
        ValueError: num_particles is not positive, or the guide does not draw a latent of the model, for example an
            enumerated one.

    References:
        Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational Inference, Roeder et al., 2017
        (arXiv:1703.09194); Fast and Unified Path Gradient Estimators for Normalizing Flows, Vaitl et al., 2024
        (arXiv:2403.15881).

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyroflows import realnvp
        >>> flow = realnvp(2, num_layers=2)
        >>> def model():
        ...     pyro.sample("z", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        >>> def guide():
        ...     pyro.module("flow", flow)
        ...     pyro.sample("z", flow())
        >>> elbo = PathELBO(32, vectorize_particles=True)
        >>> loss = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), elbo).step()
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
        TypeError or ValueError: as for :class:`PathELBO`, a weight is not in [0, inf), or the gradient is unknown.

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
        options: other arguments of :class:`PathELBO`, whose errors this class raises too.

    References:
        Importance Weighted Autoencoders, Burda et al., 2016 (arXiv:1509.00519); Doubly Reparameterized Gradient
        Estimators for Monte Carlo Objectives, Tucker et al., 2019 (arXiv:1810.04152).

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> def guide():
        ...     pyro.sample("z", dist.Normal(0.5, 1.0))
        >>> ImportanceWeightedELBO(1000, vectorize_particles=True).loss(model, guide) < 0.1  # the ELBO's is 0.125
        True
    """

    def _terms(self, model: _Program, guide: _Program, args: Any, kwargs: Any) -> Iterator[tuple[Tensor, Tensor]]:
        runs = list(self._get_traces(model, guide, args, kwargs))
        log_weights = torch.cat([run.log_weights.detach() for run in runs])
        shares = log_weights.softmax(0).split([len(run.log_weights) for run in runs])
        surrogates = [run.surrogate(share, share.square()) for run, share in zip(runs, shares, strict=True)]
        yield log_weights.logsumexp(0) - math.log(self.num_particles), torch.stack(surrogates).sum()
