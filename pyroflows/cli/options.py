"""The options that commands have in common, and their types."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from typing import Any

__all__ = [
    "add_data",
    "add_device",
    "add_json",
    "add_model",
    "add_output",
    "add_quiet",
    "add_seed",
    "count",
    "finite",
    "is_first",
    "names",
    "positive",
    "print_json",
    "say",
    "share",
    "widths",
]


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the model."""
    parser.add_argument("model", metavar="MODEL", help='a model file, or "-" for standard input')


def add_data(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the table."""
    text = 'a table, or "-" for CSV on standard input'
    parser.add_argument("data", nargs=None if required else "?", metavar="DATA", help=text)


def add_seed(parser: argparse.ArgumentParser, default: int | None, text: str) -> None:
    """Add ``--seed``."""
    parser.add_argument("--seed", type=_seed, default=default, metavar="N", help=text)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``."""
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda", "mps"),
        help="where to compute (default: %(default)s)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print the results as one line of JSON")


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Add ``--quiet``."""
    parser.add_argument("--quiet", action="store_true", help="show no progress and print no summary")


def add_output(parser: argparse.ArgumentParser, text: str, *, required: bool = True) -> None:
    """Add ``--output``."""
    parser.add_argument("--output", "-o", required=required, metavar="FILE", help=text)


def names(text: str) -> list[str]:
    """Names with commas between."""
    found = [name.strip() for name in text.split(",")]
    if not all(found) or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"expected different names with commas between; got {text!r}")
    return found


def count(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer; got {text!r}")
    return int(text)


def widths(text: str) -> tuple[int, ...]:
    """Positive integers with commas between."""
    return tuple(count(part.strip()) for part in text.split(","))


def positive(text: str) -> float:
    """A positive number."""
    number = _number(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number; got {text!r}")
    return number


def share(text: str) -> float:
    """A number from 0 to 1, without 1."""
    number = _number(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, without 1; got {text!r}")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _seed(text: str) -> int:
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 2**32 - 1; got {text!r}")
    return seed


def is_first() -> bool:
    """Whether this process is the first of those that torchrun has started, or alone."""
    return int(os.environ.get("RANK", 0)) == 0


def say(options: argparse.Namespace, text: str) -> None:
    """Print a line for people, where standard output is not taken by a table, a model or JSON."""
    taken = getattr(options, "output", None) == "-" or getattr(options, "pass_model", False)
    if not options.quiet and not options.json and is_first():
        print(text, file=sys.stderr if taken else sys.stdout)


def print_json(values: dict[str, Any]) -> None:
    """Print values as one line of JSON, with null for a number that is not finite."""
    if is_first():
        print(json.dumps(finite(values), allow_nan=False))


def finite(value: Any) -> Any:
    """Give a JSON value with None for each number in it that is not finite."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
