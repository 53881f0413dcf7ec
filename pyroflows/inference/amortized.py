"""An amortised guide: a flow over the latents of each row of a plate, given what an encoder makes of its data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

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
from pyroflows.inference.log_joint import initial_value

__all__ = ["AmortizedFlow", "Part", "built", "join", "unconstrained_start"]

Builder = Callable[..., Flow]

_MEDIAN_DRAWS = 1000


# The parts of an unconstrained vector, also those of fit_amortized


@dataclass(frozen=True)
class Part:
    """The part of an unconstrained vector that one latent has; its support is that of one event."""

    name: str
    event_shape: Size
    unconstrained_shape: Size
    start: int
    support: Any

    @property
    def stop(self) -> int:
        return self.start + self.unconstrained_shape.numel()

    def constrain(self, vector: Tensor, batch: Size) -> tuple[Tensor, Tensor]:
        """Give the value, and ``log|det dx/du|`` of each event."""
        part = vector[..., self.start : self.stop].reshape(batch + self.unconstrained_shape)
        transform = biject_to(self.support)
        value = transform(part)
        return value, self._log_det(transform, part, value, batch)

    def unconstrain(self, value: Tensor, batch: Size) -> tuple[Tensor, Tensor]:
        """Give the part of the vector, and ``log|det dx/du|`` of each event."""
        transform = biject_to(self.support)
        part = transform.inv(value)
        return part.reshape(*batch, self.unconstrained_shape.numel()), self._log_det(transform, part, value, batch)

    @staticmethod
    def _log_det(transform: Any, part: Tensor, value: Tensor, batch: Size) -> Tensor:
        log_det: Tensor = transform.log_abs_det_jacobian(part, value)
        return log_det.flatten(len(batch)).sum(-1) if log_det.dim() > len(batch) else log_det


def unconstrained_start(name: str, support: Any, value: Tensor) -> Tensor:
    """Give a site's value in unconstrained space, or say why it has none."""
    if support.is_discrete:
        raise ValueError(f"expected continuous latents; got the discrete site {name!r}")
    try:
        return biject_to(support).inv(value)
    except NotImplementedError:
        raise ValueError(
            f"expected latents whose support has a bijection from the reals; got site {name!r} with support {support}"
        ) from None


class _Perturb:
    """Start values for a second run of a model: those of the first, moved in unconstrained space."""

    def __call__(self, site: Any) -> Tensor:
        value = initial_value(site)
        if site["fn"].support.is_discrete:
            return value
        transform = biject_to(site["fn"].support)
        part = transform.inv(value)
        return transform(part + 0.5 * torch.randn_like(part))


