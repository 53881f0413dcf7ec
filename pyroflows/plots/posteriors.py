"""Posteriors: draws against a reference's, and how far importance weights can be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from pyroflows.diagnostics.arrays import NumPyArray, Values, as_array, as_columns
from pyroflows.diagnostics.samples import kde, moment_table
from pyroflows.diagnostics.weights import khat_threshold
from pyroflows.plots.canvas import COLORS, STYLES, AxesArray, drawing, panels

__all__ = ["khat", "posterior_draws"]

Khats = float | Sequence[float] | NumPyArray

_HIGHEST = 3.0  # k-hat worth a place in a picture: beyond 1 weights do not even have a mean


def posterior_draws(
    draws: Values,
    reference: Values,
    ax: Axes | Sequence[Axes] | AxesArray | None = None,
    *,
    names: Sequence[str] | None = None,
    labels: tuple[str, str] = ("draws", "reference"),
) -> AxesArray:
    """Draw the density of each column of posterior draws, as a line, over that of reference draws, filled.

    Densities are ArviZ's kernel estimates, over the middle 99 % of both. Titles tell the error of the mean, in the
    reference's standard deviations (sd), and the ratio of the standard deviations, as :func:`pyroflows.moment_table`.

    Args:
        draws: draws as rows, or by name with the first dimension that of the draws, as ``Posterior.draws`` gives them.
        reference: the reference draws, in the same columns; where both are given by name, the names are matched.
        ax: an axes for each column; new ones by default.
        names: of the columns; by default those of the dicts with indices, such as ``theta[0]``, or ``x[0]``.
        labels: what the two are.

    Shapes:
        draws: ``(n, d)``, or ``(n, *shape)`` by name; reference: ``(m, d)``, or ``(m, *shape)`` by name.

    Returns:
        The axes, shape ``(d,)``.

    Raises:
        TypeError: not numbers.
        ValueError: columns or names that do not match, fewer than two different draws, or another number of axes.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> axes = posterior_draws({"mu": rng.normal(size=2000)}, {"mu": rng.normal(size=4000)})
        >>> axes[0].get_xlabel()
        'mu'
    """
    table = moment_table(draws, reference, names)
    if isinstance(draws, Mapping) and isinstance(reference, Mapping):
        reference = {name: reference[name] for name in draws}
    found, wanted = as_columns("draws", draws)[0], as_columns("the reference", reference)[0]
    curves = []
    for mine, theirs in zip(found.T, wanted.T, strict=True):
        low, high = np.quantile(mine, (0.005, 0.995)), np.quantile(theirs, (0.005, 0.995))
        limits = (float(min(low[0], high[0])), float(max(low[1], high[1])))
        curves.append((kde(mine, limits=limits), kde(theirs, limits=limits)))
    with panels(ax, len(table.names)) as axes:
        for i, (each, (mine, theirs)) in enumerate(zip(axes, curves, strict=True)):
            each.fill_between(*theirs, color="0.8", linewidth=0, label=labels[1])
            each.plot(*mine, color=COLORS[1], label=labels[0])
            each.set_title(f"mean {table.mean_error[i]:+z.2f} sd\nsd ratio {table.sd_ratio[i]:.2f}")
            each.set(xlabel=table.names[i], ylabel="density" if i == 0 else "", yticks=[])
            each.set_ylim(0, 1.35 * max(mine[1].max(), theirs[1].max()))  # room for the legend
            each.locator_params(axis="x", nbins=4)
        axes[0].legend(frameon=False, handlelength=1.2, loc="upper right")
    return axes


def khat(
    values: Mapping[str, Khats | Mapping[int, Khats]],
    ax: Axes | None = None,
    *,
    title: str = "Tails of importance weights",
) -> Axes:
    """Draw Pareto shapes of importance weights, as dots: of several sets of draws, or by the draws in a set.

    The dotted line, below which weights can be trusted, is
    :func:`khat_threshold <pyroflows.diagnostics.khat_threshold>` of the draws in a set; where their number is
    not given, 0.7, which holds from about 2,200 draws on. A k-hat above 3, or infinite, is a triangle at the top.

    Args:
        values: by the name of what they are of, one k-hat or several, such as ``posterior.khat``; or for each name what
            :func:`khat_by_size <pyroflows.diagnostics.khat_by_size>` gives, k-hats by the draws in a set,
            through whose medians a line goes.
        ax: the axes; new ones by default.
        title: of the axes.

    Raises:
        TypeError: k-hats that are no numbers, or are by size for some names alone.
        ValueError: no k-hat, one that is NaN, or a set of fewer than 30 draws.

    References:
        Pareto Smoothed Importance Sampling, Vehtari et al., 2024 (arXiv:1507.02646).

    Example:
        >>> khat({"flow": (0.2, 0.3, 0.25), "mean field": (0.8, 1.1, 0.9)}).get_ylabel()
        'Pareto k-hat'
        >>> khat({"flow": {100: (0.2, 0.3), 200: [0.25]}}).get_xlabel()
        'draws in a set'
    """
    if not values:
        raise ValueError("expected at least one k-hat; got none")
    by_size = {isinstance(given, Mapping) for given in values.values()}
    if len(by_size) > 1:
        raise TypeError("expected k-hats by the draws in a set for every name or for none; got both")
    groups: dict[str, dict[int, NumPyArray]] = {}
    for number, (name, given) in enumerate(values.items()):
        sets = given if isinstance(given, Mapping) else {number: given}
        groups[name] = {place: _khats(name, k) for place, k in sets.items()}
    if not all(groups.values()):
        raise ValueError("expected at least one k-hat of each name; got none")
    sizes = sorted({size for group in groups.values() for size in group}) if True in by_size else []
    thresholds = [khat_threshold(size) for size in sizes]
    found = np.concatenate([k for group in groups.values() for k in group.values()])
    shown = found[found <= _HIGHEST]
    low, top = min(0.0, shown.min(initial=0.0) - 0.05), max(1.1, shown.max(initial=0.0) + 0.1)
    dotted: Any = {"color": "black", "linestyle": (0, (1, 1))}
    with drawing(ax) as ax:
        for number, (name, group) in enumerate(groups.items()):
            color = COLORS[number % len(COLORS)] if sizes else COLORS[0]
            for place, k in group.items():
                # Side by side, dots that are nearly equal can be counted, and those of two guides told apart.
                x = place + 0.08 * (np.arange(len(k)) - (len(k) - 1) / 2)
                if sizes:
                    x = np.full(len(k), place * 1.08 ** (number - (len(groups) - 1) / 2))
                inside = k <= top
                ax.plot(x[inside], k[inside], "o", color=color, alpha=0.5, markeredgewidth=0)
                ax.plot(x[~inside], np.full((~inside).sum(), top), "^", color=color, clip_on=False)
            if sizes:
                medians = [min(float(np.median(group[size])), top) for size in sorted(group)]
                ax.plot(sorted(group), medians, STYLES[number % len(STYLES)], color=color, label=name)
        if sizes:
            ax.plot(sizes, thresholds, label="threshold", **dotted)
            ax.set(xscale="log", xlabel="draws in a set")
            if len(sizes) <= 8:
                ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
                ax.minorticks_off()
            ax.legend(frameon=False, loc="upper left", ncols=3, columnspacing=1)
        else:
            ax.axhline(0.7, **dotted)
            ax.set_xticks(range(len(groups)), list(groups))
            ax.set_xlim(-0.5, len(groups) - 0.5)
        ax.set(title=title, ylabel="Pareto k-hat", ylim=(low, 1.15 * top if sizes else top))  # room for the legend
        ax.grid(axis="y", alpha=0.3)
    return ax


def _khats(name: str, values: Any) -> NumPyArray:
    k = as_array(f"k-hats of {name!r}", np.atleast_1d(values), 1, finite=False)
    if not len(k) or np.isnan(k).any():
        raise ValueError(f"expected k-hats of {name!r}, none of them NaN; got {k.tolist()}")
    return k
