"""The log joint density of a Pyro model over one unconstrained vector, for many points at once."""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.util import scale_and_mask
from pyro.infer.enum import config_enumerate
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor

from pyroflows.arguments import check_option
from pyroflows.inference.centring import depends_on_others, has_matrix, transform_of
from pyroflows.inference.sites import (
    LatentSite,
    Model,
    ModelStructure,
    check_model,
    check_values,
    constrain,
    explain_by_arguments,
    have_one_image,
    is_deterministic,
    unconstrain,
)

__all__ = ["Evaluation", "LogJoint", "equals_single_runs", "refuse_randomness"]

_CHUNK, _FEWEST = 2048, 16  # most and fewest points evaluated at once
_CACHED = 500_000  # numbers of an intermediate result, above which a pass over it takes up to four times as long
_MODES = ("plate", "vmap", "loop")  # from the fastest to the slowest
_LOG_JOINT = ""  # among the names of sites
_POINTS = "_points"  # the plate of the points


class Evaluation(Messenger):
    """Sets every latent to a value, and sums up the log-densities, on request, and the log-Jacobians."""

    def __init__(
        self,
        values: Mapping[str, Tensor],
        fixed: Mapping[str, Tensor],
        num_points: int | None,
        *,
        constrained: bool = False,
        densities: bool = True,
        resample_observed: bool = False,
        centring: Mapping[str, Tensor] | None = None,
    ):
        super().__init__()
        self.values = values  # parts of the unconstrained vector by site, or values of the sites if ``constrained``
        self.fixed = fixed  # values of subsample sites, the same in every run
        self.num_points = num_points  # in the leftmost plate, if the model runs under one of points
        self.constrained, self.densities, self.resample_observed = constrained, densities, resample_observed
        self.centring = centring or {}  # coordinates of hierarchical sites, see transform_of
        self.log_prob: Any = 0.0
        self.parts: dict[str, Tensor] = {}  # latents in unconstrained space
        self.sites: dict[str, Tensor] = {}  # latents and deterministic sites, in constrained space
        self.transforms: dict[str, Any] = {}  # from unconstrained space
        self.priors: dict[str, Any] = {}
        self.shapes: dict[str, Size] = {}  # of the latents, by their distributions
        self.drawn: dict[str, Tensor] = {}  # every site's value
        self.observed: dict[str, Tensor] = {}  # log-densities of the observations
        self.factors: dict[str, Tensor] = {}  # those of ``pyro.factor`` statements

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.fixed:
            msg["value"], msg["done"] = self.fixed[name], True
        if self.resample_observed and msg["is_observed"] and not is_deterministic(msg):
            msg["value"], msg["is_observed"] = None, False
        if name not in self.values or msg["is_observed"]:
            return
        self.priors[name], self.shapes[name] = msg["fn"], msg["fn"].shape()
        transform = self.transforms[name] = transform_of(msg["fn"], self.centring.get(name))
        value = self.values[name]
        part, value = (transform.inv(value), value) if self.constrained else (value, transform(value))
        self._add(transform.log_abs_det_jacobian(part, value))
        self.parts[name] = part
        msg["value"], msg["done"] = value, True

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        name, fn = msg["name"], msg["fn"]
        deterministic = is_deterministic(msg)
        if not self.densities and not isinstance(fn, dist.Unit):
            self.drawn[name] = msg["value"]
        if name in self.values or deterministic:
            self.sites[name] = msg["value"]
        # An improper prior is flat, and its zero is on the CPU whatever the model's device.
        flat = isinstance(fn, dist.ImproperUniform)
        if "_deterministic" in msg["infer"] or flat or not self.densities or msg["mask"] is False:
            return
        log_prob = fn.log_prob(msg["value"], *msg["args"], **msg["kwargs"])
        self._add(scale_and_mask(log_prob, msg["scale"], msg["mask"]))
        if msg["is_observed"]:
            terms = self.factors if deterministic or isinstance(fn, dist.Unit) else self.observed
            terms[name] = scale_and_mask(log_prob, mask=msg["mask"])

    def _add(self, terms: Tensor) -> None:
        if self.num_points is None:
            self.log_prob = self.log_prob + terms.sum()
        elif terms.dim() and terms.shape[0] == self.num_points:
            self.log_prob = self.log_prob + terms.reshape(self.num_points, -1).sum(-1)
        else:
            raise ValueError(f"expected a log-density for each of {self.num_points} points; got {tuple(terms.shape)}")


