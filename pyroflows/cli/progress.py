"""Progress on standard error: a bar on a terminal, a line now and then in a log."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from pyroflows.cli.output import is_first

__all__ = ["Progress", "TrainingLog"]

_SECONDS = 10.0


class Progress:
    """Count rows, and show the count on standard error.

    Args:
        verb: what was done to the rows, such as "scored".
        total: their number, if it is known.
        quiet: whether to show nothing.
    """

    def __init__(self, verb: str, total: int | None, quiet: bool):
        self.verb, self.total, self.rows = verb, total, 0
        terminal, quiet = sys.stderr.isatty(), quiet or not is_first()
        self.lines = not quiet and not terminal
        self.bar = tqdm(total=total, desc=verb, unit="row", unit_scale=True, leave=False, disable=quiet or not terminal)
        self.began = self.said = time.perf_counter()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def add(self, rows: int) -> None:
        """Count rows."""
        self.rows += rows
        self.bar.update(rows)
        now = time.perf_counter()
        if self.lines and now - self.said >= _SECONDS:
            self.said = now
            of = "" if self.total is None else f" of {self.total:,}"
            print(f"{self.verb} {self.rows:,}{of} rows, {self.rows_per_second:,.0f} a second", file=sys.stderr)

    @property
    def rows_per_second(self) -> float:
        """The rows so far over the seconds so far."""
        return self.rows / max(time.perf_counter() - self.began, 1e-9)


class TrainingLog:
    """Take the loss of each training step, and print it now and then; on a terminal the fit itself shows a bar.

    Args:
        quiet: whether to print nothing.
    """

    def __init__(self, quiet: bool):
        self.lines = not quiet and not sys.stderr.isatty() and is_first()
        self.steps = 0
        self.interrupted = False
        self.began = self.said = time.perf_counter()

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
        self.steps += 1
        now = time.perf_counter()
        if self.lines and now - self.said >= _SECONDS:
            self.said = now
            print(f"fit: step {self.steps:,}, {now - self.began:.0f} s, loss {float(loss):.4f} nats", file=sys.stderr)
