"""Named arrays of an NPZ file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

__all__ = ["read_npz"]


def read_npz(path: Path, names: Sequence[str], what: str) -> dict[str, np.ndarray]:
    """Read arrays by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an array is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected {what} in the file {path}; got no such file")
    with np.load(path) as arrays:
        missing = [name for name in names if name not in arrays]
        if missing:
            raise ValueError(f"expected an array named {missing[0]} in {path}; got {', '.join(arrays)}")
        return {name: arrays[name] for name in names}
