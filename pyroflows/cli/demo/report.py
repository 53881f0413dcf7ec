"""The complete demo: its parts one after another, figures and a short report."""

import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from pyroflows._version import __version__
from pyroflows.cli.demo.breast_cancer import breast_cancer
from pyroflows.cli.demo.digits import digits
from pyroflows.cli.demo.moons import moons
from pyroflows.cli.demo.part import Part, echo
from pyroflows.cli.demo.posterior import posterior

__all__ = ["PARTS", "write_report"]

# The rest of two and a half minutes is for imports, scores and figures.
_FIT_SECONDS = 130.0

PARTS: dict[str, Callable[[Path, int, bool, float], Part]] = {
    "breast_cancer": breast_cancer,
    "moons": moons,
    "digits": digits,
    "posterior": posterior,
}
"""The parts in order; each takes the folder, the seed, whether to be quick, and the time at which it must end."""


def write_report(output: str | Path, *, seed: int = 0, quick: bool = False) -> dict[str, Any]:
    """Run every part, print its results, and write figures, ``report.md`` and ``report.json``.

    Args:
        output: folder to write to; created if it is missing.
        seed: of splits, data and fits.
        quick: whether to run for a few seconds only; the numbers mean little then.

    Returns:
        The contents of ``report.json``.

    Raises:
        OSError: the folder cannot be created or written to.
    """
    began = time.perf_counter()
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    echo(f"pyroflows {__version__} demo: figures and a report in {output}, in at most two and a half minutes")
    parts: dict[str, Part] = {}
    for name, part in PARTS.items():
        echo(f"\n{name}")
        # The fits of a part end by then, however busy the machine is; the following parts share the time that it
        # leaves, or lose the time that it takes for scores and figures.
        left = began + _FIT_SECONDS - time.perf_counter()
        parts[name] = part(output, seed, quick, time.perf_counter() + left / (len(PARTS) - len(parts)))
        echo("")
        echo(_as_text(parts[name]))
    report = {
        "pyroflows": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "seed": seed,
        "quick": quick,
        "seconds": round(time.perf_counter() - began, 1),
        "parts": {name: part.numbers for name, part in parts.items()},
    }
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (output / "report.md").write_text(_as_markdown(parts.values(), report), encoding="utf-8")
    figures = [figure for part in parts.values() for figure in part.figures]
    echo(f"\nwritten in {report['seconds']:.0f} s:")
    for name in ("report.md", "report.json", *figures):
        echo(f"  {output / name}")
    return report


def _as_text(part: Part) -> str:
    table = [list(part.columns[:-1]), *(list(row[:-1]) for row in part.rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return "\n".join(
        "  " + "  ".join(cell.rjust(width) if at else cell.ljust(width) for at, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in table)
    )


def _as_markdown(parts: Iterable[Part], report: Mapping[str, Any]) -> str:
    lines = [
        "# pyroflows demo",
        "",
        f"pyroflows {report['pyroflows']}, torch {report['torch']}, seed {report['seed']}, "
        f"{report['seconds']:.0f} s. All numbers are in `report.json`; higher log-likelihoods are better, and fewer "
        "bits; ± is one standard error.",
    ]
    if report["quick"]:
        lines += ["", "This was a quick run: the fits were cut short, and the numbers mean little."]
    for part in parts:
        lines += ["", f"## {part.title}", "", part.text, ""]
        lines += ["| " + " | ".join(part.columns) + " |", "|" + " --- |" * len(part.columns)]
        lines += ["| " + " | ".join(row) + " |" for row in part.rows]
        for name, about in part.figures.items():
            lines += ["", f"![{about}]({name})"]
    return "\n".join(lines) + "\n"
