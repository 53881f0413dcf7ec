"""Sites of a Pyro model, read from its first run, and the latents' slices of one unconstrained vector."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial, reduce
from numbers import Number
from typing import Any, cast

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor
from torch.distributions import Distribution, Independent, biject_to

__all__ = [
    "MANY_LATENTS",
    "LatentSite",
    "Model",
    "ModelStructure",
    "check_model",
    "check_values",
    "constrain",
    "device_of",
    "explain_by_arguments",
    "have_one_image",
    "initial_value",
    "is_deterministic",
    "nested",
    "unconstrain",
    "unconstrained_value",
]

Model = Callable[..., Any]

MANY_LATENTS = 512  # above which nothing is done whose time grows with their square, or that they leave hopeless

_SITE_KEYS = (
    *("type", "name", "fn", "value", "is_observed", "infer"),
    *("cond_indep_stack", "scale", "mask", "args", "kwargs"),
)
_PERIODIC = (dist.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)


def check_model(model: object) -> None:
    """Refuse a model that is not callable."""
    if not callable(model):
        raise TypeError(f"expected a Pyro model, a callable; got {type(model).__name__}")


@dataclass(frozen=True)
class LatentSite:
    """One latent site of a model: its shapes, and its slice of the unconstrained vector."""

    name: str
    shape: Size  # of one value, including the plates that the vector covers
    unconstrained_shape: Size  # of one value in unconstrained space
    start: int  # the index of the first entry of its slice
    support: Any  # of one value; None if it depends on other sites, so that only a run of the model can tell it
    plate_ndim: int = 0  # the number of plate dimensions in ``shape``

    @property
    def stop(self) -> int:
        """The index after the last entry of its slice."""
        return self.start + self.unconstrained_shape.numel()

    def slice_of(self, vector: Tensor) -> Tensor:
        """Return the site's slice of a vector ``(*batch, dim)``, as ``(*batch, *unconstrained_shape)``."""
        return vector[..., self.start : self.stop].reshape(vector.shape[:-1] + self.unconstrained_shape)

    def constrain(self, vector: Tensor) -> Tensor:
        """Return the site's value, ``(*batch, *shape)``, at a vector."""
        return cast(Tensor, biject_to(self.support)(self.slice_of(vector)))

    def unconstrain(self, value: Tensor) -> Tensor:
        """Return the entries of the vector, ``(*batch, entries)``, for a value."""
        batch = value.shape[: value.dim() - len(self.shape)]
        return cast(Tensor, biject_to(self.support).inv(value).reshape(*batch, self.unconstrained_shape.numel()))

    def log_det(self, entries: Tensor, value: Tensor) -> Tensor:
        """Return ``log|det d value / d entries|`` of each batch element, for a slice's entries and their value."""
        batch = value.shape[: value.dim() - len(self.shape)]
        unconstrained = entries.reshape(batch + self.unconstrained_shape)
        log_det: Tensor = biject_to(self.support).log_abs_det_jacobian(unconstrained, value)
        return log_det.flatten(len(batch)).sum(-1) if log_det.dim() > len(batch) else log_det


def constrain(sites: Sequence[LatentSite], vector: Tensor) -> dict[str, Tensor]:
    """Return the value of each site, ``(*batch, *shape)``, at a vector ``(*batch, dim)``."""
    return {site.name: site.constrain(vector) for site in sites}


def unconstrain(
    sites: Sequence[LatentSite], values: Mapping[str, Tensor], *, min_batch_ndim: int = 0
) -> tuple[Tensor, Tensor]:
    """Return the vector of the sites' values, and the log-Jacobian of :func:`constrain`; broadcast their batches."""
    values = check_values(sites, values, min_batch_ndim=min_batch_ndim)
    parts = [site.unconstrain(values[site.name]) for site in sites]
    log_dets = [site.log_det(part, values[site.name]) for site, part in zip(sites, parts, strict=True)]
    batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*batch, -1) for part in parts], -1), cast(Tensor, sum(log_dets))


