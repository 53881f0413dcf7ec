"""The flow of a guide: built, checked against the latents, and registered in Pyro's store of parameters."""

from collections.abc import Callable
from typing import Any

import pyro
from pyro.nn import PyroModule
from pyro.params.param_store import param_with_module_name
from torch import nn

from pyroflows.flow import Flow
from pyroflows.private import name_in_store

__all__ = ["Builder", "build_flow", "check_flow", "claim_parameters"]

Builder = Callable[..., Flow]


def build_flow(builder: Builder, features: int, **options: Any) -> Flow:
    """Return the flow that a builder makes for this many features."""
    flow = builder(features, **options)
    if not isinstance(flow, Flow):
        raise TypeError(f"expected a builder that returns a Flow; got one that returns {type(flow).__name__}")
    return flow


def check_flow(flow: Flow, features: int, context_features: int = 0) -> None:
    """Refuse a flow that does not fit the latents or the context, if the flow itself does not embed that."""
    takes = flow.context_features if flow.embedding is None else context_features
    if flow.event_shape != (features,) or takes != context_features:
        raise ValueError(
            f"expected a flow over {features} features with context_features={context_features}, for the latents and "
            f"their context; got {tuple(flow.event_shape)} and {takes}"
        )


def claim_parameters(guide: PyroModule, name: str, module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a guide's module by their names in Pyro's store, and make the names free for them.

    Those that another guide of the same name left in the store would be trained in their place.
    """
    store, prefix = pyro.get_param_store(), name_in_store(guide, name)
    stored = dict(store.named_parameters())
    parameters = {param_with_module_name(prefix, inner): parameter for inner, parameter in module.named_parameters()}
    for full_name, parameter in parameters.items():
        if stored.get(full_name, parameter) is not parameter:
            del store[full_name]
    return parameters
