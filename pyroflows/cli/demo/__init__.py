"""``pyroflows demo``: a first look on bundled data, in parts one after another, with figures and a short report."""

import argparse
import contextlib
import json
import platform
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pandas as pd
import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from pyroflows._version import __version__
from pyroflows.cli.demo import breast_cancer, digits, moons, posterior
from pyroflows.cli.demo.comparison import Part, echo

__all__ = ["PARTS", "run"]

# The rest of two and a half minutes is for imports, scores and figures.
_FIT_SECONDS = 130.0

PARTS: dict[str, Callable[[int, bool, float], Part]] = {
    "breast_cancer": breast_cancer.run,
    "moons": moons.run,
    "digits": digits.run,
    "posterior": posterior.run,
}
"""The parts in order; each takes the seed, whether to be quick, and the time at which it must end."""


def run(options: argparse.Namespace) -> None:
    """Run every part, print its results, and write figures, ``report.md`` and ``report.json``."""
    began, output = time.perf_counter(), options.output
    output.mkdir(parents=True, exist_ok=True)
    echo(f"pyroflows {__version__} demo: figures and a report in {output}, in at most two and a half minutes")
    parts: dict[str, Part] = {}
    for name, run_part in PARTS.items():
        echo(f"\n{name}")
        # The fits of a part end by then, however busy the machine is; the following parts share the time that it
        # leaves, or lose the time that it takes for scores and figures.
        left = began + _FIT_SECONDS - time.perf_counter()
        with _one_thread(options.seed):
            part = run_part(options.seed, options.quick, time.perf_counter() + left / (len(PARTS) - len(parts)))
            part.figure.savefig(output / f"{name}.png", dpi=110)
        parts[name] = part
        table = pd.DataFrame(part.rows, columns=part.columns).iloc[:, :-1]
        echo("\n" + textwrap.indent(table.to_string(index=False), "  "))
    report = {
        "pyroflows": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "seed": options.seed,
        "quick": options.quick,
        "seconds": round(time.perf_counter() - began, 1),
        "parts": {name: part.numbers for name, part in parts.items()},
    }
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (output / "report.md").write_text(_as_markdown(parts, report), encoding="utf-8")
    echo(f"\nwritten in {report['seconds']:.0f} s:")
    for name in ("report.md", "report.json", *(f"{name}.png" for name in parts)):
        echo(f"  {output / name}")


@contextlib.contextmanager
def _one_thread(seed: int) -> Iterator[None]:
    """Compute on one thread, as networks this small gain nothing from more, and seed torch; restore both afterwards."""
    threads = torch.get_num_threads()
    with threadpool_limits(1), torch.random.fork_rng([]):
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _as_markdown(parts: Mapping[str, Part], report: Mapping[str, Any]) -> str:
    lines = [
        "# pyroflows demo",
        "",
        f"pyroflows {report['pyroflows']}, torch {report['torch']}, seed {report['seed']}, "
        f"{report['seconds']:.0f} s. All numbers are in `report.json`; higher log-likelihoods are better, and fewer "
        "bits; ± is one standard error.",
    ]
    if report["quick"]:
        lines += ["", "This was a quick run: the fits were cut short, and the numbers mean little."]
    for name, part in parts.items():
        lines += ["", f"## {part.title}", "", part.text, ""]
        cells = [part.columns, ["---"] * len(part.columns), *part.rows]
        lines += [f"| {' | '.join(row)} |" for row in cells]
        lines += ["", f"![{part.caption}]({name}.png)"]
    return "\n".join(lines) + "\n"
