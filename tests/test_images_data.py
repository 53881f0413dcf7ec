"""Images: splits, layouts and levels, every kind of file, what is refused, padding and augmentation."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from datasets import FOLDER, real_files
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pyroflows.data import images as module
from pyroflows.data import (
    load_image_folder,
    load_images,
    make_images,
    pad_images,
    random_flips,
    random_shifts,
)


@pytest.fixture(autouse=True)
def _no_files_of_this_machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "slow" not in request.keywords:
        monkeypatch.delenv("PYROFLOWS_DATA", raising=False)
        monkeypatch.setattr(module, "DEBIAN", {})


def pictures(rows: int, *shape: int, levels: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(0, levels, (rows, *shape), dtype=np.uint8)


# Digits and arrays


def test_digits_are_split_by_the_seed_alone() -> None:
    first, again, other = load_images("digits"), load_images("digits"), load_images("digits", seed=1)
    assert torch.equal(first.train, again.train)
    assert not torch.equal(first.train, other.train)
    assert repr(first) == (
        "ImageData('digits', shape=(1, 8, 8), num_levels=17, train=1437, validation=180, test=180, classes=10)"
    )
    for data in (first, other):
        everything = torch.cat([data.train, data.validation, data.test])
        assert everything.dtype == torch.uint8
        assert everything.max() == 16
        assert data.labels is not None
        counts = torch.cat(list(data.labels.values())).bincount()
        assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
        assert data.class_names == tuple("0123456789")
    assert len(load_images("digits", validation=300).validation) == 300


@settings(max_examples=40)
@given(
    st.sampled_from(["HW", "CHW", "HWC"]),
    st.sampled_from([1, 3]),
    st.integers(4, 6),
    st.integers(4, 6),
    st.sampled_from([np.uint8, np.int32, np.uint16, torch.int64]),
    st.integers(0, 99),
)
def test_every_layout_gives_channels_first(layout, channels, height, width, dtype, seed) -> None:
    channels = 1 if layout == "HW" else channels
    images = pictures(20, channels, height, width, levels=17)
    given_ = {"HW": images[:, 0], "CHW": images, "HWC": np.moveaxis(images, 1, -1)}[layout]
    given_ = torch.from_numpy(given_).to(dtype) if isinstance(dtype, torch.dtype) else given_.astype(dtype)
    data = make_images(given_, labels=np.arange(20), num_levels=17, test=0.25, validation=0.1, seed=seed)
    assert data.shape == (channels, height, width)
    assert (len(data.train), len(data.validation), len(data.test)) == (13, 2, 5)
    assert data.labels is not None
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(data, part), torch.from_numpy(images)[data.labels[part]])


def test_the_place_of_channels_is_asked_where_it_could_be_either() -> None:
    for shape in ((10, 3, 5, 3), (10, 2, 5, 5), (10, 1, 5, 3)):
        with pytest.raises(ValueError, match=r"^expected channels_last=True or False, .* got None with shape \(10, "):
            make_images(np.zeros(shape, np.uint8))
        assert make_images(np.zeros(shape, np.uint8), channels_last=False).shape == shape[1:]
        assert make_images(np.zeros(shape, np.uint8), channels_last=True).shape == (shape[3], *shape[1:3])


def test_masks_of_two_levels_and_sets_without_classes() -> None:
    data = make_images(np.arange(40).reshape(10, 2, 2) % 2 == 0, num_levels=2, test=0, validation=0)
    assert repr(data) == "ImageData('images', shape=(1, 2, 2), num_levels=2, train=10, validation=0, test=0)"
    assert data.train.dtype == torch.uint8
    assert data.num_classes == 0
    assert data.labels is None


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"images": np.zeros((9, 4, 4))}, TypeError, r"^expected images of integer levels from 0 to 255; got torch.fl"),
        ({"images": np.zeros((9, 4), np.uint8)}, ValueError, r"^expected images of shape \(rows, H, W\), .*; got \(9,"),
        ({"images": np.zeros((0, 4, 4), np.uint8)}, ValueError, r"got \(0, 1, 4, 4\)$"),
        ({"images": np.full((9, 4, 4), -1)}, ValueError, r"^expected levels from 0 to 255; got -1$"),
        ({"images": np.full((9, 4, 4), 256)}, ValueError, r"^expected levels from 0 to 255; got 256$"),
        ({"num_levels": 7}, ValueError, r"^expected levels from 0 to 6; got 8$"),
        ({"num_levels": 257}, ValueError, r"^expected num_levels from 2 to 256; got 257$"),
        ({"labels": [0, 1]}, ValueError, r"^expected labels as 9 integers; got torch.int64 of shape \(2,\)$"),
        ({"labels": np.zeros(9)}, ValueError, r"^expected labels as 9 integers; got torch.float64"),
        ({"labels": np.arange(9) - 1}, ValueError, r"^expected labels from 0; got -1$"),
        ({"labels": np.arange(9), "class_names": "abc"}, ValueError, r"^expected labels from 0 to 2; got 8$"),
        ({"test": 1.0}, ValueError, r"^expected fractions test and .* together below 1; got 1.0 and 0.1$"),
        (
            {"test": 0.6, "validation": 0.39},
            ValueError,
            r"^expected fractions that leave a train image; got 0.6 and 0.",
        ),
    ],
)
def test_bad_arrays_are_refused(change, error, message: str) -> None:
    options = {"images": np.arange(9).repeat(16).reshape(9, 4, 4), **change}
    with pytest.raises(error, match=message):
        make_images(options.pop("images"), **options)


# Files


def write_idx(path: Path, array: np.ndarray) -> None:
    content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder: Path, suffix: str = "") -> dict[str, np.ndarray]:
    arrays = {
        "x_train": pictures(60, 28, 28),
        "y_train": pictures(60, levels=10),
        "x_test": pictures(20, 28, 28),
        "y_test": pictures(20, levels=10),
    }
    for part, prefix in (("train", "train"), ("test", "t10k")):
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", arrays[f"x_{part}"])
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", arrays[f"y_{part}"])
    return arrays


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    "name, place",
    [
        ("mnist", "."),
        ("mnist", "MNIST/raw"),
        ("mnist", "mnist"),
        ("fashion_mnist", "fashion-mnist"),
        ("fashion_mnist", "FashionMNIST/raw"),
        ("fashion_mnist", "images/fashion_mnist"),
    ],
)
def test_idx_files_are_found_where_they_usually_lie(tmp_path: Path, name: str, place: str, suffix: str) -> None:
    arrays = write_mnist(tmp_path / place, suffix)
    data = load_images(name, tmp_path, validation=10)
    assert data.num_levels == 256
    assert (len(data.train), len(data.validation), len(data.test)) == (50, 10, 20)
    assert torch.equal(torch.cat([data.train, data.validation])[:, 0], torch.from_numpy(arrays["x_train"]))
    assert torch.equal(data.test[:, 0], torch.from_numpy(arrays["x_test"]))
    assert data.labels is not None
    assert data.labels["validation"].tolist() == arrays["y_train"][50:].tolist()
    assert data.labels["test"].tolist() == arrays["y_test"].tolist()
    assert data.num_classes == 10


@settings(max_examples=7)
@given(st.integers(2, 8))
def test_fewer_bits_are_the_highest(bits: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        whole = write_mnist(Path(folder))["x_test"]
        data = load_images("mnist", folder, bits=bits, validation=0)
    assert data.num_levels == 2**bits
    assert data.test.max() == 2**bits - 1
    assert torch.equal(data.test[:, 0].int(), torch.from_numpy(whole // 2 ** (8 - bits)).int())
    assert data.test.dtype == torch.uint8


@pytest.mark.parametrize("place", [".", "images"])
def test_npz_files_and_the_variable_that_names_their_folder(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = {"x_train": pictures(6, 28, 28), "y_train": np.arange(6), "x_test": pictures(3, 28, 28)}
    (tmp_path / place).mkdir(exist_ok=True)
    np.savez(tmp_path / place / "mnist.npz", **arrays, y_test=np.arange(3))
    monkeypatch.setenv("PYROFLOWS_DATA", str(tmp_path))
    data = load_images("mnist", validation=2)
    assert torch.equal(data.train[:, 0], torch.from_numpy(arrays["x_train"][:4]))

    np.savez(tmp_path / place / "mnist.npz", **arrays)
    with pytest.raises(ValueError, match=r"^expected an array named y_test in .*mnist.npz; got x_train, y_train, x_te"):
        load_images("mnist")


@pytest.fixture
def strips(tmp_path: Path) -> Path:
    folder = tmp_path / "images" / "cifar10"
    folder.mkdir(parents=True)
    pixels = np.repeat(np.arange(500, dtype=np.uint8), 32 * 32 * 3).reshape(16000, 32, 3)
    pixels[..., 2] = 7
    for part in ("train", "test"):
        Image.fromarray(pixels).save(folder / f"{part}_000.webp", lossless=True, method=0)
    names = np.array([b"airplane", b"automobile"])
    np.savez(folder / "labels.npz", y_train=np.arange(500) % 2, y_test=np.arange(500) % 2, class_names=names)
    return tmp_path


def test_strips_of_cifar(strips: Path) -> None:
    data = load_images("cifar10", strips, validation=100)
    assert repr(data).startswith("ImageData('cifar10', shape=(3, 32, 32), num_levels=256, train=400, validation=100")
    assert data.class_names == ("airplane", "automobile")
    for number in (0, 1, 255, 399):
        assert (data.train[number, :2] == number % 256).all()
        assert (data.train[number, 2] == 7).all()
    with pytest.raises(ValueError, match=r"^expected validation to leave a train image; got 500 of 500$"):
        load_images("cifar10", strips, validation=500)

    folder = strips / "images" / "cifar10"
    Image.fromarray(np.zeros((64, 32, 3), np.uint8)).save(folder / "test_000.webp", lossless=True)
    with pytest.raises(
        ValueError, match=r"^expected a strip of 500 images of 32 x 32 in .*test_000.webp; got \(64, 32"
    ):
        load_images("cifar10", strips)
    (folder / "test_000.webp").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"^expected 500 images of CIFAR-10 in the file .*test_000.webp; got no"
    ):
        load_images("cifar10", strips)
    (folder / "labels.npz").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"^expected the labels of CIFAR-10 in the file .*labels.npz; got no su"
    ):
        load_images("cifar10", strips)


@pytest.fixture
def torchvision_sets(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Stands in for torchvision's sets, which need their files; notes what was asked for."""
    from torchvision import datasets

    calls: list[tuple[str, bool]] = []

    def cifar(root: str, train: bool, download: bool) -> SimpleNamespace:
        calls.append((root, download))
        rows = 30 if train else 10
        return SimpleNamespace(
            data=pictures(rows, 32, 32, 3), targets=[number % 2 for number in range(rows)], classes=["cat", "dog"]
        )

    def mnist(root: str, train: bool, download: bool) -> SimpleNamespace:
        calls.append((root, download))
        rows = 30 if train else 10
        return SimpleNamespace(data=torch.from_numpy(pictures(rows, 28, 28)), targets=torch.arange(rows) % 10)

    monkeypatch.setattr(datasets, "CIFAR10", cifar)
    monkeypatch.setattr(datasets, "MNIST", mnist)
    return calls


