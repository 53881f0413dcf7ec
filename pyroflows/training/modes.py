"""How a flow runs while it trains: its memory layout and precision, compiled, checkpointed, or sharded over ranks."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.bijection import Bijection
from pyroflows.compose import Compose
from pyroflows.flow import Flow
from pyroflows.training.options import FitOptions

__all__ = ["CompiledFlow", "activation_checkpointing", "bf16_networks", "channels_last", "enter_modes", "shard"]

# The methods of a flow that an objective calls, and those of a stack that its flow or an outer stack calls.
_METHODS = ("log_prob", "dequantized_log_prob", "rsample_and_log_prob", "rsample_and_score")
_DIRECTIONS = ("forward_and_log_det", "inverse_and_log_det", "forward_and_score", "inverse_and_score")


class CompiledFlow:
    """What an objective gets in place of a flow: its methods compiled, all else the flow's own."""

    def __init__(self, flow: Flow, options: FitOptions):
        self.flow = flow
        for name in _METHODS:
            method = getattr(flow, name) if options.precision is None else _with_hooks(getattr(flow, name))
            # Batches for training and for evaluation each have one shape: a graph for each is faster than one for all.
            setattr(self, name, torch.compile(method, dynamic=False))

    def __call__(self, *args: Any) -> Any:
        return self.flow(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.flow, name)


def _with_hooks(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method, so that its compiled graphs are not those of a flow without hooks, which the compiler ignores."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return call


def enter_modes(stack: ExitStack, flow: Flow, options: FitOptions) -> None:
    """Run a flow as the options ask for, until the stack of contexts closes."""
    if options.channels_last:
        stack.enter_context(channels_last(flow))
    if options.precision == "bf16-mixed":
        stack.enter_context(bf16_networks(flow))
    if options.activation_checkpointing:
        stack.enter_context(activation_checkpointing(flow))


def _has_stacks(stack: nn.Module) -> bool:
    return any(isinstance(part, Compose) and part is not stack for part in stack.modules())


@contextmanager
def activation_checkpointing(flow: Flow) -> Iterator[None]:
    """Keep only the inputs of layers: of the flow's own, or of the innermost stacks if it has stacks of stacks."""
    outermost = [part.bijection for part in flow.modules() if isinstance(part, Flow)]
    stacks = [part for part in flow.modules() if isinstance(part, Compose) and not part.activation_checkpointing]
    stacks = [stack for stack in stacks if _has_stacks(stack) or any(stack is part for part in outermost)]
    for stack in stacks:
        stack.activation_checkpointing = True
    try:
        yield
    finally:
        for stack in stacks:
            stack.activation_checkpointing = False


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
    """Run conditioners and embedding in bfloat16 in training mode, and leave maps and densities in full precision."""
    device = flow.device.type  # rounded, a map's point would have another log-determinant
    before, hooks, handles = _autocast_state(device), _Autocast(device, flow.dtype), []
    for network in {network: None for part in flow.modules() for network in _networks(part)}:
        handles += [network.register_forward_pre_hook(hooks.enter), network.register_forward_hook(hooks.leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        _set_autocast(device, *before)  # after an error or interrupt within a network, for which no hook is called


class _Autocast:
    """Hooks, which can be pickled and copied, that switch autocast on for each call of a network in training mode."""

    # They set what `torch.autocast` sets: the compiler does not trace a context that one enters and another exits.

    def __init__(self, device: str, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.outer: list[tuple[bool, torch.dtype]] = []  # the states outside each network, as one may hold others

    def enter(self, network: nn.Module, inputs: Any) -> None:
        self.outer.append(_autocast_state(self.device))
        _set_autocast(self.device, network.training, torch.bfloat16)

    def leave(self, network: nn.Module, inputs: Any, output: Any) -> Any:
        _set_autocast(self.device, *self.outer.pop())
        return output.to(self.dtype) if isinstance(output, Tensor) else output


def _autocast_state(device: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _set_autocast(device: str, enabled: bool, dtype: torch.dtype) -> None:
    torch.set_autocast_enabled(device, enabled)
    torch.set_autocast_dtype(device, dtype)
    if not enabled:
        torch.clear_autocast_cache()  # of weights in bfloat16, which the next step changes


def _networks(parent: nn.Module) -> list[nn.Module]:
    """Return the networks of a bijection, its children that are none, or the embedding of a flow."""
    if isinstance(parent, Flow):
        return [] if parent.embedding is None else [parent.embedding]
    if not isinstance(parent, Bijection):
        return []
    children = [c for child in parent.children() for c in (child if isinstance(child, nn.ModuleList) else [child])]
    return [child for child in children if not isinstance(child, Bijection)]


def shard(flow: Flow) -> Any:
    """Shard a flow by FSDP2: the innermost stacks, each gathered while it runs forward or backward, and the rest."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for part in list(flow.modules()):
        if isinstance(part, Compose) and part is not flow.bijection and not _has_stacks(part):
            fully_shard(part)
            for direction in _DIRECTIONS:
                register_fsdp_forward_method(part, direction)
                register_fsdp_forward_method(part, f"unchecked_{direction}")  # what an outer stack calls
    fully_shard(flow)
    for method in _METHODS:
        register_fsdp_forward_method(flow, method)
    return flow
