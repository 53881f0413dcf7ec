"""A part of the demo, and what all parts need: one thread, one seed, figures and printed lines."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

__all__ = ["Part", "echo", "one_thread", "save"]


@dataclass(frozen=True)
class Part:
    """The results of one part of the demo.

    Args:
        title: its heading in the report.
        text: a paragraph on what was done.
        columns: headings of its table.
        rows: rows of its table, words and formatted numbers.
        numbers: the numbers for ``report.json``.
        figures: file names of its figures, with a caption each.
    """

    title: str
    text: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Mapping[str, Any]
    figures: Mapping[str, str]


@contextlib.contextmanager
def one_thread(seed: int) -> Iterator[None]:
    """Compute on one thread, and seed torch; restore both afterwards.

    Networks this small gain nothing from more threads, which wait for one another if a core is busy.
    """
    threads = torch.get_num_threads()
    with threadpool_limits(1), torch.random.fork_rng([]):
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def save(figure: Figure, path: Path) -> None:
    """Save a figure as a PNG."""
    figure.savefig(path, dpi=110)


def echo(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)
