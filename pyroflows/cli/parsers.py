"""The arguments of each command: parsed and checked before anything heavy is imported."""

import argparse
import ast
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pyroflows._version import __version__

__all__ = ["FLOWS", "parse"]

FLOWS = ("maf", "nsf", "realnvp", "glow", "nice", "iaf", "planar", "radial")
"""The flows that ``pyroflows fit`` offers: those of ``pyroflows.models``, which takes seconds to import."""

_DESCRIPTION = """\
Normalizing flows for Pyro: fit a density to a table, score rows, draw new ones.

  pyroflows fit data.csv --output model.safetensors
  pyroflows score model.safetensors data.csv --output scores.csv
  pyroflows sample model.safetensors -n 1000 --output new.csv
"""

_EPILOG = """\
Tables end in .csv (with a line of names), .parquet, .npy or .npz (file.npz:name if it holds several arrays); "-" is CSV
on standard input or output, and a model of "-" is a model there. So commands can be joined in a pipe:

  pyroflows sample a.safetensors -n 1000 --output - | pyroflows score b.safetensors -
  pyroflows fit data.csv --output - | pyroflows score - data.csv --output scores.csv --pass-model \\
    | pyroflows sample - -n 1000 --output new.csv

Exit status: 0 success, 1 failure (with one line on standard error that says why), 2 wrong arguments.
"""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line, by default that of this process; wrong arguments, ``--help`` and ``--version`` exit.

    ``command`` of the options is the name of the command, and ``parser`` its parser.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="pyroflows", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=formatter)
    parser.add_argument("--version", action="version", version=f"pyroflows {__version__}")
    commands: Any = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for add in (_add_demo, _add_fit, _add_score, _add_sample, _add_check, _add_plot, _add_info, _add_bench):
        add(commands)
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        parser.exit(2)
    options.parser = commands.choices[options.command]
    _check(options)
    return options


