"""The ELBO of fit_posterior beside those of Pyro's own guides, at as many evaluations of the model, on posteriordb."""

import argparse
import json
import math
from functools import partial
from pathlib import Path

import pyro
import torch
from posteriordb_models import MODELS, load_posterior
from pyro.distributions.transforms import affine_coupling, iterated
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoIAFNormal, AutoMultivariateNormal, AutoNormalizingFlow
from pyro.infer.autoguide.initialization import InitMessenger

from pyroflows import fit_posterior
from pyroflows.inference.density import initial_value

PARTICLES = 128


def couplings(features: int) -> object:
    """Make the flow of AutoNormalizingFlow: four affine couplings."""
    return iterated(4, affine_coupling, hidden_dims=[64, 64])(features)


GUIDES = {
    "AutoDiagonalNormal": AutoDiagonalNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoIAFNormal": partial(AutoIAFNormal, num_transforms=3, hidden_dim=[64]),
    "AutoNormalizingFlow": partial(AutoNormalizingFlow, init_transform_fn=couplings),
}


def best_elbo(name: str, model, data: dict, steps: int, seed: int) -> float:
    """Train one of Pyro's guides at two learning rates; give the better ELBO."""
    best = -math.inf
    for rate in (1e-2, 1e-3):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        # Pyro's own initial values do not know improper priors.
        guide = GUIDES[name](InitMessenger(initial_value)(model))
        svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": rate}), Trace_ELBO(PARTICLES, vectorize_particles=True))
        try:
            for _ in range(steps):
                svi.step(**data)
            with torch.no_grad():
                elbo = -Trace_ELBO(4000, vectorize_particles=True).loss(model, guide, **data)
            best = max(best, elbo if math.isfinite(elbo) else -math.inf)
        except (ValueError, RuntimeError) as error:
            print(f"  {name}, rate {rate:g}: {type(error).__name__}: {str(error).splitlines()[0][:80]}", flush=True)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder that holds posteriordb/; by default PYROFLOWS_DATA")
    parser.add_argument("--output", type=Path, default=Path("posteriordb_guides.json"))
    parser.add_argument("--names", nargs="*", default=list(MODELS), help="posteriors; by default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # Pyro's guides are float32 otherwise

    rows = []
    for name in options.names:
        case = load_posterior(name, options.data)
        ours = fit_posterior(
            case.model, **case.data, seed=options.seed, max_steps=20 if options.quick else 3500, progress=False
        )
        # Every draw of every step, those of the start and of the search for a learning rate included.
        steps = -(-ours.evaluations // PARTICLES)
        row = {"name": name, "evaluations": ours.evaluations, "fit_posterior": ours.elbo}
        row |= {guide: best_elbo(guide, case.model, case.data, steps, options.seed) for guide in GUIDES}
        rows.append(row)
        shown = "  ".join(f"{key} {value:.2f}" for key, value in row.items() if key not in ("name", "evaluations"))
        print(f"{name} ({ours.evaluations} evaluations): {shown}", flush=True)
        options.output.write_text(json.dumps(rows, indent=1))
    won = sum(all(row["fit_posterior"] > row[guide] for guide in GUIDES) for row in rows)
    print(f"the better ELBO: {won} of {len(rows)}")


if __name__ == "__main__":
    main()
