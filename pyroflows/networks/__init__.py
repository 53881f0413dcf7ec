"""Networks that compute the parameters of layers."""

from pyroflows.networks.convnet import ConvNet, ResNet, ZeroConv
from pyroflows.networks.made import MADE, MaskedLinear
from pyroflows.networks.mlp import MLP
from pyroflows.networks.one_hot import OneHot

__all__ = ["MADE", "MLP", "ConvNet", "MaskedLinear", "OneHot", "ResNet", "ZeroConv"]
