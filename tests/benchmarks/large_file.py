"""Scores and samples a table of 20 million rows by the command line, and reports rows per second and memory.

Makes a table of 8 columns as NPY and as Parquet, fits a small RealNVP to its first rows, scores each file into another
of the same kind, and draws as many rows into both. Every command is a process of its own, whose peak of resident
memory has to stay below 2 GiB. The files, some 4 GB, are deleted at the end. Prints JSON.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyroflows.data import open_table, write_table

COLUMNS = list("abcdefgh")
LIMIT = 2 * 2**30


def chunks(rows: int) -> Iterator[np.ndarray]:
    """Give correlated numbers, each with a wave in the one before."""
    random = np.random.default_rng(0)
    for start in range(0, rows, 2**18):
        x = random.standard_normal((min(2**18, rows - start), len(COLUMNS)), dtype=np.float32)
        for column in range(1, len(COLUMNS)):
            x[:, column] += np.sin(x[:, column - 1])
        yield x


def run(*arguments: object) -> dict[str, Any]:
    """Run a command, and give its seconds, by clock and by CPU, and its largest resident memory."""
    command = [sys.executable, "-m", "pyroflows", *map(str, arguments)]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"expected {' '.join(command)} to end well; got status {process.returncode}")
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gib": round(usage.ru_maxrss / 2**20, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--folder", type=Path, help="where the files are made (default: the system's temporary folder)")
    options = parser.parse_args()

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write_table(folder / "first.npy", COLUMNS, [next(chunks(100_000))])
        size = ["--num-layers", 4, "--hidden-features", "32", "--epochs", 3]
        fit = run("fit", folder / "first.npy", "--output", folder / "model", "--flow", "realnvp", *size, "--quiet")
        for ending in ("npy", "parquet"):
            data, scores, new = (folder / f"{part}.{ending}" for part in ("data", "scores", "new"))
            write_table(data, [str(place) for place in range(len(COLUMNS))], chunks(options.rows))
            found = {"file_gib": round(data.stat().st_size / 2**30, 3)}
            for command, arguments in {
                "score": ("score", folder / "model", data, "--output", scores, "--quiet"),
                "sample": ("sample", folder / "model", "-n", options.rows, "--output", new, "--seed", 0, "--quiet"),
            }.items():
                result = run(*arguments)
                written = open_table(scores if command == "score" else new)
                if written.num_rows != options.rows or result["peak_gib"] * 2**30 >= LIMIT:
                    raise RuntimeError(f"expected all rows in less than 2 GiB; got {written.num_rows} and {result}")
                found[command] = {**result, "rows_per_second": round(options.rows / result["seconds"])}
            for path in (data, scores, new):
                path.unlink()
            results[ending] = found
    print(
        json.dumps(
            {
                "rows": options.rows,
                "columns": len(COLUMNS),
                "flow": "realnvp, 4 layers of 32",
                "fit": fit,
                **results,
                "threads": torch.get_num_threads(),
                "machine": f"{platform.machine()}, torch {torch.__version__}, Python {platform.python_version()}",
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
