"""Runs every benchmark of speed, one after another, and puts their tables into one file, beside the JSON of each.

It needs the extra ``bench``, and takes an hour or so on two cores; ``--quick`` takes a few rounds of each to see that
all of it runs. What a benchmark is about, and what its columns mean, says its own ``--help``.
"""

import argparse
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

HERE = Path(__file__).parent
IMPORTS = {"torch and Pyro": "import torch, pyro", "and pyroflows": "import torch, pyro, pyroflows"}


def import_times(rounds: int) -> str:
    """Time fresh processes that import, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(rounds):
        for name, code in IMPORTS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            seconds[name].append(time.perf_counter() - began)
    rows = [f"| {name} | {median(times):.2f} |" for name, times in seconds.items()]
    return "\n".join(["| import | s |", "| --- | ---: |", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="see that all of it runs; its figures mean little")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: beside other work, one thread")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of the tables and JSON")
    options = parser.parse_args()

    clock = ["--clock", options.clock]
    quick = ["--seconds", "0.3"] if options.quick else []
    runs: list[tuple[str, list[str]]] = []
    for number in options.threads:
        extra = ["--compile"] if options.compile and number == options.threads[0] else []
        extra += ["--growth"] if number == options.threads[0] else []
        runs.append((f"vector_step-{number}", ["vector_step.py", "--threads", str(number), *clock, *quick, *extra]))
    runs.append(("growth", ["growth.py", *clock, *quick]))
    compiled = ["--compile"] if options.compile else []
    runs.append(("image_step", ["image_step.py", *clock, *compiled, *(["--repeats", "3"] if options.quick else [])]))
    runs.append(("svi_step", ["svi_step.py", *clock, *(["--repeats", "20"] if options.quick else [])]))

    machine = f"{platform.machine()}, torch {torch.__version__}, Python {platform.python_version()}"
    parts = [f"# Speed\n\n`python tests/benchmarks/all.py`, {machine}", "## Import\n\n" + import_times(9)]
    options.output.mkdir(parents=True, exist_ok=True)
    failed = []
    for name, (script, *arguments) in runs:
        folder = options.output / name
        command = [sys.executable, "-W", "ignore", str(HERE / script), *arguments, "--output", str(folder)]
        print("+", " ".join(command), flush=True)
        if subprocess.run(command).returncode:
            failed.append(name)
            continue
        tables = sorted(folder.glob("*.md"))
        parts.append(f"## {' '.join([script, *arguments])}\n\n" + "\n\n".join(table.read_text() for table in tables))
        (options.output / "results.md").write_text("\n\n".join(parts) + "\n")
    if failed:
        sys.exit(f"these benchmarks failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
