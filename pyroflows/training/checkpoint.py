"""The file from which a fit goes on after an interrupt."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyroflows.files import replacing

__all__ = ["Checkpoint", "fingerprint"]

_FORMAT = "pyroflows fit 3"


class Checkpoint:
    """A file that holds the state of a fit, whole at any time.

    Args:
        path: the file; its folder has to be there.
        seconds: the time after which it is written again, at the next step.
        steps: the steps after which it is written again; where neither is given, that is after each epoch.

    Raises:
        TypeError: the path is no path.
        ValueError: there is no such folder, or the path is a folder itself.
    """

    def __init__(self, path: str | os.PathLike[str], seconds: float | None = None, steps: int | None = None):
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"expected checkpoint as the path of a file; got {type(path).__name__}")
        self.path, self.seconds, self.steps = Path(path), seconds, steps
        if not self.path.parent.is_dir() or self.path.is_dir():
            raise ValueError(f"expected checkpoint as the path of a file in a folder that exists; got {self.path}")
        self.written = 0.0, 0  # the fit's seconds and steps at the last write

    def load(self) -> dict[str, Any] | None:
        """Give the state, on the CPU; None where there is no file yet."""
        name = re.escape(self.path.name[:100])
        for left in self.path.parent.glob("*.tmp"):
            if re.fullmatch(rf"{name}\.\d+\.tmp", left.name):
                left.unlink(missing_ok=True)  # by a process that died while it wrote
        if not self.path.exists():
            return None
        with self.path.open("rb") as file:
            try:
                state = torch.load(file, map_location="cpu", weights_only=True)
            except Exception:  # what is raised depends on where the file is cut, or what it is
                state = None
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise ValueError(
                f"expected the checkpoint of a fit; got {self.path}, which is none of this version, or is cut short"
            )
        return state

    def due(self, seconds: float, steps: int, *, epoch_ended: bool) -> bool:
        """Whether the last write is long enough ago in a fit that has run for so long."""
        if self.seconds is None and self.steps is None:
            return epoch_ended
        late = self.seconds is not None and seconds - self.written[0] >= self.seconds
        return late or (self.steps is not None and steps - self.written[1] >= self.steps)

    def save(self, state: dict[str, Any]) -> None:
        """Put the state in the file's place at once: a process that dies while it writes leaves the last file."""
        with replacing(self.path) as file:
            torch.save({"format": _FORMAT, **state}, file)

    def check(self, found: dict[str, Any], expected: dict[str, Any]) -> None:
        """Refuse the checkpoint of a fit with other options, of another flow or of other data."""
        for name, value in expected.items():
            got = found.get(name)
            if got != value and name in ("flow", "data"):
                raise ValueError(f"expected the checkpoint of a fit of this {name}; got that of another in {self.path}")
            if got != value:
                raise ValueError(f"expected the checkpoint of a fit with {name}={value!r}; got {got!r} in {self.path}")


def fingerprint(*parts: Any) -> str:
    """Give a text that tells a module's structure, or data, from others; of data it looks at 64 rows."""
    mark = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, nn.Module):
            # The text of a function in it has an address, which another process has not; a random order comes back
            # with the state.
            mark.update(re.sub(r"0x[0-9a-f]+|order=\[[^]]*\]", "", repr(part)).encode())
            for name, tensor in part.state_dict().items():
                mark.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        elif part is not None:
            rows = part[torch.linspace(0, len(part) - 1, 64, dtype=torch.float64).long().to(part.device)]
            mark.update(f"{tuple(part.shape)} {part.dtype}".encode())
            mark.update(rows.cpu().contiguous().numpy().tobytes())
    return mark.hexdigest()
