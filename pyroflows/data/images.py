"""Images as integer levels, in three parts: digits, MNIST, Fashion-MNIST, CIFAR-10, folders, your own arrays."""

import gzip
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Size, Tensor
from torch.nn import functional as F

from pyroflows.arguments import as_tensor, check_counts, check_option, check_sizes
from pyroflows.data.tables import PARTS, read_npz, split_rows

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
CLOTHES = "t-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot"
CLASSES = {"mnist": tuple("0123456789"), "fashion_mnist": tuple(CLOTHES.split(", "))}
# The original files of MNIST and Fashion-MNIST; the digit is the number of dimensions.
IDX_FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
# Folders of each set's files, below the root; then the folder of Debian's package.
PLACES = {
    "mnist": ("MNIST/raw", "mnist", "images/mnist", "."),
    "fashion_mnist": ("FashionMNIST/raw", "fashion_mnist", "fashion-mnist", "images/fashion_mnist", "."),
    "cifar10": ("images/cifar10", "cifar10", "."),
}
DEBIAN = {"fashion_mnist": Path("/usr/share/datasets/fashion-mnist")}

# Images and labels of train, then of test; and the names of the classes.
_Found = tuple[Sequence[np.ndarray], Sequence[str]]


@dataclass(frozen=True, eq=False, repr=False)
class ImageData:
    """Images in three parts, as integer levels.

    Args:
        name: name of the set.
        train, validation, test: images of each part, uint8, of shape ``(rows, C, H, W)``.
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
        name, class_names: as in :class:`ImageData`.
        labels: class of every image, integers from 0.
        num_levels: number of levels, at most 256.
        channels_last: whether the last of four dimensions is that of the channels; by default the channels are the
            second or the last dimension, whichever is 1 or 3, if only one is.
        test, validation: fractions of all images.
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


def _as_tensor(name: str, values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().cpu()
    array = np.asarray(values)
    if array.dtype.kind not in "biufc":
        raise TypeError(f"expected {name} as a tensor or an array of numbers; got an array of {array.dtype}")
    return as_tensor(array)


def _levels(images: Any, num_levels: int, channels_last: bool | None) -> Tensor:
    x = _as_tensor("images", images)
    if x.is_floating_point() or x.is_complex():
        raise TypeError(f"expected images of integer levels from 0 to {num_levels - 1}; got {x.dtype}")
    if x.dim() == 4 and channels_last is None:
        first, channels_last = x.shape[1] in (1, 3), x.shape[3] in (1, 3)
        if first == channels_last:
            expected = "expected channels_last=True or False, unless one of the second and the last dimension is 1 or 3"
            raise ValueError(f"{expected}; got None with shape {tuple(x.shape)}")
    if x.dim() == 3:
        x = x.unsqueeze(1)
    elif x.dim() == 4 and channels_last:
        x = x.movedim(-1, 1)
    if x.dim() != 4 or not x.numel():
        shapes = "(rows, H, W), (rows, C, H, W) or (rows, H, W, C)"
        raise ValueError(f"expected images of shape {shapes}; got {tuple(x.shape)}")
    x = x if x.dtype in (torch.uint8, torch.bool) else x.long()
    low, high = int(x.min()), int(x.max())
    if low < 0 or high >= num_levels:
        raise ValueError(f"expected levels from 0 to {num_levels - 1}; got {low if low < 0 else high}")
    return x.to(torch.uint8).contiguous()


def _labels(labels: Any, rows: int, class_names: Sequence[str] | None) -> Tensor:
    classes = _as_tensor("labels", labels)
    if classes.shape != (rows,) or classes.is_floating_point():
        raise ValueError(f"expected labels as {rows} integers; got {classes.dtype} of shape {tuple(classes.shape)}")
    classes = classes.long()
    low, high = int(classes.min()), int(classes.max())
    if low < 0 or (class_names is not None and high >= len(class_names)):
        upper = "0" if class_names is None else f"0 to {len(class_names) - 1}"
        raise ValueError(f"expected labels from {upper}; got {low if low < 0 else high}")
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
    found = _find(name, folder)
    if found is None and download:
        if root is None:
            raise ValueError(f"expected root, the folder to download {name} to; got None")
        try:
            found = _from_torchvision(name, folder, download=True)
        except (OSError, RuntimeError) as error:
            got = " ".join(str(error).split())  # torchvision writes a line for each address
            raise OSError(f"expected to download {name} to {folder}; got {type(error).__name__}: {got}") from error
    if found is None:
        files = f"{name}.npz or train-images-idx3-ubyte(.gz) and so on,"
        if name == "cifar10":
            files = "train_000.webp and so on with labels.npz, or torchvision's cifar-10-batches-py,"
        raise FileNotFoundError(
            f"expected the files of {name}, {files} in {folder} or its usual folders ({', '.join(PLACES[name][:-1])}); "
            f"got none: give root, the folder that has them, or download=True for torchvision to put them there"
        )
    (x_train, y_train, x_test, y_test), class_names = found
    held = 5000 if validation is None else int(validation)
    sizes = [len(x_train) - held, held]
    if sizes[0] < 1:
        raise ValueError(f"expected validation to leave a train image; got {held} of {len(x_train)}")

    def parts(train: Tensor, test: Tensor) -> dict[str, Tensor]:
        # Each part has memory of its own, so that one that is kept or saved does not hold the others.
        return dict(zip(PARTS, (*(part.clone() for part in train.split(sizes)), test), strict=True))

    return ImageData(
        name=name,
        **parts(*(_levels(x, 256, x.ndim == 4) >> (8 - int(bits)) for x in (x_train, x_test))),
        labels=parts(_labels(y_train, len(x_train), class_names), _labels(y_test, len(x_test), class_names)),
        num_levels=2 ** int(bits),
        class_names=tuple(class_names),
    )


def _digits(bits: int, validation: int | None, seed: int) -> ImageData:
    from sklearn.datasets import load_digits  # here, since the import is slow

    if bits != 8:
        raise ValueError(f"expected bits=8 for the 17 levels of digits; got {bits}")
    bunch = load_digits()
    return make_images(
        bunch.images.astype(np.uint8),
        name="digits",
        labels=bunch.target,
        class_names=[str(label) for label in bunch.target_names],
        num_levels=17,
        validation=0.1 if validation is None else validation / len(bunch.images),
        seed=seed,
    )


def _find(name: str, folder: Path) -> _Found | None:
    places = [folder / place for place in PLACES[name]]
    if name == "cifar10":
        for place in places:
            if (place / "train_000.webp").is_file():
                return _read_strips(place)
        base = next((p for p in (folder, folder / "images") if (p / "cifar-10-batches-py").is_dir()), None)
        return None if base is None else _from_torchvision(name, base, download=False)
    for path in (folder / "images" / f"{name}.npz", folder / f"{name}.npz"):
        if path.is_file():
            arrays = read_npz(path, ("x_train", "y_train", "x_test", "y_test"), name)
            return list(arrays.values()), CLASSES[name]
    for place in (*places, *([DEBIAN[name]] if name in DEBIAN else [])):
        if any((place / f"{IDX_FILES[0]}{suffix}").is_file() for suffix in ("", ".gz")):
            return [_read_idx(place / file) for file in IDX_FILES], CLASSES[name]
    return None


def _read_strips(folder: Path) -> _Found:
    from PIL import Image  # here, since only images need Pillow

    arrays = read_npz(folder / "labels.npz", ("y_train", "y_test", "class_names"), "the labels of CIFAR-10")
    found = []
    for part in ("train", "test"):
        labels = arrays[f"y_{part}"]
        images = np.empty((len(labels), 32, 32, 3), np.uint8)
        for number, images_of_strip in enumerate(np.split(images, range(STRIP, len(labels), STRIP))):
            file = folder / f"{part}_{number:03}.webp"
            if not file.is_file():
                raise FileNotFoundError(f"expected {STRIP} images of CIFAR-10 in the file {file}; got no such file")
            with Image.open(file) as strip:
                pixels = np.asarray(strip.convert("RGB"))
            if pixels.size != images_of_strip.size:
                raise ValueError(f"expected a strip of {STRIP} images of 32 x 32 in {file}; got {pixels.shape}")
            images_of_strip[:] = pixels.reshape(-1, 32, 32, 3)
        found += [images, labels]
    return found, [name.decode() for name in arrays["class_names"]]


def _read_idx(path: Path) -> np.ndarray:
    """Read bytes in the IDX format: two zeros, the type (8 for bytes), the dimensions, their sizes, the values."""
    file = next((file for file in (path, Path(f"{path}.gz")) if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"expected the file {path}, or the same with .gz; got no such file")
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (EOFError, OSError) as error:
        raise ValueError(f"expected a gzip file in {file}; got one that does not open ({error})") from error
    dims = int(path.name[-len("1-ubyte")])
    head = 4 + 4 * dims
    sizes = np.frombuffer(content[4:head], ">u4").astype(int).tolist()
    if content[:4] != bytes([0, 0, 8, dims]) or len(content) != head + int(np.prod(sizes)):
        raise ValueError(f"expected an IDX file of bytes with {dims} dimensions in {file}; got another, or a part")
    return np.frombuffer(content, np.uint8, offset=head).reshape(sizes).copy()


def _from_torchvision(name: str, folder: Path, *, download: bool) -> _Found:
    from torchvision import datasets  # here, since the import is slow

    kind = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}[name]
    train, test = (kind(str(folder), train=part, download=download) for part in (True, False))
    arrays = [np.asarray(array) for array in (train.data, train.targets, test.data, test.targets)]
    return arrays, CLASSES.get(name) or train.classes


def load_image_folder(
    path: str | Path,
    size: int | Sequence[int] | None = None,
    *,
    channels: int = 3,
    name: str | None = None,
    **options: Any,
) -> ImageData:
    """Load every image file in a folder and the folders below it, and split them at random.

    If every file is in a folder of its class, ``path/class/file``, these folders are the classes.

    Args:
        path: the folder.
        size: height and width, or one number for both: images are resized to cover it, then cropped around the centre;
            None takes them as they are, all of one size.
        channels: 3 for colour, 1 for grey.
        name: name of the set; by default that of the folder.
        options: ``test``, ``validation`` and ``seed`` of :func:`make_images`.

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
    sides = None
    if size is not None:
        sides = tuple(size) if isinstance(size, Sequence) else (size, size)
        if len(sides) != 2:
            raise ValueError(f"expected size as one number or as (height, width); got {size!r}")
        check_sizes(height=sides[0], width=sides[1])
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise FileNotFoundError(f"expected image files ({', '.join(SUFFIXES)}) in {folder}; got none")

    images: list[np.ndarray] = []
    for file in files:
        images.append(_read_image(file, channels, sides))
        if images[-1].shape != images[0].shape:
            first, other = (f"{image.shape[0]} x {image.shape[1]}" for image in (images[0], images[-1]))
            expected = f"expected images of one size, {first} as {files[0]}"
            raise ValueError(f"{expected}; got {other} in {file}: give size to resize and crop them")
    below = [file.relative_to(folder).parts for file in files]
    class_names = sorted({parts[0] for parts in below}) if all(len(parts) > 1 for parts in below) else None
    labels = None if class_names is None else [class_names.index(parts[0]) for parts in below]
    return make_images(
        np.stack(images),
        name=folder.resolve().name if name is None else name,
        labels=labels,
        class_names=class_names,
        channels_last=True,
        **options,
    )


def _read_image(file: Path, channels: int, sides: Sequence[int] | None) -> np.ndarray:
    from PIL import Image, ImageOps  # here, since only images need Pillow

    try:
        with Image.open(file) as opened:
            mode = opened.mode
            image = ImageOps.exif_transpose(opened).convert("RGB" if channels == 3 else "L")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        got = f"{type(error).__name__}: {error}"
        raise ValueError(f"expected an image that can be read in {file}; got {got}") from error
    if mode.startswith(("I", "F")):  # Pillow would clip these at 255: a white picture
        raise ValueError(f"expected an image of 8 bits a channel in {file}; got one of more, Pillow's mode {mode!r}")
    if sides is not None:
        image = ImageOps.fit(image, (int(sides[1]), int(sides[0])), Image.Resampling.BICUBIC)
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

    Shapes:
        x: ``(*batch, C, H, W)``, of any dtype.

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
