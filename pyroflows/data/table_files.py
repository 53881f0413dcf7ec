"""Tables in files: CSV, Parquet, NPY and NPZ, read and written in chunks, so that a file of any size will do."""

from __future__ import annotations

import csv
import io
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
from pathlib import Path
from typing import IO, Any

import numpy as np

from pyroflows.arguments import check_sizes
from pyroflows.files import replacing

__all__ = ["CellError", "TableFile", "open_table", "write_table"]

_ENDINGS = (".csv", ".parquet", ".npy", ".npz")
# Which columns are written as integers (None), or as the labels whose places in a list their numbers are.
_Kinds = Mapping[str, Sequence[str] | None]

_NUMBERS = 2**22  # that a chunk has at most
_MAX_CATEGORIES = 1000
# From here on a float64 may be the rounding of another integer.
_EXACT = 2**53


class CellError(ValueError):
    """A cell that is no number or label; says in which column it is, and whether that holds text from the start."""

    def __init__(self, message: str, column: str, is_text: bool):
        super().__init__(message)
        self.column, self.is_text = column, is_text


class TableFile:
    """The numbers of a table in a file, of which :func:`open_table` makes one.

    Args:
        source: what reads the format.
        columns: the names of the columns wanted, in the order wanted; None for all.
        categories: the labels of each column of labels; None where they are to be found.
        dtype: in whose range the numbers have to be.
    """

    def __init__(
        self,
        source: _Csv | _Parquet | _Npy | _Npz,
        columns: Sequence[str] | None,
        categories: Mapping[str, Sequence[str] | None],
        dtype: str,
    ):
        self._source = source
        self._dtype, self._largest = dtype, float(np.finfo(dtype).max)
        self.name, self.num_rows, self.named = source.name, source.num_rows, source.named
        for column, number in Counter(source.columns).items():
            if column and number > 1:
                raise ValueError(f"expected columns of different names in {self.name}; got {column!r} {number} times")
        self.whole: set[str] = set()
        """The columns in which other numbers than whole ones are refused."""
        self.categories = {name: list(labels or ()) for name, labels in categories.items()}
        self._found = {name for name in categories if categories[name] is None}
        self.select(source.columns if columns is None else columns)
        self._check_names(categories)
        if self.num_rows == 0:
            raise self._no_rows()

    def select(self, columns: Sequence[str]) -> TableFile:
        """Take these columns alone, in this order."""
        self._check_names(columns)
        self.columns = list(columns)
        return self

    def _check_names(self, columns: Iterable[str]) -> None:
        known = self._source.columns
        for column in columns:
            if column not in known:
                got = ", ".join(map(repr, known[:20])) + (", ..." if len(known) > 20 else "")
                raise ValueError(f"expected a column {column!r} in {self.name}; got {got}")

    def chunks(self, rows: int = 65536) -> Iterator[np.ndarray[Any, Any]]:
        """Give the rows in parts of at most so many, fewer of a wide table, as float64 of shape ``(rows, columns)``.

        The cells of a column of labels are the labels' places in ``categories``, to which those that are to be found
        are added on the way.
        """
        check_sizes(rows=rows)
        if "" in self.columns:
            number = self._source.columns.index("") + 1
            raise ValueError(
                f"expected a name for each column of {self.name}; got none for column {number}: choose columns by name"
            )
        rows = max(1, min(rows, _NUMBERS // len(self._source.columns)))
        start = 0
        for frame in self._source.frames(rows, self.columns, self.categories):
            if len(frame):
                yield self._numbers(frame, start)
                start += len(frame)
        if not start:
            raise self._no_rows()

    def read(self) -> np.ndarray[Any, Any]:
        """Give all rows at once."""
        return np.concatenate(list(self.chunks()))

    def _numbers(self, frame: Any, start: int) -> np.ndarray[Any, Any]:
        numbers = np.empty((len(frame), len(self.columns)))
        for place, name in enumerate(self.columns):
            cells = frame.iloc[:, place]
            numbers[:, place] = self._codes(cells, name) if name in self.categories else _as_numbers(cells)
        whole = np.array([name in self.whole for name in self.columns], bool)
        bad = np.argwhere(~(np.abs(numbers) <= self._largest) | (whole & (numbers != numbers.round())))
        if len(bad):
            row, place = bad[0]
            raise self._refusal(frame.iloc[row, place], self.columns[place], start + int(row))
        return numbers

    def _codes(self, cells: Any, name: str) -> Any:
        labels, known = cells.map(_as_label, na_action="ignore"), self.categories[name]
        if name in self._found:
            known += [label for label in labels.dropna().unique() if label not in known]
            if len(known) > _MAX_CATEGORIES:
                raise ValueError(
                    f"expected at most {_MAX_CATEGORIES} categories in column {name!r} of {self.name}; got more"
                )
        return labels.map({label: code for code, label in enumerate(known)}).astype(np.float64)

    def _refusal(self, cell: Any, name: str, row: int) -> CellError:
        import pandas as pd

        is_text, missing = False, pd.api.types.is_scalar(cell) and pd.isna(cell)
        if missing:
            got = "a missing value"
        elif isinstance(cell, (int, float, np.number)):
            why = ", which a float64 does not hold exactly," if abs(float(cell)) >= _EXACT else ""
            why = f", beyond the range of {self._dtype}," if abs(float(cell)) > self._largest else why
            got = f"{cell}{why if np.isfinite(cell) else ''}"
        else:
            is_text, got = row == 0, repr(str(cell)[:60])
        wanted = "whole numbers" if name in self.whole else "numbers"
        if name in self.categories:
            known = self.categories[name]
            wanted = "labels" if missing else "one of the categories " + ", ".join(map(repr, known[:10]))
            wanted += ", ..." if len(known) > 10 and not missing else ""
        line = self._source.line(row)
        place = f"row {row + 1}" if line is None else f"row {row + 1} (line {line})"
        return CellError(f"expected {wanted} in column {name!r} of {self.name}; got {got} in {place}", name, is_text)

    def _no_rows(self) -> ValueError:
        return ValueError(f"expected at least one row in {self.name}; got none")


def open_table(
    path: str | os.PathLike[str],
    columns: Sequence[str] | None = None,
    categories: Mapping[str, Sequence[str] | None] | None = None,
    *,
    dtype: str = "float64",
) -> TableFile:
    """Open a table, of which only names and sizes are read until its rows are asked for.

    A CSV file begins with a line of names. The columns of an array are called "0", "1" and so on, but for those of a
    structured one, which have names. Nothing is ever unpickled.

    Args:
        path: a file that ends in ``.csv``, ``.parquet``, ``.npy`` or ``.npz`` (of several arrays ``file.npz:name``), or
            ``-`` for CSV on standard input, which can be read once.
        columns: the names of the columns wanted; by default all.
        categories: for columns that hold labels, such as names of species, these in the order of their codes, or None
            to find them.
        dtype: to which the numbers will be cast, "float32" or "float64": none may be beyond its range.

    Returns:
        The table: ``columns``, ``num_rows`` (None where that takes reading all), ``named`` (whether the file names its
        columns), ``categories``, ``chunks(rows)`` and ``read()``.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: another ending, a file that is not what its ending says, no row, a column that is not there or has
            no name or that of another; and on reading a missing value, text, an infinity, a number out of range, an
            unknown label or a row of other length, by row and column.

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
    source: _Csv | _Parquet | _Npy | _Npz
    if text == "-":
        source = _Csv(None)
    elif _ending(text) == ".csv":
        source = _Csv(Path(text))
    elif _ending(text) == ".parquet":
        source = _Parquet(Path(text))
    elif _ending(text) == ".npy":
        source = _Npy(Path(text))
    else:
        source = _Npz(Path(text), array)
    return TableFile(source, columns, categories or {}, dtype)


def write_table(
    path: str | os.PathLike[str],
    columns: Sequence[str],
    chunks: Iterable[np.ndarray[Any, Any]],
    integers: Iterable[str] = (),
    categories: Mapping[str, Sequence[str]] | None = None,
) -> int:
    """Write a table from chunks as they come, and put it in the file's place when it is whole.

    Args:
        path: a file that ends in ``.csv``, ``.parquet``, ``.npy`` or ``.npz``, or ``-`` for CSV on standard output. An
            array has no names; that of an NPZ file is called ``data``.
        columns: a name for each column.
        chunks: arrays of float32 or of float64.
        integers: the names of columns that are written as integers, where the format tells.
        categories: for columns whose numbers are places in a list of labels, the labels; an array keeps the numbers.

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

    def checked() -> Iterator[np.ndarray[Any, Any]]:
        nonlocal rows
        for chunk in chunks:
            if chunk.ndim != 2 or chunk.shape[1] != len(columns):
                raise ValueError(f"expected chunks of shape (rows, {len(columns)}); got {chunk.shape}")
            rows += len(chunk)
            yield chunk

    with _writing(text) as file:
        write(file, columns, checked(), kinds)
    return rows


class _Csv:
    """Rows of text under a line of names, from a file, or from standard input where there is none."""

    num_rows = None
    named = True

    def __init__(self, path: Path | None):
        self.path = path
        self.name = "standard input" if path is None else path.name
        file = self._open()
        try:
            self.columns = next(csv.reader(file), [])
        except (UnicodeDecodeError, csv.Error) as error:
            raise self._unreadable(error) from None
        finally:
            if path is not None:
                file.close()
        self.standard_input = file if path is None else None
        if not self.columns:
            raise ValueError(f"expected a first line of column names in {self.name}; got none")
        if len(self.columns) == 1 and re.search("[;\t]", self.columns[0]):
            raise ValueError(f"expected commas between the cells of {self.name}; got a first line {self.columns[0]!r}")
        numbered = [str(place) for place in range(len(self.columns))]
        if self.columns != numbered and all(map(_is_number, self.columns)):
            got = ", ".join(self.columns[:5])
            raise ValueError(f"expected a first line of column names in {self.name}; got numbers: {got}")

    def frames(self, rows: int, columns: list[str], labels: Iterable[str]) -> Iterator[Any]:
        import pandas as pd

        file = self.standard_input or self._open()
        if self.path is not None:
            next(csv.reader(file))
        warned = pd.errors.ParserWarning
        try:
            chunks = pd.read_csv(
                file,
                names=range(len(self.columns)),
                header=None,
                index_col=False,
                **_exact_floats(),
                dtype={self.columns.index(name): str for name in labels},
                chunksize=rows,
                low_memory=False,  # one type for all cells of a chunk
                skip_blank_lines=len(self.columns) > 1,  # which of a single column are missing values
            )
            places = [self.columns.index(name) for name in columns]
            while True:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", warned)
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                yield chunk[places]
        except (pd.errors.ParserError, warned) as error:
            raise self._ragged(error) from None
        except UnicodeDecodeError as error:
            raise self._unreadable(error) from None
        finally:
            if self.path is not None:
                file.close()

    def line(self, row: int) -> int | None:
        for number, line, _ in self._records():
            if number == row:
                return line
        return None

    def _records(self) -> Iterator[tuple[int, int, list[str]]]:
        """Give number, last line and cells of each row, slowly: to say where something is."""
        if self.path is None:
            return
        with self._open() as file:
            reader = csv.reader(file)
            next(reader)
            number = 0
            for cells in reader:
                if cells or len(self.columns) == 1:
                    yield number, reader.line_num, cells
                    number += 1

    def _ragged(self, error: Exception) -> ValueError:
        wanted = f"expected {len(self.columns)} cells in each row of {self.name}, as in its first line"
        for row, line, cells in self._records():
            if len(cells) > len(self.columns):
                return ValueError(f"{wanted}; got {len(cells)} in row {row + 1} (line {line})")
        found = re.search(r"in line (\d+), saw (\d+)", str(error))
        if found:
            return ValueError(f"{wanted}; got {found[2]} in row {found[1]}")
        if isinstance(error, Warning):
            return ValueError(f"{wanted}; got more")
        return self._unreadable(error)

    def _unreadable(self, error: Exception) -> ValueError:
        return ValueError(f"expected {self.name} as CSV in UTF-8; got something else ({_one_line(error)})")

    def _open(self) -> Any:
        if self.path is None:
            return io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", newline="")
        return self.path.open(encoding="utf-8-sig", newline="")


class _Parquet:
    """The columns of a Parquet file, row group by row group."""

    named = True

    def __init__(self, path: Path):
        self.path, self.name = path, path.name
        with self._open() as file:
            self.columns = list(file.schema_arrow.names)
            self.num_rows: int | None = file.metadata.num_rows

    def frames(self, rows: int, columns: list[str], labels: Iterable[str]) -> Iterator[Any]:
        import pyarrow as pa

        with self._open() as file:
            try:
                for batch in file.iter_batches(rows, columns=columns, use_threads=False):
                    yield batch.select(columns).to_pandas()
            except (pa.ArrowException, OSError, ValueError) as error:
                raise self._unreadable(error) from None

    def line(self, row: int) -> int | None:
        return None

    def _open(self) -> Any:
        import pyarrow as pa
        from pyarrow import parquet

        _check_access(self.path)
        try:
            return parquet.ParquetFile(self.path, buffer_size=2**20, pre_buffer=False)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> ValueError:
        return ValueError(
            f"expected a Parquet file; got {self.name}, which is none, or is damaged ({_one_line(error)})"
        )


class _Npy:
    """The rows of an array, which is mapped anew for each chunk, so that those read leave the memory."""

    def __init__(self, path: Path):
        self.path, self.name = path, path.name
        array = self._open()
        self.columns, self.named = _columns_of(array, self.name)
        self.num_rows: int | None = len(array)

    def frames(self, rows: int, columns: list[str], labels: Iterable[str]) -> Iterator[Any]:
        for start in range(0, self.num_rows or 0, rows):
            yield _frame(self._open()[start : start + rows], self.columns)[columns]

    def line(self, row: int) -> int | None:
        return None

    def _open(self) -> np.ndarray[Any, Any]:
        _check_access(self.path)
        try:
            return np.lib.format.open_memmap(self.path, mode="r")  # which refuses Python objects
        except Exception as error:  # what is raised depends on which byte is wrong
            raise self._unreadable(error) from None

    def _unreadable(self, why: object) -> ValueError:
        return ValueError(
            f"expected an array of numbers in an NPY file; got {self.name}, which is none ({_one_line(why)})"
        )


class _Npz:
    """The rows of one array of an archive, unpacked as they are read."""

    def __init__(self, path: Path, array: str | None):
        self.path, self.name = path, path.name
        _check_access(path)
        try:
            with zipfile.ZipFile(path) as archive:
                arrays = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        except Exception as error:
            raise self._unreadable(error) from None
        if array is None and len(arrays) == 1:
            array = arrays[0]
        if array not in arrays:
            got = ", ".join(arrays) or "none"
            raise ValueError(f"expected one array in {self.name}, or its name, as in {self.name}:name; got {got}")
        self.array = array
        self.name = f"{path.name}:{array}"
        with self._open() as (_, shape, _, dtype):
            sketch = np.empty((0, *shape[1:]), dtype) if shape else np.empty((), dtype)
        self.columns, self.named = _columns_of(sketch, self.name)
        self.num_rows: int | None = shape[0]

    def frames(self, rows: int, columns: list[str], labels: Iterable[str]) -> Iterator[Any]:
        with self._open() as (file, shape, by_column, dtype):
            whole = self._read(file, shape, dtype).reshape(shape[::-1]).T if by_column else None
            for start in range(0, shape[0], rows):
                number = min(rows, shape[0] - start)
                if whole is not None:
                    part = whole[start : start + number]
                else:
                    part = self._read(file, (number, *shape[1:]), dtype)
                yield _frame(part, self.columns)[columns]

    def line(self, row: int) -> int | None:
        return None

    @contextmanager
    def _open(self) -> Iterator[tuple[IO[bytes], tuple[int, ...], bool, np.dtype[Any]]]:
        """Give the array's file, behind the header, with shape, whether it lies column by column, and dtype."""
        with ExitStack() as stack:
            try:
                archive = stack.enter_context(zipfile.ZipFile(self.path))
                file = stack.enter_context(archive.open(f"{self.array}.npy"))
                if np.lib.format.read_magic(file) == (1, 0):
                    shape, by_column, dtype = np.lib.format.read_array_header_1_0(file)
                else:
                    shape, by_column, dtype = np.lib.format.read_array_header_2_0(file)
            except Exception as error:  # what is raised depends on which byte is wrong
                raise self._unreadable(error) from None
            yield file, shape, by_column, dtype

    def _read(self, file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        wanted = int(np.prod(shape)) * dtype.itemsize
        try:
            read = file.read(wanted)
        except Exception as error:
            raise self._unreadable(error) from None
        if len(read) != wanted:
            raise self._unreadable("it is cut short")
        return np.frombuffer(read, dtype).reshape(shape)

    def _unreadable(self, why: object) -> ValueError:
        return ValueError(
            f"expected an array of numbers in an NPZ file; got {self.name}, which is none ({_one_line(why)})"
        )


def _columns_of(array: np.ndarray[Any, Any], name: str) -> tuple[list[str], bool]:
    """Give the names of an array's columns, and whether they are the file's."""
    if array.dtype.hasobject:
        raise ValueError(f"expected an array of numbers in {name}; got one of Python objects, which are not unpickled")
    if array.dtype.names and array.ndim == 1:
        return list(array.dtype.names), True
    if array.ndim not in (1, 2) or (array.ndim == 2 and not array.shape[1]):
        raise ValueError(f"expected an array of shape (rows, columns) in {name}; got {array.shape}")
    return [str(place) for place in range(1 if array.ndim == 1 else array.shape[1])], False


def _exact_floats() -> dict[str, Any]:
    """Return the option with which ``pandas.read_csv`` reads each number exactly, the default from pandas 3.1 on."""
    import pandas as pd

    version = tuple(map(int, pd.__version__.split(".")[:2]))
    return {} if version >= (3, 1) else {"float_precision": "round_trip"}


def _frame(array: np.ndarray[Any, Any], columns: list[str]) -> Any:
    import pandas as pd

    array = array.astype(array.dtype.newbyteorder("="), copy=False)  # pandas 2 takes no other byte order
    if array.dtype.names:
        return pd.DataFrame({name: array[name] for name in columns})
    return pd.DataFrame(array.reshape(len(array), -1), columns=columns, copy=False)


def _as_numbers(cells: Any) -> Any:
    """Give cells as float64, with what is no number, or not exactly, as nan."""
    import pandas as pd

    if cells.dtype.kind == "f" or cells.dtype.kind == "b":
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


def _one_line(error: object) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _check_access(path: Path) -> None:
    """Leave it to the system to say that a file is not there, or not to be read."""
    path.open("rb").close()


def _ending(path: str) -> str:
    ending = Path(path).suffix.lower()
    if ending not in _ENDINGS:
        raise ValueError(f"expected a table that ends in {', '.join(_ENDINGS)}, or '-' for CSV; got {path}")
    return ending


@contextmanager
def _writing(path: str) -> Iterator[Any]:
    """Give a binary file that takes the place of another when it is whole, or standard output."""
    if path != "-":
        with replacing(path) as file:
            yield file
        return
    sys.stdout.flush()
    yield sys.stdout.buffer
    sys.stdout.buffer.flush()


def _arrow(chunk: np.ndarray[Any, Any], columns: list[str], kinds: _Kinds) -> Any:
    import pyarrow as pa

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
    from pyarrow import csv as arrow_csv

    head = io.StringIO()
    csv.writer(head, lineterminator="\n").writerow(columns)
    file.write(head.getvalue().encode())
    for chunk in chunks:
        text = io.BytesIO()
        arrow_csv.write_csv(_arrow(chunk, columns, kinds), text, arrow_csv.WriteOptions(include_header=False))
        file.write(text.getbuffer())


def _write_parquet(file: IO[bytes], columns: list[str], chunks: Iterable[Any], kinds: _Kinds) -> None:
    from pyarrow import parquet

    writer = None
    try:
        for chunk in chunks:
            rows = _arrow(chunk, columns, kinds)
            writer = writer or parquet.ParquetWriter(file, rows.schema)
            writer.write_table(rows)
        writer = writer or parquet.ParquetWriter(file, _arrow(np.empty((0, len(columns))), columns, kinds).schema)
    finally:
        if writer is not None:
            writer.close()


def _write_npy(file: IO[bytes], columns: list[str], chunks: Iterable[Any], kinds: _Kinds) -> None:
    def head(rows: int, dtype: np.dtype[Any]) -> None:
        # The header leaves room for a longer number of rows, so that it keeps its length.
        described = {"descr": dtype.str, "fortran_order": False, "shape": (rows, len(columns))}
        np.lib.format.write_array_header_1_0(file, described)

    rows, dtype = 0, None
    for chunk in chunks:
        if dtype is None:
            dtype = chunk.dtype
            head(0, dtype)
        file.write(np.ascontiguousarray(chunk, dtype).data)
        rows += len(chunk)
    file.seek(0)
    head(rows, dtype or np.dtype(np.float64))


def _write_npz(file: IO[bytes], columns: list[str], chunks: Iterable[Any], kinds: _Kinds) -> None:
    # The array comes first into a file of its own, since its header, which leads, says how many rows there are.
    folder = os.path.dirname(os.path.abspath(file.name))
    with tempfile.TemporaryFile(dir=folder) as array:
        _write_npy(array, columns, chunks, kinds)
        array.seek(0)
        with zipfile.ZipFile(file, "w") as archive, archive.open("data.npy", "w", force_zip64=True) as member:
            shutil.copyfileobj(array, member, 2**20)


_WRITERS = {".csv": _write_csv, ".parquet": _write_parquet, ".npy": _write_npy, ".npz": _write_npz}
