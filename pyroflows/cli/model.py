"""The flow of a table in a model file: which columns it takes, and how their cells become numbers."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from pyroflows.data.table_files import TableFile, open_table
from pyroflows.distributed import choose_device, initialize
from pyroflows.flow import Flow, load

__all__ = [
    "Model",
    "check_device",
    "check_target",
    "context_of",
    "device_of",
    "load_model",
    "model_file",
    "save_model",
    "some_rows",
]

_ROWS = 8192
_NUMBERS = 2**19


@dataclass
class Model:
    """A flow, and what its notes say of the table it was fitted to.

    Args:
        flow: the flow, in evaluation mode.
        columns: the names of its features; None for those of a flow that was saved without.
        given: the names of the columns of its context.
        categories: the labels of each of these that holds labels.
    """

    flow: Flow
    columns: list[str] | None
    given: list[str] = field(default_factory=list)
    categories: dict[str, list[str]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """A name for each feature."""
        return self.columns or [str(place) for place in range(self.flow.event_shape[0])]

    @property
    def integers(self) -> list[str]:
        """The names of the features that are dequantised."""
        steps = getattr(self.flow.dequantizer, "steps", None)
        return [] if steps is None else [n for n, step in zip(self.names, steps.tolist(), strict=True) if step]

    @torch.no_grad()
    def log_prob(self, chunk: np.ndarray[Any, Any], draws: int) -> np.ndarray[Any, Any]:
        """Score rows, of whole numbers by the logarithm of the mean over draws of noise, a lower bound."""
        x, context = self.split(chunk)
        found = []
        for rows in self._parts(len(x)):
            part, given = x[rows], None if context is None else context[rows]
            if self.flow.dequantizer is None:
                found.append(self.flow.log_prob(part, given))
            else:
                each = [self.flow.dequantized_log_prob(part, given) for _ in range(draws)]
                found.append(torch.stack(each).logsumexp(0) - math.log(draws))
        return torch.cat(found).cpu().numpy()

    @torch.no_grad()
    def sample(self, cells: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Draw a row for each row of the given columns, of which there may be none, and put those behind."""
        context = self.context(cells)
        found = []
        for rows in self._parts(len(cells)):
            if context is None:
                x = self.flow.sample((rows.stop - rows.start,))
            else:
                x = self.flow.sample((), context[rows])
            found.append(x if self.flow.dequantizer is None else self.flow.dequantizer.quantize(x))  # type: ignore[operator]
        drawn = torch.cat(found).cpu().numpy()
        return np.concatenate([drawn, cells.astype(drawn.dtype)], axis=1)

    def _parts(self, rows: int) -> list[slice]:
        """Give the parts in which rows are evaluated: on a CPU, what a network makes of them has to fit into caches."""
        times = 1 if self.flow.device.type == "cpu" else 8
        size = max(1, times * min(_ROWS, _NUMBERS // len(self.names)))
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]

    def open(self, path: str, *, given_alone: bool = False) -> TableFile:
        """Open a table with the model's columns, which of an array without names count in their order."""
        dtype = str(self.flow.dtype).removeprefix("torch.")
        wanted = self.given if given_alone else [*self.names, *self.given]
        if self.columns is not None:
            table = open_table(path, categories=dict(self.categories), dtype=dtype)
            table.select(wanted if table.named or len(table.columns) != len(wanted) else table.columns)
            return table if given_alone else self._whole(table)
        table = open_table(path, dtype=dtype)
        features = self.flow.event_shape[0] + self.flow.context_features
        if len(table.columns) != features:
            raise ValueError(f"expected {features} columns in {table.name}; got {len(table.columns)}")
        return self._whole(table)

    def _whole(self, table: TableFile) -> TableFile:
        """Let a table refuse other numbers than whole ones where the flow takes no others."""
        steps, offset = (getattr(self.flow.dequantizer, name, None) for name in ("steps", "offset"))
        if isinstance(steps, Tensor) and isinstance(offset, Tensor):
            places = ((steps == 1) & (offset == 0)).nonzero()[:, 0].tolist()
            table.whole = {table.columns[place] for place in places}
        return table

    def split(self, chunk: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor | None]:
        """Give the data and the context of rows, where the flow is."""
        features = len(self.names)
        x = torch.from_numpy(chunk[:, :features]).to(self.flow.device, self.flow.dtype)
        return x, self.context(chunk[:, features:])

    def context(self, cells: np.ndarray[Any, Any]) -> Tensor | None:
        """Give the context of rows of the given columns."""
        if not cells.shape[1]:
            return None
        context = context_of(cells, self.given, self.categories)
        return context.to(self.flow.device, self.flow.dtype if context.is_floating_point() else None)


def context_of(cells: np.ndarray[Any, Any], given: list[str], categories: dict[str, list[str]]) -> Tensor:
    """Give the context of rows: labels where one column of labels is all; else numbers, with labels one-hot."""
    if list(categories) == given and len(given) == 1:
        return torch.from_numpy(cells[:, 0].astype(np.int64))
    parts = []
    for place, name in enumerate(given):
        column = cells[:, place]
        parts.append(np.eye(len(categories[name]))[column.astype(int)] if name in categories else column[:, None])
    return torch.from_numpy(np.concatenate(parts, axis=1) if parts else cells)


def some_rows(table: TableFile, rows: int, seed: int) -> np.ndarray[Any, Any]:
    """Draw rows of a table at random, in one pass, with memory for these alone."""
    random = np.random.default_rng(seed)
    kept, keys = np.empty((0, len(table.columns))), np.empty(0)
    for chunk in table.chunks():
        kept, keys = np.concatenate([kept, chunk]), np.concatenate([keys, random.random(len(chunk))])
        smallest = np.argsort(keys)[:rows]
        kept, keys = kept[smallest], keys[smallest]
    return kept


@contextlib.contextmanager
def model_file(path: str) -> Iterator[Path]:
    """Give the file of a model, also of one on standard input."""
    if path != "-":
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "standard input"
        file.write_bytes(sys.stdin.buffer.read())
        yield file


def device_of(name: str) -> torch.device:
    """Give the device of an option, "auto" that of a GPU where there is one; of several processes each has its own."""
    check_device(name)
    device = choose_device(name)
    initialize(device)
    return device


def check_device(name: str) -> None:
    """Refuse a device that torch does not see."""
    if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not torch.mps.is_available()):
        raise ValueError(f"expected a device that torch sees; got --device {name}, of which there is none")


