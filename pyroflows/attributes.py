"""Objects by their attributes, without their constructors; classes and functions of torch by their names."""

import functools
import inspect
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import pyro.distributions.constraints
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional

from pyroflows.private import registries

__all__ = [
    "attributes_of",
    "by_name",
    "class_by_name",
    "from_attributes",
    "full_name",
    "is_hooked",
    "is_of_a_library",
    "name_of",
]

_MODULE = frozenset(vars(nn.Module()))
_HOOKS = _MODULE - {"training", "_is_full_backward_hook", *registries(nn.Module())}
_CONSTRAINTS = ("torch.distributions.constraints", "pyro.distributions.constraints", "pyroflows.supports")
_LIBRARIES = {*sys.stdlib_module_names, "builtins", "numpy", "pyro", "torch"}


def attributes_of(value: Any) -> dict[str, Any] | None:
    """Return an object's attributes, as pickle would; of a module without tensors and parts.

    Returns:
        None if there is more to the object: it cannot be pickled, is pickled otherwise, or holds items.
    """
    try:
        reduced = value.__reduce_ex__(2)
    except Exception:  # its class depends on why it cannot be pickled
        return None
    if not isinstance(reduced, tuple):
        return None
    make, args, state, *items = *reduced, None
    if make.__name__ != "__newobj__" or args != (type(value),) or any(item is not None for item in items):
        return None
    if is_dataclass(value) and not hasattr(value, "__dict__"):
        state = {field.name: getattr(value, field.name) for field in fields(value)}
    elif isinstance(state, tuple):  # it has slots
        state = {**(state[0] or {}), **state[1]}
    state = {} if state is None else state
    if not isinstance(state, dict):
        return None
    ignored = {"_arguments", *(_MODULE if isinstance(value, nn.Module) else ())}
    return {name: attribute for name, attribute in state.items() if name not in ignored}


def from_attributes(kind: type, attributes: Mapping[str, Any], registered: Mapping[str, Any]) -> Any:
    """Return an object of a class with these attributes, without calling its constructor, as unpickling would.

    Args:
        kind: the class.
        attributes: as :func:`attributes_of` returns them.
        registered: of a module, as :func:`pyroflows.private.registries` returns it.
    """
    value: Any = object.__new__(kind)
    state = dict(attributes)
    if issubclass(kind, nn.Module):
        state = {**vars(nn.Module()), **state, **registered}
    if hasattr(kind, "__setstate__") and hasattr(value, "__dict__"):
        value.__setstate__(state)
    else:
        for name, attribute in state.items():
            object.__setattr__(value, name, attribute)
    return value


def is_hooked(module: nn.Module) -> bool:
    """Return whether a module does more than its class and attributes say: by hooks or parametrizations."""
    return any(module.__dict__.get(name) for name in _HOOKS) or nn.utils.parametrize.is_parametrized(module)


def is_of_a_library(kind: Any) -> bool:
    """Return whether a class or function is Python's, NumPy's, torch's or Pyro's, and not a module's class."""
    return str(kind.__module__).partition(".")[0] in _LIBRARIES and not _is_module_class(kind)


@functools.cache
def _named() -> dict[str, Any]:
    """Return by name torch's layers, its functions of tensors, and the supports without parameters."""
    named: dict[str, Any] = {}
    for name, value in vars(functional).items():
        if inspect.isroutine(value) and getattr(value, "__module__", "") in (functional.__name__, "torch._C._nn"):
            named[f"nn.functional.{name}"] = value
    named |= {f"torch.special.{name}": getattr(torch.special, name) for name in torch.special.__all__}
    named |= {f"torch.{name}": value for name, value in vars(torch).items() if _is_method_too(name, value)}
    named |= {f"nn.{name}": value for name, value in vars(nn).items() if _is_module_class(value)}
    for module, prefix in ((pyro.distributions.constraints, "pyro.constraints"), (constraints, "constraints")):
        singles = {name: value for name, value in vars(module).items() if isinstance(value, constraints.Constraint)}
        named |= {f"{prefix}.{name}": value for name, value in singles.items()}
    return {name: value for name, value in named.items() if "._" not in name}


def _is_method_too(name: str, value: Any) -> bool:
    return inspect.isbuiltin(value) and callable(getattr(Tensor, name, None))


def _is_module_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


@functools.cache
def _names() -> dict[int, str]:
    return {id(value): name for name, value in _named().items()}


def name_of(value: Any) -> str | None:
    """Return the name of one of torch's layers or functions, or of a support without parameters; None for others."""
    return _names().get(id(value)) or (_library_class(value) if isinstance(value, type) else None)


def by_name(name: str) -> Any:
    """Return what :func:`name_of` named; None if it names nothing."""
    return _named().get(name, class_by_name(name))


def _library_class(kind: type) -> str | None:
    name = full_name(kind)
    return name if class_by_name(name) is kind else None


def full_name(kind: Any) -> str:
    """Return the name of a class or a function with that of its module."""
    return f"{kind.__module__}.{kind.__qualname__}"


def class_by_name(name: str) -> type | None:
    """Return one of torch's or Pyro's classes of modules or supports by its full name; None for others."""
    module, _, kind_name = name.rpartition(".")
    kind = getattr(sys.modules.get(module), kind_name, None)
    if not isinstance(kind, type) or kind.__module__ != module:
        return None
    is_layer = module.startswith(("torch.nn.modules.", "pyro.nn.")) and issubclass(kind, nn.Module)
    return kind if is_layer or (module in _CONSTRAINTS and issubclass(kind, constraints.Constraint)) else None
