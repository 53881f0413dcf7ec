"""Recipes: how a module was built, as JSON, by which it can be built again."""

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from itertools import zip_longest
from numbers import Integral, Real
from typing import Any, ParamSpec, Self, TypeVar

import torch
from torch import Tensor, nn

from pyroflows.private import DispatchMode

__all__ = ["Recorded", "build", "describe", "is_plain", "recorded", "restore"]

P = ParamSpec("P")
Result = TypeVar("Result")

_recorded: dict[str, Callable[..., Any]] = {}
"""The classes, dataclasses and builders of this package that a recipe may name, registered as they are defined."""


class Recorded:
    """A module that remembers the arguments of its constructor.

    An argument that is a module, or holds modules, must be an attribute of the same name, from which it is read.

    Example:
        >>> class Scale(Recorded, nn.Module):
        ...     def __init__(self, factor):
        ...         super().__init__()
        >>> Scale(2.0)._arguments
        (None, (2.0,), {})
    """

    _arguments: tuple[str | None, tuple[Any, ...], dict[str, Any]]
    _remembers: bool = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("pyroflows."):
            _recorded[cls.__name__] = cls

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        if cls._remembers:
            _remember(self, None, args, kwargs)
        return self


def recorded(builder: Callable[P, Result]) -> Callable[P, Result]:
    """Register a dataclass, or a builder, whose name and arguments its results remember in place of a constructor's."""
    _recorded[builder.__name__] = builder
    if isinstance(builder, type):
        return builder

    @functools.wraps(builder)
    def build(*args: P.args, **kwargs: P.kwargs) -> Result:
        module = builder(*args, **kwargs)
        _remember(module, builder.__name__, args, kwargs)
        return module

    return build


def _makers() -> dict[str, Callable[..., Any]]:
    import_module("pyroflows.api")  # which defines them all
    return _recorded


def _remember(module: Any, builder: str | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    arguments = (builder, tuple(map(_copy_plain, args)), {name: _copy_plain(value) for name, value in kwargs.items()})
    object.__setattr__(module, "_arguments", arguments)  # modules take attributes only after their initialisation


def _copy_plain(value: Any) -> Any:
    """Return a copy of a plain value, and ``...`` for others, such as modules and functions."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, (tuple, list)):
        values = tuple(map(_copy_plain, value))
        return ... if any(item is ... for item in values) else values
    if is_dataclass(value) and not isinstance(value, type):
        return value
    return torch.as_tensor(value).clone() if hasattr(value, "__array__") else ...


def _leaves(value: Any) -> Iterator[Any]:
    """Iterate over the values in nested tuples, lists and dicts."""
    if isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    else:
        yield value


def is_plain(value: Any) -> bool:
    """Return whether a value can be written as JSON."""
    return all(leaf is None or isinstance(leaf, (bool, int, float, str)) for leaf in _leaves(_copy_plain(value)))


def describe(module: nn.Module, *, own: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the recipe of a module, as JSON, and its tensors: its state and the tensors among the arguments.

    Args:
        module: the module.
        own: whether its parts may be of the user's own subclasses of :class:`Recorded`.

    Raises:
        ValueError: a part is of a class that is not this package's, ``torch.nn``'s or built on :class:`Recorded`, or
            the module was modified after construction.
    """
    describer = _Describer(own)
    recipe = describer.describe(module, type(module).__name__)
    state = {f"state.{name}": value for name, value in module.state_dict().items()}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"expected a state that holds only tensors; got {type(value).__name__} as {name}")
    tensors = state | describer.tensors
    structure, rebuilt = _structure(module), _structure(build(recipe, tensors, list(describer.own_classes)))
    changed = [name for name in structure.keys() | rebuilt.keys() if structure.get(name) != rebuilt.get(name)]
    if changed:
        raise ValueError(
            "cannot save a module that was modified after construction; got a change in "
            f"{min(changed)}: build a new module of its parts"
        )
    return recipe, tensors


def _structure(module: nn.Module) -> dict[str, Any]:
    """Return the classes and plain arguments of all parts, and the shapes of all tensors."""
    structure: dict[str, Any] = {name: tensor.shape for name, tensor in module.state_dict().items()}
    for name, part in module.named_modules(remove_duplicate=False):
        structure[name or "the module itself"] = type(part)
        if isinstance(part, Recorded):
            for argument in inspect.signature(type(part)).parameters:
                value = getattr(part, argument, None)
                if isinstance(value, (bool, int, float, str)):
                    structure[f"{name}.{argument}".lstrip(".")] = value
    return structure


