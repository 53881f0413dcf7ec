"""What the examples of images share: options, a fit that goes on where it was stopped, bits/dim over time, a grid."""

import argparse
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import torch

from pyroflows import FitOptions, Flow, bits_per_dim, fit, sample_images
from pyroflows.data import ImageData
from pyroflows.plots import save_image_grid

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Give the options that every example of images takes, with its own defaults."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--root", type=Path, help="folder of the images; by default that of PYROFLOWS_DATA")
    made.add_argument("--download", action="store_true", help="let torchvision download the images into --root")
    made.add_argument("--minutes", type=float, default=30.0, help="training time")
    made.add_argument("--num-levels", type=int, default=2)
    made.add_argument("--hidden-channels", type=int, default=64)
    made.add_argument("--batch-size", type=int, default=64)
    made.add_argument("--accumulate", type=int, default=1, help="parts in which a batch is run")
    made.add_argument("--learning-rate", type=float, default=1e-3)
    made.add_argument("--steps-per-epoch", type=int, default=200, help="steps between two looks at the validation")
    made.add_argument("--recompute", action="store_true", help="recompute activations, for less memory")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--output", type=Path, default=Path("."), help="folder for JSON, PNG and checkpoint")
    made.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    made.set_defaults(**defaults)
    return made


def train(name: str, flow: Flow, data: ImageData, options: argparse.Namespace, augment: Any = None) -> dict[str, Any]:
    """Fit, or go on with a fit; write the bits per dimension over time, the test's, and a grid of samples."""
    labelled = flow.embedding is not None
    parts = {"train": data.train, "validation": data.validation[:500], "test": data.test}
    if options.quick:
        parts = {part: images[:64] for part, images in parts.items()}
        options.batch_size, options.steps_per_epoch = 32, 2
    labels = {
        part: data.labels[part][: len(images)] if labelled and data.labels else None for part, images in parts.items()
    }
    options.output.mkdir(parents=True, exist_ok=True)
    held_out = parts["validation"] if labels["validation"] is None else (parts["validation"], labels["validation"])
    settings: dict[str, Any] = {
        "validation": held_out,
        "context": labels["train"],
        "epochs": 2 if options.quick else 100_000,
        "patience": None,
        "max_seconds": 60 * options.minutes,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "checkpoint": options.output / f"{name}.ckpt",
        "seed": options.seed,
    }
    more = FitOptions(
        accumulate=options.accumulate,
        steps_per_epoch=options.steps_per_epoch,
        ema_decay=0.999,
        activation_checkpointing=options.recompute,
        precision="bf16-mixed" if DEVICE == "cuda" else None,
        channels_last=DEVICE == "cuda",
        checkpoint_seconds=30.0,
        augment=augment,
    )
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    result = fit(flow, parts["train"], options=more, **settings)
    nats_per_bit = math.log(2) * flow.event_shape.numel()
    curve = [loss / nats_per_bit for loss in result.history["validation"]]
    flow.to(DEVICE)
    bits = bits_per_dim(flow, parts["test"], labels["test"], num_draws=1 if options.quick else 4, seed=0)
    summary = {
        "name": name,
        "test_bits_per_dim": bits.value,
        "standard_error": bits.standard_error,
        "estimator": f"{bits.estimator} over {bits.num_draws} draws",
        "validation_bits_per_dim": curve,
        "seconds": result.history["seconds"],
        "steps": result.steps,
        "skipped_steps": result.skipped_steps,
        "images_per_second": result.steps * options.batch_size / result.seconds,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else None,
        "parameters": sum(p.numel() for p in flow.parameters()),
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "machine": {"threads": torch.get_num_threads(), "torch": torch.__version__, "platform": platform.platform()},
    }
    unfinished = options.output / f"{name}.json.new"
    unfinished.write_text(json.dumps(summary, indent=1))
    os.replace(unfinished, options.output / f"{name}.json")
    grid = sample_images(flow, 64, temperature=0.8, seed=0) if not labelled else _of_classes(flow, data.num_classes)
    save_image_grid(grid, options.output / f"{name}.png", num_levels=data.num_levels, enlarge=2, columns=8)
    print(f"{result}\n{summary['images_per_second']:.0f} images a second", flush=True)
    return summary


def _of_classes(flow: Flow, num_classes: int) -> torch.Tensor:
    """Give eight samples of each class, a row a class."""
    return sample_images(flow, 8, temperature=0.8, labels=torch.arange(num_classes), seed=0).flatten(0, 1)
