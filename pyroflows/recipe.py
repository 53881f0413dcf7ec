"""What a module is made of, as JSON: its class or builder, and the arguments, by which it can be made again."""

from __future__ import annotations

import functools
import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from itertools import zip_longest
from numbers import Integral, Real
from typing import Any, ParamSpec, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Recorded", "build", "describe", "is_plain", "load_state", "recorded", "restore"]

P = ParamSpec("P")
Made = TypeVar("Made", bound="Recorded")

_MODULES = (
    "bijection",
    "compose",
    "networks",
    "dequantizers",
    "flow",
    "layers",
    "models",
    "priors",
)


class Recorded:
    """A module that remembers the arguments it was made with, without those that are modules: these it has.

    An argument that is a module, or holds modules, must be kept as an attribute of the argument's name, where it is
    read from when it is needed.

    Example:
        >>> class Scale(Recorded, nn.Module):
        ...     def __init__(self, factor):
        ...         super().__init__()
        >>> Scale(2.0)._arguments
        (None, (2.0,), {})
    """

    _arguments: tuple[str | None, tuple[Any, ...], dict[str, Any]]
    _remembers: bool = True

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        if cls._remembers:
            _remember(self, None, args, kwargs)
        return self


def recorded(builder: Callable[P, Made]) -> Callable[P, Made]:
    """Let what a builder makes remember the builder and its arguments in the place of the constructor's."""

    @functools.wraps(builder)
    def build(*args: P.args, **kwargs: P.kwargs) -> Made:
        made = builder(*args, **kwargs)
        _remember(made, builder.__name__, args, kwargs)
        return made

    _builders[builder.__name__] = build
    return build


_builders: dict[str, Callable[..., Any]] = {}


def _remember(made: Recorded, builder: str | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    arguments = (builder, tuple(map(_kept, args)), {name: _kept(value) for name, value in kwargs.items()})
    object.__setattr__(made, "_arguments", arguments)  # a module takes no attribute before it was initialised


def _kept(value: Any) -> Any:
    """Give a copy of a plain value, or dots for what is none, such as a module or a function."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, (tuple, list)):
        values = tuple(map(_kept, value))
        return ... if any(part is ... for part in values) else values
    if is_dataclass(value) and not isinstance(value, type):
        return value
    return torch.as_tensor(value).clone() if hasattr(value, "__array__") else ...


def is_plain(value: Any) -> bool:
    """Whether a value can be written as JSON."""
    return all(part is None or isinstance(part, (bool, int, float, str)) for part in tree_leaves(_kept(value)))


def describe(module: nn.Module, *, own: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Give the recipe of a module, as JSON, and its tensors: the state, and those among the arguments.

    Args:
        module: the module.
        own: whether parts may be of the user's own classes, built on :class:`Recorded`.

    Raises:
        ValueError: a part is of a class that is not this package's, ``torch.nn``'s or built on :class:`Recorded`, or
            the module was changed since it was made.
    """
    describer = _Describer(own)
    recipe = describer.of(module, type(module).__name__)
    state = {f"state.{name}": value for name, value in module.state_dict().items()}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"expected a state of tensors alone; got {type(value).__name__} as {name}")
    tensors = state | describer.tensors
    there, again = _structure(module), _structure(build(recipe, tensors, list(describer.own)))
    changed = [name for name in there.keys() | again.keys() if there.get(name) != again.get(name)]
    if changed:
        raise ValueError(
            f"expected a module as its constructor leaves it; got one changed since, in {min(changed)}: make a new one "
            f"of its parts"
        )
    return recipe, tensors


def _structure(module: nn.Module) -> dict[str, Any]:
    """Give what tells whether two modules were made alike: classes and plain arguments of parts, tensors' shapes."""
    found: dict[str, Any] = {name: tensor.shape for name, tensor in module.state_dict().items()}
    for name, part in module.named_modules(remove_duplicate=False):
        found[name or "the whole"] = type(part)
        if isinstance(part, Recorded):
            for argument in inspect.signature(type(part)).parameters:
                value = getattr(part, argument, None)
                if isinstance(value, (bool, int, float, str)):
                    found[f"{name}.{argument}".lstrip(".")] = value
    return found


