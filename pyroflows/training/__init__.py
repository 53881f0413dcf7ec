"""Training: one loop, for maximum likelihood and for any other objective of a flow."""

from pyroflows.training.fitting import FitResult, Objective, fit, negative_log_likelihood

__all__ = ["FitResult", "Objective", "fit", "negative_log_likelihood"]
