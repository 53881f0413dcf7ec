"""Shared by the examples of images: options, a fit that resumes from a checkpoint, bits/dim over time, and a grid."""

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


def image_parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Build the parser of the options that all examples of images take, with defaults of the example."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--root", type=Path, help="folder of the images; by default that of PYROFLOWS_DATA")
    parser.add_argument("--download", action="store_true", help="let torchvision download the images into --root")
    parser.add_argument("--minutes", type=float, default=30.0, help="training time")
    parser.add_argument("--num-levels", type=int, default=2)
    parser.add_argument("--hidden-channels", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--accumulate", type=int, default=1, help="parts of a batch that are run one after another")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--steps-per-epoch", type=int, default=200, help="steps between two validations")
    parser.add_argument("--activation-checkpointing", action="store_true", help="save memory")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("."), help="folder for JSON, PNG and checkpoint")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.set_defaults(**defaults)
    return parser


def train(name: str, flow: Flow, data: ImageData, options: argparse.Namespace, augment: Any = None) -> dict[str, Any]:
    """Fit, or resume a fit; write the bits per dimension over time and of the test images, and a grid of samples."""
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
    fit_options = FitOptions(
        accumulate=options.accumulate,
        steps_per_epoch=options.steps_per_epoch,
        ema_decay=0.999,
        activation_checkpointing=options.activation_checkpointing,
        precision="bf16-mixed" if DEVICE == "cuda" else None,
        channels_last=DEVICE == "cuda",
        checkpoint_seconds=30.0,
        augment=augment,
    )
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    result = fit(flow, parts["train"], options=fit_options, **settings)
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
    """Return eight samples of each class, one class in a row."""
    return sample_images(flow, 8, temperature=0.8, labels=torch.arange(num_classes), seed=0).flatten(0, 1)