class _GivenRows(Messenger):
    """Notes the plates whose rows the user chose."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["value"] is not None:
            self.names.add(msg["name"])


# A guide


class AmortizedFlow(AutoGuide):
    r"""A guide for the latents of each row of a plate: a flow given what an encoder makes of the row's data.

    .. math:: q(z_1, \dots, z_N \mid x) = \prod_i q(z_i \mid h(x_i))

    A Pyro autoguide, trained by ``SVI`` and any ELBO, with minibatches: handed to the model as arguments, whose number
    of rows may vary from call to call, or drawn by the model's plate, which then takes the rows the guide drew. All
    latents of a row are one vector in unconstrained space. ``setup`` builds the guide from the model's arguments, as
    does the first call; dtype and device are those of the model's latents.

    Args:
        model: a Pyro model whose continuous latents are all in one plate. Hide others with ``pyro.poutine.block`` and
            give them a guide of their own in an ``AutoGuideList``.
        flow: a flow over the latents of one row, or a builder such as :func:`iaf`, called as
            ``flow(features, context_features=...)``.
        encoder: a network from the data of rows to the context.
        inputs: gives the encoder's data from the model's arguments: all rows of the plate, or those of the minibatch;
            by default the first tensor among the arguments.
        create_plates: gives the plate from the model's arguments, as for any autoguide.

    Shapes:
        inputs: ``(rows, *anything)``; the encoder gives ``(rows, context_features)``.

    Raises:
        TypeError: no Pyro model, no flow or builder, or an encoder that cannot be called.
        ValueError: a latent outside the plate or in several, a discrete one, or one whose support depends on other
            sites, on the row or on a parameter; inputs that have not the plate's rows; or a flow of other sizes.

    References:
        Auto-Encoding Variational Bayes, Kingma and Welling, 2014 (arXiv:1312.6114);
        Variational Inference with Normalizing Flows, Rezende and Mohamed, 2015 (arXiv:1505.05770).

    Example:
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyroflows import iaf
        >>> def model(x):
        ...     with pyro.plate("rows", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)
        >>> x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
        >>> guide = AmortizedFlow(model, iaf, nn.Linear(2, 8)).setup(x)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        >>> losses = [svi.step(minibatch) for minibatch in x.split(30)]
        >>> guide.draws(5, x)["z"].shape
        torch.Size([5, 100, 2])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        flow: Flow | Builder,
        encoder: Callable[[Tensor], Tensor],
        *,
        inputs: Callable[..., Tensor] | None = None,
        create_plates: Callable[..., Any] | None = None,
    ):
        for name, thing in (("a Pyro model", model), ("a Flow or its builder", flow), ("an encoder", encoder)):
            if not callable(thing):
                raise TypeError(f"expected {name}; got {type(thing).__name__}")
        super().__init__(model, create_plates=create_plates)
        self._builder = None if isinstance(flow, Flow) else flow
        self.flow: Any = flow if isinstance(flow, Flow) else None
        self.encoder = encoder
        self.inputs = inputs
        self.latents: list[Part] = []

    def setup(self, *args: Any, **kwargs: Any) -> AmortizedFlow:
        """Build the guide from the model's arguments, and give it back."""
        self._setup_prototype(*args, **kwargs)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw the latents of a minibatch, as Pyro sites."""
        if not self.latents:
            self._setup_prototype(*args, **kwargs)
        self._claim_parameters()
        inputs = self._inputs(args, kwargs)
        with self._plate(inputs, args, kwargs) as index:
            context = self._context(self._rows_of(inputs, self.plates[self._frame.name], index))
            name = f"_{self._pyro_name}_latent"
            vector = pyro.sample(name, self.flow(context), infer={"is_auxiliary": True})
            values = {}
            for part in self.latents:
                value, log_det = part.constrain(vector, vector.shape[:-1])
                density = 0.0 if poutine.get_mask() is False else -log_det
                event_dim = len(part.event_shape)
                values[part.name] = pyro.sample(part.name, dist.Delta(value, density, event_dim=event_dim))
        return values

    def posterior(self, inputs: Tensor) -> TransformedDistribution:
        """Give the posterior of rows, over the unconstrained vector of each, with the rows as its batch."""
        self._check_setup()
        return self.flow(self._context(inputs))

    @torch.no_grad()
    def draws(self, n: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw the latents of all rows, given the model's arguments, each ``(n, rows, *shape)``; in evaluation mode."""
        self._check_setup()
        check_sizes(n=n)
        with evaluating(self):
            vector = self.flow.sample((n,), self._context(self._inputs(args, kwargs)))
        return {part.name: part.constrain(vector, vector.shape[:-1])[0] for part in self.latents}

    def log_prob(self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Give the log-density, ``(*batch, rows)``, of latents, ``(*batch, rows, *shape)`` each; in evaluation mode."""
        self._check_setup()
        with evaluating(self):
            context = self._context(self._inputs(args, kwargs))
            vector, log_det = join(self.latents, values, context.dim() - 1)
            return self.flow.log_prob(vector, context) - log_det

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Give the median of each number of the latents, of a thousand draws."""
        return {name: value.median(0).values for name, value in self.draws(_MEDIAN_DRAWS, *args, **kwargs).items()}

    def quantiles(self, quantiles: Sequence[float], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Give quantiles of each number of the latents, of a thousand draws; the first dimension is theirs."""
        draws = self.draws(_MEDIAN_DRAWS, *args, **kwargs)
        return {name: value.quantile(torch.as_tensor(quantiles).to(value), 0) for name, value in draws.items()}

    # The structure of the model

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        given = _GivenRows()
        model = poutine.block(given(self.model), prototype_hide_fn)
        runs = []
        for start in (initial_value, _Perturb()):
            with poutine.block(), InitMessenger(start):
                runs.append(poutine.trace(model).get_trace(*args, **kwargs))
        if self.master is not None:
            self.master()._check_prototype(runs[0])
        sites, self._frame = _sites_of_one_plate(runs[0])
        self.latents, self._prototype_frames = [], {self._frame.name: self._frame}
        for name, site in sites.items():
            other = runs[1].nodes.get(name)
            if other is None:
                raise ValueError(f"expected the same latents in every run of the model; got {name!r} in one alone")
            self.latents.append(self._part(site, other["fn"].support))
        value = next(iter(sites.values()))["value"]
        self._dtype, self._device = value.dtype, value.device
        self._own_rows = self._frame.name not in given.names
        self.prototype_trace = runs[0]
        self._build(args, kwargs)

    def _part(self, site: Any, other: Any) -> Part:
        name, fn, dim = site["name"], site["fn"], self._frame.dim - site["fn"].event_dim
        unconstrained = unconstrained_start(name, fn.support, site["value"])
        batch = len(fn.batch_shape)
        shape = unconstrained.shape[batch:]
        support = _one_row(fn.support, dim, name)
        # One point, put through the supports of all rows of two runs: where they differ, no one support is right.
        point = torch.randn((1,) * batch + shape).to(unconstrained)
        images = [biject_to(one)(point.expand(unconstrained.shape)) for one in (fn.support, support, other)]
        if any(not torch.equal(image, images[0]) for image in images):
            raise ValueError(
                "expected latents whose support depends neither on other sites nor on the row; "
                f"got site {name!r} with support {fn.support}"
            )
        return Part(name, fn.event_shape, shape, self.latents[-1].stop if self.latents else 0, support)

    def _build(self, args: Any, kwargs: Any) -> None:
        """Make the flow, if need be, and bring flow and encoder to the dtype and device of the latents."""
        features = self.latents[-1].stop
        if isinstance(self.encoder, nn.Module):
            self.encoder.to(self._device, self._dtype)
        inputs = self._inputs(args, kwargs)
        full, size = self._frame.full_size or self._frame.size, self._frame.size
        if isinstance(inputs, Tensor) and len(inputs) == full != size and not self._own_rows:
            raise ValueError(
                f"expected inputs of the {size} rows that the model chose by subsample=...; got all {full}: "
                "give inputs=..."
            )
        self._check_rows(inputs, full, size)
        self._takes_all_rows = len(inputs) == full
        with torch.no_grad(), evaluating(self.encoder):
            context_features = self._context(inputs[:2]).shape[-1]
        if self._builder is not None:
            self.flow = built(self._builder, features, context_features)
        flow = self.flow
        wanted = flow.context_features if flow.embedding is None else context_features
        if flow.event_shape != (features,) or wanted != context_features:
            raise ValueError(
                f"expected a flow over ({features},) with context_features={context_features}, "
                f"the latents of a row and the encoder's output; got {tuple(flow.event_shape)} and {wanted}"
            )
        flow.to(self._device, self._dtype)

    def _check_setup(self) -> None:
        if not self.latents:
            raise ValueError("expected a guide that is set up; got one before setup(*args) or a first call")

    # Rows

    def _inputs(self, args: Any, kwargs: Any) -> Tensor:
        if self.inputs is not None:
            inputs = self.inputs(*args, **kwargs)
        else:
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim()]
            inputs = tensors[0] if tensors else None  # type: ignore[assignment]
        if not isinstance(inputs, Tensor) or not inputs.dim():
            raise ValueError(
                "expected a tensor of rows as an argument of the model, or from inputs=...; "
                f"got {'none' if inputs is None else type(inputs).__name__}"
            )
        return inputs

    def _check_rows(self, inputs: Tensor, full: int, size: int) -> None:
        if len(inputs) not in (full, size):
            drawn = "" if full == size else f", or {size} of them"
            raise ValueError(
                f"expected inputs with the {full} rows of plate {self._frame.name!r}{drawn}; got {tuple(inputs.shape)}"
            )

    def _plate(self, inputs: Tensor, args: Any, kwargs: Any) -> Any:
        """Give the plate of this call; its size may be another than that of the first."""
        name, frame = self._frame.name, self._frame
        full = frame.full_size or frame.size
        if self.master is not None or self.create_plates is not None:
            self._create_plates(*args, **kwargs)
        elif full == frame.size:
            self.plates = {name: pyro.plate(name, len(inputs), dim=frame.dim)}
        elif self._takes_all_rows:
            self.plates = {name: pyro.plate(name, len(inputs), subsample_size=frame.size, dim=frame.dim)}
        else:
            # The inputs are a minibatch, of whose indices the guide knows nothing: the model keeps its own.
            with poutine.block():
                rows = torch.arange(len(inputs), device=inputs.device)
                self.plates = {name: pyro.plate(name, full, subsample=rows, dim=frame.dim)}
        return self.plates[name]

    def _rows_of(self, inputs: Tensor, plate: Any, index: Any) -> Tensor:
        self._check_rows(inputs, plate.size, plate.subsample_size)
        return inputs if len(inputs) == plate.subsample_size else inputs[index]

    def _context(self, rows: Tensor) -> Tensor:
        """Give the context of rows, with a dimension of 1 for each dimension right of the plate's."""
        if rows.is_floating_point():
            rows = rows.to(self._dtype)
        context = self.encoder(rows.to(self._device))
        if not isinstance(context, Tensor) or context.dim() != 2 or len(context) != len(rows):
            got = f"shape {tuple(context.shape)}" if isinstance(context, Tensor) else type(context).__name__
            raise ValueError(f"expected an encoder that gives ({len(rows)}, context_features); got {got}")
        return context.reshape(len(rows), *(1,) * (-self._frame.dim - 1), -1)

    # Parameters and copies

    def _claim_parameters(self) -> None:
        """Take names in Pyro's store back from another guide of the same name, whose parameters would be trained."""
        store = pyro.get_param_store()
        for name, module in self._modules.items():
            for inner, parameter in module.named_parameters():
                full = f"{self._pyro_get_fullname(name)}$$${inner}"
                if full in store and store[full] is not parameter:
                    del store[full]

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's own empties the guide that is pickled; a model and its trace are closures, and stay behind, as do the
        # references that Pyro's store leaves on parameters.
        for parameter in self.parameters():
            parameter.__dict__.pop("unconstrained", None)
        return {**self.__dict__, "_model": None, "master": None, "prototype_trace": None, "plates": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> AmortizedFlow:
        other = self.__class__.__new__(self.__class__)
        memo[id(self)] = other
        kept = {"_model": self._model, "master": None, "prototype_trace": self.prototype_trace}
        other.__dict__.update({**copy.deepcopy(self.__getstate__(), memo), **kept})
        return other


def _sites_of_one_plate(trace: poutine.Trace) -> tuple[dict[str, Any], Any]:
    """Give the latent sites, and the plate that all are in."""
    sites: dict[str, Any] = {}
    plates: dict[str, Any] = {}
    for name, site in trace.iter_stochastic_nodes():
        if site["infer"].get("enumerate") == "parallel" and site["fn"].has_enumerate_support:
            continue  # summed out by the ELBO
        if site["fn"].support.is_discrete:
            raise ValueError(
                f"expected continuous latents; got the discrete site {name!r}: enumerate it, or hide it from the guide"
            )
        sites[name], frames = site, site["cond_indep_stack"]
        if len(frames) > 1 or any(not frame.vectorized for frame in frames):
            nested = " in ".join(repr(frame.name) for frame in frames)
            raise ValueError(f"expected each latent in one vectorised plate; got site {name!r} in plate {nested}")
        plates[name] = frames[0] if frames else None
    if not sites:
        raise ValueError("expected a model with continuous latent sites; got none")
    glob = [name for name, frame in plates.items() if frame is None]
    if glob:
        advice = "use AutoFlow" if len(glob) == len(sites) else "give it another guide in an AutoGuideList"
        raise ValueError(f"expected latents in a plate; got site {glob[0]!r} outside any plate: {advice}")
    names = {frame.name: name for name, frame in plates.items()}
    if len(names) > 1:
        (first, a), (second, b), *_ = names.items()
        raise ValueError(
            f"expected all latents in one plate; got site {a!r} in plate {first!r} and site {b!r} in plate {second!r}: "
            "give each plate a guide in an AutoGuideList"
        )
    frame = next(iter(plates.values()))
    for name, site in sites.items():
        wanted = Size([frame.size, *(1,) * (-frame.dim - 1)])
        if site["fn"].batch_shape != wanted:
            raise ValueError(
                f"expected latents of batch shape {tuple(wanted)}, that of plate {frame.name!r}; "
                f"got {tuple(site['fn'].batch_shape)} at site {name!r}: use to_event"
            )
    return sites, frame


def _one_row(support: Any, dim: int, name: str) -> Any:
    """Give the support of the first row alone; in a plate the bounds of an interval are expanded to all rows."""
    support = copy.copy(support)
    for key, value in list(vars(support).items()):
        if isinstance(value, constraints.Constraint):
            value = _one_row(value, dim, name)
        elif isinstance(value, (list, tuple)) and all(isinstance(v, constraints.Constraint) for v in value):
            value = type(value)(_one_row(v, dim, name) for v in value)
        elif isinstance(value, Tensor):
            if value.requires_grad:
                raise ValueError(
                    f"expected latents whose support does not move in training; got site {name!r} with {support}"
                )
            value = value.narrow(dim, 0, 1) if value.dim() >= -dim else value
        setattr(support, key, value)
    return support


def built(builder: Builder, features: int, context_features: int) -> Flow:
    """Give the flow of a builder."""
    flow = builder(features, context_features=context_features)
    if not isinstance(flow, Flow):
        raise TypeError(f"expected a builder that gives a Flow; got {type(flow).__name__}")
    return flow


def join(latents: Sequence[Part], values: Mapping[str, Tensor], least: int) -> tuple[Tensor, Tensor]:
    """Give the unconstrained vector of values by name, and ``log|det dx/du|``; ``least`` is the fewest batch dims."""
    parts, log_dets = [], []
    for part in latents:
        value = values.get(part.name)
        dims = len(part.event_shape)
        if (
            not isinstance(value, Tensor)
            or value.dim() < dims + least
            or value.shape[value.dim() - dims :] != (part.event_shape)
        ):
            got = tuple(value.shape) if isinstance(value, Tensor) else "none" if value is None else type(value).__name__
            raise ValueError(
                f"expected values of {part.name!r} of shape (*batch{''.join(f', {n}' for n in part.event_shape)}); "
                f"got {got}"
            )
        vector, log_det = part.unconstrain(value, value.shape[: value.dim() - dims])
        parts.append(vector)
        log_dets.append(log_det)
    batch = torch.broadcast_shapes(*(vector.shape[:-1] for vector in parts))
    return torch.cat([vector.expand(*batch, -1) for vector in parts], -1), cast(Tensor, sum(log_dets))
