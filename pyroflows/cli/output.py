"""What commands print: lines for people, or one line of JSON."""

import argparse
import json
import math
import os
import sys
from typing import Any

__all__ = ["finite", "is_first", "print_json", "say"]


def is_first() -> bool:
    """Whether this process is the first of those that torchrun has started, or alone."""
    return int(os.environ.get("RANK", 0)) == 0


def say(options: argparse.Namespace, text: str) -> None:
    """Print a line for people; on standard error if a table or a model goes to standard output."""
    is_taken = getattr(options, "output", None) == "-" or getattr(options, "pass_model", False)
    if not options.quiet and not options.json and is_first():
        print(text, file=sys.stderr if is_taken else sys.stdout)


def print_json(values: dict[str, Any]) -> None:
    """Print values as one line of JSON, with null for a number that is not finite."""
    if is_first():
        print(json.dumps(finite(values), allow_nan=False))


def finite(value: Any) -> Any:
    """Return a JSON value with None for each number in it that is not finite."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
