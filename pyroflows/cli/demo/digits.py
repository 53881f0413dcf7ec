"""Images: a small Glow of scikit-learn's digits next to a Gaussian mixture, in bits per dimension and as samples."""

import math
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from sklearn import mixture
from torch import Tensor

from pyroflows import plots
from pyroflows.cli.demo.densities import fit_flows, mean_and_error
from pyroflows.cli.demo.part import Part, echo, one_thread, save
from pyroflows.data import load_images
from pyroflows.dequantizers import UniformDequantizer
from pyroflows.flow import Flow
from pyroflows.layers import Sigmoid
from pyroflows.models import glow
from pyroflows.priors import GaussianMixture
from pyroflows.training import FitOptions

__all__ = ["digits"]

_SHAPE, _PIXELS, _LEVELS, _ALPHA = (1, 8, 8), 64, 17, 0.01
_DRAWS = 8


def digits(output: Path, seed: int, quick: bool, until: float) -> Part:
    """Digits of 8 x 8 pixels with 17 levels each."""
    components, copies, epochs = (2, 1, 2) if quick else (8, 4, 50)
    data = load_images("digits", seed=seed)
    dequantizer = UniformDequantizer(_SHAPE, _LEVELS)
    with one_thread(seed):
        mixture_flow, mixture_seconds = _mixture(data.train, components, copies)
        flow = glow(
            _SHAPE,
            num_levels=2,
            num_steps=4,
            hidden_channels=48,
            alpha=_ALPHA,
            dequantizer=dequantizer,
        )
        options = {
            "epochs": epochs,
            "batch_size": 128,
            "learning_rate": 4e-3,
            "patience": 20,
            "options": FitOptions(ema_decay=0.99),
        }
        fitted = fit_flows({"Glow": flow}, "", data.train, data.validation, seed, until, options)[0]
        flows = {"Gaussian mixture": mixture_flow, "Glow": flow}
        bits = {name: _bits(each, data.test, seed) for name, each in flows.items()}
        samples = {name: dequantizer.quantize(each.sample(64).reshape(64, *_SHAPE)) for name, each in flows.items()}

    notes = {
        "Gaussian mixture": f"{components} components, full covariance, of logits of the pixels",
        "Glow": fitted.note,
    }
    seconds = {"Gaussian mixture": mixture_seconds, "Glow": fitted.seconds}
    numbers: dict[str, Any] = {
        "images": {"train": len(data.train), "validation": len(data.validation), "test": len(data.test)},
        "models": {},
    }
    rows = []
    for name, values in bits.items():
        (mean, error), (below, below_error) = map(mean_and_error, (values, bits["Gaussian mixture"] - values))
        difference = "-" if name == "Gaussian mixture" else f"{below:+.3f} ± {below_error:.3f}"
        rows.append((name, f"{mean:.3f} ± {error:.3f}", difference, f"{seconds[name]:.0f}", notes[name]))
        numbers["models"][name] = {
            "bits_per_dim": mean,
            "standard_error": error,
            "below_mixture": below,
            "below_mixture_standard_error": below_error,
            "seconds": round(seconds[name], 2),
            "note": notes[name],
        }
    numbers["models"]["Glow"] |= {"steps": fitted.result.steps, "stopped": fitted.result.stopped}  # type: ignore[union-attr]

    figure = Figure(figsize=(12.6, 4.8), layout="constrained")
    pictures = {"64 test images": data.test[:64]}
    for name in ("Glow", "Gaussian mixture"):
        mean = numbers["models"][name]["bits_per_dim"]
        pictures[f"{name}: {mean:.3f} bits per dimension"] = samples[name]
    for ax, (title, images) in zip(figure.subplots(1, 3), pictures.items(), strict=True):
        plots.image_grid(images, ax, num_levels=_LEVELS, title=title)
    figure.suptitle("Digits: real ones and samples at temperature 1")
    save(figure, output / "digits.png")
    return Part(
        "Images: digits",
        f"scikit-learn's digits, 8 x 8 pixels of {_LEVELS} levels: {len(data.train):,} images train, "
        f"{len(data.validation)} others choose when to stop, and {len(data.test)} test images are scored. Uniform "
        "noise dequantizes the levels, and a logit maps them to the real line, where the mixture is fitted, to "
        f"{copies} draws of the noise for each image. Bits per dimension include every constant, and are the mean over "
        f"{_DRAWS} draws of noise, the same for both models: fewer are better, and a uniform model has "
        f"log2 {_LEVELS} = {math.log2(_LEVELS):.2f}. The next column is the difference image by image.",
        ("model", "bits per dimension", "below the mixture", "seconds", "what it is"),
        rows,
        numbers,
        {"digits.png": "test images, and samples of the Glow and of the Gaussian mixture"},
    )


def _mixture(images: Tensor, components: int, copies: int) -> tuple[Flow, float]:
    """Fit a Gaussian mixture to logits of noisy images, and return it as the prior of a flow with a logit layer."""
    began = time.perf_counter()
    dequantizer, sigmoid = UniformDequantizer(_PIXELS, _LEVELS), Sigmoid(_PIXELS, _ALPHA)
    noisy = dequantizer(images.flatten(1).repeat(copies, 1))[0]
    logits = sigmoid.inverse_and_log_det(noisy)[0].double().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it need not converge
        fitted = mixture.GaussianMixture(components, reg_covar=1e-2, random_state=0).fit(logits)
    prior = GaussianMixture(
        _PIXELS,
        components,
        learnable=False,
        covariance="full",
        loc=torch.from_numpy(fitted.means_).float(),
        scale_tril=torch.linalg.cholesky(torch.from_numpy(fitted.covariances_)).float(),
        weights=torch.from_numpy(fitted.weights_).float(),
    )
    seconds = time.perf_counter() - began
    echo(f"  Gaussian mixture: {components} components, {seconds:.1f} s")
    return Flow(prior, sigmoid, dequantizer=dequantizer), seconds


@torch.no_grad()
def _bits(flow: Flow, images: Tensor, seed: int) -> Tensor:
    """Return the bits per dimension of each image, the mean over draws of noise that are the same for every flow."""
    x = images.reshape(-1, *flow.event_shape)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        log_probs = torch.stack([flow.dequantized_log_prob(x) for _ in range(_DRAWS)])
    return -log_probs.double().mean(0) / (_PIXELS * math.log(2))
