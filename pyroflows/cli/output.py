"""What commands write: results for people or as one line of JSON, and progress on standard error."""

import argparse
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from tqdm import tqdm

__all__ = ["Progress", "TrainingLog", "finite", "is_first", "print_json", "say"]

_SECONDS = 10.0


def is_first() -> bool:
    """Return whether this process is the first of those that torchrun has started, or alone."""
    return int(os.environ.get("RANK", 0)) == 0


def say(options: argparse.Namespace, text: str) -> None:
    """Print a line for people; on standard error if a table or a model goes to standard output."""
    is_taken = getattr(options, "output", None) == "-" or getattr(options, "pass_model", False)
    if not options.quiet and not options.json and is_first():
        print(text, file=sys.stderr if is_taken else sys.stdout)


def print_json(values: dict[str, Any]) -> None:
    """Print values as one line of JSON, with null for a number that is not finite."""
    if is_first():
        print(json.dumps(finite(values), allow_nan=False))


def finite(value: Any) -> Any:
    """Return a JSON value with None for each number in it that is not finite."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Log:
    """The times of lines on standard error: one every few seconds, in a log rather than on a terminal."""

    def __init__(self, quiet: bool):
        self.quiet = quiet or not is_first()
        self.began = self._last = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def is_due(self) -> bool:
        if self.quiet or sys.stderr.isatty() or time.perf_counter() - self._last < _SECONDS:
            return False
        self._last = time.perf_counter()
        return True


class Progress(_Log, AbstractContextManager["Progress"]):
    """Count rows, and show the count on standard error: by a bar on a terminal, by a line now and then in a log."""

    def __init__(self, verb: str, total: int | None, quiet: bool):
        super().__init__(quiet)
        self.verb, self.total, self.rows = verb, total, 0
        hidden = self.quiet or None  # None hides the bar where there is no terminal
        self.bar = tqdm(total=total, desc=verb, unit="row", unit_scale=True, leave=False, disable=hidden)

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def add(self, rows: int) -> None:
        """Count rows."""
        self.rows += rows
        self.bar.update(rows)
        if self.is_due():
            of = "" if self.total is None else f" of {self.total:,}"
            print(f"{self.verb} {self.rows:,}{of} rows, {self.rows_per_second:,.0f} a second", file=sys.stderr)

    @property
    def rows_per_second(self) -> float:
        """The rows so far over the seconds so far."""
        return self.rows / max(self.seconds, 1e-9)


class TrainingLog(_Log):
    """Print the loss of a training step now and then; on a terminal the fit itself shows a bar."""

    steps, interrupted = 0, False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let Ctrl-C end training at the next step: raised anywhere, it is lost while Python frees an object."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread receives signals
            return

        def note(*_: Any) -> None:
            if self.interrupted:  # the second time: at once
                raise KeyboardInterrupt
            self.interrupted = True

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def __call__(self, loss: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        if not self.steps:
            self.began = time.perf_counter()  # not with the time that imports and the table took
        self.steps += 1
        if self.is_due():
            print(f"fit: step {self.steps:,}, {self.seconds:.0f} s, loss {float(loss):.4f} nats", file=sys.stderr)
