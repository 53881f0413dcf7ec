"""Every bijection, one family a file."""

from pyroflows.layers.actnorm import ActNorm
from pyroflows.layers.autoregressive import MaskedAutoregressive
from pyroflows.layers.batchnorm import BatchNorm
from pyroflows.layers.coupling import Coupling
from pyroflows.layers.linear import DenseLinear, LULinear
from pyroflows.layers.permutation import Permutation
from pyroflows.layers.planar import Planar
from pyroflows.layers.pointwise import ElementwiseAffine, Logit, Sigmoid, Standardize
from pyroflows.layers.radial import Radial
from pyroflows.layers.spline import Spline
from pyroflows.layers.transformers import Additive, Affine, Transformer
from pyroflows.layers.triangular import TriangularAffine

__all__ = [
    "ActNorm",
    "Additive",
    "Affine",
    "BatchNorm",
    "Coupling",
    "DenseLinear",
    "ElementwiseAffine",
    "LULinear",
    "Logit",
    "MaskedAutoregressive",
    "Permutation",
    "Planar",
    "Radial",
    "Sigmoid",
    "Spline",
    "Standardize",
    "Transformer",
    "TriangularAffine",
]
