"""Flows of 8 x 8 digits beside a Gaussian mixture: bits per dimension, samples, and walks between digits."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.mixture import GaussianMixture

from pyroflows import FitOptions, Flow, Logit, bits_per_dim, fit, glow, interpolate, realnvp, sample_images
from pyroflows.data import ImageData, load_images
from pyroflows.dequantizers import UniformDequantizer, VariationalDequantizer
from pyroflows.plots import save_image_grid

SHAPE, LEVELS, ALPHA = (1, 8, 8), 17, 0.01
GLOW = {"num_levels": 2, "num_steps": 4, "hidden_channels": 64, "alpha": ALPHA}
REALNVP = {"num_levels": 2, "num_blocks": 2, "hidden_channels": 32, "alpha": ALPHA}
FLOWS: dict[str, Callable[[], Flow]] = {
    "glow": lambda: glow(SHAPE, dequantizer=UniformDequantizer(SHAPE, LEVELS), **GLOW),
    "glow-variational": lambda: glow(SHAPE, dequantizer=VariationalDequantizer(SHAPE, LEVELS), **GLOW),
    "realnvp": lambda: realnvp(SHAPE, dequantizer=UniformDequantizer(SHAPE, LEVELS), **REALNVP),
}


def mixture_bits(data: ImageData, seed: int) -> float:
    """Fit a Gaussian mixture to logits of dequantised images; give its bits per dimension, the mean over 8 draws."""
    torch.manual_seed(seed)
    logit, dequantizer = Logit(SHAPE, ALPHA).double(), UniformDequantizer(SHAPE, LEVELS).double()

    def draw(images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        y, log_q = dequantizer(images)
        z, log_det = logit.forward_and_log_det(y)
        return z.flatten(1).numpy(), (log_det - log_q).numpy()

    rows = np.concatenate([draw(data.train)[0] for _ in range(4)])
    mixture = GaussianMixture(8, reg_covar=1e-2, random_state=seed).fit(rows)
    scores = [mixture.score_samples(z) + constant for z, constant in (draw(data.test) for _ in range(8))]
    return float(-np.mean(scores) / 64 / np.log(2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flows", nargs="+", choices=FLOWS, default=list(FLOWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("."), help="folder for JSON, PNG and checkpoints")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)  # networks this small are slower on more
    options.output.mkdir(parents=True, exist_ok=True)
    data = load_images("digits")
    settings = {
        "epochs": 100,
        "batch_size": 128,
        "learning_rate": 2e-3,
        "patience": 20,
        "options": FitOptions(ema_decay=0.99),
    }
    if options.quick:
        options.seeds, settings["epochs"] = 1, 2
    results: dict[str, list[float]] = {"mixture": [mixture_bits(data, seed) for seed in range(options.seeds)]}
    curves, seconds = {}, {}
    for name in options.flows:
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            flow, file = FLOWS[name](), f"digits_{name}_{seed}"
            file = options.output / f"{file}.ckpt"
            done = fit(flow, data.train, validation=data.validation, seed=seed, checkpoint=file, **settings)
            bits = bits_per_dim(flow, data.test, num_draws=8, seed=seed)
            results.setdefault(name, []).append(bits.value)
            curves[f"{name} {seed}"], seconds[f"{name} {seed}"] = done.history, done.seconds
            print(f"{name}, seed {seed}: {bits}, {done.seconds:.0f} s", flush=True)
        walk = interpolate(flow, data.test[:4], data.test[4:8], num=8).flatten(0, 1)
        picture = torch.cat([data.test[:16], sample_images(flow, 32, temperature=0.8, seed=0), walk])
        save_image_grid(picture, options.output / f"digits_{name}.png", num_levels=LEVELS, enlarge=5)
    (options.output / "digits_glow.json").write_text(
        json.dumps({"test_bits_per_dim": results, "seconds": seconds, "history": curves}, indent=1)
    )
    for name, values in results.items():
        print(f"{name}: {np.mean(values):.4f} +- {np.std(values):.4f} bits/dim over {len(values)} seeds")


if __name__ == "__main__":
    main()
