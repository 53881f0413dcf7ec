"""Variational autoencoders of 8x8 digits: the test ELBO with diagonal, planar, IAF and RealNVP posteriors."""

import argparse
import time
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyroflows import AmortizedFlow, ElementwiseAffine, Flow, StandardNormal, iaf, planar, realnvp
from pyroflows.data import load_table

LATENTS = 8
SMALL = {"hidden_features": (64,), "permutation": "reverse", "norm": "none"}
FLOWS = {  # each follows a diagonal Gaussian whose parameters come from the encoder
    "diagonal": None,
    "planar": partial(planar, num_layers=8),
    "iaf": partial(iaf, num_layers=4, **SMALL),
    "realnvp": partial(realnvp, num_layers=8, **SMALL),
}


def posterior(builder, features: int, *, context_features: int) -> Flow:
    layers = [] if builder is None else builder(features, context_features=context_features).layers
    gaussian = ElementwiseAffine(features, context_features=context_features, hidden_features=())
    return Flow(StandardNormal(features), [gaussian, *layers])


def test_elbo(builder, train: Tensor, test: Tensor, epochs: int, seed: int) -> float:
    torch.manual_seed(seed)
    pyro.clear_param_store()
    decoder = nn.Sequential(nn.Linear(LATENTS, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 64))
    encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 64), nn.ReLU())

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENTS), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    guide = AmortizedFlow(model, partial(posterior, builder), encoder).setup(train[:2])
    optimizer = pyro.optim.ClippedAdam({"lr": 3e-3, "lrd": 0.03 ** (1 / (epochs * (len(train) // 128)))})
    svi = SVI(model, guide, optimizer, Trace_ELBO(max_plate_nesting=1))
    for _ in range(epochs):
        for rows in torch.randperm(len(train)).split(128)[:-1]:
            svi.step(train[rows])
    guide.eval(), decoder.eval()
    elbo = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    return -elbo.loss(model, guide, test) / len(test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds, epochs = (2, 2) if options.quick else (options.seeds, options.epochs)
    digits = load_table("digits", standardize=False)
    train, test = ((part > 7.5).float() for part in (torch.cat([digits.train, digits.validation]), digits.test))
    print(f"{len(train)} training and {len(test)} test images; nats per image, {seeds} seeds, {epochs} epochs")
    elbos = {}
    for name, builder in FLOWS.items():
        start = time.perf_counter()
        elbos[name] = torch.tensor([test_elbo(builder, train, test, epochs, seed) for seed in range(seeds)])
        gain = elbos[name] - elbos["diagonal"]
        mean, above = (f"{t.mean():.2f} +- {t.std() / seeds**0.5:.2f}" for t in (elbos[name], gain))
        print(f"{name:<9} test ELBO {mean}, above diagonal {above}, {time.perf_counter() - start:.0f} s", flush=True)
    print(f"IAF above diagonal: {(elbos['iaf'] - elbos['diagonal']).mean():.3f} nats per image")


if __name__ == "__main__":
    main()
