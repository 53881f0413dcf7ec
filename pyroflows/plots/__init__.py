"""Plots of densities, samples, fits, posteriors and calibration; each draws on new or existing axes and returns them.

New figures have the width of one or two columns of a paper, and its type sizes; other figures keep theirs. The numbers
come from :mod:`pyroflows.diagnostics`.
"""

from pyroflows.plots.calibration import coverage_curves, latent_normality, pit_ecdf, rank_histograms
from pyroflows.plots.canvas import COLORS, PAPER
from pyroflows.plots.fits import khat, log_likelihoods, posterior_draws, training_curves
from pyroflows.plots.images import image_grid, interpolations, save_image_grid
from pyroflows.plots.plane import deformed_grid, density_2d, samples_2d
from pyroflows.plots.tables import marginals, pair_plot

__all__ = [
    "COLORS",
    "PAPER",
    "coverage_curves",
    "deformed_grid",
    "density_2d",
    "image_grid",
    "interpolations",
    "khat",
    "latent_normality",
    "log_likelihoods",
    "marginals",
    "pair_plot",
    "pit_ecdf",
    "posterior_draws",
    "rank_histograms",
    "samples_2d",
    "save_image_grid",
    "training_curves",
]
