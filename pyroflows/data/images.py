"""Images as integer levels, split in three: digits, MNIST, Fashion-MNIST, CIFAR-10, folders, arrays of your own."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Size, Tensor
from torch.nn import functional as F

from pyroflows.arguments import check_option, check_sizes
from pyroflows.data.split import PARTS, split_rows

__all__ = [
    "IMAGES",
    "ImageData",
    "load_image_folder",
    "load_images",
    "make_images",
    "pad_images",
    "random_flips",
    "random_shifts",
]

IMAGES: tuple[str, ...] = ("digits", "mnist", "fashion_mnist", "cifar10")
"""The names that ``load_images`` knows."""

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
STRIP = 500  # images in each of the strips of CIFAR-10
CLASSES = {
    "mnist": tuple("0123456789"),
    "fashion_mnist": (
        *("t-shirt", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ),
}
# Folders in which each set's files may lie, below the one that is given; then where Debian's package puts them.
PLACES = {
    "mnist": ("MNIST/raw", "mnist", "images/mnist", "."),
    "fashion_mnist": ("FashionMNIST/raw", "fashion_mnist", "fashion-mnist", "images/fashion_mnist", "."),
    "cifar10": ("images/cifar10", "cifar10", "."),
}
DEBIAN = {"fashion_mnist": Path("/usr/share/datasets/fashion-mnist")}

# Images and labels of train, then of test.
_Parts = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False, repr=False)
class ImageData:
    """Images in three parts, as integer levels.

    Args:
        name: what the set is called.
        train: the images to fit to, uint8, shape ``(rows, C, H, W)``.
        validation: the images to stop by.
        test: the images to report on.
        labels: the class of every image by name of the part, int64, or None where there are no classes.
        num_levels: the number of levels; every value is below it.
        class_names: one name a class, or None.

    Example:
        >>> load_images("digits")
        ImageData('digits', shape=(1, 8, 8), num_levels=17, train=1437, validation=180, test=180, classes=10)
    """

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor
    labels: dict[str, Tensor] | None = None
    num_levels: int = 256
    class_names: tuple[str, ...] | None = None

    @property
    def shape(self) -> Size:
        """The shape ``(C, H, W)`` of one image."""
        return self.train.shape[1:]

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 where there are none."""
        if self.labels is None:
            return 0
        largest = [int(part.max()) + 1 for part in self.labels.values() if len(part)]
        return len(self.class_names) if self.class_names is not None else max(largest)

    def __repr__(self) -> str:
        parts = f"train={len(self.train)}, validation={len(self.validation)}, test={len(self.test)}"
        classes = "" if self.labels is None else f", classes={self.num_classes}"
        return f"ImageData({self.name!r}, shape={tuple(self.shape)}, num_levels={self.num_levels}, {parts}{classes})"


def make_images(
    images: Tensor | np.ndarray,
    *,
    name: str = "images",
    labels: Tensor | np.ndarray | Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
    num_levels: int = 256,
    channels_last: bool | None = None,
    test: float = 0.1,
    validation: float = 0.1,
    seed: int = 0,
) -> ImageData:
    """Split images at random.

    Args:
        images: integer levels, shape ``(rows, H, W)``, ``(rows, C, H, W)`` or ``(rows, H, W, C)``.
        name: what to call the set.
        labels: the class of every image, integers from 0, shape ``(rows,)``, or None.
        class_names: one name a class, or None.
        num_levels: the number of levels, at most 256.
        channels_last: whether of four dimensions the last is that of the channels; by default it is the one among the
            second and the last that is 1 or 3, if only one is.
        test: the fraction of images to test on.
        validation: the fraction of images, of all of them, to stop by.
        seed: what draws the split.

    Shapes:
        train, validation, test: ``(rows, C, H, W)``.

    Raises:
        TypeError: the images are not integers, or the labels no numbers.
        ValueError: a shape, a level, labels or fractions do not fit.

    Example:
        >>> make_images(np.zeros((20, 32, 32, 3), dtype=np.uint8), labels=np.arange(20) % 2)
        ImageData('images', shape=(3, 32, 32), num_levels=256, train=16, validation=2, test=2, classes=2)
    """
    check_sizes(num_levels=num_levels)
    if not 2 <= num_levels <= 256:
        raise ValueError(f"expected num_levels from 2 to 256; got {num_levels}")
    x = _levels(images, num_levels, channels_last)
    classes = None if labels is None else _labels(labels, len(x), class_names)
    rows = split_rows(len(x), test, validation, seed, "image")
    return ImageData(
        name=name,
        **{part: x[rows[part]] for part in PARTS},
        labels=None if classes is None else {part: classes[rows[part]] for part in PARTS},
        num_levels=num_levels,
        class_names=None if class_names is None else tuple(class_names),
    )


