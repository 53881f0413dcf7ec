"""The time of a long call: its limit, and what a bar and a log say of it."""

import logging
import time
from typing import Any

from pyroflows import distributed

__all__ = ["Watch"]

_LOG_SECONDS = 10.0  # between lines in the log
_log = logging.getLogger("pyroflows")


class Watch:
    """A context that counts the time of a call.

    Args:
        max_seconds: the limit of wall time, from now on; None for none.
        progress: whether to show a bar; None for on a terminal only.
    """

    def __init__(self, max_seconds: float | None, progress: bool | None):
        self.max_seconds, self.progress = max_seconds, progress
        self.began = self.logged = time.perf_counter()
        disable = True if distributed.rank() else None if progress is None else not progress
        from tqdm.auto import tqdm

        self.bar = tqdm(bar_format="{desc}{elapsed}", disable=disable, leave=False)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: Any) -> None:
        self.hide()

    def hide(self) -> None:
        """Take the bar away."""
        self.bar.close()

    def seconds(self) -> float:
        """Return the time since the start, by the first rank's clock."""
        return float(distributed.broadcast(time.perf_counter() - self.began))

    def says(self, what: str) -> None:
        """Show and log what is being done."""
        now = time.perf_counter()
        if not self.bar.disable:
            self.bar.set_description(f"{what}, ", refresh=False)
            self.bar.update()
        if now - self.logged >= _LOG_SECONDS and not distributed.rank():
            self.logged = now
            _log.info("posterior: %.0f s, %s", now - self.began, what)

    def is_over(self, what: str, share: float = 1.0) -> bool:
        """Say what is being done, and return whether a share of the time is over."""
        self.says(what)
        return self.max_seconds is not None and self.seconds() >= share * self.max_seconds
