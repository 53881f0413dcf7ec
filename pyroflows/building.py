"""Modules built again from their recipes."""

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Size, Tensor, nn

from pyroflows.attributes import by_name, from_attributes, full_name
from pyroflows.memory import MemoryLimit
from pyroflows.recorded import makers

__all__ = ["Given", "build"]

# The bytes that building a module may take: a base, and a multiple of the bytes of its tensors. A constructor takes up
# to about 10 times the bytes of its tensors.
_BASE, _SHARE = 2**24, 64


def build(
    recipe: Any, tensors: Mapping[str, Tensor], classes: Sequence[type] = (), given: "Given | None" = None
) -> nn.Module:
    """Build the module of a recipe, without its state, and leave torch's random state alone."""
    memory = _BASE + _SHARE * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), MemoryLimit(memory):
            builder = _Builder(recipe, tensors, classes, given)
            module = builder.make(recipe)
            for names in recipe.get("ties", ()):
                _tie(module, names)
            return module
    except _RefusedError as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # its class depends on which argument makes no sense
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"expected the recipe of a module; got one that cannot be followed: {reason}") from None


def _tie(module: nn.Module, names: Sequence[str]) -> None:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name in names[1:]:
        owner, _, attribute = name.rpartition(".")
        if parameters[name].shape != parameters[names[0]].shape:
            raise ValueError(f"{name} has another shape than {names[0]}")
        module.get_submodule(owner).register_parameter(attribute, parameters[names[0]])


class _RefusedError(ValueError):
    """An error whose message is for the user."""


@dataclass
class Given:
    """A part of a module that the user may have built, its place in the module, and its own recipe."""

    place: Sequence[str]
    part: nn.Module | None = None
    recipe: Any = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    modules: Sequence[nn.Module] = ()  # of the part, in the order of their numbers

    def recipe_in(self, recipe: Any) -> Any:
        """Return the part's recipe in that of the module; None if it has none."""
        for name in self.place:
            groups = [recipe.get(key) for key in ("with", "modules")] if isinstance(recipe, dict) else []
            recipe = next((group[name] for group in groups if isinstance(group, dict) and name in group), None)
        return recipe if isinstance(recipe, dict) else None


