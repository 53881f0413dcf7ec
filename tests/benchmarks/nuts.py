"""fit_posterior with no option set beside NumPyro's NUTS on thirteen posteriors of posteriordb.

python tests/benchmarks/nuts.py --data DATA --numpyro PYTHON --output results/nuts.json

DATA holds posteriordb/; PYTHON is the interpreter of an environment with jax and numpyro. Each fit runs in a process of
its own, on one thread; processor seconds are those of the call, compilation included and imports not. Errors are the
largest of a mean, in deviations, and the largest relative one of a deviation, against the reference draws.
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
from common.posteriordb_models import MODELS, load_posterior

from pyroflows import fit_posterior, moment_table

THREADS = {
    "OMP_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}


def fit(name: str, data: Path, output: str, seed: int) -> None:
    """Fit one posterior, and write draws and seconds."""
    torch.set_num_threads(1)
    case = load_posterior(name, data)
    began = time.process_time()
    posterior = fit_posterior(case.model, **case.data, seed=seed, progress=False)
    draws = posterior.draws(4000)
    seconds = time.process_time() - began
    arrays = {key: value.numpy() for key, value in draws.items()}
    np.savez(output, **arrays, seconds=seconds, verdict=posterior.verdict)


def run(command: list[str], output: str) -> dict[str, np.ndarray]:
    subprocess.run(command, check=True, env={**os.environ, **THREADS})
    with np.load(output) as arrays:
        return {key: arrays[key] for key in arrays}


def compare(name: str, options: argparse.Namespace, folder: str) -> dict:
    """Run both on one posterior; return seconds and errors of each."""
    case = load_posterior(name, options.data)
    data, output = f"{folder}/data.npz", f"{folder}/draws.npz"
    np.savez(data, **{key: value.numpy() for key, value in case.data.items()})
    here = [sys.executable, __file__, "--data", str(options.data), "--fit", name, output, "--seed", str(options.seed)]
    peer = [options.numpyro, str(Path(__file__).with_name("numpyro_models.py")), name, data, output, str(options.seed)]
    row = {"name": name, "latents": len(case.names)}
    for side, command in (
        ("pyroflows", here),
        ("NUTS", [*peer, "sequential"]),
        ("NUTS vectorized", [*peer, "vectorized"]),
    ):
        found = run(command, output)
        seconds = float(found.pop("seconds"))
        if side == "pyroflows":
            row["verdict"] = str(found.pop("verdict"))
        draws = case.to_reference({key: torch.from_numpy(value).double() for key, value in found.items()})
        moments = moment_table(draws, case.reference, case.names)
        row[side] = {"seconds": seconds, "mean": moments.worst_mean_error, "sd": moments.worst_sd_error}
    vectorized = row.pop("NUTS vectorized")
    row["NUTS"] = min(row["NUTS"], vectorized, key=lambda result: result["seconds"])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("PYROFLOWS_DATA"))
    parser.add_argument("--numpyro", default="python", help="interpreter of an environment with jax and numpyro")
    parser.add_argument("--names", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--fit", nargs=2, metavar=("NAME", "OUTPUT"), help="fit one posterior in this process")
    options = parser.parse_args()
    if options.fit:
        return fit(options.fit[0], options.data, options.fit[1], options.seed)
    if subprocess.run([options.numpyro, "-c", "import numpyro"], capture_output=True, check=False).returncode:
        sys.exit(f"expected an interpreter with jax and numpyro; got {options.numpyro}")
    print("| posterior | latents | s | NUTS s | mean error | NUTS | sd error | NUTS | verdict |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.names:
            row = compare(name, options, folder)
            rows.append(row)
            ours, nuts = row["pyroflows"], row["NUTS"]
            print(
                f"| {name} | {row['latents']} | {ours['seconds']:.1f} | {nuts['seconds']:.1f} | {ours['mean']:.3f} | "
                f"{nuts['mean']:.3f} | {ours['sd']:.1%} | {nuts['sd']:.1%} | {row['verdict']} |",
                flush=True,
            )
    faster = sum(row["pyroflows"]["seconds"] < row["NUTS"]["seconds"] for row in rows)
    print(f"\nfaster in {faster} of {len(rows)}")
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
