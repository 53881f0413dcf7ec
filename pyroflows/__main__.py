"""Run the command line as ``python -m pyroflows``."""

from __future__ import annotations

import sys

from pyroflows.cli import main

if __name__ == "__main__":
    sys.exit(main())
