"""The bijections, one family per file."""

from pyroflows.layers.actnorm import ActNorm
from pyroflows.layers.autoregressive import MaskedAutoregressive
from pyroflows.layers.batchnorm import BatchNorm
from pyroflows.layers.conv_coupling import ConvCoupling
from pyroflows.layers.coupling import Coupling
from pyroflows.layers.linear import DenseLinear, InvertibleConv, LULinear
from pyroflows.layers.multiscale import Multiscale
from pyroflows.layers.permutation import Permutation
from pyroflows.layers.planar import Planar
from pyroflows.layers.pointwise import ElementwiseAffine, Logit, Sigmoid, Standardize
from pyroflows.layers.radial import Radial
from pyroflows.layers.spline import Spline
from pyroflows.layers.squeeze import Squeeze
from pyroflows.layers.transformers import Additive, Affine, Transformer
from pyroflows.layers.triangular import TriangularAffine

__all__ = [
    "ActNorm",
    "Additive",
    "Affine",
    "BatchNorm",
    "ConvCoupling",
    "Coupling",
    "DenseLinear",
    "ElementwiseAffine",
    "InvertibleConv",
    "LULinear",
    "Logit",
    "MaskedAutoregressive",
    "Multiscale",
    "Permutation",
    "Planar",
    "Radial",
    "Sigmoid",
    "Spline",
    "Squeeze",
    "Standardize",
    "Transformer",
    "TriangularAffine",
]
