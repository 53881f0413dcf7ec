"""fit_posterior with no option set, and NumPyro's NUTS of 4 x (1,000 + 1,000) draws, on the same posteriors.

python tests/benchmarks/nuts.py --data DATA --numpyro PYTHON --output results/nuts.json
python tests/benchmarks/nuts.py --names network horseshoe slopes responses --seeds 3 --numpyro PYTHON --cache FOLDER

Of thirteen posteriors of posteriordb, with DATA/posteriordb/, or of four of 62 to 193 latents on simulated data, whose
reference is NUTS of 4 x 6,000 draws, kept in the cache. PYTHON is the interpreter of an environment with jax, numpyro.
Each fit runs in a process of its own, on one thread; processor seconds are those of the call, compilation included and
imports not. Errors are the largest of a mean, in deviations, and the largest relative one of a deviation; of the
network, whose weights are symmetric, they are those of the mean function at 50 points.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from common import large_posteriors
from common.posteriordb_models import MODELS, load_posterior

from pyroflows import fit_posterior, moment_table

THREADS = {
    "OMP_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}


LARGE = list(large_posteriors.MODELS)
Draws = dict[str, torch.Tensor]


def case_of(name: str, data: Path | None) -> tuple:
    """Return a model, its data, and the function from draws of its sites to the columns that are compared."""
    if name not in LARGE:
        case = load_posterior(name, data)
        return case.model, case.data, case.to_reference
    data = large_posteriors.simulate(name)
    return large_posteriors.MODELS[name], data, _functions if name == "network" else _columns


def _columns(draws: Draws) -> torch.Tensor:
    names = sorted(name for name in draws if name not in ("factor", "slab", "local", "z", "tau"))  # without heavy tails
    return torch.cat([draws[name].reshape(len(draws[name]), -1) for name in names], 1)


def _functions(draws: Draws) -> torch.Tensor:
    x = torch.linspace(-2, 2, 50, dtype=torch.float64)
    first, second = draws["first"].reshape(-1, 2, 20), draws["second"].reshape(-1, 20)
    hidden = torch.tanh(2 * (x[:, None] * first[:, None, 0] + first[:, None, 1]))
    return (hidden * second[:, None]).sum(-1) / 20**0.5 + draws["offset"].reshape(-1, 1)


def fit(name: str, data: Path, output: str, seed: int) -> None:
    """Fit one posterior, and write draws, seconds, verdict and evidence."""
    torch.set_num_threads(1)
    model, arguments, _ = case_of(name, data)
    began = time.process_time()
    posterior = fit_posterior(model, **arguments, seed=seed, progress=False)
    draws = posterior.draws(4000)
    seconds = time.process_time() - began
    evidence = {"verdict": posterior.verdict, "evidence": [posterior.log_evidence, posterior.log_evidence_error]}
    np.savez(output, **{key: value.numpy() for key, value in draws.items()}, seconds=seconds, **evidence)


def run(command: list[str], output: str) -> dict[str, np.ndarray]:
    subprocess.run(command, check=True, env={**os.environ, **THREADS})
    with np.load(output) as arrays:
        return {key: arrays[key] for key in arrays}


def draws_of(found: dict[str, np.ndarray]) -> Draws:
    return {key: torch.from_numpy(value).double() for key, value in found.items()}


class Comparison:
    """Runs of both sides on one posterior."""

    def __init__(self, name: str, options: argparse.Namespace, folder: str):
        self.name, self.options, self.output = name, options, f"{folder}/draws.npz"
        _, arguments, self.to_columns = case_of(name, options.data)
        self.data = f"{folder}/data.npz"
        np.savez(self.data, **{key: value.numpy() for key, value in arguments.items()})
        if name in LARGE:
            self.reference = self.to_columns(draws_of(self.long_run()))
        else:
            self.reference = load_posterior(name, options.data).reference

    def nuts(self, seed: int, method: str, number: int) -> dict[str, np.ndarray]:
        script = str(Path(__file__).with_name("numpyro_models.py"))
        command = [self.options.numpyro, script, self.name, self.data, self.output, str(seed), method, str(number)]
        return run(command, self.output)

    def long_run(self) -> dict[str, np.ndarray]:
        """Return the draws of the reference, which are read from the cache or written there."""
        path = self.options.cache / f"{self.name}.npz"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, **self.nuts(1000, "sequential", 6000))
        with np.load(path) as arrays:
            return {key: arrays[key] for key in arrays if key != "seconds"}

    def errors(self, found: dict[str, np.ndarray]) -> dict[str, float]:
        """Return seconds and errors of draws."""
        seconds = float(found.pop("seconds"))
        columns = self.to_columns(draws_of(found))
        moments = moment_table(columns, self.reference, [str(k) for k in range(columns.shape[1])])
        return {"seconds": seconds, "mean": moments.worst_mean_error, "sd": moments.worst_sd_error}

    def row(self, seed: int) -> dict:
        here = [sys.executable, __file__, "--fit", self.name, self.output, "--seed", str(seed)]
        found = run([*here, *(["--data", str(self.options.data)] if self.options.data else [])], self.output)
        row = {"name": self.name, "seed": seed, "verdict": str(found.pop("verdict"))}
        row["evidence"] = found.pop("evidence").tolist()
        row["pyroflows"] = self.errors(found)
        methods = ("sequential", "vectorized") if self.name not in LARGE else ("sequential",)
        peers = [self.errors(self.nuts(seed, method, 1000)) for method in methods]
        row["NUTS"] = min(peers, key=lambda result: result["seconds"])
        return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("PYROFLOWS_DATA"))
    parser.add_argument("--numpyro", default="python", help="interpreter of an environment with jax and numpyro")
    parser.add_argument("--names", nargs="*", choices=[*MODELS, *LARGE], default=list(MODELS))
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path("references"), help="folder for reference draws by NUTS")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--fit", nargs=2, metavar=("NAME", "OUTPUT"), help="fit one posterior in this process")
    options = parser.parse_args()
    if options.fit:
        return fit(options.fit[0], options.data, options.fit[1], options.seed)
    if subprocess.run([options.numpyro, "-c", "import numpyro"], capture_output=True, check=False).returncode:
        sys.exit(f"expected an interpreter with jax and numpyro; got {options.numpyro}")
    print("| posterior | seed | s | NUTS s | mean error | NUTS | sd error | NUTS | evidence | verdict |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.names:
            comparison = Comparison(name, options, folder)
            for seed in range(options.seed, options.seed + options.seeds):
                rows.append(row := comparison.row(seed))
                ours, nuts = row["pyroflows"], row["NUTS"]
                evidence = "{:.2f} ± {:.2f}".format(*row["evidence"])
                print(
                    f"| {name} | {seed} | {ours['seconds']:.1f} | {nuts['seconds']:.1f} | {ours['mean']:.3f} | "
                    f"{nuts['mean']:.3f} | {ours['sd']:.1%} | {nuts['sd']:.1%} | {evidence} | {row['verdict']} |",
                    flush=True,
                )
    faster = sum(row["pyroflows"]["seconds"] < row["NUTS"]["seconds"] for row in rows)
    print(f"\nfaster in {faster} of {len(rows)}")
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