class _Describer:
    """Describes a module and its arguments; a module that occurs again is named by its number."""

    def __init__(self, own: bool) -> None:
        self.takes_own_classes = own
        self.own_classes: set[type] = set()
        self.names = {maker: name for name, maker in _makers().items()}
        self.tensors: dict[str, Tensor] = {}
        self.numbers: dict[int, int] = {}

    def describe(self, value: Any, where: str) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (tuple, list)):
            return [self.describe(item, f"{where}[{number}]") for number, item in enumerate(value)]
        if isinstance(value, Tensor):
            name = f"argument.{len(self.tensors)}"
            self.tensors[name] = value
            return {"tensor": name}
        if id(value) in self.numbers:
            return {"same": self.numbers[id(value)]}
        maker, arguments = self._maker_and_arguments(value, where)
        described = {name: self.describe(argument, f"{where}.{name}") for name, argument in arguments.items()}
        if isinstance(value, nn.Module):
            self.numbers[id(value)] = len(self.numbers)
        return {"make": maker, "with": described}

    def _maker_and_arguments(self, value: Any, where: str) -> tuple[str, dict[str, Any]]:
        kind = type(value)
        known = kind in self.names
        if isinstance(value, Recorded) and hasattr(value, "_arguments") and (known or self.takes_own_classes):
            builder, args, kwargs = value._arguments
            if not known:
                self.own_classes.add(kind)
            maker = builder or self.names.get(kind, f"own.{kind.__name__}")
            return maker, _named_arguments(value, _recorded[builder] if builder else kind, args, kwargs, where)
        if known and is_dataclass(value):
            return self.names[kind], {field.name: _copy_plain(getattr(value, field.name)) for field in fields(value)}
        if kind is nn.Sequential:
            return "nn.Sequential", {"args": list(value)}
        if getattr(nn, kind.__name__, None) is kind and isinstance(value, nn.Module):
            return f"nn.{kind.__name__}", _arguments_of_torch(value, where)
        raise ValueError(
            f"expected parts made of the classes of pyroflows and torch.nn; got {kind.__name__} as {where}: keep "
            f"flow.state_dict() in a file of your own"
        )


def _named_arguments(
    module: Recorded, maker: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], where: str
) -> dict[str, Any]:
    """Return all arguments by name, defaults included, with modules read from the attributes that hold them."""
    signature = inspect.signature(maker)
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name, {}))
        elif name not in arguments and parameter.kind is not parameter.VAR_POSITIONAL:
            default = _copy_plain(parameter.default)
            arguments |= {} if default is ... else {name: default}
    return {name: _attribute(module, name, where) if value is ... else value for name, value in arguments.items()}


def _attribute(module: Any, name: str, where: str) -> Any:
    value = getattr(module, name, None)
    if isinstance(value, nn.Module) and not isinstance(value, nn.ModuleList):
        return value
    if isinstance(value, Iterable) and all(isinstance(item, nn.Module) for item in value):
        return list(value)
    raise ValueError(
        f"expected the argument {name!r} of {type(module).__name__} to be plain, or a module in the attribute of that "
        f"name; got another as {where}.{name}"
    )


def _arguments_of_torch(module: nn.Module, where: str) -> dict[str, Any]:
    """Return the arguments of one of torch's modules, each of which is an attribute."""
    arguments = {}
    for name, parameter in inspect.signature(type(module)).parameters.items():
        if name in ("device", "dtype") or name.startswith("_"):
            continue
        value = getattr(module, name, ...)
        if isinstance(parameter.default, bool):
            value = value is not None and (isinstance(value, Tensor) or value)
        if _copy_plain(value) is ... or isinstance(value, Tensor):
            raise ValueError(f"expected parts whose arguments can be read; got {type(module).__name__} as {where}")
        arguments[name] = value
    return arguments


