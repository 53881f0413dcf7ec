"""Networks that compute a layer's parameters."""

from pyroflows.conditioners.made import MADE, MaskedLinear
from pyroflows.conditioners.mlp import MLP

__all__ = ["MADE", "MLP", "MaskedLinear"]
