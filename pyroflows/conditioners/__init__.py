"""Networks that compute a layer's parameters."""

from pyroflows.conditioners.classes import OneHot
from pyroflows.conditioners.convnet import ConvNet, ResNet, ZeroConv
from pyroflows.conditioners.made import MADE, MaskedLinear
from pyroflows.conditioners.mlp import MLP

__all__ = ["MADE", "MLP", "ConvNet", "MaskedLinear", "OneHot", "ResNet", "ZeroConv"]
