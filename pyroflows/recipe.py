"""Recipes: how a module was built, as JSON, by which it can be built again."""

import functools
import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Size, Tensor, nn

from pyroflows.attributes import attributes_of, class_by_name, full_name, is_hooked, is_of_a_library, name_of
from pyroflows.building import Given, build
from pyroflows.memory import leaves
from pyroflows.private import registries
from pyroflows.recorded import Recorded, copy_plain, is_plain, makers, recorded

__all__ = ["Recorded", "describe", "describe_value", "is_plain", "recorded", "restore"]


def describe(
    module: nn.Module, *, own: bool = True, given: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the recipe of a module, as JSON, and its tensors: its state and the tensors among the arguments.

    The parts of this package and of torch are described by the arguments of their constructors. Those of the user's
    own classes are described by their attributes, as pickle does, so that any constructor will do.

    Args:
        module: the module.
        own: whether its parts may be of the user's own classes, and hold functions of the user's own.
        given: the place, as names of attributes, of a part that can be passed to :func:`restore`. Only there may be
            attributes that a file cannot hold, such as functions.

    Raises:
        ValueError: a file cannot hold an attribute or an argument of a part, or the module was modified after
            construction.
    """
    root = type(module).__name__
    describer = _Describer(module, ".".join((root, *given)) if given else None, own=own)
    recipe = describer.describe(module, root)
    state = {f"state.{name}": value for name, value in module.state_dict().items()}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"expected a state that holds only tensors; got {type(value).__name__} as {name}")
    tensors = state | describer.tensors
    handed = _given(given, functools.reduce(getattr, given, module)) if describer.omits else None
    rebuilt = build(recipe, tensors, list(describer.own_classes), handed)
    if describer.own_classes and handed is None:
        with suppress(RuntimeError):  # another shape is said below
            rebuilt.load_state_dict(module.state_dict())  # which some attributes follow
    structure, rebuilt_structure = _structure(module), _structure(rebuilt)
    names = structure.keys() | rebuilt_structure.keys()
    changed = [name for name in names if structure.get(name) != rebuilt_structure.get(name)]
    if changed:
        raise ValueError(
            "cannot save a module that was modified after construction; got a change in "
            f"{min(changed)}: build a new module of its parts"
        )
    built_ties = _ties(rebuilt)
    if ties := [names for names in _ties(module) if names not in built_ties]:
        recipe["ties"] = ties
    return recipe, tensors


def describe_value(value: Any, where: str) -> tuple[Any, dict[str, Tensor], Any]:
    """Return a value's recipe, such as that of a list of supports, its tensors, and the value built of these.

    Args:
        value: the value.
        where: what it is, for error messages.
    """
    describer = _Describer(nn.Module(), None)
    recipe = describer.describe(value, where)
    return recipe, describer.tensors, build(recipe, describer.tensors, list(describer.own_classes))


def _given(place: Sequence[str], part: nn.Module | None) -> Given:
    """Return a part in its place, described, if there is one."""
    if part is None:
        return Given(place)
    where = ".".join(place)
    describer = _Describer(part, where)
    return Given(place, part, describer.describe(part, where), describer.tensors, describer.parts)


def _structure(module: nn.Module) -> dict[str, Any]:
    """Return the classes and plain arguments of all parts, the shapes of all tensors, and what else a part has."""
    state = module.state_dict()
    structure: dict[str, Any] = {name: tensor.shape for name, tensor in state.items()}
    known = set(makers().values())
    for name, part in module.named_modules(remove_duplicate=False):
        structure[name or "the module itself"] = type(part)
        if not isinstance(part, Recorded):
            continue
        values = {argument: getattr(part, argument, None) for argument in inspect.signature(type(part)).parameters}
        if isinstance(part, nn.Module) and type(part) not in known:  # it may hold more than its arguments say
            tensors = {**(attributes_of(part) or {}), **registries(part)["_buffers"]}
            values |= {
                attribute: repr(value.tolist()) if isinstance(value, Tensor) else value
                for attribute, value in tensors.items()
                if f"{name}.{attribute}".lstrip(".") not in state
            }
        for attribute, value in values.items():
            if isinstance(value, (bool, int, float, str)):
                structure[f"{name}.{attribute}".lstrip(".")] = "nan" if value != value else value
    return structure


def _ties(module: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [same for same in names.values() if len(same) > 1]


class _UndescribedError(ValueError):
    """A part that cannot be described in this way, but perhaps in another."""


class _OmittedError(_UndescribedError):
    """An attribute that a file cannot hold."""

    def __init__(self, got: str, where: str):
        super().__init__(
            f"expected attributes that a file can hold, such as numbers, text, tensors, modules and functions of "
            f"torch; got {got} as {where}"
        )


class _Describer:
    """Describes a module and its arguments; a module that occurs again is named by its number."""

    def __init__(self, module: nn.Module, given: str | None, *, own: bool = True):
        self.takes_own_classes = own
        self.given = given
        self.root = type(module).__name__
        self.own_classes: dict[Any, None] = {}  # and functions
        self.registered = {id(part) for part in chain(module.modules(), module.parameters(), module.buffers())}
        self.names = {maker: name for name, maker in makers().items()}
        self.tensors: dict[str, Tensor] = {}
        self.numbers: dict[int, int] = {}
        self.parts: list[nn.Module] = []
        self.within: set[int] = set()
        self.omits = False

    def describe(self, value: Any, where: str) -> Any:
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, Enum) and not is_of_a_library(type(value)):
            return {"name": self._name_class(type(value), where), "from": full_name(type(value)), "member": value.name}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if type(value) is tuple:
            return self._items(value, where)
        if isinstance(value, nn.Parameter):
            self._check_registered(value, where)
            return self._omit("a second reference to a parameter", where)
        if isinstance(value, Tensor):
            return {"tensor": self._keep(value)}
        if id(value) in self.numbers:
            return {"same": self.numbers[id(value)]}
        if name := name_of(value):
            return {"name": name}
        if id(value) in self.within:
            return self._omit("a reference back to itself", where)
        self.within.add(id(value))
        described: Any = self._leaf(value, where) or self._object(value, where)
        self.within.remove(id(value))
        if isinstance(value, nn.Module) and "omitted" not in described:
            self.numbers[id(value)] = len(self.parts)
            self.parts.append(value)
        return described

    def _leaf(self, value: Any, where: str) -> Any:
        """Return what a file holds of a container, an array, a dtype, a device or a class; None of other values."""
        kind = type(value)
        if kind in (list, set, frozenset, Size):
            return {kind.__name__: self._items(value, where)}
        if kind in (dict, OrderedDict):
            keys = self._items(value, where)
            return {kind.__name__: [keys, [self.describe(item, f"{where}[{key!r}]") for key, item in value.items()]]}
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.dtype.itemsize <= 8:
            return {"array": self._keep(torch.from_numpy(value.astype(value.dtype.newbyteorder("="))))}
        if isinstance(value, (torch.dtype, torch.device)):
            return {kind.__name__: str(value).removeprefix("torch.")}
        if kind is functools.partial:
            return {"partial": self._items([value.func, value.args, value.keywords], where)}
        is_named = inspect.isfunction(value) and value.__closure__ is None and value.__name__.isidentifier()
        if (isinstance(value, type) or is_named) and not is_of_a_library(value):
            return {"name": self._name_class(value, where), "from": full_name(value)}
        return None

    def _items(self, values: Iterable[Any], where: str) -> list[Any]:
        return [self.describe(item, f"{where}[{number}]") for number, item in enumerate(values)]

    def _keep(self, tensor: Tensor) -> str:
        name = f"argument.{len(self.tensors)}"
        self.tensors[name] = tensor
        return name

    def _omit(self, got: str, where: str) -> dict[str, Any]:
        """Refuse what a file cannot hold, unless its part can be passed to the one who loads the file."""
        if self.given is None or where[: len(self.given)] != self.given or where[len(self.given) :][:1] not in ".[":
            raise _OmittedError(got, where)
        self.omits = True
        return {"omitted": f"{got} as {where}".replace(f"as {self.root}.", "as ")}

    def _object(self, value: Any, where: str) -> dict[str, Any]:
        kind = type(value)
        known = kind in self.names
        if isinstance(value, nn.Module) and value.state_dict():
            self._check_registered(value, where)
        if known and isinstance(value, Recorded) and hasattr(value, "_arguments"):
            return self._by_arguments(value, where)
        if known and is_dataclass(value):
            values = {field.name: copy_plain(getattr(value, field.name)) for field in fields(value)}
            return {"make": self.names[kind], "with": self._all(values, where)}
        is_torchs = getattr(nn, kind.__name__, None) is kind and not is_hooked(value)
        if is_torchs and (arguments := _arguments_of_torch(value)) is not None:
            return {"make": f"nn.{kind.__name__}", "with": self._all(arguments, where)}
        if not isinstance(value, Recorded) or not hasattr(value, "_arguments"):
            return self._by_attributes(value, where)
        for item in leaves(dict(vars(value))):
            if isinstance(item, nn.Parameter) or (isinstance(item, nn.Module) and item.state_dict()):
                self._check_registered(item, where)
        return self._by_attributes_or_arguments(value, where)

    def _check_registered(self, value: Any, where: str) -> None:
        if id(value) not in self.registered:
            advice = "use an nn.ModuleList or nn.ParameterList"
            got = f"a {type(value).__name__} as {where}, which state_dict() lacks: {advice}"
            raise ValueError(f"expected registered modules and parameters; got {got}")

    def _by_attributes_or_arguments(self, value: Any, where: str) -> dict[str, Any]:
        """Describe by attributes if a file can hold them all, or else by arguments if it can hold those."""
        given = self.given
        for way in (self._by_attributes, self._by_arguments):
            before = dict(self.own_classes), dict(self.tensors), dict(self.numbers), self.parts[:], set(self.within)
            self.given = None
            try:
                return way(value, where)
            except _UndescribedError:
                self.own_classes, self.tensors, self.numbers, self.parts, self.within = before
            finally:
                self.given = given
        return self._by_attributes(value, where)

    def _all(self, values: Mapping[str, Any], where: str) -> dict[str, Any]:
        return {name: self.describe(value, f"{where}.{name}") for name, value in values.items()}

    def _by_arguments(self, value: Recorded, where: str) -> dict[str, Any]:
        builder, args, kwargs = value._arguments
        node = {"make": builder} if builder else self._class_of(value, where)
        arguments = _named_arguments(value, makers()[builder] if builder else type(value), args, kwargs, where)
        return {**node, "with": self._all(arguments, where)}

    def _by_attributes(self, value: Any, where: str) -> dict[str, Any]:
        if type(value) in self.names:
            self._refuse(type(value), where)
        if isinstance(value, torch.jit.ScriptModule):
            return self._omit("a compiled module", where)
        if isinstance(value, nn.Module) and is_hooked(value):
            return self._omit(f"a hook or a parametrization of the module {type(value).__name__}", where)
        attributes = attributes_of(value)
        if attributes is None or (is_of_a_library(type(value)) and class_by_name(full_name(type(value))) is None):
            return self._omit(_article(value), where)
        node = self._class_of(value, where)
        if isinstance(value, nn.Module):
            registered = registries(value)
            unsaved, buffers = registered["_non_persistent_buffers_set"], registered["_buffers"]
            node["parameters"] = {name: _tensor_form(tensor) for name, tensor in registered["_parameters"].items()}
            node["buffers"] = {name: _tensor_form(buffers[name]) for name in buffers if name not in unsaved}
            node["unsaved"] = self._all({name: buffers[name] for name in buffers if name in unsaved}, where)
            node["modules"] = self._all(registered["_modules"], where)
        return {**node, "attributes": self._all(attributes, where)}

    def _class_of(self, value: Any, where: str) -> dict[str, Any]:
        kind = type(value)
        name = self._name_class(kind, where)
        return {"make": name, "from": full_name(kind)} if name.startswith("own.") else {"make": name}

    def _name_class(self, kind: Any, where: str) -> str:
        if name := self.names.get(kind) or name_of(kind):
            return name
        module = kind.__module__ if kind.__module__.startswith("pyroflows.") else ""
        if not self.takes_own_classes or getattr(sys.modules.get(module), kind.__name__, None) is kind:
            self._refuse(kind, where)
        self.own_classes[kind] = None
        return f"own.{kind.__name__}"

    @staticmethod
    def _refuse(kind: Any, where: str) -> None:
        got = f"{kind.__name__} as {where}: keep flow.state_dict() in a file of your own"
        raise _UndescribedError(f"expected parts made of the classes of pyroflows and torch.nn; got {got}")


def _article(value: Any) -> str:
    name = getattr(value, "__name__", None)
    return f"the {type(value).__name__} {name}" if isinstance(name, str) else f"a {type(value).__name__}"


def _tensor_form(tensor: Tensor | None) -> list[Any] | None:
    return None if tensor is None else [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]


def _named_arguments(
    module: Recorded, maker: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], where: str
) -> dict[str, Any]:
    """Return all arguments by name, defaults included, with those that are not plain read from their attributes."""
    signature = inspect.signature(maker)
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name, {}))
        elif name not in arguments and parameter.kind is not parameter.VAR_POSITIONAL:
            default = copy_plain(parameter.default)
            arguments |= {} if default is ... else {name: default}
    return {name: _attribute(module, name, where) if value is ... else value for name, value in arguments.items()}


def _attribute(module: Any, name: str, where: str) -> Any:
    value = getattr(module, name, None)
    if isinstance(value, nn.Module) and not isinstance(value, nn.ModuleList):
        return value
    if isinstance(value, Iterable) and all(isinstance(item, nn.Module) for item in value):
        return tuple(value)
    if value is None:
        raise _UndescribedError(
            f"expected the argument {name!r} of {type(module).__name__} to be plain, or to be in the attribute of that "
            f"name; got another as {where}.{name}"
        )
    return value


def _arguments_of_torch(module: Any) -> dict[str, Any] | None:
    """Return the arguments of one of torch's modules, each of which is an attribute; None if one is not."""
    kind = type(module)
    if kind is nn.Sequential:
        names = [name for name, _ in module.named_children()]
        is_numbered = names == [str(number) for number in range(len(module))]
        return {"args": tuple(module)} if is_numbered else None
    parameters = dict(inspect.signature(kind).parameters)
    if isinstance(module, nn.RNNBase):
        parameters = dict(inspect.signature(nn.RNNBase).parameters)
        del parameters["mode"]
        if kind is not nn.LSTM:
            del parameters["proj_size"]
    arguments: dict[str, Any] = {"nonlinearity": module.nonlinearity} if kind is nn.RNN else {}
    for name, parameter in parameters.items():
        if name in ("device", "dtype") or name.startswith("_"):
            continue
        value = getattr(module, name, ...)
        if isinstance(parameter.default, bool):
            value = value is not None and (isinstance(value, Tensor) or value)
        if copy_plain(value) is ... or isinstance(value, Tensor):
            return None
        arguments[name] = value
    return arguments


def restore(
    recipe: Any,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    classes: Sequence[type] = (),
    place: Sequence[str] = (),
    part: nn.Module | None = None,
) -> nn.Module:
    """Build a module from what :func:`describe` returned, on the CPU and in evaluation mode.

    Args:
        recipe: the recipe, which need not be trusted: it must agree with the tensors.
        tensors: the state, and the tensors among the arguments.
        dtype: of parameters and buffers that the state does not hold.
        classes: the user's own classes and functions that the recipe may name.
        place, part: a part of the module that the user built, to take the state of the part in this place, whose
            recipe must be its own.

    Raises:
        ValueError: the recipe names something unknown or cannot be followed, or the tensors or the part do not fit.
    """
    if part is not None:
        part.cpu()
    module = build(recipe, tensors, classes, _given(place, part))
    state = {name.removeprefix("state."): value for name, value in tensors.items() if name.startswith("state.")}
    expected = module.state_dict(keep_vars=True)
    for name in sorted(state.keys() | expected.keys()):
        expected_form, form = _form(expected.get(name)), _form(state.get(name))
        if expected_form != form:
            raise ValueError(f"expected {expected_form or 'no tensor'} as {name}, by the recipe; got {form or 'none'}")
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.is_floating_point() and dtype is not None:
            tensor.data = tensor.data.to(dtype)
    for name, tensor in expected.items():  # not replaced, so that parameters with several names stay one
        tensor.data = torch.empty_like(state[name])
    module.load_state_dict(state)
    return module.eval()


def _form(tensor: Tensor | None) -> str | None:
    if tensor is None:
        return None
    kind = "floating-point" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
    return f"a {kind} tensor of shape {tuple(tensor.shape)}"
