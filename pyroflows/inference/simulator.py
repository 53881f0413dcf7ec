"""Simulations of a Pyro model's latents and data, many in one run where the model allows it."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyroflows.inference.log_joint import equals_single_runs
from pyroflows.inference.sites import LatentSite, Model, have_one_image, unconstrained_value

__all__ = ["Simulator"]

_CHUNK = 2000  # simulations in one run
_Names = str | Sequence[str]


class _Simulation(Messenger):
    """Draws the observed sites, sets sites to values, and records the sites that are observed otherwise."""

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


class Simulator:
    """Draws latents and data from a model, many simulations in one run if that agrees with single runs."""

    def __init__(
        self, model: Model, args: Sequence[Any], kwargs: Mapping[str, Any], observed: _Names, latents: _Names | None
    ):
        self.model, self.args, self.kwargs = model, tuple(args), dict(kwargs)
        self.observed = [observed] if isinstance(observed, str) else list(observed)
        if not self.observed:
            raise ValueError("expected the name of at least one observed site; got none")
        self._plate_dim = -1
        runs = [self._run() for _ in range(3)]
        nodes = {name: node for name, node in runs[0].nodes.items() if node["type"] == "sample"}
        for name, node in nodes.items():
            if site_is_subsample(node) and (number := len(node["value"])) < (size := node["fn"].size):
                got = f"plate {name!r}, which draws {number} of {size}"
                raise ValueError(f"expected plates that take all rows; got {got}")
        nodes = {name: node for name, node in nodes.items() if not site_is_subsample(node)}
        names = self._choose_latents(nodes, latents)
        depths = [len(n["fn"].batch_shape) for n in nodes.values() if "_deterministic" not in n["infer"]]
        frames = [frame for node in nodes.values() for frame in node["cond_indep_stack"] if frame.vectorized]
        self._plate_dim = -1 - max([0, *depths, *(-frame.dim for frame in frames)])
        self.shapes = {name: _value(runs[0], name).shape for name in (*self.observed, *names)}
        self.latents: list[LatentSite] = []
        for name in names:
            start = self.latents[-1].stop if self.latents else 0
            self.latents.append(_latent_site(runs, name, start))
        self.is_batched = self._agrees_with_single_runs(runs, nodes)

    def _choose_latents(self, nodes: Mapping[str, Any], latents: _Names | None) -> list[str]:
        if latents is None:
            latents = [name for name in nodes if not nodes[name]["is_observed"] and name not in self.observed]
        latents = [latents] if isinstance(latents, str) else list(latents)
        if not latents:
            raise ValueError("expected a model with latent sites; got none")
        for name in (*self.observed, *latents):
            if name not in nodes:
                raise ValueError(f"expected names among the sites {', '.join(map(repr, nodes))}; got {name!r}")
        if both := set(self.observed) & set(latents):
            raise ValueError(f"expected a site to be either latent or observed; got {min(both)!r} as both")
        return latents

    def _run(self, number: int | None = None, values: Mapping[str, Tensor] | None = None) -> poutine.Trace:
        simulation = _Simulation(self.observed, values or {})
        plate = nullcontext() if number is None else pyro.plate("_simulations", number, dim=self._plate_dim)
        with poutine.block(), torch.no_grad(), plate, simulation:
            trace = poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
        if simulation.others:
            got = f"site {simulation.others[0]!r}, which is observed and not among observed={self.observed}"
            raise ValueError(f"expected a model that can be simulated; got {got}")
        return trace

    def _agrees_with_single_runs(self, runs: Sequence[poutine.Trace], nodes: Mapping[str, Any]) -> bool:
        """Whether densities and deterministic values of one run for all are those of single runs."""
        number = len(runs)

        def read(trace: poutine.Trace, rows: int) -> dict[str, Tensor]:
            trace.compute_log_prob()
            kinds = {name: "value" if "_deterministic" in node["infer"] else "log_prob" for name, node in nodes.items()}
            values = {name: trace.nodes[name][kind].reshape(rows, -1) for name, kind in kinds.items()}
            return {name: value if kinds[name] == "value" else value.sum(-1) for name, value in values.items()}

        def batch(rows: int) -> dict[str, Tensor]:
            values = {}
            for name, node in nodes.items():
                stacked = torch.stack([run.nodes[name]["value"] for run in runs])
                plates = (1,) * (-1 - self._plate_dim - len(node["fn"].batch_shape))
                values[name] = stacked.reshape(number, *plates, *stacked.shape[1:])
            return read(self._run(rows, values), rows)

        try:
            singles = [read(run, 1) for run in runs]
            expected = {name: torch.cat([single[name] for single in singles]) for name in nodes}
        except Exception:  # sites that differ from run to run, or have no density
            return False
        # The second comparison checks the shapes of what is drawn.
        return equals_single_runs(batch, expected, (number,)) and equals_single_runs(self._simulate, {}, (number,))

    def _simulate(self, number: int | None) -> dict[str, Tensor]:
        """Return simulations of every site from one run: a number of them, or a single one without a plate."""
        trace = self._run(number)
        values = {}
        for name, shape in self.shapes.items():
            value = _value(trace, name)
            if number is None and value.shape != shape:
                got = f"{tuple(shape)} and {tuple(value.shape)}"
                raise ValueError(f"expected site {name!r} to have one shape in every run; got {got}")
            values[name] = value.reshape(1 if number is None else number, *shape)
        return values

    def __call__(self, number: int, progress: bool | None = None) -> dict[str, Tensor]:
        """Return simulations of every site, each ``(number, *shape)``."""
        from tqdm.auto import tqdm

        sizes: list[Any] = [min(_CHUNK, number - i) for i in range(0, number, _CHUNK)]
        parts = []
        disable = None if progress is None else not progress
        with tqdm(total=number, disable=disable, unit="simulation", leave=False) as bar:
            for size in sizes if self.is_batched else [None] * number:
                parts.append(self._simulate(size))
                bar.update(size or 1)
        return {name: torch.cat([part[name] for part in parts]) for name in self.shapes}

    def finite(self, number: int, drop_nonfinite: bool, progress: bool | None) -> dict[str, Tensor]:
        """Return the finite ones of a number of simulations; refuse others, unless they are to be dropped."""
        values = self(number, progress)
        finite = {name: values[name][..., None].flatten(1).isfinite().all(-1) for name in self.observed}
        finite |= {site.name: site.unconstrain(values[site.name]).isfinite().all(-1) for site in self.latents}
        rows = torch.stack(list(finite.values())).all(0)
        if not drop_nonfinite and not rows.all():
            counts = {name: int((~mask).sum()) for name, mask in finite.items()}
            sites = ", ".join(f"{count} at site {name!r}" for name, count in counts.items() if count)
            got = f"{int((~rows).sum())} of {number} that are not ({sites})"
            advice = "bound the prior, or leave them out by drop_nonfinite=True"
            raise ValueError(f"expected finite simulations; got {got}: {advice}")
        return {name: value[rows] for name, value in values.items()}


def _value(trace: poutine.Trace, name: str) -> Tensor:
    if name not in trace.nodes:
        raise ValueError(f"expected the same sites in every run of the model; got {name!r} in only some runs")
    value = trace.nodes[name]["value"]
    if not isinstance(value, Tensor):
        raise TypeError(f"expected sites that are tensors; got {type(value).__name__} at site {name!r}")
    return value


def _latent_site(runs: Sequence[poutine.Trace], name: str, start: int) -> LatentSite:
    support, value = runs[0].nodes[name]["fn"].support, _value(runs[0], name)
    unconstrained = unconstrained_value(name, support, value)
    supports = [run.nodes[name]["fn"].support for run in runs if name in run.nodes]
    if not have_one_image(supports, torch.randn_like(unconstrained)):
        got = f"site {name!r} with support {support}"
        raise ValueError(f"expected latents whose support does not depend on other sites; got {got}")
    return LatentSite(name, value.shape, unconstrained.shape, start, support)
