"""Files of flows and posteriors: safetensors with a header in JSON and a checksum, from which no code is run."""

from __future__ import annotations

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

FORMAT = 3
"""The version of the files that are written.

Format 1 was that of posteriors alone, and had no checksum; up to format 2 couplings were of their first version.
"""


def write(path: str | os.PathLike[str], kind: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors and a header of JSON values, in the place of what is there."""
    import pyro
    from safetensors.torch import save as to_bytes

    versions = {"pyroflows": __version__, "torch": torch.__version__, "pyro": pyro.__version__}
    stored, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        stored[name] = tensor.clone() if memory in seen else tensor  # the file shares no memory between tensors
        seen.add(memory)
    whole = {"format": FORMAT, "kind": kind, "versions": versions, **header}
    text = json.dumps({**whole, "sha256": _checksum(whole, stored)})
    with replacing(path) as file:
        file.write(to_bytes(stored, {"pyroflows": text}))


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Give the header and the tensors of a file of this kind, "flow" or "posterior"; refuse any other.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is none of this kind, or is damaged, or was written in a newer format.
    """
    expected = f"expected a {kind} written by save; got {path}"
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{expected}, which is no file")
    metadata, tensors = _contents(path, expected)
    if "pyroflows" not in metadata and "posterior" in metadata:
        header, tensors = _from_format_1(_header(metadata["posterior"], expected), tensors)
    else:
        header = _header(metadata.get("pyroflows", "null"), expected)
        if header.pop("sha256", None) != _checksum(header, tensors):
            raise ValueError(f"{expected}, which is damaged: its checksum is not that of its contents")
    if header.get("kind") != kind:
        raise ValueError(f"{expected}, which holds a {str(header.get('kind'))[:40]}")
    return header, tensors


def _contents(path: str | os.PathLike[str], expected: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import safe_open

    with open(path, "rb"):  # a file that is missing, or not to be read, is the system's error
        pass
    try:
        with safe_open(os.fspath(path), "pt") as file:
            # Copies, since what is mapped from a file changes with it.
            return file.metadata() or {}, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except Exception:  # what is raised depends on where the file is cut, or what it is
        raise ValueError(f"{expected}, which is no safetensors file, or a damaged one") from None


def _header(text: str, expected: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    version = header.get("format") if isinstance(header, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"{expected}, which is another's file, or damaged")
    if version > FORMAT:
        raise ValueError(
            f"{expected}, of format {version}: pyroflows {__version__} reads formats up to {FORMAT}; use a newer one"
        )
    return header


def _from_format_1(header: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Give a posterior of format 1, which names the guide's builder and its options, as one of today's."""
    tensors = {f"state.{name[5:]}" if name.startswith("flow.") else name: value for name, value in tensors.items()}
    return {**header, "kind": "posterior", "recipe": None, "builder": header.get("flow")}, tensors


def _checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Give the SHA-256 of the header, its keys in order, and of every tensor's name, dtype, shape and bytes."""
    mark = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        mark.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        mark.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return mark.hexdigest()


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Give a binary file that takes the place of another once it is whole; a death before leaves the other.

    Raises:
        ValueError: there is no such folder, or the path is that of a folder, a device or a pipe.
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
