"""``pyroflows bench``: rows per second on this machine."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyroflows.cli.options import add_device, add_json, add_quiet, add_seed, count, names, positive, print_json, say

if TYPE_CHECKING:
    from pyroflows.cli.model import Model

__all__ = ["add_bench"]

_FLOWS = ("realnvp", "maf", "nsf")
_WORK = ("score", "sample", "train step")


def add_bench(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser(
        "bench",
        help="measure rows per second on this machine",
        description="Measure how many rows per second a flow scores, draws and trains on, on this machine: the median "
        "of repeated runs, after one that is not counted. Without a model file it measures named flows of their "
        "default sizes; the numbers in the networks do not matter for the time.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model file (default: named flows)")
    parser.add_argument(
        "--flows", type=names, default=list(_FLOWS), metavar="A,B", help=f"named flows (default: {','.join(_FLOWS)})"
    )
    parser.add_argument("--features", type=count, default=8, metavar="N", help="their columns (default: %(default)s)")
    parser.add_argument("--rows", type=count, default=4096, metavar="N", help="rows at once (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=positive, default=1.0, metavar="S", help="time for each measurement (default: %(default)s)"
    )
    add_seed(parser, 0, "seed of weights and data (default: 0)")
    add_device(parser)
    add_json(parser)
    add_quiet(parser)
    parser.set_defaults(command=_bench, parser=parser)


def _bench(options: argparse.Namespace) -> None:
    import torch

    from pyroflows import models
    from pyroflows.arguments import check_option
    from pyroflows.cli.model import Model, device_of, load_model, model_file
    from pyroflows.contexts import seeded

    device = device_of(options.device)
    if options.model is None:
        for name in options.flows:
            check_option("a flow", name, models.__all__)
        with seeded(options.seed):
            made = {name: getattr(models, name)(options.features) for name in options.flows}
        found = {name: Model(flow.to(device).eval(), None) for name, flow in made.items()}
    else:
        with model_file(options.model) as file:
            found = {options.model: load_model(file, options.device)}
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    threads = torch.get_num_threads()
    say(
        options,
        f"rows per second, {options.rows:,} at once, on {where}, {threads} threads, PyTorch {torch.__version__}",
    )
    say(options, f"{'':<16}" + "".join(f"{name:>14}" for name in _WORK))
    results = {}
    for name, model in found.items():
        with seeded(options.seed, device):
            results[name] = _measure(model, options.rows, options.seconds)
        say(options, f"{name[-16:]:<16}" + "".join(f"{speed:>14,.0f}" for speed in results[name].values()))
    if options.json:
        print_json(
            {
                "unit": "rows per second",
                "rows": options.rows,
                "device": where,
                "threads": threads,
                "torch": torch.__version__,
                "flows": results,
            }
        )


def _measure(model: Model, rows: int, seconds: float) -> dict[str, float]:
    """Give the rows per second of each kind of work."""
    import numpy as np
    import torch

    from pyroflows.training import negative_log_likelihood

    flow = model.flow
    context = model.context(np.zeros((rows, len(model.given))))
    features = len(model.names)
    drawn = model.sample(np.zeros((rows, len(model.given))))[:, :features]
    x = torch.from_numpy(drawn).to(flow.device, flow.dtype)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-6, fused=True)

    @torch.no_grad()
    def score() -> None:
        negative_log_likelihood(flow, x, context)

    def sample() -> None:
        flow.sample((rows,) if context is None else (), context)

    def train() -> None:
        flow.train()
        optimizer.zero_grad()
        negative_log_likelihood(flow, x, context).backward()
        optimizer.step()

    works = dict(zip(_WORK, (score, sample, train), strict=True))
    return {name: rows / _median_time(work, flow.device, seconds) for name, work in works.items()}


def _median_time(work: Callable[[], None], device: Any, seconds: float) -> float:
    import torch

    times: list[float] = []
    while len(times) < 4 or sum(times) < seconds:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