def _tensor(name: str, values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().cpu()
    array = np.asarray(values)
    if array.dtype.kind not in "biufc":
        raise TypeError(f"expected {name} as a tensor or an array of numbers; got an array of {array.dtype}")
    # Torch takes neither a negative stride nor another machine's byte order, and warns of memory it may not write to.
    return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ("C", "W")))


def _levels(images: Any, num_levels: int, channels_last: bool | None) -> Tensor:
    x = _tensor("images", images)
    if x.is_floating_point() or x.is_complex():
        raise TypeError(f"expected images of integer levels from 0 to {num_levels - 1}; got {x.dtype}")
    if x.dim() == 3:
        x = x.unsqueeze(1)
    elif x.dim() == 4:
        if channels_last is None:
            first, last = x.shape[1] in (1, 3), x.shape[3] in (1, 3)
            if first == last:
                raise ValueError(
                    "expected channels_last=True or False, where not just one of the second and the last dimension "
                    f"is 1 or 3; got None with shape {tuple(x.shape)}"
                )
            channels_last = last
        x = x.movedim(-1, 1) if channels_last else x
    if x.dim() != 4 or not x.numel():
        raise ValueError(
            f"expected images of shape (rows, H, W), (rows, C, H, W) or (rows, H, W, C); got {tuple(x.shape)}"
        )
    x = x if x.dtype in (torch.uint8, torch.bool) else x.long()
    low, high = int(x.min()), int(x.max())
    if low < 0 or high >= num_levels:
        raise ValueError(f"expected levels from 0 to {num_levels - 1}; got {low if low < 0 else high}")
    return x.to(torch.uint8).contiguous()


def _labels(labels: Any, rows: int, class_names: Sequence[str] | None) -> Tensor:
    classes = _tensor("labels", labels)
    if classes.shape != (rows,) or classes.is_floating_point():
        raise ValueError(f"expected labels as {rows} integers; got {classes.dtype} of shape {tuple(classes.shape)}")
    classes = classes.long()
    number = None if class_names is None else len(class_names)
    if int(classes.min()) < 0 or (number is not None and int(classes.max()) >= number):
        upper = "0" if number is None else f"0 to {number - 1}"
        bad = int(classes.min()) if int(classes.min()) < 0 else int(classes.max())
        raise ValueError(f"expected labels from {upper}; got {bad}")
    return classes


