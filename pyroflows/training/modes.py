"""How a flow runs while it trains: memory layout, precision, activation checkpointing, compiled methods."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.bijection import Bijection
from pyroflows.compose import Compose
from pyroflows.flow import Flow
from pyroflows.training.options import FitOptions

__all__ = ["METHODS", "CompiledFlow", "activation_checkpointing", "bf16_networks", "channels_last", "training_modes"]

METHODS = ("log_prob", "dequantized_log_prob", "rsample_and_log_prob", "rsample_and_score")
"""The methods of a flow that an objective calls, and that are compiled or sharded."""


class CompiledFlow:
    """What an objective gets in place of a flow: its methods compiled, all else the flow's own."""

    def __init__(self, flow: Flow):
        self.flow = flow
        for method in METHODS:
            # Batches for training and for evaluation each have one shape: a graph for each is faster than one for all.
            setattr(self, method, torch.compile(getattr(flow, method), dynamic=False))

    def __call__(self, *args: Any) -> Any:
        return self.flow(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.flow, name)


@contextmanager
def training_modes(flow: Flow, options: FitOptions) -> Iterator[None]:
    """Run a flow in the layout, the precision and the memory that the options ask for."""
    with ExitStack() as stack:
        if options.channels_last:
            stack.enter_context(channels_last(flow))
        if options.precision == "bf16-mixed":
            stack.enter_context(bf16_networks(flow))
        if options.activation_checkpointing:
            stack.enter_context(activation_checkpointing(flow))
        yield


@contextmanager
def activation_checkpointing(flow: Flow) -> Iterator[None]:
    """Keep only the inputs of layers: of the flow's own, or of the innermost stacks if it has stacks of stacks."""
    outermost = {id(part.bijection) for part in flow.modules() if isinstance(part, Flow)}
    stacks = [
        part
        for part in flow.modules()
        if isinstance(part, Compose)
        and (id(part) in outermost or any(isinstance(inner, Compose) and inner is not part for inner in part.modules()))
    ]
    before = [stack.recompute for stack in stacks]
    for stack in stacks:
        stack.recompute = True
    try:
        yield
    finally:
        for stack, value in zip(stacks, before, strict=True):
            stack.recompute = value


@contextmanager
def channels_last(flow: Flow) -> Iterator[None]:
    """Hold the weights of convolutions in ``torch.channels_last``."""
    flow.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        flow.to(memory_format=torch.contiguous_format)


@contextmanager
def bf16_networks(flow: Flow) -> Iterator[None]:
    """Run conditioners and embedding in bfloat16 in training mode, and leave maps and densities in full precision.

    Rounded, a map's point would have another log-determinant. The networks run under ``torch.autocast``, which hooks
    enter before each call and leave after it.
    """
    parents = [part for part in flow.modules() if isinstance(part, (Bijection, Flow))]
    networks = {id(network): network for parent in parents for network in _networks(parent)}
    hooks = [_Autocast(flow.device.type, flow.dtype) for _ in networks]
    handles = []
    for network, hook in zip(networks.values(), hooks, strict=True):
        handles.append(network.register_forward_pre_hook(hook.enter))
        handles.append(network.register_forward_hook(hook.leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for hook in hooks:
            hook.close()


class _Autocast:
    """Forward hooks of a network that runs in bfloat16 in training mode."""

    def __init__(self, device: str, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.entered: list[Any] = []

    def enter(self, network: nn.Module, inputs: Any) -> None:
        autocast = torch.autocast(self.device, torch.bfloat16, enabled=network.training)
        autocast.__enter__()
        self.entered.append(autocast)

    def leave(self, network: nn.Module, inputs: Any, output: Any) -> Any:
        if self.entered:  # it is not where another hook failed before ours
            self.entered.pop().__exit__(None, None, None)
        return output.to(self.dtype) if isinstance(output, Tensor) else output

    def close(self) -> None:
        """Leave what an interrupt, for which no hook is called, has left entered."""
        while self.entered:
            self.entered.pop().__exit__(None, None, None)


def _networks(parent: nn.Module) -> list[nn.Module]:
    """Return the networks of a bijection, its children that are none, or the embedding of a flow."""
    if isinstance(parent, Flow):
        return [] if parent.embedding is None else [parent.embedding]
    children = [c for child in parent.children() for c in (child if isinstance(child, nn.ModuleList) else [child])]
    return [child for child in children if not isinstance(child, Bijection)]
