"""The public names of the package, which ``pyroflows`` imports from here on first use."""

# ruff: noqa: F403, F405 - the list below says which names of each room are public

from pyroflows._version import __version__
from pyroflows.bijection import *
from pyroflows.compose import *
from pyroflows.dequantizers import *
from pyroflows.diagnostics import *
from pyroflows.flow import *
from pyroflows.images import *
from pyroflows.inference import *
from pyroflows.layers import *
from pyroflows.models import *
from pyroflows.networks import *
from pyroflows.priors import *
from pyroflows.training import *

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
    "compare",
    "density_model",
    "fit_amortized",
    "fit_posterior",
    "importance_ess",
    "moment_table",
    "nested_rhat",
    "ensemble_ess",
    "bridge_evidence",
    "neutra",
    "prior_predictive",
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
