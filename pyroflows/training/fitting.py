"""Train a flow by maximum likelihood, or by any other objective."""

import copy
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.random import fork_rng

from pyroflows import distributed
from pyroflows.arguments import check_number, check_sizes
from pyroflows.contexts import random_state, seeded, set_random_state
from pyroflows.flow import Flow
from pyroflows.networks.data_dependent import DataDependent
from pyroflows.training.batches import Rows, parts_of
from pyroflows.training.checkpoint import Checkpoint, must_match
from pyroflows.training.modes import CompiledFlow, enter_modes, shard
from pyroflows.training.options import FitOptions, FitResult
from pyroflows.training.prepare import prepare
from pyroflows.training.trainer import Trainer

__all__ = ["Objective", "fit", "negative_log_likelihood"]

Array = Tensor | np.ndarray[Any, Any]
Objective = Callable[..., Tensor]
"""Returns the loss, a scalar, from the flow, a batch, its context, and the weights of its rows if there are any."""


def negative_log_likelihood(
    flow: Any, x: Tensor | None, context: Tensor | None, weights: Tensor | None = None
) -> Tensor:
    """Return the mean over rows of the negative log-density times weight, in nats; with a dequantizer, of its bound."""
    method = flow.log_prob if flow.dequantizer is None else flow.dequantized_log_prob
    log_prob = method(x, context)
    # An embedding's output may broadcast, such as labels of shape (rows, 1): every row with every label.
    if x is not None and context is not None and log_prob.shape != x.shape[: x.dim() - len(flow.event_shape)]:
        raise ValueError(
            f"expected a context that gives one log-density to each row of {tuple(x.shape)}; "
            f"got {tuple(log_prob.shape)} from a context of shape {tuple(context.shape)}"
        )
    return -(log_prob if weights is None else weights * log_prob).mean()


