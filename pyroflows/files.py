"""Files of flows and posteriors: safetensors with a header in JSON and a checksum, from which no code is run."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pyroflows._version import __version__

__all__ = ["FORMAT", "read", "replacing", "write"]

FORMAT = 5
"""The version of the format in which files are written."""
_READ = (4, FORMAT)  # a file of format 4 holds no part by its attributes


def write(path: str | os.PathLike[str], kind: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors and a header of JSON values, and replace what the path holds."""
    import pyro
    from safetensors.torch import save as to_bytes

    versions = {"pyroflows": __version__, "torch": torch.__version__, "pyro": pyro.__version__}
    stored, seen = {}, set()
    is_complex = [name for name, tensor in tensors.items() if tensor.is_complex()]
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise ValueError(f"expected dense tensors; got {name} of layout {tensor.layout}")
        tensor = tensor.detach().resolve_conj()
        tensor = (torch.view_as_real(tensor) if name in is_complex else tensor).cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        stored[name] = tensor.clone() if memory in seen else tensor  # the file shares no memory between tensors
        seen.add(memory)
    full_header = {"format": FORMAT, "kind": kind, "versions": versions, **header, "complex": is_complex}
    text = json.dumps({**full_header, "sha256": _checksum(full_header, stored)})
    with replacing(path) as file:
        file.write(to_bytes(stored, {"pyroflows": text}))


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the header and the tensors of a file of a kind: "flow", "posterior" or "amortized posterior".

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: the path is none.
        ValueError: the file is of another kind, damaged, or written in another version of the format.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"expected the path of a file; got {type(path).__name__}")
    expected = f"expected {_named(kind)} written by save; got {path}"
    if not os.path.exists(path):
        raise FileNotFoundError(f"{expected}, which does not exist")
    if not os.path.isfile(path):
        raise ValueError(f"{expected}, which is {'a folder' if os.path.isdir(path) else 'not a file'}")
    metadata, tensors = _contents(path, expected)
    header = _header(metadata.get("pyroflows", metadata.get("posterior", "null")), expected)
    if header.pop("sha256", None) != _checksum(header, tensors):
        raise ValueError(f"{expected}, which is damaged: its checksum is not that of its contents")
    if header.get("kind") != kind:
        held = str(header.get("kind"))[:40]
        advice = f": read it by {_READERS[held]}" if held in _READERS else ""
        raise ValueError(f"{expected}, which holds {_named(held)}{_maker(header)}{advice}")
    try:
        for name in header.pop("complex", ()):
            tensors[name] = torch.view_as_complex(tensors[name])
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{expected}, whose header makes no sense: {error}") from None
    return header, tensors


_READERS = {
    "flow": "pyroflows.load",
    "posterior": "pyroflows.Posterior.load",
    "amortized posterior": "pyroflows.AmortizedPosterior.load",
}


def _named(kind: str) -> str:
    return f"an {kind}" if kind[:1] in "aeiou" else f"a {kind}"


def _maker(header: Mapping[str, Any]) -> str:
    """Return what the recipe in a header builds, in parentheses."""
    recipe = header.get("recipe")
    name = recipe.get("make") if isinstance(recipe, dict) else None
    return f" ({name[:40]})" if isinstance(name, str) else ""


def _contents(path: str | os.PathLike[str], expected: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import safe_open

    with open(path, "rb"):  # a file that is missing or unreadable raises the error of the system
        pass
    try:
        with safe_open(os.fspath(path), "pt") as file:
            # Copies, since mapped memory changes with the file.
            return file.metadata() or {}, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except Exception:  # its class depends on what the file is, or where it is truncated
        raise ValueError(f"{expected}, which is not a valid safetensors file{_reason(path)}") from None


_BEGINNINGS = {
    b"PK": "a zip archive, as torch.save or NumPy writes it",
    b"\x80": "a pickle, which could run code",
    b"PAR1": "a table in Parquet",
    b"\x93NUMPY": "a NumPy array",
    b"\x1f\x8b": "compressed by gzip",
    b"\x89HDF": "an HDF5 file",
}


def _reason(path: str | os.PathLike[str]) -> str:
    """Return why a file is not a valid safetensors file, as the end of a sentence, where its beginning shows it."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        return ": it is empty"
    if head[8:9] == b"{" and (length := int.from_bytes(head[:8], "little")) < 2**32:
        try:
            ends = [entry["data_offsets"][1] for entry in _offsets(path, length)]
            is_short = size < 8 + length + max(ends, default=0)
        except (ValueError, LookupError, TypeError, RecursionError):
            is_short = size < 8 + length
        return ": it is cut short" if is_short else ""
    for beginning, what in _BEGINNINGS.items():
        if head.startswith(beginning):
            return f": it is {what}"
    is_text = head.decode("utf-8", "replace")[:400].replace("\n", "").replace("\r", "").replace("\t", "").isprintable()
    return ": it is a text, such as a table" if is_text else ""


def _offsets(path: str | os.PathLike[str], length: int) -> list[dict[str, Any]]:
    with open(path, "rb") as file:
        file.seek(8)
        entries = json.loads(file.read(length))
    return [entry for name, entry in entries.items() if name != "__metadata__"]


def _header(text: str, expected: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    version = header.get("format") if isinstance(header, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"{expected}, which is not a file of pyroflows, or is damaged")
    if version not in _READ:
        age, advice = ("an older", "save it again") if version < FORMAT else ("a newer", "update pyroflows")
        raise ValueError(
            f"{expected}, which was written by {age} version, in format {version}: pyroflows {__version__} reads "
            f"format {FORMAT}; {advice}"
        )
    return header


def _checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the header with sorted keys and of the name, dtype, shape and bytes of each tensor."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Replace a file atomically: write into the yielded binary file, which takes its place when the block ends.

    Raises:
        ValueError: the folder does not exist, or the path is a folder, a device or a pipe.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir() or (target.exists() and not target.is_file()):
        raise ValueError(f"expected the path of a file in a folder that exists; got {path}")
    new = target.with_name(f"{target.name[:100]}.{os.getpid()}.tmp")
    try:
        with new.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, target)
    finally:
        new.unlink(missing_ok=True)
