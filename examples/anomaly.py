"""Log-density as an anomaly score: detectors trained on benign tumours must tell malignant ones apart."""

import argparse

import torch
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits
from torch import Tensor

from pyroflows import FitOptions, StudentT, fit, realnvp
from pyroflows.data import load_table, make_table


def normality(train: Tensor, validation: Tensor, rows: Tensor, seed: int, quick: bool) -> dict[str, Tensor]:
    """Fit each detector to the train rows, and return its scores of other rows, high for those like the train rows."""
    torch.manual_seed(seed)
    features = train.shape[1]
    flow = realnvp(
        features, num_layers=6, hidden_features=(64,), dropout=0.4, prior=StudentT(features, df=10.0, learnable=True)
    )
    fit(
        flow,
        train,
        validation=validation,
        epochs=3 if quick else 300,
        batch_size=128,
        learning_rate=5e-3,
        options=FitOptions(weight_decay=1e-3),
        patience=60,
        seed=seed,
        progress=False,
    )
    mixtures = [
        GaussianMixture(number, reg_covar=ridge, random_state=seed).fit(train.double())
        for number in (1, 2, 3, 4)
        for ridge in (1e-6, 1e-3, 1e-1)
    ]
    mixture = max(mixtures, key=lambda mixture: mixture.score(validation.double()))
    forest = IsolationForest(n_estimators=50 if quick else 300, random_state=seed).fit(torch.cat([train, validation]))
    with torch.no_grad():
        log_density = flow.log_prob(rows)
    return {
        "flow": log_density,
        "Gaussian mixture": torch.from_numpy(mixture.score_samples(rows.double())),
        "isolation forest": torch.from_numpy(forest.score_samples(rows)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first of five seeds, of splits and fits")
    parser.add_argument("--quick", action="store_true", help="one short fit, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)  # with more, networks and tables this small are slower
    threadpool_limits(1)

    tumours = load_table("breast_cancer", test=0, validation=0, standardize=False)
    benign = tumours.labels["train"] == 1
    areas: dict[str, list[float]] = {}
    for seed in range(options.seed, options.seed + (1 if options.quick else 5)):
        table = make_table(tumours.train[benign], test=0.3, validation=0.15, seed=seed)
        malignant = ((tumours.train[~benign] - table.mean) / table.scale).float()
        rows = torch.cat([table.test, malignant])
        is_benign = torch.cat([torch.ones(len(table.test)), torch.zeros(len(malignant))])
        for name, scores in normality(table.train, table.validation, rows, seed, options.quick).items():
            areas.setdefault(name, []).append(roc_auc_score(is_benign, scores))
        print(f"split {seed}: " + ", ".join(f"{name} {area[-1]:.3f}" for name, area in areas.items()), flush=True)
    for name, area in areas.items():
        mean = torch.tensor(area).mean()
        print(f"area under the ROC curve, {name:<17} {mean:.3f} (from {min(area):.3f} to {max(area):.3f})")
    print(f"area under the ROC curve of the flow: {torch.tensor(areas['flow']).mean():.3f}")


if __name__ == "__main__":
    main()
