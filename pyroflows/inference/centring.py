"""Coordinates of hierarchical sites between centred and non-centred ones, from the priors that a model gives them."""

from typing import Any

import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import AffineTransform, ComposeTransform, IndependentTransform, Transform

__all__ = ["depends_on_others", "has_matrix", "transform_of"]

_ON_THE_LINE = (td.Normal, td.LogNormal, td.StudentT, td.Cauchy, td.Laplace, td.Gumbel)
_RATES = (td.Exponential, td.Gamma)  # whose scale is the inverse of their rate
_SCALES = (td.HalfNormal, td.HalfCauchy, td.Weibull)


def _innermost(fn: Any) -> Any:
    while isinstance(fn, td.Independent):
        fn = fn.base_dist
    return fn


def _location_and_scale(fn: Any) -> tuple[Tensor, Tensor] | None:
    """Return the location and the scale of a prior in unconstrained space; None if it has none."""
    fn = _innermost(fn)
    if isinstance(fn, _ON_THE_LINE):
        return fn.loc, fn.scale
    if isinstance(fn, td.MultivariateNormal):
        return fn.loc, fn.scale_tril
    if isinstance(fn, _SCALES):
        return fn.scale.log(), torch.ones_like(fn.scale)
    if isinstance(fn, td.InverseGamma):
        return fn.rate.log(), torch.ones_like(fn.rate)
    if isinstance(fn, _RATES):
        return -fn.rate.log(), torch.ones_like(fn.rate)
    return None


def has_matrix(fn: Any) -> bool:
    """Whether a prior has a scale matrix, with which coordinates are centred or non-centred, and not between."""
    return isinstance(_innermost(fn), td.MultivariateNormal)


class _Triangular(Transform):
    """Maps x to loc + scale_tril x, for batches of each."""

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, loc: Tensor, scale_tril: Tensor):
        super().__init__(cache_size=0)
        self.loc, self.scale_tril = loc, scale_tril

    def _call(self, x: Tensor) -> Tensor:
        return self.loc + (self.scale_tril @ x[..., None])[..., 0]

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.scale_tril, (y - self.loc)[..., None], upper=False)[..., 0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1).expand(x.shape[:-1])


def depends_on_others(first: Any, second: Any) -> bool:
    """Whether priors of one site in two runs of a model differ in location or scale, as in a hierarchical model."""
    if type(first) is not type(second) or (of_first := _location_and_scale(first)) is None:
        return False
    of_second: Any = _location_and_scale(second)
    return not all(torch.equal(a, b) for a, b in zip(of_first, of_second, strict=True))


def transform_of(fn: Any, centring: Tensor | None = None) -> Transform:
    r"""Return the transform from unconstrained coordinates of a site to its values.

    .. math:: x = (1 - c) \mu + \sigma^{1 - c} u

    comes before the support's own. Centred coordinates, c = 1, are those of the support alone; non-centred ones, c = 0,
    have the same prior whatever the parameters that the model gives it.

    Args:
        fn: the prior, with location and scale; a full scale matrix takes c = 0 alone.
        centring: c of each entry, between 0 and 1, of the unconstrained shape; None for centred coordinates.

    References:
        Automatic Reparameterisation of Probabilistic Programs, Gorinova, Moore and Hoffman, 2020 (arXiv:1906.03028);
        A General Framework for the Parametrization of Hierarchical Models, Papaspiliopoulos et al., 2007.
    """
    onto_support = biject_to(fn.support)
    if centring is None:
        return onto_support
    parameters = _location_and_scale(fn)
    if parameters is None:
        raise ValueError(f"expected a prior with location and scale for centring; got {type(fn).__name__}")
    loc, scale = parameters
    event_dim = onto_support.domain.event_dim
    if has_matrix(fn):
        affine: Transform = _Triangular(loc, scale)
        affine = IndependentTransform(affine, event_dim - 1) if event_dim > 1 else affine
    else:
        affine = AffineTransform((1 - centring) * loc, scale ** (1 - centring), event_dim=event_dim)
    return ComposeTransform([affine, onto_support])
