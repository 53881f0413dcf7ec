"""The log joint density of a Pyro model over one unconstrained vector, for many points at once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.infer.enum import config_enumerate
from pyro.ops.contract import contract_tensor_tree
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor
from torch.distributions import biject_to

from pyroflows.arguments import check_option

__all__ = ["LatentSite", "LogJoint", "checked_values", "constrain", "device_of", "initial_value", "unconstrain"]

_SITE = ("type", "name", "fn", "value", "is_observed", "infer", "cond_indep_stack", "scale", "mask", "args", "kwargs")
_CHUNK = 2048  # points evaluated at once
_MODES = ("plate", "vmap", "loop")
_LOG_JOINT = ""  # among the names of sites
_PERIODIC = (dist.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)


@dataclass(frozen=True)
class LatentSite:
    """One latent of a model: its shapes, and its place in the unconstrained vector.

    Args:
        name: of the site.
        batch_ndim: the number of its plate dimensions.
        shape: of its value.
        unconstrained_shape: of its value in unconstrained space.
        start: where in the vector its part begins.
        support: its support; None where it depends on other sites, so that the model must be run to know it.
    """

    name: str
    batch_ndim: int
    shape: Size
    unconstrained_shape: Size
    start: int
    support: Any

    @property
    def stop(self) -> int:
        """Where in the vector its part ends."""
        return self.start + self.unconstrained_shape.numel()


def initial_value(site: Any, like: Tensor | None = None) -> Tensor:
    """Give a value to start a latent site at: its prior median, or a feasible point of an improper prior.

    An improper prior has no numbers of its own: its value gets dtype and device of ``like``.
    """
    fn = site["fn"]
    while not isinstance(fn, dist.ImproperUniform) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    if not isinstance(fn, dist.ImproperUniform):
        return init_to_median(site)
    fn, like = site["fn"], torch.empty(()) if like is None else like
    transform = biject_to(fn.support)
    value: Tensor = transform(like.new_zeros(transform.inverse_shape(fn.batch_shape + fn.event_shape)))
    return value


def _floating_tensors(arguments: Any) -> Iterator[Tensor]:
    if isinstance(arguments, Tensor) and arguments.is_floating_point():
        yield arguments
    elif isinstance(arguments, Mapping):
        yield from _floating_tensors(tuple(arguments.values()))
    elif isinstance(arguments, (tuple, list)):
        for argument in arguments:
            yield from _floating_tensors(argument)


def device_of(*arguments: Any) -> torch.device:
    """Give the device of the first tensor of floating-point numbers among arguments; the CPU where there is none."""
    return next(_floating_tensors(arguments), torch.empty(())).device


def _is_deterministic(site: Any) -> bool:
    """Whether a site is a function of others: by ``pyro.deterministic``, or what is left of a reparametrised one."""
    return "_deterministic" in site["infer"] or (site["is_observed"] and isinstance(_innermost(site["fn"]), dist.Delta))


def _innermost(fn: Any) -> Any:
    """Give the distribution inside those that expand, mask or transform it."""
    while isinstance(getattr(fn, "base_dist", None), torch.distributions.Distribution):
        fn = fn.base_dist
    return fn


def constrain(sites: Sequence[LatentSite], u: Tensor) -> dict[str, Tensor]:
    """Give the sites' values of shape ``(points, *shape)``, where no support depends on other sites."""
    return {
        site.name: biject_to(site.support)(u[:, site.start : site.stop].reshape(len(u), *site.unconstrained_shape))
        for site in sites
    }


