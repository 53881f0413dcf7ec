"""How far a command is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyroflows.cli.options import is_first

__all__ = ["Log", "Progress"]

_SECONDS = 10.0


class Progress:
    """Counts rows, and shows the count on standard error.

    Args:
        what: what is done to them, such as "scored".
        total: how many there are, where that is known.
        quiet: whether to show nothing.
    """

    def __init__(self, what: str, total: int | None, quiet: bool):
        from tqdm import tqdm

        self.what, self.total, self.rows = what, total, 0
        terminal, quiet = sys.stderr.isatty(), quiet or not is_first()
        self.lines = not quiet and not terminal
        self.bar = tqdm(total=total, desc=what, unit="row", unit_scale=True, leave=False, disable=quiet or not terminal)
        self.began = self.said = time.perf_counter()

    def __enter__(self) -> Progress:
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
            print(f"{self.what} {self.rows:,}{of} rows, {self.rows_per_second:,.0f} a second", file=sys.stderr)

    @property
    def rows_per_second(self) -> float:
        """The rows so far over the seconds so far."""
        return self.rows / max(time.perf_counter() - self.began, 1e-9)


class Log:
    """The objective of a fit, the negative log-likelihood, that says now and then in a log how large it is.

    Args:
        quiet: whether to say nothing, as on a terminal, where the fit itself shows a bar.
    """

    def __init__(self, quiet: bool):
        self.lines = not quiet and not sys.stderr.isatty() and is_first()
        self.steps = 0
        self.interrupted = False
        self.began = self.said = time.perf_counter()

    @contextmanager
    def ended_by_interrupts(self) -> Iterator[None]:
        """Have Ctrl-C end a fit at its next step: raised wherever it comes, it is lost where Python frees an object."""
        if threading.current_thread() is not threading.main_thread():
            yield  # where no signal can be taken
            return

        def note(*_: Any) -> None:
            if self.interrupted:  # a second time: at once
                raise KeyboardInterrupt
            self.interrupted = True

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def __call__(self, flow: Any, x: Any, context: Any) -> Any:
        from pyroflows.training import negative_log_likelihood

        if self.interrupted:
            raise KeyboardInterrupt
        loss = negative_log_likelihood(flow, x, context)
        now = time.perf_counter()
        self.steps += flow.training
        if self.lines and flow.training and now - self.said >= _SECONDS:
            self.said = now
            print(
                f"fit: step {self.steps:,}, {now - self.began:.0f} s, loss {float(loss.detach()):.4f} nats",
                file=sys.stderr,
            )
        return loss
