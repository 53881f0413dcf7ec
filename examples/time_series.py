"""An autoregressive flow p(x_t | last m values) of household power by the minute, and a linear Gaussian model."""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from pyroflows import ElementwiseAffine, FitOptions, Flow, StandardNormal, fit, nsf
from pyroflows.plots import COLORS

M = 32  # minutes of context, of which two convolutions leave 5


def load(path: Path | None, rows: int) -> Tensor:
    """Return log kilowatts by the minute; without a file a simulated series of two levels, to see that it runs."""
    random = np.random.default_rng(0)
    if path is None:
        level = np.cumsum(random.random(rows) < 0.02) % 2
        return torch.from_numpy(level + (0.05 + 0.1 * level) * random.normal(size=rows)).float()
    with np.load(path) as arrays:
        watts = arrays["global_active_power_w"][:rows]
    return torch.from_numpy(np.log((watts + random.random(rows)) / 1000)).float()  # noise as wide as the rounding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="the file power_raw.npz")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder for time_series.png")
    parser.add_argument("--quick", action="store_true", help="a few steps; without --data on a simulated series")
    options = parser.parse_args()
    if options.data is None and not options.quick:
        parser.error("expected --data, or --quick for a simulated series; got neither")
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = 4_000 if options.quick else 100_000
    first, second = int(0.7 * rows), int(0.8 * rows)
    x = load(options.data, rows)
    x = (x - x[:first].mean()) / x[:first].std()
    past, future = x.unfold(0, M + 1, 1).split([M, 1], 1)
    # Training, validation and test in order of time, without a value in two of them.
    train, held_out, test = slice(0, first - M), slice(first, second - M), slice(second, None)
    design = torch.cat([past, torch.ones(len(past), 1)], 1).double()
    residuals = future.double() - design @ torch.linalg.lstsq(design[train], future[train].double()).solution
    linear = torch.distributions.Normal(0.0, residuals[train].std()).log_prob(residuals[test])[:, 0]
    convolutions = nn.Conv1d(1, 16, 5, stride=2), nn.GELU(), nn.Conv1d(16, 16, 5, stride=2), nn.GELU()
    embedding = nn.Sequential(nn.Unflatten(1, (1, M)), *convolutions, nn.Flatten(), nn.Linear(16 * 5, 32))
    splines = nsf(1, autoregressive=True, context_features=32, num_layers=2, hidden_features=(64, 64), bound=5.0)
    location = ElementwiseAffine(1, context_features=32, hidden_features=(64,))
    flow = Flow(StandardNormal(1), [*splines.layers, location], embedding=embedding)
    validation, epochs = (future[held_out], past[held_out]), 2 if options.quick else 10
    settings = {"learning_rate": 2e-3, "options": FitOptions(ema_decay=0.999), "seed": 0, "progress": False}
    fit(flow, future[train], context=past[train], validation=validation, epochs=epochs, **settings)
    gain = flow.log_prob(future[test], past[test]).detach() - linear
    blocks = gain[: len(gain) // 240 * 240].view(-1, 240).mean(1)  # of four hours: neighbouring minutes are alike
    print(f"linear Gaussian {linear.mean():.3f}, flow {(linear + gain).mean():.3f} nats a minute, {len(gain)} minutes")
    figure = Figure(figsize=(11, 4), layout="constrained")
    for ax, start in zip(figure.subplots(1, 2, sharey=True), (int(0.85 * rows), int(0.9 * rows)), strict=True):
        series = x[start - M : start].expand(500, M)
        for _ in range(60):
            series = torch.cat([series, flow.sample((), series[:, -M:])], 1)
        for tail, alpha in ((0.05, 0.25), (0.25, 0.45)):
            low, high = np.quantile(series[:, M:].numpy(), [tail, 1 - tail], axis=0)
            ax.fill_between(range(60), low, high, color=COLORS[0], alpha=alpha, lw=0, label=f"{1 - 2 * tail:.0%} band")
        ax.plot(range(-M, 60), x[start - M : start + 60].numpy(), color=COLORS[6], label="observed")
        ax.set(title=f"an hour from minute {start}", xlabel="minutes ahead", ylabel="log power, standardised")
    ax.legend()
    figure.savefig(options.output / "time_series.png", dpi=110)
    error = blocks.std() / len(blocks) ** 0.5
    print(f"gain of the flow over the linear Gaussian, standard error {error:.3f}: {gain.mean():.3f} nats per minute")


if __name__ == "__main__":
    main()
