"""Fits: training curves, test scores, posterior draws against reference draws, and k-hat of importance weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from pyroflows.diagnostics import kde, khat_threshold, moment_table
from pyroflows.diagnostics.arrays import NumPyArray, Values, as_array, as_columns
from pyroflows.plots.canvas import COLORS, COLUMN, STYLES, AxesArray, AxesLike, drawing, panels
from pyroflows.training import FitResult

__all__ = ["khat", "log_likelihoods", "posterior_draws", "training_curves"]

Khats = float | Sequence[float] | NumPyArray
KhatsByName = Mapping[str, Khats | Mapping[int, Khats]]

_HIGHEST = 3.0  # k-hats above are not drawn to scale: beyond 1 weights do not even have a mean
_DOTTED: Any = {"color": "black", "linestyle": (0, (1, 1))}


def training_curves(
    results: Mapping[str, FitResult], ax: Axes | None = None, *, title: str = "Training", skip: int = 0
) -> Axes:
    """Draw the loss of fits by epoch, on the validation rows if there are any; a dot marks the best epoch.

    Args:
        results: fits by name, at least one.
        ax, title: the axes, new ones by default, and their title.
        skip: epochs to leave out at the start, where high losses would flatten the rest; at least two are drawn.

    Example:
        >>> result = FitResult({"train": [2.0, 1.5], "validation": [2.1, 1.7]}, best_epoch=1)
        >>> training_curves({"a flow": result}).get_ylabel()
        'negative log-likelihood (nats per row)'
    """
    if not results:
        raise ValueError("expected at least one fit; got none")
    with drawing(ax) as ax:
        for i, (name, result) in enumerate(results.items()):
            color, style = COLORS[i % len(COLORS)], STYLES[i % len(STYLES)]
            losses = result.history.get("validation") or result.history["train"]
            epochs, start = range(1, len(losses) + 1), max(0, min(skip, len(losses) - 2))
            ax.plot(epochs[start:], losses[start:], style, color=color, label=name)
            if result.best_epoch is not None and result.best_epoch >= start:
                ax.plot(epochs[result.best_epoch], losses[result.best_epoch], "o", color=color)
        ax.set(title=title, xlabel="epoch", ylabel="negative log-likelihood (nats per row)")
        ax.grid(alpha=0.3)
        ax.legend(frameon=False)
    return ax


def log_likelihoods(
    scores: Mapping[str, tuple[float, float]], ax: Axes | None = None, *, title: str = "Test log-likelihood"
) -> Axes:
    """Draw the mean log-likelihood and its standard error for each model, the first on top.

    Args:
        scores: ``(mean, standard error)`` in nats per row, by the name of the model; at least one.
        ax, title: the axes, new ones by default, and their title.

    Example:
        >>> log_likelihoods({"Gaussian": (-14.0, 1.2), "flow": (-7.5, 0.9)}).get_xlabel()
        'nats per row; higher is better'
    """
    if not scores:
        raise ValueError("expected at least one score; got none")
    with drawing(ax, (COLUMN, 0.7 + 0.35 * len(scores))) as ax:
        heights = list(range(len(scores)))[::-1]
        for i, (mean, error) in enumerate(scores.values()):
            ax.errorbar(mean, heights[i], xerr=error, fmt="o", color=COLORS[i % len(COLORS)], capsize=4)
            ax.annotate(f"{mean:.2f}", (mean, heights[i]), xytext=(0, 7), textcoords="offset points", ha="center")
        ax.set_yticks(heights, list(scores))
        ax.set(title=title, xlabel="nats per row; higher is better", ylim=(-0.5, len(scores) - 0.4))
        ax.grid(axis="x", alpha=0.3)
    return ax


def posterior_draws(
    draws: Values,
    reference: Values,
    ax: AxesLike | None = None,
    *,
    names: Sequence[str] | None = None,
    labels: tuple[str, str] = ("draws", "reference"),
) -> AxesArray:
    """Draw the density of each column of posterior draws, as a line, over that of reference draws, filled.

    Densities are ArviZ's kernel estimates over the central 99 % of both. Titles show the error of the mean, in standard
    deviations (sd) of the reference, and the ratio of the sds, from :func:`pyroflows.moment_table`.

    Args:
        draws, reference, names: as in :func:`pyroflows.moment_table`, which says what is refused; draws come from
            ``Posterior.draws``, for example.
        ax: ``d`` axes, one for each column; new ones by default.
        labels: of the two, for the legend.

    Example:
        >>> draws, reference = np.random.default_rng(0).normal(size=(2, 2000))
        >>> posterior_draws({"mu": draws}, {"mu": reference})[0].get_xlabel()
        'mu'
    """
    table = moment_table(draws, reference, names)
    curves = []
    for x, y in zip(*(rows.T for rows in as_columns(draws, reference)[:2]), strict=True):
        ends = np.quantile(x, (0.005, 0.995)), np.quantile(y, (0.005, 0.995))
        limits = (float(np.min(ends)), float(np.max(ends)))
        curves.append((kde(x, limits=limits), kde(y, limits=limits)))
    with panels(ax, len(table.names)) as axes:
        for i, (each, (curve, reference_curve)) in enumerate(zip(axes, curves, strict=True)):
            each.fill_between(*reference_curve, color="0.8", linewidth=0, label=labels[1])
            each.plot(*curve, color=COLORS[1], label=labels[0])
            each.set_title(f"mean {table.mean_error[i]:+z.2f} sd\nsd ratio {table.sd_ratio[i]:.2f}")
            each.set(xlabel=table.names[i], ylabel="density" if i == 0 else "", yticks=[])
            each.set_ylim(0, 1.35 * max(curve[1].max(), reference_curve[1].max()))  # room for the legend
            each.locator_params(axis="x", nbins=4)
        axes[0].legend(frameon=False, handlelength=1.2, loc="upper right")
    return axes


def khat(values: KhatsByName, ax: Axes | None = None, *, title: str = "Tails of importance weights") -> Axes:
    """Draw k-hats of importance weights as dots: by name, or by the number of draws in a subset.

    Weights can be trusted below the dotted line, :func:`khat_threshold <pyroflows.diagnostics.khat_threshold>` of the
    draws in a subset, or 0.7 if their number is not given. A k-hat above 3, or infinite, is a triangle at the top.

    Args:
        values: for each name one k-hat or several, such as ``posterior.khat``; or, for every name, k-hats by the number
            of draws from :func:`khat_by_size <pyroflows.diagnostics.khat_by_size>`, with a line through their medians.
        ax, title: the axes, new ones by default, and their title.

    Example:
        >>> khat({"flow": (0.2, 0.3, 0.25), "mean field": (0.8, 1.1, 0.9)}).get_ylabel()
        'Pareto k-hat'
    """
    if not values:
        raise ValueError("expected at least one k-hat; got none")
    if len(by_size := {isinstance(k, Mapping) for k in values.values()}) > 1:
        raise TypeError("expected k-hats by the draws in a set for every name or for none; got both")
    groups: dict[str, dict[int, NumPyArray]] = {}
    for position, (name, k) in enumerate(values.items()):
        subsets = k if isinstance(k, Mapping) else {position: k}
        groups[name] = {place: _as_khats(name, khats) for place, khats in subsets.items()}
    if not all(groups.values()):
        raise ValueError("expected at least one k-hat of each name; got none")
    sizes = set().union(*groups.values()) if True in by_size else ()
    thresholds = {size: khat_threshold(size) for size in sorted(sizes)}
    every = np.concatenate([khats for group in groups.values() for khats in group.values()])
    to_scale = every[every <= _HIGHEST]
    low, top = min(0.0, to_scale.min(initial=0.0) - 0.05), max(1.1, to_scale.max(initial=0.0) + 0.1)
    with drawing(ax) as ax:
        if thresholds:
            _draw_by_size(ax, groups, top, thresholds)
        else:
            _draw_by_name(ax, groups, top)
        ax.set(title=title, ylabel="Pareto k-hat")
        ax.set_ylim(low, 1.15 * top if thresholds else top)  # room for the legend
        ax.grid(axis="y", alpha=0.3)
    return ax


def _draw_by_name(ax: Axes, groups: dict[str, dict[int, NumPyArray]], top: float) -> None:
    for position, group in enumerate(groups.values()):
        khats = group[position]
        # Side by side, dots that are nearly equal can be counted.
        _dots(ax, position + 0.08 * (np.arange(len(khats)) - (len(khats) - 1) / 2), khats, top, COLORS[0])
    ax.axhline(0.7, **_DOTTED)
    ax.set_xticks(range(len(groups)), list(groups))
    ax.set_xlim(-0.5, len(groups) - 0.5)


def _draw_by_size(ax: Axes, groups: dict[str, dict[int, NumPyArray]], top: float, thresholds: dict[int, float]) -> None:
    for number, (name, group) in enumerate(groups.items()):
        color, style = COLORS[number % len(COLORS)], STYLES[number % len(STYLES)]
        offset = 1.08 ** (number - (len(groups) - 1) / 2)  # dots of two names side by side
        for size, khats in group.items():
            _dots(ax, np.full(len(khats), size * offset), khats, top, color)
        medians = [min(float(np.median(group[size])), top) for size in sorted(group)]
        ax.plot(sorted(group), medians, style, color=color, label=name)
    sizes = list(thresholds)
    ax.plot(sizes, list(thresholds.values()), label="threshold", **_DOTTED)
    ax.set(xscale="log", xlabel="draws in a set")
    if len(sizes) <= 8:
        ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
        ax.minorticks_off()
    ax.legend(frameon=False, loc="upper left", ncols=3, columnspacing=1)


def _dots(ax: Axes, x: NumPyArray, khats: NumPyArray, top: float, color: str) -> None:
    inside = khats <= top
    ax.plot(x[inside], khats[inside], "o", color=color, alpha=0.5, markeredgewidth=0)
    ax.plot(x[~inside], np.full((~inside).sum(), top), "^", color=color, clip_on=False)


def _as_khats(name: str, values: Any) -> NumPyArray:
    khats = as_array(f"k-hats of {name!r}", np.atleast_1d(values), 1, finite=False)
    if not len(khats) or np.isnan(khats).any():
        raise ValueError(f"expected k-hats of {name!r}, none of them NaN; got {khats.tolist()}")
    return khats
