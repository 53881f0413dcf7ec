"""Normalizing flows for Pyro: density models, sites of a model, and variational guides from the same layers."""

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from pyroflows.tables.estimator import FlowClassifier as FlowClassifier
    from pyroflows.tables.estimator import FlowDensity as FlowDensity

__all__ = [  # noqa: RUF022
    # bijection
    "Bijection",
    "Compose",
    "Conditioned",
    "Inverse",
    # conditioners, priors
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
    # flow, named flows
    "Flow",
    "glow",
    "iaf",
    "maf",
    "nice",
    "nsf",
    "planar",
    "radial",
    "realnvp",
    # files
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
    # training, diagnostics
    "BitsPerDim",
    "CheckReport",
    "FitOptions",
    "FitResult",
    "__version__",
    "bits_per_dim",
    "check",
    "fit",
]


def __getattr__(name: str) -> Any:
    """Import scikit-learn, which takes a second, only where its estimators are asked for by name, not by a star."""
    if name in ("FlowClassifier", "FlowDensity"):
        from pyroflows.tables import estimator

        return getattr(estimator, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
