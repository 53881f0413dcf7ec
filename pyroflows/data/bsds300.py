"""BSDS300: small patches of natural grey images, prepared as in the density estimation benchmark."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyroflows.arguments import check_sizes
from pyroflows.data.npz import read_npz
from pyroflows.data.tables import Table

__all__ = ["load_bsds300"]

SIDE = 8
FEATURES = SIDE * SIDE - 1
# The folder of each split's images, and the position of the split in the seeds of its noise.
SPLITS = {"train": ("train", 0), "val": ("train", 1), "test": ("test", 2)}
# Patches processed at a time, so that the float64 numbers of a step stay small compared with the result.
CHUNK = 2**14


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
        raise ValueError(
            f"expected patches inside images of {heights[image[at]]}x{widths[image[at]]}; "
            f"got row {row[at]}, column {column[at]}"
        )
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


def load_bsds300(path: str | Path, *, train_rows: int | None = None, seed: int = 0) -> Table:
    """Load BSDS300: 8x8 patches with uniform noise, without their mean and last pixel, which follows from the others.

    As published the rows are not standardized: the mean of the table is 0 and its scale 1. All training rows take
    252 MB.

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
    places = [f"{split}_{part}" for split in SPLITS for part in ("image", "row", "col")]
    names = [*places, "train_folder_names", "test_folder_names"]
    patches = read_npz(folder / "patches.npz", names, "the patches of BSDS300")
    if train_rows is not None:
        check_sizes(train_rows=train_rows)
        if train_rows > len(patches["train_image"]):
            raise ValueError(f"expected train_rows of at most {len(patches['train_image'])}; got {train_rows}")

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
