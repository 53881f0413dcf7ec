"""Images: a small Glow of scikit-learn's digits next to a Gaussian mixture, in bits per dimension and as samples."""

import math
import time
import warnings
from typing import Any

import torch
from matplotlib.figure import Figure
from sklearn import mixture
from torch import Tensor

from pyroflows import plots
from pyroflows.cli.demo.comparison import Density, Part, compare, echo, fit_flows, sizes
from pyroflows.data import load_images
from pyroflows.dequantizers import UniformDequantizer
from pyroflows.flow import Flow
from pyroflows.layers import Sigmoid
from pyroflows.models import glow
from pyroflows.priors import GaussianMixture
from pyroflows.training import FitOptions

__all__ = ["run"]

_SHAPE, _PIXELS, _LEVELS, _ALPHA = (1, 8, 8), 64, 17, 0.01
_DRAWS = 8


def run(seed: int, quick: bool, until: float) -> Part:
    """Digits of 8 x 8 pixels with 17 levels each."""
    components, copies, epochs = (2, 1, 2) if quick else (8, 4, 50)
    data, dequantizer = load_images("digits", seed=seed), UniformDequantizer(_SHAPE, _LEVELS)
    fitted, seconds = _mixture(data.train, components, copies)
    note = f"{components} components, full covariance, of logits of the pixels"
    models = [Density("Gaussian mixture", fitted.log_prob, lambda n: fitted.sample((n,)), note, seconds)]
    flow = glow(_SHAPE, num_levels=2, num_steps=4, hidden_channels=48, alpha=_ALPHA, dequantizer=dequantizer)
    options: dict[str, Any] = {"epochs": epochs, "batch_size": 128, "learning_rate": 4e-3, "seed": seed}
    options |= {"patience": 20, "options": FitOptions(ema_decay=0.99)}
    models += fit_flows({"Glow": flow}, "", data.train, data.validation, until, **options)
    bits = {"Gaussian mixture": _bits(fitted, data.test, seed), "Glow": _bits(flow, data.test, seed)}
    names = ("bits_per_dim", "below_mixture")
    rows, numbers = compare(models, bits, lambda values: bits["Gaussian mixture"] - values, names, 3, "+")
    samples = [dequantizer.quantize(model.sample(64).reshape(64, *_SHAPE)) for model in models]
    titles = [f"{name}: {of['bits_per_dim']:.3f} bits per dimension" for name, of in numbers.items()]
    figure = Figure(figsize=(12.6, 4.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    plots.image_grid(data.test[:64], left, num_levels=_LEVELS, title="64 test images")
    plots.image_grid(samples[1], middle, num_levels=_LEVELS, title=titles[1])
    plots.image_grid(samples[0], right, num_levels=_LEVELS, title=titles[0])
    figure.suptitle("Digits: real ones and samples at temperature 1")
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
        {"images": sizes(data), "models": numbers},
        figure,
        "test images, and samples of the Glow and of the Gaussian mixture",
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
    loc, covariance, weights = map(torch.from_numpy, (fitted.means_, fitted.covariances_, fitted.weights_))
    prior = GaussianMixture(
        _PIXELS,
        components,
        learnable=False,
        covariance="full",
        loc=loc.float(),
        scale_tril=torch.linalg.cholesky(covariance).float(),
        weights=weights.float(),
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
