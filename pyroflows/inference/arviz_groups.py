"""A posterior as ArviZ holds it: draws, log-likelihoods, predictions and observations, with named dimensions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from pyro.distributions import MaskedDistribution, Unit
from torch import Size, Tensor
from torch.distributions import Distribution, Independent

from pyroflows._version import __version__
from pyroflows.diagnostics.weights import psis
from pyroflows.flow import Flow
from pyroflows.inference.log_joint import LogJoint
from pyroflows.inference.sites import is_deterministic

__all__ = ["ArvizGroups", "Coords", "Dims"]

Coords = Mapping[str, Sequence[Any]]
Dims = Mapping[str, Sequence[str]]

_CHUNK = 2000  # points evaluated at once
_SAMPLE_DIMS = ["chain", "draw"]


@dataclass
class _Site:
    """The shape of a site, and the names of its dimensions."""

    shape: Size  # of a value
    event_ndim: int
    dims: list[str]
    kept: Tensor | None = None  # the entries of the batch that are observed, if others are masked out

    @property
    def batch_ndim(self) -> int:
        return len(self.shape) - self.event_ndim

    def drop_masked(self, value: Tensor, ndim: int) -> Tensor:
        """Return the observed entries of a value, in one dimension after the first ``ndim``."""
        if self.kept is None:
            return value
        event = value.shape[ndim + self.batch_ndim :]
        return value.reshape(*value.shape[:ndim], -1, *event).index_select(ndim, self.kept.to(value.device))


class ArvizGroups:
    """Groups of ArviZ's data for draws of a model's latents.

    Args:
        log_joint: the density of the model.
        u: draws, chain after chain, ``(draws, latents)``.
        num_chains: the number of chains.
        coords: labels along dimensions, by their names.
        dims: names of the dimensions of sites; by default those of plates.
        attrs: attributes of every group.

    Attributes:
        notes: what was left out, and why.
    """

    def __init__(
        self,
        log_joint: LogJoint,
        u: Tensor,
        num_chains: int,
        *,
        coords: Coords | None = None,
        dims: Dims | None = None,
        attrs: Mapping[str, Any] | None = None,
    ):
        self.log_joint, self.u, self.num_chains = log_joint, u, num_chains
        self.sites = _read_sites(log_joint, dims or {})
        self.coords = _read_coords(self.sites, coords or {})
        created = datetime.now(UTC).isoformat(timespec="seconds")
        library = {"inference_library": "pyroflows", "inference_library_version": __version__, "created_at": created}
        self.attrs = {**library, **(attrs or {})}
        self.datasets: dict[str, Any] = {}
        self.notes: list[str] = []

    def build(self) -> Any:
        """Return the groups as ``InferenceData`` (ArviZ 0.x) or as a ``DataTree`` (1.x)."""
        import arviz as az
        import xarray as xr

        if "InferenceData" in vars(az):
            return az.InferenceData(attrs=self.attrs, **self.datasets)
        return xr.DataTree.from_dict({"/": xr.Dataset(attrs=self.attrs), **self.datasets})

    @torch.no_grad()
    def add_posterior(self) -> None:
        """Add the draws, with deterministic sites."""
        self._add("posterior", self._read(lambda u: self.log_joint.constrain(u, deterministic=True)))

    @torch.no_grad()
    def add_sample_stats(self, flow: Flow | None) -> None:
        """Add the log joint density and, if the draws are a flow's, its log-density and the smoothed log weights."""
        stats = {"lp": self.log_joint.value(self.u)}
        if flow is not None:
            stats["log_q"] = torch.cat([flow.log_prob(part) for part in self.u.split(_CHUNK)])
            log_weights = (stats["lp"] - stats["log_q"]).double()
            if len(self.u) >= 32 and log_weights.isfinite().any():
                stats["log_weight"] = psis(log_weights)[0]
        self._add("sample_stats", stats)

    @torch.no_grad()
    def add_observations(self, *, predictive: bool, factors: Sequence[str] | Mapping[str, str] | None) -> None:
        """Add log-likelihoods, predictions and observations, each without what is masked out.

        Args:
            predictive: whether to add predictions.
            factors: ``pyro.factor`` statements that are a part of the likelihood, or for each of them the site to whose
                log-likelihood it is added; None if that is not known.
        """
        structure = self.log_joint.structure
        targets = dict(factors) if isinstance(factors, Mapping) else {name: name for name in factors or ()}
        self._check_factors(targets)
        likelihood = self._log_likelihood(None if factors is None else list(targets))
        kept: dict[str, Tensor] = {}
        for name in (*structure.observations, *targets):
            node = structure.observed_nodes[name]
            kept[name] = torch.broadcast_to(_mask_of(node["fn"]) & _as_mask(node["mask"]), structure.shapes[name])
            if name in likelihood:  # a mask may depend on latents
                kept[name] = kept[name] | (likelihood[name] != likelihood[name][0]).any(0).cpu()
        for name, target in targets.items():
            if name != target:
                kept[target] = kept[target] | kept[name]
                if name in likelihood:
                    likelihood[target] = likelihood.pop(name) + likelihood.get(target, 0.0)
        for name, is_kept in kept.items():
            self.sites[name].kept = None if is_kept.all() else is_kept.flatten().nonzero()[:, 0]
        observed = {name: value.expand(self.sites[name].shape) for name, value in structure.observations.items()}
        predictions = self._predictions() if predictive and observed else {}
        groups = {"log_likelihood": likelihood, "posterior_predictive": predictions, "observed_data": observed}
        for group, values in groups.items():
            ndim = int(group != "observed_data")
            values = {name: self.sites[name].drop_masked(value, ndim) for name, value in values.items()}
            self._add(group, {name: value for name, value in values.items() if value.numel()})

    def _check_factors(self, targets: Mapping[str, str]) -> None:
        """Refuse factors that the model does not have, and those that do not fit the site that they belong to."""
        structure = self.log_joint.structure
        factors = [name for name in structure.factors if isinstance(structure.observed_nodes[name]["fn"], Unit)]
        for name, target in targets.items():
            if name not in factors:
                raise ValueError(f"expected factors of the model, {factors}; got {name!r}")
            if name != target and target not in structure.observations:
                raise ValueError(f"expected an observed site, {list(structure.observations)}; got {target!r}")
            if structure.shapes[name] != structure.shapes[target]:
                shape, got = tuple(structure.shapes[target]), tuple(structure.shapes[name])
                raise ValueError(f"expected a factor of the shape {shape} of {target!r}; got {name!r} of shape {got}")

    def _log_likelihood(self, factors: Sequence[str] | None) -> dict[str, Tensor]:
        """Return the log-likelihood of every observation; nothing if a part of it is not known."""
        structure = self.log_joint.structure
        if not structure.observations and not factors:
            return {}
        if structure.factors and factors is None:
            factor = "factor" if len(structure.factors) == 1 else "factors"
            reason = f"the {factor} {', '.join(map(repr, structure.factors))} may be a part of it"
            advice = "pass likelihood_factors=[...] with the names of those that are, or [] if none is"
            self.notes.append(f"log_likelihood is left out, since {reason}: {advice}")
            return {}
        likelihood = self._read(lambda u: self.log_joint.log_likelihood(u, factors or ()))
        names = [*structure.observations, *(factors or ())]
        names = [name for name in names if structure.observed_nodes[name]["mask"] is not False]
        if unknown := [repr(name) for name in names if name not in likelihood]:
            reason = f"the observations of {', '.join(unknown)} have none of their own, but share a discrete latent"
            self.notes.append(f"log_likelihood is left out, since {reason}")
            return {}
        return likelihood

    def _predictions(self) -> dict[str, Tensor]:
        """Return draws of the observed sites, at the draws of the latents."""
        joint = self.log_joint
        names = list(joint.structure.observations)
        try:
            values = self._read(lambda u: joint.predict(u, joint.args, joint.kwargs))
        except (NotImplementedError, torch.linalg.LinAlgError):
            self.notes.append("posterior_predictive is left out, since the model cannot be drawn from at every draw")
            return {}
        if other := ", ".join(repr(name) for name in names if values[name].shape[1:] != self.sites[name].shape):
            reason = f"draws of {other} have another shape than the observations: expand the distribution to theirs"
            self.notes.append(f"posterior_predictive is left out, since {reason}")
            return {}
        return {name: values[name] for name in names}

    def _read(self, read: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
        parts = [read(part) for part in self.u.split(_CHUNK)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _add(self, group: str, values: Mapping[str, Tensor]) -> None:
        """Add a group, unless it is empty."""
        import xarray as xr

        if not values:
            return
        sample_dims = [] if group == "observed_data" else _SAMPLE_DIMS
        coords: dict[str, Any] = {}
        variables = {}
        for name, value in values.items():
            site = self.sites.get(name)
            dims = [] if site is None else list(site.dims)
            if site is not None and site.kept is not None:
                entries = site.kept.numpy()
                kept = f"{name}_observed"
                coords[kept] = self.coords[dims[0]][entries] if site.batch_ndim == 1 else entries
                dims = [kept, *dims[site.batch_ndim :]]
            array = value.detach().cpu()
            array = array.long() if array.dtype == torch.bool else array  # of which ArviZ takes quantiles
            if sample_dims:
                array = array.unflatten(0, (self.num_chains, -1))
                coords |= {dim: np.arange(size) for dim, size in zip(sample_dims, array.shape, strict=False)}
            dims = dims[: array.dim() - len(sample_dims)]  # a log-density has no event dimensions
            variables[name] = ([*sample_dims, *dims], array.numpy())
            coords |= {dim: self.coords[dim] for dim in dims if dim not in coords}
        self.datasets[group] = xr.Dataset(variables, coords, self.attrs)


def _as_mask(mask: Any) -> Tensor:
    return torch.as_tensor(True if mask is None else mask, device="cpu")


def _mask_of(fn: Any) -> Tensor:
    """Return the mask of a distribution's batch by ``mask`` on it or on one inside."""
    if isinstance(fn, MaskedDistribution):
        return _as_mask(fn._mask) & _mask_of(fn.base_dist)
    if isinstance(fn, Independent):
        inner = torch.broadcast_to(_mask_of(fn.base_dist), fn.base_dist.batch_shape)
        return inner.flatten(len(fn.batch_shape)).any(-1)
    base = getattr(fn, "base_dist", None)
    is_same = isinstance(base, Distribution) and base.event_shape == fn.event_shape
    return _mask_of(base) if is_same else torch.tensor(True)


def _read_sites(log_joint: LogJoint, dims: Dims) -> dict[str, _Site]:
    """Return the sites of a model; dimensions that neither the user nor a plate names are numbered, as by ArviZ."""
    structure = log_joint.structure
    nodes = structure.latent_nodes | structure.observed_nodes
    sites: dict[str, _Site] = {}
    for name, node in nodes.items():
        shape, event_ndim = structure.shapes[name], node["fn"].event_dim
        if name in structure.observed_nodes and is_deterministic(node):
            event_ndim = _event_ndim(node, shape)
        elif isinstance(node["fn"], Unit):
            event_ndim = 0
        elif name in structure.observed_nodes:
            shape = shape + node["fn"].event_shape
        sites[name] = _Site(shape, event_ndim, [f"{name}_dim_{i}" for i in range(len(shape))])
    if taken := ", ".join(repr(name) for name in _SAMPLE_DIMS if name in sites):
        raise ValueError(f"expected sites of other names than 'chain' and 'draw', which ArviZ takes; got {taken}")
    if unknown := ", ".join(repr(name) for name in dims if name not in sites):
        raise ValueError(f"expected dims of the model's sites, {list(sites)}; got those of {unknown}")
    sizes: dict[str, int] = {}
    for name, own in dims.items():
        site = sites[name]
        if isinstance(own, str) or len(own) != len(site.shape):
            raise ValueError(f"expected a name for each of {len(site.shape)} dimensions of {name!r}; got {own!r}")
        for dim, size in zip(own, site.shape, strict=True):
            if sizes.setdefault(dim, size) != size:
                raise ValueError(f"expected dimensions {dim!r} of one size; got {sizes[dim]} and {size}")
        site.dims = list(own)
    for name, node in nodes.items():
        site = sites[name]
        for frame in () if name in dims else node["cond_indep_stack"]:
            place = site.batch_ndim + frame.dim if frame.vectorized else -1
            is_free = frame.name not in (*_SAMPLE_DIMS, *sites)
            if place >= 0 and is_free and site.shape[place] == sizes.setdefault(frame.name, frame.size):
                site.dims[place] = frame.name
    return sites


def _event_ndim(node: Any, shape: Size) -> int:
    """Return the number of event dimensions of a deterministic site; unless told, Pyro takes all dimensions for one."""
    if node["fn"].event_dim < len(shape):
        return int(node["fn"].event_dim)
    frames = [frame for frame in node["cond_indep_stack"] if frame.vectorized]
    for event_ndim in range(len(shape) if frames else 0):
        places = [len(shape) - event_ndim + frame.dim for frame in frames]
        if all(place >= 0 and shape[place] == frame.size for place, frame in zip(places, frames, strict=True)):
            return event_ndim
    return len(shape)


def _read_coords(sites: Mapping[str, _Site], coords: Coords) -> dict[str, Any]:
    """Return labels along every dimension, which are numbers unless given."""
    sizes = {dim: size for site in sites.values() for dim, size in zip(site.dims, site.shape, strict=True)}
    for dim, labels in coords.items():
        if dim not in sizes:
            raise ValueError(f"expected coords of the dimensions {sorted(sizes)}; got those of {dim!r}")
        if len(labels) != sizes[dim]:
            raise ValueError(f"expected {sizes[dim]} coords of the dimension {dim!r}; got {len(labels)}")
    return {dim: np.asarray(coords.get(dim, np.arange(size))) for dim, size in sizes.items()}
