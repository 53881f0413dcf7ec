"""Normalizing flows for Pyro: density models, sites of a model, and variational guides from the same layers."""

from pyroflows.bijection import Bijection, Compose, Conditioned, Inverse
from pyroflows.conditioners import MADE, MLP
from pyroflows.diagnostics import CheckReport, check
from pyroflows.flow import Flow
from pyroflows.layers import (
    ActNorm,
    Additive,
    Affine,
    BatchNorm,
    Coupling,
    DenseLinear,
    ElementwiseAffine,
    Logit,
    LULinear,
    MaskedAutoregressive,
    Permutation,
    Planar,
    Radial,
    Sigmoid,
    Spline,
    Standardize,
)
from pyroflows.models import glow, iaf, maf, nice, nsf, planar, radial, realnvp
from pyroflows.priors import DiagonalNormal, GaussianMixture, LogitNormal, Prior, StandardNormal, StudentT, Uniform
from pyroflows.training import FitResult, fit

__version__ = "0.1.0"

__all__ = [
    # bijection
    *("Bijection", "Compose", "Conditioned", "Inverse"),
    # conditioners
    *("MADE", "MLP"),
    # priors
    *("DiagonalNormal", "GaussianMixture", "LogitNormal", "Prior", "StandardNormal", "StudentT", "Uniform"),
    # layers
    *("ActNorm", "Additive", "Affine", "BatchNorm", "Coupling", "DenseLinear", "ElementwiseAffine", "LULinear"),
    *("Logit", "MaskedAutoregressive", "Permutation", "Planar", "Radial", "Sigmoid", "Spline", "Standardize"),
    # flow, models
    *("Flow", "glow", "iaf", "maf", "nice", "nsf", "planar", "radial", "realnvp"),
    # training, diagnostics
    *("CheckReport", "FitResult", "check", "fit"),
]