class _Parser(argparse.ArgumentParser):
    """A parser, also of each command, whose errors take one line and whose help says each default."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def add_argument(self, *flags: str, **settings: Any) -> Any:
        if settings.get("default") not in (None, [], argparse.SUPPRESS):
            settings["help"] += " (default: %(default)s)"
        return super().add_argument(*flags, **settings)


def _check(options: argparse.Namespace) -> None:
    """Refuse arguments that cannot be combined."""
    error, output = options.parser.error, getattr(options, "output", None)
    sources = {"model": "MODEL", "data": "DATA", "given": "--given"}
    inputs = [text for name, text in sources.items() if getattr(options, name, None) == "-"]
    if len(inputs) > 1:
        error(f"{inputs[0]} - cannot be combined with {inputs[1]} -: both read standard input")
    if options.command == "score" and sum([options.json, output == "-", options.pass_model]) > 1:
        error("--json, --output - and --pass-model cannot be combined: each writes to standard output")
    if output == "-" and options.json:
        error("--json cannot be combined with --output -")
    if options.command == "fit":
        if both := set(options.columns or ()) & set(options.given):
            error(f"expected each column in --columns or in --given; got {', '.join(sorted(both))} in both")
        if others := set(options.categories) - set(options.given):
            error(f"expected --categories among the columns of --given; got {', '.join(sorted(others))}")
        if output == "-" and sys.stdout.isatty():
            error("expected a pipe or a file as standard output for --output -; got a terminal")


# Types of options


def _names(text: str) -> list[str]:
    """Parse different names, separated by commas."""
    parts = [name.strip() for name in text.split(",")]
    if not all(parts) or len(set(parts)) < len(parts):
        raise argparse.ArgumentTypeError(f"expected different names separated by commas; got {text!r}")
    return parts


def _auto_or_names(text: str) -> Any:
    return text if text == "auto" else [] if text == "none" else _names(text)


def _checked(convert: Callable[[str], Any], is_valid: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    """Return a type of option: a number that fulfils a condition."""

    def parse_number(text: str) -> Any:
        try:
            number = convert(text)
        except ValueError:
            number = math.nan
        if not is_valid(number):
            raise argparse.ArgumentTypeError(f"expected {expected}; got {text!r}")
        return number

    return parse_number


_count = _checked(int, lambda number: number >= 1, "a positive integer")
_positive = _checked(float, lambda number: 0 < number < math.inf, "a positive number")
_seed = _checked(int, lambda number: 0 <= number < 2**32, "an integer from 0 to 2**32 - 1")
_share = _checked(float, lambda number: 0 <= number < 1, "a number from 0 to 1, without 1")


def _widths(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name.isidentifier() or not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE; got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _picture(text: str) -> str:
    if Path(text).suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"expected --output that ends in .png, .pdf or .svg; got {text}")
    return text


# The commands

_MODEL: dict[str, Any] = {"metavar": "MODEL", "help": 'a model file, or "-" for standard input'}
_DATA: dict[str, Any] = {"metavar": "DATA", "help": 'a table, or "-" for CSV on standard input'}
_FILE: dict[str, Any] = {"metavar": "FILE", "required": True}
_SEED: dict[str, Any] = {"type": _seed, "metavar": "N", "default": 0}
_JSON: dict[str, Any] = {"action": "store_true", "help": "print the results as one line of JSON"}


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to compute")
    parser.add_argument("--json", **_JSON)
    parser.add_argument("--quiet", action="store_true", help="show no progress and print no summary")


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="fit flows to bundled data and write figures and a short report",
        description="Fit flows to a bundled table and to two moons, next to a Gaussian, a Gaussian mixture and a "
        "kernel density; to images of digits, next to a Gaussian mixture; and to the posterior of a model, next to a "
        "mean-field guide; write figures and a short report. It needs no network, and at most two and a half minutes.",
    )
    add = parser.add_argument
    add("--output", type=Path, default="pyroflows-demo", metavar="DIR", help="folder to write to")
    add("--seed", **_SEED, help="seed of split, data and fits")
    add("--quick", action="store_true", help="run for a few seconds, to see that it works; the numbers mean little")


def _add_fit(commands: Any) -> None:
    parser = commands.add_parser(
        "fit",
        help="fit a flow to the rows of a table",
        description="Fit a normalizing flow to the rows of a table, by maximum likelihood, and write it to a file. "
        "A share of the rows is held out, to choose the best weights and when to stop. Whole numbers are dequantized. "
        "Densities are in nats in the units of the columns. Ctrl-C ends training and keeps the best model so far.",
    )
    add = parser.add_argument
    add("data", **_DATA)
    add("--output", "-o", **_FILE, help='the model file, such as model.safetensors, or "-" for standard output')
    add("--columns", type=_names, metavar="A,B", help="columns to model (default: all not given)")
    add("--given", type=_names, default=[], metavar="C,D", help="columns to condition on: p(A, B | C, D)")
    add("--categories", type=_names, default=[], metavar="D", help="those of the given columns that hold labels")
    kinds = 'columns of whole numbers, to be dequantized: names, "auto" for those that hold no others, or "none"'
    add("--integer-columns", type=_auto_or_names, default="auto", metavar="NAMES", help=kinds)
    add(
        "--flow",
        choices=("auto", *FLOWS),
        default="auto",
        help="which flow; auto compares Gaussian mixtures, and trains "
        "spline couplings on the best where they gain; it is nsf given other columns, or with a checkpoint",
    )
    add("--num-layers", type=_count, metavar="N", help="its number of layers")
    add("--hidden-features", type=_widths, metavar="N,N", help="widths of its networks' hidden layers")
    settings = "another of its options, such as dropout=0.1 or, of nsf, num_bins=16; may be repeated"
    add("--set", type=_setting, action="append", default=[], metavar="NAME=VALUE", help=settings)
    add("--epochs", type=_count, metavar="N", help="most epochs (default: 100, or what auto takes)")
    add("--minutes", type=_positive, metavar="M", help="most minutes; the learning rate ends with them")
    add("--batch-size", type=_count, default=256, metavar="N", help="rows a step")
    add(
        "--learning-rate",
        type=_positive,
        metavar="R",
        help="learning rate at the start (default: 0.001, or 0.003 of auto)",
    )
    add("--patience", type=_count, metavar="N", help="epochs without improvement (default: 30, or 6 of auto)")
    add("--validation", type=_share, default=0.1, metavar="P", help="share of rows held out")
    add("--dtype", choices=("float32", "float64"), default="float32", help="precision of training and of the model")
    add("--checkpoint", metavar="FILE", help="file from which a fit that was killed resumes")
    add("--seed", **_SEED, help="seed of weights, split and shuffles")
    _add_common(parser)


def _add_score(commands: Any) -> None:
    parser = commands.add_parser(
        "score",
        help="compute the log-density of each row of a table",
        description="Compute the log-density of each row of a table, in nats, in the units of the columns, and the "
        "mean. For whole numbers, which a model dequantizes, it is a lower bound on the log-probability: the logarithm "
        "of the mean over draws of noise. Rows are read, scored and written in chunks, so that files may be of any "
        "size; the processes of torchrun take turns.",
    )
    add = parser.add_argument
    add("model", **_MODEL)
    add("data", **_DATA)
    add("--output", "-o", metavar="FILE", help='a table of one column, log_prob, or "-" for CSV on standard output')
    add("--draws", type=_count, default=8, metavar="N", help="draws of noise")
    add("--pass-model", action="store_true", help="write the model to standard output, for the next command in a pipe")
    add("--seed", **_SEED, help="seed of the noise")
    _add_common(parser)


def _add_sample(commands: Any) -> None:
    parser = commands.add_parser(
        "sample",
        help="draw new rows",
        description="Draw new rows from a model, with the columns of its data; whole numbers are whole again. Rows are "
        "drawn and written in chunks, so that there may be any number; the processes of torchrun take turns.",
    )
    add = parser.add_argument
    add("model", **_MODEL)
    add("-n", "--num-samples", type=_count, default=1, metavar="N", help="rows to draw, for each row given")
    add("--output", "-o", **_FILE, help='a table, or "-" for CSV on standard output')
    given = "what a conditional model is given: values separated by commas, or a table with a row for each "
    given += '("-" for CSV on standard input); these columns are written after those that are drawn'
    add("--given", metavar="C=1,D=2", help=given)
    add("--seed", type=_seed, metavar="N", help="seed of the draws (default: a new one each time)")
    _add_common(parser)


def _add_check(commands: Any) -> None:
    parser = commands.add_parser(
        "check",
        help="check that a model inverts and that its log-determinants are right",
        description="Take rows of a table to the latent and back, and compare the log-determinants with those of the "
        "Jacobian by automatic differentiation. Exit status 1 if an error is above the tolerance.",
    )
    add = parser.add_argument
    add("model", **_MODEL)
    add("data", **_DATA)
    add("--rows", type=_count, default=100, metavar="N", help="rows to check")
    add("--tolerance", type=_positive, metavar="E", help="largest error (default: 1e-3 in float32, 1e-6 in float64)")
    _add_common(parser)


def _add_plot(commands: Any) -> None:
    parser = commands.add_parser(
        "plot",
        help="draw a model's samples next to the data, or its training",
        description="Draw marginals and pairs of columns, rows of a table next to as many rows of the model; without "
        "a table, how the loss fell in training.",
    )
    add = parser.add_argument
    add("model", **_MODEL)
    add("data", nargs="?", **_DATA)
    add("--output", "-o", type=_picture, **_FILE, help="the picture, a .png, .pdf or .svg")
    add("--rows", type=_count, default=2000, metavar="N", help="rows to draw")
    add("--columns", type=_count, default=8, metavar="N", help="most columns")
    add("--seed", **_SEED, help="seed of rows and samples")
    _add_common(parser)


def _add_info(commands: Any) -> None:
    parser = commands.add_parser(
        "info",
        help="describe what a model file holds",
        description="Describe what a model file holds: columns, layers, number of parameters, fit, and versions of the "
        "libraries that wrote it; as JSON also the recipe it is built by, and all notes.",
    )
    parser.add_argument("model", **_MODEL)
    parser.add_argument("--json", **_JSON)


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure rows per second on this machine",
        description="Measure how many rows per second a flow scores, draws and trains on, on this machine: the median "
        "of repeated runs, after one that is not counted. Without a model file it measures named flows of their "
        "default sizes; the weights do not matter for the time.",
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="a model file (default: named flows)")
    add("--flows", type=_names, default="realnvp,maf,nsf", metavar="A,B", help="named flows")
    add("--features", type=_count, default=8, metavar="N", help="their columns")
    add("--rows", type=_count, default=4096, metavar="N", help="rows at once")
    add("--seconds", type=_positive, default=1.0, metavar="S", help="time for each measurement")
    add("--seed", **_SEED, help="seed of weights and data")
    _add_common(parser)