def test_torchvision_reads_its_own_layout_and_downloads_if_asked(tmp_path: Path, torchvision_sets) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    data = load_images("cifar10", tmp_path, validation=5)
    assert torchvision_sets == [(str(tmp_path), False)] * 2
    assert torch.equal(data.test, torch.from_numpy(pictures(10, 32, 32, 3)).movedim(-1, 1))
    assert data.class_names == ("cat", "dog")

    torchvision_sets.clear()
    data = load_images("mnist", tmp_path / "new", validation=5, download=True)
    assert torchvision_sets == [(str(tmp_path / "new"), True)] * 2
    assert len(data.train) == 25
    assert data.class_names == tuple("0123456789")
    with pytest.raises(ValueError, match=r"^expected root, the folder to download cifar10 to; got None$"):
        load_images("cifar10", download=True)


def test_without_a_network_one_sentence_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise URLError("Name or service\n not known")

    monkeypatch.setattr(module, "_from_torchvision", fail)
    with pytest.raises(
        OSError, match=r"^expected to download mnist to .*; got URLError: <urlopen error Name or service"
    ):
        load_images("mnist", tmp_path, download=True)


@pytest.mark.parametrize("name, looked_for", [("mnist", "mnist.npz"), ("cifar10", "train_000.webp")])
def test_missing_files_are_named_with_the_way_to_get_them(tmp_path: Path, name: str, looked_for: str) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load_images(name, tmp_path)
    message = str(caught.value)
    for part in (looked_for, str(tmp_path), "download=True", "give root"):
        assert part in message
    assert "\n" not in message


