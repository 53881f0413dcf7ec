"""``pyroflows bench``: measure rows per second on this machine."""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from pyroflows import models
from pyroflows.arguments import check_option
from pyroflows.cli.model import TableModel, device_of, load_model
from pyroflows.cli.output import print_json, say
from pyroflows.contexts import seeded
from pyroflows.training import negative_log_likelihood

__all__ = ["run"]


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    device, threads = device_of(options.device), torch.get_num_threads()
    table_models = _models(options, device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    setting = f"{options.rows:,} at once, on {where}, {threads} threads, PyTorch {torch.__version__}"
    say(options, f"rows per second, {setting}\n{'':<16}{'score':>14}{'sample':>14}{'train step':>14}")
    speeds = {}
    for name, model in table_models.items():
        with seeded(options.seed, device):
            speeds[name] = _measure(model, options.rows, options.seconds)
        say(options, f"{name[-16:]:<16}" + "".join(f"{speed:>14,.0f}" for speed in speeds[name].values()))
    if options.json:
        results = {"unit": "rows per second", "rows": options.rows, "device": where, "threads": threads}
        print_json({**results, "torch": torch.__version__, "flows": speeds})


def _models(options: argparse.Namespace, device: torch.device) -> dict[str, TableModel]:
    """Load the model file, or build the named flows."""
    if options.model is not None:
        return {options.model: load_model(options.model, options.device)}
    for name in options.flows:
        check_option("a flow", name, models.__all__)
    with seeded(options.seed):
        flows = {name: getattr(models, name)(options.features) for name in options.flows}
    return {name: TableModel(flow.to(device).eval(), None) for name, flow in flows.items()}


def _measure(model: TableModel, rows: int, seconds: float) -> dict[str, float]:
    """Return the rows per second of each task."""
    flow, given = model.flow, np.zeros((rows, len(model.given)))
    context = model.context(given)
    x = torch.from_numpy(model.sample(given)[:, : len(model.names)]).to(flow.device, flow.dtype)
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

    tasks = {"score": score, "sample": sample, "train step": train}
    return {name: rows / _median_time(task, flow.device, seconds) for name, task in tasks.items()}


def _median_time(task: Callable[[], None], device: torch.device, seconds: float) -> float:
    times: list[float] = []
    while len(times) < 4 or sum(times) < seconds:
        began = time.perf_counter()
        task()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
