"""POWER: the electric power consumption of a household, prepared as in the density estimation benchmark."""

from pathlib import Path

import numpy as np
import torch

from pyroflows.data.npz import read_npz
from pyroflows.data.tables import Table, mean_and_scale

__all__ = ["load_power"]

# For each array of the file, the name of its column, and how many of its integers make a unit of the column.
COLUMNS = {
    "global_active_power_w": ("global_active_power_kw", 1000),
    "voltage_cv": ("voltage_v", 100),
    "sub_metering_1": ("sub_metering_1_wh", 1),
    "sub_metering_2": ("sub_metering_2_wh", 1),
    "sub_metering_3": ("sub_metering_3_wh", 1),
    "minute_of_day": ("minute_of_day", 1),
}


def load_power(path: str | Path, *, seed: int = 42) -> Table:
    """Load POWER, with noise, splits and standardization as published.

    The rows are shuffled, get uniform noise as wide as their rounding (except the time of day), are split into 81, 9
    and 10 percent, and standardized by the mean and the population standard deviation of the training and validation
    rows; a column that is constant there has scale 1.

    Args:
        path: an NPZ file of six integer arrays of one length: ``global_active_power_w``, ``voltage_cv``,
            ``sub_metering_1``, ``sub_metering_2``, ``sub_metering_3``, ``minute_of_day``.
        seed: of order and noise; 42 is the published one.

    Shapes:
        train: ``(1659917, 6)``; validation: ``(184435, 6)``; test: ``(204928, 6)``, of the 2,049,280 complete rows.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an array is missing, or the arrays are not of one length.

    References:
        Masked Autoregressive Flow for Density Estimation, Papamakarios, Pavlakou, Murray, 2017, arXiv:1705.07057

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/power.npz", **{name: np.arange(200) for name in COLUMNS})
        ...     load_power(f"{folder}/power.npz")
        Table('power', features=6, train=162, validation=18, test=20)
    """
    path = Path(path)
    raw = read_npz(path, list(COLUMNS), "the POWER arrays")
    if len({column.shape for column in raw.values()}) > 1 or raw["voltage_cv"].ndim != 1:
        shapes = ", ".join(str(column.shape) for column in raw.values())
        raise ValueError(f"expected six arrays of one dimension and one length in {path}; got shapes {shapes}")
    count = len(raw["voltage_cv"])
    if count < 2:
        raise ValueError(f"expected at least two rows in {path}; got {count}")

    random = np.random.RandomState(seed)
    order = random.permutation(count)
    x = np.empty((count, len(COLUMNS)))
    for column, (name, (_, units)) in enumerate(COLUMNS.items()):
        x[:, column] = raw[name][order] / units
    # The order of the draws is the published one: voltage, active power, then the three meters row by row.
    x[:, 1] += 0.01 * random.rand(count)
    x[:, 0] += 0.001 * random.rand(count)
    x[:, 2:5] += random.rand(count, 3)

    fitted = count - int(0.1 * count)
    train = fitted - int(0.1 * fitted)
    mean, scale = mean_and_scale(x[:fitted])
    x -= mean
    x /= scale
    # Each part has memory of its own, so that one that is kept or saved does not hold the others.
    train_rows, validation_rows, test_rows = (torch.from_numpy(part).float() for part in np.split(x, [train, fitted]))
    return Table(
        name="power",
        columns=tuple(column for column, _ in COLUMNS.values()),
        train=train_rows,
        validation=validation_rows,
        test=test_rows,
        mean=torch.from_numpy(mean),
        scale=torch.from_numpy(scale),
    )
