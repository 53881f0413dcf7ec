"""POWER and BSDS300, two tables of the density estimation benchmark, prepared as published."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyroflows.arguments import check_sizes
from pyroflows.data.tables import Table, mean_and_scale, read_npz

__all__ = ["load_bsds300", "load_power"]

# For each array of POWER, the name of its column, and how many of its integers make a unit of the column.
COLUMNS = {
    "global_active_power_w": ("global_active_power_kw", 1000),
    "voltage_cv": ("voltage_v", 100),
    "sub_metering_1": ("sub_metering_1_wh", 1),
    "sub_metering_2": ("sub_metering_2_wh", 1),
    "sub_metering_3": ("sub_metering_3_wh", 1),
    "minute_of_day": ("minute_of_day", 1),
}
# For each split of BSDS300, the folder of its images, and its position in the seeds of the noise.
SPLITS = {"train": ("train", 0), "val": ("train", 1), "test": ("test", 2)}
SIDE = 8
FEATURES = SIDE * SIDE - 1
# Patches processed at a time, so that the float64 numbers of a step stay small compared with the result.
CHUNK = 2**14


def load_power(path: str | Path, *, seed: int = 42) -> Table:
    """Load POWER, the electric power consumption of a household, with noise, splits and standardization as published.

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
    shapes = [column.shape for column in raw.values()]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1:
        got = ", ".join(map(str, shapes))
        raise ValueError(f"expected six arrays of one dimension and one length in {path}; got shapes {got}")
    (count,) = shapes[0]
    if count < 2:
        raise ValueError(f"expected at least two rows in {path}; got {count}")

    random = np.random.RandomState(seed)
    order = random.permutation(count)
    x = np.column_stack([raw[name][order] / units for name, (_, units) in COLUMNS.items()])
    # The order of the draws is the published one: voltage, active power, then the three meters row by row.
    x[:, 1] += 0.01 * random.rand(count)
    x[:, 0] += 0.001 * random.rand(count)
    x[:, 2:5] += random.rand(count, 3)

    fitted = count - int(0.1 * count)
    mean, scale = mean_and_scale(x[:fitted])
    x -= mean
    x /= scale
    # Each part has memory of its own, so that one that is kept or saved does not hold the others.
    places = [fitted - int(0.1 * fitted), fitted]
    train, validation, test = (torch.from_numpy(part).float() for part in np.split(x, places))
    columns = tuple(column for column, _ in COLUMNS.values())
    return Table("power", columns, train, validation, test, torch.from_numpy(mean), torch.from_numpy(scale))


def load_bsds300(path: str | Path, *, train_rows: int | None = None, seed: int = 0) -> Table:
    """Load BSDS300: 8x8 patches of grey images with uniform noise, without their mean and last pixel.

    The last pixel follows from the others. As published the rows are not standardized: the mean of the table is 0 and
    its scale 1. All training rows take 252 MB.

    Args:
        path: a folder with the grey PNG files ``train/*.png`` and ``test/*.png`` and with ``patches.npz``, which holds
            for each split of train, val and test the arrays ``{split}_image``, ``{split}_row`` and ``{split}_col``, and
            the names of the images: ``train_folder_names`` and ``test_folder_names``.
        train_rows: number of training rows to load, which are in random order; None loads all.
        seed: of the noise; fewer training rows are the same rows.

    Shapes:
        train: ``(1000000, 63)``; validation: ``(50000, 63)``; test: ``(250000, 63)``.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an array is missing, an image is not grey, a patch is outside its image, or ``train_rows`` is not
            positive, or more rows than there are.

    References:
        Masked Autoregressive Flow for Density Estimation, Papamakarios, Pavlakou, Murray, 2017, arXiv:1705.07057

    Example:
        >>> load_bsds300("nowhere")
        Traceback (most recent call last):
        FileNotFoundError: expected the patches of BSDS300 in the file nowhere/patches.npz; got no such file
    """
    folder = Path(path)
    names = [f"{split}_{place}" for split in SPLITS for place in ("image", "row", "col")]
    names += ["train_folder_names", "test_folder_names"]
    arrays = read_npz(folder / "patches.npz", names, "the patches of BSDS300")
    if train_rows is not None:
        check_sizes(train_rows=train_rows)
        if train_rows > len(arrays["train_image"]):
            raise ValueError(f"expected train_rows of at most {len(arrays['train_image'])}; got {train_rows}")
    images = {
        part: [_read_image(folder / part / f"{name.decode()}.png") for name in arrays[f"{part}_folder_names"]]
        for part in ("train", "test")
    }
    rows = {}
    for split, (part, stream) in SPLITS.items():
        limit = train_rows if split == "train" else None
        places = tuple(arrays[f"{split}_{place}"][:limit] for place in ("image", "row", "col"))
        rows[split] = _rows(images[part], places, np.random.default_rng((seed, stream)))
    columns = tuple(f"pixel_{number}" for number in range(FEATURES))
    mean = torch.zeros(FEATURES, dtype=torch.float64)
    return Table("bsds300", columns, rows["train"], rows["val"], rows["test"], mean, torch.ones_like(mean))


def _read_image(path: Path) -> np.ndarray:
    from PIL import Image  # here, since only images need Pillow

    if not path.is_file():
        raise FileNotFoundError(f"expected an image of BSDS300 in the file {path}; got no such file")
    with Image.open(path) as file:
        image = np.asarray(file)
    if image.ndim != 2 or image.dtype != np.uint8:
        raise ValueError(f"expected an 8-bit grey image in {path}; got {image.dtype} of shape {image.shape}")
    return image


def _patches(images: list[np.ndarray], places: tuple[np.ndarray, ...]) -> Iterator[np.ndarray]:
    """Yield patches as rows of 64 pixels, (chunk, 64) uint8, from image, row and column of the first pixel of each."""
    image, row, column = (place.astype(np.int64) for place in places)
    heights, widths = np.array([image.shape for image in images]).T
    outside = np.flatnonzero((row + SIDE > heights[image]) | (column + SIDE > widths[image]))
    if len(outside):
        at = outside[0]
        size = f"{heights[image[at]]}x{widths[image[at]]}"
        raise ValueError(f"expected patches inside images of {size}; got row {row[at]}, column {column[at]}")
    # With all images in one line of pixels a patch is 64 positions, relative to its first by the width of its image.
    pixels = np.concatenate([image.ravel() for image in images])
    starts = np.concatenate(([0], np.cumsum(heights * widths)[:-1]))
    first, width = starts[image] + row * widths[image] + column, widths[image]
    down, across = (steps.ravel() for steps in np.indices((SIDE, SIDE)))
    for start in range(0, len(image), CHUNK):
        part = slice(start, start + CHUNK)
        yield pixels[first[part, None] + width[part, None] * down + across]


def _rows(images: list[np.ndarray], places: tuple[np.ndarray, ...], random: np.random.Generator) -> Tensor:
    """Dequantize patches, subtract the mean of each and drop its last pixel: (rows, 63)."""
    rows = torch.empty(len(places[0]), FEATURES)
    for part, patches in zip(rows.split(CHUNK), _patches(images, places), strict=True):
        x = (patches + random.random(patches.shape)) / 256
        x -= x.mean(1, keepdims=True)
        part.copy_(torch.from_numpy(x[:, :FEATURES]))
    return rows
