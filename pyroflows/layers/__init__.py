"""The bijections, one family per file."""

from pyroflows.layers.autoregressive import MaskedAutoregressive
from pyroflows.layers.conv_coupling import ConvCoupling
from pyroflows.layers.coupling import Coupling
from pyroflows.layers.linear import DenseLinear, InvertibleConv, LULinear, TriangularAffine
from pyroflows.layers.marginal import Gaussianize, Sinh
from pyroflows.layers.multiscale import Multiscale
from pyroflows.layers.norms import ActNorm, BatchNorm
from pyroflows.layers.planar_radial import Planar, Radial
from pyroflows.layers.pointwise import ElementwiseAffine, Logit, Sigmoid, Standardize
from pyroflows.layers.rearrange import Permutation, Squeeze
from pyroflows.layers.spline import Spline
from pyroflows.layers.transformers import Additive, Affine, Transformer

__all__ = [
    "ActNorm",
    "Additive",
    "Affine",
    "BatchNorm",
    "ConvCoupling",
    "Coupling",
    "DenseLinear",
    "ElementwiseAffine",
    "Gaussianize",
    "InvertibleConv",
    "LULinear",
    "Logit",
    "MaskedAutoregressive",
    "Multiscale",
    "Permutation",
    "Planar",
    "Radial",
    "Sigmoid",
    "Sinh",
    "Spline",
    "Squeeze",
    "Standardize",
    "Transformer",
    "TriangularAffine",
]
