"""Training: one loop, for maximum likelihood and for any other objective of a flow."""

from pyroflows.training.fitting import Objective, fit, negative_log_likelihood
from pyroflows.training.options import FitOptions, FitResult

__all__ = ["FitOptions", "FitResult", "Objective", "fit", "negative_log_likelihood"]