def load_images(
    name: str,
    root: str | Path | None = None,
    *,
    bits: int = 8,
    validation: int | None = None,
    download: bool = False,
    seed: int = 0,
) -> ImageData:
    """Load a set of images that papers report on.

    "digits" are scikit-learn's, of 17 levels, and need no file: 1,437 train, 180 validation and 180 test images, drawn
    by ``seed``. The others come with a split into train and test, whose last 5,000 train images (by default) are the
    validation part; they are read from the first that ``root`` holds of

    - ``mnist.npz`` or ``fashion_mnist.npz``, of arrays ``x_train``, ``y_train``, ``x_test``, ``y_test``;
    - the original files ``train-images-idx3-ubyte`` and so on, gzipped or not;
    - for CIFAR-10 ``train_000.webp``, ``test_000.webp`` and so on, each a strip of 500 images, beside ``labels.npz``;
    - the files that torchvision puts there, which it also downloads if asked.

    They may lie in ``root``, in its folder ``images``, or in one below them with the name of the set. Debian's package
    ``dataset-fashion-mnist`` is found where it installs.

    Args:
        name: one of ``IMAGES``.
        root: a folder; by default the one that the environment variable ``PYROFLOWS_DATA`` names.
        bits: how many of the eight bits of a level to keep, the highest, from 2 to 8.
        validation: how many of the train images become the validation part.
        download: whether torchvision may download the files into ``root``.
        seed: what draws the split of the digits; the order of the others is that of their files.

    Shapes:
        train, validation, test: ``(rows, 1, 28, 28)``, for digits ``(rows, 1, 8, 8)``, for CIFAR-10
        ``(rows, 3, 32, 32)``.

    Raises:
        FileNotFoundError: the files are not there.
        ValueError: there is no such set, files hold something else, or an option is not one of those above.
        OSError: the download failed.

    References:
        Gradient-Based Learning Applied to Document Recognition, LeCun, Bottou, Bengio and Haffner, 1998;
        Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms, Xiao, Rasul and Vollgraf,
        2017 (arXiv:1708.07747); Learning Multiple Layers of Features from Tiny Images, Krizhevsky, 2009.

    Example:
        >>> digits = load_images("digits")
        >>> digits.train.shape, digits.train.dtype, digits.labels["test"].shape
        (torch.Size([1437, 1, 8, 8]), torch.uint8, torch.Size([180]))
    """
    check_option("name", name, IMAGES)
    if not isinstance(bits, Integral) or isinstance(bits, bool) or not 2 <= bits <= 8:
        raise ValueError(f"expected bits to be an integer from 2 to 8; got {bits!r}")
    if validation is not None and (
        not isinstance(validation, Integral) or isinstance(validation, bool) or validation < 0
    ):
        raise ValueError(f"expected validation to be a number of images, 0 or more; got {validation!r}")
    if name == "digits":
        return _digits(bits, validation, seed)

    folder = Path(root or os.environ.get("PYROFLOWS_DATA") or ".")
    found, class_names = _find(name, folder)
    if found is None and download:
        if root is None:
            raise ValueError(f"expected root, the folder to download {name} to; got None")
        found, class_names = _download(name, folder)
    if found is None:
        raise FileNotFoundError(
            f"expected {_wanted(name)} in {folder} or its usual folders ({', '.join(PLACES[name][:-1])}); got none of "
            f"them: give root, the folder that has them, or download=True for torchvision to put them there"
        )
    x_train, y_train, x_test, y_test = found
    held = 5000 if validation is None else int(validation)
    train_rows = len(x_train) - held
    if train_rows < 1:
        raise ValueError(f"expected validation to leave a train image; got {held} of {len(x_train)}")
    # Each part in memory of its own, so that one kept or saved does not take the others with it.
    train, test = (_levels(x, 256, x.ndim == 4) >> (8 - int(bits)) for x in (x_train, x_test))
    train_labels, test_labels = (_labels(y, len(x), class_names) for y, x in ((y_train, x_train), (y_test, x_test)))
    return ImageData(
        name=name,
        train=train[:train_rows].clone(),
        validation=train[train_rows:].clone(),
        test=test,
        labels={
            "train": train_labels[:train_rows].clone(),
            "validation": train_labels[train_rows:].clone(),
            "test": test_labels,
        },
        num_levels=2 ** int(bits),
        class_names=class_names,
    )


def _digits(bits: int, validation: int | None, seed: int) -> ImageData:
    from sklearn.datasets import load_digits  # here, because the import is slow and few uses of the package need it

    if bits != 8:
        raise ValueError(f"expected bits=8, all of them, for the 17 levels of digits; got {bits}")
    bunch = load_digits()
    rows = len(bunch.images)
    held = 0.1 if validation is None else validation / rows
    return make_images(
        bunch.images.astype(np.uint8),
        name="digits",
        labels=bunch.target,
        class_names=[str(label) for label in bunch.target_names],
        num_levels=17,
        test=0.1,
        validation=held,
        seed=seed,
    )


