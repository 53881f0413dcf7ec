"""Amortised posteriors from simulations: the posterior of a simulator's latents for any data, by a conditional flow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor, nn
from torch.distributions import biject_to

from pyroflows.arguments import check_sizes
from pyroflows.bijection import Bijection
from pyroflows.contexts import evaluating, seeded
from pyroflows.diagnostics.arrays import labels
from pyroflows.diagnostics.calibration import Calibration, calibration
from pyroflows.flow import Flow
from pyroflows.inference.amortized import Builder, Part, built, join, unconstrained_start
from pyroflows.layers.autoregressive import MaskedAutoregressive
from pyroflows.layers.permutation import Permutation
from pyroflows.layers.pointwise import Standardize
from pyroflows.layers.spline import Spline
from pyroflows.layers.transformers import Affine
from pyroflows.layers.triangular import TriangularAffine
from pyroflows.priors import StandardNormal
from pyroflows.training import FitOptions, FitResult, fit

__all__ = ["AmortizedPosterior", "fit_amortized"]

_SIMULATIONS_AT_ONCE = 2000
_ROWS_AT_ONCE = 200_000
_LINEAR = 5.0  # scales; data further out enter a network by their logarithm
_RANGE = 0.1  # how far outside the range of the simulations data may lie, as a share of it


class _Free(Messenger):
    """Draws observed sites anew, or gives sites the values that are set; notes what else was observed."""

    def __init__(self, observed: Sequence[str], values: Mapping[str, Tensor]):
        super().__init__()
        self.observed, self.values = observed, values
        self.others: list[str] = []

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if "_deterministic" in msg["infer"] or site_is_subsample(msg):
            return
        if msg["is_observed"] and name in self.observed:
            msg["is_observed"], msg["value"], msg["done"] = False, None, False
        elif msg["is_observed"]:
            self.others.append(name)
        if name in self.values:
            msg["value"] = self.values[name]


class _Simulator:
    """Draws latents and data from a model, many simulations at once where that gives what single runs give."""

    def __init__(
        self,
        model: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        observed: Sequence[str],
        latents: Sequence[str] | None,
    ):
        self.model, self.args, self.kwargs = model, tuple(args), dict(kwargs)
        self.observed = [observed] if isinstance(observed, str) else list(observed)
        self.nesting = 0
        runs = [self._run() for _ in range(3)]
        first = runs[0].nodes
        samples = [name for name, node in first.items() if node["type"] == "sample" and not site_is_subsample(node)]
        if not self.observed:
            raise ValueError("expected the name of at least one observed site; got none")
        if latents is None:
            free = [name for name in samples if not first[name]["is_observed"]]
            latents = [name for name in free if name not in self.observed]
        self.latents = [latents] if isinstance(latents, str) else list(latents)
        if not self.latents:
            raise ValueError("expected a model with latent sites; got none")
        for name in (*self.observed, *self.latents):
            if name not in samples:
                raise ValueError(f"expected names among the sites {', '.join(map(repr, samples))}; got {name!r}")
        twice = set(self.observed) & set(self.latents)
        if twice:
            raise ValueError(f"expected a site to be either latent or observed; got {min(twice)!r} as both")
        for name, node in first.items():
            if node["type"] == "sample" and site_is_subsample(node) and len(node["value"]) < node["fn"].size:
                raise ValueError(
                    f"expected plates that take all rows; got plate {name!r}, which draws {len(node['value'])} "
                    f"of {node['fn'].size}"
                )
        self.nesting = max(
            len(first[name]["fn"].batch_shape) if "_deterministic" not in first[name]["infer"] else 0
            for name in samples
        )
        frames = [f for name in samples for f in first[name]["cond_indep_stack"] if f.vectorized]
        self.nesting = max([self.nesting, *(-frame.dim for frame in frames)])
        self.shapes = {name: self._value(runs[0], name).shape for name in (*self.observed, *self.latents)}
        self.parts = self._read_parts(runs)
        self.parallel = self._is_parallel(runs, samples)

    def _read_parts(self, runs: Sequence[poutine.Trace]) -> list[Part]:
        parts: list[Part] = []
        for name in self.latents:
            support, value = runs[0].nodes[name]["fn"].support, self._value(runs[0], name)
            unconstrained = unconstrained_start(name, support, value)
            point = torch.randn_like(unconstrained)
            images = [biject_to(run.nodes[name]["fn"].support)(point) for run in runs if name in run.nodes]
            if any(image.shape != value.shape or not torch.equal(image, images[0]) for image in images):
                raise ValueError(
                    f"expected latents whose support does not depend on other sites; got site {name!r} with support "
                    f"{support}"
                )
            parts.append(Part(name, value.shape, unconstrained.shape, parts[-1].stop if parts else 0, support))
        return parts

    def _run(self, points: int | None = None, values: Mapping[str, Tensor] | None = None) -> poutine.Trace:
        free = _Free(self.observed, values or {})
        with poutine.block(), torch.no_grad():
            if points is None:
                with free:
                    trace = poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
            else:
                with pyro.plate("_simulations", points, dim=-self.nesting - 1), free:
                    trace = poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
        if free.others:
            raise ValueError(
                f"expected a model that can be simulated; got site {free.others[0]!r}, which is observed and not "
                f"among observed={self.observed}"
            )
        return trace

    def _value(self, trace: poutine.Trace, name: str) -> Tensor:
        if name not in trace.nodes:
            raise ValueError(f"expected the same sites in every run of the model; got {name!r} in some alone")
        value = trace.nodes[name]["value"]
        if not isinstance(value, Tensor):
            raise TypeError(f"expected sites that are tensors; got {type(value).__name__} at site {name!r}")
        return value

    def _is_parallel(self, runs: Sequence[poutine.Trace], samples: Sequence[str]) -> bool:
        """Compare densities and deterministic values of single runs with those of one run for all of them."""
        try:
            values = {}
            for name in samples:
                fn = runs[0].nodes[name]["fn"]
                stacked = torch.stack([run.nodes[name]["value"] for run in runs])
                pad = (1,) * (self.nesting - len(fn.batch_shape))
                values[name] = stacked.reshape(len(runs), *pad, *stacked.shape[1:])
            together = self._run(len(runs), values)
            for trace in (together, *runs):
                trace.compute_log_prob()
            for name in samples:
                node = together.nodes[name]
                deterministic = "_deterministic" in node["infer"]
                key = "value" if deterministic else "log_prob"
                ours = node[key].reshape(len(runs), -1)
                theirs = torch.stack([run.nodes[name][key].reshape(-1) for run in runs])
                if not deterministic:
                    ours, theirs = ours.sum(-1), theirs.sum(-1)
                if not torch.allclose(ours, theirs.to(ours), rtol=1e-4, atol=1e-4, equal_nan=True):
                    return False
            self._collect(self._run(len(runs)), len(runs))
        except Exception:  # whatever the model does not stand: single runs then show a fault of its own
            return False
        return True

    def _collect(self, trace: poutine.Trace, points: int | None) -> dict[str, Tensor]:
        values = {}
        for name, shape in self.shapes.items():
            value = self._value(trace, name)
            if points is None and value.shape != shape:
                raise ValueError(
                    f"expected site {name!r} to have one shape in every run; got {tuple(shape)} and "
                    f"{tuple(value.shape)}"
                )
            values[name] = value.reshape(1 if points is None else points, *shape)
        return values

    def __call__(self, number: int, progress: bool | None = None) -> dict[str, Tensor]:
        """Give ``number`` simulations of every site, each of shape ``(number, *shape)``."""
        from tqdm.auto import tqdm

        sizes = [min(_SIMULATIONS_AT_ONCE, number - i) for i in range(0, number, _SIMULATIONS_AT_ONCE)]
        parts: dict[str, list[Tensor]] = {name: [] for name in self.shapes}
        disable = None if progress is None else not progress
        with tqdm(total=number, disable=disable, unit="simulation", leave=False) as bar:
            for points in sizes if self.parallel else [None] * number:
                for name, value in self._collect(self._run(points), points).items():
                    parts[name].append(value)
                bar.update(points or 1)
        return {name: torch.cat(values) for name, values in parts.items()}

    def vectors(self, values: Mapping[str, Tensor]) -> Tensor:
        """Give the latents of simulations as unconstrained vectors."""
        return join(self.parts, values, 1)[0]

    def finite(self, values: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, int]]:
        """Tell which simulations are finite, and how many are not by site; latents in unconstrained space."""
        masks = {name: values[name].reshape(len(values[name]), -1).isfinite().all(-1) for name in self.observed}
        for part in self.parts:
            unconstrained = part.unconstrain(values[part.name], values[part.name].shape[:1])[0]
            masks[part.name] = unconstrained.isfinite().all(-1)
        bad = {name: int((~mask).sum()) for name, mask in masks.items()}
        return torch.stack(list(masks.values())).all(0), {name: count for name, count in bad.items() if count}


class _Scaled(nn.Module):
    """Brings every number of the data to one scale, those far out by their logarithm, before a network."""

    centre: Tensor
    scale: Tensor

    def __init__(self, data: Tensor, network: nn.Module | None):
        super().__init__()
        low, centre, high = (data.quantile(q, 0) for q in (0.1587, 0.5, 0.8413))
        scale = (high - low) / 2
        scale = torch.where(scale > 0, scale, data.std(0))
        self.register_buffer("centre", centre)
        self.register_buffer("scale", torch.where(scale > 0, scale, 1))
        self.network = network

    def forward(self, data: Tensor) -> Tensor:
        z = (data - self.centre) / self.scale
        z = z.clamp(-_LINEAR, _LINEAR) * (1 + (z.abs() / _LINEAR).clamp(min=1).log())
        return z if self.network is None else self.network(z)


def fit_amortized(
    model: Callable[..., Any],
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
) -> AmortizedPosterior:
    r"""Learn the posterior of a Pyro model for any data: simulate latents and data, and fit a conditional flow.

    .. math:: \max_\phi \; \mathbb{E}_{p(\theta) p(y \mid \theta)} \log q_\phi(\theta \mid y)

    Only draws from the model are needed, no density: it may be a simulator. Observed sites are drawn, whether or not
    the arguments hold data for them; sites that are neither latent nor observed are averaged over. Simulations run
    many at once in a plate where that gives the same as single runs, which is tested, else one by one.

    Args:
        model: a Pyro model, or a simulator with its priors and random numbers as Pyro sites.
        observed: the sites that will be data; a deterministic site, such as a summary, may be one.
        latents: the sites to infer; by default all that are not observed.
        num_simulations: drawn from the model; a tenth validates the fit.
        flow: over the unconstrained latents given the context, or its builder, called as
            ``flow(features, context_features=...)``; by default an autoregressive spline flow.
        embedding: a network that makes the context, from one observed site as it is, or from several flattened to one
            vector; without, the flow takes the numbers of the data.
        args: arguments of the model.
        kwargs: keyword arguments of the model.
        drop_nonfinite: leave out simulations that are not finite (right where data that are not finite are never
            observed); they are counted in the result's ``num_dropped``.
        seed: of simulations, weights and fit.
        progress: whether to show bars; by default on a terminal alone.
        fit_options: of :func:`fit`, such as ``epochs`` and ``batch_size``.

    Shapes:
        embedding: ``(rows, *shape)`` of one observed site, or ``(rows, numbers)``, to ``(rows, context_features)``.

    Returns:
        The posterior, to be asked with data.

    Raises:
        TypeError: a site that is no tensor, no builder of a flow, or an option that ``fit`` does not take.
        ValueError: no such site, a discrete latent, a support that depends on other sites, sites whose shape varies,
            another observed site, a subsampled plate, simulations that are not finite, or a flow of other sizes.

    References:
        Fast epsilon-free Inference of Simulation Models with Bayesian Conditional Density Estimation, Papamakarios and
        Murray, 2016 (arXiv:1605.06376); Automatic Posterior Transformation for Likelihood-Free Inference, Greenberg et
        al., 2019 (arXiv:1905.07488); Neural Spline Flows, Durkan et al., 2019 (arXiv:1906.04032).

    Example:
        >>> import pyro.distributions as dist
        >>> def model():
        ...     scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
        ...     pyro.sample("y", dist.Normal(torch.zeros(20), scale).to_event(1))
        >>> posterior = fit_amortized(model, ["y"], num_simulations=500, epochs=2, seed=0)
        >>> posterior.draws(100, torch.randn(20))["scale"].shape
        torch.Size([100])
    """
    if not callable(model):
        raise TypeError(f"expected a Pyro model, a callable; got {type(model).__name__}")
    if embedding is not None and not isinstance(embedding, nn.Module):
        raise TypeError(f"expected an embedding that is a torch module; got {type(embedding).__name__}")
    if isinstance(flow, Flow) and flow.embedding is not None and embedding is not None:
        raise ValueError("expected one embedding; got one in the flow and one beside it")
    check_sizes(num_simulations=num_simulations)
    with seeded(seed, torch.device("cpu")):
        simulator = _Simulator(model, args, kwargs or {}, observed, latents)
        values = simulator(num_simulations, progress)
        kept, bad = simulator.finite(values)
        dropped = num_simulations - int(kept.sum())
        if dropped and not drop_nonfinite:
            where = ", ".join(f"{count} at site {name!r}" for name, count in bad.items())
            raise ValueError(
                f"expected finite simulations; got {dropped} of {num_simulations} that are not ({where}): "
                "bound the prior, or leave them out by drop_nonfinite=True"
            )
        values = {name: value[kept] for name, value in values.items()}
        vectors = simulator.vectors(values)
        data = _flatten(simulator.observed, values, 1).to(vectors)
        if isinstance(flow, Flow) and flow.embedding is not None:
            embedding, flow = flow.embedding, Flow(flow.prior, flow.bijection)
        front = _Scaled(data, embedding).to(vectors)
        with torch.no_grad(), evaluating(front):
            context = front(data[:2])
        if not isinstance(context, Tensor) or context.dim() != 2:
            got = f"shape {tuple(context.shape)}" if isinstance(context, Tensor) else type(context).__name__
            raise ValueError(f"expected an embedding that gives (rows, context_features); got {got}")
        wanted = (vectors.shape[1], context.shape[1])
        own = isinstance(flow, Flow)
        if not isinstance(flow, Flow):
            flow = built(_default_flow if flow is None else flow, *wanted)
        elif (flow.event_shape.numel(), flow.context_features) != wanted:
            raise ValueError(
                f"expected a flow over {wanted[0]} features with context_features={wanted[1]}, the latents and the "
                f"context; got {flow.event_shape.numel()} and {flow.context_features}"
            )
        standardize = Standardize.from_data(vectors)
        layers = list(flow.layers)
        if embedding is None and not own:
            layers += _regression(standardize.inv(vectors), front(data))
        whole = Flow(flow.prior, [*layers, standardize], embedding=front).to(vectors)
        options = {**_fit_options(len(data)), **fit_options}
        result = fit(whole, vectors, context=data, progress=progress, **options)
    return AmortizedPosterior(whole, simulator, result, data, dropped)


class _LinearShift(Bijection):
    r"""A shift that is linear in the context.

    .. math:: y = x + W c + b, \qquad \log|\det dy/dx| = 0
    """

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__(weight.shape[0], context_features=weight.shape[1])
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x + nn.functional.linear(cast(Tensor, context), self.weight, self.bias), x.new_zeros(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return y - nn.functional.linear(cast(Tensor, context), self.weight, self.bias), y.new_zeros(y.shape[:-1])


@torch.no_grad()
def _regression(vectors: Tensor, context: Tensor) -> list[Bijection]:
    """Give layers that start as the ridge regression of latents on context: its residuals' scale, and its mean."""
    x, y = context.double(), vectors.double()
    held = max(1, len(x) // 10)
    centre, mean = x.mean(0), y.mean(0)
    values, directions = torch.linalg.eigh((x - centre)[held:].T @ (x - centre)[held:])
    projected = directions.T @ ((x - centre)[held:].T @ (y - mean)[held:])
    values = values.clamp(min=0)
    # The penalty that predicts the rows left out best, from almost none to one that leaves almost nothing.
    penalties = values.max().clamp(min=1e-12) * torch.logspace(-10, 1, 12).to(values)
    weights = [(directions @ (projected / (values + penalty)[:, None])).T for penalty in penalties]
    errors = [(((y - mean) - (x - centre) @ weight.T)[:held] ** 2).mean() for weight in weights]
    weight = weights[int(torch.stack(errors).argmin())]
    residuals = y - mean - (x - centre) @ weight.T
    scale = torch.linalg.cholesky(residuals.T.cov().reshape(y.shape[1], -1) + 1e-6 * torch.eye(y.shape[1]).to(y))
    triangular = TriangularAffine(y.shape[1])
    triangular.start_at(torch.zeros_like(mean), scale)
    return [triangular, _LinearShift(weight, mean - weight @ centre)]


def _default_flow(features: int, context_features: int) -> Flow:
    """Give a flow of affine layers, which set location and scale, around splines, which set the shape.

    The splines alone would reach only to their bound: a posterior far narrower than the prior, squeezed by them, keeps
    the outermost draws of the prior as outliers.
    """
    layers: list[Bijection] = []
    for transformer in (Spline(bound=5.0), Spline(bound=5.0), Affine(), Affine()):
        if layers:
            layers.append(Permutation(features, "reverse"))
        made = MaskedAutoregressive(
            features,
            transformer=transformer,
            context_features=context_features,
            hidden_features=(64, 64),
            residual=True,
            activation="gelu",
        )
        layers.append(made)
    return Flow(StandardNormal(features), layers)


def _fit_options(num_simulations: int) -> dict[str, Any]:
    """Give options of ``fit`` that need no tuning: about as many steps for any number of simulations."""
    epochs = min(100, max(10, 500_000 // num_simulations))
    return {
        "epochs": epochs,
        "batch_size": min(128, num_simulations // 2),
        "learning_rate": 2e-3,
        "options": FitOptions(ema_decay=0.998),
    }


class AmortizedPosterior:
    """The posterior of a model's latents for any data, as :func:`fit_amortized` gives it.

    It pickles, but for the model, without which ``calibrate`` is not to be had.

    Args:
        flow: over the unconstrained latents given the data.
        simulator: of the model.
        fit: what the fit did.
        data: the simulated data that it was fitted to.
        num_dropped: the simulations left out because they were not finite.

    Shapes:
        data: ``(*batch, *shape)`` of each observed site; draws: ``(n, *batch, *shape)`` of each latent.

    Raises:
        ValueError: data of another shape, of sites that are missing or not observed, or not finite.

    Example:
        >>> import pyro.distributions as dist
        >>> def model():
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mean, 1.0))
        >>> posterior = fit_amortized(model, ["y"], num_simulations=500, epochs=2, seed=0)
        >>> y = torch.tensor([0.0, 1.0, 30.0])
        >>> posterior.log_prob({"mean": torch.zeros(3)}, {"y": y}).shape
        torch.Size([3])
        >>> posterior.covers(y)
        tensor([ True,  True, False])
    """

    def __init__(self, flow: Flow, simulator: _Simulator, fit: FitResult, data: Tensor, num_dropped: int):
        self.flow, self.fit, self.num_dropped = flow, fit, num_dropped
        self.num_simulations = len(data)
        self._simulator: _Simulator | None = simulator
        self._parts = simulator.parts
        self._observed = {name: simulator.shapes[name] for name in simulator.observed}
        self._low, self._high = data.amin(0), data.amax(0)

    @property
    def observed(self) -> dict[str, Size]:
        """The observed sites, and their shapes."""
        return dict(self._observed)

    @property
    def latents(self) -> dict[str, Size]:
        """The latent sites, and their shapes."""
        return {part.name: part.event_shape for part in self._parts}

    @torch.no_grad()
    def draws(self, n: int, data: Tensor | Mapping[str, Tensor], *, seed: int | None = None) -> dict[str, Tensor]:
        """Draw latents given data, of which there may be a batch; data of one site need no name."""
        check_sizes(n=n)
        context, batch = self._context(data)
        at_once = max(1, _ROWS_AT_ONCE // max(1, batch.numel()))
        with seeded(seed, self.flow.device):
            sizes = [min(at_once, n - i) for i in range(0, n, at_once)]
            vector = torch.cat([self._given.sample((size,), context) for size in sizes])
        return {part.name: part.constrain(vector, vector.shape[:-1])[0] for part in self._parts}

    def log_prob(self, values: Mapping[str, Tensor], data: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Give the log-density of latents given data; the batch shapes of the two are broadcast."""
        context, _ = self._context(data)
        values = {name: torch.as_tensor(value).to(context) for name, value in values.items()}
        vector, log_det = join(self._parts, values, 0)
        return self._given.log_prob(vector, context) - log_det

    def covers(self, data: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Tell of each data set whether every number lies where simulations lay, or next to it; else, do not trust."""
        given, batch = self._read(data)
        slack = _RANGE * (self._high - self._low)
        inside = (given >= self._low - slack) & (given <= self._high + slack)
        return inside.reshape(len(given), -1).all(-1).reshape(batch)

    def calibrate(
        self,
        num_simulations: int = 1000,
        *,
        num_draws: int = 199,
        levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95),
        seed: int | None = None,
        progress: bool | None = None,
    ) -> Calibration:
        """Simulate anew, and give the ranks of the true latents, their chi-square p-values, and the coverage."""
        if self._simulator is None:
            raise ValueError("expected a posterior with its model, which a pickle does not keep; got one without")
        with seeded(seed, self.flow.device):
            values = self._simulator(num_simulations, progress)
            kept, bad = self._simulator.finite(values)
            if bad and not self.num_dropped:
                name, count = next(iter(bad.items()))
                raise ValueError(f"expected finite simulations; got {count} of {num_simulations} not, at site {name!r}")
            values = {name: value[kept] for name, value in values.items()}
            draws = self.draws(num_draws, {name: values[name] for name in self._observed})
        names = [label for part in self._parts for label in labels(part.name, part.event_shape)]
        joined = torch.cat(
            [draws[part.name].flatten(2) if part.event_shape else draws[part.name][..., None] for part in self._parts],
            -1,
        )
        truth = torch.cat([values[part.name].reshape(len(joined[0]), -1) for part in self._parts], -1)
        return calibration(joined.movedim(0, 1), truth, names, levels=levels)

    @property
    def _given(self) -> Flow:
        """The flow given an embedded context."""
        return Flow(self.flow.prior, self.flow.bijection)

    def _context(self, data: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, Size]:
        given, batch = self._read(data)
        return cast(Tensor, self.flow.embed(given)).reshape(*batch, self.flow.context_features), batch

    def _read(self, data: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, Size]:
        """Give data as rows that the embedding takes, and their batch shape."""
        names = ", ".join(map(repr, self._observed))
        if not isinstance(data, Mapping):
            if len(self._observed) > 1:
                raise ValueError(f"expected data by name of the sites {names}; got {type(data).__name__}")
            data = {next(iter(self._observed)): data}
        if set(data) != set(self._observed):
            got = ", ".join(map(repr, data)) or "none"
            raise ValueError(f"expected data of the sites {names}; got {got}")
        values, batches = {}, set()
        for name, shape in self._observed.items():
            value = torch.as_tensor(data[name]).to(self._low)
            batch = value.shape[: value.dim() - len(shape)]
            if value.shape != batch + shape:
                raise ValueError(
                    f"expected data of {name!r} of shape (*batch{''.join(f', {n}' for n in shape)}); "
                    f"got {tuple(value.shape)}"
                )
            if not value.isfinite().all():
                raise ValueError(f"expected finite data; got {int((~value.isfinite()).sum())} numbers not, at {name!r}")
            batches.add(batch)
            values[name] = value.reshape(batch.numel(), *shape)
        if len(batches) > 1:
            got = " and ".join(str(tuple(batch)) for batch in batches)
            raise ValueError(f"expected data of one batch shape; got {got}")
        return _flatten(list(values), values, 1), batches.pop()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_simulator": None}

    def __repr__(self) -> str:
        dropped = f", {self.num_dropped} dropped" if self.num_dropped else ""
        return (
            f"AmortizedPosterior({', '.join(self.latents)} given {', '.join(self._observed)}; "
            f"{self.num_simulations} simulations{dropped}, {self.fit.seconds:.1f} s)"
        )


def _flatten(names: Sequence[str], values: Mapping[str, Tensor], batch: int) -> Tensor:
    """Give the data of one site as they are, a scalar as a vector; those of several as one vector."""
    if len(names) == 1 and values[names[0]].dim() > batch:
        return values[names[0]]
    parts = [values[name].reshape(*values[name].shape[:batch], -1) for name in names]
    return torch.cat(parts, -1)
