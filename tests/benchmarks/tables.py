"""Densities of tables by FlowDensity with no option set, beside simple densities: held-out nats a row.

python tests/benchmarks/tables.py --data DATA --splits 1 --output results/tables.json
python tests/benchmarks/tables.py --names iris wine galaxies

Of six tables of scikit-learn, the six of DATA/uci/small.npz, ten simulated ones whose truth is known, and those of
DATA/adbench (rows that are no anomalies). A fifth of the rows is held out. Columns of whole numbers get noise between 0
and 1, the same for all methods; constant columns are left out, also those that are
constant in the rows to train on. The mixture has as many components as are best on a
fifth of the training rows. FlowDensity is the best if it is ahead of all others or within one paired standard error.
"""

import argparse
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from sklearn import datasets
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import FactorAnalysis
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity

from pyroflows import FlowDensity

Score = Callable[[np.ndarray], np.ndarray]
Truth = Callable[[np.ndarray], np.ndarray] | None

SKLEARN = ("iris", "wine", "diabetes", "breast_cancer", "linnerud", "digits")


def real_tables(data: Path | None) -> Iterator[tuple[str, np.ndarray, Truth]]:
    """Yield names and rows, with as much noise in whole columns as tells them apart."""
    for name in SKLEARN:
        yield name, getattr(datasets, f"load_{name}")().data, None
    if data is None:
        return
    with np.load(data / "uci" / "small.npz") as arrays:
        for name in arrays:
            if not name.endswith("_fold"):
                yield f"uci_{name}", arrays[name], None
    for path in sorted((data / "adbench").glob("*.npz"), key=lambda path: int(path.stem.split("_")[0])):
        with np.load(path) as arrays:
            yield path.stem.split("_", 1)[1], arrays["X"][arrays["y"] == 0], None


def simulated() -> Iterator[tuple[str, np.ndarray, Truth]]:
    """Yield tables with a known density."""
    rng = np.random.default_rng(0)
    u = rng.uniform(size=(2000, 3))
    yield "uniform", u, lambda x: np.where(((x >= 0) & (x <= 1)).all(1), 0.0, -np.inf)
    yield "exponential", rng.exponential(size=(2000, 3)), lambda x: stats.expon.logpdf(x).sum(1)
    yield "half_normal", np.abs(rng.normal(size=(2000, 3))), lambda x: stats.halfnorm.logpdf(x).sum(1)
    yield "decades", np.exp(3 * rng.normal(size=(2000, 3))), lambda x: stats.lognorm(3).logpdf(x).sum(1)
    angles = rng.vonmises(2.5, 1.0, size=(2000, 2))
    yield "angles", angles, lambda x: stats.vonmises(1.0, 2.5).logpdf(x).sum(1)
    yield "student", rng.standard_t(3, size=(2000, 4)), lambda x: stats.t(3).logpdf(x).sum(1)
    factor = rng.normal(size=(10, 10))
    normal = stats.multivariate_normal(np.zeros(10), factor @ factor.T)
    yield "normal", rng.normal(size=(1000, 10)) @ factor.T, normal.logpdf
    loadings = rng.normal(size=(200, 4))
    wide = stats.multivariate_normal(np.zeros(200), loadings @ loadings.T + np.eye(200))
    yield "wide", rng.normal(size=(500, 4)) @ loadings.T + rng.normal(size=(500, 200)), wide.logpdf
    bend = rng.normal(size=(2000, 2))
    bend[:, 1] = 0.3 * bend[:, 1] + bend[:, 0] ** 2
    yield "banana", bend, lambda x: stats.norm.logpdf(x[:, 0]) + stats.norm.logpdf(x[:, 1], x[:, 0] ** 2, 0.3)
    centres = 4 * rng.normal(size=(8, 5))
    clusters = centres[rng.integers(8, size=1500)] + rng.normal(size=(1500, 5))
    parts = [stats.multivariate_normal(centre, np.eye(5)) for centre in centres]
    yield "clusters", clusters, lambda x: np.logaddexp.reduce([part.logpdf(x) for part in parts]) - math.log(8)


def prepared(x: np.ndarray) -> np.ndarray:
    """Return columns that vary, with noise between 0 and 1 in those of whole numbers."""
    x = np.array(x, dtype=np.float64)
    is_whole = (x == np.round(x)).all(0)
    x = x + is_whole * np.random.default_rng(1).uniform(size=x.shape)
    return x[:, x.std(0) > 0]


def gaussian(x: np.ndarray) -> Score:
    found = LedoitWolf().fit(x)
    return stats.multivariate_normal(found.location_, found.covariance_).logpdf


def factor_analysis(x: np.ndarray) -> Score:
    train, held_out = _split(x, 1)
    numbers = [number for number in (1, 2, 3, 5, 8, 12) if number < x.shape[1]] or [1]
    best = max(numbers, key=lambda number: FactorAnalysis(number).fit(train).score(held_out))
    return FactorAnalysis(best).fit(x).score_samples