def _find(name: str, folder: Path) -> tuple[_Parts | None, tuple[str, ...]]:
    places = [folder / place for place in PLACES[name]]
    if name == "cifar10":
        for place in places:
            if (place / "train_000.webp").is_file():
                return _read_strips(place)
        base = next((p for p in (folder, folder / "images") if (p / "cifar-10-batches-py").is_dir()), None)
        return (None, ()) if base is None else _from_torchvision(name, base, download=False)
    for path in (folder / "images" / f"{name}.npz", folder / f"{name}.npz"):
        if path.is_file():
            return _read_npz(path), CLASSES[name]
    for place in (*places, *([DEBIAN[name]] if name in DEBIAN else [])):
        if _idx_file(place, "train-images-idx3-ubyte") is not None:
            return _read_idx_folder(place), CLASSES[name]
    return None, ()


def _wanted(name: str) -> str:
    if name == "cifar10":
        return "the files of cifar10, train_000.webp and so on with labels.npz, or torchvision's cifar-10-batches-py,"
    return f"the files of {name}, {name}.npz or train-images-idx3-ubyte(.gz) and so on,"


def _read_npz(path: Path) -> _Parts:
    names = ("x_train", "y_train", "x_test", "y_test")
    with np.load(path) as arrays:
        missing = [name for name in names if name not in arrays]
        if missing:
            raise ValueError(f"expected an array named {missing[0]} in {path}; got {', '.join(arrays)}")
        x_train, y_train, x_test, y_test = (arrays[name] for name in names)
    return x_train, y_train, x_test, y_test


def _read_strips(folder: Path) -> tuple[_Parts, tuple[str, ...]]:
    from PIL import Image  # here, because only images need Pillow

    labels = folder / "labels.npz"
    if not labels.is_file():
        raise FileNotFoundError(f"expected the labels of CIFAR-10 in the file {labels}; got no such file")
    with np.load(labels) as arrays:
        wanted = ("y_train", "y_test", "class_names")
        if missing := [name for name in wanted if name not in arrays]:
            raise ValueError(f"expected the arrays {', '.join(wanted)} in {labels}; got none of {', '.join(missing)}")
        classes = {part: arrays[f"y_{part}"] for part in ("train", "test")}
        class_names = tuple(name.decode() for name in arrays["class_names"])
    images = {}
    for part, its in classes.items():
        images[part] = np.empty((len(its), 32, 32, 3), np.uint8)
        for number, start in enumerate(range(0, len(its), STRIP)):
            file = folder / f"{part}_{number:03}.webp"
            if not file.is_file():
                raise FileNotFoundError(f"expected {STRIP} images of CIFAR-10 in the file {file}; got no such file")
            with Image.open(file) as strip:
                pixels = np.asarray(strip.convert("RGB"))
            if pixels.size != images[part][start : start + STRIP].size:
                raise ValueError(f"expected a strip of {STRIP} images of 32 x 32 in {file}; got {pixels.shape}")
            images[part][start : start + STRIP] = pixels.reshape(-1, 32, 32, 3)
    return (images["train"], classes["train"], images["test"], classes["test"]), class_names


def _idx_file(folder: Path, name: str) -> Path | None:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def _read_idx_folder(folder: Path) -> _Parts:
    arrays = []
    for name, dims in (
        ("train-images-idx3-ubyte", 3),
        ("train-labels-idx1-ubyte", 1),
        ("t10k-images-idx3-ubyte", 3),
        ("t10k-labels-idx1-ubyte", 1),
    ):
        path = _idx_file(folder, name)
        if path is None:
            raise FileNotFoundError(f"expected the file {folder / name}, or the same with .gz; got no such file")
        arrays.append(_read_idx(path, dims))
    x_train, y_train, x_test, y_test = arrays
    return x_train, y_train, x_test, y_test


