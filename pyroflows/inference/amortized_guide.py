"""An amortised guide: a flow over the latents of each row of a plate, conditional on an encoding of the row's data."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TransformedDistribution
from pyro.infer.autoguide.guides import AutoGuide, prototype_hide_fn
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor, nn
from torch.distributions import biject_to, constraints

from pyroflows.arguments import check_sizes
from pyroflows.contexts import evaluating
from pyroflows.flow import Flow
from pyroflows.inference.guide import Builder, build_flow, claim_parameters
from pyroflows.inference.sites import (
    LatentSite,
    Model,
    constrain,
    have_one_image,
    initial_value,
    unconstrain,
    unconstrained_value,
)
from pyroflows.private import check_prototype

__all__ = ["AmortizedFlow"]

_MEDIAN_DRAWS = 1000


def _perturbed_value(site: Any) -> Tensor:
    """Return an initial value for a second run of a model: that of the first, perturbed in unconstrained space."""
    value = initial_value(site)
    if site["fn"].support.is_discrete:
        return value
    transform = biject_to(site["fn"].support)
    part = transform.inv(value)
    return transform(part + 0.5 * torch.randn_like(part))


class _ChosenRows(Messenger):
    """Records the plates whose rows the model chose by ``subsample=``."""

    def __init__(self) -> None:
        super().__init__()
        self.plates: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["value"] is not None:
            self.plates.add(msg["name"])


class AmortizedFlow(AutoGuide):
    r"""A guide for the latents of each row of a plate: a flow conditional on an encoder's output for the row.

    .. math:: q(z_1, \dots, z_N \mid x) = \prod_i q(z_i \mid h(x_i))

    A Pyro autoguide, trained by ``SVI`` and any ELBO, with minibatches: either passed to the model as arguments, whose
    number of rows may vary from call to call, or drawn by the model's plate, which then takes the rows that the guide
    drew. All latents of a row form one vector in unconstrained space. The guide is built from the model's arguments by
    ``setup``, or in its first call; dtype and device are those of the model's latents.

    Args:
        model: a Pyro model whose continuous latents are all in one plate. Hide others with ``pyro.poutine.block`` and
            give them a guide of their own in an ``AutoGuideList``.
        flow: a flow over the latents of one row, or a builder such as :func:`iaf`, called as
            ``flow(features, context_features=...)``.
        encoder: a network from the data of rows, ``(rows, *any)``, to the context, ``(rows, context_features)``.
        inputs: function from the model's arguments to the encoder's data, for all rows of the plate or for those of
            the minibatch; by default the first tensor among the arguments.
        create_plates: function from the model's arguments to the plate, as for any autoguide.

    Raises:
        TypeError: the model, the encoder or ``flow`` is not callable.
        ValueError: a latent is outside the plate or in several, is discrete, or has a support that depends on other
            sites, on the row or on a parameter; the inputs do not have the plate's rows; or the flow does not fit.

    References:
        Auto-Encoding Variational Bayes, Kingma and Welling, 2014 (arXiv:1312.6114); Variational Inference with
        Normalizing Flows, Rezende and Mohamed, 2015 (arXiv:1505.05770).

    Example:
        >>> from pyroflows import iaf
        >>> def model(x):
        ...     with pyro.plate("rows", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)
        >>> x = torch.zeros(100, 2)
        >>> guide = AmortizedFlow(model, iaf, nn.Linear(2, 8)).setup(x)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), pyro.infer.Trace_ELBO())
        >>> losses = [svi.step(minibatch) for minibatch in x.split(30)]
        >>> guide.draws(5, x)["z"].shape
        torch.Size([5, 100, 2])
    """

    def __init__(
        self,
        model: Model,
        flow: Flow | Builder,
        encoder: Callable[[Tensor], Tensor],
        *,
        inputs: Callable[..., Tensor] | None = None,
        create_plates: Callable[..., Any] | None = None,
    ):
        for expected, argument in (("a Pyro model", model), ("a Flow or a builder", flow), ("an encoder", encoder)):
            if not callable(argument):
                raise TypeError(f"expected {expected}; got {type(argument).__name__}")
        super().__init__(model, create_plates=create_plates)
        self._builder = None if isinstance(flow, Flow) else flow
        self.flow: Any = flow if isinstance(flow, Flow) else None
        self.encoder, self.inputs = encoder, inputs
        self.latents: list[LatentSite] = []
        self.plates: dict[str, Any] = {}

    def setup(self, *args: Any, **kwargs: Any) -> "AmortizedFlow":
        """Build the guide from the model's arguments; return the guide."""
        self._setup_prototype(*args, **kwargs)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw the latents of a minibatch, as Pyro sites."""
        if not self.latents:
            self._setup_prototype(*args, **kwargs)
        for name, module in self._modules.items():
            claim_parameters(self, name, module)
        inputs = self._inputs(args, kwargs)
        with (plate := self._plate(inputs, args, kwargs)) as index:
            self._check_rows(inputs, plate.size, plate.subsample_size)
            context = self._context(inputs if len(inputs) == plate.subsample_size else inputs[index])
            name = f"_{self._pyro_name}_latent"
            vector = pyro.sample(name, self.flow(context), infer={"is_auxiliary": True})
            values = {}
            for site in self.latents:
                value = site.constrain(vector)
                density = 0.0 if poutine.get_mask() is False else -site.log_det(site.slice_of(vector), value)
                delta = dist.Delta(value, density, event_dim=len(site.shape))
                values[site.name] = pyro.sample(site.name, delta)
        return values

    def posterior(self, inputs: Tensor) -> TransformedDistribution:
        """Return the posterior of rows, over the unconstrained vector of each, with the rows as its batch."""
        return self.flow(self._context(inputs))

    @torch.no_grad()
    def draws(self, n: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw the latents of all rows, given the model's arguments, each ``(n, rows, *shape)``; in evaluation mode."""
        check_sizes(n=n)
        with evaluating(self):
            context = self._context(self._inputs(args, kwargs))
            return constrain(self.latents, self.flow.sample((n,), context))

    def log_prob(self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Return the log-density, ``(*batch, rows)``, of latents ``(*batch, rows, *shape)``; in evaluation mode."""
        with evaluating(self):
            context = self._context(self._inputs(args, kwargs))
            vector, log_det = unconstrain(self.latents, values, min_batch_ndim=context.dim() - 1)
            return self.flow.log_prob(vector, context) - log_det

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the median of each entry of the latents, from a thousand draws."""
        return {name: value.median(0).values for name, value in self.draws(_MEDIAN_DRAWS, *args, **kwargs).items()}

    def quantiles(self, quantiles: Sequence[float], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return quantiles of each entry of the latents, ``(quantiles, rows, *shape)``, from a thousand draws."""
        draws = self.draws(_MEDIAN_DRAWS, *args, **kwargs)
        return {name: value.quantile(torch.as_tensor(quantiles).to(value), 0) for name, value in draws.items()}

    # The structure of the model

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        chosen = _ChosenRows()
        model = poutine.block(chosen(self.model), prototype_hide_fn)
        runs = []
        for initial in (initial_value, _perturbed_value):
            with poutine.block(), InitMessenger(initial):
                runs.append(poutine.trace(model).get_trace(*args, **kwargs))
        if self.master is not None:
            check_prototype(self.master(), runs[0])
        nodes, self._frame = _latents_of_one_plate(runs[0])
        self.latents, self._prototype_frames = [], {self._frame.name: self._frame}
        for name, node in nodes.items():
            other = runs[1].nodes.get(name)
            if other is None:
                raise ValueError(f"expected the same latents in every run of the model; got {name!r} in one alone")
            start = self.latents[-1].stop if self.latents else 0
            self.latents.append(_latent_of_a_row(node, other["fn"].support, self._frame.dim, start))
        value = next(iter(nodes.values()))["value"]
        self._dtype, self._device = value.dtype, value.device
        self.prototype_trace = runs[0]
        if isinstance(self.encoder, nn.Module):
            self.encoder.to(self._device, self._dtype)
        inputs = self._inputs(args, kwargs)
        full, size = self._frame.full_size or self._frame.size, self._frame.size
        if len(inputs) == full != size and self._frame.name in chosen.plates:
            got = f"all {full}: pass inputs=..."
            raise ValueError(f"expected inputs of the {size} rows that the model chose by subsample=...; got {got}")
        self._check_rows(inputs, full, size)
        self._takes_all_rows = len(inputs) == full
        with torch.no_grad(), evaluating(self.encoder):
            context_features = self._context(inputs[:2]).shape[-1]
        flow = self.flow if self._builder is None else self._builder
        flow = build_flow(flow, self.latents[-1].stop, context_features)
        self.flow = flow.to(self._device, self._dtype)

    # Rows

    def _inputs(self, args: Any, kwargs: Any) -> Tensor:
        if self.inputs is not None:
            inputs = self.inputs(*args, **kwargs)
        else:
            tensors = (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim())
            inputs = next(tensors, None)  # type: ignore[assignment]
        if not isinstance(inputs, Tensor) or not inputs.dim():
            got = "none" if inputs is None else type(inputs).__name__
            raise ValueError(f"expected a tensor of rows as an argument of the model, or from inputs=...; got {got}")
        return inputs

    def _check_rows(self, inputs: Tensor, full: int, size: int) -> None:
        if len(inputs) not in (full, size):
            drawn = "" if full == size else f", or {size} of them"
            plate = f"plate {self._frame.name!r}{drawn}"
            raise ValueError(f"expected inputs with the {full} rows of {plate}; got {tuple(inputs.shape)}")

    def _plate(self, inputs: Tensor, args: Any, kwargs: Any) -> Any:
        """Return the plate of this call, whose size may differ from that of the first."""
        name, frame = self._frame.name, self._frame
        full = frame.full_size or frame.size
        if self.master is not None or self.create_plates is not None:
            self._create_plates(*args, **kwargs)
            return self.plates[name]
        if full == frame.size:
            plate = pyro.plate(name, len(inputs), dim=frame.dim)
        elif self._takes_all_rows:
            plate = pyro.plate(name, len(inputs), subsample_size=frame.size, dim=frame.dim)
        else:  # the inputs are a minibatch whose indices only the model knows: it keeps its own
            with poutine.block():
                rows = torch.arange(len(inputs), device=inputs.device)
                plate = pyro.plate(name, full, subsample=rows, dim=frame.dim)
        self.plates = {name: plate}
        return plate

    def _context(self, rows: Tensor) -> Tensor:
        """Return the context of rows, with a dimension of 1 for each dimension right of the plate's."""
        if not self.latents:
            raise ValueError("expected a guide that is set up; got one before setup(*args) or a first call")
        if rows.is_floating_point():
            rows = rows.to(self._dtype)
        context = self.encoder(rows.to(self._device))
        if not isinstance(context, Tensor) or context.dim() != 2 or len(context) != len(rows):
            got = f"shape {tuple(context.shape)}" if isinstance(context, Tensor) else type(context).__name__
            raise ValueError(f"expected an encoder that returns ({len(rows)}, context_features); got {got}")
        return context.reshape(len(rows), *(1,) * (-self._frame.dim - 1), -1)

    # Copies

    def __getstate__(self) -> dict[str, Any]:
        # Unlike Pyro's own, this leaves the guide itself as it is. A model and its trace are closures, which do not
        # pickle; nor do the references that Pyro's store leaves on parameters.
        for parameter in self.parameters():
            parameter.__dict__.pop("unconstrained", None)
        return {**self.__dict__, "_model": None, "master": None, "prototype_trace": None, "plates": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> "AmortizedFlow":
        other = memo[id(self)] = self.__class__.__new__(self.__class__)
        shared = {"_model": self._model, "master": None, "prototype_trace": self.prototype_trace}
        other.__dict__.update({**copy.deepcopy(self.__getstate__(), memo), **shared})
        return other


def _latents_of_one_plate(trace: poutine.Trace) -> tuple[dict[str, Any], Any]:
    """Return the nodes of the latents, and the frame of the plate that all are in."""
    sites: dict[str, Any] = {}
    plates: dict[str, Any] = {}
    for name, site in trace.iter_stochastic_nodes():
        if site["infer"].get("enumerate") == "parallel" and site["fn"].has_enumerate_support:
            continue  # summed out by the ELBO
        if site["fn"].support.is_discrete:
            got = f"the discrete site {name!r}: enumerate it, or hide it from the guide"
            raise ValueError(f"expected continuous latents; got {got}")
        sites[name], frames = site, site["cond_indep_stack"]
        if len(frames) > 1 or any(not frame.vectorized for frame in frames):
            nested = " in ".join(repr(frame.name) for frame in frames)
            raise ValueError(f"expected each latent in one vectorised plate; got site {name!r} in plate {nested}")
        plates[name] = frames[0] if frames else None
    if not sites:
        raise ValueError("expected a model with continuous latent sites; got none")
    if outside := [name for name, frame in plates.items() if frame is None]:
        advice = "use AutoFlow" if len(outside) == len(sites) else "give it another guide in an AutoGuideList"
        raise ValueError(f"expected latents in a plate; got site {outside[0]!r} outside any plate: {advice}")
    names = {frame.name: name for name, frame in plates.items()}
    if len(names) > 1:
        (first, a), (second, b), *_ = names.items()
        got = f"site {a!r} in plate {first!r} and site {b!r} in plate {second!r}"
        raise ValueError(f"expected all latents in one plate; got {got}: give each plate a guide in an AutoGuideList")
    frame = next(iter(plates.values()))
    batch_shape = Size([frame.size, *(1,) * (-frame.dim - 1)])
    for name, site in sites.items():
        if site["fn"].batch_shape != batch_shape:
            expected = f"{tuple(batch_shape)}, that of plate {frame.name!r}"
            got = f"{tuple(site['fn'].batch_shape)} at site {name!r}: use to_event"
            raise ValueError(f"expected latents of batch shape {expected}; got {got}")
    return sites, frame


def _latent_of_a_row(node: Any, other_support: Any, plate_dim: int, start: int) -> LatentSite:
    """Return the latent site of one row, from a run's node and the support in another run."""
    name, fn = node["name"], node["fn"]
    unconstrained = unconstrained_value(name, fn.support, node["value"])
    batch = len(fn.batch_shape)
    shape = unconstrained.shape[batch:]
    support = _support_of_a_row(fn.support, plate_dim - fn.event_dim, name)
    # One point, mapped by the supports of all rows of two runs: if they differ, no single support is right.
    point = torch.randn((1,) * batch + shape).to(unconstrained)
    if not have_one_image((fn.support, support, other_support), point.expand(unconstrained.shape)):
        got = f"site {name!r} with support {fn.support}"
        raise ValueError(f"expected latents whose support depends neither on other sites nor on the row; got {got}")
    return LatentSite(name, fn.event_shape, shape, start, support)


def _support_of_a_row(support: Any, dim: int, name: str) -> Any:
    """Return the support of the first row; in a plate the bounds of an interval are expanded to all rows."""
    support = copy.copy(support)
    for key, value in list(vars(support).items()):
        if isinstance(value, constraints.Constraint):
            value = _support_of_a_row(value, dim, name)
        elif isinstance(value, (list, tuple)) and all(isinstance(v, constraints.Constraint) for v in value):
            value = type(value)(_support_of_a_row(v, dim, name) for v in value)
        elif isinstance(value, Tensor):
            if value.requires_grad:
                got = f"site {name!r} with {support}"
                raise ValueError(f"expected latents whose support does not move in training; got {got}")
            value = value.narrow(dim, 0, 1) if value.dim() >= -dim else value
        setattr(support, key, value)
    return support
