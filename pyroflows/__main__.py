"""Run the command line as ``python -m pyroflows``."""

import sys

from pyroflows.cli import main

if __name__ == "__main__":
    sys.exit(main())
