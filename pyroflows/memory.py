"""A limit on the memory that building a module may take."""

import math
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from torch import Tensor

from pyroflows.private import DispatchMode

__all__ = ["MemoryLimit", "leaves"]

_OBJECT = 2**10  # bytes that each operation takes, whatever its size


class MemoryLimit(DispatchMode):
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


def leaves(value: Any) -> Iterator[Any]:
    """Iterate over the values in nested tuples, lists and dicts."""
    if isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    else:
        yield value


def _max_numbers(name: str, args: Any, kwargs: Any) -> int:
    """Return an upper bound of the number of numbers in the result of an operation."""
    shapes = [value.shape for value in leaves((args, kwargs)) if isinstance(value, Tensor)]
    sizes = [value for value in args if isinstance(value, (list, tuple)) and all(isinstance(n, int) for n in value)]
    if not shapes and not sizes:  # such as eye(n), randperm(n), tril_indices(rows, columns)
        numbers = math.prod(int(abs(value)) + 1 for value in args if isinstance(value, (int, float)))
        return {"eye": numbers**2, "tril_indices": 2 * numbers, "scalar_tensor": 1}.get(name, numbers)
    broadcast = math.prod(map(max, zip_longest(*map(reversed, shapes), fillvalue=1)))
    concatenated = sum(map(math.prod, shapes))
    return max(broadcast, concatenated, *(math.prod(map(abs, size)) for size in sizes))
