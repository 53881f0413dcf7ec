"""The arguments of each command: parsed and checked before anything heavy is imported."""

import argparse
import ast
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pyroflows._version import __version__

__all__ = ["FLOWS", "names", "parse"]

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
    """Parse a command line; wrong arguments, ``--help`` and ``--version`` end in :class:`SystemExit`.

    Args:
        arguments: the words after the program's name; by default those of this process.

    Returns:
        The options of the command; ``command`` is its name.
    """
    parser = _Parser(
        prog="pyroflows",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pyroflows {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for add in (_add_demo, _add_fit, _add_score, _add_sample, _add_check, _add_plot, _add_info, _add_bench):
        add(commands)
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        parser.exit(2)
    options.check(options)
    return options


class _Parser(argparse.ArgumentParser):
    """A parser, also of each command, whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


# The commands


def _add_demo(commands: Any) -> None:
    parser = _add_command(
        commands,
        "demo",
        help="fit flows to bundled data and write figures and a short report",
        description="Fit flows to a bundled table and to two moons, next to a Gaussian, a Gaussian mixture and a "
        "kernel density; to images of digits, next to a Gaussian mixture; and to the posterior of a model, next to a "
        "mean-field guide; write figures and a short report. It needs no network, and at most two and a half minutes.",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("pyroflows-demo"),
        metavar="DIR",
        help="folder to write to (default: %(default)s)",
    )
    _add_seed(parser, 0, "seed of split, data and fits (default: 0)")
    parser.add_argument(
        "--quick", action="store_true", help="run for a few seconds, to see that it works; the numbers mean little"
    )


def _add_fit(commands: Any) -> None:
    parser = _add_command(
        commands,
        "fit",
        _check_fit,
        help="fit a flow to the rows of a table",
        description="Fit a normalizing flow to the rows of a table, by maximum likelihood, and write it to a file. "
        "A share of the rows is held out, to choose the best weights and when to stop. Whole numbers are dequantized. "
        "Densities are in nats in the units of the columns. Ctrl-C ends training and keeps the best model so far.",
    )
    _add_data(parser)
    _add_output(parser, 'the model file, such as model.safetensors, or "-" for standard output')
    parser.add_argument("--columns", type=names, metavar="A,B", help="columns to model (default: all not given)")
    parser.add_argument(
        "--given", type=names, default=[], metavar="C,D", help="columns to condition on: p(A, B | C, D)"
    )
    parser.add_argument(
        "--categories", type=names, default=[], metavar="D", help="those of the given columns that hold labels"
    )
    parser.add_argument(
        "--integer-columns",
        default="auto",
        metavar="NAMES",
        help='columns of whole numbers, to be dequantized: names, "auto" for those that hold no others, or "none" '
        "(default: %(default)s)",
    )
    parser.add_argument("--flow", choices=FLOWS, default="nsf", help="which flow (default: %(default)s)")
    parser.add_argument("--num-layers", type=_count, metavar="N", help="its number of layers")
    parser.add_argument("--hidden-features", type=_widths, metavar="N,N", help="widths of its networks' hidden layers")
    parser.add_argument(
        "--set",
        type=_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another of its options, such as dropout=0.1 or, of nsf, num_bins=16; may be repeated",
    )
    parser.add_argument("--epochs", type=_count, default=100, metavar="N", help="most epochs (default: %(default)s)")
    parser.add_argument("--minutes", type=_positive, metavar="M", help="most minutes; the learning rate falls with it")
    parser.add_argument("--batch-size", type=_count, default=256, metavar="N", help="rows a step (default: 256)")
    parser.add_argument("--learning-rate", type=_positive, default=1e-3, metavar="R", help="default: %(default)s")
    parser.add_argument(
        "--patience", type=_count, default=30, metavar="N", help="epochs without improvement (default: 30)"
    )
    parser.add_argument(
        "--validation", type=_share, default=0.1, metavar="P", help="share of rows held out (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="default: %(default)s")
    parser.add_argument("--checkpoint", metavar="FILE", help="file from which a fit that was killed resumes")
    _add_seed(parser, 0, "seed of weights, split and shuffles (default: 0)")
    _add_device_json_and_quiet(parser)


def _check_fit(options: argparse.Namespace) -> None:
    error = options.parser.error
    if both := set(options.columns or ()) & set(options.given):
        error(f"expected each column in --columns or in --given; got {', '.join(sorted(both))} in both")
    if others := set(options.categories) - set(options.given):
        error(f"expected --categories among the columns of --given; got {', '.join(sorted(others))}")
    if options.json and options.output == "-":
        error("--json cannot be combined with --output -")
    if options.output == "-" and sys.stdout.isatty():
        error("expected a pipe or a file as standard output for --output -; got a terminal")


def _add_score(commands: Any) -> None:
    parser = _add_command(
        commands,
        "score",
        _check_score,
        help="compute the log-density of each row of a table",
        description="Compute the log-density of each row of a table, in nats, in the units of the columns, and the "
        "mean. For whole numbers, which a model dequantizes, it is a lower bound on the log-probability: the logarithm "
        "of the mean over draws of noise. Rows are read, scored and written in chunks, so that files may be of any "
        "size; the processes of torchrun take turns.",
    )
    _add_model(parser)
    _add_data(parser)
    _add_output(parser, 'a table of one column, log_prob, or "-" for CSV on standard output', required=False)
    parser.add_argument("--draws", type=_count, default=8, metavar="N", help="draws of noise (default: %(default)s)")
    parser.add_argument(
        "--pass-model", action="store_true", help="write the model to standard output, for the next command in a pipe"
    )
    _add_seed(parser, 0, "seed of the noise (default: 0)")
    _add_device_json_and_quiet(parser)


def _check_score(options: argparse.Namespace) -> None:
    _check_input(options)
    if sum([options.json, options.output == "-", options.pass_model]) > 1:
        options.parser.error("--json, --output - and --pass-model cannot be combined: each writes to standard output")


def _add_sample(commands: Any) -> None:
    parser = _add_command(
        commands,
        "sample",
        _check_sample,
        help="draw new rows",
        description="Draw new rows from a model, with the columns of its data; whole numbers are whole again. Rows are "
        "drawn and written in chunks, so that there may be any number; the processes of torchrun take turns.",
    )
    _add_model(parser)
    parser.add_argument(
        "-n", "--num-samples", type=_count, default=1, metavar="N", help="rows to draw, for each row given (default: 1)"
    )
    _add_output(parser, 'a table, or "-" for CSV on standard output')
    parser.add_argument(
        "--given",
        metavar="C=1,D=2",
        help="what a conditional model is given: values separated by commas, or a table with a row for each "
        '("-" for CSV on standard input); these columns are written after those that are drawn',
    )
    _add_seed(parser, None, "seed of the draws (default: a new one each time)")
    _add_device_json_and_quiet(parser)


def _check_sample(options: argparse.Namespace) -> None:
    if options.model == options.given == "-":
        options.parser.error("MODEL - cannot be combined with --given -: both read standard input")
    if options.json and options.output == "-":
        options.parser.error("--json cannot be combined with --output -")


def _add_check(commands: Any) -> None:
    parser = _add_command(
        commands,
        "check",
        _check_input,
        help="check that a model inverts and that its log-determinants are right",
        description="Take rows of a table to the latent and back, and compare the log-determinants with those of the "
        "Jacobian by automatic differentiation. Exit status 1 if an error is above the tolerance.",
    )
    _add_model(parser)
    _add_data(parser)
    parser.add_argument("--rows", type=_count, default=100, metavar="N", help="rows to check (default: %(default)s)")
    parser.add_argument(
        "--tolerance", type=_positive, metavar="E", help="largest error (default: 1e-3 in float32, 1e-6 in float64)"
    )
    _add_device_json_and_quiet(parser)


def _add_plot(commands: Any) -> None:
    parser = _add_command(
        commands,
        "plot",
        _check_plot,
        help="draw a model's samples next to the data, or its training",
        description="Draw marginals and pairs of columns, rows of a table next to as many rows of the model; without "
        "a table, how the loss fell in training.",
    )
    _add_model(parser)
    _add_data(parser, required=False)
    _add_output(parser, "the picture, a .png, .pdf or .svg")
    parser.add_argument("--rows", type=_count, default=2000, metavar="N", help="rows to draw (default: %(default)s)")
    parser.add_argument("--columns", type=_count, default=8, metavar="N", help="most columns (default: %(default)s)")
    _add_seed(parser, 0, "seed of rows and samples (default: 0)")
    _add_device_json_and_quiet(parser)


def _check_plot(options: argparse.Namespace) -> None:
    _check_input(options)
    if Path(options.output).suffix not in (".png", ".pdf", ".svg"):
        options.parser.error(f"expected --output that ends in .png, .pdf or .svg; got {options.output}")


def _add_info(commands: Any) -> None:
    parser = _add_command(
        commands,
        "info",
        help="describe what a model file holds",
        description="Describe what a model file holds: columns, layers, number of parameters, fit, and versions of the "
        "libraries that wrote it; as JSON also the recipe it is built by, and all notes.",
    )
    _add_model(parser)
    _add_json(parser)


def _add_bench(commands: Any) -> None:
    parser = _add_command(
        commands,
        "bench",
        help="measure rows per second on this machine",
        description="Measure how many rows per second a flow scores, draws and trains on, on this machine: the median "
        "of repeated runs, after one that is not counted. Without a model file it measures named flows of their "
        "default sizes; the weights do not matter for the time.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model file (default: named flows)")
    flows = ["realnvp", "maf", "nsf"]
    parser.add_argument(
        "--flows", type=names, default=flows, metavar="A,B", help=f"named flows (default: {','.join(flows)})"
    )
    parser.add_argument("--features", type=_count, default=8, metavar="N", help="their columns (default: %(default)s)")
    parser.add_argument("--rows", type=_count, default=4096, metavar="N", help="rows at once (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=_positive, default=1.0, metavar="S", help="time for each measurement (default: %(default)s)"
    )
    _add_seed(parser, 0, "seed of weights and data (default: 0)")
    _add_device_json_and_quiet(parser)


# Options that commands share


def _add_command(
    commands: Any, name: str, check: Callable[[argparse.Namespace], None] = lambda options: None, **texts: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, **texts)
    parser.set_defaults(parser=parser, check=check)
    return parser


def _check_input(options: argparse.Namespace) -> None:
    if options.model == options.data == "-":
        options.parser.error("MODEL - cannot be combined with DATA -: both read standard input")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help='a model file, or "-" for standard input')


def _add_data(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    text = 'a table, or "-" for CSV on standard input'
    parser.add_argument("data", nargs=None if required else "?", metavar="DATA", help=text)


def _add_output(parser: argparse.ArgumentParser, text: str, *, required: bool = True) -> None:
    parser.add_argument("--output", "-o", required=required, metavar="FILE", help=text)


def _add_seed(parser: argparse.ArgumentParser, default: int | None, text: str) -> None:
    parser.add_argument("--seed", type=_seed, default=default, metavar="N", help=text)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the results as one line of JSON")


def _add_device_json_and_quiet(parser: argparse.ArgumentParser) -> None:
    devices = ("auto", "cpu", "cuda", "mps")
    parser.add_argument("--device", default="auto", choices=devices, help="where to compute (default: %(default)s)")
    _add_json(parser)
    parser.add_argument("--quiet", action="store_true", help="show no progress and print no summary")


# Types of options


def names(text: str) -> list[str]:
    """Parse different names, separated by commas."""
    parts = [name.strip() for name in text.split(",")]
    if not all(parts) or len(set(parts)) < len(parts):
        raise argparse.ArgumentTypeError(f"expected different names separated by commas; got {text!r}")
    return parts


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
