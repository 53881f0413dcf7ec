"""Files of posteriors: a guide's flow, the draws that were weighed, and how to verify the model on load."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pyro.infer.enum import config_enumerate
from torch import Tensor

from pyroflows.files import read, write
from pyroflows.flow import Flow
from pyroflows.inference.guide import AutoFlow
from pyroflows.inference.log_joint import LogJoint
from pyroflows.recipe import describe, is_plain, restore

__all__ = ["read_guide", "write_guide"]


def write_guide(
    path: str | Path, guide: AutoFlow, log_joint: LogJoint, draws: Mapping[str, Tensor], **header: Any
) -> None:
    """Write a guide's flow, and draws by name with their density, which verifies model and data on load."""
    flow = guide.require_flow()
    try:
        recipe, tensors = describe(flow, own=False)
    except ValueError:  # a part of a class of the user's own, so that the builder has to be passed again
        recipe, tensors = None, {f"state.{name}": value for name, value in flow.state_dict().items()}
    header |= {
        "recipe": recipe,
        "options": {name: value for name, value in guide.options.items() if is_plain(value)},
        "max_triangular": guide.max_triangular,
        "latents": _shapes(guide),
    }
    write(path, "posterior", header, {**tensors, **draws, "log_joint": log_joint.value(_few_of(draws))})


def read_guide(
    path: str | Path,
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    flow: Callable[..., Flow] | Flow | None,
) -> tuple[AutoFlow, dict[str, Tensor], dict[str, Any]]:
    """Return the guide of a model, the draws and the header that :func:`write_guide` wrote."""
    header, tensors = read(path, "posterior")
    if missing := {"recipe", "options", "max_triangular", "latents", "notes", "seconds"} - header.keys():
        raise ValueError(f"expected a posterior written by save; got {path}, whose header lacks {min(missing)}")
    options = {}
    if flow is None:
        flow = _inner_flow(header["recipe"], tensors)
    elif not isinstance(flow, Flow):
        options = header["options"]
    max_triangular = header["max_triangular"]
    guide = AutoFlow(
        config_enumerate(model), flow, "none", max_triangular=max_triangular, args=args, kwargs=kwargs, **options
    )
    if _shapes(guide) != header["latents"]:
        raise ValueError(f"expected a model with the latents {header['latents']}; got {_shapes(guide)}")
    state = {name.removeprefix("state."): value for name, value in tensors.items() if name.startswith("state.")}
    whole: Flow = guide.require_flow()
    try:
        whole.load_state_dict(state)
    except RuntimeError:
        raise ValueError(f"expected the flow that the posterior in {path} was fitted with; got another") from None
    draws = {name: value.to(whole.device) for name, value in tensors.items() if not name.startswith("state.")}
    log_joint: Any = guide.log_joint
    if not torch.allclose(log_joint.value(_few_of(draws)), draws["log_joint"], 1e-4, 1e-3):
        raise ValueError(
            f"expected the model and the data that the posterior in {path} was fitted to; got others, whose density at "
            f"its draws differs"
        )
    return guide, draws, header


def _shapes(guide: AutoFlow) -> list[list[Any]]:
    return [[site.name, list(site.shape)] for site in guide.latents]


def _few_of(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return a few draws of a saved posterior, at which the model's density is compared."""
    draws = tensors["chains"].flatten(0, 1) if "chains" in tensors else tensors["u"]
    return draws[:: max(1, len(draws) // 10)]


def _inner_flow(recipe: Any, tensors: Mapping[str, Tensor]) -> Flow:
    """Return the flow in a file without the layer that a guide adds."""
    if recipe is None:
        raise ValueError(
            "expected flow=, since the posterior was fitted with a flow or a builder of the user's own; got none"
        )
    flow = restore(recipe, tensors)
    if not isinstance(flow, Flow) or len(flow.layers) < 2:
        raise ValueError(f"expected the recipe of a guide's flow; got that of {type(flow).__name__}")
    return Flow(flow.prior, flow.layers[:-1])