def test_bad_idx_files_are_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path, ".gz")
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    good = file.read_bytes()
    for bad in (good[:-100], b"no gzip"):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=r"^expected a gzip file in .*t10k-images-idx3-ubyte.gz; got one that do"):
            load_images("mnist", tmp_path)
    for bad in (gzip.decompress(good)[:-1], b"", b"\0\0\x08\x01" + bytes(100)):
        file.write_bytes(gzip.compress(bad))
        with pytest.raises(
            ValueError, match=r"^expected an IDX file of bytes with 3 dimensions in .*; got another, or a part"
        ):
            load_images("mnist", tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"^expected the file .*t10k-images-idx3-ubyte, or the same with .gz"):
        load_images("mnist", tmp_path)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^expected name to be one of 'digits', 'mnist', .*; got 'imagenet'$"):
        load_images("imagenet")
    for bits in (1, 9, 2.0, True):
        with pytest.raises(ValueError, match=r"^expected bits (from 2 to 8|to be a positive integer); got "):
            load_images("mnist", bits=bits)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^expected bits=8 for the 17 levels of digits; got 5$"):
        load_images("digits", bits=5)
    with pytest.raises(ValueError, match=r"^expected validation to be a non-negative integer; got 0.1$"):
        load_images("mnist", validation=0.1)  # type: ignore[arg-type]


