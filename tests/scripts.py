"""Scripts run in a process of their own, as by a user."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"

# Warnings of our own are errors, and those of other packages are ignored, so that they leave stderr empty.
RUN = """
import pathlib, runpy, sys, warnings
warnings.simplefilter("ignore")
warnings.filterwarnings("error", module="__main__|common|pyroflows")
sys.argv = sys.argv[1:]
sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_example(name, *options, folder, environment=None, timeout=300):
    command = [sys.executable, "-c", RUN, str(EXAMPLES / f"{name}.py"), *map(str, options)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, timeout=timeout, check=False
    )
