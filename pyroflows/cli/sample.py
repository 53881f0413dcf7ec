"""``pyroflows sample``: new rows of a table."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from pyroflows.cli.options import (
    add_device,
    add_json,
    add_model,
    add_output,
    add_quiet,
    add_seed,
    count,
    is_first,
    print_json,
    say,
)

if TYPE_CHECKING:
    from pyroflows.cli.model import Model

__all__ = ["add_sample"]

# What a chunk has at most.
_ROWS = 65536
_NUMBERS = 2**22


def add_sample(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser(
        "sample",
        help="draw new rows",
        description="Draw new rows from a model, with the columns of its data, whole numbers whole again. They are "
        "drawn and written in chunks, so that any number will do; the processes of torchrun take turns.",
    )
    add_model(parser)
    parser.add_argument(
        "-n", "--num-samples", type=count, default=1, metavar="N", help="rows to draw, for each row given (default: 1)"
    )
    add_output(parser, 'a table, or "-" for CSV on standard output')
    parser.add_argument(
        "--given",
        metavar="C=1,D=2",
        help="what a conditional model is given: values with commas between, or a table with a row for each "
        '("-" for CSV on standard input); these columns are put behind those that are drawn',
    )
    add_seed(parser, None, "seed of the draws (default: others each time)")
    add_device(parser)
    add_json(parser)
    add_quiet(parser)
    parser.set_defaults(command=_sample, parser=parser)


def _sample(options: argparse.Namespace) -> None:
    if options.model == options.given == "-":
        options.parser.error("expected the model or what is given on standard input; got both")
    if options.json and options.output == "-":
        options.parser.error("expected --json, or a table on standard output; got both")
    import numpy as np

    from pyroflows.cli.model import check_target, load_model, model_file
    from pyroflows.cli.progress import Progress
    from pyroflows.contexts import seeded
    from pyroflows.data.table_files import write_table
    from pyroflows.distributed import broadcast, in_turn, together

    check_target(options.output, options.model, options.given)
    with model_file(options.model) as file:
        model = load_model(file, options.device)
    columns = [*model.names, *model.given]
    given, total = _given(model, options.given)
    total = None if total is None else total * options.num_samples
    with together(model.flow.device), Progress("drawn", total, options.quiet) as progress:
        base = broadcast(int.from_bytes(os.urandom(4), "big") if options.seed is None else options.seed)

        def draw(part: tuple[int, Any]) -> Any:
            number, cells = part
            seed = int(np.random.SeedSequence([base, number]).generate_state(1)[0])
            with seeded(seed, model.flow.device):
                return model.sample(cells)

        def chunks() -> Iterator[Any]:
            size = max(1, min(_ROWS, _NUMBERS // len(columns)))
            for found in in_turn(draw, enumerate(_repeated(given, options.num_samples, size))):
                progress.add(len(found))
                yield found

        if is_first():
            write_table(options.output, columns, chunks(), integers=model.integers, categories=model.categories)
        else:
            for _ in chunks():
                pass
        rows, speed = progress.rows, progress.rows_per_second
    if options.json:
        print_json({"rows": rows, "output": options.output, "rows_per_second": speed})
    if options.output != "-":
        say(options, f"{rows:,} rows in {options.output}, {speed:,.0f} a second")


def _given(model: Model, text: str | None) -> tuple[Iterable[Any], int | None]:
    """Give what the draws are conditioned on, in chunks of cells, and how many rows it has, where that is known."""
    import numpy as np

    if not model.given:
        if text is not None:
            raise ValueError(f"expected no --given for a model that is not conditional; got {text}")
        return [np.empty((1, 0))], 1
    if text is None:
        raise ValueError(f"expected --given with {', '.join(model.given)}, on which the model is conditioned; got none")
    if "=" not in text:
        table = model.open(text, given_alone=True)
        return table.chunks(_ROWS), table.num_rows
    pairs = (part.partition("=") for part in text.split(","))
    values = {name.strip(): value.strip() for name, _, value in pairs}
    if set(values) != set(model.given):
        raise ValueError(f"expected --given with a value of each of {', '.join(model.given)}; got {text}")
    return [np.array([[_cell(model, name, values[name]) for name in model.given]])], 1


def _cell(model: Model, name: str, value: str) -> float:
    if name in model.categories:
        labels = model.categories[name]
        if value not in labels:
            known = ", ".join(map(repr, labels[:10])) + (", ..." if len(labels) > 10 else "")
            raise ValueError(f"expected one of the categories {known} as {name}; got {value!r}")
        return float(labels.index(value))
    try:
        number = float({"true": "1", "false": "0"}.get(value.lower(), value))  # as tables are read
    except ValueError:
        number = float("nan")
    if number - number != 0:
        raise ValueError(f"expected a number as {name}; got {value!r}")
    return number


def _repeated(given: Iterable[Any], times: int, size: int) -> Iterator[Any]:
    """Repeat each row so many times, in chunks of at most this size."""
    for cells in given:
        step = max(1, size // times)
        for start in range(0, len(cells), step):
            part = cells[start : start + step]
            for first in range(0, times, size):
                yield part.repeat(min(size, times - first), axis=0)
