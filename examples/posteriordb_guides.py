"""The ELBO of fit_posterior against those of Pyro's guides, with as many evaluations of the model, on posteriordb."""

import argparse
import json
import math
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions.transforms as T
import torch
from common.posteriordb_models import MODELS, elbo_of, load_posterior
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoIAFNormal, AutoMultivariateNormal, AutoNormalizingFlow
from pyro.infer.autoguide.initialization import InitMessenger

from pyroflows import fit_posterior
from pyroflows.inference.sites import initial_value

PARTICLES = 128


def couplings(features: int) -> T.ComposeTransformModule:
    """Four affine couplings with reversals between them, for AutoNormalizingFlow."""
    pair = T.affine_coupling, lambda n, _: T.permute(n, torch.arange(n).flip(0))
    return T.ComposeTransformModule([make(features, [64, 64]) for make in 4 * pair])


GUIDES = {
    "AutoDiagonalNormal": AutoDiagonalNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoIAFNormal": partial(AutoIAFNormal, num_transforms=3, hidden_dim=[64]),
    "AutoNormalizingFlow": partial(AutoNormalizingFlow, init_transform_fn=couplings),
}


def best_elbo(name: str, model, data: dict, steps: int, seed: int) -> float:
    """Train one of Pyro's guides at two learning rates, and return the better ELBO."""
    best = -math.inf
    for rate in (1e-2, 1e-3):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        guide = GUIDES[name](InitMessenger(initial_value)(model))  # Pyro's initialization refuses improper priors
        svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": rate}), Trace_ELBO(PARTICLES, vectorize_particles=True))
        try:
            for _ in range(steps):
                svi.step(**data)
            best = max(best, elbo_of(model, guide, data))
        except (ValueError, RuntimeError) as error:
            print(f"  {name}, rate {rate:g}: {type(error).__name__}: {str(error).splitlines()[0][:80]}", flush=True)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of posteriordb/; by default PYROFLOWS_DATA")
    parser.add_argument("--output", type=Path, default=Path("posteriordb_guides.json"))
    parser.add_argument("--names", nargs="*", default=list(MODELS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3500, help="the largest number of steps of fit_posterior")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # Pyro's guides are float32 otherwise
    rows = []
    for name in options.names:
        case = load_posterior(name, options.data)
        ours = fit_posterior(case.model, **case.data, seed=options.seed, max_steps=options.steps, progress=False)
        steps = -(-ours.evaluations // PARTICLES)  # including those of the initialization and the search
        elbos = {guide: best_elbo(guide, case.model, case.data, steps, options.seed) for guide in GUIDES}
        rows.append({"name": name, "evaluations": ours.evaluations, "fit_posterior": ours.elbo, **elbos})
        print(f"{name}: {ours.elbo:.2f}", *(f"{guide} {elbo:.2f}" for guide, elbo in elbos.items()), flush=True)
        options.output.write_text(json.dumps(rows, indent=1))
    won = [all(row["fit_posterior"] > row[guide] for guide in GUIDES) for row in rows]
    print(f"the better ELBO: {sum(won)} of {len(rows)}")


if __name__ == "__main__":
    main()
