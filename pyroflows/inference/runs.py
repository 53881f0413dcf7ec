"""Runs of a Pyro model at points of unconstrained space: one point at a time, or many in one run."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.enum import config_enumerate
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor
from torch.distributions import biject_to

from pyroflows.inference.sites import have_one_image, is_deterministic
from pyroflows.inference.structure import ModelStructure

__all__ = ["Evaluation", "ModelRuns", "PriorDraws", "by_point", "equals_single_runs", "supports_at"]

_POINTS = "_points"  # the plate of the points


class Evaluation(Messenger):
    """Sets every latent to a value, and sums up the log-densities and the log-Jacobians.

    Args:
        values: parts of the unconstrained vector by site, or values of the sites if ``constrained``.
        fixed: values of subsample sites, the same in every run.
        num_points: the number of points if the model runs under a plate of them, the leftmost; None for one point.
        constrained: whether the values are those of the sites.
        densities: whether log-densities are added up, or Jacobians alone.
        resample_observed: whether observed sites are drawn.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        fixed: Mapping[str, Tensor],
        num_points: int | None,
        *,
        constrained: bool = False,
        densities: bool = True,
        resample_observed: bool = False,
    ):
        super().__init__()
        self.values, self.fixed, self.num_points = values, fixed, num_points
        self.constrained, self.densities, self.resample_observed = constrained, densities, resample_observed
        self.log_prob: Any = 0.0
        self.parts: dict[str, Tensor] = {}  # latents in unconstrained space
        self.sites: dict[str, Tensor] = {}  # latents and deterministic sites, in constrained space
        self.supports: dict[str, Any] = {}
        self.shapes: dict[str, Size] = {}  # of the latents, by their distributions
        self.drawn: dict[str, Tensor] = {}  # every site's value
        self.observed: dict[str, Tensor] = {}  # log-densities of the observations

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.fixed:
            msg["value"], msg["done"] = self.fixed[name], True
        if self.resample_observed and msg["is_observed"] and not is_deterministic(msg):
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
        if msg["is_observed"] and not deterministic and not isinstance(fn, dist.Unit):
            self.observed[name] = scale_and_mask(log_prob, mask=msg["mask"])

    def _add(self, terms: Tensor) -> None:
        if self.num_points is None:
            self.log_prob = self.log_prob + terms.sum()
        elif terms.dim() and terms.shape[0] == self.num_points:
            self.log_prob = self.log_prob + terms.reshape(self.num_points, -1).sum(-1)
        else:
            raise ValueError(f"expected a log-density for each of {self.num_points} points; got {tuple(terms.shape)}")


class PriorDraws(Evaluation):
    """Draws every latent from its prior; one that cannot be drawn, as of an improper prior, keeps its value."""

    def _pyro_sample(self, msg: Any) -> None:
        super()._pyro_sample(msg)
        if msg["name"] in self.parts:
            with suppress(NotImplementedError):
                value = msg["fn"].sample()
                msg["value"], self.parts[msg["name"]] = value, biject_to(msg["fn"].support).inv(value)


