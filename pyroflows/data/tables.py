"""Tables of numbers, split and standardized: scikit-learn's bundled data sets, or rows of your own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyroflows.arguments import check_finite, check_option

__all__ = ["PARTS", "TABLES", "Table", "load_table", "make_table", "mean_and_scale", "read_npz", "split_rows"]

PARTS = ("train", "validation", "test")

TABLES: tuple[str, ...] = ("breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine")
"""The names that ``load_table`` knows."""


@dataclass(frozen=True, eq=False, repr=False)
class Table:
    """A data set in three parts, with its mean and scale.

    Args:
        name: name of the table.
        columns: a name for each column.
        train, validation, test: rows of each part, of shape ``(rows, features)``.
        mean: subtracted from every row, of shape ``(features,)``, float64.
        scale: divisor of the difference, of shape ``(features,)``, float64.
        labels: class of every row for each part, int64; None if there are no classes.

    Example:
        >>> load_table("iris")
        Table('iris', features=4, train=105, validation=15, test=30, labels=3)
    """

    name: str
    columns: tuple[str, ...]
    train: Tensor
    validation: Tensor
    test: Tensor
    mean: Tensor
    scale: Tensor
    labels: dict[str, Tensor] | None = None

    @property
    def features(self) -> int:
        """The number of columns."""
        return len(self.columns)

    def unstandardize(self, x: Tensor) -> Tensor:
        """Return rows in the original units, such as samples of a fitted flow; ``x: (*batch, features)``."""
        return (x * self.scale.to(x.device) + self.mean.to(x.device)).to(x.dtype)

    def __repr__(self) -> str:
        parts = f"train={len(self.train)}, validation={len(self.validation)}, test={len(self.test)}"
        labels = "" if self.labels is None else f", labels={len(torch.cat(list(self.labels.values())).unique())}"
        return f"Table({self.name!r}, features={self.features}, {parts}{labels})"


def mean_and_scale(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and population standard deviation of the columns, with scale 1 for a constant one."""
    constant = x.max(0) == x.min(0)  # rounding can give a constant a standard deviation that is not 0
    return x.mean(0), np.where(constant, 1.0, x.std(0))


def make_table(
    x: Tensor | np.ndarray,
    *,
    name: str = "table",
    columns: Sequence[str] | None = None,
    labels: Tensor | np.ndarray | None = None,
    test: float = 0.2,
    validation: float = 0.1,
    standardize: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Table:
    """Split rows at random, and standardize them by the mean and standard deviation of the training rows.

    A column that is constant in the training rows is kept, with its mean subtracted and scale 1.

    Args:
        x: the rows.
        name, columns: of the table; None numbers the columns.
        labels: class of every row.
        test, validation: fractions of all rows.
        standardize: whether to standardize; otherwise the mean is 0 and the scale 1.
        seed: of the split.
        dtype: dtype of the rows.

    Shapes:
        x: ``(rows, features)``; labels: ``(rows,)``.

    Raises:
        ValueError: the rows are not a finite matrix, or names, labels or fractions do not fit them.

    Example:
        >>> make_table(torch.arange(20.0).reshape(10, 2))
        Table('table', features=2, train=7, validation=1, test=2)
    """
    rows = np.asarray(x.detach().cpu().double() if isinstance(x, Tensor) else x, dtype=np.float64)
    if rows.ndim != 2 or not rows.size:
        raise ValueError(f"expected rows of shape (rows, features), at least one of each; got {rows.shape}")
    columns = tuple(f"column_{number}" for number in range(rows.shape[1])) if columns is None else tuple(columns)
    if len(columns) != rows.shape[1]:
        raise ValueError(f"expected {rows.shape[1]} column names; got {len(columns)}")
    check_finite(repr(name), rows, columns)
    classes = None if labels is None else torch.as_tensor(labels).long()
    if classes is not None and classes.shape != rows.shape[:1]:
        raise ValueError(f"expected labels of shape ({len(rows)},); got {tuple(classes.shape)}")
    indices = split_rows(len(rows), test, validation, seed)
    mean, scale = np.zeros(len(columns)), np.ones(len(columns))
    if standardize:
        mean, scale = mean_and_scale(rows[indices["train"].numpy()])
    standard = torch.from_numpy((rows - mean) / scale).to(dtype)
    return Table(
        name=name,
        columns=columns,
        **{part: standard[indices[part]] for part in PARTS},
        mean=torch.from_numpy(mean),
        scale=torch.from_numpy(scale),
        labels=None if classes is None else {part: classes[index] for part, index in indices.items()},
    )


def load_table(name: str, **options: Any) -> Table:
    """Load one of scikit-learn's bundled tables.

    The classification tables (breast_cancer, digits, iris, wine) have their classes as labels; the regression tables
    (diabetes, in its original units, and linnerud) have their targets as last columns. No column is dropped: one that
    is constant in the training rows, as some pixels of digits are, has its mean subtracted and scale 1.

    Args:
        name: one of ``TABLES``.
        options: ``test``, ``validation``, ``standardize``, ``seed`` and ``dtype`` of :func:`make_table`.

    Raises:
        ValueError: there is no such table, or the fractions leave no training row.

    Example:
        >>> wine = load_table("wine", test=0.3, seed=1)
        >>> wine.train.shape, wine.labels["train"].shape
        (torch.Size([107, 13]), torch.Size([107]))
    """
    check_option("name", name, TABLES)
    from sklearn import datasets  # here, since the import is slow

    bunch = datasets.load_diabetes(scaled=False) if name == "diabetes" else getattr(datasets, f"load_{name}")()
    rows, columns, labels = bunch.data, [str(column) for column in bunch.feature_names], bunch.target
    if name in ("diabetes", "linnerud"):
        rows = np.column_stack((rows, bunch.target))
        columns += ["progression"] if name == "diabetes" else list(bunch.target_names)
        labels = None
    return make_table(rows, name=name, columns=columns, labels=labels, **options)


def read_npz(path: Path, names: Sequence[str], what: str) -> dict[str, np.ndarray]:
    """Read arrays by name."""
    if not path.is_file():
        raise FileNotFoundError(f"expected {what} in the file {path}; got no such file")
    with np.load(path) as arrays:
        missing = [name for name in names if name not in arrays]
        if missing:
            raise ValueError(f"expected an array named {missing[0]} in {path}; got {', '.join(arrays)}")
        return {name: arrays[name] for name in names}


def split_rows(rows: int, test: float, validation: float, seed: int, what: str = "row") -> dict[str, Tensor]:
    """Return the positions, int64, of the rows of each part, given the fractions to test on and for validation."""
    if not (test >= 0 and validation >= 0 and test + validation < 1):
        raise ValueError(
            f"expected fractions test and validation of at least 0, together below 1; got {test!r} and {validation!r}"
        )
    tested, held_out = round(test * rows), round(validation * rows)
    trained = rows - tested - held_out
    if trained < 1:
        raise ValueError(f"expected fractions that leave a train {what}; got {test!r} and {validation!r} of {rows}")
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed), device="cpu")
    return dict(zip(PARTS, order.split([trained, held_out, tested]), strict=True))
