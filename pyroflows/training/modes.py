"""Ways in which modules run, and random numbers are drawn, each for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.bijection import Bijection
from pyroflows.compose import Compose
from pyroflows.flow import Flow

__all__ = ["METHODS", "compiled", "laid_out", "mixed", "recomputing"]

METHODS = ("log_prob", "dequantized_log_prob", "rsample_and_log_prob", "rsample_and_score")
"""The methods of a flow that an objective may call."""


@contextmanager
def compiled(flow: Flow) -> Iterator[None]:
    """Put compiled methods in front of the flow's own for the length of a block."""
    for method in METHODS:
        # Train and evaluation batches each have one shape: a graph for each is faster than one for all.
        object.__setattr__(flow, method, torch.compile(getattr(flow, method), dynamic=False))
    try:
        yield
    finally:
        for method in METHODS:
            object.__delattr__(flow, method)


@contextmanager
def recomputing(flow: Flow) -> Iterator[None]:
    """Keep the inputs of layers alone: of the flow's own, or of the innermost stacks where it has stacks of stacks."""
    whole = {id(part.bijection) for part in flow.modules() if isinstance(part, Flow)}
    stacks = [
        part
        for part in flow.modules()
        if isinstance(part, Compose)
        and (id(part) in whole or any(isinstance(inner, Compose) and inner is not part for inner in part.modules()))
    ]
    before = [stack.activation_checkpointing for stack in stacks]
    for stack in stacks:
        stack.activation_checkpointing = True
    try:
        yield
    finally:
        for stack, value in zip(stacks, before, strict=True):
            stack.activation_checkpointing = value


@contextmanager
def laid_out(flow: Flow) -> Iterator[None]:
    """Have the weights of convolutions in ``torch.channels_last`` for the length of a block."""
    flow.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        flow.to(memory_format=torch.contiguous_format)


@contextmanager
def mixed(flow: Flow) -> Iterator[None]:
    """Train networks in bfloat16; the maps, in which a rounded point would have another log-determinant, in full."""
    parents = [part for part in flow.modules() if isinstance(part, (Bijection, Flow))]
    networks = [child for parent in parents for child in _networks(parent)]
    for network in {id(network): network for network in networks}.values():
        # Of arguments that are copied with the network: a copy made meanwhile must not run the original's weights.
        network.forward = partial(_in_bfloat16, network, flow.device.type, flow.dtype)
    try:
        yield
    finally:
        for network in networks:
            vars(network).pop("forward", None)


def _networks(parent: nn.Module) -> list[nn.Module]:
    """Give the networks of a bijection (its children that are none), or the embedding of a flow."""
    if isinstance(parent, Flow):
        return [] if parent.embedding is None else [parent.embedding]
    children = [c for child in parent.children() for c in (child if isinstance(child, nn.ModuleList) else [child])]
    return [child for child in children if not isinstance(child, Bijection)]


def _in_bfloat16(network: nn.Module, device: str, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
    with torch.autocast(device, torch.bfloat16, enabled=network.training):
        found = type(network).forward(network, *args, **kwargs)
    return found.to(dtype) if isinstance(found, Tensor) else found