def fit(
    flow: Flow,
    x: Array | Iterable[Any] | None = None,
    *,
    context: Array | None = None,
    weights: Array | None = None,
    validation: float | Array | tuple[Array | None, ...] | None = 0.1,
    epochs: int = 100,
    batch_size: int | None = None,
    learning_rate: float = 1e-3,
    patience: int | None = 30,
    max_seconds: float | None = None,
    objective: Objective = negative_log_likelihood,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int | None = None,
    device: str | torch.device = "auto",
    progress: bool | str | None = None,
    options: FitOptions | None = None,
) -> FitResult:
    r"""Train a flow, by default by maximum likelihood, and leave it with its best weights, in evaluation mode.

    The data are moved to the device at once and shuffled there by index. The learning rate warms up, then falls along a
    half cosine (for a stream of unknown length, from the second epoch on). A step whose loss or gradient is not finite
    is skipped and counted. With a seed, torch's random state is restored afterwards.

    A fit that finds its checkpoint resumes from it: bit for bit on a CPU, if all random numbers come from torch's
    default generator and the user's own batches repeat. All that a step depends on must be the same; ``epochs``,
    ``max_seconds``, ``patience`` and ``max_skipped`` may change, and the schedule is then that of the new length. A
    fit that had ended returns its result at once.

    Under ``torchrun`` the processes share the fit: each takes its slice of every batch; gradients, losses and the
    statistics of norms are sums over all; each ends with the same flow, which is that of one process except for
    rounding and for random numbers within a step (dropout, dequantization, draws of an ELBO), which differ between
    processes. The first process writes the checkpoint and shows the bar. All must get the same data.

    Args:
        flow: the flow; trained in place.
        x: a tensor or array, cast to the flow's dtype (with a dequantizer, integers stay integers); a memory-mapped one
            stays in its file. Or an iterable of batches (a DataLoader), each ``x`` or ``(x, context)``, of which each
            process takes its rows, or which are its own if the iterable has a true attribute ``sharded`` or a
            ``DistributedSampler``. Or None for an objective without data (an ELBO).
        context: a context for each row, if the flow takes one and ``x`` is an array.
        weights: a weight of at least 0 for each row, if ``x`` is an array, scaled to mean 1 over the training rows. A
            loss is the mean over rows of weight times negative log-density, for the held-out rows too; norms weigh the
            rows in the same way, and a row of weight 0 is left out.
        validation: the share of rows, or of their weights, to hold out (none of batches of the user's own), but for
            rows without which a column would be constant; or data, ``(data, context)`` or
            ``(data, context, weights)``, where context may be None; or 0 or None for none: then there is no patience,
            and the last epoch's weights are kept.
        epochs: passes through the data.
        batch_size: rows of a step, over all processes; by default 256, or all rows if they are fewer. The rows left
            over by the last batch of an epoch wait for another epoch's shuffle.
        learning_rate: the highest learning rate.
        patience: epochs without a better validation loss before the fit ends, each counted as ten steps if it has
            fewer: 30 are 300 steps at least. None for no such end.
        max_seconds: limit of wall time. It changes nothing unless it is reached. The schedule ends with it: without
            patience from when the steps will clearly take longer, with patience in the last tenth of the time, in which
            a fit that has more steps left than time goes on to the limit.
        objective: returns the loss from the flow, a batch, its context and, with ``weights``, the weights of its rows.
        checkpoint: a file to which the state of the fit is written after each epoch, or as the options say.
        seed: seed of split, shuffles and dropout (not of the flow's initial weights); None uses the global generator.
        device: "auto" for the accelerator if torch sees one, or a device such as "cpu" or "cuda"; the flow is moved
            there and back. Of several processes on a machine each uses the GPU of its local rank.
        progress: whether to show a bar, or its label; by default, and with a label, on a terminal only.
        options: options that most users leave alone.

    Shapes:
        x: ``(rows, *event_shape)``; context: ``(rows, context_features)``, or for an embedding ``(rows, ...)``, also of
        integers; weights: ``(rows,)``.

    Returns:
        The history, and why the fit ended.

    Raises:
        TypeError: integer data without a dequantizer, or something that is not data.
        ValueError: a shape that is not the flow's, a number that is not finite, a constant column, fewer rows than a
            batch, an option out of range, or a checkpoint that is truncated or of another fit.

    References:
        Adam: A Method for Stochastic Optimization, Kingma and Ba, 2015 (arXiv:1412.6980);
        SGDR: Stochastic Gradient Descent with Warm Restarts, Loshchilov and Hutter, 2017 (arXiv:1608.03983);
        Training Deep Nets with Sublinear Memory Cost, Chen et al., 2016 (arXiv:1604.06174).

    Example:
        >>> from pyroflows import fit, realnvp
        >>> x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)) * 3 + 1
        >>> fit(realnvp(2, num_layers=2), x, epochs=5, seed=0).stopped
        'all 5 epochs done'
    """
    options = FitOptions() if options is None else options
    _check(flow, options, x, objective, checkpoint)
    check_sizes(epochs=epochs)
    check_sizes(optional=True, patience=patience)
    check_number("learning_rate", learning_rate, "(0, inf)")
    check_number("max_seconds", max_seconds, "(0, inf)", optional=True)
    max_seconds = None if max_seconds is None else float(max_seconds)
    device = distributed.choose_device(device, near=flow.device)
    distributed.initialize(device)
    with seeded(seed, device), distributed.together(device), ExitStack() as stack:
        file = state = None
        if checkpoint is not None:
            file = Checkpoint(checkpoint, options.checkpoint_seconds, options.checkpoint_steps)
            state = distributed.on_first_rank(file.load)
        if state is not None:
            set_random_state(state["initial_random_state"], device)  # so that the same rows are held out
        initial_random_state = random_state(device)
        stack.callback(flow.to, flow.device)
        flow.to(device)
        train, held_out = prepare(flow, (x, context, weights), validation, batch_size, options)
        if file is not None or distributed.world_size() > 1:
            expected = must_match(flow, train, held_out, options, objective, learning_rate=learning_rate, seed=seed)
            _check_ranks(distributed.all_gather(expected))
            if file is not None:
                file.metadata = {"initial_random_state": initial_random_state, "must_match": expected}
                if state is not None:
                    file.check(state)
        for part in flow.modules():
            if isinstance(part, DataDependent):
                part.reset_if_untrained()
        distributed.synchronize(flow)
        if state is not None:
            flow.load_state_dict(state["weights"])
        if isinstance(train, Rows) and train.weights is not None and _awaits_data(flow):
            _start_from_weights(flow, train)
        trained = _trained(flow, objective, train, options, stack)
        limits: dict[str, Any] = {"epochs": epochs, "patience": patience, "max_seconds": max_seconds}
        trainer = Trainer(flow, trained, train, held_out, objective, float(learning_rate), options, file, **limits)
        if state is not None:
            trainer.resume(state)
        return trainer.run(progress)


