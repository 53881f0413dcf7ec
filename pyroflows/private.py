"""The private names of libraries that this package uses, each because no public name does the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from pyro.infer.autoguide import AutoGuide
    from pyro.nn import PyroModule
    from pyro.poutine import Trace

__all__ = [
    "DispatchMode",
    "check_prototype",
    "contents",
    "inside_forward_mode",
    "inside_functorch",
    "inside_pyro_call",
    "is_mapped",
    "make_plates",
    "name_in_store",
    "registries",
    "version",
]


def inside_functorch() -> bool:
    """Whether ``torch.func`` is transforming the call, so that no buffer may be written; False while compiling."""
    # torch.func has no public way to ask.
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def inside_forward_mode() -> bool:
    """Whether derivatives are carried forward, as by ``torch.autograd.forward_ad.dual_level``."""
    # The public way asks each tensor.
    return torch.autograd.forward_ad._current_level >= 0


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor stands for many, of ``torch.func.vmap`` or of ``autograd.grad(is_grads_batched=True)``."""
    # Neither has a public way to ask; the second is not one of torch.func's transforms, which the call above sees.
    return torch._C._functorch.is_batchedtensor(tensor) or torch._C._functorch.is_legacy_batchedtensor(tensor)


def version(tensor: Tensor) -> int:
    """Return the number of in-place writes that torch has counted; an inference tensor counts none."""
    # The counter by which autograd itself detects in-place writes; it is documented but has no public name.
    return 0 if tensor.is_inference() else tensor._version


def contents(module: nn.Module) -> tuple[list[bool], list[Tensor]]:
    """Return the modes of a module and its parts, and all their parameters and buffers."""
    # The public iterators build names and remove duplicates, which takes as long as a small network.
    modes: list[bool] = []
    tensors: list[Tensor] = []
    parts: list[Any] = [module]
    for part in parts:
        modes.append(part.training)
        tensors += [tensor for tensor in part._parameters.values() if tensor is not None]
        tensors += [tensor for tensor in part._buffers.values() if tensor is not None]
        parts += [child for child in part._modules.values() if child is not None]
    return modes, tensors


def registries(module: nn.Module) -> dict[str, Any]:
    """Return what a module has registered, by the attribute that holds it, which unpickling sets."""
    # The public iterators leave out what is None and what occurs twice, and do not say which buffers are not saved.
    return {
        "_parameters": module._parameters,
        "_buffers": module._buffers,
        "_non_persistent_buffers_set": module._non_persistent_buffers_set,
        "_modules": module._modules,
    }


def name_in_store(module: PyroModule, name: str) -> str:
    """Return the name under which Pyro's store keeps the parameters of a PyroModule's attribute."""
    # PyroModule alone knows the name by which it was nested in others.
    full_name: str = module._pyro_get_fullname(name)
    return full_name


def inside_pyro_call(module: PyroModule) -> bool:
    """Whether a PyroModule is being called, so that reading a submodule registers its parameters with Pyro."""
    # Registering them once a call, and not at every read, needs to know; Pyro tells nobody else.
    return bool(module._pyro_context.active)


def check_prototype(guide_list: AutoGuide, trace: Trace) -> None:
    """Compare a guide's trace of part of a model with that of the AutoGuideList it is in, as Pyro's own guides do."""
    # Pyro's own guides call it in a setup that draws each latent, where ours sets initial values.
    guide_list._check_prototype(trace)


def make_plates(guide: AutoGuide) -> None:
    """Make the ``plates`` of an autoguide without running it."""
    # NeuTraReparam reads the plates, which only a call of the guide makes.
    guide._create_plates()


class DispatchMode(TorchDispatchMode):
    """A context in which ``__torch_dispatch__`` sees each operation before it runs."""

    # torch documents the class, and extends it through it, under this private module alone.
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what dynamo skips, it first imports, which takes seconds
