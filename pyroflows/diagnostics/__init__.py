"""Diagnostics: arrays in, small results out, which :mod:`pyroflows.plots` draws."""

from pyroflows.diagnostics.bits import BitsPerDim, bits_per_dim
from pyroflows.diagnostics.calibration import (
    Calibration,
    calibration,
    coverage,
    expected_band,
    pit,
    rank_counts,
    sbc_p_values,
    sbc_ranks,
)
from pyroflows.diagnostics.chains import bridge_evidence, ensemble_ess, nested_rhat
from pyroflows.diagnostics.checks import CheckReport, NormalQuantiles, check, normal_quantiles
from pyroflows.diagnostics.samples import MomentTable, kde, moment_table, sliced_wasserstein
from pyroflows.diagnostics.weights import importance_ess, khat_by_size, khat_threshold, psis

__all__ = [
    "BitsPerDim",
    "Calibration",
    "CheckReport",
    "MomentTable",
    "NormalQuantiles",
    "bits_per_dim",
    "bridge_evidence",
    "calibration",
    "check",
    "coverage",
    "ensemble_ess",
    "expected_band",
    "importance_ess",
    "kde",
    "khat_by_size",
    "khat_threshold",
    "moment_table",
    "nested_rhat",
    "normal_quantiles",
    "pit",
    "psis",
    "rank_counts",
    "sbc_p_values",
    "sbc_ranks",
    "sliced_wasserstein",
]
