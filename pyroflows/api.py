"""The public names of the package, which ``pyroflows`` imports from here on first use."""

from pyroflows._version import __version__
from pyroflows.bijection import Bijection, Conditioned, Inverse
from pyroflows.compose import Compose
from pyroflows.dequantizers import ColumnDequantizer, Dequantizer, UniformDequantizer, VariationalDequantizer
from pyroflows.diagnostics import (
    BitsPerDim,
    CheckReport,
    bits_per_dim,
    check,
    importance_ess,
    moment_table,
    psis,
    sliced_wasserstein,
)
from pyroflows.flow import Flow, load
from pyroflows.images import interpolate, reconstruct, sample_images
from pyroflows.inference import (
    AmortizedFlow,
    AmortizedPosterior,
    AutoFlow,
    DistributedELBO,
    ImportanceWeightedELBO,
    PathELBO,
    Posterior,
    TemperedELBO,
    fit_amortized,
    fit_posterior,
    neutra,
)
from pyroflows.layers import (
    ActNorm,
    Additive,
    Affine,
    BatchNorm,
    ConvCoupling,
    Coupling,
    DenseLinear,
    ElementwiseAffine,
    InvertibleConv,
    Logit,
    LULinear,
    MaskedAutoregressive,
    Multiscale,
    Permutation,
    Planar,
    Radial,
    Sigmoid,
    Spline,
    Squeeze,
    Standardize,
    TriangularAffine,
)
from pyroflows.models import glow, iaf, maf, nice, nsf, planar, radial, realnvp
from pyroflows.networks import MADE, MLP, ConvNet, OneHot, ResNet, ZeroConv
from pyroflows.priors import DiagonalNormal, GaussianMixture, LogitNormal, Prior, StandardNormal, StudentT, Uniform
from pyroflows.training import FitOptions, FitResult, fit

__all__ = [  # noqa: RUF022 - grouped by subject
    "__version__",
    # bijections
    "Bijection",
    "Compose",
    "Conditioned",
    "Inverse",
    # conditioners and priors
    "MADE",
    "MLP",
    "ConvNet",
    "OneHot",
    "ResNet",
    "ZeroConv",
    "DiagonalNormal",
    "GaussianMixture",
    "LogitNormal",
    "Prior",
    "StandardNormal",
    "StudentT",
    "Uniform",
    # layers
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
    "TriangularAffine",
    # flows
    "Flow",
    "glow",
    "iaf",
    "maf",
    "nice",
    "nsf",
    "planar",
    "radial",
    "realnvp",
    "load",
    # posteriors
    "AmortizedFlow",
    "AmortizedPosterior",
    "AutoFlow",
    "ImportanceWeightedELBO",
    "DistributedELBO",
    "PathELBO",
    "Posterior",
    "TemperedELBO",
    "fit_amortized",
    "fit_posterior",
    "importance_ess",
    "moment_table",
    "neutra",
    "psis",
    "sliced_wasserstein",
    # dequantizers
    "ColumnDequantizer",
    "Dequantizer",
    "UniformDequantizer",
    "VariationalDequantizer",
    # images
    "interpolate",
    "reconstruct",
    "sample_images",
    # training and diagnostics
    "BitsPerDim",
    "CheckReport",
    "FitOptions",
    "FitResult",
    "bits_per_dim",
    "check",
    "fit",
]
