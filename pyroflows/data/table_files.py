"""Tables in files: CSV, Parquet, NPY and NPZ, read and written in chunks, so that they may be of any size."""

import csv
import io
import math
import os
import re
import shutil
import sys
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import csv as arrow_csv
from pyarrow import parquet

from pyroflows.arguments import check_sizes
from pyroflows.files import replacing

__all__ = ["CellError", "TableFile", "open_table", "write_table"]

# The option of pandas.read_csv to read each number exactly, which is the default from pandas 3.1 on.
_PANDAS = tuple(map(int, pd.__version__.split(".")[:2]))
_EXACT_FLOATS: dict[str, Any] = {} if _PANDAS >= (3, 1) else {"float_precision": "round_trip"}
# Columns that are written as integers (None), or as the labels of which their numbers are the positions.
_Kinds = Mapping[str, Sequence[str] | None]

_NUMBERS = 2**22  # most in a chunk
_MAX_CATEGORIES = 1000
_EXACT = 2**53  # from here on a float64 may be the rounding of another integer


class CellError(ValueError):
    """A cell that is not a number or a label, with its column, and whether the first row has text there too."""

    def __init__(self, message: str, column: str, is_text: bool):
        super().__init__(message)
        self.column, self.is_text = column, is_text


class TableFile:
    """The numbers of a table in a file, as :func:`open_table` returns it; a subclass reads one format."""

    format: str
    name: str
    names: list[str]  # of all columns in the file
    num_rows: int | None = None
    named = True

    def prepare(self, columns: Sequence[str] | None, categories: _Kinds, dtype: str) -> "TableFile":
        """Choose what is read, see :func:`open_table`, and check that it is there."""
        self._dtype, self._largest = dtype, float(np.finfo(dtype).max)
        for column, number in Counter(self.names).items():
            if column and number > 1:
                raise ValueError(f"expected columns of different names in {self.name}; got {column!r} {number} times")
        self.integers: set[str] = set()
        """The columns in which numbers that are not integers are refused."""
        self.categories = {name: list(labels or ()) for name, labels in categories.items()}
        self._found = {name for name in categories if categories[name] is None}
        self._check_names(categories)
        if self.num_rows == 0:
            raise self._no_rows()
        return self.select(self.names if columns is None else columns)

    def select(self, columns: Sequence[str]) -> "TableFile":
        """Read these columns only, in this order."""
        self._check_names(columns)
        self.columns = list(columns)
        return self

    def _check_names(self, columns: Iterable[str]) -> None:
        for column in columns:
            if column not in self.names:
                got = ", ".join(map(repr, self.names[:20])) + (", ..." if len(self.names) > 20 else "")
                raise ValueError(f"expected a column {column!r} in {self.name}; got {got}")

    def chunks(self, rows: int = 65536) -> Iterator[np.ndarray]:
        """Yield at most ``rows`` rows at a time, fewer of a wide table, as float64 of shape ``(rows, columns)``.

        Labels become their positions in ``categories``, to which new ones are added if they are to be found.
        """
        check_sizes(rows=rows)
        if "" in self.columns:
            got = f"none for column {self.names.index('') + 1}: choose columns by name"
            raise ValueError(f"expected a name for each column of {self.name}; got {got}")
        rows = max(1, min(rows, _NUMBERS // len(self.names)))
        start = 0
        for frame in self._frames(rows, self.columns, self.categories):
            if len(frame):
                yield self._numbers(frame, start)
                start += len(frame)
        if not start:
            raise self._no_rows()

    def read(self) -> np.ndarray:
        """Return all rows."""
        return np.concatenate(list(self.chunks()))

    def _numbers(self, frame: Any, start: int) -> np.ndarray:
        numbers = np.empty((len(frame), len(self.columns)))
        for place, name in enumerate(self.columns):
            cells = frame.iloc[:, place]
            numbers[:, place] = self._codes(cells, name) if name in self.categories else _as_numbers(cells)
        is_integer = np.array([name in self.integers for name in self.columns], bool)
        bad = np.argwhere(~(np.abs(numbers) <= self._largest) | (is_integer & (numbers != numbers.round())))
        if len(bad):
            row, place = bad[0]
            raise self._refusal(frame.iloc[row, place], self.columns[place], start + int(row))
        return numbers

    def _codes(self, cells: Any, name: str) -> Any:
        labels, known = cells.map(_as_label, na_action="ignore"), self.categories[name]
        if name in self._found:
            known += [label for label in labels.dropna().unique() if label not in known]
            if len(known) > _MAX_CATEGORIES:
                expected = f"expected at most {_MAX_CATEGORIES} categories in column {name!r} of {self.name}"
                raise ValueError(f"{expected}; got more")
        return labels.map({label: code for code, label in enumerate(known)}).astype(np.float64)

    def _refusal(self, cell: Any, name: str, row: int) -> CellError:
        is_text, missing = False, pd.api.types.is_scalar(cell) and pd.isna(cell)
        if missing:
            got = "a missing value"
        elif isinstance(cell, (int, float, np.number)):
            why = ", which a float64 does not hold exactly," if abs(float(cell)) >= _EXACT else ""
            why = f", beyond the range of {self._dtype}," if abs(float(cell)) > self._largest else why
            got = f"{cell}{why if np.isfinite(cell) else ''}"
        else:
            is_text, got = row == 0, repr(str(cell)[:60])
        expected = "whole numbers" if name in self.integers else "numbers"
        if name in self.categories:
            known = self.categories[name]
            expected = "labels" if missing else "one of the categories " + ", ".join(map(repr, known[:10]))
            expected += ", ..." if len(known) > 10 and not missing else ""
        line = self._line(row)
        place = f"row {row + 1}" if line is None else f"row {row + 1} (line {line})"
        return CellError(f"expected {expected} in column {name!r} of {self.name}; got {got} in {place}", name, is_text)

    def _no_rows(self) -> ValueError:
        return ValueError(f"expected at least one row in {self.name}; got none")

    def _unreadable(self, reason: object) -> ValueError:
        text = " ".join(str(reason).split()).rstrip(".") or type(reason).__name__
        return ValueError(f"expected {self.format}; got {self.name}, which is not a valid one ({text})")

    def _frames(self, rows: int, columns: list[str], labels: Iterable[str]) -> Iterator[Any]:
        """Yield the columns of at most ``rows`` rows at a time; ``labels`` are columns of text."""
        raise NotImplementedError

    def _line(self, row: int) -> int | None:
        """Return the line of a row in a file of text, to say where something is."""
        return None


def open_table(
    path: str | os.PathLike[str],
    columns: Sequence[str] | None = None,
    categories: Mapping[str, Sequence[str] | None] | None = None,
    *,
    dtype: str = "float64",
) -> TableFile:
    """Open a table; only names and sizes are read until its rows are asked for.

    A CSV file begins with a line of names. The columns of an array are named "0", "1" and so on, unless it is a
    structured array, which has names. Nothing is ever unpickled.

    Args:
        path: a file that ends in ``.csv``, ``.parquet``, ``.npy`` or ``.npz`` (``file.npz:name`` if it holds several
            arrays), or ``-`` for CSV on standard input, which can be read once.
        columns: names of the columns to read; by default all.
        categories: for columns that hold labels, such as names of species, these in the order of their codes, or None
            to find them.
        dtype: dtype that the numbers will be cast to, "float32" or "float64"; none may be beyond its range.

    Returns:
        The table: ``columns``, ``num_rows`` (None if that takes reading all), ``named`` (whether the file names its
        columns), ``categories``, ``chunks(rows)`` and ``read()``.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: another ending, a file of another format, no row, or a column that is not there or has no name or
            that of another; and on reading a missing value, text, an infinity, a number out of range, an unknown label
            or a row of another length, by row and column.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "pets.csv")
        ...     _ = Path(path).write_text("kind,age,name\\ncat,3,Tom\\ndog,1.5,Rex\\n")
        ...     table = open_table(path, ["age", "kind"], {"kind": None})
        ...     table.read(), table.categories
        (array([[3. , 0. ], [1.5, 1. ]]), {'kind': ['cat', 'dog']})
    """
    text = os.fspath(path)
    array: str | None = None
    if ".npz:" in text and not os.path.exists(text):
        text, _, array = text.rpartition(":")
    if text != "-" and not os.path.exists(text):
        folder, name = os.path.split(text)
        near = get_close_matches(name, os.listdir(folder or ".") if os.path.isdir(folder or ".") else (), 1)
        hint = f": perhaps {os.path.join(folder, near[0])}" if near else ""
        raise FileNotFoundError(f"expected the file of a table; got {text}, which does not exist{hint}")
    table: TableFile
    if text == "-" or _ending(text) == ".csv":
        table = _Csv(None if text == "-" else Path(text))
    elif _ending(text) == ".parquet":
        table = _Parquet(Path(text))
    else:
        table = _Array(Path(text), array)
    return table.prepare(columns, categories or {}, dtype)


def write_table(
    path: str | os.PathLike[str],
    columns: Sequence[str],
    chunks: Iterable[np.ndarray],
    integers: Iterable[str] = (),
    categories: Mapping[str, Sequence[str]] | None = None,
) -> int:
    """Write a table chunk by chunk, and replace the file when it is complete.

    Args:
        path: a file that ends in ``.csv``, ``.parquet``, ``.npy`` or ``.npz``, or ``-`` for CSV on standard output. An
            array has no names; the one in an NPZ file is called ``data``.
        columns: a name for each column.
        chunks: arrays of float32 or of float64.
        integers: names of columns to write as integers, if the format has them.
        categories: labels of columns whose numbers are positions in a list of labels; an array keeps the numbers.

    Shapes:
        chunks: ``(rows, columns)``.

    Returns:
        The number of rows.

    Raises:
        OSError: the file cannot be written.
        ValueError: another ending, or a chunk of another shape.

    Example:
        >>> chunks = [np.array([[1.0, 0.5]]), np.array([[2.0, 0.25]])]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "sizes.csv")
        ...     write_table(path, ["count", "size"], chunks, integers=["count"]), Path(path).read_text()
        (2, 'count,size\\n1,0.5\\n2,0.25\\n')
    """
    columns, text = list(columns), os.fspath(path)
    kinds = {**dict.fromkeys(integers, None), **(categories or {})}
    write = _write_csv if text == "-" else _WRITERS[_ending(text)]
    rows = 0

    def checked() -> Iterator[np.ndarray]:
        nonlocal rows
        for chunk in chunks:
            if chunk.ndim != 2 or chunk.shape[1] != len(columns):
                raise ValueError(f"expected chunks of shape (rows, {len(columns)}); got {chunk.shape}")
            rows += len(chunk)
            yield chunk

    if text == "-":
        sys.stdout.flush()
        write(sys.stdout.buffer, columns, checked(), kinds)
        sys.stdout.buffer.flush()
    else:
        with replacing(text) as file:
            write(file, columns, checked(), kinds)
    return rows


class _Csv(TableFile):
    """Rows of text below a line of names, from a file, or from standard input if there is none."""

    format = "a CSV file in UTF-8"

    def __init__(self, path: Path | None):
        self.path: Any = path
        self.name = "standard input" if path is None else path.name
        self.standard_input = None if path else io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", newline="")
        with self._open() as file:
            self.names = next(csv.reader(file), [])
        if not self.names:
            raise ValueError(f"expected a first line of column names in {self.name}; got none")
        if len(self.names) == 1 and re.search("[;\t]", self.names[0]):
            raise ValueError(f"expected commas between the cells of {self.name}; got a first line {self.names[0]!r}")
        numbered = [str(place) for place in range(len(self.names))]
        if self.names != numbered and all(map(_is_number, self.names)):
            got = ", ".join(self.names[:5])
            raise ValueError(f"expected a first line of column names in {self.name}; got numbers: {got}")

    def _frames(self, rows: int, columns: list[str], labels: Iterable[str]) -> Iterator[Any]:
        warned = pd.errors.ParserWarning
        with self._open() as file:
            if file is not self.standard_input:
                next(csv.reader(file))
            try:
                chunks = pd.read_csv(
                    file,
                    names=range(len(self.names)),
                    header=None,
                    index_col=False,
                    **_EXACT_FLOATS,
                    dtype={self.names.index(name): str for name in labels},
                    chunksize=rows,
                    low_memory=False,  # one type for all cells of a chunk
                    skip_blank_lines=len(self.names) > 1,  # in a single column they are missing values
                )
                places = [self.names.index(name) for name in columns]
                while True:
                    with warnings.catch_warnings():
                        warnings.simplefilter("error", warned)
                        chunk = next(chunks, None)
                    if chunk is None:
                        return
                    yield chunk[places]
            except (pd.errors.ParserError, warned) as error:
                raise self._ragged(error) from None

    def _line(self, row: int) -> int | None:
        return next((line for number, line, _ in self._records() if number == row), None)

    def _records(self) -> Iterator[tuple[int, int, list[str]]]:
        """Yield number, last line and cells of each row; slow, used to say where something is."""
        if self.standard_input is not None:
            return
        with self._open() as file:
            reader = csv.reader(file)
            next(reader)
            for number, cells in enumerate(cells for cells in reader if cells or len(self.names) == 1):
                yield number, reader.line_num, cells

    def _ragged(self, error: Exception) -> ValueError:
        expected = f"expected {len(self.names)} cells in each row of {self.name}, as in its first line"
        for row, line, cells in self._records():
            if len(cells) != len(self.names):
                return ValueError(f"{expected}; got {len(cells)} in row {row + 1} (line {line})")
        place = re.search(r"in line (\d+), saw (\d+)", str(error))
        if place:
            return ValueError(f"{expected}; got {place[2]} in row {place[1]}")
        return ValueError(f"{expected}; got more") if isinstance(error, Warning) else self._unreadable(error)

    @contextmanager
    def _open(self) -> Iterator[Any]:
        """Yield the text from its start, or what is left of standard input, which stays open."""
        file = self.standard_input or self.path.open(encoding="utf-8-sig", newline="")
        try:
            yield file
        except (UnicodeDecodeError, csv.Error) as error:
            raise self._unreadable(error) from None
        finally:
            if file is not self.standard_input:
                file.close()


class _Parquet(TableFile):
    """The columns of a Parquet file, row group by row group."""

    format = "a Parquet file"

    def __init__(self, path: Path):
        self.path, self.name = path, path.name
        with self._open() as file:
            self.names = list(file.schema_arrow.names)
            self.num_rows = file.metadata.num_rows

    def _frames(self, rows: int, columns: list[str], labels: Iterable[str]) -> Iterator[Any]:
        with self._open() as file:
            for batch in file.iter_batches(rows, columns=columns, use_threads=False):
                yield batch.select(columns).to_pandas()

    @contextmanager
    def _open(self) -> Iterator[Any]:
        self.path.open("rb").close()  # raises the system's error
        try:
            with parquet.ParquetFile(self.path, buffer_size=2**20, pre_buffer=False) as file:
                yield file
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._unreadable(error) from None


class _Array(TableFile):
    """The rows of an array in an NPY file, or in an NPZ archive, where they are unpacked as they are read."""

    def __init__(self, path: Path, array: str | None):
        self.path, self.name, self.array = path, path.name, None
        self.format = f"an array of numbers in an {path.suffix[1:].upper()} file"
        path.open("rb").close()  # raises the system's error
        if _ending(path.name) == ".npz":
            self.array = self._choose(array)
            self.name = f"{path.name}:{self.array}"
        with self._open() as (_, shape, _, dtype):
            pass
        if dtype.hasobject:
            got = "one of Python objects, which are not unpickled"
            raise ValueError(f"expected an array of numbers in {self.name}; got {got}")
        self.named = dtype.names is not None and len(shape) == 1
        if not self.named and (len(shape) not in (1, 2) or not all(shape[1:])):
            raise ValueError(f"expected an array of shape (rows, columns) in {self.name}; got {shape}")
        self.names = list(dtype.names or ()) if self.named else [str(place) for place in range(math.prod(shape[1:]))]
        self.num_rows = shape[0]

    def _choose(self, array: str | None) -> str:
        """Return the name of the array to read from an archive."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                arrays = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        except Exception as error:  # what is raised depends on which byte is wrong
            raise self._unreadable(error) from None
        if array is None and len(arrays) == 1:
            return arrays[0]
        if array not in arrays:
            got = ", ".join(arrays) or "none"
            raise ValueError(f"expected one array in {self.name}, or its name, as in {self.name}:name; got {got}")
        return array

    def _frames(self, rows: int, columns: list[str], labels: Iterable[str]) -> Iterator[Any]:
        with self._open() as (file, shape, by_column, dtype):
            stored: np.ndarray | None = None
            if by_column and self.array is None:
                stored = np.memmap(self.path, dtype, "r", file.tell(), shape, "F")
            elif by_column:
                stored = _read(file, shape, dtype).reshape(shape[::-1]).T
            for start in range(0, shape[0], rows):
                size = (min(rows, shape[0] - start), *shape[1:])
                chunk = _read(file, size, dtype) if stored is None else stored[start : start + size[0]]
                chunk = chunk.astype(dtype.newbyteorder("="), copy=False)  # pandas 2 takes no other byte order
                if self.named:
                    yield pd.DataFrame({name: chunk[name] for name in columns})
                else:
                    yield pd.DataFrame(chunk.reshape(size[0], -1), columns=self.names, copy=False)[columns]

    @contextmanager
    def _open(self) -> Iterator[tuple[IO[bytes], tuple[int, ...], bool, np.dtype]]:
        """Yield the array's file, behind the header, with its shape, whether it is stored by column, and its dtype."""
        try:
            with ExitStack() as stack:
                if self.array is None:
                    file: IO[bytes] = stack.enter_context(self.path.open("rb"))
                    size = self.path.stat().st_size
                else:
                    archive = stack.enter_context(zipfile.ZipFile(self.path))
                    file = stack.enter_context(archive.open(f"{self.array}.npy"))
                    size = archive.getinfo(f"{self.array}.npy").file_size
                first = np.lib.format.read_magic(file) == (1, 0)
                read_header = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
                shape, by_column, dtype = read_header(file)
                if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > size - file.tell():
                    raise ValueError("it is truncated")
                yield file, shape, by_column, dtype
        except Exception as error:  # what is raised depends on which byte is wrong
            raise self._unreadable(error) from None


def _read(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.frombuffer(file.read(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


def _as_numbers(cells: Any) -> Any:
    """Return cells as float64, with nan for a cell that is not a number, or that a float64 does not hold exactly."""
    if cells.dtype.kind in "fb":
        return cells.to_numpy(np.float64)
    if cells.dtype.kind in "iu":
        numbers = cells.to_numpy(np.float64)
        return np.where(np.abs(numbers) >= _EXACT, np.nan, numbers)
    if cells.dtype.kind == "O":
        return pd.to_numeric(cells.map(str), errors="coerce").to_numpy(np.float64)
    return np.full(len(cells), np.nan)


def _as_label(cell: Any) -> str:
    if isinstance(cell, (float, np.floating)) and float(cell).is_integer():
        cell = int(cell)
    return str(cell).strip()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _ending(path: str) -> str:
    ending = Path(path).suffix.lower()
    if ending not in _WRITERS:
        raise ValueError(f"expected a table that ends in {', '.join(_WRITERS)}, or '-' for CSV; got {path}")
    return ending


def _arrow(chunk: np.ndarray, columns: list[str], kinds: _Kinds) -> Any:
    arrays = []
    for place, name in enumerate(columns):
        array = np.ascontiguousarray(chunk[:, place])
        labels = kinds.get(name)
        if labels is not None:
            arrays.append(pa.array([labels[code] for code in array.astype(np.int64).tolist()], pa.string()))
        else:
            arrays.append(pa.array(array.astype(np.int64) if name in kinds else array))
    return pa.Table.from_arrays(arrays, names=columns)


def _write_csv(file: IO[bytes], columns: list[str], chunks: Iterable[Any], kinds: _Kinds) -> None:
    head = io.StringIO()
    csv.writer(head, lineterminator="\n").writerow(columns)
    file.write(head.getvalue().encode())
    for chunk in chunks:
        text = io.BytesIO()
        arrow_csv.write_csv(_arrow(chunk, columns, kinds), text, arrow_csv.WriteOptions(include_header=False))
        file.write(text.getbuffer())


def _write_parquet(file: IO[bytes], columns: list[str], chunks: Iterable[Any], kinds: _Kinds) -> None:
    first, rest = _first(columns, chunks)
    table = _arrow(first, columns, kinds)
    with parquet.ParquetWriter(file, table.schema) as writer:
        writer.write_table(table)
        for chunk in rest:
            writer.write_table(_arrow(chunk, columns, kinds))


def _write_npy(file: IO[bytes], columns: list[str], chunks: Iterable[Any], kinds: _Kinds) -> None:
    first, rest = _first(columns, chunks)

    def write_header(rows: int) -> None:
        # It leaves room for a longer number of rows, so that its length stays the same.
        header = {"descr": first.dtype.str, "fortran_order": False, "shape": (rows, len(columns))}
        np.lib.format.write_array_header_1_0(file, header)

    write_header(0)
    rows = 0
    for chunk in chain([first], rest):
        file.write(np.ascontiguousarray(chunk, first.dtype).data)
        rows += len(chunk)
    file.seek(0)
    write_header(rows)


def _first(columns: list[str], chunks: Iterable[Any]) -> tuple[Any, Iterator[Any]]:
    """Return the first chunk, which says the types of all, and the others."""
    rest = iter(chunks)
    return next(rest, np.empty((0, len(columns)))), rest


def _write_npz(file: IO[bytes], columns: list[str], chunks: Iterable[Any], kinds: _Kinds) -> None:
    # The array is first written to a file of its own, since its header says how many rows there are.
    folder = os.path.dirname(os.path.abspath(file.name))
    with tempfile.TemporaryFile(dir=folder) as array:
        _write_npy(array, columns, chunks, kinds)
        array.seek(0)
        with zipfile.ZipFile(file, "w") as archive, archive.open("data.npy", "w", force_zip64=True) as member:
            shutil.copyfileobj(array, member, 2**20)


_WRITERS = {".csv": _write_csv, ".parquet": _write_parquet, ".npy": _write_npy, ".npz": _write_npz}
