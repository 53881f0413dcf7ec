"""Images: grids and interpolations."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes

from pyroflows.arguments import check_integer, check_sizes
from pyroflows.plots.canvas import drawing

__all__ = ["image_grid", "interpolations", "save_image_grid"]


def image_grid(
    images: torch.Tensor, ax: Axes | None = None, *, columns: int = 8, num_levels: int = 256, title: str = ""
) -> Axes:
    """Draw images in a grid, row by row.

    Args:
        images: ``(num, C, H, W)``, levels of pixels, with one channel or three.
        ax, title: the axes, new ones by default, and their title.
        columns: images in a row.
        num_levels: the number of levels; the highest is white.

    Raises:
        TypeError, ValueError: not a tensor, no image, another number of channels, or a number out of range.

    Example:
        >>> image_grid(torch.randint(17, (4, 1, 8, 8)), num_levels=17, title="Noise").get_title()
        'Noise'
    """
    grid = _grid(images, columns, num_levels).permute(1, 2, 0).numpy()
    with drawing(ax) as ax:
        ax.imshow(grid, interpolation="nearest")
        ax.set(title=title, xticks=[], yticks=[])
    return ax


def interpolations(
    images: torch.Tensor, ax: Axes | None = None, *, num_levels: int = 256, title: str = "Straight lines in the latent"
) -> Axes:
    """Draw interpolations between images, one in each row, as :func:`pyroflows.interpolate` returns them.

    Args:
        images: ``(pairs, num, C, H, W)``, at least two in a row, of which the first and the last are the ends.
        ax, num_levels, title: as in :func:`image_grid`, which says what else is refused.

    Example:
        >>> interpolations(torch.randint(17, (3, 6, 1, 8, 8)), num_levels=17).get_xlabel()
        'share of the way'
    """
    if not isinstance(images, torch.Tensor) or images.dim() != 5 or images.shape[1] < 2:
        got = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(f"expected images of shape (pairs, num, C, H, W), num of at least 2; got {got}")
    num, width = images.shape[1], images.shape[-1] + 1  # of an image and the line between two
    ax = image_grid(images.flatten(0, 1), ax, columns=num, num_levels=num_levels, title=title)
    shares = np.linspace(0, 1, 5)
    ax.set_xticks(width * (0.5 + shares * (num - 1)), [f"{share:g}" for share in shares])
    ax.set_xlabel("share of the way")
    return ax


def save_image_grid(
    images: torch.Tensor, path: str | Path, *, columns: int = 8, num_levels: int = 256, enlarge: int = 1
) -> None:
    """Save a grid of images as a PNG file.

    Args:
        images, columns, num_levels: as in :func:`image_grid`, which says what is refused.
        path: the file.
        enlarge: pixels of the file for one pixel of an image, along each side.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_image_grid(torch.randint(256, (4, 3, 8, 8)), f"{folder}/grid.png")
    """
    from torchvision.utils import save_image

    check_sizes(enlarge=enlarge)
    grid = _grid(images, columns, num_levels)
    save_image(grid.repeat_interleave(enlarge, 1).repeat_interleave(enlarge, 2), path, format="png")


def _grid(images: torch.Tensor, columns: int, num_levels: int) -> torch.Tensor:
    from torchvision.utils import make_grid  # here, because the import is slow and few plots need it

    check_sizes(columns=columns)
    check_integer("num_levels", num_levels, 2)
    if not isinstance(images, torch.Tensor):
        raise TypeError(f"expected images as a tensor; got {type(images).__name__}")
    if images.dim() != 4 or not len(images) or images.shape[1] not in (1, 3):
        raise ValueError(f"expected images of shape (num, 1 or 3, H, W), at least one; got {tuple(images.shape)}")
    levels = images.detach().cpu().float() / (num_levels - 1)
    return make_grid(levels.clamp(0, 1), nrow=columns, padding=1, pad_value=0.5)