# Folders


def save(path: Path, array: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def test_a_folder_of_images_with_its_classes(tmp_path: Path) -> None:
    for number, image in enumerate(pictures(10, 6, 8, 3)):
        save(tmp_path / ("cats" if number < 6 else "dogs") / "more" / f"{number}.png", image)
    (tmp_path / "notes.txt").write_text("not an image")
    data = load_image_folder(tmp_path, test=0, validation=0, name="pets")
    assert repr(data).startswith("ImageData('pets', shape=(3, 6, 8), num_levels=256, train=10, validation=0, test=0")
    assert data.class_names == ("cats", "dogs")
    assert data.labels is not None
    assert data.labels["train"].bincount().tolist() == [6, 4]
    expected = torch.from_numpy(pictures(10, 6, 8, 3)).movedim(-1, 1).flatten(1)
    assert {tuple(row) for row in data.train.flatten(1).tolist()} == {tuple(row) for row in expected.tolist()}

    save(tmp_path / "alone.png", pictures(1, 6, 8, 3)[0])
    assert load_image_folder(tmp_path).labels is None
    assert load_image_folder(tmp_path, channels=1).shape == (1, 6, 8)
    assert load_image_folder(tmp_path, size=4).shape == (3, 4, 4)


def test_images_are_resized_to_cover_the_size_and_cropped_around_the_centre(tmp_path: Path) -> None:
    stripes = np.zeros((20, 60, 3), np.uint8)
    stripes[:, 20:40] = 200  # the middle third, which is what is left
    save(tmp_path / "a.png", stripes)
    save(tmp_path / "b.png", stripes.repeat(2, 0).repeat(2, 1))
    data = load_image_folder(tmp_path, size=(10, 10), test=0, validation=0)
    assert data.shape == (3, 10, 10)
    assert (data.train[..., 2:-2] == 200).all()
    assert load_image_folder(tmp_path, size=(5, 10)).shape == (3, 5, 10)
    with pytest.raises(
        ValueError, match=r"^expected images of one size, 20 x 60 as .*a.png; got 40 x 120 in .*b.png: g"
    ):
        load_image_folder(tmp_path)


def test_a_photograph_is_turned_as_its_camera_was(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "a.png", np.zeros((4, 6, 3), np.uint8), exif=exif)
    assert load_image_folder(tmp_path, test=0, validation=0).shape == (3, 6, 4)


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^expected image files \(.bmp, .*\) in .*; got none$"):
        load_image_folder(tmp_path)
    with pytest.raises(ValueError, match=r"^expected channels to be 1 or 3; got 4$"):
        load_image_folder(tmp_path, channels=4)
    with pytest.raises(ValueError, match=r"^expected size as one number or as \(height, width\); got \(1, 2, 3\)$"):
        load_image_folder(tmp_path, size=(1, 2, 3))
    with pytest.raises(ValueError, match=r"^expected height to be a positive integer; got 0$"):
        load_image_folder(tmp_path, size=0)
    for content in (b"", b"no image", b"\x89PNG\r\n\x1a\n"):
        (tmp_path / "broken.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"^expected an image that can be read in .*broken.png; got "):
            load_image_folder(tmp_path)
    save(tmp_path / "cut.png", pictures(1, 64, 64, 3)[0])
    (tmp_path / "broken.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"^expected an image that can be read in .*broken.png; got OSError: "):
        load_image_folder(tmp_path)


# Padding and augmentation

batches = st.sampled_from([(), (5,), (2, 3), (0,)])
dtypes = st.sampled_from([torch.uint8, torch.int64, torch.float32, torch.bool])


@settings(max_examples=40)
@given(batches, st.integers(1, 9), st.integers(1, 9), st.integers(1, 8), dtypes)
def test_padding_is_even_and_zero(batch, height, width, multiple, dtype) -> None:
    x = torch.ones(*batch, 2, height, width).to(dtype)
    padded = pad_images(x, multiple)
    assert padded.dtype == dtype
    *front, high, wide = padded.shape
    assert (tuple(front), high % multiple, wide % multiple) == ((*batch, 2), 0, 0)
    assert 0 <= high - height < multiple
    assert 0 <= wide - width < multiple
    top, left = (high - height) // 2, (wide - width) // 2
    assert torch.equal(padded[..., top : top + height, left : left + width], x)
    assert padded.float().sum() == x.float().sum()


@settings(max_examples=40)
@given(batches, dtypes, st.integers(0, 99))
def test_flips_are_of_whole_images(batch, dtype, seed) -> None:
    torch.manual_seed(seed)
    x = torch.randint(256, (*batch, 2, 3, 4)).to(dtype)
    flipped = random_flips(x)
    assert flipped.shape == x.shape
    assert flipped.dtype == dtype
    for old, new in zip(x.reshape(-1, 2, 3, 4), flipped.reshape(-1, 2, 3, 4), strict=True):
        assert torch.equal(new, old) or torch.equal(new, old.flip(-1))


def test_half_of_the_images_are_flipped() -> None:
    x = torch.tensor([0, 1]).expand(4000, 1, 1, 2)
    assert abs(random_flips(x)[:, 0, 0, 0].float().mean() - 0.5) < 0.04


@settings(max_examples=40)
@given(batches, dtypes, st.integers(0, 3), st.integers(0, 99))
def test_shifts_move_whole_images_and_repeat_their_edges(batch, dtype, pixels, seed) -> None:
    torch.manual_seed(seed)
    x = torch.randint(256, (*batch, 2, 4, 5)).to(dtype)
    shifted = random_shifts(x, pixels)
    assert shifted.shape == x.shape
    assert shifted.dtype == dtype
    steps = range(-pixels, pixels + 1)
    for old, new in zip(x.reshape(-1, 2, 4, 5), shifted.reshape(-1, 2, 4, 5), strict=True):
        padded = torch.nn.functional.pad(old.float(), (pixels,) * 4, mode="replicate").to(dtype)
        moved = (padded[:, pixels - a : pixels - a + 4, pixels - b : pixels - b + 5] for a in steps for b in steps)
        assert any(torch.equal(new, each) for each in moved)


def test_every_shift_is_as_likely() -> None:
    x = torch.zeros(9000, 1, 5, 5)
    x[:, :, 2, 2] = 1
    share = random_shifts(x, 1).mean(0)[0, 1:4, 1:4]
    assert (share - 1 / 9).abs().max() < 0.02


def test_what_is_no_image_is_refused() -> None:
    for function in (random_flips, lambda x: random_shifts(x, 1), lambda x: pad_images(x, 2)):
        with pytest.raises(
            ValueError, match=r"^expected images as a tensor of shape \(\*batch, C, H, W\); got \(4, 4\)$"
        ):
            function(torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"^expected pixels to be a non-negative integer; got -1$"):
        random_shifts(torch.zeros(1, 4, 4), -1)
    with pytest.raises(ValueError, match=r"^expected multiple to be a positive integer; got 0$"):
        pad_images(torch.zeros(1, 4, 4), 0)


# The package and the real files


def test_importing_loads_no_reader_of_images() -> None:
    code = "import sys, pyroflows.data as d; print([m for m in ('PIL', 'torchvision', 'sklearn') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("name", [pytest.param("mnist", marks=real_files), pytest.param("cifar10", marks=real_files)])
def test_real_sets_have_the_published_means_and_deviations(name: str) -> None:
    data = load_images(name, FOLDER)
    x = torch.cat([data.train, data.validation]).double() / 255
    assert len(data.validation) == 5000
    assert len(data.test) == 10000
    mean, deviation = x.mean((0, 2, 3)), x.std((0, 2, 3), correction=0)
    if name == "mnist":
        assert data.shape == (1, 28, 28)
        assert (round(mean.item(), 4), round(deviation.item(), 4)) == (0.1307, 0.3081)
        return
    assert data.shape == (3, 32, 32)
    expected = torch.tensor([0.49139968, 0.48215841, 0.44653091], dtype=torch.float64)
    torch.testing.assert_close(mean, expected, atol=1e-8, rtol=0)
    expected = torch.tensor([0.24703223, 0.24348513, 0.26158784], dtype=torch.float64)
    torch.testing.assert_close(deviation, expected, atol=1e-8, rtol=0)
    test = torch.tensor([0.49421428, 0.48513139, 0.45040909], dtype=torch.float64)
    torch.testing.assert_close(data.test.double().mean((0, 2, 3)) / 255, test, atol=1e-8, rtol=0)
    assert data.labels is not None
    assert torch.cat([data.labels["train"], data.labels["validation"]]).bincount().tolist() == [5000] * 10
    assert data.labels["test"].bincount().tolist() == [1000] * 10


def test_arrays_that_torch_does_not_take_as_they_are() -> None:
    levels = pictures(8, 4, 6, 3)
    locked = levels.copy()
    locked.flags.writeable = False
    wanted = make_images(levels).train
    assert torch.equal(make_images(locked).train, wanted)
    assert torch.equal(make_images(levels.astype(">u2")).train, wanted)
    assert torch.equal(make_images(list(levels)).train, wanted)
    assert torch.equal(make_images(levels[..., ::-1]).train, wanted.flip(1))
    with pytest.raises(TypeError, match=r"^expected labels as a tensor or an array of numbers; got an array of <U3$"):
        make_images(levels, labels=["cat"] * 8)
    with pytest.raises(TypeError, match=r"^expected images as a tensor or an array of numbers; got an array of object"):
        make_images(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype, suffix, mode", [("u2", "png", "I(;16)?"), ("i4", "tif", "I"), ("f4", "tif", "F")])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_more_than_eight_bits_are_refused(tmp_path: Path, dtype, suffix, mode, channels) -> None:
    Image.fromarray(np.arange(24).reshape(4, 6).astype(dtype)).save(tmp_path / f"a.{suffix}")
    with pytest.raises(ValueError, match=rf"^expected an image of 8 bits a channel in .*a.{suffix}; got .*'{mode}'$"):
        load_image_folder(tmp_path, channels=channels)
