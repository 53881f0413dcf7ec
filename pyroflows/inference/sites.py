"""Latent sites of a Pyro model, and their slices of one unconstrained vector."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pyro.distributions as dist
import torch
from pyro.infer.autoguide.initialization import init_to_median
from torch import Size, Tensor
from torch.distributions import Distribution, biject_to

__all__ = [
    "LatentSite",
    "check_values",
    "constrain",
    "have_one_image",
    "initial_value",
    "is_deterministic",
    "nested",
    "unconstrain",
    "unconstrained_value",
]


@dataclass(frozen=True)
class LatentSite:
    """One latent site of a model: its shapes, and its slice of the unconstrained vector.

    Args:
        name: of the site.
        shape: of one value, including the plates that the vector covers.
        unconstrained_shape: of one value in unconstrained space.
        start: index of the first entry of its slice.
        support: of one value; None if it depends on other sites, so that only a run of the model can tell it.
        plate_ndim: number of plate dimensions in ``shape``.
    """

    name: str
    shape: Size
    unconstrained_shape: Size
    start: int
    support: Any
    plate_ndim: int = 0

    @property
    def stop(self) -> int:
        """The index after the last entry of its slice."""
        return self.start + self.unconstrained_shape.numel()

    def slice_of(self, vector: Tensor) -> Tensor:
        """Return the site's slice of a vector ``(*batch, dim)``, as ``(*batch, *unconstrained_shape)``."""
        return vector[..., self.start : self.stop].reshape(vector.shape[:-1] + self.unconstrained_shape)

    def constrain(self, vector: Tensor) -> Tensor:
        """Return the site's value, ``(*batch, *shape)``, at a vector."""
        return cast(Tensor, biject_to(self.support)(self.slice_of(vector)))

    def unconstrain(self, value: Tensor) -> Tensor:
        """Return the entries of the vector, ``(*batch, entries)``, for a value."""
        batch = value.shape[: value.dim() - len(self.shape)]
        return cast(Tensor, biject_to(self.support).inv(value).reshape(*batch, self.unconstrained_shape.numel()))

    def log_det(self, entries: Tensor, value: Tensor) -> Tensor:
        """Return ``log|det d value / d entries|`` of each batch element, for a slice's entries and their value."""
        batch = value.shape[: value.dim() - len(self.shape)]
        unconstrained = entries.reshape(batch + self.unconstrained_shape)
        log_det: Tensor = biject_to(self.support).log_abs_det_jacobian(unconstrained, value)
        return log_det.flatten(len(batch)).sum(-1) if log_det.dim() > len(batch) else log_det


def constrain(sites: Sequence[LatentSite], vector: Tensor) -> dict[str, Tensor]:
    """Return the value of each site, ``(*batch, *shape)``, at a vector ``(*batch, dim)``."""
    return {site.name: site.constrain(vector) for site in sites}


def unconstrain(
    sites: Sequence[LatentSite], values: Mapping[str, Tensor], *, min_batch_ndim: int = 0
) -> tuple[Tensor, Tensor]:
    """Return the vector of the sites' values, and the log-Jacobian of :func:`constrain`; broadcast their batches."""
    values = check_values(sites, values, min_batch_ndim=min_batch_ndim)
    parts = [site.unconstrain(values[site.name]) for site in sites]
    log_dets = [site.log_det(part, values[site.name]) for site, part in zip(sites, parts, strict=True)]
    batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*batch, -1) for part in parts], -1), cast(Tensor, sum(log_dets))


def check_values(
    sites: Sequence[LatentSite], values: Mapping[str, Tensor], *, min_batch_ndim: int = 0, points: bool = False
) -> dict[str, Tensor]:
    """Return the sites' values; refuse those not of shape ``(*batch, *shape)``, or ``(points, *shape)`` on request."""
    for site in sites:
        value = values.get(site.name)
        ndim = value.dim() - len(site.shape) if isinstance(value, Tensor) else -1
        fits = ndim == 1 if points else ndim >= min_batch_ndim
        if not isinstance(value, Tensor) or not fits or value.shape[ndim:] != site.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else "none" if value is None else type(value).__name__
            shape = "".join(f", {size}" for size in site.shape) or ","
            raise ValueError(
                f"expected values of {site.name!r} of shape ({'points' if points else '*batch'}{shape}); got {got}"
            )
    values = {site.name: values[site.name] for site in sites}
    if points and len(sizes := {len(value) for value in values.values()}) > 1:
        raise ValueError(f"expected the same number of values of each site; got {sorted(sizes)}")
    return values


def unconstrained_value(name: str, support: Any, value: Tensor) -> Tensor:
    """Return a site's value in unconstrained space; refuse a discrete site, or a support without a bijection."""
    if support.is_discrete:
        raise ValueError(f"expected continuous latents; got the discrete site {name!r}")
    try:
        return cast(Tensor, biject_to(support).inv(value))
    except NotImplementedError:
        raise ValueError(
            f"expected latents whose support has a bijection from the reals; got site {name!r} with support {support}"
        ) from None


def have_one_image(supports: Sequence[Any], point: Tensor) -> bool:
    """Whether the bijections of supports map a point of unconstrained space to one value, as those of one site must."""
    images = [biject_to(support)(point) for support in supports]
    return all(torch.equal(image, images[0]) for image in images)


# Sites of a trace


def nested(fn: Any) -> Iterator[Any]:
    """Yield a distribution and those inside it: what it expands, masks, reinterprets or transforms."""
    yield fn
    while isinstance(fn := getattr(fn, "base_dist", None), Distribution):
        yield fn


def is_deterministic(site: Any) -> bool:
    """Whether a site is a function of others: by ``pyro.deterministic``, or what is left of a reparametrised one."""
    return "_deterministic" in site["infer"] or (
        site["is_observed"] and any(isinstance(fn, dist.Delta) for fn in nested(site["fn"]))
    )


def initial_value(site: Any, like: Tensor | None = None) -> Tensor:
    """Return an initial value of a latent site: its prior median, or a feasible point of an improper prior.

    An improper prior has no numbers of its own: its value gets dtype and device of ``like``.
    """
    fn = site["fn"]
    if not any(isinstance(inner, dist.ImproperUniform) for inner in nested(fn)):
        return cast(Tensor, init_to_median(site))
    like = torch.empty(()) if like is None else like
    transform = biject_to(fn.support)
    return cast(Tensor, transform(like.new_zeros(transform.inverse_shape(fn.batch_shape + fn.event_shape))))
