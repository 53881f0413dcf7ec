"""The private names of libraries that this package uses, each because no public name does the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pyro.infer.autoguide import AutoGuide
    from pyro.nn import PyroModule
    from pyro.poutine import Trace

__all__ = ["check_prototype", "inside_functorch", "inside_pyro_call", "make_plates", "name_in_store"]


def inside_functorch() -> bool:
    """Whether ``torch.func`` is at work, under which no buffer may be written; dynamo cannot look, and writes well."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def name_in_store(module: PyroModule, name: str) -> str:
    """Return the name under which Pyro's store keeps the parameters of a PyroModule's attribute."""
    full_name: str = module._pyro_get_fullname(name)
    return full_name


def inside_pyro_call(module: PyroModule) -> bool:
    """Whether a PyroModule is being called, so that reading a submodule registers its parameters with Pyro."""
    return bool(module._pyro_context.active)


def check_prototype(guide_list: AutoGuide, trace: Trace) -> None:
    """Compare a trace of part of a model with that of the AutoGuideList which guides it, as Pyro's own guides do."""
    guide_list._check_prototype(trace)


def make_plates(guide: AutoGuide) -> None:
    """Make the ``plates`` of an autoguide, which Pyro's NeuTraReparam reads, without running the guide."""
    guide._create_plates()
