"""Posteriors of Pyro models: guides, ELBOs, fits in one call, and diagnostics."""

from pyroflows.diagnostics.calibration import Calibration, calibration, coverage, sbc_p_values, sbc_ranks
from pyroflows.diagnostics.samples import MomentTable, moment_table, sliced_wasserstein
from pyroflows.diagnostics.weights import importance_ess, psis
from pyroflows.inference.amortized import AmortizedPosterior, fit_amortized
from pyroflows.inference.amortized_guide import AmortizedFlow
from pyroflows.inference.distributed_elbo import DistributedELBO
from pyroflows.inference.elbo import ImportanceWeightedELBO, PathELBO, TemperedELBO
from pyroflows.inference.fitting import fit_posterior
from pyroflows.inference.guide import AutoFlow
from pyroflows.inference.importance import Weights
from pyroflows.inference.neutra import neutra
from pyroflows.inference.posterior import Posterior

__all__ = [
    "AmortizedFlow",
    "AmortizedPosterior",
    "AutoFlow",
    "Calibration",
    "DistributedELBO",
    "ImportanceWeightedELBO",
    "MomentTable",
    "PathELBO",
    "Posterior",
    "TemperedELBO",
    "Weights",
    "calibration",
    "coverage",
    "fit_amortized",
    "fit_posterior",
    "importance_ess",
    "moment_table",
    "neutra",
    "psis",
    "sbc_p_values",
    "sbc_ranks",
    "sliced_wasserstein",
]
