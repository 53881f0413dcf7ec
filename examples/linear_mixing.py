"""A reversal, a fixed shuffle or a learned LU between Glow's couplings: training curves on patches of photographs."""

import argparse
import json
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_images
from torch import Tensor

from pyroflows import FitOptions, fit, glow
from pyroflows.data import make_table
from pyroflows.plots import training_curves


def patches(side: int, seed: int) -> Tensor:
    """Cut scikit-learn's two photographs, in grey with uniform noise, into patches: (rows, side * side) in (0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for photograph in load_sample_images().images:
        grey = torch.from_numpy(photograph.copy()).double().mean(-1).floor()  # (height, width)
        grey = (grey + torch.rand(grey.shape, generator=generator, dtype=torch.float64)) / 256
        rows.append(grey.unfold(0, side, side).unfold(1, side, side).reshape(-1, side * side))
    return torch.cat(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("."), help="folder for linear_mixing.png and .json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # with more, networks this small are slower

    table = make_table(patches(4, options.seed), name="patches", seed=options.seed)
    train = table.train[:2000] if options.quick else table.train
    results, test = {}, {}
    for name, permutation in (("reversal", "reverse"), ("fixed shuffle", "shuffle"), ("learned LU", "lu")):
        torch.manual_seed(options.seed)
        flow = glow(table.features, num_steps=8, hidden_features=(64, 64), permutation=permutation)
        results[name] = fit(
            flow,
            train,
            validation=table.validation,
            epochs=2 if options.quick else 25,
            batch_size=512,
            learning_rate=2e-3,
            options=FitOptions(warmup=0.1),
            max_seconds=100,
            seed=options.seed,
            progress=False,
        )
        with torch.no_grad():
            test[name] = float(-flow.log_prob(table.test).mean())
        print(f"{name:<14} test {test[name]:.3f} nats per row, {results[name].seconds:.0f} s", flush=True)

    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    ax = figure.subplots()
    training_curves(results, ax, title="Mixing in a Glow of 8 steps, 4x4 patches: validation", skip=2)
    figure.savefig(options.output / "linear_mixing.png", dpi=110)
    record = {name: {"test": test[name], **result.history} for name, result in results.items()}
    (options.output / "linear_mixing.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    others = min(test["reversal"], test["fixed shuffle"])
    print(f"gain of the learned LU over the better of the other two: {others - test['learned LU']:.3f} nats per row")


if __name__ == "__main__":
    main()