def _awaits_data(flow: Flow) -> bool:
    return any(isinstance(part, DataDependent) and part.awaits_data for part in flow.modules())


@torch.no_grad()
def _start_from_weights(flow: Flow, train: Rows) -> None:
    """Start norms from many rows at once, since the first batch may hold next to none of the weight."""
    with fork_rng([flow.device] if flow.device.type == "cuda" else []):
        batch = train.by_weight()
        with distributed.rank_rng(), distributed.weighted_rows(batch.weights):
            negative_log_likelihood(flow.train(), batch.x, batch.context)


def _trained(flow: Flow, objective: Objective, train: Any, options: FitOptions, stack: ExitStack) -> Any:
    """Return what the objective gets in training: the flow, a stand-in with compiled methods, or a sharded copy."""
    if options.strategy != "fsdp" or distributed.world_size() == 1:
        enter_modes(stack, flow, options)
        return CompiledFlow(flow, options) if options.compile else flow
    if _awaits_data(flow):
        # Norms start from the first batch, as in the first step; once sharded they would lose what they write to
        # parameters. The fit moves on neither in the data nor in its random numbers.
        gpus = [flow.device] if flow.device.type == "cuda" else []
        with fork_rng(gpus):
            batch = next(copy.copy(train).epoch())
            with distributed.rank_rng(), fork_rng(gpus):
                part = next(parts_of(batch, options))
                with distributed.weighted_rows(part.weights):
                    objective(flow.train(), *part.inputs)
    copied = copy.deepcopy(flow)
    enter_modes(stack, copied, options)
    return shard(copied)


def _check(flow: Flow, options: FitOptions, x: Any, objective: Objective, checkpoint: Any) -> None:
    """Refuse a flow that cannot be trained, and arguments that cannot be combined."""
    if not isinstance(flow, Flow):
        raise TypeError(f"expected a Flow; got {type(flow).__name__}")
    if not isinstance(options, FitOptions):
        raise TypeError(f"expected options as FitOptions; got {type(options).__name__}")
    dtypes = {t.dtype for t in (*flow.parameters(), *flow.buffers()) if t.is_floating_point()}
    if len(dtypes) > 1:
        got = " and ".join(sorted(map(str, dtypes)))
        raise TypeError(f"expected a flow whose prior and layers are of one dtype; got {got}")
    if flow.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"expected a flow of float32 or float64; got {flow.dtype}")
    if not any(p.requires_grad for p in flow.parameters()):
        raise ValueError("expected a flow with parameters to train; got none")
    if options.channels_last and len(flow.event_shape) != 3:
        raise ValueError(f"expected a flow of images (C, H, W) for channels_last; got {tuple(flow.event_shape)}")
    if x is None and objective is negative_log_likelihood:
        raise ValueError("expected data, or an objective that needs none; got neither")
    if x is None and options.augment is not None:
        raise ValueError("expected data for augment; got none")
    for name in ("checkpoint_seconds", "checkpoint_steps"):
        if checkpoint is None and getattr(options, name) is not None:
            raise ValueError(f"expected {name} only with a checkpoint; got {getattr(options, name)} without")


def _check_ranks(options: list[dict[str, Any]]) -> None:
    """Refuse processes that do not run the same fit: their sums would mean nothing, or never end."""
    for name, value in options[0].items():
        for rank, other in enumerate(options):
            if other[name] != value:
                raise ValueError(f"expected the same {name} in every process; got another in process {rank} than in 0")
