"""Pictures of densities, samples, fits and scores: each draws on the axes it is given, and gives them back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from pyroflows.arguments import check_sizes

if TYPE_CHECKING:
    from pyroflows.training import FitResult

__all__ = [
    "COLORS",
    "density_2d",
    "image_grid",
    "log_likelihoods",
    "samples_2d",
    "save_image_grid",
    "training_curves",
]

COLORS: tuple[str, ...] = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, which colour-blind readers tell apart."""

_STYLES = ("-", "--", "-.", ":")
_ROWS = 2**14


def density_2d(
    density: torch.nn.Module | Callable[[Tensor], Tensor],
    limits: Sequence[float],
    ax: Axes | None = None,
    *,
    points: int = 200,
    max_density: float | None = None,
    colorbar: bool = True,
    title: str = "Density",
) -> Axes:
    """Draw a density in the plane, light where it is high.

    Args:
        density: a flow of two features, or a function from rows to their log-densities in nats.
        limits: ``(low, high)`` for both axes, or ``(left, right, bottom, top)``.
        ax: the axes; new ones by default.
        points: grid points along each axis.
        max_density: the density drawn lightest, so that several pictures compare; by default the highest.
        colorbar: whether to draw the scale.
        title: of the axes.

    Shapes:
        rows: ``(n, 2)``; log-densities: ``(n,)``.

    Raises:
        ValueError: ``limits`` are neither two nor four increasing numbers, or ``points`` is below 2.

    Example:
        >>> from pyroflows import StandardNormal
        >>> density_2d(StandardNormal(2).log_prob, (-3, 3), points=10).get_title()
        'Density'
    """
    left, right, bottom, top = _limits(limits)
    if points < 2:
        raise ValueError(f"expected points of at least 2; got {points}")
    log_prob = getattr(density, "log_prob", density)
    parameter = next(density.parameters(), None) if isinstance(density, torch.nn.Module) else None
    across, up = (
        torch.linspace(low, high, points, dtype=torch.float64) for low, high in ((left, right), (bottom, top))
    )
    grid = torch.cartesian_prod(up, across).flip(-1)  # (points * points, 2), the rows of the picture one by one
    grid = grid.to(torch.get_default_dtype()) if parameter is None else grid.to(parameter)
    with torch.no_grad():
        values = torch.cat([log_prob(part) for part in grid.split(_ROWS)]).double().exp().cpu()
    ax = _axes(ax)
    # imshow, not pcolormesh: a grid of 40,000 cells as one small picture in PDF and SVG too.
    half_x, half_y = (float(values_[1] - values_[0]) / 2 for values_ in (across, up))
    image = ax.imshow(
        values.reshape(points, points).numpy(),
        origin="lower",
        extent=(left - half_x, right + half_x, bottom - half_y, top + half_y),
        vmin=0,
        vmax=max_density,
        cmap="viridis",
        aspect="equal",
    )
    ax.set(title=title, xlabel="$x_1$", ylabel="$x_2$", xlim=(left, right), ylim=(bottom, top))
    if colorbar:
        ax.figure.colorbar(image, ax=ax, label="density", fraction=0.046, pad=0.04)
    return ax


def samples_2d(
    x: Tensor | np.ndarray,
    ax: Axes | None = None,
    *,
    limits: Sequence[float] | None = None,
    color: str = COLORS[0],
    label: str | None = None,
    title: str = "Samples",
    names: Sequence[str] = ("$x_1$", "$x_2$"),
) -> Axes:
    """Draw rows of two features as points; called again on the same axes it adds to them.

    Args:
        x: the rows.
        ax: the axes; new ones by default.
        limits: ``(low, high)`` for both axes, or ``(left, right, bottom, top)``; by default those of the rows.
        color: of the points.
        label: what the points are, for a legend.
        title: of the axes.
        names: of the two features.

    Shapes:
        x: ``(rows, 2)``.

    Raises:
        ValueError: ``x`` or ``limits`` has another shape.

    Example:
        >>> samples_2d(torch.randn(100, 2), title="A normal").get_title()
        'A normal'
    """
    rows = x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
    if rows.ndim != 2 or rows.shape[1] != 2:
        raise ValueError(f"expected rows of shape (rows, 2); got {rows.shape}")
    ax = _axes(ax)
    # Points that overlap must still show how many they are: the more, the smaller and fainter.
    size, alpha = np.clip(6000 / max(len(rows), 1), 1.5, 14), np.clip(600 / max(len(rows), 1), 0.25, 0.8)
    ax.scatter(rows[:, 0], rows[:, 1], s=size, alpha=alpha, color=color, linewidths=0, label=label, rasterized=True)
    ax.set(title=title, xlabel=names[0], ylabel=names[1])
    if limits is not None:
        left, right, bottom, top = _limits(limits)
        ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    return ax