def check_values(
    sites: Sequence[LatentSite], values: Mapping[str, Tensor], *, min_batch_ndim: int = 0, points: bool = False
) -> dict[str, Tensor]:
    """Return the sites' values; refuse those not of shape ``(*batch, *shape)``, or ``(points, *shape)`` on request."""
    for site in sites:
        value = values.get(site.name)
        ndim = value.dim() - len(site.shape) if isinstance(value, Tensor) else -1
        fits = ndim == 1 if points else ndim >= min_batch_ndim
        if not isinstance(value, Tensor) or not fits or value.shape[ndim:] != site.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else "none" if value is None else type(value).__name__
            shape = "".join(f", {size}" for size in site.shape) or ","
            batch = "points" if points else "*batch"
            raise ValueError(f"expected values of {site.name!r} of shape ({batch}{shape}); got {got}")
    values = {site.name: values[site.name] for site in sites}
    if points and len(sizes := {len(value) for value in values.values()}) > 1:
        raise ValueError(f"expected the same number of values of each site; got {sorted(sizes)}")
    return values


def unconstrained_value(name: str, support: Any, value: Tensor) -> Tensor:
    """Return a site's value in unconstrained space; refuse a discrete site, or a support without a bijection."""
    if support.is_discrete:
        raise ValueError(f"expected continuous latents; got the discrete site {name!r}")
    try:
        return cast(Tensor, biject_to(support).inv(value))
    except NotImplementedError:
        got = f"site {name!r} with support {support}"
        raise ValueError(f"expected latents whose support has a bijection from the reals; got {got}") from None


def have_one_image(supports: Sequence[Any], point: Tensor) -> bool:
    """Whether the bijections of supports map a point of unconstrained space to one value, as those of one site must."""
    images = [biject_to(support)(point) for support in supports]
    return all(torch.equal(image, images[0]) for image in images)


# Sites of a trace


def nested(fn: Any) -> Iterator[Any]:
    """Yield a distribution and those inside it: what it expands, masks, reinterprets or transforms."""
    yield fn
    while isinstance(fn := getattr(fn, "base_dist", None), Distribution):
        yield fn


def is_deterministic(site: Any) -> bool:
    """Whether a site is a function of others: by ``pyro.deterministic``, or what is left of a reparametrised one."""
    return "_deterministic" in site["infer"] or (
        site["is_observed"] and any(isinstance(fn, dist.Delta) for fn in nested(site["fn"]))
    )


def _is_factor(node: Any) -> bool:
    if not is_deterministic(node):
        return isinstance(node["fn"], dist.Unit)
    return "_deterministic" not in node["infer"] and bool((node["fn"].log_prob(node["value"]) != 0).any())


def initial_value(site: Any, like: Tensor | None = None) -> Tensor:
    """Return an initial value of a latent site: its prior median, or a feasible point of an improper prior."""
    fn = site["fn"]
    if not any(isinstance(inner, dist.ImproperUniform) for inner in nested(fn)):
        return cast(Tensor, init_to_median(site))
    like = torch.empty(()) if like is None else like  # an improper prior has no dtype and device of its own
    transform = biject_to(fn.support)
    return cast(Tensor, transform(like.new_zeros(transform.inverse_shape(fn.batch_shape + fn.event_shape))))


def _floating_tensors(arguments: Any) -> Iterator[Tensor]:
    if isinstance(arguments, Tensor) and arguments.is_floating_point():
        yield arguments
    elif isinstance(arguments, Mapping):
        yield from _floating_tensors(tuple(arguments.values()))
    elif isinstance(arguments, (tuple, list)):
        for argument in arguments:
            yield from _floating_tensors(argument)


def device_of(*arguments: Any) -> torch.device:
    """Return the device of the first floating-point tensor among arguments, or the CPU."""
    return next(_floating_tensors(arguments), torch.empty(())).device