class ModelRuns:
    """Runs of a model at points of unconstrained space.

    Many points share one run in a plate of their own ("plate"), as in Pyro's vectorised particles, or run through
    ``torch.vmap`` ("vmap"), or one by one ("loop").
    """

    def __init__(
        self, model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], structure: ModelStructure
    ):
        self.model, self.args, self.kwargs, self.structure = model, args, kwargs, structure
        self.of_discrete: set[str] = set()  # deterministic sites with a value for each of a discrete latent's

    def map(self, u: Tensor, run: Callable[[dict[str, Tensor], int | None], Any], mode: str) -> Any:
        """Run the model at every point ``(points, dim)``; return what ``run(parts, num_points)`` returns, stacked."""
        if mode == "plate":
            return run(self.parts(u, len(u)), len(u))

        def single(point: Tensor) -> Any:
            return run(self.parts(point, None), None)

        if mode == "vmap":
            return torch.func.vmap(single, randomness="same")(u)
        results = [single(point) for point in u]
        if isinstance(results[0], dict):
            return {name: torch.stack([result[name] for result in results]) for name in results[0]}
        return torch.stack(results)

    def parts(self, u: Tensor, num_points: int | None) -> dict[str, Tensor]:
        """Return the latents' parts of one point, or of points in a plate left of the model's plates."""
        parts = {}
        for site in self.structure.latents:
            plates = (1,) * (self.structure.max_plate_nesting - site.plate_ndim)
            batch = () if num_points is None else (num_points, *plates)
            parts[site.name] = u[..., site.start : site.stop].reshape((*batch, *site.unconstrained_shape))
        return parts

    def evaluate(self, values: Mapping[str, Tensor], num_points: int | None, **options: bool) -> Evaluation:
        """Evaluate the log joint density at one point, or at points in a plate."""
        evaluation = Evaluation(values, self.structure.fixed, num_points, **options)
        if self.structure.discrete:
            return self._sum_out(evaluation)
        return self.run(evaluation)

    def run(self, evaluation: Evaluation, args: Sequence[Any] | None = None, kwargs: Any = None) -> Evaluation:
        """Run the model under an evaluation, with its own arguments or others; discrete latents are drawn."""
        args, kwargs = (self.args, self.kwargs) if args is None else (args, kwargs)
        # Validation reads values, which neither vmap nor a GPU likes; the first run had what the user asks for.
        with pyro.validation_enabled(False), poutine.block(), evaluation, self._plate(evaluation.num_points):
            self.model(*args, **kwargs)
        return evaluation

    def _plate(self, num_points: int | None) -> Any:
        if num_points is None:
            return nullcontext()
        return pyro.plate(_POINTS, num_points, dim=-1 - self.structure.max_plate_nesting)

    def _sum_out(self, evaluation: Evaluation) -> Evaluation:
        """Run the model under an evaluation, and sum the discrete latents out of the density."""
        num_points = evaluation.num_points
        first_dim = -1 - self.structure.max_plate_nesting - (num_points is not None)
        model = poutine.enum(config_enumerate(self.model, default="parallel"), first_dim)
        densities, evaluation.densities = evaluation.densities, False
        with pyro.validation_enabled(False), poutine.block(), evaluation, self._plate(num_points):
            trace = poutine.trace(model).get_trace(*self.args, **self.kwargs)
        evaluation.sites = {name: site for name, site in evaluation.sites.items() if name not in self.of_discrete}
        if densities:
            evaluation.log_prob = evaluation.log_prob + _summed_out(trace, num_points)
        return evaluation

    def find_dependent_supports(self) -> None:
        """Set the support of each latent that depends on other sites to None, by runs at two different points."""
        structure, latents = self.structure, self.structure.latents
        generator = torch.Generator().manual_seed(0)
        steps = torch.randn(3, len(structure.initial), generator=generator, dtype=torch.float64).to(structure.initial)
        runs = [
            self.evaluate(self.parts(structure.initial + 0.1 * step, None), None, densities=False) for step in steps[:2]
        ]
        names = {site.name for site in latents}
        for run in runs:
            if changes := set(run.supports) ^ names:
                shown = ", ".join(map(repr, sorted(changes)))
                raise ValueError(f"expected the same latent sites in every run of the model; got changes in {shown}")
        if structure.discrete:
            sites = runs[0].sites.items()
            self.of_discrete = {name for name, value in sites if value.shape != structure.shapes[name]}
        for index, site in enumerate(latents):
            for run in runs:
                # Enumeration of discrete latents adds dimensions on the left.
                shape = run.shapes[site.name][-len(site.shape) :] if site.shape else site.shape
                if shape != site.shape:
                    raise ValueError(
                        f"expected latents of one shape in every run; got {tuple(site.shape)} and {tuple(shape)} at "
                        f"site {site.name!r}"
                    )
            if not have_one_image([run.supports[site.name] for run in runs], site.slice_of(steps[2])):
                latents[index] = replace(site, support=None)


def _summed_out(trace: poutine.Trace, num_points: int | None) -> Tensor:
    """Sum the enumerated sites out of a trace's log-density, separately for each point of their plate."""
    trace.compute_log_prob()
    trace.pack_tensors()
    factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    enumerated = set()
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        if isinstance(site["scale"], Tensor) or site["scale"] != 1:
            raise ValueError(
                f"expected sites without a scale in a model with discrete latents; got {site['scale']} at {name!r}"
            )
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


def by_point(num_points: int, values: Mapping[str, Tensor], shapes: Mapping[str, Size]) -> dict[str, Tensor]:
    """Reshape values of a run in a plate to ``(points, *shape)``; expand those that depend on no latent."""
    result = {}
    for name, value in values.items():
        shape = shapes[name]
        varies = value.numel() == num_points * shape.numel()
        result[name] = value.reshape(num_points, *shape) if varies else value.reshape(shape).expand(num_points, *shape)
    return result


def equals_single_runs(
    run_batch: Callable[[int], Mapping[str, Tensor]], single_runs: Mapping[str, Tensor], sizes: Sequence[int]
) -> bool:
    """Whether one run of a model for the first ``n`` points gives what single runs gave, at each of several sizes.

    A model that indexes from the left, for one, is silently wrong in a plate of points. If it has as many rows as there
    are points, it may mistake one for the other, but not at two sizes.
    """
    try:
        for size in sizes:
            batch = run_batch(size)
            if not all(_close(batch[name], value[:size]) for name, value in single_runs.items()):
                return False
    except Exception:  # whatever the model cannot do in a batch; single runs then show errors of its own
        return False
    return True


def _close(value: Tensor, expected: Tensor) -> bool:
    if not expected.is_floating_point():
        return torch.equal(value, expected)
    tolerance = 1e-9 if expected.dtype == torch.float64 else 1e-4
    return value.shape == expected.shape and torch.allclose(
        value.to(expected), expected, tolerance, tolerance, equal_nan=True
    )


def supports_at(
    model: Callable[..., Any], parts: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the support of each latent at a point, by a run of the model in the plates that are open."""
    evaluation = Evaluation(parts, {}, None, densities=False)
    with poutine.block(), evaluation:
        model(*args, **kwargs)
    return evaluation.supports
