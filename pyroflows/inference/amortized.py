"""Amortised posteriors: the posterior of a simulator's latents for any data, by a conditional flow."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Size, Tensor, nn

from pyroflows.arguments import batched_shape, check_sizes
from pyroflows.bijection import Bijection
from pyroflows.building import build
from pyroflows.contexts import evaluating, seeded
from pyroflows.diagnostics.arrays import labels
from pyroflows.diagnostics.calibration import Calibration, calibration
from pyroflows.files import read, write
from pyroflows.flow import Flow, FlowDistribution, check_own, flow_of, header_of
from pyroflows.inference.guide import Builder, build_flow
from pyroflows.inference.simulator import Simulator
from pyroflows.inference.sites import LatentSite, Model, check_model, constrain, have_one_image, unconstrain
from pyroflows.layers import Affine, MaskedAutoregressive, Permutation, Spline, Standardize, TriangularAffine
from pyroflows.priors import StandardNormal
from pyroflows.recipe import Recorded, describe_value
from pyroflows.training import FitOptions, FitResult, fit

__all__ = ["AmortizedPosterior", "fit_amortized"]

_KIND, _PLACE = "amortized posterior", ("embedding", "network")  # of a file, and of the user's embedding in the flow
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_ROWS_AT_ONCE = 200_000
_RANGE = 0.1  # how far outside the range of the simulations data may be, as a share of it
_LINEAR = 5.0  # scales; data further out enter a network by their logarithm
_NUMBERS_AT_ONCE = 2**23  # of which a quantile is taken; torch refuses more than 2**24


def fit_amortized(
    model: Model,
    observed: str | Sequence[str],
    *,
    latents: str | Sequence[str] | None = None,
    num_simulations: int = 10_000,
    flow: Flow | Builder | None = None,
    embedding: nn.Module | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    drop_nonfinite: bool = False,
    seed: int | None = None,
    progress: bool | None = None,
    **fit_options: Any,
) -> "AmortizedPosterior":
    r"""Learn the posterior of a Pyro model for any data: simulate latents and data, and fit a conditional flow.

    .. math:: \max_\phi \; \mathbb{E}_{p(\theta) p(y \mid \theta)} \log q_\phi(\theta \mid y)

    Only draws from the model are needed, no density: it may be a simulator. Observed sites are drawn, whether or not
    the arguments hold data for them; sites that are neither latent nor observed are averaged over. Many simulations
    share one run, in a plate, if that is found to agree with single runs.

    Args:
        model: a Pyro model, or a simulator with its priors and random numbers as Pyro sites.
        observed: the sites that will be data; a deterministic site, such as a summary, may be one.
        latents: the sites to infer; by default all that are not observed.
        num_simulations: number of draws from the model; a tenth validates the fit.
        flow: over the unconstrained latents given the context, or its builder, called as
            ``flow(features, context_features=...)``; by default an autoregressive spline flow.
        embedding: a network that computes the context ``(rows, context_features)`` from one observed site ``(rows,
            *shape)``, or from several flattened to ``(rows, numbers)``, in units of each number's spread. Integers and
            booleans of one site reach it as they are, if it takes them. By default the context is the data, flattened.
        args, kwargs: arguments of the model.
        drop_nonfinite: leave out simulations that are not finite (correct if data that are not finite are never
            observed); they are counted in the result's ``num_dropped``.
        seed: of simulations, weights and fit.
        progress: whether to show bars; by default only on a terminal.
        fit_options: of :func:`fit`, such as ``epochs`` and ``batch_size``.

    Raises:
        TypeError: a site is not a tensor, ``flow`` is not a builder, or ``fit`` does not take an option.
        ValueError: a site is unknown, a latent is discrete or has a support that depends on other sites, the shape of
            a site varies, another site is observed, a plate is subsampled, simulations are not finite, or the flow
            does not fit.

    References:
        Fast epsilon-free Inference of Simulation Models with Bayesian Conditional Density Estimation, Papamakarios and
        Murray, 2016 (arXiv:1605.06376); Automatic Posterior Transformation for Likelihood-Free Inference, Greenberg et
        al., 2019 (arXiv:1905.07488); Neural Spline Flows, Durkan et al., 2019 (arXiv:1906.04032).

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
        ...     pyro.sample("y", dist.Normal(torch.zeros(20), scale).to_event(1))
        >>> posterior = fit_amortized(model, ["y"], num_simulations=500, epochs=2, seed=0)
        >>> posterior.draws(100, torch.randn(20))["scale"].shape
        torch.Size([100])
    """
    check_model(model)
    if embedding is not None and not isinstance(embedding, nn.Module):
        raise TypeError(f"expected an embedding that is a torch module; got {type(embedding).__name__}")
    if isinstance(flow, Flow) and flow.embedding is not None and embedding is not None:
        raise ValueError("`embedding` cannot be combined with a flow that has an embedding")
    check_sizes(num_simulations=num_simulations)
    with seeded(seed, torch.device("cpu")):
        simulator = Simulator(model, args, kwargs or {}, observed, latents)
        values = simulator.finite(num_simulations, drop_nonfinite, progress)
        vectors = unconstrain(simulator.latents, values, min_batch_ndim=1)[0]
        if isinstance(flow, Flow) and flow.embedding is not None:
            embedding, flow = flow.embedding, Flow(flow.prior, flow.bijection)
        data = _rows_of_data(simulator.observed, values, flat=embedding is None)
        if embedding is not None:
            embedding.to(vectors)
        if not _takes_integers(embedding, data[:2]):
            data = data.to(vectors)
        embed = _ScaledEmbedding.from_data(data, embedding).to(vectors)
        with torch.no_grad(), evaluating(embed):
            context = embed(data[:2])
        if not isinstance(context, Tensor) or context.dim() != 2:
            got = f"shape {tuple(context.shape)}" if isinstance(context, Tensor) else type(context).__name__
            raise ValueError(f"expected an embedding that returns (rows, context_features); got {got}")
        inner = build_flow(_default_flow if flow is None else flow, vectors.shape[1], context.shape[1])
        if inner.embedding is not None:
            got = f"one whose flow has a {type(inner.embedding).__name__}: pass it as embedding= of fit_amortized"
            raise ValueError(f"expected a builder of flows without an embedding; got {got}")
        standardize = Standardize.from_data(vectors)
        layers = list(inner.layers)
        if embedding is None and not isinstance(flow, Flow):
            layers += _regression_layers(standardize.inv(vectors), embed(data))
        flow = Flow(inner.prior, [*layers, standardize], embedding=embed).to(vectors)
        options = {
            "epochs": min(100, max(10, 500_000 // len(data))),  # about the same number of steps for any simulations
            "batch_size": min(128, len(data) // 2),
            "learning_rate": 2e-3,
            "options": FitOptions(ema_decay=0.998),
        }
        result = fit(flow, vectors, context=data, progress=progress, **{**options, **fit_options})
    return AmortizedPosterior(flow, simulator, result, data, num_simulations - len(data))


@torch.no_grad()
def _takes_integers(embedding: nn.Module | None, data: Tensor) -> bool:
    """Return whether data are integers or booleans that an embedding takes as they are, such as words or classes."""
    if embedding is None or data.is_floating_point():
        return False
    try:
        with evaluating(embedding):
            return isinstance(embedding(data), Tensor)
    except Exception:  # its class depends on the layer that expects other numbers
        return False


class _ScaledEmbedding(Recorded, nn.Module):
    """An embedding of data that are brought to one scale first, those far out by their logarithm."""

    centre: Tensor
    scale: Tensor

    def __init__(self, centre: Tensor, scale: Tensor, network: nn.Module | None):
        super().__init__()
        self.register_buffer("centre", centre)
        self.register_buffer("scale", scale)
        self.network = network

    @classmethod
    def from_data(cls, data: Tensor, network: nn.Module | None) -> "_ScaledEmbedding":
        data = data if data.is_floating_point() else data.float()
        columns = data.flatten(1).split(max(1, _NUMBERS_AT_ONCE // len(data)), 1)
        quantiles = data.new_tensor([0.1587, 0.5, 0.8413])
        low, centre, high = torch.cat([part.quantile(quantiles, 0) for part in columns], 1).unflatten(1, data.shape[1:])
        scale = (high - low) / 2
        scale = torch.where(scale > 0, scale, data.std(0))
        return cls(centre, torch.where(scale > 0, scale, 1), network)

    def forward(self, data: Tensor) -> Tensor:
        if not data.is_floating_point() and self.network is not None:
            return self.network(data)
        z = (data - self.centre) / self.scale
        z = z.clamp(-_LINEAR, _LINEAR) * (1 + (z.abs() / _LINEAR).clamp(min=1).log())
        return z if self.network is None else self.network(z)


class _LinearShift(Bijection):
    r"""A shift that is linear in the context, :math:`y = x + W c + b`."""

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__(weight.shape[0], context_features=weight.shape[1])
        # By rows, as it comes back from a file: the order decides how a product rounds.
        self.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
        self.bias = nn.Parameter(bias.clone())

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x + self._shift(context), x.new_zeros(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return y - self._shift(context), y.new_zeros(y.shape[:-1])

    def _shift(self, context: Any) -> Tensor:
        return nn.functional.linear(context, self.weight, self.bias)


@torch.no_grad()
def _regression_layers(latents: Tensor, context: Tensor) -> list[Bijection]:
    """Return layers initialised to the ridge regression of latents on context: the residuals' scale, and the mean."""
    x, y = context.double(), latents.double()
    num_validation = max(1, len(x) // 10)
    centre, mean = x.mean(0), y.mean(0)
    centred_x, centred_y = (x - centre)[num_validation:], (y - mean)[num_validation:]
    values, directions = torch.linalg.eigh(centred_x.T @ centred_x)
    projected = directions.T @ (centred_x.T @ centred_y)
    values = values.clamp(min=0)
    # The penalty with the smallest validation error, from almost none to one that shrinks almost everything to zero.
    penalties = values.max().clamp(min=1e-12) * torch.logspace(-10, 1, 12).to(values)
    weights = [(directions @ (projected / (values + penalty)[:, None])).T for penalty in penalties]
    errors = [(((y - mean) - (x - centre) @ weight.T)[:num_validation] ** 2).mean() for weight in weights]
    weight = weights[int(torch.stack(errors).argmin())]
    residuals = y - mean - (x - centre) @ weight.T
    scale = torch.linalg.cholesky(residuals.T.cov().reshape(y.shape[1], -1) + 1e-6 * torch.eye(y.shape[1]).to(y))
    triangular = TriangularAffine(y.shape[1])
    triangular.start_at(torch.zeros_like(mean), scale)
    return [triangular, _LinearShift(weight, mean - weight @ centre)]


def _default_flow(features: int, context_features: int) -> Flow:
    """Build a flow of affine layers, which set location and scale, and of splines, which set the shape."""
    # Splines alone would reach only to their bound: for a posterior far narrower than the prior, the outermost draws
    # of the prior would stay outliers.
    layers: list[Bijection] = []
    network: Any = {"hidden_features": (64, 64), "residual": True, "activation": "gelu"}
    for transformer in (Spline(bound=5.0), Spline(bound=5.0), Affine(), Affine()):
        if layers:
            layers.append(Permutation(features, "reverse"))
        layers.append(
            MaskedAutoregressive(features, transformer=transformer, context_features=context_features, **network)
        )
    return Flow(StandardNormal(features), layers)


class AmortizedPosterior:
    """The posterior of a model's latents for any data, as :func:`fit_amortized` returns it.

    It can be saved, see :meth:`save`, and pickled, but for the model, without which ``calibrate`` is unavailable.

    Args:
        flow: over the unconstrained latents given the data.
        simulator: of the model.
        fit: the result of the fit.
        data: the simulated data that it was fitted to.
        num_dropped: the number of simulations that were left out because they were not finite.

    Attributes:
        observed, latents: the shapes of the sites by name.

    Shapes:
        data: ``(*batch, *shape)`` of each observed site; draws: ``(n, *batch, *shape)`` of each latent.

    Raises:
        ValueError: the data are of another shape, of sites that are missing or not observed, or not finite.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("y", dist.Normal(pyro.sample("mean", dist.Normal(0.0, 1.0)), 1.0))
        >>> posterior = fit_amortized(model, ["y"], num_simulations=500, epochs=2, seed=0)
        >>> posterior.covers(torch.tensor([0.0, 1.0, 30.0]))
        tensor([ True,  True, False])
    """

    _integers: torch.dtype | None = None  # of the data, if they reach the embedding as they are

    def __init__(self, flow: Flow, simulator: Simulator, fit: FitResult, data: Tensor, num_dropped: int):
        self.flow, self.fit, self.num_dropped = flow, fit, num_dropped
        self.num_simulations = len(data)
        self.simulator: Simulator | None = simulator
        self.observed = {name: simulator.shapes[name] for name in simulator.observed}
        self.latents = {site.name: site.shape for site in simulator.latents}
        self._sites = simulator.latents
        self._low, self._high = (limit.to(flow.dtype) for limit in (data.amin(0), data.amax(0)))
        self._integers = None if data.is_floating_point() else data.dtype

    @torch.no_grad()
    def draws(self, n: int, data: Tensor | Mapping[str, Tensor], *, seed: int | None = None) -> dict[str, Tensor]:
        """Draw latents given data, perhaps a batch of data sets; data of one site need no name."""
        check_sizes(n=n)
        context, batch = self._context(data)
        at_once = max(1, _ROWS_AT_ONCE // max(1, batch.numel()))
        distribution = FlowDistribution(self.flow, context)
        with seeded(seed, self.flow.device):
            vector = torch.cat([distribution.sample((min(at_once, n - i),)) for i in range(0, n, at_once)])
        return constrain(self._sites, vector)

    def log_prob(self, values: Mapping[str, Tensor], data: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Return the log-density of latents given data; the batch shapes of the two are broadcast."""
        context, _ = self._context(data)
        values = {name: torch.as_tensor(value).to(context) for name, value in values.items()}
        vector, log_det = unconstrain(self._sites, values)
        return self.flow.log_prob_embedded(vector, context) - log_det

    def covers(self, data: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Return, for each data set, whether all its values are in or near the range of the simulations.

        The posterior of a data set outside that range is not to be trusted.
        """
        rows, batch = self._read(data)
        slack = _RANGE * (self._high - self._low)
        inside = (rows >= self._low - slack) & (rows <= self._high + slack)
        return inside.reshape(len(rows), -1).all(-1).reshape(batch)

    def calibrate(
        self,
        num_simulations: int = 1000,
        *,
        num_draws: int = 199,
        levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95),
        seed: int | None = None,
        progress: bool | None = None,
    ) -> Calibration:
        """Compute the ranks of the true latents of new simulations, their chi-square p-values, and the coverage."""
        if self.simulator is None:
            advice = "pass it to AmortizedPosterior.load"
            got = f"one without, as neither a pickle nor a file keeps it: {advice}"
            raise ValueError(f"expected a posterior with its model; got {got}")
        with seeded(seed, self.flow.device):
            values = self.simulator.finite(num_simulations, bool(self.num_dropped), progress)
            draws = self.draws(num_draws, {name: values[name] for name in self.observed})
        names = [label for name, shape in self.latents.items() for label in labels(name, shape)]
        columns = torch.cat([draws[name][..., None].flatten(2) for name in self.latents], -1)
        truth = torch.cat([values[name][..., None].flatten(1) for name in self.latents], -1)
        return calibration(columns.movedim(0, 1), truth, names, levels=levels)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all but the model to a safetensors file, from which :meth:`load` builds an equal posterior.

        Args:
            path: path of the file, which is replaced atomically.

        Raises:
            ValueError: a file cannot hold a support, or a part of the flow outside the embedding, or the folder does
                not exist.
        """
        header, tensors = header_of(self.flow, self.flow.notes, _PLACE)
        supports, support_tensors = _describe_supports(self._sites)
        sites = [[s.name, list(s.shape), list(s.unconstrained_shape), s.start, s.plate_ndim] for s in self._sites]
        header |= {
            "sites": sites,
            "supports": supports,
            "observed": [[name, list(shape)] for name, shape in self.observed.items()],
            "num_simulations": self.num_simulations,
            "num_dropped": self.num_dropped,
            "integers": str(self._integers),
            "fit": asdict(self.fit),
        }
        tensors |= {f"support.{name}": tensor for name, tensor in support_tensors.items()}
        write(path, _KIND, header, {**tensors, "low": self._low, "high": self._high})

    @staticmethod
    def load(
        path: str | os.PathLike[str],
        device: str | torch.device = "cpu",
        *,
        model: Model | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        classes: Sequence[type] = (),
        embedding: nn.Module | None = None,
    ) -> "AmortizedPosterior":
        """Read what :meth:`save` wrote, without running code from the file.

        Args:
            path: path of the file.
            device: device of the flow.
            model: the model, which no file holds; only :meth:`calibrate` needs it.
            args, kwargs: its arguments.
            classes: the user's own classes from which the flow and its embedding were built, see
                :func:`pyroflows.load`.
            embedding: the embedding, built as it was, to take the weights in the file; instead of its classes.

        Raises:
            FileNotFoundError: the file does not exist.
            TypeError: ``classes`` is not a list of classes, or ``embedding`` is not a module.
            ValueError: the file does not hold an amortized posterior, is damaged or of another version of the format;
                or its classes, its embedding or its model are others.
        """
        check_own(classes, embedding)
        header, tensors = read(path, _KIND)
        flow = flow_of(header, tensors, path, classes, _PLACE, embedding).to(device)
        sites = _sites_of(header, tensors, device, classes, path)
        try:
            state = {
                "flow": flow,
                "simulator": None,
                "fit": FitResult(**header["fit"]),
                "num_simulations": header["num_simulations"],
                "num_dropped": header["num_dropped"],
                "observed": {name: Size(shape) for name, shape in header["observed"]},
                "latents": {site.name: site.shape for site in sites},
                "_sites": sites,
                "_integers": {str(dtype): dtype for dtype in (None, *_INTEGERS)}[header["integers"]],
                "_low": tensors["low"].to(device),
                "_high": tensors["high"].to(device),
            }
        except (KeyError, TypeError, ValueError) as error:
            raise _no_posterior(path, error) from None
        posterior = AmortizedPosterior.__new__(AmortizedPosterior)
        vars(posterior).update(state)
        if model is not None:
            posterior.simulator = _simulator_of(model, args, kwargs or {}, posterior.observed, sites, path)
        return posterior

    def _context(self, data: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, Size]:
        rows, batch = self._read(data)
        return cast(Tensor, self.flow.embed(rows)).reshape(*batch, self.flow.context_features), batch

    def _read(self, data: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, Size]:
        """Return data as rows that the embedding takes, and their batch shape."""
        names = ", ".join(map(repr, self.observed))
        if not isinstance(data, Mapping):
            if len(self.observed) > 1:
                raise ValueError(f"expected data by name of the sites {names}; got {type(data).__name__}")
            data = {next(iter(self.observed)): data}
        if set(data) != set(self.observed):
            got = ", ".join(map(repr, data)) or "none"
            raise ValueError(f"expected data of the sites {names}; got {got}")
        values, batches = {}, set()
        for name, shape in self.observed.items():
            value = torch.as_tensor(data[name]).to(self._low.device)
            value = value if self._integers and not value.is_floating_point() else value.to(self._low)
            batch = value.shape[: value.dim() - len(shape)]
            if value.shape != batch + shape:
                raise ValueError(f"expected data of {name!r} of shape {batched_shape(shape)}; got {tuple(value.shape)}")
            if not value.isfinite().all():
                raise ValueError(f"expected finite data; got {int((~value.isfinite()).sum())} numbers not, at {name!r}")
            if self._integers is not None:
                if (value != value.to(self._integers)).any():
                    expected = str(self._integers).removeprefix("torch.")
                    raise ValueError(f"expected data of {name!r} of dtype {expected}; got numbers that are not")
                value = value.to(self._integers)
            batches.add(batch)
            values[name] = value.reshape(batch.numel(), *shape)
        if len(batches) > 1:
            got = " and ".join(str(tuple(batch)) for batch in batches)
            raise ValueError(f"expected data of one batch shape; got {got}")
        return _rows_of_data(list(values), values, flat=self._low.dim() == 1), batches.pop()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "simulator": None}

    def __repr__(self) -> str:
        dropped = f", {self.num_dropped} dropped" if self.num_dropped else ""
        return (
            f"AmortizedPosterior({', '.join(self.latents)} given {', '.join(self.observed)}; "
            f"{self.num_simulations} simulations{dropped}, {self.fit.seconds:.1f} s)"
        )


def _describe_supports(sites: Sequence[LatentSite]) -> tuple[Any, dict[str, Tensor]]:
    """Return the recipe of the supports of sites, and its tensors; refuse a support that a file cannot hold."""
    recipe, tensors, rebuilt = describe_value([site.support for site in sites], "supports")
    for site, support in zip(sites, rebuilt, strict=True):
        if not _has_support(site, support):
            raise ValueError(f"expected supports that a file can hold; got {site.support} of site {site.name!r}")
    return recipe, tensors


def _has_support(site: LatentSite, support: Any) -> bool:
    number = site.unconstrained_shape.numel()
    point = torch.linspace(-2, 2, max(2, number))[:number].reshape(site.unconstrained_shape)
    return have_one_image((site.support, support), point)


def _sites_of(
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    device: str | torch.device,
    classes: Sequence[type],
    path: str | os.PathLike[str],
) -> list[LatentSite]:
    """Return the latent sites of the header and the tensors in a file."""
    prefix = "support."
    held = {name.removeprefix(prefix): t.to(device) for name, t in tensors.items() if name.startswith(prefix)}
    try:
        supports: Any = build(header.get("supports"), held, classes)
    except ValueError as error:
        raise ValueError(f"{error}, in {path}") from None
    try:
        return [
            LatentSite(name, Size(shape), Size(unconstrained_shape), start, support, plate_ndim)
            for (name, shape, unconstrained_shape, start, plate_ndim), support in zip(
                header["sites"], supports, strict=True
            )
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise _no_posterior(path, error) from None


def _no_posterior(path: str | os.PathLike[str], error: Exception) -> ValueError:
    got = f"{path}, whose header makes no sense: {error}"
    return ValueError(f"expected an amortized posterior written by save; got {got}")


def _simulator_of(
    model: Model,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    observed: Mapping[str, Size],
    sites: Sequence[LatentSite],
    path: str | os.PathLike[str],
) -> Simulator:
    """Return the simulator of a model; refuse one whose sites are not those of the posterior in a file."""
    check_model(model)
    with seeded(0):
        simulator = Simulator(model, args, kwargs, list(observed), [site.name for site in sites])
    shapes = {**observed, **{site.name: site.shape for site in sites}}
    if simulator.shapes != shapes:
        raise ValueError(
            f"expected a model with the sites of {path}, {_listed(shapes)}; got {_listed(simulator.shapes)}"
        )
    for site, other in zip(sites, simulator.latents, strict=True):
        if not _has_support(site, other.support):
            expected = f"a model with the sites of {path}, {site.name!r} with support {site.support}"
            raise ValueError(f"expected {expected}; got {other.support}")
    return simulator


def _listed(shapes: Mapping[str, Size]) -> str:
    return ", ".join(f"{name!r} {tuple(shape)}" for name, shape in sorted(shapes.items()))


def _rows_of_data(names: Sequence[str], values: Mapping[str, Tensor], *, flat: bool) -> Tensor:
    """Return the numbers of the sites as ``(rows, numbers)``; those of a single site as they are, unless flat."""
    for name in names:
        if values[name].is_complex():
            raise ValueError(f"expected observed sites of real numbers; got complex ones at site {name!r}")
    if len(names) == 1 and values[names[0]].dim() > 1 and not flat:
        return values[names[0]]
    rows = torch.cat([values[name][..., None].flatten(1) for name in names], -1)
    if not rows.shape[1]:
        raise ValueError(f"expected observed sites with at least one number; got none at {', '.join(map(repr, names))}")
    return rows