@dataclass
class ModelStructure:
    """The sites of a model, as its first run has them."""

    latents: list[LatentSite] = field(default_factory=list)  # the continuous ones, in the order of the vector
    latent_nodes: dict[str, dict[str, Any]] = field(default_factory=dict)  # their nodes in the trace
    initial: Tensor = field(default_factory=lambda: torch.empty(0))  # their values, as a point of unconstrained space
    discrete: dict[str, bool] = field(default_factory=dict)  # the discrete ones; whether the model enumerates each
    observations: dict[str, Tensor] = field(default_factory=dict)
    observed_nodes: dict[str, dict[str, Any]] = field(default_factory=dict)  # also of factors and deterministic sites
    fixed: dict[str, Tensor] = field(default_factory=dict)  # the rows of each plate, the same in every run
    subsampled: list[str] = field(default_factory=list)  # the plates that take only some of their rows
    parameters: list[str] = field(default_factory=list)  # of ``pyro.param`` statements
    shapes: dict[str, Size] = field(default_factory=dict)  # of values, and of the observations' log-densities
    max_plate_nesting: int = 0
    problem: str = ""  # why there is no density at the initial values

    @property
    def deterministic(self) -> list[str]:
        """The names of deterministic sites."""
        return [name for name, node in self.observed_nodes.items() if is_deterministic(node)]

    @property
    def factors(self) -> list[str]:
        """The names of ``pyro.factor`` statements, and of observed points with a log-density, which are factors too."""
        return [name for name, node in self.observed_nodes.items() if _is_factor(node)]

    @classmethod
    def of(cls, model: Model, args: Sequence[Any], kwargs: Mapping[str, Any]) -> "ModelStructure":
        """Run a model with each latent at its initial value, and read the trace."""
        trace, problem = _first_run(model, args, kwargs)
        parameters = [name for name, node in trace.nodes.items() if node["type"] == "param"]
        structure = cls(parameters=parameters, problem=problem)
        samples = {name: node for name, node in trace.nodes.items() if node["type"] == "sample"}
        for name, node in samples.items():
            structure._read_plates(name, node)
        parts = []
        for name, node in samples.items():
            if site_is_subsample(node):
                continue
            if node["is_observed"]:
                structure._read_observed(name, node)
            elif node["fn"].support.is_discrete:
                structure._read_discrete(name, node)
            else:
                parts.append(structure._read_latent(name, node))
        if not sum(part.numel() for part in parts):
            raise ValueError("expected a model with continuous latent sites; got none")
        terms = [node["log_prob"] for node in samples.values()]
        # Priors with plain numbers draw float32 also in a model of float64 data, which must not lose its precision.
        dtype = reduce(torch.promote_types, [tensor.dtype for tensor in (*parts, *terms)])
        device = max((tensor.device for tensor in (*parts, *terms)), key=lambda device: device.type != "cpu")
        structure.initial = torch.cat([part.reshape(-1).to(device, dtype) for part in parts])
        return structure

    def _read_plates(self, name: str, node: Any) -> None:
        frames = [frame for frame in node["cond_indep_stack"] if frame.vectorized]
        self.max_plate_nesting = max([self.max_plate_nesting, *(-frame.dim for frame in frames)])
        if site_is_subsample(node):
            self.fixed[name] = node["value"]
            if len(node["value"]) < node["fn"].size:
                self.subsampled.append(name)

    def _read_observed(self, name: str, node: Any) -> None:
        deterministic = is_deterministic(node)
        self.observed_nodes[name] = {key: node[key] for key in _SITE_KEYS}
        self.shapes[name] = node["value" if deterministic else "log_prob"].shape
        if not deterministic and not isinstance(node["fn"], dist.Unit):
            _check_observation(name, node)
            self.observations[name] = node["value"]

    def _read_discrete(self, name: str, node: Any) -> None:
        if not node["fn"].has_enumerate_support:
            expected = "continuous latents, or discrete ones of finite support, which are summed out"
            raise ValueError(f"expected {expected}; got site {name!r} of {type(node['fn']).__name__}")
        self.discrete[name] = "enumerate" in node["infer"]

    def _read_latent(self, name: str, node: Any) -> Tensor:
        """Append a continuous latent; return its initial value in unconstrained space."""
        fn = node["fn"]
        for frame in node["cond_indep_stack"]:
            if frame.name in self.subsampled:
                reason = "since all minibatches would share them"
                got = f"site {name!r} in plate {frame.name!r}, which draws {frame.size} of its rows: use AmortizedFlow"
                raise ValueError(f"expected latents outside subsampled plates, {reason}; got {got}")
        for inner in nested(fn):
            if isinstance(inner, _PERIODIC):
                advice = "give it an ImproperUniform over one period and a factor"
                got = f"site {name!r} of {type(inner).__name__}, whose density is periodic: {advice}"
                raise ValueError(f"expected latents with a density over the reals or a part of them; got {got}")
        part = unconstrained_value(name, fn.support, node["value"])
        start = self.latents[-1].stop if self.latents else 0
        shape = self.shapes[name] = node["value"].shape
        self.latents.append(LatentSite(name, shape, part.shape, start, fn.support, len(fn.batch_shape)))
        self.latent_nodes[name] = {key: node[key] for key in _SITE_KEYS}
        return part


