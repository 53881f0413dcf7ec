"""Files of flows and posteriors: safetensors with a header in JSON and a checksum, from which no code is run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from pyroflows._version import __version__
from pyroflows.recipe import describe, restore

if TYPE_CHECKING:
    from pyroflows.flow import Flow

__all__ = ["FORMAT", "load", "read", "replacing", "save", "write"]

FORMAT = 3
"""The version of the files that are written.

Format 1 was that of posteriors alone, and had no checksum; up to format 2 couplings were of their first version.
"""

_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


def save(flow: Flow, path: str | os.PathLike[str], notes: Mapping[str, Any] | None = None) -> None:
    """Write a flow into one file; see :meth:`pyroflows.Flow.save`."""
    notes = flow.notes if notes is None else notes
    if not isinstance(notes, Mapping):
        raise TypeError(f"expected notes as a dict of JSON values; got {type(notes).__name__}")
    notes = dict(notes)
    try:
        alike = json.loads(json.dumps(notes, allow_nan=False)) == notes
    except (TypeError, ValueError):
        alike = False
    if not alike:
        raise TypeError(f"expected notes of JSON values, with texts as keys, and lists for tuples; got {notes!r}")
    recipe, tensors = describe(flow)
    header = {
        "dtype": str(flow.dtype).removeprefix("torch."),
        "notes": notes,
        "frozen": [name for name, parameter in flow.named_parameters() if not parameter.requires_grad],
        "recipe": recipe,
    }
    write(path, "flow", header, tensors)


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu", *, classes: Sequence[type] = ()) -> Flow:
    """Read a flow that :meth:`Flow.save` wrote: equal numbers, for evaluation, without running code from the file.

    Args:
        path: of the file.
        device: where the flow is to be.
        classes: of the user's own, such as a layer, that a flow in the file was made of.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: ``classes`` is no list of classes.
        ValueError: the file is not one of a flow, or is damaged, or was written in a newer format, or names a class or
            builder that is unknown.

    Example:
        >>> import tempfile
        >>> from pyroflows import maf
        >>> flow = maf(3, num_layers=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     flow.save(f"{folder}/flow.safetensors", notes={"rows": 1000})
        ...     loaded = load(f"{folder}/flow.safetensors")
        >>> loaded.notes
        {'rows': 1000}
        >>> torch.equal(loaded.log_prob(torch.zeros(3)), flow.eval().log_prob(torch.zeros(3)))
        True
    """
    from pyroflows.flow import Flow

    if not isinstance(classes, Sequence) or not all(isinstance(kind, type) for kind in classes):
        raise TypeError(f"expected classes as a list of classes; got {classes!r}")
    header, tensors = read(path, "flow")
    try:
        flow = restore(header["recipe"], tensors, _DTYPES[header["dtype"]], classes, old=header["format"] < 3)
        if not isinstance(flow, Flow) or not isinstance(header["notes"], dict):
            raise ValueError(f"expected a Flow; got {type(flow).__name__}")
        for name in header["frozen"]:
            flow.get_parameter(name).requires_grad_(False)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"expected a flow written by save; got {path}, whose header makes no sense: {error}") from None
    except ValueError as error:
        raise ValueError(f"{error}, in {path}") from None
    flow.notes = header["notes"]
    return flow.to(device)


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
