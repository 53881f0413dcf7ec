"""What norms take from data: the statistics of batch norms, and the first batch of norms that start from one."""

from typing import Any

import torch

from pyroflows import distributed
from pyroflows.contexts import random_state, set_random_state
from pyroflows.flow import Flow
from pyroflows.layers.norms import BatchNorm
from pyroflows.networks.data_dependent import DataDependent
from pyroflows.training.batches import Batches, Rows, Steps, parts_of
from pyroflows.training.options import FitOptions

__all__ = ["restart_norms", "set_batch_statistics", "start_norms"]

_STATISTICS_ROWS = 2**17  # of data in a file


def restart_norms(flow: Flow) -> None:
    """Let norms that saw data before the fit, but were not trained since, start from its first batch."""
    for part in flow.modules():
        if isinstance(part, DataDependent):
            part.reset_if_untrained()


def start_norms(flow: Flow, objective: Any, train: Rows | Batches | Steps, options: FitOptions) -> None:
    """Start norms from the first batch, as the first step does, without moving on in data or random numbers."""
    if not any(isinstance(part, DataDependent) and part.awaits_data for part in flow.modules()):
        return
    position, state, rank_state = train.position, random_state(flow.device), distributed.rank_random_state()
    batch = next(iter(train.epoch()))
    flow.train()
    with distributed.rank_rng():
        objective(flow, *next(parts_of(batch, options)).inputs)
    train.seek(position)  # type: ignore[arg-type]
    set_random_state(state, flow.device)
    distributed.set_rank_random_state(rank_state)


@torch.no_grad()
def set_batch_statistics(flow: Flow, train: Rows) -> None:
    """Set the statistics of every BatchNorm of the stack from the training rows, in one pass from data to latent."""
    layers = flow.layers
    if not any(isinstance(layer, BatchNorm) for layer in layers):
        return
    train = train.sample(_STATISTICS_ROWS)
    own = distributed.rank_slice(len(train))
    slices = train.slices(own)
    if flow.dequantizer is None:
        x = train.x[own]
    else:
        x = torch.cat([flow.dequantizer(train.x[rows])[0] for rows in slices])
    context = train.context
    if context is not None:
        context = torch.cat([flow.embed(context[rows]) for rows in slices])  # type: ignore[misc]
    slices = [slice(rows.start - own.start, rows.stop - own.start) for rows in slices]
    for layer in reversed(layers):
        if isinstance(layer, BatchNorm):
            layer.set_statistics(x)
        c = layer.context_for(context)
        x = torch.cat([layer.inverse_and_log_det(x[rows], None if c is None else c[rows])[0] for rows in slices])