def restore(
    recipe: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None, classes: Sequence[type] = ()
) -> nn.Module:
    """Build a module from what :func:`describe` returned, on the CPU and in evaluation mode.

    Args:
        recipe: the recipe, which need not be trusted: it must agree with the tensors.
        tensors: the state, and the tensors among the arguments.
        dtype: of parameters and buffers that the state does not hold.
        classes: the user's own classes that the recipe may name.

    Raises:
        ValueError: the recipe names something unknown or cannot be followed, or the tensors do not fit its module.
    """
    module = build(recipe, tensors, classes)
    state = {name.removeprefix("state."): value for name, value in tensors.items() if name.startswith("state.")}
    expected = module.state_dict()
    for name in sorted(state.keys() | expected.keys()):
        expected_form, form = _form(expected.get(name)), _form(state.get(name))
        if expected_form != form:
            raise ValueError(f"expected {expected_form or 'no tensor'} as {name}, by the recipe; got {form or 'none'}")
    module.to(dtype)
    module.load_state_dict(state, assign=True)
    return module.eval()


def _form(tensor: Tensor | None) -> str | None:
    if tensor is None:
        return None
    kind = "floating-point" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
    return f"a {kind} tensor of shape {tuple(tensor.shape)}"


def build(recipe: Any, tensors: Mapping[str, Tensor], classes: Sequence[type] = ()) -> nn.Module:
    """Build the module of a recipe, without its state, and leave torch's random state alone."""
    memory = _BASE + _SHARE * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    makers = _makers() | {f"own.{kind.__name__}": kind for kind in classes}
    modules: list[Any] = []

    def make(recipe: Any) -> Any:
        if isinstance(recipe, list):
            return tuple(map(make, recipe))
        if not isinstance(recipe, dict):
            return recipe
        if "tensor" in recipe:
            return tensors[recipe["tensor"]]
        if "same" in recipe:
            return modules[recipe["same"]]
        maker = _maker(recipe["make"], makers)
        arguments = {name: make(value) for name, value in recipe["with"].items()}
        value = maker(*arguments.pop("args", ()), **arguments)
        if isinstance(value, nn.Module):
            modules.append(value)
        return value

    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), _MemoryLimit(memory):
            return make(recipe)
    except _UnknownError as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # its class depends on which argument makes no sense
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"expected the recipe of a module; got one that cannot be followed: {reason}") from None


class _UnknownError(ValueError):
    pass


def _maker(name: Any, makers: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    name = str(name)
    if name in makers:
        return makers[name]
    kind = getattr(nn, name[3:], None) if name.startswith("nn.") else None
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        return kind
    if name.startswith("own."):
        raise _UnknownError(f"expected classes=[{name[4:]}], a class of the user's own in this file; got none")
    raise _UnknownError(f"expected builders and classes of pyroflows and torch.nn; got {name[:100]!r}")


# The bytes that building a module may take: a base, and a multiple of the bytes of its tensors; each operation counts
# for some more. A constructor takes up to about 10 times the bytes of its tensors.
_BASE, _SHARE, _OBJECT = 2**24, 64, 2**10


class _MemoryLimit(DispatchMode):
    """Refuses to make more numbers than fit into some memory, before they are made."""

    def __init__(self, memory: int):
        super().__init__()
        self.left = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.left -= 8 * _max_numbers(func.overloadpacket.__name__, args, kwargs) + _OBJECT
        if self.left < 0:
            raise ValueError("it asks for more memory than its tensors account for")
        return func(*args, **kwargs)


def _max_numbers(name: str, args: Any, kwargs: Any) -> int:
    """Return an upper bound of the number of numbers in the result of an operation."""
    shapes = [value.shape for value in _leaves((args, kwargs)) if isinstance(value, Tensor)]
    sizes = [value for value in args if isinstance(value, (list, tuple)) and all(isinstance(n, int) for n in value)]
    if not shapes and not sizes:  # such as eye(n), randperm(n), tril_indices(rows, columns)
        numbers = math.prod(int(abs(value)) + 1 for value in args if isinstance(value, (int, float)))
        return {"eye": numbers**2, "tril_indices": 2 * numbers, "scalar_tensor": 1}.get(name, numbers)
    broadcast = math.prod(map(max, zip_longest(*map(reversed, shapes), fillvalue=1)))
    concatenated = sum(map(math.prod, shapes))
    return max(broadcast, concatenated, *(math.prod(map(abs, size)) for size in sizes))
