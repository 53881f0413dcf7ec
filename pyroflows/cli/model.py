"""The flow of a table in a model file: which columns it takes, and how their cells become numbers."""

import contextlib
import math
import os
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from pyroflows.cli.output import Progress, is_first
from pyroflows.contexts import seeded
from pyroflows.data.table_files import TableFile, open_table, write_table
from pyroflows.distributed import choose_device, in_turn, initialize
from pyroflows.flow import Flow, load

__all__ = [
    "TableModel",
    "check_target",
    "context_of",
    "device_of",
    "load_model",
    "model_file",
    "number_of_parameters",
    "sample_rows",
    "save_model",
    "write_chunks",
]

_ROWS = 8192
_NUMBERS = 2**19


@dataclass
class TableModel:
    """A flow in evaluation mode, and what its notes say of the table it was fitted to."""

    flow: Flow
    columns: list[str] | None  # names of its features; None if it was saved without
    given: list[str] = field(default_factory=list)  # names of the columns of its context
    categories: dict[str, list[str]] = field(default_factory=dict)  # labels of each of these that holds labels

    @property
    def names(self) -> list[str]:
        """A name for each feature."""
        return self.columns or [str(place) for place in range(self.flow.event_shape[0])]

    @property
    def integers(self) -> list[str]:
        """The names of the features that are dequantized."""
        steps = getattr(self.flow.dequantizer, "steps", None)
        return [] if steps is None else [n for n, step in zip(self.names, steps.tolist(), strict=True) if step]

    @torch.no_grad()
    def log_prob(self, cells: np.ndarray, draws: int) -> np.ndarray:
        """Score rows; whole numbers by the logarithm of the mean over draws of noise, a lower bound."""
        log_probs = []
        for x, context in map(self.split, self._chunks(cells)):
            if self.flow.dequantizer is None:
                log_probs.append(self.flow.log_prob(x, context))
            else:
                bounds = [self.flow.dequantized_log_prob(x, context) for _ in range(draws)]
                log_probs.append(torch.stack(bounds).logsumexp(0) - math.log(draws))
        return torch.cat(log_probs).cpu().numpy()

    @torch.no_grad()
    def sample(self, given: np.ndarray) -> np.ndarray:
        """Draw a row for each row of the given columns, of which there may be none, and append these."""
        chunks = []
        for rows in self._chunks(given):
            context = self.context(rows)
            x = self.flow.sample((len(rows),) if context is None else (), context)
            chunks.append(x if self.flow.dequantizer is None else self.flow.dequantizer.quantize(x))  # type: ignore[operator]
        samples = torch.cat(chunks).cpu().numpy()
        return np.concatenate([samples, given.astype(samples.dtype)], axis=1)

    def map_chunks(
        self, function: Callable[[np.ndarray], np.ndarray], chunks: Iterable[np.ndarray], seed: int, progress: Progress
    ) -> Iterator[np.ndarray]:
        """Apply a function to chunks of rows, each with a seed of its own; the processes of torchrun take turns."""

        def apply(numbered: tuple[int, np.ndarray]) -> np.ndarray:
            number, chunk = numbered
            chunk_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
            with seeded(chunk_seed, self.flow.device):
                return function(chunk)

        for result in in_turn(apply, enumerate(chunks)):
            progress.add(len(result))
            yield result

    def _chunks(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return rows in the chunks in which they are evaluated, so that activations fit into a CPU's caches."""
        factor = 1 if self.flow.device.type == "cpu" else 8
        size = max(1, factor * min(_ROWS, _NUMBERS // len(self.names)))
        return np.split(rows, range(size, len(rows), size))

    def open(self, path: str, *, given_alone: bool = False) -> TableFile:
        """Open a table with the model's columns; those of an array without names count in their order."""
        dtype = str(self.flow.dtype).removeprefix("torch.")
        if self.columns is None:
            table = open_table(path, dtype=dtype)
            features = self.flow.event_shape[0] + self.flow.context_features
            if len(table.columns) != features:
                raise ValueError(f"expected {features} columns in {table.name}; got {len(table.columns)}")
        else:
            columns = self.given if given_alone else [*self.names, *self.given]
            table = open_table(path, categories=dict(self.categories), dtype=dtype)
            table.select(columns if table.named or len(table.columns) != len(columns) else table.columns)
        steps, offset = (getattr(self.flow.dequantizer, name, None) for name in ("steps", "offset"))
        if not given_alone and isinstance(steps, Tensor) and isinstance(offset, Tensor):
            places = ((steps == 1) & (offset == 0)).nonzero()[:, 0].tolist()
            table.integers = {table.columns[place] for place in places}
        return table

    def split(self, cells: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Return the data and the context of rows, on the flow's device."""
        features = len(self.names)
        x = torch.from_numpy(cells[:, :features]).to(self.flow.device, self.flow.dtype)
        return x, self.context(cells[:, features:])

    def context(self, given: np.ndarray) -> Tensor | None:
        """Return the context of rows of the given columns."""
        if not given.shape[1]:
            return None
        context = torch.from_numpy(context_of(given, self.given, self.categories))
        return context.to(self.flow.device, self.flow.dtype if context.is_floating_point() else None)


def context_of(given: np.ndarray, names: list[str], categories: dict[str, list[str]]) -> np.ndarray:
    """Return the context of rows: the labels of a single column of labels; else numbers, with labels one-hot."""
    if list(categories) == names and len(names) == 1:
        return given[:, 0].astype(np.int64)
    parts = [
        np.eye(len(categories[name]))[given[:, place].astype(int)] if name in categories else given[:, place, None]
        for place, name in enumerate(names)
    ]
    return np.concatenate(parts, axis=1) if parts else given


def sample_rows(table: TableFile, number: int, seed: int) -> np.ndarray:
    """Draw rows of a table at random, in one pass, with memory for these alone."""
    rng = np.random.default_rng(seed)
    rows, keys = np.empty((0, len(table.columns))), np.empty(0)
    for chunk in table.chunks():
        rows, keys = np.concatenate([rows, chunk]), np.concatenate([keys, rng.random(len(chunk))])
        smallest = np.argsort(keys)[:number]
        rows, keys = rows[smallest], keys[smallest]
    return rows


def number_of_parameters(flow: Flow) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in flow.parameters())


@contextlib.contextmanager
def model_file(path: str | Path) -> Iterator[Path]:
    """Yield the file of a model, also of one on standard input."""
    if path != "-":
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "standard input"
        file.write_bytes(sys.stdin.buffer.read())
        yield file


def device_of(name: str) -> torch.device:
    """Return the device of an option, and join the processes of torchrun, each of which has its own."""
    device = choose_device(name)
    initialize(device)
    return device


def load_model(path: str | Path, device: str) -> TableModel:
    """Load a model of a table, also from standard input."""
    with model_file(path) as file:
        flow = load(file, device=device_of(device)).eval()
    if len(flow.event_shape) != 1:
        raise ValueError(f"expected a flow of the rows of a table in {path}; got one of {tuple(flow.event_shape)}")
    columns, given, categories = (flow.notes.get(name) for name in ("columns", "given", "categories"))
    if not _are_texts(columns) or len(columns) != flow.event_shape[0]:
        return TableModel(flow, None)  # the notes, if any, are not those of `pyroflows fit`
    if not _are_texts(given) or not isinstance(categories, dict) or not all(map(_are_texts, categories.values())):
        raise ValueError(f"expected given columns and categories among the notes of {path}; got {given}, {categories}")
    return TableModel(flow, columns, given, categories)


def _are_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def write_chunks(path: str | None, columns: list[str], chunks: Iterable[np.ndarray], **options: Any) -> None:
    """Write a table on the first process; the others, or all if there is no path, only compute the chunks."""
    if path is not None and is_first():
        write_table(path, columns, chunks, **options)
    else:
        deque(chunks, maxlen=0)


def check_target(path: str, *sources: str | None) -> None:
    """Refuse, before any work, a path that cannot be written to or that is read from."""
    for source in sources:
        if source is not None and os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
            raise ValueError(f"expected an output other than the files that are read; got {path} as both")
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