def mixture(x: np.ndarray) -> Score:
    """The best number of components, and the best of three floors of the covariances."""
    train, held_out = _split(x, 1)
    tried = [(number, floor) for number in (1, 2, 3, 5, 8, 12, 20, 32) for floor in (1e-6, 1e-3, 1e-2)]
    tried = [(number, floor) for number, floor in tried if number <= len(train) / 5]

    def fit(rows: np.ndarray, number: int, floor: float) -> GaussianMixture:
        return GaussianMixture(number, reg_covar=floor, random_state=0).fit(rows)

    best = max(tried, key=lambda options: fit(train, *options).score(held_out))
    return fit(x, *best).score_samples


def kernels(x: np.ndarray) -> Score:
    x = x[:4000]
    train, held_out = _split(x, 1)
    widths = np.geomspace(0.03, 1, 10)
    best = max(widths, key=lambda width: KernelDensity(bandwidth=width).fit(train).score(held_out))
    return KernelDensity(bandwidth=best).fit(x).score_samples


def named_flow(x: np.ndarray) -> Score:
    return FlowDensity("nsf", random_state=0).fit(x).score_samples


METHODS = {
    "Gaussian": gaussian,
    "factors": factor_analysis,
    "mixture": mixture,
    "KDE": kernels,
    "NSF": named_flow,
}


def _split(x: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.random.default_rng(seed).permutation(len(x))
    return x[order[len(x) // 5 :]], x[order[: len(x) // 5]]


def run(name: str, x: np.ndarray, truth: Truth, options: argparse.Namespace) -> dict:
    """Return the mean scores over splits, and the differences from FlowDensity with their errors."""
    x = prepared(x) if truth is None else x
    if len(x) > options.most_rows:
        x = x[np.random.default_rng(2).permutation(len(x))[: options.most_rows]]
    scores: dict[str, list[np.ndarray]] = {}
    seconds = []
    for split in range(options.splits):
        train, held_out = _split(x, 100 + split)
        varies = train.std(0) > 0
        train, held_out = train[:, varies], held_out[:, varies]
        began = time.process_time()
        density = FlowDensity(random_state=split).fit(train)
        seconds.append(time.process_time() - began)
        scores.setdefault("FlowDensity", []).append(density.score_samples(held_out))
        mean, std = train.mean(0), train.std(0)
        for method in options.methods:
            try:
                score = METHODS[method]((train - mean) / std)((held_out - mean) / std) - np.log(std).sum()
            except (ValueError, np.linalg.LinAlgError):  # a singular covariance
                score = np.full(len(held_out), -np.inf)
            scores.setdefault(method, []).append(score)
        if truth is not None:
            scores.setdefault("truth", []).append(truth(held_out))
    row = {"table": name, "rows": len(x), "columns": x.shape[1], "seconds": float(np.median(seconds))}
    joined = {method: np.concatenate(parts) for method, parts in scores.items()}
    row["scores"] = {method: float(values.mean()) for method, values in joined.items()}
    others = [method for method in joined if method not in ("FlowDensity", "truth")]
    best = max(others, key=lambda method: row["scores"][method])
    behind = joined[best] - joined["FlowDensity"]
    error = float(behind.std() / len(behind) ** 0.5)
    row |= {"best_other": best, "behind": float(behind.mean()), "error": error}
    row["is_best"] = bool(behind.mean() <= error)
    row["flow"] = repr(density.selection_)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("PYROFLOWS_DATA"))
    parser.add_argument("--names", nargs="*", help="tables; by default all")
    parser.add_argument("--leave-out", nargs="*", default=[], help="tables")
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--splits", type=int, default=1)
    parser.add_argument("--most-rows", type=int, default=10_000, help="of larger tables so many are drawn")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of mixtures that have not converged
    rows = []
    print(
        f"| table | rows x columns | s | FlowDensity | {' | '.join(options.methods)} | truth | behind the best other |"
    )
    print(f"| --- | --- | ---: | ---: | {'---: | ' * len(options.methods)}---: | ---: |")
    tables = [*simulated(), *real_tables(Path(options.data) if options.data else None)]
    for name, x, truth in tables:
        if name in options.leave_out or (options.names and name not in options.names):
            continue
        row = run(name, x, truth, options)
        rows.append(row)
        shown = [f"{row['scores'].get(method, math.nan):.3f}" for method in ("FlowDensity", *options.methods, "truth")]
        behind = f"{row['behind']:+.3f} ± {row['error']:.3f}{'' if row['is_best'] else ' (behind)'}"
        size = f"{row['rows']} x {row['columns']}"
        print(f"| {name} | {size} | {row['seconds']:.1f} | {' | '.join(shown)} | {behind} |", flush=True)
        if options.output:
            options.output.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"\nbest or within one error of it in {sum(row['is_best'] for row in rows)} of {len(rows)}")


if __name__ == "__main__":
    main()
