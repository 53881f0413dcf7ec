"""The log joint density of a Pyro model over one unconstrained vector, for many points at once."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyroflows.arguments import check_option
from pyroflows.inference.runs import Evaluation, ModelRuns, PriorDraws, by_point, equals_single_runs
from pyroflows.inference.sites import check_values, constrain, unconstrain
from pyroflows.inference.structure import ModelStructure

__all__ = ["LogJoint"]

_CHUNK = 2048  # points evaluated at once
_MODES = ("plate", "vmap", "loop")  # from the fastest to the slowest
_LOG_JOINT = ""  # among the names of sites


class LogJoint:
    r"""The log joint density of a model's continuous latents, over one unconstrained vector.

    .. math:: \log p(y, x(u)) + \log|\det dx/du|

    Many points are evaluated at once: in a plate of their own if the model allows it, else through ``torch.vmap``, else
    one by one. The fastest way that agrees with single runs is chosen at construction. Discrete latents are summed out;
    a subsampled plate keeps the rows that it drew in the first run.

    Args:
        model: a Pyro model.
        args: its arguments.
        kwargs: its keyword arguments.
        vectorize: "auto", or one of "plate", "vmap" and "loop".

    Shapes:
        u: ``(points, dim)``; log joint: ``(points,)``.

    Raises:
        ValueError: the model has no continuous latent, a discrete one that cannot be enumerated, or latents in a
            subsampled plate; its structure varies from run to run; no point near the initial values has a finite
            density; or the density is flat in a latent, for example a masked one.

    References:
        Automatic Differentiation Variational Inference, Kucukelbir et al., 2017 (arXiv:1603.00788).

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> def model():
        ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
        ...     pyro.sample("y", dist.Normal(0.0, scale), obs=torch.tensor(1.0))
        >>> log_joint = LogJoint(model)
        >>> log_joint(torch.zeros(3, 1))  # the scale is 1 at each of three points
        tensor([-2.1447, -2.1447, -2.1447])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        vectorize: str = "auto",
    ):
        if not callable(model):
            raise TypeError(f"expected a Pyro model, a callable; got {type(model).__name__}")
        check_option("vectorize", vectorize, ("auto", *_MODES))
        self.model, self.args, self.kwargs = model, tuple(args), dict(kwargs or {})
        self.evaluations = 0  # points evaluated by value and value_and_score
        self.structure = ModelStructure.of(model, self.args, self.kwargs)
        self.initial, self.latents = self.structure.initial, self.structure.latents
        self.dim, self.dtype, self.device = len(self.initial), self.initial.dtype, self.initial.device
        self._runs = ModelRuns(model, self.args, self.kwargs, self.structure)
        self._runs.find_dependent_supports()
        self.vectorize = self._fastest_mode() if vectorize == "auto" else vectorize
        self._refuse_flat_latents()

    @property
    def names(self) -> list[str]:
        """The names of the latent sites, in the order of the vector."""
        return [site.name for site in self.latents]

    @property
    def is_static(self) -> bool:
        """Whether no support depends on other sites."""
        return all(site.support is not None for site in self.latents)

    def _fastest_mode(self) -> str:
        points = self._points_nearby(8)
        single = self._read_all("loop", points, len(points))
        finite = single[_LOG_JOINT].isfinite()
        if not finite.any():
            raise ValueError(
                f"expected a finite log joint density near the prior median; got {float(single[_LOG_JOINT][0])} there"
            )
        points, single = points[finite][:3], {name: value[finite][:3] for name, value in single.items()}
        for mode in _MODES[:-1] if len(points) > 1 else ():
            if equals_single_runs(partial(self._read_all, mode, points), single, (len(points), 2)):
                return mode
        return "loop"

    @torch.no_grad()
    def _read_all(self, mode: str, points: Tensor, n: int) -> dict[str, Tensor]:
        """Return all that is ever read off runs, at the first ``n`` points."""
        values = self._map(points[:n], lambda run: {_LOG_JOINT: run.log_prob, **run.sites, **run.observed}, mode)
        return {_LOG_JOINT: values.pop(_LOG_JOINT), **by_point(n, values, self.structure.shapes)}

    def _points_nearby(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        steps = torch.randn(number, self.dim, generator=generator, dtype=torch.float64).to(self.initial)
        return self.initial + 0.1 * steps

    def _refuse_flat_latents(self) -> None:
        """Refuse a latent that the density does not depend on: a guide would widen without end."""
        value, score = self._guarded(self._points_nearby(3), self._value_and_score)
        flat = (score[value.isfinite()] == 0).all(0)
        if self.structure.subsampled or not value.isfinite().any():
            return  # the density may depend on it in other rows
        for site in self.latents:
            if number := int(flat[site.start : site.stop].sum()):
                raise ValueError(
                    f"expected a density that depends on every latent; got one that is flat in {number} of "
                    f"{site.stop - site.start} of site {site.name!r}, for example a latent that is masked out "
                    f"(by obs_mask) or has neither a prior nor data"
                )

    # Evaluation

    def __call__(self, u: Tensor) -> Tensor:
        """Return the log joint density of each point, in nats."""
        return self._map(u, lambda run: run.log_prob)

    @torch.no_grad()
    def value(self, u: Tensor) -> Tensor:
        """Return the log joint density without a graph, of any number of points; -inf if it is not finite."""
        self.evaluations += len(u)
        return torch.cat([self._guarded(part, self._value)[0] for part in u.split(_CHUNK)])

    def value_and_score(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log joint density and its gradient, without a graph; -inf and zeros if either is not finite."""
        self.evaluations += len(u)
        parts = [self._guarded(part, self._value_and_score) for part in u.detach().split(_CHUNK)]
        return torch.cat([value for value, _ in parts]), torch.cat([score for _, score in parts])

    def _value(self, u: Tensor) -> tuple[Tensor, Tensor]:
        value = self(u)
        return torch.where(value.isfinite(), value, -torch.inf), u

    def _value_and_score(self, u: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = u.requires_grad_()
            value = self(leaf)
            total = value.sum() + 0 * leaf.sum()  # a density may depend on no latent at all
            (score,) = torch.autograd.grad(total, leaf)
        finite = value.isfinite() & score.isfinite().all(-1)
        return torch.where(finite, value.detach(), -torch.inf), torch.where(finite[:, None], score, 0)

    def _guarded(self, u: Tensor, evaluate: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Evaluate; search by bisection for the points at which a matrix has no Cholesky factor."""
        try:
            return evaluate(u)
        except torch.linalg.LinAlgError:
            if len(u) == 1:
                return u.new_full((1,), -torch.inf), torch.zeros_like(u)
            halves = [self._guarded(half, evaluate) for half in u.detach().chunk(2)]
            return torch.cat([a for a, _ in halves]), torch.cat([b for _, b in halves])

    def _map(self, u: Tensor, read: Callable[[Evaluation], Any], mode: str | None = None) -> Any:
        if u.dim() != 2 or u.shape[-1] != self.dim:
            raise ValueError(f"expected points of shape (points, {self.dim}); got {tuple(u.shape)}")
        return self._runs.map(u, lambda *parts: read(self._runs.evaluate(*parts)), mode or self.vectorize)

    # Sites

    def log_likelihood(self, u: Tensor) -> dict[str, Tensor]:
        """Return the log-density of every observation, by site, of shape ``(points, *shape)``."""
        if self.structure.discrete:
            raise ValueError(
                f"expected a model without discrete latents, whose observations have no log-density of their own; got "
                f"{', '.join(map(repr, self.structure.discrete))}"
            )
        return by_point(len(u), self._map(u, lambda run: run.observed), self.structure.shapes)

    def constrain(self, u: Tensor, *, deterministic: bool = False) -> dict[str, Tensor]:
        """Return the sites' values of shape ``(points, *shape)``, on request with those of deterministic sites.

        Deterministic sites that depend on a discrete latent are left out: they have a value for each of its values.
        """
        if not deterministic and self.is_static:
            return constrain(self.latents, u)
        values = self._map(u, lambda run: run.sites)
        chosen = {name: values[name] for name in (values if deterministic else self.names)}
        return by_point(len(u), chosen, self.structure.shapes)

    def unconstrain(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the points of the sites' values ``(points, *shape)``, and the log-Jacobian of :meth:`constrain`."""
        values = check_values(self.latents, values, points=True)
        if self.is_static:
            return unconstrain(self.latents, values)

        def single(point: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            run = self._runs.evaluate(point, None, constrained=True, densities=False)
            return torch.cat([run.parts[name].reshape(-1) for name in self.names]), run.log_prob

        number = len(values[self.names[0]])
        rows = [single({name: value[i].to(self.dtype) for name, value in values.items()}) for i in range(number)]
        return torch.stack([u for u, _ in rows]), torch.stack([log_det for _, log_det in rows])

    # Draws

    @torch.no_grad()
    def predict(self, u: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run the model on any arguments at every point; return the observations that it draws, and other sites."""

        def run(parts: Mapping[str, Tensor], num_points: int | None) -> dict[str, Tensor]:
            evaluation = Evaluation(parts, {}, num_points, densities=False, resample_observed=True)
            self._runs.run(evaluation, args, kwargs)
            return {name: value for name, value in evaluation.drawn.items() if name not in parts}

        if self.vectorize != "plate":
            return self._runs.map(u, run, "loop")
        shapes = {name: value.shape for name, value in run(self._runs.parts(u[0], None), None).items()}
        return by_point(len(u), self._runs.map(u, run, "plate"), shapes)

    @torch.no_grad()
    def prior_draws(self, n: int, *, seed: int = 0) -> Tensor:
        """Draw points from the prior, ``(n, dim)`` or fewer: draws that fail or are not finite are left out.

        Latents of improper priors are drawn around their initial values.
        """

        def run(u: Tensor, num_points: int | None) -> Tensor:
            draws = PriorDraws(self._runs.parts(u, num_points), self.structure.fixed, num_points, densities=False)
            self._runs.run(draws)
            return torch.cat([draws.parts[name].reshape(num_points or 1, -1) for name in self.names], -1)

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            u = self.initial + 2 * torch.randn(n, self.dim).to(self.initial)
            draws = []
            if self.vectorize == "plate":
                with suppress(Exception):  # one bad draw spoils all: then one by one
                    draws = [run(u, n)]
            for point in u if not draws else ():
                with suppress(Exception):  # whatever the model cannot do so far out
                    draws.append(run(point, None))
        points = torch.cat(draws) if draws else u[:0]
        return points[points.isfinite().all(-1)].to(self.initial)
