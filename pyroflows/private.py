"""The private names of libraries that this package uses, each because no public name does the same."""

from __future__ import annotations

import torch

__all__ = ["inside_functorch"]


def inside_functorch() -> bool:
    """Whether ``torch.func`` is at work, under which no buffer may be written; dynamo cannot look, and writes well."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
