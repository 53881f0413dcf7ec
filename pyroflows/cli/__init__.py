"""The command line: ``pyroflows COMMAND``, each command in a module of its own, imported when it runs."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from pyroflows.cli.parsers import parse

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 success, 1 failure, 2 wrong arguments.

    Args:
        arguments: the words after the program's name; by default those of this process.

    Example:
        >>> main([])  # doctest: +ELLIPSIS
        usage: pyroflows ...
        2
    """
    try:
        options = parse(arguments)
        status = import_module(f"pyroflows.cli.{options.command}").run(options)
        sys.stdout.flush()
        return int(status or 0)
    except SystemExit as stop:  # argparse has said why, or printed its help
        return int(stop.code or 0)
    except KeyboardInterrupt as interrupt:
        print(": ".join(["pyroflows: interrupted", *map(str, interrupt.args)]), file=sys.stderr)
    except BrokenPipeError:  # the next command in the pipe has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        print(f"pyroflows: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
    return 1
