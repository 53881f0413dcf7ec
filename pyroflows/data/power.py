"""POWER: the electric power consumption of one household, prepared as the density estimation benchmark has it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pyroflows.data.tables import Table, _mean_and_scale

__all__ = ["load_power"]

# Each array of the file: the column it becomes, and how many of its integers make one unit of the column.
COLUMNS = {
    "global_active_power_w": ("global_active_power_kw", 1000),
    "voltage_cv": ("voltage_v", 100),
    "sub_metering_1": ("sub_metering_1_wh", 1),
    "sub_metering_2": ("sub_metering_2_wh", 1),
    "sub_metering_3": ("sub_metering_3_wh", 1),
    "minute_of_day": ("minute_of_day", 1),
}


def load_power(path: str | Path, *, seed: int = 42) -> Table:
    """Load POWER, with its noise, splits and standardisation as published.

    The rows are shuffled, given uniform noise as wide as their rounding (the time of day has none), split into
    81, 9 and 10 parts of a hundred, and standardised by the mean and the population standard deviation of train and
    validation together; a column that is constant there has scale 1.

    Args:
        path: an npz file of six integer arrays of one length: ``global_active_power_w``, ``voltage_cv``,
            ``sub_metering_1``, ``sub_metering_2``, ``sub_metering_3``, ``minute_of_day``.
        seed: what draws order and noise; 42 is the published one.

    Shapes:
        train: ``(1659917, 6)``; validation: ``(184435, 6)``; test: ``(204928, 6)``, of the 2,049,280 complete rows.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an array is missing, or they are not of one length.

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
    if not path.is_file():
        raise FileNotFoundError(f"expected the POWER arrays in the file {path}; got no such file")
    with np.load(path) as arrays:
        missing = [name for name in COLUMNS if name not in arrays]
        if missing:
            raise ValueError(f"expected arrays named {', '.join(COLUMNS)} in {path}; got none named {missing[0]}")
        raw = {name: arrays[name] for name in COLUMNS}
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
    mean, scale = _mean_and_scale(x[:fitted])
    x -= mean
    x /= scale
    # Each part in memory of its own, so that one kept or saved does not take the others with it.
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
