"""A class-conditional Glow of digits: samples of each class, judged by a classifier trained on real digits."""

import argparse
from pathlib import Path

import torch
from sklearn.svm import SVC

from pyroflows import FitOptions, UniformDequantizer, bits_per_dim, fit, glow, sample_images
from pyroflows.data import load_images
from pyroflows.plots import save_image_grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("."), help="folder for digits_classes.png")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)  # with more, networks this small are slower
    options.output.mkdir(parents=True, exist_ok=True)
    data = load_images("digits")
    labels = data.labels or {}
    torch.manual_seed(options.seed)
    flow = glow(
        data.shape,
        num_levels=2,
        num_steps=4,
        hidden_channels=64,
        num_classes=data.num_classes,
        alpha=0.01,
        dequantizer=UniformDequantizer(data.shape, data.num_levels),
    )
    result = fit(
        flow,
        data.train,
        context=labels["train"],
        validation=(data.validation, labels["validation"]),
        epochs=2 if options.quick else 100,
        batch_size=128,
        learning_rate=2e-3,
        options=FitOptions(ema_decay=0.99),
        patience=20,
        seed=options.seed,
    )
    print(result)
    print(f"test, given the class: {bits_per_dim(flow, data.test, labels['test'], seed=options.seed)}")

    classifier = SVC().fit(data.train.flatten(1).numpy(), labels["train"].numpy())
    accuracy = classifier.score(data.test.flatten(1).numpy(), labels["test"].numpy())
    print(f"accuracy of the classifier on real digits: {accuracy:.3f}")
    classes = torch.arange(data.num_classes)
    samples = sample_images(flow, 100, labels=classes, temperature=options.temperature, seed=options.seed)
    predicted = classifier.predict(samples.flatten(0, 1).flatten(1).numpy()).reshape(len(classes), -1)
    correct = predicted == classes[:, None].numpy()
    print("accuracy on samples, by class: " + " ".join(f"{share:.2f}" for share in correct.mean(1)))
    picture = samples[:, :12].flatten(0, 1)
    save_image_grid(picture, options.output / "digits_classes.png", columns=12, num_levels=data.num_levels, enlarge=4)
    print(f"accuracy on samples: {correct.mean():.3f}")


if __name__ == "__main__":
    main()
