"""Fits: training curves and test scores."""

from collections.abc import Mapping

from matplotlib.axes import Axes

from pyroflows.plots.canvas import COLORS, COLUMN, STYLES, drawing
from pyroflows.training import FitResult

__all__ = ["log_likelihoods", "training_curves"]


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