def _read_idx(path: Path, dims: int) -> np.ndarray:
    """Read bytes in the idx format: two zeros, the type (8 for bytes), the dimensions, their sizes, the values."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError) as error:
        raise ValueError(f"expected a gzipped file in {path}; got one that does not open ({error})") from error
    head = 4 + 4 * dims
    sizes = np.frombuffer(content[4:head], ">u4").astype(int).tolist()
    if content[:4] != bytes([0, 0, 8, dims]) or len(content) != head + int(np.prod(sizes)):
        raise ValueError(f"expected an idx file of bytes with {dims} dimensions in {path}; got another kind, or a part")
    return np.frombuffer(content, np.uint8, offset=head).reshape(sizes).copy()


def _download(name: str, folder: Path) -> tuple[_Parts, tuple[str, ...]]:
    try:
        return _from_torchvision(name, folder, download=True)
    except (OSError, RuntimeError) as error:
        got = " ".join(str(error).split())  # torchvision tells of each address in a line of its own
        raise OSError(f"expected to download {name} to {folder}; got {type(error).__name__}: {got}") from error


def _from_torchvision(name: str, folder: Path, *, download: bool) -> tuple[_Parts, tuple[str, ...]]:
    from torchvision import datasets  # here, because the import is slow and few uses of the package need it

    kind: Callable[..., Any] = {
        "mnist": datasets.MNIST,
        "fashion_mnist": datasets.FashionMNIST,
        "cifar10": datasets.CIFAR10,
    }[name]
    train, test = (kind(str(folder), train=part, download=download) for part in (True, False))
    parts = tuple(np.asarray(array) for array in (train.data, train.targets, test.data, test.targets))
    return parts, CLASSES.get(name) or tuple(train.classes)  # type: ignore[return-value]


def load_image_folder(
    path: str | Path,
    size: int | Sequence[int] | None = None,
    *,
    channels: int = 3,
    name: str | None = None,
    test: float = 0.1,
    validation: float = 0.1,
    seed: int = 0,
) -> ImageData:
    """Load every image file in a folder and the folders below it, and split them at random.

    Where every file is in a folder of its own class, ``path/class/file``, these folders are the classes.

    Args:
        path: the folder.
        size: height and width, or one number for both: images are resized until they cover it, then cropped around the
            centre; None takes them as they are, all of one size.
        channels: 3 for colours, 1 for grey.
        name: what to call the set; by default as the folder.
        test: the fraction of images to test on.
        validation: the fraction of images, of all of them, to stop by.
        seed: what draws the split.

    Shapes:
        train, validation, test: ``(rows, channels, H, W)``.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
        ValueError: a file cannot be read or has more than 8 bits a channel, the sizes differ, or an option is not one
            of those above.

    Example:
        >>> load_image_folder("nowhere")
        Traceback (most recent call last):
        FileNotFoundError: expected a folder of images in nowhere; got no such folder
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a folder of images in {folder}; got no such folder")
    if channels not in (1, 3):
        raise ValueError(f"expected channels to be 1 or 3; got {channels!r}")
    sides = _sides(size)
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise FileNotFoundError(f"expected image files ({', '.join(SUFFIXES)}) in {folder}; got none")

    images = np.stack(_same_sized(files, channels, sides))
    below = [file.relative_to(folder).parts for file in files]
    class_names = sorted({parts[0] for parts in below}) if all(len(parts) > 1 for parts in below) else None
    labels = None if class_names is None else [class_names.index(parts[0]) for parts in below]
    return make_images(
        images,
        name=folder.resolve().name if name is None else name,
        labels=labels,
        class_names=class_names,
        channels_last=True,
        test=test,
        validation=validation,
        seed=seed,
    )