def unconstrain(sites: Sequence[LatentSite], values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Give the points of sites' values, and the log-Jacobian of :func:`constrain`, ``(points,)``."""
    parts, log_det = [], torch.zeros(())
    for site in sites:
        transform, value = biject_to(site.support), values[site.name]
        part = transform.inv(value)
        log_det = log_det + transform.log_abs_det_jacobian(part, value).reshape(len(value), -1).sum(-1)
        parts.append(part.reshape(len(value), -1))
    return torch.cat(parts, -1), log_det


def checked_values(sites: Sequence[LatentSite], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Refuse values of sites that are missing, or not of shape ``(points, *shape)`` with one number of points."""
    names = ", ".join(repr(site.name) for site in sites)
    for site in sites:
        if site.name not in values:
            raise ValueError(f"expected values of the sites {names}; got none of {site.name!r}")
        value = values[site.name]
        if not isinstance(value, Tensor) or value.shape[1:] != site.shape or value.dim() == 0:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            expected = ", ".join(map(str, ("points", *site.shape))) + ("" if site.shape else ",")
            raise ValueError(f"expected values of {site.name!r} of shape ({expected}); got {got}")
    sizes = {len(values[site.name]) for site in sites}
    if len(sizes) > 1:
        raise ValueError(f"expected as many values of each site; got {' and '.join(map(str, sorted(sizes)))}")
    return {site.name: values[site.name] for site in sites}


class _Evaluation(Messenger):
    """Gives every latent the value its part stands for, and adds up the log-densities, Jacobians included.

    Args:
        values: parts of the unconstrained vector by site, or values of the sites where ``constrained``.
        fixed: values of subsample sites, the same in every evaluation.
        points: the number of points where the model runs under a plate of them, the leftmost; None for one point.
        constrained: whether the values are those of the sites.
        densities: whether log-densities are added up, or Jacobians alone.
        anew: whether observations are drawn instead.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        fixed: Mapping[str, Tensor],
        points: int | None,
        *,
        constrained: bool = False,
        densities: bool = True,
        anew: bool = False,
    ):
        super().__init__()
        self.values, self.fixed, self.points = values, fixed, points
        self.constrained, self.densities, self.anew = constrained, densities, anew
        self.log_prob: Any = 0.0
        self.parts: dict[str, Tensor] = {}  # latents in unconstrained space
        self.sites: dict[str, Tensor] = {}  # latents and deterministic sites, in constrained space
        self.supports: dict[str, Any] = {}
        self.shapes: dict[str, Size] = {}  # latents as their distributions have them
        self.drawn: dict[str, Tensor] = {}  # every site's value
        self.observed: dict[str, Tensor] = {}  # log-densities of the observations

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.fixed:
            msg["value"], msg["done"] = self.fixed[name], True
        if self.anew and msg["is_observed"] and not _is_deterministic(msg):
            msg["value"], msg["is_observed"] = None, False
        if name not in self.values or msg["is_observed"]:
            return
        self.supports[name], self.shapes[name] = msg["fn"].support, msg["fn"].shape()
        transform = biject_to(msg["fn"].support)
        if self.constrained:
            value = self.values[name]
            part = transform.inv(value)
        else:
            part = self.values[name]
            value = transform(part)
        self._add(transform.log_abs_det_jacobian(part, value))
        self.parts[name] = part
        msg["value"], msg["done"] = value, True

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        name, fn = msg["name"], msg["fn"]
        deterministic = _is_deterministic(msg)
        if not self.densities and not isinstance(fn, dist.Unit):
            self.drawn[name] = msg["value"]
        if name in self.values or deterministic:
            self.sites[name] = msg["value"]
        # An improper prior is flat, and its zero lies on the CPU whatever the device of the model.
        flat = isinstance(fn, dist.ImproperUniform)
        if "_deterministic" in msg["infer"] or flat or not self.densities or msg["mask"] is False:
            return
        log_prob = fn.log_prob(msg["value"], *msg["args"], **msg["kwargs"])
        self._add(scale_and_mask(log_prob, msg["scale"], msg["mask"]))
        if msg["is_observed"] and not deterministic and not isinstance(fn, dist.Unit):
            self.observed[name] = scale_and_mask(log_prob, mask=msg["mask"])

    def _add(self, terms: Tensor) -> None:
        if self.points is None:
            self.log_prob = self.log_prob + terms.sum()
        elif terms.dim() and terms.shape[0] == self.points:
            self.log_prob = self.log_prob + terms.reshape(self.points, -1).sum(-1)
        else:
            raise ValueError(f"expected a log-density for each of {self.points} points; got {tuple(terms.shape)}")


class _PriorDraws(_Evaluation):
    """Draws every latent from its prior; those that cannot be drawn, as of an improper one, get what is given."""

    def _pyro_sample(self, msg: Any) -> None:
        super()._pyro_sample(msg)
        if msg["name"] in self.parts:
            with suppress(NotImplementedError):
                value = msg["fn"].sample()
                msg["value"], self.parts[msg["name"]] = value, biject_to(msg["fn"].support).inv(value)


class LogJoint:
    r"""The log joint density of a model's continuous latents, over one unconstrained vector.

    .. math:: \log p(y, x(u)) + \log|\det dx/du|

    Many points are evaluated at once: in a plate of their own where the model allows it, as in Pyro's vectorised
    particles, else through ``torch.vmap``, else one by one. Which of them is right is found out at the start, by
    comparison with single runs, since a model that indexes from the left would be silently wrong in a plate.
    Discrete latents are summed out; the rows that a subsampled plate drew in the first run are kept.

    Args:
        model: a Pyro model.
        args: its arguments.
        kwargs: its keyword arguments.
        vectorize: "auto", or one of "plate", "vmap" and "loop".

    Shapes:
        u: ``(points, dim)``; log joint: ``(points,)``.

    Raises:
        ValueError: there is no continuous latent, a discrete one cannot be enumerated, a subsampled plate has latents
            of its own, the model's structure varies from run to run, no point near the start has a finite density, or
            the density is flat in a latent, as where that is masked out.

    References:
        Automatic Differentiation Variational Inference, Kucukelbir et al., 2017 (arXiv:1603.00788).

    Example:
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
        self._read(self._first_run())
        self._find_dependent_supports()
        self.vectorize = self._choose() if vectorize == "auto" else vectorize
        self._refuse_flat_latents()

    # The structure of the model

    def _first_run(self) -> poutine.Trace:
        """Run the model, as the user has it, each latent at its initial value."""
        likes = [*_floating_tensors((self.args, self.kwargs)), torch.empty(()), torch.empty((), dtype=torch.float64)]
        tried = {(like.dtype, like.device): like for like in likes}
        for number, like in enumerate(tried.values(), 1):
            start = InitMessenger(partial(initial_value, like=like))
            try:
                with poutine.block(), torch.no_grad(), start:
                    trace = poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
                    trace.compute_log_prob()
                return trace
            except RuntimeError:  # an improper prior's value of another dtype than the data in a closure
                if number == len(tried):
                    raise
        raise AssertionError

    def _read(self, trace: poutine.Trace) -> None:
        self.fixed: dict[str, Tensor] = {}
        self.subsampled: list[str] = []
        self.enumerated: dict[str, bool] = {}  # whether the model itself asks for it
        self._of_discrete: set[str] = set()  # deterministic sites that have a value for each of theirs
        self.parameters = [n for n, node in trace.nodes.items() if node["type"] == "param"]
        self.max_plate_nesting = 0
        self.observations: dict[str, Tensor] = {}
        self._shapes: dict[str, Size] = {}
        latent = {}
        for name, site in trace.nodes.items():
            if site["type"] != "sample":
                continue
            frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
            self.max_plate_nesting = max([self.max_plate_nesting, *(-frame.dim for frame in frames)])
            if site_is_subsample(site):
                self.fixed[name] = site["value"]
                if len(site["value"]) < site["fn"].size:
                    self.subsampled.append(name)
            elif site["is_observed"]:
                if not _is_deterministic(site) and not isinstance(site["fn"], dist.Unit):
                    self.observations[name] = site["value"]
                self._shapes[name] = site["value" if _is_deterministic(site) else "log_prob"].shape
            else:
                latent[name] = site
        self.latents: list[LatentSite] = []
        self.first_run: dict[str, dict[str, Any]] = {}
        parts = []
        for name, site in latent.items():
            if site["fn"].support.is_discrete:
                self._refuse_what_cannot_be_summed_out(name, site)
                self.enumerated[name] = "enumerate" in site["infer"]
                continue
            for frame in site["cond_indep_stack"]:
                if frame.name in self.subsampled:
                    raise ValueError(
                        f"expected latents outside subsampled plates, since all minibatches would share them; got site "
                        f"{name!r} in plate {frame.name!r}, which draws {frame.size} of its rows: use AmortizedFlow"
                    )
            part = self._unconstrained_start(name, site)
            start = self.latents[-1].stop if self.latents else 0
            shapes = (len(site["fn"].batch_shape), site["value"].shape, part.shape)
            self.latents.append(LatentSite(name, *shapes, start, site["fn"].support))
            self.first_run[name] = {key: site[key] for key in _SITE}
            self._shapes[name] = site["value"].shape
            parts.append(part.reshape(-1))
        self.dim = self.latents[-1].stop if self.latents else 0
        if not self.dim:
            raise ValueError("expected a model with continuous latent sites; got none")
        terms = [site["log_prob"] for site in trace.nodes.values() if "log_prob" in site]
        # Priors with plain numbers draw float32 also in a model of float64 data, which must not lose its precision.
        self.dtype = reduce(torch.promote_types, [tensor.dtype for tensor in (*parts, *terms)])
        self.device = max((tensor.device for tensor in (*parts, *terms)), key=lambda device: device.type != "cpu")
        self.initial = torch.cat([part.to(self.device, self.dtype) for part in parts])

    @staticmethod
    def _refuse_what_cannot_be_summed_out(name: str, site: Any) -> None:
        if not site["fn"].has_enumerate_support:
            raise ValueError(
                f"expected continuous latents, or discrete ones of finite support, which are summed out; got site "
                f"{name!r} of {type(site['fn']).__name__}"
            )

    @staticmethod
    def _unconstrained_start(name: str, site: Any) -> Tensor:
        for fn in (site["fn"], _innermost(site["fn"])):
            if isinstance(fn, _PERIODIC):
                raise ValueError(
                    f"expected latents with a density over the reals or a part of them; got site {name!r} of "
                    f"{type(fn).__name__}, whose density repeats for ever: give it an ImproperUniform over one period "
                    f"and a factor"
                )
        try:
            return biject_to(site["fn"].support).inv(site["value"])
        except NotImplementedError:
            raise ValueError(
                f"expected latents whose support has a bijection from the reals; got site {name!r} with support "
                f"{site['fn'].support}"
            ) from None

    def _find_dependent_supports(self) -> None:
        """Compare the supports of runs at different points: one that depends on other sites differs."""
        generator = torch.Generator().manual_seed(0)
        steps = torch.randn(3, self.dim, generator=generator, dtype=torch.float64).to(self.initial)
        first, second = (
            self._run(self._parts(self.initial + 0.1 * step, None), None, densities=False) for step in steps[:2]
        )
        for run in (first, second):
            if set(run.supports) != set(self.names):
                changes = ", ".join(map(repr, sorted(set(run.supports) ^ set(self.names))))
                raise ValueError(f"expected the same latent sites in every run of the model; got changes in {changes}")
        if self.enumerated:
            self._of_discrete = {name for name, value in first.sites.items() if value.shape != self._shapes[name]}
        for index, site in enumerate(self.latents):
            part = steps[2, site.start : site.stop].view(site.unconstrained_shape)
            for run in (first, second):
                # Where discrete latents are summed out, there are dimensions more on the left.
                got = run.shapes[site.name][-len(site.shape) :] if site.shape else site.shape
                if got != site.shape:
                    raise ValueError(
                        f"expected latents of one shape in every run; got {tuple(site.shape)} and {tuple(got)} at site "
                        f"{site.name!r}"
                    )
            images = [biject_to(run.supports[site.name])(part) for run in (first, second)]
            if not torch.equal(*images):
                self.latents[index] = replace(site, support=None)

    def _choose(self) -> str:
        """Find the fastest way of evaluating many points that gives what single runs give."""
        points = self._points_nearby(8)
        expected = self._evaluate("loop", points)
        finite = expected[_LOG_JOINT].isfinite()
        if not finite.any():
            raise ValueError(
                f"expected a finite log joint density near the prior median; got {float(expected[_LOG_JOINT][0])} there"
            )
        points, expected = points[finite][:3], {name: value[finite][:3] for name, value in expected.items()}
        for mode in _MODES[: None if len(points) > 1 else 0]:
            try:
                # By twos as well: a model may have as many rows as there are points, and take the ones for the others.
                got = [self._evaluate(mode, points), self._evaluate(mode, points[:2])]
            except Exception:  # whatever the model does not stand: single runs then show a fault of its own
                continue
            if all(_agree(few[name], value[: len(few[name])]) for few in got for name, value in expected.items()):
                return mode
        return "loop"

    def _points_nearby(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        steps = torch.randn(number, self.dim, generator=generator, dtype=torch.float64).to(self.initial)
        return self.initial + 0.1 * steps

    def _refuse_flat_latents(self) -> None:
        """A latent that nothing holds has no posterior: a guide would widen for ever."""
        value, score = self._guarded(self._points_nearby(3), self._value_and_score)
        flat = (score[value.isfinite()] == 0).all(0)
        if self.subsampled or not value.isfinite().any():
            return  # other rows may hold it
        for site in self.latents:
            number = int(flat[site.start : site.stop].sum())
            if number:
                raise ValueError(
                    f"expected a density that depends on every latent; got one that is flat in {number} of "
                    f"{site.stop - site.start} of site {site.name!r}, as where a latent is masked out (by obs_mask, "
                    f"for one) or has neither a prior nor data"
                )

    @torch.no_grad()
    def _evaluate(self, mode: str, points: Tensor) -> dict[str, Tensor]:
        """Give all that is ever read off a run: the log joint, values of sites, log-densities of observations."""
        values = self._map(points, lambda run: {_LOG_JOINT: run.log_prob, **run.sites, **run.observed}, mode)
        return {_LOG_JOINT: values.pop(_LOG_JOINT), **_by_point(len(points), values, self._shapes)}

    @property
    def names(self) -> list[str]:
        """The names of the latent sites, in the order of the vector."""
        return [site.name for site in self.latents]

    @property
    def is_static(self) -> bool:
        """Whether no support depends on other sites."""
        return all(site.support is not None for site in self.latents)

    # Evaluation

    def __call__(self, u: Tensor) -> Tensor:
        """Give the log joint density of each point, in nats."""
        return self._map(u, lambda run: run.log_prob)

    @torch.no_grad()
    def value(self, u: Tensor) -> Tensor:
        """Give the log joint density without a graph, of any number of points; -inf where it is not finite."""
        self.evaluations += len(u)
        return torch.cat([self._guarded(part, self._value)[0] for part in u.split(_CHUNK)])

    def value_and_score(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Give the log joint density and its gradient, without a graph; -inf and zeros where either is not finite."""
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
        """Evaluate; one matrix without a Cholesky factor would spoil a whole batch, and is looked for by halves."""
        try:
            return evaluate(u)
        except torch.linalg.LinAlgError:
            if len(u) == 1:
                return u.new_full((1,), -torch.inf), torch.zeros_like(u)
            halves = [self._guarded(half, evaluate) for half in u.detach().chunk(2)]
            return torch.cat([a for a, _ in halves]), torch.cat([b for _, b in halves])

    def log_likelihood(self, u: Tensor) -> dict[str, Tensor]:
        """Give the log-density of every observation, by site, of shape ``(points, *shape)``."""
        if self.enumerated:
            raise ValueError(
                f"expected a model without discrete latents, whose observations have no log-density of their own; got "
                f"{', '.join(map(repr, self.enumerated))}"
            )
        return _by_point(len(u), self._map(u, lambda run: run.observed), self._shapes)

    @torch.no_grad()
    def predict(self, u: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run the model on arguments of one's own at every point; give what it draws in the place of observations."""

        def run(parts: Mapping[str, Tensor], points: int | None) -> dict[str, Tensor]:
            evaluation = _Evaluation(parts, {}, points, densities=False, anew=True)
            plate = nullcontext() if points is None else pyro.plate("_points", points, dim=-1 - self.max_plate_nesting)
            with pyro.validation_enabled(False), poutine.block(), evaluation, plate:
                self.model(*args, **kwargs)
            return {name: value for name, value in evaluation.drawn.items() if name not in parts}

        if self.vectorize == "plate":
            alone = run(self._parts(u[0], None), None)
            shapes = {name: value.shape for name, value in alone.items()}
            return _by_point(len(u), run(self._parts(u, len(u)), len(u)), shapes)
        rows = [run(self._parts(point, None), None) for point in u]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    @torch.no_grad()
    def prior_draws(self, n: int, *, seed: int = 0) -> Tensor:
        """Draw points from the prior, ``(n, dim)`` or fewer, since those that fail or are not finite are left out.

        Latents of improper priors are drawn around their initial values.
        """

        def run(u: Tensor, points: int | None) -> Tensor:
            draws = _PriorDraws(self._parts(u, points), self.fixed, points, densities=False)
            plate = nullcontext() if points is None else pyro.plate("_points", points, dim=-1 - self.max_plate_nesting)
            with pyro.validation_enabled(False), poutine.block(), draws, plate:
                self.model(*self.args, **self.kwargs)
            return torch.cat([draws.parts[name].reshape(points or 1, -1) for name in self.names], -1)

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            u = self.initial + 2 * torch.randn(n, self.dim).to(self.initial)
            drawn = []
            if self.vectorize == "plate":
                with suppress(Exception):  # one bad draw spoils all: then one by one
                    drawn = [run(u, n)]
            for point in u if not drawn else ():
                with suppress(Exception):  # whatever the model does not stand so far out
                    drawn.append(run(point, None))
        draws = torch.cat(drawn) if drawn else u[:0]
        return draws[draws.isfinite().all(-1)].to(self.initial)

    def constrain(self, u: Tensor, *, deterministic: bool = False) -> dict[str, Tensor]:
        """Give the sites' values of shape ``(points, *shape)``, on request with those of deterministic sites.

        Among the latter is none that depends on a discrete latent, over whose values it is not one.
        """
        if not deterministic and self.is_static:
            return constrain(self.latents, u)
        values = self._map(u, lambda run: run.sites)
        chosen = {name: values[name] for name in (values if deterministic else self.names)}
        return _by_point(len(u), chosen, self._shapes)

    def unconstrain(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Give the points of sites' values of shape ``(points, *shape)``, and the log-Jacobian of :meth:`constrain`."""
        values = checked_values(self.latents, values)
        if self.is_static:
            return unconstrain(self.latents, values)

        def single(*given: Tensor) -> tuple[Tensor, Tensor]:
            run = self._run(dict(zip(self.names, given, strict=True)), None, constrained=True, densities=False)
            return torch.cat([run.parts[name].reshape(-1) for name in self.names]), run.log_prob

        rows = [single(*row) for row in zip(*(values[name].to(self.dtype) for name in self.names), strict=True)]
        return torch.stack([u for u, _ in rows]), torch.stack([log_det for _, log_det in rows])

    def _map(self, u: Tensor, take: Callable[[_Evaluation], Any], mode: str | None = None) -> Any:
        """Run the model at every point and take something of each run, stacked."""
        if u.dim() != 2 or u.shape[-1] != self.dim:
            raise ValueError(f"expected points of shape (points, {self.dim}); got {tuple(u.shape)}")
        mode = mode or self.vectorize
        if mode == "plate":
            return take(self._run(self._parts(u, len(u)), len(u)))

        def single(point: Tensor) -> Any:
            return take(self._run(self._parts(point, None), None))

        if mode == "vmap":
            return torch.func.vmap(single, randomness="same")(u)
        results = [single(point) for point in u]
        if isinstance(results[0], dict):
            return {name: torch.stack([result[name] for result in results]) for name in results[0]}
        return torch.stack(results)

    def _parts(self, u: Tensor, points: int | None) -> dict[str, Tensor]:
        parts = {}
        for site in self.latents:
            part = u[..., site.start : site.stop]
            plates = (1,) * (self.max_plate_nesting - site.batch_ndim)
            parts[site.name] = part.reshape(
                site.unconstrained_shape if points is None else (points, *plates, *site.unconstrained_shape)
            )
        return parts

    def _run(self, values: Mapping[str, Tensor], points: int | None, **options: bool) -> _Evaluation:
        """Run the model at one point, or in a plate of points."""
        evaluation = _Evaluation(values, self.fixed, points, **options)
        # Validation reads values, which neither vmap nor a GPU likes; the first run had what the user asks for.
        with pyro.validation_enabled(False), poutine.block():
            if self.enumerated:
                self._run_enumerated(evaluation)
            elif points is None:
                with evaluation:
                    self.model(*self.args, **self.kwargs)
            else:
                with evaluation, pyro.plate("_points", points, dim=-1 - self.max_plate_nesting):
                    self.model(*self.args, **self.kwargs)
        return evaluation

    def _run_enumerated(self, evaluation: _Evaluation) -> None:
        first = -1 - self.max_plate_nesting - (evaluation.points is not None)
        model = poutine.enum(config_enumerate(self.model, default="parallel"), first)
        densities, evaluation.densities = evaluation.densities, False
        plate = nullcontext() if evaluation.points is None else pyro.plate("_points", evaluation.points, dim=first + 1)
        with evaluation, plate:
            trace = poutine.trace(model).get_trace(*self.args, **self.kwargs)
        evaluation.sites = {name: site for name, site in evaluation.sites.items() if name not in self._of_discrete}
        if densities:
            evaluation.log_prob = evaluation.log_prob + _summed_out(trace, evaluation.points)


def _summed_out(trace: poutine.Trace, points: int | None) -> Tensor:
    """Sum the enumerated sites out of a trace's log-density, which stays separate for the points of their plate."""
    trace.compute_log_prob()
    trace.pack_tensors()
    factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    enumerated = set()
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        if isinstance(site["scale"], Tensor) or site["scale"] != 1:
            raise ValueError(f"expected sites without a scale beside discrete latents; got {site['scale']} at {name!r}")
        plates = frozenset(trace.plate_to_symbol[frame.name] for frame in site["cond_indep_stack"] if frame.vectorized)
        factors.setdefault(plates, []).append(site["packed"]["log_prob"])
        if "_enumerate_symbol" in site["infer"]:
            enumerated.add(site["infer"]["_enumerate_symbol"])
    total: Any = 0.0
    for terms in contract_tensor_tree(factors, enumerated).values():
        for term in terms:
            dims = term._pyro_dims
            kept = dims.find(trace.plate_to_symbol["_points"]) if points is not None else -1
            total = total + (term.sum() if kept < 0 else term.movedim(kept, 0).reshape(points, -1).sum(-1))
    return total


def _by_point(points: int, values: Mapping[str, Tensor], shapes: Mapping[str, Size]) -> dict[str, Tensor]:
    """Undo what a plate of points leaves: dimensions of one, and values that depend on no latent without a point's."""
    result = {}
    for name, value in values.items():
        shape = shapes[name]
        alone = value.numel() != points * shape.numel()
        result[name] = value.reshape(shape).expand(points, *shape) if alone else value.reshape(points, *shape)
    return result


def _agree(found: Tensor, wanted: Tensor) -> bool:
    if not wanted.is_floating_point():
        return torch.equal(found, wanted)
    tolerance = 1e-9 if wanted.dtype == torch.float64 else 1e-4
    return found.shape == wanted.shape and torch.allclose(found, wanted, tolerance, tolerance, equal_nan=True)


def supports_at(
    model: Callable[..., Any], parts: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Give the support of each latent at a point, by a run of the model in the plates that are open."""
    evaluation = _Evaluation(parts, {}, None, densities=False)
    with poutine.block(), evaluation:
        model(*args, **kwargs)
    return evaluation.supports
