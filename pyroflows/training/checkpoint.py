"""Checkpoints: the file from which a fit resumes, and what must be the same when it does."""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pyroflows.files import replacing
from pyroflows.flow import Flow
from pyroflows.training.batches import Batches, Rows, Steps
from pyroflows.training.options import FitOptions

__all__ = ["Checkpoint", "must_match"]

_FORMAT = "pyroflows fit 5"
_MAY_CHANGE = {"max_skipped", "activation_checkpointing", "compile", "strategy"}


class Checkpoint:
    """A file with the state of a fit, complete at any time: written every ``seconds`` or ``steps``, or each epoch."""

    def __init__(self, path: str | os.PathLike[str], seconds: float | None = None, steps: int | None = None):
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"expected checkpoint as the path of a file; got {type(path).__name__}")
        self.path, self.seconds, self.steps = Path(path), seconds, steps
        if not self.path.parent.is_dir() or self.path.is_dir():
            raise ValueError(f"expected checkpoint as the path of a file in a folder that exists; got {self.path}")
        self.written = 0.0, 0  # the fit's seconds and steps at the last write
        self.metadata: dict[str, Any] = {}  # written with every state

    def load(self) -> dict[str, Any] | None:
        """Return the saved state, on the CPU; None if there is no file yet."""
        name = re.escape(self.path.name[:100])
        for temporary in self.path.parent.glob("*.tmp"):
            if re.fullmatch(rf"{name}\.\d+\.tmp", temporary.name):
                temporary.unlink(missing_ok=True)  # left by a process that died while it wrote
        if not self.path.exists():
            return None
        with self.path.open("rb") as file:
            try:
                state = torch.load(file, map_location="cpu", weights_only=True)
            except Exception:  # of many types, by where the file is cut or what it is
                state = None
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise ValueError(
                f"expected the checkpoint of a fit; got {self.path}, which is not one of this version, or truncated"
            )
        return state

    def due(self, seconds: float, steps: int, *, epoch_ended: bool) -> bool:
        """Whether a fit that has run for this long is to be written now."""
        if self.seconds is None and self.steps is None:
            return epoch_ended
        late = self.seconds is not None and seconds - self.written[0] >= self.seconds
        return late or (self.steps is not None and steps - self.written[1] >= self.steps)

    def save(self, state: dict[str, Any]) -> None:
        """Replace the file atomically: a process that dies while it writes leaves the previous one."""
        with replacing(self.path) as file:
            torch.save({"format": _FORMAT, **self.metadata, **state}, file)

    def check(self, state: dict[str, Any]) -> None:
        """Refuse the saved state of a fit with other options, of another flow or of other data."""
        for name, value in self.metadata["must_match"].items():
            got = state["must_match"].get(name)
            if got != value and name in ("flow", "data"):
                raise ValueError(f"expected the checkpoint of a fit of this {name}; got that of another in {self.path}")
            if got != value:
                raise ValueError(f"expected the checkpoint of a fit with {name}={value!r}; got {got!r} in {self.path}")


def must_match(
    flow: Flow, train: Rows | Batches | Steps, held_out: Rows | None, options: FitOptions, objective: Any, **fields: Any
) -> dict[str, Any]:
    """Return what must be the same in a fit that resumes, and in all processes: whatever a step depends on."""
    fields |= {"batch_size": getattr(train, "batch_size", None), **vars(options)}
    fields = {k: v for k, v in fields.items() if k not in _MAY_CHANGE and not k.startswith("checkpoint_")}
    rows = [part for part in (train, held_out) if isinstance(part, Rows)]
    return {
        **{name: value.item() if isinstance(value, np.generic) else value for name, value in fields.items()},
        "steps_per_epoch": train.steps,
        "objective": _name(objective),
        "augment": None if options.augment is None else _name(options.augment),
        "flow": _fingerprint(flow),
        "data": _fingerprint(*(column for part in rows for column in (part.x, part.context, part.weights))),
    }


def _name(function: object) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def _fingerprint(*parts: Any) -> str:
    """Return a digest of a module's structure, or of the shapes of data and 64 rows of them."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, nn.Module):
            # A function's repr has an address, which differs between processes; a random order is part of the state.
            digest.update(re.sub(r"0x[0-9a-f]+|order=\[[^]]*\]", "", repr(part)).encode())
            for name, tensor in part.state_dict().items():
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        elif part is not None:
            rows = part[torch.linspace(0, len(part) - 1, 64, dtype=torch.float64).long().to(part.device)]
            digest.update(f"{tuple(part.shape)} {part.dtype}".encode())
            digest.update(rows.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
