"""The time of a step of SVI with AutoFlow beside a hand-written ELBO step and Pyro's AutoIAFNormal, in one run."""

import argparse
import json
import platform
from collections.abc import Callable
from itertools import count
from pathlib import Path
from statistics import median

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal
from vector_step import CLOCKS

from pyroflows import AutoFlow, PathELBO, iaf, realnvp
from pyroflows.networks import MADE

LATENTS, PARTICLES = 16, 16
COVARIANCE = 0.5 * torch.eye(LATENTS) + 0.5


def model() -> None:
    """A correlated Gaussian over 16 latents, which costs next to nothing."""
    pyro.sample("z", dist.MultivariateNormal(torch.zeros(LATENTS), COVARIANCE))


def svi_step(guide: Callable, elbo: type = Trace_ELBO) -> Callable[[], float]:
    """Give a step of SVI with 16 vectorised particles."""
    optimizer = pyro.optim.Adam({"lr": 1e-3})
    svi = SVI(model, guide, optimizer, elbo(num_particles=PARTICLES, vectorize_particles=True))
    return svi.step


def module_step(guide: AutoFlow, elbo: type = Trace_ELBO) -> Callable[[], float]:
    """Give the same step with Pyro's ELBO as a module, whose parameters one optimizer of torch takes all at once."""
    loss_of = elbo(num_particles=PARTICLES, vectorize_particles=True)(model, guide)
    optimizer = torch.optim.Adam(guide.parameters(), 1e-3)

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def hand_written(guide: AutoFlow) -> Callable[[], None]:
    """Give the same step without Pyro: draw, score both densities, step."""
    flow, target = guide.flow, dist.MultivariateNormal(torch.zeros(LATENTS), COVARIANCE)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        u, log_q = flow.rsample_and_log_prob(PARTICLES)
        (log_q - target.log_prob(u)).mean().backward()
        optimizer.step()

    return step


def evaluations(guide: AutoFlow, step: Callable) -> list[int]:
    """Count how often a step evaluates each conditioner."""
    step()  # the first step also looks for the plates
    counts = []
    for module in guide.flow.modules():
        if isinstance(module, MADE):
            counts.append(0)

            def note(*_: object, number: int = len(counts) - 1) -> None:
                counts[number] += 1

            module.register_forward_hook(note)
    step()
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: beside other work, of one thread")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder for JSON and table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pyro.enable_validation(False)

    names = count()

    def guide(builder: Callable = iaf, **sizes: object) -> AutoFlow:
        # Guides of one name would take turns in Pyro's store, which nobody does who trains one.
        named = type(f"AutoFlow{next(names)}", (AutoFlow,), {})
        return named(model, builder, init="none", hidden_features=(64,), residual=False, **sizes)

    three = {"num_layers": 3, "permutation": "reverse"}
    counted = guide(**three)
    print("evaluations of each conditioner in a step:", evaluations(counted, svi_step(counted)))
    steps = {
        "hand-written, 3 IAF layers": hand_written(guide(**three)),
        "SVI, AutoFlow, 3 IAF layers": svi_step(guide(**three)),
        "ELBO as a module, AutoFlow, 3 IAF layers": module_step(guide(**three)),
        "SVI, AutoFlow, 3 IAF layers, PathELBO": svi_step(guide(**three), PathELBO),
        "SVI, AutoIAFNormal, 3 layers": svi_step(AutoIAFNormal(model, hidden_dim=[64], num_transforms=3)),
        "hand-written, RealNVP": hand_written(guide(realnvp)),
        "SVI, AutoFlow, RealNVP": svi_step(guide(realnvp)),
        "ELBO as a module, AutoFlow, RealNVP": module_step(guide(realnvp)),
        "SVI, AutoFlow, RealNVP, PathELBO": svi_step(guide(realnvp), PathELBO),
    }
    clock = CLOCKS[options.clock]
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.repeats):
        for name, step in steps.items():  # interleaved, so that other work on the machine meets all alike
            began = clock()
            step()
            seconds[name].append(clock() - began)
    results = {name: median(times[10:]) for name, times in seconds.items()}
    lines = ["| step of 16 particles | ms | x hand-written |", "| --- | ---: | ---: |"]
    for name, value in results.items():
        base = results["hand-written, RealNVP" if "RealNVP" in name else "hand-written, 3 IAF layers"]
        lines.append(f"| {name} | {1e3 * value:.2f} | {value / base:.2f} |")
    print("\n".join(lines))
    versions = {"torch": torch.__version__, "pyro": pyro.__version__, "python": platform.python_version()}
    options.output.mkdir(parents=True, exist_ok=True)
    record = {"versions": versions, "clock": options.clock, "median_seconds": results}
    (options.output / "svi_step.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.output / "svi_step.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
