"""Posteriors of Pyro models: guides, ELBOs, fits in one call, and diagnostics."""

from pyroflows.inference.amortized import AmortizedPosterior, fit_amortized
from pyroflows.inference.amortized_guide import AmortizedFlow
from pyroflows.inference.comparison import compare, prior_predictive
from pyroflows.inference.density import density_model
from pyroflows.inference.diagnosis import Weights
from pyroflows.inference.distributed_elbo import DistributedELBO
from pyroflows.inference.elbo import ImportanceWeightedELBO, PathELBO, TemperedELBO
from pyroflows.inference.fitting import fit_posterior
from pyroflows.inference.guide import AutoFlow
from pyroflows.inference.neutra import neutra
from pyroflows.inference.posterior import Posterior

__all__ = [
    "AmortizedFlow",
    "AmortizedPosterior",
    "AutoFlow",
    "DistributedELBO",
    "ImportanceWeightedELBO",
    "PathELBO",
    "Posterior",
    "TemperedELBO",
    "Weights",
    "compare",
    "density_model",
    "fit_amortized",
    "fit_posterior",
    "neutra",
    "prior_predictive",
]