class _Describer:
    """Walks through a module and its arguments; a module that comes again is named by its number."""

    def __init__(self, own: bool) -> None:
        self.takes_own = own
        self.names = {made: name for name, made in _makers().items()}
        self.tensors: dict[str, Tensor] = {}
        self.numbers: dict[int, int] = {}
        self.own: set[type] = set()

    def of(self, value: Any, where: str) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (tuple, list)):
            return [self.of(part, f"{where}[{number}]") for number, part in enumerate(value)]
        if isinstance(value, Tensor):
            name = f"argument.{len(self.tensors)}"
            self.tensors[name] = value
            return {"tensor": name}
        if id(value) in self.numbers:
            return {"same": self.numbers[id(value)]}
        maker, arguments = self._maker(value, where)
        recipe = {"make": maker, "with": {name: self.of(part, f"{where}.{name}") for name, part in arguments.items()}}
        if isinstance(value, nn.Module):
            self.numbers[id(value)] = len(self.numbers)
        return recipe

    def _maker(self, value: Any, where: str) -> tuple[str, dict[str, Any]]:
        """Give the name of what made a module, and the arguments by name."""
        kind = type(value)
        known = kind in self.names
        if isinstance(value, Recorded) and hasattr(value, "_arguments") and (known or self.takes_own):
            builder, args, kwargs = value._arguments
            self.own |= set() if known else {kind}
            maker = builder or self.names.get(kind, f"own.{kind.__name__}")
            return maker, self._bound(value, _makers()[builder] if builder else kind, args, kwargs, where)
        if known and is_dataclass(value):
            return self.names[kind], {field.name: _kept(getattr(value, field.name)) for field in fields(value)}
        if isinstance(value, nn.Sequential) and kind is nn.Sequential:
            return "nn.Sequential", {"args": list(value)}
        if getattr(nn, kind.__name__, None) is kind and isinstance(value, nn.Module):
            return f"nn.{kind.__name__}", _arguments_of_torch(value, where)
        raise ValueError(
            f"expected parts made of the classes of pyroflows and torch.nn; got {kind.__name__} as {where}: keep "
            f"flow.state_dict() in a file of your own"
        )

    @staticmethod
    def _bound(
        module: Recorded, maker: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], where: str
    ) -> dict[str, Any]:
        signature = inspect.signature(maker)
        found = dict(signature.bind(*args, **kwargs).arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                found.update(found.pop(name, {}))
            elif name not in found and parameter.kind is not parameter.VAR_POSITIONAL:
                default = _kept(parameter.default)
                found |= {} if default is ... else {name: default}
        return {name: _read(module, name, where) if value is ... else value for name, value in found.items()}


def _read(module: Any, name: str, where: str) -> Any:
    """Read an argument that is a module, or holds modules, from where it is now."""
    value = getattr(module, name, None)
    if isinstance(value, nn.Module) and not isinstance(value, nn.ModuleList):
        return value
    if isinstance(value, Iterable) and all(isinstance(part, nn.Module) for part in value):
        return list(value)
    raise ValueError(
        f"expected the argument {name!r} of {type(module).__name__} as a module kept under that name, or a plain "
        f"value; got another as {where}.{name}"
    )


def _arguments_of_torch(module: nn.Module, where: str) -> dict[str, Any]:
    """Give the arguments of one of torch's modules, which keeps each as an attribute."""
    found = {}
    for name, parameter in inspect.signature(type(module)).parameters.items():
        if name in ("device", "dtype") or name.startswith("_"):
            continue
        value = getattr(module, name, ...)
        if isinstance(parameter.default, bool):
            value = value is not None and (isinstance(value, Tensor) or value)
        if _kept(value) is ... or isinstance(value, Tensor):
            raise ValueError(f"expected parts whose arguments can be read; got {type(module).__name__} as {where}")
        found[name] = value
    return found


def restore(
    recipe: Any,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    classes: Sequence[type] = (),
    *,
    old: bool = False,
) -> nn.Module:
    """Make a module again, with its state, from what :func:`describe` gave; on the CPU, for evaluation.

    Args:
        recipe: of the module; it may be anybody's, and is held to the tensors.
        tensors: the state, and those among the arguments.
        dtype: of numbers that the state does not hold.
        classes: the user's own that may be made.
        old: whether the state is that of the parts' first versions.

    Raises:
        ValueError: the recipe names something unknown, or cannot be followed, or the tensors are not those of what it
            makes.
    """
    module = build(recipe, tensors, classes)
    state = {name.removeprefix("state."): value for name, value in tensors.items() if name.startswith("state.")}
    expected = module.state_dict()
    for name in sorted(state.keys() | expected.keys()):
        wanted, got = _form(expected.get(name)), _form(state.get(name))
        if wanted != got:
            raise ValueError(f"expected {wanted or 'no tensor'} as {name}, by the recipe; got {got or 'none'}")
    module.to(dtype)
    load_state(module, state, old=old, assign=True)
    return module.eval()


def load_state(module: nn.Module, state: Mapping[str, Tensor], *, old: bool, assign: bool = False) -> None:
    """Load a state without torch's notes on versions, which is today's or, if old, of the parts' first versions."""
    noted: Any = OrderedDict(state)
    if old:
        noted._metadata = {name: {"version": 1} for name, part in module.named_modules() if isinstance(part, Recorded)}
    module.load_state_dict(noted, assign=assign)


def _form(tensor: Tensor | None) -> str | None:
    if tensor is None:
        return None
    kind = "floating-point" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
    return f"a {kind} tensor of shape {tuple(tensor.shape)}"


def build(recipe: Any, tensors: Mapping[str, Tensor], classes: Sequence[type] = ()) -> nn.Module:
    """Make the module of a recipe, without its state, and without touching torch's random numbers."""
    memory = _BASE + _SHARE * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    makers = _makers() | {f"own.{kind.__name__}": kind for kind in classes}
    made: list[Any] = []

    def make(recipe: Any) -> Any:
        if isinstance(recipe, list):
            return tuple(map(make, recipe))
        if not isinstance(recipe, dict):
            return recipe
        if "tensor" in recipe:
            return tensors[recipe["tensor"]]
        if "same" in recipe:
            return made[recipe["same"]]
        maker = _maker_of(recipe["make"], makers)
        arguments = {name: make(value) for name, value in recipe["with"].items()}
        value = maker(*arguments.pop("args", ()), **arguments)
        if isinstance(value, nn.Module):
            made.append(value)
        return value

    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), _Bounded(memory):
            return make(recipe)
    except _UnknownError as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # what is raised depends on which argument makes no sense
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"expected the recipe of a module; got one that cannot be followed: {reason}") from None


