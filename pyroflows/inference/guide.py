"""A flow as the guide of any Pyro model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import broadcast_shape, sum_rightmost
from pyro.infer.autoguide import AutoContinuous, AutoGuide
from pyro.params.param_store import param_with_module_name
from torch import Size, Tensor
from torch.distributions import biject_to, register_kl

from pyroflows.arguments import check_number, check_option, check_sizes
from pyroflows.bijection import Bijection
from pyroflows.flow import Flow
from pyroflows.inference.init import STARTS, Start, find_start
from pyroflows.inference.log_joint import LatentSite, LogJoint, checked_values, constrain, supports_at, unconstrain
from pyroflows.layers import TriangularAffine
from pyroflows.models import iaf, maf, nsf, realnvp

__all__ = ["AutoFlow"]

_SMALL: dict[str, Any] = {"hidden_features": (64, 64)}
_OPTIONS: dict[Callable[..., Flow], dict[str, Any]] = {
    # Whitened latents need neither mixing nor norms; what is the identity at the start begins at the Gaussian.
    realnvp: {**_SMALL, "num_layers": 8, "permutation": "none", "norm": "none"},
    iaf: {**_SMALL, "num_layers": 4, "permutation": "reverse", "norm": "none"},
    maf: {**_SMALL, "num_layers": 4, "permutation": "reverse", "norm": "none"},
    nsf: {**_SMALL, "num_layers": 4, "permutation": "none", "norm": "none", "bound": 5.0},
}


class AutoFlow(AutoContinuous):
    r"""A flow over all continuous latents of a model, in unconstrained space, as a Pyro autoguide.

    .. math:: u = m + S (A f(z) + b), \qquad z \sim N(0, I)

    A trainable lower-triangular layer nearest the data starts at the mean :math:`m` and the scale :math:`S` of a
    Gaussian found first, and the flow :math:`f` inside it starts at or near the identity: whatever the scales of the
    posterior, the guide starts at that Gaussian. It is used as any other guide, with ``SVI`` and any ELBO of Pyro's.

    The guide is built by :meth:`setup` from the arguments of the model: at construction where they are given or where
    the model needs none, else in its first call. Dtype and device are those of the model's densities.

    Args:
        model: a Pyro model.
        flow: a builder of named flows (``realnvp``, ``iaf``, ``nsf``, ``maf``, ``planar``, ...), called with the number
            of latents; or a ready ``Flow`` over as many features. A single latent gets splines instead of couplings.
        init: the Gaussian to start at: "auto", "laplace", "pathfinder", "fullrank", "meanfield", or "none" for the
            model's initial values; see :func:`find_start`.
        max_triangular: the number of latents above which the layer is diagonal.
        args: arguments of the model to build the guide from at once.
        kwargs: keyword arguments of the model, likewise.
        options: of the builder, such as ``num_layers=6``.

    Shapes:
        draws: a dict from each site to a tensor ``(draws, *shape)``, shape being the site's, plates included.

    Raises:
        ValueError: the model has no continuous latents, latents in a subsampled plate or discrete latents that are not
            marked for enumeration, or a ready flow of another shape.

    References:
        Automatic Differentiation Variational Inference, Kucukelbir et al., 2017 (arXiv:1603.00788);
        Advances in Black-Box VI, Agrawal et al., 2020 (arXiv:2006.10343).

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.HalfNormal(2.0))
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Normal(0.0, scale), obs=y)
        >>> y = torch.tensor([1.0, -2.0, 0.5])
        >>> guide = AutoFlow(model).setup(y)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        >>> loss = svi.step(y)
        >>> guide.draws(5)["scale"].shape
        torch.Size([5])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        flow: Callable[..., Flow] | Flow = realnvp,
        init: str = "auto",
        *,
        max_triangular: int = 512,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ):
        if not callable(model):
            raise TypeError(f"expected a Pyro model, a callable; got {type(model).__name__}")
        check_option("init", init, STARTS)
        check_sizes(max_triangular=max_triangular)
        if isinstance(flow, Flow) and options:
            raise TypeError(f"expected no options beside a ready flow; got {', '.join(options)}")
        if not isinstance(flow, Flow) and not callable(flow):
            raise TypeError(f"expected flow to be a builder or a Flow; got {flow!r}")
        # Not AutoContinuous's own, which would look for initial values again in every run of the model.
        AutoGuide.__init__(self, model)
        self.init, self.max_triangular = init, max_triangular
        self.log_joint: LogJoint | None = None
        self.latents: list[LatentSite] = []
        self.starts: list[Start] = []
        self._recipe = (flow, options)
        if args is not None or kwargs is not None or _needs_no_arguments(model):
            self.setup(*(args or ()), **(kwargs or {}))

    def setup(self, *args: Any, **kwargs: Any) -> AutoFlow:
        """Build the guide from the model's arguments, start included, and give it."""
        self._setup_prototype(*args, **kwargs)
        return self

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        log_joint = LogJoint(self.model, args, kwargs)
        hidden = [name for name, marked in log_joint.enumerated.items() if not marked]
        if hidden:
            raise ValueError(
                f"expected discrete latents marked for enumeration, as by pyro.infer.config_enumerate, beside an ELBO "
                f"that sums them out; got {', '.join(map(repr, hidden))}"
            )
        self._adopt(log_joint, find_start(log_joint, self.init, diagonal=log_joint.dim > self.max_triangular))

    def _adopt(self, log_joint: LogJoint, starts: Sequence[Start]) -> None:
        """Take the structure of a model, and start at the first of the Gaussians."""
        self.log_joint, self.latents, self.starts = log_joint, log_joint.latents, list(starts)
        self.latent_dim = log_joint.dim
        self.prototype_trace = _trace_of(log_joint.first_run)
        frames = {f.name: f for site in log_joint.first_run.values() for f in site["cond_indep_stack"] if f.vectorized}
        self._prototype_frames = frames
        self._unconstrained_shapes = {site.name: site.unconstrained_shape for site in self.latents}
        self._cond_indep_stacks = {
            name: tuple(frame for frame in site["cond_indep_stack"] if frame.vectorized)
            for name, site in log_joint.first_run.items()
        }
        inner = self._inner_flow()
        whitening = TriangularAffine(self.latent_dim, diagonal=self.latent_dim > self.max_triangular)
        self.flow = Flow(inner.prior, [*inner.layers, whitening]).to(log_joint.device, log_joint.dtype)
        whitening.start_at(starts[0].loc, starts[0].scale_tril)

    def _inner_flow(self) -> Flow:
        given, options = self._recipe
        if isinstance(given, Flow):
            flow = copy.deepcopy(given)
        else:
            # A coupling of a single feature keeps nothing to learn from: only splines bend it.
            splines = given is realnvp and set(options) <= set(inspect.signature(nsf).parameters)
            builder = nsf if self.latent_dim == 1 and splines else given
            flow = builder(self.latent_dim, **{**_OPTIONS.get(builder, {}), **options})
        if not isinstance(flow, Flow):
            raise TypeError(f"expected a builder that gives a Flow; got one that gives {type(flow).__name__}")
        if flow.event_shape != (self.latent_dim,) or flow.context_features:
            raise ValueError(
                f"expected a flow over {self.latent_dim} features, as many as the model has latents, without "
                f"context; got one of {tuple(flow.event_shape)} and context_features={flow.context_features}"
            )
        return flow

    # Pyro's protocol

    def get_base_dist(self) -> dist.TorchDistribution:
        return self._built().prior()

    def get_transform(self, *args: Any, **kwargs: Any) -> Bijection:
        return self._built().bijection

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TransformedDistribution:
        """Give the distribution of the unconstrained vector, of event shape ``(latents,)``."""
        return self._built()()

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        if self.prototype_trace is None:
            self.setup(*args, **kwargs)
        self._state_parameters()
        latent = self.sample_latent(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        parts = self._parts(latent)
        supports = {site.name: site.support for site in self.latents}
        if None in supports.values():
            supports = self._supports(parts, args, kwargs)
        result, counts = {}, poutine.get_mask() is not False
        for name, part in parts.items():
            transform, event_dim = biject_to(supports[name]), self.prototype_trace.nodes[name]["fn"].event_dim
            value = transform(part)
            log_density: Any = 0.0
            if counts:
                log_density = -transform.log_abs_det_jacobian(part, value)
                log_density = sum_rightmost(log_density, log_density.dim() - value.dim() + event_dim)
            delta = _Value(value, log_density=log_density, event_dim=event_dim)
            with ExitStack() as stack:
                for frame in self._cond_indep_stacks[name]:
                    stack.enter_context(plates[frame.name])
                result[name] = pyro.sample(name, delta)
        return result

    def _state_parameters(self) -> None:
        """Make Pyro's statement of every parameter, in a walk that a call makes once.

        What another guide left in Pyro's store under these names is taken out: it would be trained in their place.
        """
        if not self._pyro_context.active or pyro.settings.get("module_local_params"):
            _ = self.flow  # local parameters have statements of their own, which Pyro makes here
            return
        store, name = pyro.get_param_store(), self._pyro_get_fullname("flow")
        stored = dict(store.named_parameters())
        for own, parameter in self._modules["flow"].named_parameters():
            full = param_with_module_name(name, own)
            if stored.get(full, parameter) is not parameter:
                del store[full]
            if parameter.requires_grad:
                pyro.param(full, parameter)

    def _parts(self, latent: Tensor) -> dict[str, Tensor]:
        """Cut the unconstrained vector into the parts of the sites, with its batch left of their plates."""
        parts = {}
        for site in self.latents:
            event = (1,) * (len(site.unconstrained_shape) - site.batch_ndim)
            shape = broadcast_shape(site.unconstrained_shape, (*latent.shape[:-1], *event))
            parts[site.name] = latent[..., site.start : site.stop].view(shape)
        return parts

    def _supports(self, parts: dict[str, Tensor], args: Any, kwargs: Any) -> dict[str, Any]:
        """Run the model for supports that depend on other sites."""
        self._refuse_dependent_supports()
        return supports_at(self.model, parts, args, kwargs)

    # The posterior

    def draws(self, n: int) -> dict[str, Tensor]:
        """Draw values of the sites, each ``(n, *shape)``, without gradients."""
        with torch.no_grad():
            return self._constrain(self._built().sample(n))

    def sample_posterior(self, n: int) -> dict[str, Tensor]:
        """Draw values of the sites: another name of :meth:`draws`."""
        return self.draws(n)

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Give the guide's log-density, ``(points,)``, of the sites' values, each ``(points, *shape)``."""
        flow, values = self._built(), checked_values(self.latents, values)
        if self.log_joint is not None:
            u, log_det = self.log_joint.unconstrain(values)
        else:
            self._refuse_dependent_supports()
            u, log_det = unconstrain(self.latents, values)
        return flow.log_prob(u.to(flow.dtype)) - log_det

    @torch.no_grad()
    def quantiles(self, quantiles: Any, *args: Any, num_draws: int = 10_000, **kwargs: Any) -> dict[str, Tensor]:
        """Give quantiles of each number of each site, ``(quantiles, *shape)``, from draws."""
        flow = self._built()
        levels = torch.as_tensor(quantiles, dtype=flow.dtype, device=flow.device)
        for level in levels.flatten().tolist():
            check_number("quantiles", level, "[0, 1]")
        check_sizes(num_draws=num_draws)
        return {name: torch.quantile(value, levels, dim=0) for name, value in self.draws(num_draws).items()}

    def median(self, *args: Any, num_draws: int = 10_000, **kwargs: Any) -> dict[str, Tensor]:
        """Give the median of each number of each site, from draws."""
        return self.quantiles(0.5, num_draws=num_draws)

    def _constrain(self, u: Tensor) -> dict[str, Tensor]:
        if self.log_joint is not None:
            return self.log_joint.constrain(u)
        self._refuse_dependent_supports()
        return constrain(self.latents, u)

    def _refuse_dependent_supports(self) -> None:
        if self.model is None and any(site.support is None for site in self.latents):
            raise ValueError(
                "expected a guide with its model, since a support depends on other sites; got one without, as after "
                "unpickling: build it from the model and load its state_dict"
            )

    def _built(self) -> Flow:
        if self.prototype_trace is None:
            raise ValueError("expected a guide that is built: call guide.setup(...) with the model's arguments first")
        # Not self.flow, which makes Pyro's statement of every parameter anew inside a call.
        flow: Any = self._modules["flow"]
        return flow

    # What a guide that is not built would do silently

    def _apply(self, fn: Any, recurse: bool = True) -> AutoFlow:
        self._built()
        return super()._apply(fn, recurse)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        self._built()
        return super().named_parameters(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._built()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._built()
        return super().load_state_dict(*args, **kwargs)

    # Copies keep the model; pickles, which cannot in general, do without it and its data

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoFlow:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        shared = ("_model", "log_joint", "master")
        state = {k: v if k in shared else copy.deepcopy(v, memo) for k, v in self.__dict__.items()}
        new.__dict__.update(state)
        return new

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_model": (None,), "master": None, "log_joint": None}
        # What Pyro's store hangs on parameters that it has seen, no pickle takes, and no copy has.
        state["_modules"] = copy.deepcopy(self._modules)
        if self.prototype_trace is not None:
            sites = self.prototype_trace.nodes.items()
            bare = {name: {**site, "fn": _without_numbers(site["fn"])} for name, site in sites}
            state["prototype_trace"] = _trace_of(bare)
        return state


def _trace_of(sites: Mapping[str, Mapping[str, Any]]) -> poutine.Trace:
    trace = poutine.Trace()
    for name, site in sites.items():
        trace.add_node(name, **site)
    return trace


def _without_numbers(fn: Any) -> dist.ImproperUniform:
    """Give the shapes and the support of a prior, which may hold data or parameters, and none of its numbers."""
    return dist.ImproperUniform(fn.support, fn.batch_shape, fn.event_shape)


class _Value(dist.Delta):
    """A point with a log-density, which KL divergences count: Pyro's own of a Delta, as in TraceMeanField_ELBO, not."""

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return super().rsample(Size(sample_shape)) if sample_shape else self.v

    def log_prob(self, x: Tensor) -> Tensor:
        return self.log_density if x is self.v else super().log_prob(x)


@register_kl(_Value, dist.Distribution)
def _kl_value(p: _Value, q: Any) -> Tensor:
    divergence: Tensor = p.log_density - q.log_prob(p.v)
    return divergence


def _needs_no_arguments(model: Callable[..., Any]) -> bool:
    try:
        inspect.signature(model).bind()
    except (TypeError, ValueError):
        return False
    return True
