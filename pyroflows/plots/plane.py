"""The plane: densities, samples, and the latent grid after each layer of a flow."""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from torch import Tensor

from pyroflows.arguments import check_integer, check_number, check_sizes
from pyroflows.contexts import evaluating
from pyroflows.diagnostics.arrays import Array
from pyroflows.flow import Flow
from pyroflows.plots.canvas import COLORS, AxesArray, AxesLike, drawing, panels

__all__ = ["deformed_grid", "density_2d", "samples_2d"]

_ROWS = 2**14  # evaluated at once
_POINTS = 200  # in a line of the grid


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
        density: a flow of two features, evaluated in evaluation mode, or a function of rows, ``(n, 2)``, that returns
            their log-densities in nats, ``(n,)``.
        limits: increasing numbers, ``(low, high)`` for both axes or ``(left, right, bottom, top)``.
        ax, title: the axes, new ones by default, and their title.
        points: grid points along each axis, at least 2.
        max_density: the density drawn lightest, for comparable pictures; by default the highest.
        colorbar: whether to draw the scale.

    Example:
        >>> from pyroflows import StandardNormal
        >>> density_2d(StandardNormal(2).log_prob, (-3, 3), points=10).get_title()
        'Density'
    """
    left, right, bottom, top = _as_limits(limits)
    check_integer("points", points, 2)
    x1 = torch.linspace(left, right, points, dtype=torch.float64)
    x2 = torch.linspace(bottom, top, points, dtype=torch.float64)
    grid = torch.cartesian_prod(x2, x1).flip(-1)  # (points * points, 2), the lowest row first
    parameter = next(density.parameters(), None) if isinstance(density, torch.nn.Module) else None
    grid = grid.to(torch.get_default_dtype()) if parameter is None else grid.to(parameter)
    log_prob = getattr(density, "log_prob", density)
    with torch.no_grad(), evaluating(density):
        values = torch.cat([log_prob(rows) for rows in grid.split(_ROWS)]).double().exp().cpu().reshape(points, points)
    half_x, half_y = (right - left) / (points - 1) / 2, (top - bottom) / (points - 1) / 2
    with drawing(ax) as ax:
        # imshow, not pcolormesh, whose 40,000 cells would be separate shapes in PDF and SVG.
        extent = (left - half_x, right + half_x, bottom - half_y, top + half_y)
        colors: Any = {"vmin": 0, "vmax": max_density, "cmap": "viridis"}
        image = ax.imshow(values.numpy(), origin="lower", extent=extent, aspect="equal", **colors)
        ax.set(title=title, xlabel="$x_1$", ylabel="$x_2$", xlim=(left, right), ylim=(bottom, top))
        if colorbar:
            # In the axes' own coordinates it stays as tall as the picture.
            bar = ax.figure.colorbar(image, cax=ax.inset_axes((1.04, 0, 0.05, 1)), label="density")
            bar.ax.tick_params(labelsize=plt.rcParams["ytick.labelsize"])
    return ax


def samples_2d(
    x: Array,
    ax: Axes | None = None,
    *,
    limits: Sequence[float] | None = None,
    color: str = COLORS[0],
    label: str | None = None,
    title: str = "Samples",
    names: Sequence[str] = ("$x_1$", "$x_2$"),
) -> Axes:
    """Draw rows of two features as points; further calls add to the same axes.

    Args:
        x: the rows, shape ``(rows, 2)``.
        ax, title: the axes, new ones by default, and their title.
        limits: as in :func:`density_2d`; by default those of the rows.
        color, label: of the points, the label for a legend.
        names: of the two features.

    Example:
        >>> samples_2d(torch.randn(100, 2), title="A normal").get_title()
        'A normal'
    """
    rows = x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
    if rows.ndim != 2 or rows.shape[1] != 2:
        raise ValueError(f"expected rows of shape (rows, 2); got {rows.shape}")
    # The more points, the smaller and fainter, so that overlapping points still show how many they are.
    size, alpha = np.clip(6000 / max(len(rows), 1), 1.5, 14), np.clip(600 / max(len(rows), 1), 0.25, 0.8)
    with drawing(ax) as ax:
        ax.scatter(rows[:, 0], rows[:, 1], s=size, alpha=alpha, color=color, linewidths=0, label=label, rasterized=True)
        ax.set(title=title, xlabel=names[0], ylabel=names[1])
        if limits is not None:
            left, right, bottom, top = _as_limits(limits)
            ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    return ax


def deformed_grid(
    flow: Flow,
    ax: AxesLike | None = None,
    *,
    context: Tensor | None = None,
    extent: float = 2.5,
    lines: int = 11,
    max_panels: int = 8,
) -> AxesArray:
    """Draw a grid of the latent plane and its image after each layer, up to the data.

    Two circles are drawn with it, which hold 39 % and 86 % of a standard normal.

    Args:
        flow: a flow of two features.
        ax: an axes for each panel, the latent and the outputs of layers; new ones by default.
        context: a single one, without a batch, if the flow takes a context.
        extent, lines: of the grid, from the middle to each side, and its lines in each direction, at least 2.
        max_panels: 2 or more; if there are more layers, panels are spread evenly from the latent to the data.

    Example:
        >>> from pyroflows import realnvp
        >>> [each.get_title() for each in deformed_grid(realnvp(2, num_layers=2), max_panels=3)][0]
        'latent'
    """
    if not isinstance(flow, Flow):
        raise TypeError(f"expected a Flow; got {type(flow).__name__}")
    if flow.event_shape != (2,):
        raise ValueError(f"expected a flow of two features; got one of shape {tuple(flow.event_shape)}")
    check_number("extent", extent, "(0, inf)")
    check_sizes(lines=lines, max_panels=max_panels)
    if lines < 2 or max_panels < 2:
        raise ValueError(f"expected at least 2 lines and 2 panels; got {lines} and {max_panels}")
    x = _grid_lines(extent, lines).to(flow.device, flow.dtype).flatten(0, 1)
    stages, titles = [x], ["latent"]
    with torch.no_grad(), evaluating(flow):
        embedded = flow.embed(context)
        for number, layer in enumerate(flow.layers, 1):
            x = layer.forward_and_log_det(x, embedded if layer.context_features else None)[0]
            stages.append(x)
            titles.append(f"{number}: {type(layer).__name__}")
    titles[-1] = f"data, after {titles[-1]}"
    drawn = np.unique(np.rint(np.linspace(0, len(stages) - 1, min(max_panels, len(stages)))).astype(int))
    with panels(ax, len(drawn)) as axes:
        for each, stage in zip(axes, drawn, strict=True):
            curves = stages[stage].double().cpu().unflatten(0, (-1, _POINTS)).numpy()
            groups = np.split(curves, [lines, 2 * lines])
            for group, color, width in zip(groups, (COLORS[0], COLORS[1], COLORS[6]), (0.7, 0.7, 1.2), strict=True):
                each.add_collection(LineCollection(list(group), colors=color, linewidths=width))
            each.autoscale_view()
            each.set(title=titles[stage], aspect="equal", adjustable="datalim")
            each.locator_params(nbins=4)
    return axes


def _as_limits(limits: Sequence[float]) -> tuple[float, float, float, float]:
    """Return ``(left, right, bottom, top)`` from these four or from ``(low, high)``."""
    numbers = tuple(map(float, limits))
    numbers = numbers * 2 if len(numbers) == 2 else numbers
    if len(numbers) != 4 or not (numbers[0] < numbers[1] and numbers[2] < numbers[3]):
        raise ValueError(f"expected limits (low, high) or (left, right, bottom, top), increasing; got {tuple(limits)}")
    return numbers


def _grid_lines(extent: float, lines: int) -> Tensor:
    """Return vertical lines, horizontal lines and two circles, ``(2 * lines + 2, points, 2)``."""
    along = torch.linspace(-extent, extent, _POINTS, dtype=torch.float64)
    offsets = torch.linspace(-extent, extent, lines, dtype=torch.float64)
    vertical = torch.stack(torch.broadcast_tensors(offsets[:, None], along), -1)  # (lines, points, 2)
    angle = torch.linspace(0, 2 * torch.pi, _POINTS, dtype=torch.float64)
    circles = torch.tensor([1.0, 2.0])[:, None, None] * torch.stack([angle.cos(), angle.sin()], -1)
    return torch.cat([vertical, vertical.flip(-1), circles])
