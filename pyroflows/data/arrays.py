"""Arrays of named NPZ files, and random splits of rows into three parts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["PARTS", "read_npz", "split_rows"]

PARTS = ("train", "validation", "test")


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
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return dict(zip(PARTS, order.split([trained, held_out, tested]), strict=True))
