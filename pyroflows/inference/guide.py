"""A flow as the guide of any Pyro model."""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import AutoContinuous, AutoGuide
from pyro.nn import PyroModule
from pyro.params.param_store import param_with_module_name
from torch import Size, Tensor, nn
from torch.distributions import biject_to, register_kl

from pyroflows.arguments import check_number, check_option, check_sizes
from pyroflows.bijection import Bijection
from pyroflows.flow import Flow
from pyroflows.inference.init import INIT_METHODS, GaussianInit, find_init
from pyroflows.inference.log_joint import Evaluation, LogJoint
from pyroflows.inference.sites import (
    LatentSite,
    Model,
    ModelStructure,
    check_model,
    check_values,
    constrain,
    unconstrain,
)
from pyroflows.layers import Affine, LULinear, TriangularAffine
from pyroflows.models import iaf, maf, nsf, realnvp
from pyroflows.private import inside_pyro_call, name_in_store

__all__ = ["AutoFlow", "Builder", "build_flow", "claim_parameters", "deepened", "start_of"]

Builder = Callable[..., Flow]

_OPTIONS: dict[Builder, dict[str, Any]] = {
    # Whitened latents need no norms; layers initialised to the identity start at the Gaussian. Bounded couplings bound
    # what one large step does to a draw: at a learning rate of 0.05 others run out of the range of float32.
    realnvp: {"num_layers": 8, "permutation": "none", "norm": "none", "scale": Affine(bound=1.0, shift_bound=3.0)},
    iaf: {"num_layers": 4, "permutation": "reverse", "norm": "none"},
    maf: {"num_layers": 4, "permutation": "reverse", "norm": "none"},
    nsf: {"num_layers": 4, "permutation": "none", "norm": "none", "bound": 5.0},
}
_WIDTHS = 32, 64  # of the networks: eight times the number of latents, within these


