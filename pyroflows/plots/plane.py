"""The plane: densities, samples, and what a flow makes of a grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from torch import Tensor

from pyroflows.arguments import check_number, check_sizes
from pyroflows.contexts import evaluating
from pyroflows.flow import Flow
from pyroflows.plots.canvas import COLORS, AxesArray, check_limits, drawing, panels

__all__ = ["deformed_grid", "density_2d", "samples_2d"]

_ROWS = 2**14
_POINTS = 200  # of a line of the grid


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
        density: a flow of two features, which is evaluated as after training, or a function from rows to their
            log-densities in nats.
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
    left, right, bottom, top = check_limits(limits)
    if points < 2:
        raise ValueError(f"expected points of at least 2; got {points}")
    log_prob = getattr(density, "log_prob", density)
    parameter = next(density.parameters(), None) if isinstance(density, torch.nn.Module) else None
    across, up = (
        torch.linspace(low, high, points, dtype=torch.float64) for low, high in ((left, right), (bottom, top))
    )
    grid = torch.cartesian_prod(up, across).flip(-1)  # (points * points, 2), the rows of the picture one by one
    grid = grid.to(torch.get_default_dtype()) if parameter is None else grid.to(parameter)
    with torch.no_grad(), evaluating(density):
        values = torch.cat([log_prob(part) for part in grid.split(_ROWS)]).double().exp().cpu()
    # imshow, not pcolormesh: a grid of 40,000 cells as one small picture in PDF and SVG too.
    half_x, half_y = (float(values_[1] - values_[0]) / 2 for values_ in (across, up))
    with drawing(ax) as ax:
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
            # Within the axes' own coordinates, it stays as tall as the picture.
            bar = ax.figure.colorbar(image, cax=ax.inset_axes((1.04, 0, 0.05, 1)), label="density")
            bar.ax.tick_params(labelsize=plt.rcParams["ytick.labelsize"])
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
    # Points that overlap must still show how many they are: the more, the smaller and fainter.
    size, alpha = np.clip(6000 / max(len(rows), 1), 1.5, 14), np.clip(600 / max(len(rows), 1), 0.25, 0.8)
    with drawing(ax) as ax:
        ax.scatter(rows[:, 0], rows[:, 1], s=size, alpha=alpha, color=color, linewidths=0, label=label, rasterized=True)
        ax.set(title=title, xlabel=names[0], ylabel=names[1])
        if limits is not None:
            left, right, bottom, top = check_limits(limits)
            ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    return ax


def deformed_grid(
    flow: Flow,
    ax: Axes | Sequence[Axes] | AxesArray | None = None,
    *,
    context: Tensor | None = None,
    extent: float = 2.5,
    lines: int = 11,
    max_panels: int = 8,
) -> AxesArray:
    """Draw a grid of the latent plane, and what becomes of it after each layer, up to the data.

    Two circles go with it, which hold 39 % and 86 % of a standard normal.

    Args:
        flow: a flow of two features.
        ax: an axes for each panel; new ones by default.
        context: of one row, where the flow takes one.
        extent: of the grid, from the middle to each side.
        lines: of the grid in each direction.
        max_panels: of more layers, this many panels are spread evenly, the latent and the data among them.

    Shapes:
        context: ``(context_features,)``, or what the flow's embedding maps to that, without a batch.

    Returns:
        The axes, shape ``(panels,)``: the latent, and the layers', at most ``max_panels``.

    Raises:
        TypeError: not a flow.
        ValueError: the flow is not of two features, a number is out of range, or another number of axes.

    Example:
        >>> from pyroflows import realnvp
        >>> axes = deformed_grid(realnvp(2, num_layers=2), max_panels=3)
        >>> [each.get_title() for each in axes][0], len(axes)
        ('latent', 3)
    """
    if not isinstance(flow, Flow):
        raise TypeError(f"expected a Flow; got {type(flow).__name__}")
    if flow.event_shape != (2,):
        raise ValueError(f"expected a flow of two features; got one of shape {tuple(flow.event_shape)}")
    check_number("extent", extent, "(0, inf)")
    check_sizes(lines=lines, max_panels=max_panels)
    if lines < 2 or max_panels < 2:
        raise ValueError(f"expected at least 2 lines and 2 panels; got {lines} and {max_panels}")
    along = torch.linspace(-extent, extent, _POINTS, dtype=torch.float64)
    at = torch.linspace(-extent, extent, lines, dtype=torch.float64)
    upright = torch.stack(torch.broadcast_tensors(at[:, None], along), -1)  # (lines, points, 2)
    angle = torch.linspace(0, 2 * torch.pi, _POINTS, dtype=torch.float64)
    circles = torch.tensor([1.0, 2.0])[:, None, None] * torch.stack([angle.cos(), angle.sin()], -1)
    x = torch.cat([upright, upright.flip(-1), circles]).to(flow.device, flow.dtype).flatten(0, 1)
    stages, titles = [x], ["latent"]
    with torch.no_grad(), evaluating(flow):
        embedded = flow.embed(context)
        for number, layer in enumerate(flow.layers, 1):
            x = layer.forward_and_log_det(x, embedded if layer.context_features else None)[0]
            stages.append(x)
            titles.append(f"{number}: {type(layer).__name__}")
    titles[-1] = f"data, after {titles[-1]}"
    shown = np.unique(np.rint(np.linspace(0, len(stages) - 1, min(max_panels, len(stages)))).astype(int))
    with panels(ax, len(shown)) as axes:
        for each, stage in zip(axes, shown, strict=True):
            curves = stages[stage].double().cpu().unflatten(0, (-1, _POINTS)).numpy()
            groups = np.split(curves, [lines, 2 * lines])
            for group, color, width in zip(groups, (COLORS[0], COLORS[1], COLORS[6]), (0.7, 0.7, 1.2), strict=True):
                each.add_collection(LineCollection(list(group), colors=color, linewidths=width))
            each.autoscale_view()
            each.set(title=titles[stage], aspect="equal", adjustable="datalim")
            each.locator_params(nbins=4)
    return axes
