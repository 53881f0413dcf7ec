"""Batches of a Parquet file that does not fit into memory."""

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from pyarrow import ArrowException
from pyarrow.parquet import ParquetFile
from pyarrow.types import is_boolean, is_decimal, is_floating, is_integer

from pyroflows import distributed
from pyroflows.arguments import check_sizes

__all__ = ["ParquetBatches"]


class ParquetBatches:
    """Shuffled batches of the rows of a Parquet file, for ``fit``, with a few row groups in memory at a time.

    Each pass reads the row groups in a new order, shuffles rows among those read together, and drops the last rows,
    which are too few for a batch. Each of several processes reads only its own rows.

    Args:
        path: the file.
        batch_size: rows of a batch, over all processes.
        columns: names of the columns of the data; None for all but those of the context.
        context: names of the columns of the context.
        buffer_rows: rows in memory at a time, among which they are shuffled; row groups are read as a whole.

    Shapes:
        batches: ``(rows, columns)``, or pairs of that and ``(rows, context)``.

    Raises:
        ValueError: there is no such file or column, a column does not hold numbers, the file is damaged, or it has
            fewer rows than a batch.

    Example:
        >>> import tempfile, pyarrow as pa, pyarrow.parquet as pq
        >>> table = pa.table({"a": np.arange(100.0), "b": np.arange(100.0)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pq.write_table(table, f"{folder}/table.parquet", row_group_size=30)
        ...     [batch.shape for batch in ParquetBatches(f"{folder}/table.parquet", 40)]
        [(40, 2), (40, 2)]
    """

    sharded = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        batch_size: int,
        *,
        columns: Sequence[str] | None = None,
        context: Sequence[str] = (),
        buffer_rows: int = 2**18,
    ):
        check_sizes(batch_size=batch_size, buffer_rows=buffer_rows)
        self.path, self.batch_size, self.buffer_rows = os.fspath(path), batch_size, buffer_rows
        self.context = list(context)
        with self._open() as file:
            names = file.schema_arrow.names
            self.columns = [n for n in names if n not in self.context] if columns is None else list(columns)
            for name in (*self.columns, *self.context):
                if name not in names:
                    raise ValueError(f"expected a column {name!r} in {path}; got {', '.join(map(repr, names[:20]))}")
                kind = file.schema_arrow.field(names.index(name)).type
                if not any(is_kind(kind) for is_kind in (is_floating, is_integer, is_boolean, is_decimal)):
                    raise ValueError(f"expected columns of numbers in {path}; got {name!r} of {kind}")
            if not self.columns:
                raise ValueError(f"expected at least one column of data in {path}; got none")
            self.sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        if sum(self.sizes) < batch_size:
            raise ValueError(f"expected at least batch_size={batch_size} rows in {path}; got {sum(self.sizes)}")

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with ParquetFile(self.path) as file:
                yield file
        except (OSError, ArrowException) as error:
            raise ValueError(f"expected a Parquet file; got {self.path}: {str(error).splitlines()[0]}") from None

    def __len__(self) -> int:
        return sum(self.sizes) // self.batch_size

    def __iter__(self) -> Iterator[Any]:
        seed, steps = int(torch.randint(2**62, ())), len(self)  # the same in all processes
        order = np.random.default_rng(seed).permutation(len(self.sizes))
        # In the order of this pass the rows of a process are contiguous.
        mine = distributed.rank_slice(self.batch_size)
        size = mine.stop - mine.start
        waiting: list[np.ndarray] = []
        generator = np.random.default_rng((seed, distributed.rank()))
        for rows in self._read(order, steps * mine.start, steps * mine.stop):
            waiting.append(rows)
            if sum(map(len, waiting)) >= max(self.buffer_rows, size):
                waiting = yield from self._batches(waiting, size, generator)
        if waiting:
            yield from self._batches(waiting, size, generator)

    def _read(self, order: np.ndarray, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yield the rows from start to stop of the row groups in this order."""
        names = [*self.columns, *self.context]
        with self._open() as file:
            for group in order:
                size = self.sizes[group]
                if start < size and stop > 0:
                    table = file.read_row_group(int(group), columns=names)
                    table = table.slice(max(start, 0), min(stop, size) - max(start, 0))
                    yield np.stack([table.column(name).cast("float64", safe=False).to_numpy() for name in names], 1)
                start, stop = start - size, stop - size

    def _batches(self, waiting: list[np.ndarray], size: int, generator: Any) -> Generator[Any, None, list[np.ndarray]]:
        rows = generator.permutation(np.concatenate(waiting))
        stop = len(rows) - len(rows) % size
        for start in range(0, stop, size):
            batch, number = rows[start : start + size], len(self.columns)
            yield (batch[:, :number], batch[:, number:]) if self.context else batch
        return [rows[stop:]] if stop < len(rows) else []
