"""BSDS300: small patches of natural grey images, prepared as the density estimation benchmark has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyroflows.data.tables import Table

__all__ = ["load_bsds300"]

SIDE = 8
FEATURES = SIDE * SIDE - 1
# The folder of each split's images, and the place of the split in the seeds of its noise.
SPLITS = {"train": ("train", 0), "val": ("train", 1), "test": ("test", 2)}
# Patches taken at once: one step's float64 numbers stay small beside the result.
CHUNK = 2**14


def _read_image(path: Path) -> np.ndarray:
    from PIL import Image  # here, because only these images need Pillow

    if not path.is_file():
        raise FileNotFoundError(f"expected an image of BSDS300 in the file {path}; got no such file")
    with Image.open(path) as file:
        image = np.asarray(file)
    if image.ndim != 2 or image.dtype != np.uint8:
        raise ValueError(f"expected an 8-bit grey image in {path}; got {image.dtype} of shape {image.shape}")
    return image


def _patches(images: list[np.ndarray], places: tuple[np.ndarray, ...]) -> Iterator[np.ndarray]:
    """Give patches as rows of 64 pixels, (chunk, 64) uint8, from image, row and column of the first pixel of each."""
    image, row, column = (place.astype(np.int64) for place in places)
    heights, widths = np.array([image.shape for image in images]).T
    outside = np.flatnonzero((row + SIDE > heights[image]) | (column + SIDE > widths[image]))
    if len(outside):
        at = outside[0]
        raise ValueError(
            f"expected patches inside images of {heights[image[at]]}x{widths[image[at]]}; "
            f"got row {row[at]}, column {column[at]}"
        )
    # All images in one line of pixels: a patch is then 64 places, counted from its first by the width of its image.
    pixels = np.concatenate([image.ravel() for image in images])
    starts = np.concatenate(([0], np.cumsum(heights * widths)[:-1]))
    first, width = starts[image] + row * widths[image] + column, widths[image]
    down, across = (steps.ravel() for steps in np.indices((SIDE, SIDE)))
    for start in range(0, len(image), CHUNK):
        part = slice(start, start + CHUNK)
        yield pixels[first[part, None] + width[part, None] * down + across]


def _rows(images: list[np.ndarray], places: tuple[np.ndarray, ...], random: np.random.Generator) -> Tensor:
    """Dequantise patches, subtract the mean of each and drop its last pixel: (rows, 63)."""
    rows = torch.empty(len(places[0]), FEATURES)
    for part, patches in zip(rows.split(CHUNK), _patches(images, places), strict=True):
        x = (patches + random.random(patches.shape)) / 256
        x -= x.mean(1, keepdims=True)
        part.copy_(torch.from_numpy(x[:, :FEATURES]))
    return rows


def load_bsds300(path: str | Path, *, train_rows: int | None = None, seed: int = 0) -> Table:
    """Load BSDS300: 8x8 patches with uniform noise and without their mean and last pixel, which the others give.

    As published the rows are not standardised: the mean of the table is 0 and its scale 1. All train rows take
    252 MB.

    Args:
        path: a folder with the grey PNG files ``train/*.png`` and ``test/*.png`` and with ``patches.npz``, which holds
            for each split of train, val and test the arrays ``{split}_image``, ``{split}_row`` and ``{split}_col``, and
            the names that the first counts: ``train_folder_names`` and ``test_folder_names``.
        train_rows: how many train rows to load, from the first, which are in random order; None loads all.
        seed: what draws the noise; fewer train rows are the same rows.

    Shapes:
        train: ``(1000000, 63)``; validation: ``(50000, 63)``; test: ``(250000, 63)``.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an array is missing, an image is not grey, a patch is outside its image, or ``train_rows`` is not a
            number of rows that are there.

    References:
        Masked Autoregressive Flow for Density Estimation, Papamakarios, Pavlakou, Murray, 2017, arXiv:1705.07057

    Example:
        >>> load_bsds300("nowhere")
        Traceback (most recent call last):
        FileNotFoundError: expected the patches of BSDS300 in the file nowhere/patches.npz; got no such file
    """
    folder = Path(path)
    file = folder / "patches.npz"
    if not file.is_file():
        raise FileNotFoundError(f"expected the patches of BSDS300 in the file {file}; got no such file")
    places = [f"{split}_{part}" for split in SPLITS for part in ("image", "row", "col")]
    with np.load(file) as arrays:
        missing = [name for name in (*places, "train_folder_names", "test_folder_names") if name not in arrays]
        if missing:
            raise ValueError(f"expected an array named {missing[0]} in {file}; got {', '.join(arrays)}")
        patches = dict(arrays)
    count = len(patches["train_image"])
    if train_rows is not None and (
        not isinstance(train_rows, int) or isinstance(train_rows, bool) or not 0 < train_rows <= count
    ):
        raise ValueError(f"expected train_rows to be an integer from 1 to {count}, or None; got {train_rows!r}")

    images = {
        part: [_read_image(folder / part / f"{name.decode()}.png") for name in patches[f"{part}_folder_names"]]
        for part in ("train", "test")
    }
    rows = {}
    for split, (part, stream) in SPLITS.items():
        taken = slice(train_rows if split == "train" else None)
        image, row, column = (patches[f"{split}_{place}"][taken] for place in ("image", "row", "col"))
        rows[split] = _rows(images[part], (image, row, column), np.random.default_rng((seed, stream)))
    return Table(
        name="bsds300",
        columns=tuple(f"pixel_{number}" for number in range(FEATURES)),
        train=rows["train"],
        validation=rows["val"],
        test=rows["test"],
        mean=torch.zeros(FEATURES, dtype=torch.float64),
        scale=torch.ones(FEATURES, dtype=torch.float64),
    )