class AutoFlow(AutoContinuous):
    r"""A flow over all continuous latents of a model, in unconstrained space, as a Pyro autoguide.

    .. math:: u = m + S (A f(z) + b), \qquad z \sim N(0, I)

    A trainable lower-triangular layer nearest the data is initialised to the mean :math:`m` and the scale :math:`S` of
    a Gaussian approximation, and the flow :math:`f` inside it to the identity or nearly so: whatever the scales of the
    posterior, the guide starts at that Gaussian. It is used as any other guide, with ``SVI`` and any Pyro ELBO.

    The guide is built from the arguments of the model: by :meth:`setup`, or at construction if they are passed or the
    model needs none, or else in its first call. Dtype and device are those of the model's densities.

    Args:
        model: a Pyro model.
        flow: a builder of named flows (``realnvp``, ``iaf``, ``nsf``, ``maf``, ``planar``, ...), called with the number
            of latents; or a ready ``Flow`` over as many features. A single latent gets splines instead of couplings.
        init: the Gaussian to start at: "auto", "laplace", "pathfinder", "fullrank", "meanfield", or "none" for the
            model's initial values; see :func:`find_init`. Or values of sites, ``{site: value}``, to search from instead
            of the prior medians.
        max_triangular: the number of latents above which the layer is diagonal.
        args, kwargs: arguments of the model to build the guide from at once.
        log_joint: the density of the model, if it is at hand, to build the guide from instead.
        out_of_time: ends the search for a Gaussian once it returns true, see :func:`find_init`.
        options: of the builder, such as ``num_layers=6``.

    Attributes:
        log_joint: the density of the model; None after unpickling.
        latents: the latent sites.
        inits: the Gaussians found, the best first, at which the guide starts.

    Raises:
        ValueError: the model has no continuous latents, latents in a subsampled plate or discrete latents that are not
            marked for enumeration, or a ready flow has another shape.

    References:
        Automatic Differentiation Variational Inference, Kucukelbir et al., 2017 (arXiv:1603.00788);
        Advances in Black-Box VI, Agrawal et al., 2020 (arXiv:2006.10343).

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.HalfNormal(2.0))
        ...     pyro.sample("y", dist.Normal(0.0, scale.expand(len(y))).to_event(1), obs=y)
        >>> y = torch.tensor([1.0, -2.0, 0.5])
        >>> guide = AutoFlow(model).setup(y)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
        >>> loss = svi.step(y)
        >>> guide.draws(5)["scale"].shape
        torch.Size([5])
    """

    def __init__(
        self,
        model: Model,
        flow: Builder | Flow = realnvp,
        init: str | Mapping[str, Any] = "auto",
        *,
        max_triangular: int = 512,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        log_joint: LogJoint | None = None,
        out_of_time: Callable[[str], bool] | None = None,
        **options: Any,
    ):
        check_model(model)
        if not isinstance(init, Mapping):
            check_option("init", init, INIT_METHODS)
        check_sizes(max_triangular=max_triangular)
        if isinstance(flow, Flow) and options:
            raise TypeError(f"a ready flow cannot be combined with options of a builder; got {', '.join(options)}")
        if not isinstance(flow, Flow) and not callable(flow):
            raise TypeError(f"expected flow to be a builder or a Flow; got {flow!r}")
        # Not AutoContinuous's own, which would look for initial values again in every run of the model.
        AutoGuide.__init__(self, model)
        self.prototype_trace = _NotBuilt()
        self.init, self.max_triangular = init, max_triangular
        self.log_joint: LogJoint | None = None
        self.latents: list[LatentSite] = []
        self.inits: list[GaussianInit] = []
        self.options = options
        self._builder = (flow,)  # in a tuple, since a ready flow is copied, and is no part of the guide itself
        if log_joint is not None:
            self._build(log_joint, out_of_time)
        elif args is not None or kwargs is not None or _needs_no_arguments(model):
            self.setup(*(args or ()), **(kwargs or {}))

    def setup(self, *args: Any, **kwargs: Any) -> "AutoFlow":
        """Build the guide from the model's arguments, and initialise it; return the guide."""
        self._setup_prototype(*args, **kwargs)
        return self

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        self._build(LogJoint(self.model, args, kwargs, start=start_of(self.init)))

    def _build(self, log_joint: LogJoint, out_of_time: Callable[[str], bool] | None = None) -> None:
        if unmarked := ", ".join(repr(name) for name, marked in log_joint.structure.discrete.items() if not marked):
            example = "for example by pyro.infer.config_enumerate, and an ELBO that sums them out"
            raise ValueError(f"expected discrete latents marked for enumeration, {example}; got {unmarked}")
        self._patterns = {_pattern_of_none(log_joint.args, log_joint.kwargs)}
        method = self.init if isinstance(self.init, str) else "auto"
        diagonal = log_joint.dim > self.max_triangular
        inits = find_init(log_joint, method, diagonal=diagonal, out_of_time=out_of_time)
        self.log_joint, self.latents, self.inits = log_joint, log_joint.latents, inits
        nodes = log_joint.structure.latent_nodes
        # What Pyro's own methods read.
        self.latent_dim, self.prototype_trace = log_joint.dim, _trace_of(nodes)
        self._unconstrained_shapes = {site.name: site.unconstrained_shape for site in self.latents}
        self._cond_indep_stacks = {
            name: tuple(frame for frame in node["cond_indep_stack"] if frame.vectorized) for name, node in nodes.items()
        }
        self._prototype_frames = {frame.name: frame for stack in self._cond_indep_stacks.values() for frame in stack}
        inner = _inner_flow(*self._builder, self.options, self.latent_dim, rotate=not diagonal)
        whitening = TriangularAffine(self.latent_dim, diagonal=diagonal)
        self.flow = Flow(inner.prior, [*inner.layers, whitening]).to(log_joint.device, log_joint.dtype)
        whitening.start_at(inits[0].loc, inits[0].scale_tril)

    def like(self, log_joint: LogJoint, **options: Any) -> "AutoFlow":
        """Return a guide with the same kind of flow, not trained, for a density in any coordinates of its model."""
        options = {"max_triangular": self.max_triangular, "log_joint": log_joint, **self.options, **options}
        return AutoFlow(self.model, self._builder[0], "none", **options)

    def require_flow(self) -> Flow:
        """Return the flow; refuse a guide that is not built."""
        if isinstance(self.prototype_trace, _NotBuilt):
            raise self.prototype_trace.refusal
        # Not self.flow, which registers every parameter with Pyro again in a call.
        return cast(Flow, self._modules["flow"])

    # Pyro's protocol

    def get_base_dist(self) -> dist.TorchDistribution:
        return self.require_flow().prior()

    def get_transform(self, *args: Any, **kwargs: Any) -> Bijection:
        return self.require_flow().bijection

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TransformedDistribution:
        """Return the distribution of the unconstrained vector, of event shape ``(latents,)``."""
        return self.require_flow()()

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        if isinstance(self.prototype_trace, _NotBuilt):
            self.setup(*args, **kwargs)
        _check_sites(self, args, kwargs)
        self._register_parameters()
        vector = self.sample_latent(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        parts = {node["name"]: part for node, part in self._unpack_latent(vector)}
        transforms = _transforms(self, parts, args, kwargs)
        values = {}
        for name, part in parts.items():
            transform, event_dim = transforms[name], self.prototype_trace.nodes[name]["fn"].event_dim
            value = transform(part)
            log_density: Any = 0.0
            if poutine.get_mask() is not False:
                log_density = -transform.log_abs_det_jacobian(part, value)
                log_density = sum_rightmost(log_density, log_density.dim() - value.dim() + event_dim)
            delta = _Value(value, log_density=log_density, event_dim=event_dim)
            with ExitStack() as stack:
                for frame in self._cond_indep_stacks[name]:
                    stack.enter_context(plates[frame.name])
                values[name] = pyro.sample(name, delta)
        return values

    def _register_parameters(self) -> None:
        """Register every parameter with Pyro once."""
        if not inside_pyro_call(self) or pyro.settings.get("module_local_params"):
            _ = self.flow  # Pyro registers local parameters here
            return
        for name, parameter in claim_parameters(self, "flow", self.require_flow()).items():
            if parameter.requires_grad:
                pyro.param(name, parameter)

    def draws(self, n: int) -> dict[str, Tensor]:
        """Draw values of the sites, each ``(n, *shape)``, without gradients."""
        with torch.no_grad():
            return self.constrain(self.require_flow().sample(n))

    sample_posterior = draws

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the guide's log-density, ``(points,)``, of the sites' values, each ``(points, *shape)``."""
        flow, values = self.require_flow(), check_values(self.latents, values, points=True)
        if self.log_joint is not None:
            u, log_det = self.log_joint.unconstrain(values)
        else:
            self._refuse_dependent_supports()
            u, log_det = unconstrain(self.latents, values)
        return flow.log_prob(u.to(flow.dtype)) - log_det

    @torch.no_grad()
    def quantiles(self, quantiles: Any, *args: Any, num_draws: int = 10_000, **kwargs: Any) -> dict[str, Tensor]:
        """Return quantiles of each entry of each site, ``(quantiles, *shape)``, from draws."""
        flow = self.require_flow()
        levels = torch.as_tensor(quantiles, dtype=flow.dtype, device=flow.device)
        for level in levels.flatten().tolist():
            check_number("quantiles", level, "[0, 1]")
        check_sizes(num_draws=num_draws)
        return {name: torch.quantile(value, levels, dim=0) for name, value in self.draws(num_draws).items()}

    def median(self, *args: Any, num_draws: int = 10_000, **kwargs: Any) -> dict[str, Tensor]:
        """Return the median of each entry of each site, from draws."""
        return self.quantiles(0.5, num_draws=num_draws)

    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        """Return the sites' values, each ``(points, *shape)``, at points of unconstrained space."""
        if self.log_joint is not None:
            return self.log_joint.constrain(u)
        self._refuse_dependent_supports()
        return constrain(self.latents, u)

    def _refuse_dependent_supports(self) -> None:
        if self.model is None and any(site.support is None for site in self.latents):
            got = "one without, as after unpickling: build it from the model and load its state_dict"
            raise ValueError(f"expected a guide with its model, since a support depends on other sites; got {got}")

    # What a guide that is not built would do silently

    def _apply(self, fn: Any, recurse: bool = True) -> "AutoFlow":
        self.require_flow()
        return super()._apply(fn, recurse)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        self.require_flow()
        return super().named_parameters(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.require_flow()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.require_flow()
        return super().load_state_dict(*args, **kwargs)

    # Copies share the model; pickles leave it out with its data, since a model can rarely be pickled

    def __deepcopy__(self, memo: dict[int, Any]) -> "AutoFlow":
        new = memo[id(self)] = self.__class__.__new__(self.__class__)
        shared = ("_model", "log_joint", "master")
        new.__dict__.update({k: v if k in shared else copy.deepcopy(v, memo) for k, v in self.__dict__.items()})
        return new

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_model": (None,), "master": None, "log_joint": None}
        # A copy of a parameter has none of the attributes that Pyro's store sets on it, which do not pickle.
        state["_modules"] = copy.deepcopy(self._modules)
        if not isinstance(self.prototype_trace, _NotBuilt):
            nodes = self.prototype_trace.nodes.items()
            state["prototype_trace"] = _trace_of({name: {**node, "fn": _shape_of(node["fn"])} for name, node in nodes})
        return state


def _transforms(guide: AutoFlow, parts: Mapping[str, Tensor], args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the transform of each site from unconstrained space, by a run of the model if others set it."""
    if all(site.support is not None for site in guide.latents):
        return {site.name: biject_to(site.support) for site in guide.latents}
    guide._refuse_dependent_supports()
    centring = {} if guide.log_joint is None else guide.log_joint.centring
    with poutine.block(), Evaluation(parts, {}, None, densities=False, centring=centring) as run:
        guide.model(*args, **kwargs)
    return run.transforms


class _NotBuilt:
    """Stands for the trace of a guide that is not built, and refuses what Pyro, as in NeuTraReparam, asks of it."""

    @property
    def refusal(self) -> ValueError:
        return ValueError("expected a guide that is built: call guide.setup(...) with the model's arguments first")

    @property
    def nodes(self) -> Any:
        raise self.refusal

    def __contains__(self, name: str) -> bool:
        raise self.refusal

    def __bool__(self) -> bool:
        return False


def _check_sites(guide: "AutoFlow", args: Any, kwargs: Any) -> None:
    """Refuse arguments with which the model observes or lacks a latent, by a run for each pattern of None."""
    pattern = _pattern_of_none(args, kwargs)
    if pattern in guide._patterns or guide.model is None or not _can_call(guide.model, args, kwargs):
        return
    with poutine.block(), torch.random.fork_rng(devices=[]), torch.no_grad():
        nodes = ModelStructure.of(guide.model, args, kwargs).latent_nodes
    if lacking := [repr(site.name) for site in guide.latents if site.name not in nodes]:
        got = f"some with which {', '.join(lacking)} is observed or missing: build a guide from these, by setup"
        raise ValueError(f"expected arguments with which the model has the latents of the guide; got {got}")
    guide._patterns.add(pattern)


def deepened(guide: AutoFlow, num_layers: int) -> AutoFlow:
    """Return a guide with more couplings, which start as the identity on both sides of those that it has."""
    flow, log_joint = guide.require_flow(), cast(LogJoint, guide.log_joint)
    new = guide.like(log_joint, num_layers=num_layers)
    layers = new.require_flow().layers
    more = (len(layers) - len(flow.layers)) // 2
    for layer, old in zip([*layers[more : more + len(flow.layers) - 1], layers[-1]], flow.layers, strict=True):
        layer.load_state_dict(old.state_dict())
    new.inits = guide.inits
    return new


def start_of(init: str | Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the values of sites that a search for a Gaussian begins at; None for the prior medians."""
    return init if isinstance(init, Mapping) else None


def build_flow(flow: Flow | Builder, features: int, context_features: int | None = None, **options: Any) -> Flow:
    """Return a ready flow or that of a builder; refuse one that does not fit the latents or the context."""
    if not isinstance(flow, Flow):
        options |= {} if context_features is None else {"context_features": context_features}
        flow = flow(features, **options)
        if not isinstance(flow, Flow):
            raise TypeError(f"expected a builder that returns a Flow; got one that returns {type(flow).__name__}")
    expected = context_features or 0
    takes = flow.context_features if flow.embedding is None else expected  # an embedding takes whatever it is made for
    if flow.event_shape != (features,) or takes != expected:
        sizes, got = f"{features} features with context_features={expected}", f"{tuple(flow.event_shape)} and {takes}"
        raise ValueError(f"expected a flow over {sizes}, for the latents and their context; got {got}")
    return flow


def claim_parameters(guide: PyroModule, name: str, module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a guide's module by their names in Pyro's store, and make the names free for them.

    Those that another guide of the same name left in the store would be trained in their place.
    """
    store, prefix = pyro.get_param_store(), name_in_store(guide, name)
    stored = dict(store.named_parameters())
    parameters = {param_with_module_name(prefix, inner): parameter for inner, parameter in module.named_parameters()}
    for full_name, parameter in parameters.items():
        if stored.get(full_name, parameter) is not parameter:
            del store[full_name]
    return parameters


def _inner_flow(builder: Builder | Flow, options: Mapping[str, Any], features: int, *, rotate: bool) -> Flow:
    """Return the flow of a guide without the layer that starts at a Gaussian."""
    if isinstance(builder, Flow):
        return build_flow(copy.deepcopy(builder), features)
    # A coupling of a single feature has no identity feature to condition on: only splines bend it.
    if builder is realnvp and features == 1 and not {"scale", "mask"} & set(options):
        builder = nsf
    if builder not in _OPTIONS:
        return build_flow(builder, features, **options)
    width = min(max(8 * features, _WIDTHS[0]), _WIDTHS[1])
    flow = build_flow(builder, features, **{**_OPTIONS[builder], "hidden_features": (width, width), **options})
    if features == 1 or not rotate or "permutation" in options:
        return flow
    # Between latents that are skewed but nearly independent, as whitened ones often are, the ELBO's gradient by what
    # one half does to the other vanishes. Half of the layers act on rotated latents, which are not independent.
    half = len(flow.layers) // 2
    return Flow(flow.prior, [*flow.layers[:half], LULinear(features, bias=False), *flow.layers[half:]])


def _trace_of(nodes: Mapping[str, Mapping[str, Any]]) -> poutine.Trace:
    trace = poutine.Trace()
    for name, node in nodes.items():
        trace.add_node(name, **node)
    return trace


def _shape_of(fn: Any) -> dist.ImproperUniform:
    """Return a prior's shapes and support without its numbers, which may be data or parameters."""
    return dist.ImproperUniform(fn.support, fn.batch_shape, fn.event_shape)


class _Value(dist.Delta):
    """A point with a log-density, which counts in KL divergences; Pyro's own for a Delta leaves it out."""

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return super().rsample(Size(sample_shape)) if sample_shape else self.v

    def log_prob(self, x: Tensor) -> Tensor:
        return self.log_density if x is self.v else super().log_prob(x)


@register_kl(_Value, dist.Distribution)
def _kl_value(p: _Value, q: Any) -> Any:
    return p.log_density - q.log_prob(p.v)


def _signature(model: Model) -> inspect.Signature:
    """Return the signature of a model; that of a module is its forward's."""
    return inspect.signature(model.forward if isinstance(model, nn.Module) else model)


def _needs_no_arguments(model: Model) -> bool:
    """Whether there is nothing to pass to a model: neither required arguments nor data that default to None."""
    try:
        parameters = _signature(model).parameters.values()
    except (TypeError, ValueError):
        return False
    # By identity, since a default may be an array, which compares number by number. Of *args the default is empty.
    return not any(p.default is p.empty or p.default is None for p in parameters)


def _can_call(model: Model, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    try:
        _signature(model).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return False
    return True


def _pattern_of_none(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    given = [place for place, value in enumerate(args) if value is not None]
    return (*given, *sorted(name for name, value in kwargs.items() if value is not None))
