"""Every example runs, quickly, and ends with a line that has a number to check."""

from __future__ import annotations

import ast
import json
import math
import re

import numpy as np
import pytest
from scripts import EXAMPLES, run_example

from pyroflows.data.benchmarks import COLUMNS

SCRIPTS = {path.stem: path.read_text() for path in sorted(EXAMPLES.glob("*.py"))}
# What a quick run writes into its --output folder, and the bounds of its last number; without an entry, any number.
QUICK = {
    "affine": ([], 0.0, 0.05),
    "anomaly": ([], 0.5, 1.0),
    "checkerboard": (["checkerboard.png"], 3.46, 5.0),
    "conditional": ([], 0.0, 1.0),
    "eight_schools": ([], 0.0, 1.0),
    "flow_prior": (["flow_prior.png"], 0.0, 0.3),
    "funnel": (["funnel.png"], 1.0, 6.0),
    "gaussian_mixture": (["gaussian_mixture.png"], -0.1, 3.0),
    "linear_mixing": (["linear_mixing.png", "linear_mixing.json"], -20.0, 20.0),
    "log_density": ([], 0.0, 0.01),
    "logistic_regression": ([], 5.0, 60.0),
    "next_data": ([], 0.0, 0.1),
    "simulator": (["simulator.png"], 0.0, 1.0),
    "time_series": (["time_series.png"], -2.0, 1.0),
    "two_moons": (["two_moons.png"], -0.05, 3.0),
    "vae": ([], -1.0, 1.0),
}
RUN = [name for name, text in SCRIPTS.items() if name in QUICK or ('"--quick"' in text and '"--data"' not in text)]


@pytest.mark.parametrize("name", RUN)
def test_it_runs_and_ends_with_a_number(name, tmp_path):
    files, low, high = QUICK.get(name, ([], -math.inf, math.inf))
    output = ["--output", tmp_path / "new"] if '"--output"' in SCRIPTS[name] else []
    done = run_example(name, "--quick", *output, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    last = done.stdout.splitlines()[-1]
    number = float(re.findall(r"-?\d+\.\d+", last)[-1])
    assert math.isfinite(number)
    assert low <= number <= high, last
    for file in files:
        assert (tmp_path / "new" / file).stat().st_size > 1000
    assert {path.name for path in tmp_path.iterdir()} <= {"new"}


def test_power_runs_on_a_file_of_the_same_layout(tmp_path):
    random = np.random.default_rng(0)
    np.savez(tmp_path / "power.npz", **{name: random.integers(0, 200, 2000).astype(np.uint16) for name in COLUMNS})
    options = ["--flows", "maf", "nsf-ar", "--minutes", 0.03, "--no-compile", "--batch-size", 64]
    done = run_example("power", "--data", "power.npz", *options, "--output", "power.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "power.json").read_text())["results"]
    assert set(results) == {"maf", "nsf-ar"}
    for result in results.values():
        assert math.isfinite(result["test_nats"])
        assert result["standard_error"] > 0
        assert result["test_rows"] == 200


@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS)
def test_it_is_short_and_says_what_it_shows(text):
    assert len(text.splitlines()) < 80
    assert ast.get_docstring(ast.parse(text))
    assert text.startswith('"""')
    assert 'if __name__ == "__main__":' in text