def load_model(path: str | Path, device: str) -> Model:
    """Load a model of a table."""
    flow = load(path, device=device_of(device))
    if len(flow.event_shape) != 1:
        raise ValueError(f"expected a flow of the rows of a table in {path}; got one of {tuple(flow.event_shape)}")
    columns, given, categories = (flow.notes.get(name) for name in ("columns", "given", "categories"))
    if not _are_texts(columns) or len(columns) != flow.event_shape[0]:
        return Model(flow.eval(), None)  # the notes, if any, are another's
    if not _are_texts(given) or not isinstance(categories, dict) or not all(map(_are_texts, categories.values())):
        raise ValueError(f"expected given columns and categories among the notes of {path}; got {given}, {categories}")
    return Model(flow.eval(), columns, given, categories)


def _are_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def check_target(path: str, *sources: str | None) -> None:
    """Refuse a path that cannot be written to, or that is read from, before time goes into what is to be written."""
    for source in sources:
        if source is not None and os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
            raise ValueError(f"expected an output other than what is read; got {path} as both")
    folder = Path(path).absolute().parent
    if path != "-" and (not folder.is_dir() or Path(path).is_dir() or not os.access(folder, os.W_OK)):
        raise ValueError(f"expected the path of a file in a folder that can be written to; got {path}")


def save_model(flow: Flow, path: str, notes: dict[str, Any]) -> None:
    """Save a model, also to standard output."""
    if path != "-":
        flow.save(path, notes=notes)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        flow.save(file, notes=notes)
        sys.stdout.buffer.write(file.read_bytes())
        sys.stdout.buffer.flush()