class _Builder:
    """Makes the values of recipes; numbers the modules in the order in which they are made."""

    def __init__(self, recipe: Any, tensors: Mapping[str, Tensor], classes: Sequence[type], given: Given | None):
        self.tensors = tensors
        self.given = Given(()) if given is None else given
        self.place_recipe: Any = self.given.recipe_in(recipe) if self.given.place else None
        self.modules: list[Any] = []
        self.makers = makers()
        if self.given.part is not None and self.place_recipe is None:
            got = type(self.given.part).__name__
            raise _RefusedError(f"expected no {self.given.place[0]}, since the flow in the file has none; got {got}")
        if self.given.part is None and (omitted := _first_omitted(self.place_recipe)):
            raise _RefusedError(f"expected {self._call_of_part()}, since a file cannot hold {omitted}; got none")
        self.classes = self._choose_classes(recipe, classes)
        self.leaves: dict[str, Callable[[Any], Any]] = {
            "tensor": lambda name: self.tensors[name],
            "same": lambda number: self.modules[number],
            "list": lambda items: list(map(self.make, items)),
            "set": lambda items: set(map(self.make, items)),
            "frozenset": lambda items: frozenset(map(self.make, items)),
            "Size": lambda items: Size(map(self.make, items)),
            "dict": lambda pair: dict(zip(*map(self.make, pair), strict=True)),
            "OrderedDict": lambda pair: OrderedDict(zip(*map(self.make, pair), strict=True)),
            "partial": lambda items: _partial(*map(self.make, items)),
            "array": lambda name: self.tensors[name].numpy().copy(),
            "dtype": _dtype,
            "device": torch.device,
        }

    def make(self, recipe: Any) -> Any:
        if isinstance(recipe, list):
            return tuple(map(self.make, recipe))
        if not isinstance(recipe, dict):
            return recipe
        if recipe is self.place_recipe and self.given.part is not None:
            return self._check_part(recipe)
        if "name" in recipe:
            return self._named(recipe, recipe["name"])
        for key, read in self.leaves.items():
            if key in recipe:
                return read(recipe[key])
        value = self._from_attributes(recipe) if "attributes" in recipe else self._from_arguments(recipe)
        if isinstance(value, nn.Module):
            self.modules.append(value)
        return value

    def _from_arguments(self, recipe: dict[str, Any]) -> Any:
        maker = self._maker(recipe, recipe["make"])
        arguments = {name: self.make(value) for name, value in recipe["with"].items()}
        return maker(*arguments.pop("args", ()), **arguments)

    def _from_attributes(self, recipe: dict[str, Any]) -> Any:
        name = str(recipe["make"])
        kind = self.classes[_key(recipe, name)] if name.startswith("own.") else by_name(name)
        if not isinstance(kind, type):
            raise _RefusedError(f"expected the attributes of an object of a class of torch; got {name[:100]!r}")
        registered: dict[str, Any] = {}
        if issubclass(kind, nn.Module):
            parameters = {name: _empty(form, True) for name, form in recipe["parameters"].items()}
            buffers = {name: _empty(form, False) for name, form in recipe["buffers"].items()}
            unsaved = {name: self.make(value) for name, value in recipe["unsaved"].items()}
            registered = {
                "_parameters": parameters,
                "_buffers": {**buffers, **unsaved},
                "_non_persistent_buffers_set": set(unsaved),
                "_modules": {name: self.make(value) for name, value in recipe["modules"].items()},
            }
        attributes = {name: self.make(value) for name, value in recipe["attributes"].items()}
        return from_attributes(kind, attributes, registered)

    def _maker(self, recipe: dict[str, Any], name: Any) -> Callable[..., Any]:
        name = str(name)
        if name in self.makers:
            return self.makers[name]
        kind = by_name(name) if name.startswith("nn.") else self.classes.get(_key(recipe, name))
        if isinstance(kind, type):
            return kind
        raise _RefusedError(f"expected builders and classes of pyroflows and torch.nn; got {name[:100]!r}")

    def _named(self, recipe: dict[str, Any], name: Any) -> Any:
        name = str(name)
        value = self.makers.get(name, self.classes.get(_key(recipe, name), by_name(name)))
        if value is None:
            raise _RefusedError(f"expected names of pyroflows and torch; got {name[:100]!r}")
        return value[recipe["member"]] if "member" in recipe else value

    def _choose_classes(self, recipe: Any, classes: Sequence[Any]) -> dict[str, Any]:
        """Return the user's class for each that the recipe names, by its full name or else by its name alone."""
        nodes = list(_own_nodes(recipe, self.place_recipe if self.given.part is not None else None))
        named = {_key(node, name): name.removeprefix("own.") for node, name in nodes}
        chosen: dict[str, Any] = {}
        for key, name in named.items():
            same = [kind for kind in classes if kind.__name__ == name]
            exact = [kind for kind in same if full_name(kind) == key]
            is_alone = len(set(same)) == 1 and list(named.values()).count(name) == 1
            if exact or is_alone:
                chosen[key] = (exact or same)[0]
        if chosen.keys() < named.keys():
            in_place = {_key(node, name) for node, name in _own_nodes(self.place_recipe, None)}
            other_way = f", or {self._call_of_part()}" if in_place >= named.keys() else ""
            origins = ", ".join(key.removeprefix("own.") for key in named)
            got = ", ".join(map(full_name, classes)) or "none"
            raise _RefusedError(
                f"expected classes=[{', '.join(named.values())}]{other_way}, since the file names {origins}, of the "
                f"user's own; got {got}"
            )
        return chosen

    def _call_of_part(self) -> str:
        name = str(self.place_recipe.get("make", "")).rpartition(".")[2]
        call = f"{name}(...)" if name else "..."
        return f"{self.given.place[0]}={call}, built as it was"

    def _check_part(self, recipe: dict[str, Any]) -> nn.Module | None:
        """Return the part that the user built, if it is what the recipe says."""
        tensors = (self.tensors, self.given.tensors)
        different = _difference(recipe, self.given.recipe, ".".join(self.given.place), tensors, len(self.modules))
        if different is not None:
            raise _RefusedError(f"expected {different}")
        self.modules += self.given.modules
        return self.given.part