def _sides(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    sides = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(sides) != 2:
        raise ValueError(f"expected size as one number or as (height, width); got {size!r}")
    height, width = sides
    check_sizes(height=height, width=width)
    return int(height), int(width)


def _same_sized(files: Sequence[Path], channels: int, sides: tuple[int, int] | None) -> list[np.ndarray]:
    images: list[np.ndarray] = []
    for file in files:
        image = _read_image(file, channels, sides)
        if images and image.shape != images[0].shape:
            (height, width), (other_height, other_width) = images[0].shape[:2], image.shape[:2]
            raise ValueError(
                f"expected images of one size, {height} x {width} as {files[0]}; got {other_height} x {other_width} in "
                f"{file}: give size to resize and crop them"
            )
        images.append(image)
    return images


def _read_image(file: Path, channels: int, sides: tuple[int, int] | None) -> np.ndarray:
    from PIL import Image, ImageOps  # here, because only images need Pillow

    try:
        with Image.open(file) as opened:
            mode = opened.mode
            image = ImageOps.exif_transpose(opened).convert("RGB" if channels == 3 else "L")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"expected an image that can be read in {file}; got {type(error).__name__}: {error}"
        ) from error
    if mode.startswith(("I", "F")):  # whose values Pillow would cut at 255: a picture of white alone
        raise ValueError(f"expected an image of 8 bits a channel in {file}; got one of more, Pillow's mode {mode!r}")
    if sides is not None:
        height, width = sides
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    return pixels if channels == 3 else pixels[..., None]


def pad_images(x: Tensor, multiple: int) -> Tensor:
    """Add zeros around images, until a number divides height and width.

    They are added evenly; an odd one at the bottom or on the right.

    Args:
        x: images of any dtype.
        multiple: the number; 8 for a flow of three levels.

    Shapes:
        x: ``(*batch, C, H, W)``.

    Raises:
        ValueError: the images have less than three dimensions, or the number is not positive.

    Example:
        >>> pad_images(torch.zeros(5, 1, 28, 28), 8).shape
        torch.Size([5, 1, 32, 32])
    """
    _check_images(x)
    check_sizes(multiple=multiple)
    down, across = (-side % multiple for side in x.shape[-2:])
    return F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))


def random_flips(x: Tensor) -> Tensor:
    """Mirror each image, left to right, with probability one half.

    Args:
        x: images of any dtype.

    Shapes:
        x: ``(*batch, C, H, W)``.

    Raises:
        ValueError: the images have less than three dimensions.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> random_flips(torch.tensor([[0, 1]]).expand(4, 1, 1, 2)).flatten(1)
        tensor([[1, 0],
                [0, 1],
                [1, 0],
                [1, 0]])
    """
    _check_images(x)
    flipped = torch.rand(x.shape[:-3], device=x.device) < 0.5
    return torch.where(flipped[..., None, None, None], x.flip(-1), x)


def random_shifts(x: Tensor, pixels: int) -> Tensor:
    """Move each image by up to so many pixels in both directions, and repeat the pixels of its edge where it left.

    Args:
        x: images of any dtype.
        pixels: the largest shift.

    Shapes:
        x: ``(*batch, C, H, W)``.

    Raises:
        ValueError: the images have less than three dimensions, or ``pixels`` is negative.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> random_shifts(torch.arange(4).expand(3, 1, 1, 4), 1).flatten(1)
        tensor([[1, 2, 3, 3],
                [0, 1, 2, 3],
                [1, 2, 3, 3]])
    """
    _check_images(x)
    if not isinstance(pixels, Integral) or isinstance(pixels, bool) or pixels < 0:
        raise ValueError(f"expected pixels to be an integer of at least 0; got {pixels!r}")
    batch = x.shape[:-3]
    for dim in (-2, -1):
        side = x.shape[dim]
        shift = torch.randint(-int(pixels), int(pixels) + 1, (*batch, 1), device=x.device)
        source = (torch.arange(side, device=x.device) - shift).clamp(0, side - 1)  # (*batch, side)
        source = source[..., None, :, None] if dim == -2 else source[..., None, None, :]
        x = x.gather(dim, source.expand(x.shape))
    return x


def _check_images(x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dim() < 3:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"expected images as a tensor of shape (*batch, C, H, W); got {got}")