class _UnknownError(ValueError):
    pass


def _maker_of(name: Any, makers: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    name = str(name)
    if name in makers:
        return makers[name]
    kind = getattr(nn, name[3:], None) if name.startswith("nn.") else None
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        return kind
    if name.startswith("own."):
        raise _UnknownError(f"expected classes=[{name[4:]}], a class of the user's own in this file; got none")
    raise _UnknownError(f"expected builders and classes of pyroflows and torch.nn; got {name[:100]!r}")


@functools.cache
def _makers() -> dict[str, Callable[..., Any]]:
    """Give what a recipe may name: this package's recorded classes, transformers and builders."""
    makers: dict[str, Callable[..., Any]] = {}
    for module in _MODULES:
        for name, value in vars(import_module(f"pyroflows.{module}")).items():
            # torch.compile leaves functions here that have no module, so that this comes second.
            kind = isinstance(value, type) and (issubclass(value, Recorded) or is_dataclass(value))
            if kind and value.__module__.startswith("pyroflows."):
                makers[name] = value
    return makers | _builders


# The bytes that may be taken to make a module: so many, and so many times those of its tensors; for each operation
# some are counted beside those of its numbers. A constructor takes up to about 10 times.
_BASE, _SHARE, _OBJECT = 2**24, 64, 2**10


class _Bounded(TorchDispatchMode):
    """Refuses to make more numbers than would fit into some memory, before they are made."""

    def __init__(self, memory: int):
        super().__init__()
        self.left = memory

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what is skipped would first be imported, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.left -= 8 * _most_numbers(func.overloadpacket.__name__, args, kwargs) + _OBJECT
        if self.left < 0:
            raise ValueError("it asks for more memory than the tensors beside it account for")
        return func(*args, **kwargs)


def _most_numbers(name: str, args: Any, kwargs: Any) -> int:
    """Give at least as many numbers as an operation makes of its arguments."""
    shapes = [value.shape for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    sizes = [value for value in args if isinstance(value, (list, tuple)) and all(isinstance(n, int) for n in value)]
    if not shapes and not sizes:  # such as eye(n), randperm(n), tril_indices(rows, columns)
        numbers = math.prod(int(abs(value)) + 1 for value in args if isinstance(value, (int, float)))
        return {"eye": numbers**2, "tril_indices": 2 * numbers, "scalar_tensor": 1}.get(name, numbers)
    broadcast = math.prod(map(max, zip_longest(*map(reversed, shapes), fillvalue=1)))
    together = sum(map(math.prod, shapes))  # as of concatenations
    return max(broadcast, together, *(math.prod(map(abs, size)) for size in sizes))