def _key(node: dict[str, Any], name: str) -> str:
    return str(node.get("from", name))


def _own_nodes(recipe: Any, other: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Iterate over what a recipe names of the user's own classes, except within another recipe."""
    for node in _nodes(recipe, other):
        name = node.get("make", node.get("name"))
        if isinstance(name, str) and name.startswith("own."):
            yield node, name


def _first_omitted(recipe: Any) -> str | None:
    return next((str(node["omitted"]) for node in _nodes(recipe, None) if "omitted" in node), None)


def _nodes(recipe: Any, other: Any) -> Iterator[dict[str, Any]]:
    """Iterate over a recipe and those within it, except for another."""
    if isinstance(recipe, list):
        for item in recipe:
            yield from _nodes(item, other)
    elif isinstance(recipe, dict) and recipe is not other:
        yield recipe
        for key, value in recipe.items():  # the keys of a group are the user's
            yield from _nodes(list(value.values()) if key in _GROUPS and isinstance(value, dict) else value, other)


def _partial(function: Callable[..., Any], args: Any, keywords: Any) -> Callable[..., Any]:
    return functools.partial(function, *args, **keywords)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} is no dtype")
    return dtype


def _empty(form: Any, is_parameter: bool) -> Tensor | None:
    if form is None:
        return None
    shape, name = form
    tensor = torch.empty(shape, dtype=_dtype(name))
    return nn.Parameter(tensor, tensor.is_floating_point() or tensor.is_complex()) if is_parameter else tensor


def _difference(
    expected: Any, got: Any, where: str, tensors: tuple[Mapping[str, Tensor], Mapping[str, Tensor]], first_number: int
) -> str | None:
    """Return the first difference between two recipes, as "this; got that"; None if there is none."""
    if isinstance(expected, dict) and isinstance(got, dict):
        if "tensor" in expected and "tensor" in got:
            same = _are_close(tensors[0][expected["tensor"]], tensors[1][got["tensor"]])
            return None if same else f"the numbers that the file holds as {where}; got others"
        if "same" in expected and "same" in got:
            got = {"same": got["same"] + first_number}
        is_other = expected.get("make") != got.get("make")
        if not is_other and {"with", "attributes"} & (expected.keys() ^ got.keys()):
            return None  # an older file: its tensors decide
        pairs = []
        for key in [] if is_other else dict.fromkeys([*expected, *got]):
            a, b = expected.get(key), got.get(key)
            if key in _GROUPS and isinstance(a, dict) and isinstance(b, dict):
                names = {name: f"{where}.{name}".removesuffix(".args") for name in (*a, *b)}
                pairs += [(a.get(name), b.get(name), place) for name, place in names.items()]
            elif key != "from":
                pairs.append((a, b, where))
    elif isinstance(expected, list) and isinstance(got, list) and len(expected) == len(got):
        is_other = False
        pairs = [(a, b, f"{where}[{number}]") for number, (a, b) in enumerate(zip(expected, got, strict=True))]
    else:
        pairs, is_other = [], repr(expected) != repr(got) and not (expected in _FLOATS and got in _FLOATS)
    if is_other:
        return f"{_brief(expected)} as {where}, by the recipe; got {_brief(got)}"
    found = (_difference(*pair, tensors, first_number) for pair in pairs)
    return next((difference for difference in found if difference is not None), None)


_GROUPS = ("with", "attributes", "parameters", "buffers", "unsaved", "modules")
_FLOATS = ["float16", "bfloat16", "float32", "float64"]


def _brief(recipe: Any) -> str:
    name = recipe.get("make") if isinstance(recipe, dict) else None
    return str(name).removeprefix("own.") if name else "none" if recipe is None else repr(recipe)[:100]


def _are_close(first: Tensor, second: Tensor) -> bool:
    second = second.detach().to("cpu", first.dtype)
    if first.shape != second.shape or not first.is_floating_point():
        return torch.equal(first, second)
    return torch.allclose(first, second, equal_nan=True)
