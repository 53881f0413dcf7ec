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

FORMAT = 4
"""The version of the format, in which files are written and read."""


def write(path: str | os.PathLike[str], kind: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors and a header of JSON values, and replace what the path holds."""
    import pyro
    from safetensors.torch import save as to_bytes

    versions = {"pyroflows": __version__, "torch": torch.__version__, "pyro": pyro.__version__}
    stored, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        stored[name] = tensor.clone() if memory in seen else tensor  # the file shares no memory between tensors
        seen.add(memory)
    full_header = {"format": FORMAT, "kind": kind, "versions": versions, **header}
    text = json.dumps({**full_header, "sha256": _checksum(full_header, stored)})
    with replacing(path) as file:
        file.write(to_bytes(stored, {"pyroflows": text}))


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the header and the tensors of a file of a kind, "flow" or "posterior".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind, damaged, or written in another version of the format.
    """
    expected = f"expected a {kind} written by save; got {path}"
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{expected}, which is not a file")
    metadata, tensors = _contents(path, expected)
    header = _header(metadata.get("pyroflows", metadata.get("posterior", "null")), expected)
    if header.pop("sha256", None) != _checksum(header, tensors):
        raise ValueError(f"{expected}, which is damaged: its checksum is not that of its contents")
    if header.get("kind") != kind:
        raise ValueError(f"{expected}, which holds a {str(header.get('kind'))[:40]}")
    return header, tensors


def _contents(path: str | os.PathLike[str], expected: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import safe_open

    with open(path, "rb"):  # a file that is missing or unreadable raises the error of the system
        pass
    try:
        with safe_open(os.fspath(path), "pt") as file:
            # Copies, since mapped memory changes with the file.
            return file.metadata() or {}, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except Exception:  # its class depends on what the file is, or where it is truncated
        raise ValueError(f"{expected}, which is not a valid safetensors file") from None


def _header(text: str, expected: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    version = header.get("format") if isinstance(header, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"{expected}, which is not a file of pyroflows, or is damaged")
    if version != FORMAT:
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
