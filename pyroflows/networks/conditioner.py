"""The network that computes a coupling's parameters."""

from typing import Any

from torch import nn

from pyroflows.arguments import check_names

__all__ = ["make_conditioner"]


def make_conditioner(
    conditioner: nn.Module | None,
    default: type[nn.Module],
    inputs: int,
    outputs: int,
    context_features: int,
    options: dict[str, Any],
) -> nn.Module:
    """Return the conditioner, or else a network of the default class with these options."""
    if conditioner is None:
        fixed = ("in_features", "out_features", "in_channels", "out_channels", "context_features", "linear")
        check_names(options, default, exclude=fixed)
        return default(inputs, outputs, context_features=context_features, **options)
    if options:
        raise TypeError(f"`conditioner` cannot be combined with options of a network; got {', '.join(options)}")
    return conditioner
