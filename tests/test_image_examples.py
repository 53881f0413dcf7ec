"""The examples of images run, quickly, on small files of the real layouts, and go on where they were stopped."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import pytest
from PIL import Image
from scripts import run_example


def run(name, folder, *options):
    environment = {**os.environ, "PYROFLOWS_DATA": ""}
    options = "--quick", "--output", folder / "out", *options
    return run_example(name, *options, folder=folder, environment=environment)


def last_number(done):
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return float(re.findall(r"-?\d+\.\d+", done.stdout.splitlines()[-1])[-1])


@pytest.fixture
def root(tmp_path):
    """A folder with few images, random ones, in the layouts of MNIST and CIFAR-10."""
    rng = np.random.default_rng(0)

    def images(*shape):
        return rng.integers(256, size=shape, dtype=np.uint8)

    def labels(number):
        return (np.arange(number) % 10).astype(np.uint8)

    folder = tmp_path / "images"
    (folder / "cifar10").mkdir(parents=True)
    np.savez(
        folder / "mnist.npz",
        x_train=images(5200, 28, 28),
        y_train=labels(5200),
        x_test=images(100, 28, 28),
        y_test=labels(100),
    )
    for part, strips in (("train", 11), ("test", 1)):
        for strip in range(strips):
            pixels = images(500 * 32, 32, 3)
            Image.fromarray(pixels).save(folder / "cifar10" / f"{part}_{strip:03}.webp", lossless=True, quality=0)
    names = np.array([b"a", b"b", b"c", b"d", b"e", b"f", b"g", b"h", b"i", b"j"])
    np.savez(folder / "cifar10" / "labels.npz", y_train=labels(5500), y_test=labels(500), class_names=names)
    return tmp_path


def test_mnist_runs_and_goes_on(root):
    small = ("--root", str(root), "--num-steps", "1", "--hidden-channels", "8")
    bits = last_number(run("mnist_glow", root, *small))
    result = json.loads((root / "out" / "mnist_glow.json").read_text())
    assert result["estimator"] == "mean over 1 draws"
    assert len(result["validation_bits_per_dim"]) == 2
    assert (root / "out" / "mnist_glow.png").stat().st_size > 1000
    written = (root / "out" / "mnist_glow.ckpt").stat().st_mtime_ns
    assert last_number(run("mnist_glow", root, *small)) == bits  # the fit had ended: nothing is trained again
    assert (root / "out" / "mnist_glow.ckpt").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    "name, options",
    [
        ("cifar10_glow", ("--num-steps", "1", "--classes", "--bits", "5")),
        ("cifar10_realnvp", ("--num-blocks", "1")),
    ],
)
def test_cifar10_runs(root, name, options):
    last_number(run(name, root, "--root", str(root), "--hidden-channels", "8", *options))
    assert (root / "out" / f"{name}.png").stat().st_size > 1000


def test_permutations_runs(tmp_path):
    options = ("--data", "digits", "--num-levels", "2", "--num-steps", "1", "--hidden-channels", "8")
    last_number(run("permutations_glow", tmp_path, *options))
    assert set(json.loads((tmp_path / "out" / "permutations_glow.json").read_text())) == {"reverse", "shuffle", "conv"}
    assert (tmp_path / "out" / "permutations_glow.png").stat().st_size > 1000


def test_missing_images_are_named_in_one_sentence(tmp_path):
    done = run("mnist_glow", tmp_path, "--root", str(tmp_path))
    assert done.returncode != 0
    assert "expected" in done.stderr.splitlines()[-1]
    assert str(tmp_path) in done.stderr.splitlines()[-1]