def _check_observation(name: str, node: Any) -> None:
    """Refuse data and a distribution that stretch each other, as shapes (50, 1) and (50,) do to (50, 50)."""
    value, fn, shape = node["value"], node["fn"], node["log_prob"].shape
    split = value.dim() - fn.event_dim
    batch, event = value.shape[:split], value.shape[split:]
    plates = {frame.dim for frame in node["cond_indep_stack"] if frame.vectorized}
    of_data, of_fn = (
        {dim for dim in range(-len(shape), 0) if shape[dim] > ((1,) * len(shape) + tuple(own))[dim]}
        for own in (batch, fn.batch_shape)
    )
    wrong = (isinstance(fn, Independent) and event != fn.event_shape) or (of_data and (of_fn or of_data - plates))
    if value.numel() > 1 and wrong:
        got = f"data of shape {tuple(value.shape)} and a distribution of shape {tuple(fn.shape())}"
        expected = f"expected data of the shape of their distribution at site {name!r}"
        raise ValueError(f"{expected}; got {got}, which are stretched to fit each other: give one the other's shape")


def _nan_in(value: Any) -> str:
    """Return where a tensor or an array has NaN, if it does."""
    with suppress(TypeError, ValueError):
        missing = np.isnan(value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value, float))
        if missing.any():
            rows = np.flatnonzero(missing.reshape(len(missing) if missing.ndim else 1, -1).any(-1))
            return f"NaN in row {rows[0]} ({len(rows)} such row{'s' if len(rows) > 1 else ''} in all)"
    return ""


class _CheckData(Messenger):
    """Refuses observed data that are no tensors or hold NaN, before the distribution's own checks."""

    refusal: Exception | None = None  # to raise in place of what Pyro makes of it

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] or site_is_subsample(msg):
            return
        if not isinstance(msg["value"], (Tensor, Number)):
            got = f"{type(msg['value']).__name__}: convert it, for example by torch.as_tensor"
            self.refusal = TypeError(f"expected data as a tensor at site {msg['name']!r}; got {got}")
        elif where := _nan_in(msg["value"]):
            advice = "leave such rows out, or mask them with another number in their place, whose gradient exists"
            self.refusal = ValueError(f"expected data without NaN at site {msg['name']!r}; got {where}: {advice}")
        if self.refusal is not None:
            raise self.refusal


def explain_by_arguments(args: Sequence[Any], kwargs: Mapping[str, Any], problem: str) -> None:
    """Raise a sentence if arguments with NaN, or arrays in place of tensors, may be why a model fails."""
    named = {**{f"argument {place}": value for place, value in enumerate(args)}, **kwargs}
    for name, value in named.items():
        if where := _nan_in(value):
            raise ValueError(f"expected arguments of the model without NaN; got {where} of {name}, and {problem}")
    for name, value in named.items():
        if hasattr(value, "__array__") and not isinstance(value, (Tensor, np.generic)):
            got = f"{type(value).__name__} as {name}, and {problem}"
            raise TypeError(f"expected tensors as arguments of the model, by torch.as_tensor; got {got}")


def _run_at_median(model: Model, args: Any, kwargs: Any, like: Tensor) -> poutine.Trace:
    check = _CheckData()
    try:
        with poutine.block(), torch.no_grad(), check, InitMessenger(partial(initial_value, like=like)):
            trace = poutine.trace(model).get_trace(*args, **kwargs)
            trace.compute_log_prob()
    except Exception:
        if check.refusal is not None:
            raise _RefusedError(check.refusal) from None
        raise
    return trace


class _RefusedError(Exception):
    """Carries a sentence past the handling of other errors."""


def _first_run(model: Model, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[poutine.Trace, str]:
    """Run a model, as the user has it, with each latent at its initial value.

    The data may be outside the support that they have there, and inside it elsewhere; the text then says so.
    """
    likes = [*_floating_tensors((args, kwargs)), torch.empty(()), torch.empty((), dtype=torch.float64)]
    unique = list({(like.dtype, like.device): like for like in likes}.values())
    for like in unique:
        try:
            return _run_at_median(model, args, kwargs, like), ""
        except _RefusedError as error:
            raise error.args[0] from None
        except Exception as error:
            first_line, *others = str(error).splitlines() or [""]
            explain_by_arguments(args, kwargs, f"{type(error).__name__} in the model: {first_line}")
            with suppress(Exception), pyro.validation_enabled(False):
                trace = _run_at_median(model, args, kwargs, like)
                if isinstance(error, ValueError) and not trace.log_prob_sum().isfinite():
                    return trace, " ".join([first_line, *others[:1]])
            # An improper prior's value of another dtype than the data in a closure.
            if like is unique[-1] or not isinstance(error, RuntimeError):
                raise
    raise AssertionError
