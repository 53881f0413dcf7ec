"""RealNVP conditioned on the class of each row: its likelihood with and without, and a classifier by Bayes' rule."""

import argparse

import torch
from sklearn.decomposition import PCA
from torch import Tensor
from torch.nn import functional as F

from pyroflows import FitOptions, Flow, fit, realnvp
from pyroflows.data import load_table


def log_joint(flow: Flow, x: Tensor, shares: Tensor) -> Tensor:
    """Return log p(x | class) + log p(class) for every row and class, shape (rows, classes)."""
    one_hot = torch.eye(len(shares))
    contexts = one_hot.expand(len(x), -1, -1)  # (rows, classes, classes)
    with torch.no_grad():
        return flow.log_prob(x[:, None].expand(-1, len(shares), -1), contexts) + shares.log()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--components", type=int, default=16, help="principal components of the 64 pixels")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)  # with more, networks this small are slower

    digits = load_table("digits", standardize=False, validation=0.15, seed=options.seed)
    pca = PCA(options.components, random_state=options.seed).fit(digits.train.double())
    rows = {part: torch.from_numpy(pca.transform(getattr(digits, part).double())) for part in digits.labels}
    mean, scale = rows["train"].mean(0), rows["train"].std(0)
    x = {part: ((rows[part] - mean) / scale).float() for part in rows}
    one_hot = {part: F.one_hot(labels, 10).float() for part, labels in digits.labels.items()}

    means = {}
    for name, context_features in (("without the class", 0), ("given the class", 10)):
        torch.manual_seed(options.seed)
        flow = realnvp(
            options.components, context_features=context_features, num_layers=6, hidden_features=(64,), dropout=0.3
        )
        contexts = one_hot if context_features else dict.fromkeys(rows)
        result = fit(
            flow,
            x["train"],
            context=contexts["train"],
            validation=(x["validation"], contexts["validation"]),
            epochs=3 if options.quick else 150,
            batch_size=128,
            learning_rate=3e-3,
            options=FitOptions(weight_decay=1e-3),
            seed=options.seed,
            progress=False,
        )
        with torch.no_grad():
            log_prob = flow.log_prob(x["test"], contexts["test"])
        means[name] = float(log_prob.mean())
        error = float(log_prob.std() / len(log_prob) ** 0.5)
        print(f"{name:<18} test {means[name]:7.2f} nats per row, standard error {error:.2f}, {result.seconds:.0f} s")
    guesses = log_joint(flow, x["test"], one_hot["train"].mean(0)).argmax(-1)
    gain = means["given the class"] - means["without the class"]
    print(f"gain of the class: {gain:.2f} nats per row; it has at most ln 10 = 2.30 of information, but eases the fit")
    accuracy = (guesses == digits.labels["test"]).float().mean()
    print(f"accuracy of Bayes' rule on {len(guesses)} test rows: {accuracy:.3f}")


if __name__ == "__main__":
    main()
