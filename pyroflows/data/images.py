"""Images as integer levels, in three parts: digits, MNIST, Fashion-MNIST, CIFAR-10, folders, your own arrays."""

import gzip
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Size, Tensor
from torch.nn import functional as F

from pyroflows.arguments import check_counts, check_option, check_sizes
from pyroflows.data.npz import read_npz
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
"""The names that :func:`load_images` knows."""

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
STRIP = 500  # images in each of the strips of CIFAR-10
CLASSES = {
    "mnist": tuple("0123456789"),
    "fashion_mnist": (
        *("t-shirt", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ),
}
# Folders of each set's files, below the root; then the folder of Debian's package.
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
        name: name of the set.
        train: images to train on, uint8, of shape ``(rows, C, H, W)``.
        validation: images for validation.
        test: images to test on.
        labels: class of every image for each part, int64; None if there are no classes.
        num_levels: number of levels; every value is below it.
        class_names: a name for each class.

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
        """The number of classes; 0 if there are none."""
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
        images: integer levels.
        name: name of the set.
        labels: class of every image, integers from 0.
        class_names: a name for each class.
        num_levels: number of levels, at most 256.
        channels_last: whether the last of four dimensions is that of the channels; by default the channels are the
            second or the last dimension, whichever is 1 or 3, if only one is.
        test: fraction of all images to test on.
        validation: fraction of all images for validation.
        seed: of the split.

    Shapes:
        images: ``(rows, H, W)``, ``(rows, C, H, W)`` or ``(rows, H, W, C)``; labels: ``(rows,)``.

    Raises:
        TypeError: the images are not integers, or the labels are not numbers.
        ValueError: a wrong shape or level, or labels or fractions that do not fit.

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
    # torch takes neither a negative stride nor another byte order, and warns of memory that it may not write to.
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
                    "expected channels_last=True or False, unless one of the second and the last dimension "
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

    "digits" is scikit-learn's, with 17 levels, and needs no file: 1,437 training, 180 validation and 180 test images,
    split by ``seed``. The other sets have a training and a test part; the last 5,000 training images (by default) are
    for validation. They are read from the first of these that ``root`` holds:

    - ``mnist.npz`` or ``fashion_mnist.npz``, with arrays ``x_train``, ``y_train``, ``x_test``, ``y_test``;
    - the original files ``train-images-idx3-ubyte`` and so on, gzipped or not;
    - for CIFAR-10 ``train_000.webp``, ``test_000.webp`` and so on, each a strip of 500 images, and ``labels.npz``;
    - torchvision's files, which it can also download.

    They may be in ``root``, in its folder ``images``, or in a folder below these with the name of the set. Debian's
    package ``dataset-fashion-mnist`` is found where it installs.

    Args:
        name: one of ``IMAGES``.
        root: a folder; by default that of the environment variable ``PYROFLOWS_DATA``.
        bits: number of the highest bits of a level to keep, from 2 to 8.
        validation: number of training images for validation.
        download: whether torchvision may download the files into ``root``.
        seed: of the split of the digits; the others are in the order of their files.

    Shapes:
        images: ``(rows, 1, 28, 28)``; digits: ``(rows, 1, 8, 8)``; CIFAR-10: ``(rows, 3, 32, 32)``.

    Raises:
        FileNotFoundError: there are no such files.
        ValueError: an unknown set, an option out of range, or files that hold something else.
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
    check_sizes(bits=bits)
    if not 2 <= bits <= 8:
        raise ValueError(f"expected bits from 2 to 8; got {bits}")
    if validation is not None:
        check_counts(validation=validation)
    if name == "digits":
        return _digits(bits, validation, seed)

    folder = Path(root or os.environ.get("PYROFLOWS_DATA") or ".")
    arrays, class_names = _find(name, folder)
    if arrays is None and download:
        if root is None:
            raise ValueError(f"expected root, the folder to download {name} to; got None")
        arrays, class_names = _download(name, folder)
    if arrays is None:
        raise FileNotFoundError(
            f"expected {_files_of(name)} in {folder} or its usual folders ({', '.join(PLACES[name][:-1])}); got none: "
            f"give root, the folder that has them, or download=True for torchvision to put them there"
        )
    x_train, y_train, x_test, y_test = arrays
    held = 5000 if validation is None else int(validation)
    train_rows = len(x_train) - held
    if train_rows < 1:
        raise ValueError(f"expected validation to leave a train image; got {held} of {len(x_train)}")
    # Each part has memory of its own, so that one that is kept or saved does not hold the others.
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
    from sklearn.datasets import load_digits  # here, since the import is slow

    if bits != 8:
        raise ValueError(f"expected bits=8 for the 17 levels of digits; got {bits}")
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
            arrays = read_npz(path, ("x_train", "y_train", "x_test", "y_test"), name)
            return tuple(arrays.values()), CLASSES[name]  # type: ignore[return-value]
    for place in (*places, *([DEBIAN[name]] if name in DEBIAN else [])):
        if _idx_file(place, "train-images-idx3-ubyte") is not None:
            return _read_idx_folder(place), CLASSES[name]
    return None, ()


def _files_of(name: str) -> str:
    if name == "cifar10":
        return "the files of cifar10, train_000.webp and so on with labels.npz, or torchvision's cifar-10-batches-py,"
    return f"the files of {name}, {name}.npz or train-images-idx3-ubyte(.gz) and so on,"


def _read_strips(folder: Path) -> tuple[_Parts, tuple[str, ...]]:
    from PIL import Image  # here, since only images need Pillow

    arrays = read_npz(folder / "labels.npz", ("y_train", "y_test", "class_names"), "the labels of CIFAR-10")
    classes = {part: arrays[f"y_{part}"] for part in ("train", "test")}
    class_names = tuple(name.decode() for name in arrays["class_names"])
    images = {}
    for part, labels in classes.items():
        images[part] = np.empty((len(labels), 32, 32, 3), np.uint8)
        for number, start in enumerate(range(0, len(labels), STRIP)):
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
    """Read bytes in the IDX format: two zeros, the type (8 for bytes), the dimensions, their sizes, the values."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError) as error:
        raise ValueError(f"expected a gzip file in {path}; got one that does not open ({error})") from error
    head = 4 + 4 * dims
    sizes = np.frombuffer(content[4:head], ">u4").astype(int).tolist()
    if content[:4] != bytes([0, 0, 8, dims]) or len(content) != head + int(np.prod(sizes)):
        raise ValueError(f"expected an IDX file of bytes with {dims} dimensions in {path}; got another, or a part")
    return np.frombuffer(content, np.uint8, offset=head).reshape(sizes).copy()


def _download(name: str, folder: Path) -> tuple[_Parts, tuple[str, ...]]:
    try:
        return _from_torchvision(name, folder, download=True)
    except (OSError, RuntimeError) as error:
        got = " ".join(str(error).split())  # torchvision writes a line for each address
        raise OSError(f"expected to download {name} to {folder}; got {type(error).__name__}: {got}") from error


def _from_torchvision(name: str, folder: Path, *, download: bool) -> tuple[_Parts, tuple[str, ...]]:
    from torchvision import datasets  # here, since the import is slow

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

    If every file is in a folder of its class, ``path/class/file``, these folders are the classes.

    Args:
        path: the folder.
        size: height and width, or one number for both: images are resized to cover it, then cropped around the centre;
            None takes them as they are, all of one size.
        channels: 3 for colour, 1 for grey.
        name: name of the set; by default that of the folder.
        test: fraction of all images to test on.
        validation: fraction of all images for validation.
        seed: of the split.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
        ValueError: a file cannot be read or has more than 8 bits a channel, or the sizes differ.

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
    from PIL import Image, ImageOps  # here, since only images need Pillow

    try:
        with Image.open(file) as opened:
            mode = opened.mode
            image = ImageOps.exif_transpose(opened).convert("RGB" if channels == 3 else "L")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"expected an image that can be read in {file}; got {type(error).__name__}: {error}"
        ) from error
    if mode.startswith(("I", "F")):  # Pillow would clip these at 255: a white picture
        raise ValueError(f"expected an image of 8 bits a channel in {file}; got one of more, Pillow's mode {mode!r}")
    if sides is not None:
        height, width = sides
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    return pixels if channels == 3 else pixels[..., None]


def pad_images(x: Tensor, multiple: int) -> Tensor:
    """Pad images with zeros until height and width are multiples of a number.

    The padding is even on both sides; an odd row or column is at the bottom or on the right.

    Args:
        x: images of any dtype.
        multiple: the number; 8 for a flow of three levels.

    Shapes:
        x: ``(*batch, C, H, W)``.

    Raises:
        ValueError: images with less than three dimensions, or a number that is not positive.

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
        ValueError: images with less than three dimensions.

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
    """Shift each image by at most a number of pixels in both directions, and repeat the pixels of its edges.

    Args:
        x: images of any dtype.
        pixels: the largest shift.

    Shapes:
        x: ``(*batch, C, H, W)``.

    Raises:
        ValueError: images with less than three dimensions, or a negative ``pixels``.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> random_shifts(torch.arange(4).expand(3, 1, 1, 4), 1).flatten(1)
        tensor([[1, 2, 3, 3],
                [0, 1, 2, 3],
                [1, 2, 3, 3]])
    """
    _check_images(x)
    check_counts(pixels=pixels)
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
