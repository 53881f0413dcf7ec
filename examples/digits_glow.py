"""Flows of 8 x 8 digits and a Gaussian mixture: bits per dimension, samples, and interpolations between digits."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.mixture import GaussianMixture

import pyroflows as pf
from pyroflows.data import ImageData, load_images
from pyroflows.plots import save_image_grid

SHAPE, LEVELS, ALPHA = (1, 8, 8), 17, 0.01
GLOW = {"num_levels": 2, "num_steps": 4, "hidden_channels": 64, "alpha": ALPHA}
REALNVP = {"num_levels": 2, "num_blocks": 2, "hidden_channels": 32, "alpha": ALPHA}
FLOWS: dict[str, Callable[[], pf.Flow]] = {
    "glow": lambda: pf.glow(SHAPE, dequantizer=pf.UniformDequantizer(SHAPE, LEVELS), **GLOW),
    "glow-variational": lambda: pf.glow(SHAPE, dequantizer=pf.VariationalDequantizer(SHAPE, LEVELS), **GLOW),
    "realnvp": lambda: pf.realnvp(SHAPE, dequantizer=pf.UniformDequantizer(SHAPE, LEVELS), **REALNVP),
}


def mixture_bits(data: ImageData, seed: int) -> float:
    """Fit a Gaussian mixture to logits of dequantised images; return its bits per dimension, the mean over 8 draws."""
    torch.manual_seed(seed)
    logit, dequantizer = pf.Logit(SHAPE, ALPHA).double(), pf.UniformDequantizer(SHAPE, LEVELS).double()

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
    torch.set_num_threads(1)  # with more, networks this small are slower
    options.output.mkdir(parents=True, exist_ok=True)
    data = load_images("digits")
    settings = {"batch_size": 128, "learning_rate": 2e-3, "patience": 20, "options": pf.FitOptions(ema_decay=0.99)}
    settings["epochs"], options.seeds = (2, 1) if options.quick else (100, options.seeds)
    results: dict[str, list[float]] = {"mixture": [mixture_bits(data, seed) for seed in range(options.seeds)]}
    histories, seconds = {}, {}
    for name in options.flows:
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            flow, file = FLOWS[name](), options.output / f"digits_{name}_{seed}.ckpt"
            result = pf.fit(flow, data.train, validation=data.validation, seed=seed, checkpoint=file, **settings)
            bits = pf.bits_per_dim(flow, data.test, num_draws=8, seed=seed)
            results.setdefault(name, []).append(bits.value)
            histories[f"{name} {seed}"], seconds[f"{name} {seed}"] = result.history, result.seconds
            print(f"{name}, seed {seed}: {bits}, {result.seconds:.0f} s", flush=True)
        between = pf.interpolate(flow, data.test[:4], data.test[4:8], num=8).flatten(0, 1)
        picture = torch.cat([data.test[:16], pf.sample_images(flow, 32, temperature=0.8, seed=0), between])
        save_image_grid(picture, options.output / f"digits_{name}.png", num_levels=LEVELS, enlarge=5)
    record = {"test_bits_per_dim": results, "seconds": seconds, "history": histories}
    (options.output / "digits_glow.json").write_text(json.dumps(record, indent=1))
    for name, values in results.items():
        print(f"{name}: {np.mean(values):.4f} +- {np.std(values):.4f} bits/dim over {len(values)} seeds")


if __name__ == "__main__":
    main()
