"""How the time of flows of vectors grows with rows, features and layers, beside their bare networks; and the memory.

A training step, ``log_prob`` and sampling of a MAF, a RealNVP and a spline flow of couplings, of the sizes of
``vector_step.py``, one of the three sizes varied at a time. "frozen" is ``log_prob`` within ``flow.cached()``, where
what follows from the weights alone is formed once, as it is of the networks there. Memory is the largest resident set
during one operation above that before it (Linux).
"""

import argparse
import ctypes
import json
import os
import platform
import random
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from vector_step import CASES, CLOCKS, OPERATIONS, Case, measure, networks, pyroflows, summary

from pyroflows.caching import caching

SWEEPS: dict[str, tuple[str, tuple[int, ...]]] = {
    "rows": ("batch", (1, 16, 256, 4096, 65536)),
    "features": ("features", (8, 32, 128, 512)),
    "layers": ("num_layers", (1, 4, 16, 64)),
}
ALL = (*OPERATIONS, "frozen")
NAMES = ("maf-64", "realnvp-64", "nsf-8")


def peak_of(step: Callable[[], object]) -> float | None:
    """Give the MiB that a step takes above what is resident before it."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def read(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))

    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or tensors would fit into memory already at hand
        reset.write_text("5")
    except OSError:
        return None
    before = read("VmRSS")
    step()
    return (read("VmHWM") - before) / 1024


def point(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    flow, floor = pyroflows(case), networks(case)
    data = torch.randn(case.batch, case.features)
    result: dict[str, Any] = {}
    for operation in options.operations:
        called = "log_prob" if operation == "frozen" else operation
        steps = {"pyroflows": flow.operation(called, data), "networks": floor.operation(called, data)}
        with ExitStack() as stack:
            if operation == "frozen":
                stack.enter_context(caching(flow.module))
                stack.enter_context(caching(floor.module))
            steps["pyroflows"]()
            peak = peak_of(steps["pyroflows"])
            times = measure(steps, options.repeats, options.seconds, CLOCKS[options.clock])
        result[operation] = summary(times, ["networks"])["pyroflows"] | {"peak_mib": peak}
    return result


def line(name: str, case: Case, size: int, result: dict[str, Any]) -> str:
    cells = []
    for operation in result.values():
        seconds, peak = operation["median_seconds"], operation["peak_mib"]
        memory = "" if peak is None else f"{peak:.0f}"
        rate = case.batch / seconds
        cells.append(f"{1e3 * seconds:.2f} | {rate:,.0f} | {operation['over']['networks']:.2f} | {memory}")
    return f"| {name} | {size:,} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each operation of a point, at least 3 rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: beside other work, of one thread")
    parser.add_argument("--sweeps", nargs="*", choices=list(SWEEPS), default=list(SWEEPS))
    parser.add_argument("--operations", nargs="+", choices=ALL, default=list(ALL))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder for JSON and table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    random.seed(options.seed)

    results: dict[str, Any] = {}
    tables = []
    for sweep in options.sweeps:
        field, sizes = SWEEPS[sweep]
        header = " | ".join(f"{name} ms | rows/s | x networks | MiB" for name in options.operations)
        lines = [f"| | {sweep} | {header} |", "| --- |" + " ---: |" * (1 + 4 * len(options.operations))]
        print(lines[0], flush=True)
        for name in NAMES:
            for size in sizes:
                case = CASES[name]._replace(**{field: size})
                results[f"{name}, {sweep} {size}"] = result = point(case, options)
                lines.append(line(name, case, size, result))
                print(lines[-1], flush=True)
        tables.append("\n".join(lines))
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "growth.json"
    setting = {key: str(value) if key == "output" else value for key, value in vars(options).items()}
    machine = {"platform": platform.platform(), "cores": os.cpu_count(), "load": os.getloadavg()}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    record = {"setting": setting, "versions": versions, "machine": machine, "results": results}
    path.write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text("\n\n".join(tables) + "\n")


if __name__ == "__main__":
    main()