def training_curves(
    results: Mapping[str, FitResult], ax: Axes | None = None, *, title: str = "Training", skip: int = 0
) -> Axes:
    """Draw the loss of fits by epoch: validation rows where there are some, else training rows; a dot marks the best.

    Args:
        results: fits by name.
        ax: the axes; new ones by default.
        title: of the axes.
        skip: epochs to leave out at the start, where the loss is so high that the rest looks flat; two always stay.

    Raises:
        ValueError: there is no fit.

    Example:
        >>> from pyroflows.training import FitResult
        >>> result = FitResult({"train": [2.0, 1.5], "validation": [2.1, 1.7]}, best_epoch=1)
        >>> training_curves({"a flow": result}).get_ylabel()
        'negative log-likelihood (nats per row)'
    """
    if not results:
        raise ValueError("expected at least one fit; got none")
    ax = _axes(ax)
    for number, (name, result) in enumerate(results.items()):
        color, style = COLORS[number % len(COLORS)], _STYLES[number % len(_STYLES)]
        losses = result.history.get("validation") or result.history["train"]
        epochs, start = range(1, len(losses) + 1), max(0, min(skip, len(losses) - 2))
        ax.plot(epochs[start:], losses[start:], style, color=color, label=name)
        if result.best_epoch is not None and result.best_epoch >= start:
            ax.plot(epochs[result.best_epoch], losses[result.best_epoch], "o", color=color, markersize=5)
    ax.set(title=title, xlabel="epoch", ylabel="negative log-likelihood (nats per row)")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    return ax


def log_likelihoods(
    scores: Mapping[str, tuple[float, float]], ax: Axes | None = None, *, title: str = "Test log-likelihood"
) -> Axes:
    """Draw a mean log-likelihood and its standard error for each model, the first on top.

    Args:
        scores: ``(mean, standard error)`` in nats per row, by the name of the model.
        ax: the axes; new ones by default.
        title: of the axes.

    Raises:
        ValueError: there is no score.

    Example:
        >>> log_likelihoods({"Gaussian": (-14.0, 1.2), "flow": (-7.5, 0.9)}).get_xlabel()
        'log-likelihood (nats per row; higher is better)'
    """
    if not scores:
        raise ValueError("expected at least one score; got none")
    ax = _axes(ax)
    places = list(range(len(scores)))[::-1]
    for place, (mean, error), color in zip(places, scores.values(), COLORS * len(scores), strict=False):
        ax.errorbar(mean, place, xerr=error, fmt="o", color=color, capsize=4)
        ax.annotate(f"{mean:.2f}", (mean, place), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=9)
    ax.set_yticks(places, list(scores))
    ax.set(title=title, xlabel="log-likelihood (nats per row; higher is better)", ylim=(-0.5, len(scores) - 0.4))
    ax.grid(axis="x", alpha=0.3)
    return ax


def image_grid(
    images: Tensor, ax: Axes | None = None, *, columns: int = 8, num_levels: int = 256, title: str = ""
) -> Axes:
    """Draw images in a grid, row by row.

    Args:
        images: levels of pixels, of one channel or three.
        ax: the axes; new ones by default.
        columns: images a row.
        num_levels: the number of levels; the highest is white.
        title: of the axes.

    Shapes:
        images: ``(num, C, H, W)``.

    Raises:
        ValueError: there is no image, it has another number of channels, or a number is not positive.

    Example:
        >>> image_grid(torch.randint(17, (4, 1, 8, 8)), num_levels=17, title="Noise").get_title()
        'Noise'
    """
    ax = _axes(ax)
    ax.imshow(_grid(images, columns, num_levels).permute(1, 2, 0).numpy(), interpolation="nearest")
    ax.set(title=title, xticks=[], yticks=[])
    return ax


def save_image_grid(
    images: Tensor, path: str | Path, *, columns: int = 8, num_levels: int = 256, enlarge: int = 1
) -> None:
    """Save images in a grid as a PNG of their own pixels.

    Args:
        images: levels of pixels, of one channel or three.
        path: the file.
        columns: images a row.
        num_levels: the number of levels; the highest is white.
        enlarge: pixels of the file for one of the images, along each side.

    Shapes:
        images: ``(num, C, H, W)``.

    Raises:
        ValueError: there is no image, it has another number of channels, or a number is not positive.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_image_grid(torch.randint(256, (4, 3, 8, 8)), f"{folder}/grid.png")
    """
    from torchvision.utils import save_image

    check_sizes(enlarge=enlarge)
    grid = _grid(images, columns, num_levels)
    save_image(grid.repeat_interleave(enlarge, 1).repeat_interleave(enlarge, 2), path, format="png")


def _grid(images: Tensor, columns: int, num_levels: int) -> Tensor:
    from torchvision.utils import make_grid  # here, because the import is slow and few plots need it

    check_sizes(columns=columns)
    if num_levels < 2:
        raise ValueError(f"expected num_levels of at least 2; got {num_levels}")
    if images.dim() != 4 or not len(images) or images.shape[1] not in (1, 3):
        raise ValueError(f"expected images of shape (num, 1 or 3, H, W), at least one; got {tuple(images.shape)}")
    levels = images.detach().cpu().float() / (num_levels - 1)
    return make_grid(levels.clamp(0, 1), nrow=columns, padding=1, pad_value=0.5)


def _axes(ax: Axes | None) -> Axes:
    return plt.figure(layout="constrained").add_subplot() if ax is None else ax


def _limits(limits: Sequence[float]) -> tuple[float, float, float, float]:
    given = tuple(float(limit) for limit in limits)
    if len(given) == 2:
        given = given * 2
    if len(given) != 4 or not (given[0] < given[1] and given[2] < given[3]):
        raise ValueError(
            f"expected limits (low, high) or (left, right, bottom, top), increasing; got {tuple(limits)!r}"
        )
    return given[0], given[1], given[2], given[3]