class _PriorDraws(Evaluation):
    """Draws every latent from its prior; one that cannot be drawn, as of an improper prior, keeps its value."""

    def _pyro_sample(self, msg: Any) -> None:
        super()._pyro_sample(msg)
        if msg["name"] in self.parts:
            with suppress(NotImplementedError):
                value = msg["fn"].sample()
                msg["value"], self.parts[msg["name"]] = value, self.transforms[msg["name"]].inv(value)


class LogJoint:
    r"""The log joint density of a model's continuous latents, over one unconstrained vector.

    .. math:: \log p(y, x(u)) + \log|\det dx/du|

    Many points are evaluated at once: in a plate of their own if the model allows it, else through ``torch.vmap``, else
    one by one; ``vectorize="auto"`` takes the fastest way that agrees with single runs. Discrete latents are summed
    out; a subsampled plate keeps the rows that it drew in the first run. Points have the shape ``(points, dim)``.

    ``initial`` is the prior median, the point that ``start`` gives by sites, or a prior draw, if these have no density.
    """

    def __init__(
        self,
        model: Model,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        vectorize: str = "auto",
        start: Mapping[str, Any] | None = None,
    ):
        check_model(model)
        check_option("vectorize", vectorize, ("auto", *_MODES))
        self.model, self.args, self.kwargs = model, tuple(args), dict(kwargs or {})
        self.evaluations = 0  # points evaluated by value and value_and_score
        self.hierarchical: dict[str, bool] = {}  # sites of which other latents set location or scale; if by a matrix
        self.centring: dict[str, Tensor] = {}  # of these, see recentred
        self.structure = ModelStructure.of(model, self.args, self.kwargs)
        self.initial, self.latents = self.structure.initial, self.structure.latents
        self.dim, self.dtype, self.device = len(self.initial), self.initial.dtype, self.initial.device
        self.vectorize, self._of_discrete = (
            "loop",
            set[str](),
        )  # deterministic sites with a value for each of a discrete latent's
        self._find_dependent_supports()
        if start is not None:
            self.initial = _start_at(self, start)
        if vectorize == "auto":
            self.initial = _with_density(self, "the prior median" if start is None else "the start")
        self.vectorize = self.fastest_mode() if vectorize == "auto" else vectorize
        _refuse_flat_latents(self)

    @property
    def names(self) -> list[str]:
        """The names of the latent sites, in the order of the vector."""
        return [site.name for site in self.latents]

    @property
    def is_static(self) -> bool:
        """Whether no support depends on other sites."""
        return all(site.support is not None for site in self.latents)

    def _find_dependent_supports(self) -> None:
        """Set the support of each latent that depends on other sites to None, by runs at two different points."""
        *points, other = _points_near(self, 3, seed=0)
        runs = [self._evaluate(self._parts(point), None, densities=False) for point in points]
        _check_latents(self.latents, runs)
        if self.structure.discrete:
            sites = runs[0].sites.items()
            self._of_discrete = {name for name, value in sites if value.shape != self.structure.shapes[name]}
        for index, site in enumerate(self.latents):
            first, second = (run.priors[site.name] for run in runs)
            if not have_one_image([first.support, second.support], site.slice_of(other)):
                self.latents[index] = replace(site, support=None)
            elif not self.structure.discrete and depends_on_others(first, second):
                self.hierarchical[site.name] = has_matrix(first)

    def fastest_mode(self) -> str:
        """Return the fastest way to evaluate many points that agrees with single runs."""
        points = _points_near(self, 8)
        single = self._read_all("loop", points, len(points))
        finite = single[_LOG_JOINT].isfinite()
        points, single = points[finite][:3], {name: value[finite][:3] for name, value in single.items()}
        for mode in _MODES[:-1] if len(points) > 1 else ():
            if equals_single_runs(partial(self._read_all, mode, points), single, (len(points), 2)):
                return mode
        return "loop"

    @torch.no_grad()
    def _read_all(self, mode: str, points: Tensor, n: int) -> dict[str, Tensor]:
        """Return all that is ever read off runs, at the first ``n`` points."""
        values = self._read(points[:n], lambda run: {_LOG_JOINT: run.log_prob, **run.sites, **run.observed}, mode)
        return {_LOG_JOINT: values.pop(_LOG_JOINT), **_by_point(n, values, self.structure.shapes)}

    # Evaluation

    def __call__(self, u: Tensor) -> Tensor:
        """Return the log joint density of each point, in nats."""
        return self._read(u, lambda run: run.log_prob)

    @torch.no_grad()
    def value(self, u: Tensor) -> Tensor:
        """Return the log joint density without a graph, of any number of points; -inf if it is not finite."""
        self.evaluations += len(u)
        return torch.cat([_guarded(self._value, part)[0] for part in u.split(_points_at_once(self))])

    def value_and_score(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log joint density and its gradient, without a graph; -inf and zeros if either is not finite."""
        self.evaluations += len(u)
        parts = [_guarded(self._value_and_score, part) for part in u.detach().split(_points_at_once(self))]
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

    def _read(self, u: Tensor, read: Callable[[Evaluation], Any], mode: str | None = None) -> Any:
        """Evaluate the log joint density at points; return what is read off each evaluation, stacked."""
        return self._map(u, lambda *parts: read(self._evaluate(*parts)), mode or self.vectorize)

    # Runs of the model

    def _map(self, u: Tensor, run: Callable[[dict[str, Tensor], int | None], Any], mode: str) -> Any:
        """Return what ``run(parts, num_points)`` returns at points: in a plate of them, by vmap, or in a loop."""
        if u.dim() != 2 or u.shape[-1] != self.dim:
            raise ValueError(f"expected points of shape (points, {self.dim}); got {tuple(u.shape)}")
        return self._map_values(self._parts(u), len(u), run, mode)

    def _map_values(
        self, values: dict[str, Tensor], number: int, run: Callable[[dict[str, Tensor], int | None], Any], mode: str
    ) -> Any:
        """The same at parts of points, or at values of the sites, ``(number, *shape)`` each."""
        if mode == "plate":
            return run(self._in_plates(values, number), number)
        if mode == "vmap":
            return torch.func.vmap(lambda point: run(point, None), randomness="same")(values)
        results = [run({name: value[i] for name, value in values.items()}, None) for i in range(number)]
        if isinstance(results[0], dict):
            return {name: torch.stack([result[name] for result in results]) for name in results[0]}
        return torch.stack(results)

    def _parts(self, u: Tensor) -> dict[str, Tensor]:
        """Return the latents' parts of one point, or of points, ``(points, *shape)`` each."""
        return {site.name: site.slice_of(u) for site in self.latents}

    def _in_plates(self, values: Mapping[str, Tensor], num_points: int) -> dict[str, Tensor]:
        """Return the sites' values or parts at points with a dimension for each plate that a site is not in."""
        inner = {site.name: (1,) * (self.structure.max_plate_nesting - site.plate_ndim) for site in self.latents}
        return {name: value.reshape(num_points, *inner[name], *value.shape[1:]) for name, value in values.items()}

    def _evaluate(self, values: Mapping[str, Tensor], num_points: int | None, **options: bool) -> Evaluation:
        """Evaluate the log joint density at one point, or at points in a plate; sum the discrete latents out."""
        evaluation = Evaluation(values, self.structure.fixed, num_points, centring=self.centring, **options)
        if not self.structure.discrete:
            self._run(evaluation, self.model, self.args, self.kwargs)
            return evaluation
        densities = evaluation.densities
        trace = _enumerated(self, evaluation)
        evaluation.sites = {name: site for name, site in evaluation.sites.items() if name not in self._of_discrete}
        if densities:
            evaluation.log_prob = evaluation.log_prob + _summed_out(trace, num_points)
        return evaluation

    def _run(self, evaluation: Evaluation, model: Model, args: Any, kwargs: Any) -> Any:
        """Run a model under an evaluation, and return its result; discrete latents are drawn."""
        number, dim = evaluation.num_points, -1 - self.structure.max_plate_nesting
        plate = nullcontext if number is None else partial(pyro.plate, _POINTS, number, dim=dim)
        # Validation reads values, which neither vmap nor a GPU likes; the first run had what the user asks for.
        with pyro.validation_enabled(False), poutine.block(), evaluation, plate():
            return model(*args, **kwargs)

    # Sites

    def log_likelihood(self, u: Tensor, factors: Sequence[str] = ()) -> dict[str, Tensor]:
        """Return the log-density of every observation, by site, ``(points, *shape)``, and of chosen factors, unscaled.

        Discrete latents are summed out. Observations that share one with other sites have no log-density of their own.
        """
        return _in_parts(partial(_read_likelihood, self, factors), u)

    def constrain(self, u: Tensor, *, deterministic: bool = False) -> dict[str, Tensor]:
        """Return the sites' values of shape ``(points, *shape)``, on request with those of deterministic sites.

        Deterministic sites that depend on a discrete latent are left out: they have a value for each of its values.
        """
        if not deterministic and self.is_static:
            return constrain(self.latents, u)
        values = _in_parts(lambda v: _by_point(len(v), self._read(v, lambda run: run.sites), self.structure.shapes), u)
        if self.is_static:  # where a run fails, too
            values |= constrain(self.latents, u)
        return values if deterministic else {name: values[name] for name in self.names}

    def unconstrain(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the points of the sites' values ``(points, *shape)``, and the log-Jacobian of :meth:`constrain`."""
        values = check_values(self.latents, values, points=True)
        if self.is_static:
            return unconstrain(self.latents, values)
        return _unconstrained_by_runs(self, {name: value.to(self.initial) for name, value in values.items()})

    # Draws

    @torch.no_grad()
    def predict(self, u: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run the model on any arguments at every point; return the observations that it draws, and other sites."""

        def run(parts: Mapping[str, Tensor], num_points: int | None) -> dict[str, Tensor]:
            options: Any = {"densities": False, "resample_observed": True, "centring": self.centring}
            evaluation = Evaluation(parts, {}, num_points, **options)
            self._run(evaluation, self.model, args, kwargs)
            return {name: value for name, value in evaluation.drawn.items() if name not in parts}

        if self.vectorize != "plate":
            return self._map(u, run, "loop")
        single = run(self._parts(u[0]), None).items()
        return _by_point(len(u), self._map(u, run, "plate"), {name: value.shape for name, value in single})

    @torch.no_grad()
    def prior_draws(self, n: int, *, seed: int = 0) -> Tensor:
        """Draw points from the prior, ``(n, dim)`` or fewer: draws that fail or are not finite are left out.

        Latents of improper priors are drawn around their initial values, real ones at scales from 2 to 64.
        """

        def run(u: Tensor, num_points: int | None) -> Tensor:
            options: Any = {"densities": False, "centring": self.centring}
            parts = self._parts(u) if num_points is None else self._in_plates(self._parts(u), num_points)
            draws = _PriorDraws(parts, self.structure.fixed, num_points, **options)
            self._run(draws, self.model, self.args, self.kwargs)
            return torch.cat([draws.parts[name].reshape(num_points or 1, -1) for name in self.names], -1)

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            u = self.initial + (_scales(self.latents, n) * torch.randn(n, self.dim, device="cpu")).to(self.initial)
            draws = []
            if self.vectorize == "plate":
                with suppress(Exception):  # one bad draw spoils all: then one by one
                    draws = [run(u, n)]
            for point in u if not draws else ():
                with suppress(Exception):  # whatever the model cannot do so far out
                    draws.append(run(point, None))
        points = torch.cat(draws) if draws else u[:0]
        return points[points.isfinite().all(-1)].to(self.initial)


def _scales(sites: Sequence[LatentSite], number: int) -> Tensor:
    """Return the scales at which latents of improper priors are drawn, ``(number, dim)``: on the line, of all sizes."""
    lines = (constraints.real, constraints.real_vector)
    is_real = [getattr(site.support, "base_constraint", site.support) in lines for site in sites]
    sizes = torch.tensor([site.unconstrained_shape.numel() for site in sites], device="cpu")
    octaves = 5 * torch.rand(number, 1, generator=torch.Generator().manual_seed(0), device="cpu")
    return 2 * torch.where(torch.tensor(is_real, device="cpu").repeat_interleave(sizes), octaves.exp2(), 1.0)


def _unconstrained_by_runs(log_joint: LogJoint, values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the points of sites whose supports or coordinates depend on each other, and the log-Jacobian."""

    def run(values: dict[str, Tensor], number: int | None) -> dict[str, Tensor]:
        found = log_joint._evaluate(values, number, constrained=True, densities=False)
        batch = () if number is None else (number,)
        u = torch.cat([found.parts[name].reshape(*batch, -1) for name in log_joint.names], -1)
        return {"u": u, "log_det": (u.new_zeros(batch) + found.log_prob).reshape(batch)}

    number = len(values[log_joint.names[0]])
    results = log_joint._map_values(values, number, run, log_joint.vectorize)
    return results["u"], results["log_det"]


def _points_at_once(log_joint: LogJoint) -> int:
    """Return the number of points whose intermediate results a processor's caches hold."""
    if log_joint.device.type != "cpu":
        return _CHUNK
    numbers = log_joint.dim + sum(value.numel() for value in log_joint.structure.observations.values())
    return max(_FEWEST, min(_CHUNK, _CACHED // numbers))


def _guarded(evaluate: Callable[[Tensor], tuple[Tensor, Tensor]], u: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluate; search by bisection for the points at which a matrix has no Cholesky factor."""
    try:
        return evaluate(u)
    except torch.linalg.LinAlgError:
        if len(u) == 1:
            return u.new_full((1,), -torch.inf), torch.zeros_like(u)
        first, second = (_guarded(evaluate, half) for half in u.detach().chunk(2))
        return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])


def _points_near(log_joint: LogJoint, number: int, seed: int = 1) -> Tensor:
    """Return points around the initial one, the same in every call."""
    generator, initial = torch.Generator().manual_seed(seed), log_joint.initial
    steps = torch.randn(number, log_joint.dim, generator=generator, dtype=torch.float64, device="cpu").to(initial)
    return initial + 0.1 * steps


def _refuse_flat_latents(log_joint: LogJoint) -> None:
    """Refuse a latent that the density does not depend on: a guide would widen without end."""
    value, score = _guarded(log_joint._value_and_score, _points_near(log_joint, 3))
    flat = (score[value.isfinite()] == 0).all(0)
    if log_joint.structure.subsampled or not value.isfinite().any():
        return  # the density may depend on it in other rows
    for site in log_joint.latents:
        if number := int(flat[site.start : site.stop].sum()):
            got = f"one that is flat in {number} of {site.stop - site.start} of site {site.name!r}"
            example = "for example a latent that is masked out (by obs_mask) or has neither a prior nor data"
            raise ValueError(f"expected a density that depends on every latent; got {got}, {example}")


@torch.no_grad()
def _start_at(log_joint: LogJoint, start: Mapping[str, Any]) -> Tensor:
    """Return the point of the sites' values, or of those given and the prior medians of others."""
    names = ", ".join(map(repr, log_joint.names))
    if unknown := ", ".join(map(repr, sorted(start.keys() - set(log_joint.names)))):
        raise ValueError(f"expected a start for sites among {names}; got {unknown}")
    medians = {name: node["value"] for name, node in log_joint.structure.latent_nodes.items()}
    given = {name: torch.as_tensor(value).to(medians[name]) for name, value in start.items()}
    for name, value in given.items():
        if value.shape != medians[name].shape:
            expected = f"a start of shape {tuple(medians[name].shape)} at site {name!r}"
            raise ValueError(f"expected {expected}; got {tuple(value.shape)}")
    point = log_joint.unconstrain({name: value[None] for name, value in (medians | given).items()})[0][0]
    if not point.isfinite().all():
        raise ValueError(f"expected a start within the sites' supports; got {dict(start)!r}")
    return point.to(log_joint.initial)


@torch.no_grad()
def _with_density(log_joint: LogJoint, place: str) -> Tensor:
    """Return the initial point or, if there is no density around it, one that has: the best of prior draws."""
    initial = log_joint.initial

    def value(point: Tensor) -> tuple[Tensor, Tensor]:
        return log_joint._read(point, lambda run: run.log_prob, "loop"), point

    here = float(_guarded(value, initial[None])[0])  # not by _one_by_one, so that errors of the model come through
    if math.isfinite(here) or _one_by_one(log_joint, _points_near(log_joint, 8)).isfinite().any():
        return initial
    wide = [initial + width * (_points_near(log_joint, 64, seed=2) - initial) for width in (10.0, 30.0)]
    for points in (log_joint.prior_draws(64), *wide, log_joint.prior_draws(512, seed=1)):
        if len(points) and (values := _one_by_one(log_joint, points)).isfinite().any():
            return points[values.argmax()]
    explain_by_arguments(log_joint.args, log_joint.kwargs, f"a log joint density of {here} at {place}")
    got = f"{here} there, and none at other points: pass init={{site: value}}"
    problem = f". {log_joint.structure.problem}" if log_joint.structure.problem else ""
    raise ValueError(f"expected a finite log joint density near {place}; got {got}{problem}")


def _one_by_one(log_joint: LogJoint, u: Tensor) -> Tensor:
    """Return the log joint density at points, by single runs; -inf if it is not finite or the model fails there."""
    values = []
    for point in u:
        value = u.new_full((), -torch.inf)
        with suppress(Exception):  # whatever the model cannot do far out
            value = log_joint._read(point[None], lambda run: run.log_prob, "loop")[0]
        values.append(torch.where(value.isfinite(), value, -torch.inf))
    return torch.stack(values)


def refuse_randomness(log_joint: LogJoint) -> None:
    """Refuse a model whose log-density at a point differs between runs."""
    points = log_joint.initial[None]
    with torch.random.fork_rng(), torch.no_grad():
        first, *others = (float(log_joint._read(points, lambda run: run.log_prob, "loop")) for _ in range(3))
    if differing := [other for other in others if abs(other - first) > 1e-4 * (1 + abs(first))]:
        got = f"{first:.6g} and {differing[0]:.6g} in two runs: what it draws by torch.randn or dropout, for example"
        raise ValueError(f"expected a model with one log joint density at a point; got {got}, has to be a sample site")


def _check_latents(latents: Sequence[LatentSite], runs: Sequence[Evaluation]) -> None:
    """Refuse latents that are in some runs only, or have another shape in some."""
    for run in runs:
        if changes := ", ".join(map(repr, sorted(set(run.priors) ^ {site.name for site in latents}))):
            raise ValueError(f"expected the same latent sites in every run of the model; got changes in {changes}")
        for site in latents:
            # Enumeration of discrete latents adds dimensions on the left.
            shape = run.shapes[site.name][-len(site.shape) :] if site.shape else site.shape
            if shape != site.shape:
                got = f"{tuple(site.shape)} and {tuple(shape)} at site {site.name!r}"
                raise ValueError(f"expected latents of one shape in every run; got {got}")


def _enumerated(log_joint: LogJoint, evaluation: Evaluation) -> poutine.Trace:
    """Run a model with its discrete latents enumerated, and return the trace."""
    first_dim = -1 - log_joint.structure.max_plate_nesting - (evaluation.num_points is not None)
    model = poutine.enum(config_enumerate(log_joint.model, default="parallel"), first_dim)
    evaluation.densities = False
    return log_joint._run(evaluation, poutine.trace(model).get_trace, log_joint.args, log_joint.kwargs)


@torch.no_grad()
def _read_likelihood(log_joint: LogJoint, factors: Sequence[str], u: Tensor) -> dict[str, Tensor]:
    structure = log_joint.structure

    def read(parts: Mapping[str, Tensor], num_points: int | None) -> dict[str, Tensor]:
        if structure.discrete:
            trace = _enumerated(log_joint, Evaluation(parts, structure.fixed, num_points))
            return _each_summed_out(trace, [*structure.observations, *factors])
        run = log_joint._evaluate(parts, num_points)
        return run.observed | {name: run.factors[name] for name in factors if name in run.factors}

    return _by_point(len(u), log_joint._map(u, read, log_joint.vectorize), structure.shapes)


def _summed_out(trace: poutine.Trace, num_points: int | None) -> Tensor:
    """Sum the enumerated sites out of a trace's log-density, separately for each point of their plate."""
    trace.compute_log_prob()
    trace.pack_tensors()
    factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    enumerated = set()
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site_is_subsample(site) or "_deterministic" in site["infer"]:
            continue
        if isinstance(scale := site["scale"], Tensor) or scale != 1:
            got = f"{scale} at {name!r}"
            raise ValueError(f"expected sites without a scale in a model with discrete latents; got {got}")
        plates = frozenset(trace.plate_to_symbol[frame.name] for frame in site["cond_indep_stack"] if frame.vectorized)
        factors.setdefault(plates, []).append(site["packed"]["log_prob"])
        if "_enumerate_symbol" in site["infer"]:
            enumerated.add(site["infer"]["_enumerate_symbol"])
    ndim = None if num_points is None else -trace.symbol_to_dim[trace.plate_to_symbol[_POINTS]]
    total: Any = 0.0
    for terms in contract_tensor_tree(factors, enumerated).values():
        for term in terms:
            term = packed.unpack(term, trace.symbol_to_dim)
            # The plate of the points is the leftmost dimension of a term that depends on it.
            total = total + (term.reshape(num_points, -1).sum(-1) if term.dim() == ndim else term.sum())
    return total


def _each_summed_out(trace: poutine.Trace, names: Sequence[str]) -> dict[str, Tensor]:
    """Sum the enumerated sites out of the log-density of each observation that shares none with other sites."""
    trace.compute_log_prob()
    trace.pack_tensors()
    sites: dict[str, Any] = {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site) and not is_deterministic(site)
    }
    terms = {name: site["packed"]["log_prob"] for name, site in sites.items()}
    enumerated = {name: site["infer"].get("_enumerate_symbol") for name, site in sites.items()}
    symbols_of = {name: set(term._pyro_dims) & set(enumerated.values()) for name, term in terms.items()}
    plates = {
        name: frozenset(trace.plate_to_symbol[frame.name] for frame in site["cond_indep_stack"] if frame.vectorized)
        for name, site in sites.items()
    }
    values = {}
    for name in names:
        component, symbols = {name}, symbols_of[name]
        while new := {n for n in sites if enumerated[n] and symbols & symbols_of[n]} - component:
            component |= new
            symbols = symbols.union(*(symbols_of[n] for n in new))
        factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
        for n in sites:
            if n in component:
                factors.setdefault(plates[n], []).append(terms[n])
            elif symbols & symbols_of[n]:  # another observation of the same latent, or a latent that depends on it
                break
        else:
            ((ordinal, (term,)),) = contract_tensor_tree(factors, symbols).items()
            if ordinal == plates[name]:
                values[name] = packed.unpack(term, trace.symbol_to_dim)
    return values


def _by_point(num_points: int, values: Mapping[str, Tensor], shapes: Mapping[str, Size]) -> dict[str, Tensor]:
    """Reshape values of a run in a plate to ``(points, *shape)``; expand those that depend on no latent."""

    def reshape(value: Tensor, shape: Size) -> Tensor:
        varies = value.numel() == num_points * shape.numel()
        return value.reshape(num_points if varies else 1, *shape).expand(num_points, *shape)

    return {name: reshape(value, shapes[name]) for name, value in values.items()}


def _in_parts(read: Callable[[Tensor], dict[str, Tensor]], u: Tensor) -> dict[str, Tensor]:
    """Read values off many points, not all at once; NaN at those at which a matrix has no Cholesky factor."""
    parts = [values for part in u.split(_CHUNK) for values in _read_defined(read, part)]
    known = [values for values in parts if values is not None]
    if not known:
        return read(u[:1])  # which raises the model's own error
    undefined = {name: torch.nan * value[:1] for name, value in known[0].items()}
    return {name: torch.cat([(part or undefined)[name] for part in parts]) for name in known[0]}


def _read_defined(read: Callable[[Tensor], dict[str, Tensor]], u: Tensor) -> list[dict[str, Tensor] | None]:
    """Read values off points; None stands for each point at which a matrix has no Cholesky factor."""
    try:
        return [read(u)]
    except torch.linalg.LinAlgError:
        return [None] if len(u) == 1 else [values for half in u.chunk(2) for values in _read_defined(read, half)]


def equals_single_runs(
    run_batch: Callable[[int], Mapping[str, Tensor]], single_runs: Mapping[str, Tensor], sizes: Sequence[int]
) -> bool:
    """Whether one run of a model for the first ``n`` points gives what single runs gave, at each of several sizes."""
    # A model that indexes from the left, for one, is silently wrong in a plate of points. If it has as many rows as
    # there are points, it may mistake one for the other, but not at two sizes.
    try:
        for size in sizes:
            batch = run_batch(size)
            for name, value in single_runs.items():
                expected, got = value[:size], batch[name]
                tolerance = 1e-9 if value.dtype == torch.float64 else 1e-4 if value.is_floating_point() else 0.0
                if got.shape != expected.shape or not torch.allclose(
                    got.to(expected.dtype), expected, tolerance, tolerance, equal_nan=True
                ):
                    return False
    except Exception:  # whatever the model cannot do in a batch; single runs then show errors of its own
        return False
    return True
