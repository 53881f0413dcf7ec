"""One training loop, for maximum likelihood and for any other objective of a flow."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyroflows import distributed
from pyroflows.arguments import check_number, check_option, check_sizes
from pyroflows.contexts import random_state, seeded, set_random_state
from pyroflows.flow import Flow
from pyroflows.layers.batchnorm import BatchNorm
from pyroflows.training.batches import Batch, Batches, Rows, Steps, prepare
from pyroflows.training.checkpoint import Checkpoint, fingerprint
from pyroflows.training.modes import compiled, laid_out, mixed, recomputing
from pyroflows.training.options import FitOptions
from pyroflows.training.sharding import gather, shard, spread

Array = Tensor | np.ndarray[Any, Any]

_STATISTICS_ROWS = 2**17  # of data that are not in memory, for the statistics of batch norms

__all__ = ["FitResult", "Objective", "fit", "negative_log_likelihood"]

Objective = Callable[..., Tensor]
"""Returns the loss, a scalar, from the flow, a batch, its context, and the weights of its rows if there are any."""


def negative_log_likelihood(
    flow: Any, x: Tensor | None, context: Tensor | None, weights: Tensor | None = None
) -> Tensor:
    """Return the mean over rows of the negative log-density times weight, in nats; with a dequantizer, of its bound."""
    method = flow.log_prob if flow.dequantizer is None else flow.dequantized_log_prob
    log_prob = method(x, context)
    # What an embedding gives may broadcast, such as labels of shape (rows, 1) to every row beside every label.
    if x is not None and context is not None and log_prob.shape != x.shape[: x.dim() - len(flow.event_shape)]:
        raise ValueError(
            f"expected a context that gives one log-density to each row of {tuple(x.shape)}; "
            f"got {tuple(log_prob.shape)} from a context of shape {tuple(context.shape)}"
        )
    return -(log_prob if weights is None else weights * log_prob).mean()


@dataclass
class FitResult:
    """What a fit did.

    Args:
        history: per epoch, lists under "train" and "validation" (mean loss in nats), "gradient_norm" (mean, before
            clipping), "learning_rate" (at the end) and "seconds" (since the start).
        best_epoch: the epoch whose weights the flow has, counted from 0; None if no epoch gave a finite loss.
        best_loss: its loss on the validation rows, or on the training rows where there are none.
        stopped: why the fit ended.
        steps: the optimizer steps taken.
        skipped_steps: the steps left out because loss or gradient was not finite.
        seconds: wall time, over all the processes of a fit with a checkpoint.
    """

    history: dict[str, list[float]] = field(default_factory=dict)
    best_epoch: int | None = None
    best_loss: float = math.inf
    stopped: str = ""
    steps: int = 0
    skipped_steps: int = 0
    seconds: float = 0.0

    def __repr__(self) -> str:
        return (
            f"FitResult(best_loss={self.best_loss:.4f} at epoch {self.best_epoch}, "
            f"{len(self.history.get('train', ()))} epochs, {self.steps} steps, {self.skipped_steps} skipped, "
            f"{self.seconds:.1f} s, stopped: {self.stopped})"
        )


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
    device: str = "auto",
    progress: bool | str | None = None,
    options: FitOptions | None = None,
) -> FitResult:
    r"""Train a flow, by default by maximum likelihood, and leave it with its best weights, in evaluation mode.

    The data go to the device whole and are shuffled there by index; those of a flow with a dequantizer may be
    integers, and lie there as they come. The learning rate warms up, then falls along a half cosine (of a stream whose
    length is not known, from the second epoch on). A step whose loss or gradient is not finite is left out and
    counted; after ``max_skipped`` in a row the fit ends. The random numbers of torch are as before where a seed is
    given.

    With a checkpoint the state of the fit is in a file after each epoch, or every so many steps or seconds, and a fit
    that finds the file goes on from there: on a CPU to the very numbers of a fit that was never interrupted, as long as
    all random numbers are those of torch's default generator, and batches of the user's own come again. What decides
    about the steps has to be the same; ``epochs``, ``max_seconds``, ``patience`` and ``max_skipped`` may change, and
    from then on the schedule is that of the new length. A fit that had ended gives its result at once.

    Under ``torchrun`` the processes share the fit: each takes its part of every batch, gradients, losses and the
    statistics of norms are sums over all, and each ends with the same flow, which is that of one process but for
    rounding and for random numbers drawn within a step (dropout, dequantisation, an ELBO's draws), of which each
    process has its own. The first process writes the checkpoint and shows the bar. All are to be given the same data.

    Args:
        flow: the flow; trained in place.
        x: data, a tensor or array, cast to the flow's dtype, of which a memory-mapped one stays in its file; or an
            iterable of batches (a DataLoader), each ``x`` or ``(x, context)``; or None where the objective needs none
            (an ELBO). On several processes all read the same batches and share the rows of each, unless the iterable
            has a true attribute ``sharded`` or a ``DistributedSampler``: then each process reads batches of its own.
        context: the context of each row, where the flow takes one and ``x`` is an array.
        weights: a weight of at least 0 for each row, if ``x`` is an array. They are scaled to mean 1 over the rows
            trained on, and the loss of a batch is the mean over its rows of weight times negative log-density; the
            validation loss is the weighted mean over the rows held out.
        validation: the share of rows to hold out, with their contexts and weights; or data, ``(data, context)`` or
            ``(data, context, weights)``, where context may be None; 0 or None for none. Batches of the user's own stay
            whole, and without data held out neither patience nor the choice of the best epoch applies: the last one's
            weights are kept.
        epochs: passes through the data.
        batch_size: rows a step, over all processes; by default 256, or all rows where there are fewer. The rows left
            over by the last whole batch of an epoch wait for another epoch's shuffle.
        accumulate: parts in which a batch is run, one after another, so that larger ones fit into memory. The step is
            that of the whole batch, if the objective is a mean over rows; norms that start from data see one part.
        optimizer: "adam", fused, or "adamax".
        learning_rate: the optimizer's, at its highest.
        weight_decay: L2 penalty on all parameters.
        schedule: "cosine" (to zero) or "constant".
        warmup: the share of training during which the learning rate rises.
        clip_norm: the largest norm of the gradient; None for no clipping.
        patience: epochs without a better validation loss before the fit ends; None to go on.
        max_seconds: a limit of wall time; the schedule then ends with it.
        average: the decay of an exponential moving average of the weights, such as 0.999, which is then what is
            evaluated and kept; 0 for none. It looks back at most over a fifth of the steps taken.
        max_skipped: steps in a row that may be left out before the fit ends.
        steps_per_epoch: steps an epoch has; by default those of a whole pass, or 100 where ``x`` is None. Beside an
            array one shuffle then runs on through the epochs until all rows were seen, and another follows.
        objective: returns the loss from the flow, a batch and its context, and the weights of its rows as a fourth
            argument if there are weights; by default :func:`negative_log_likelihood`.
        augment: gives from the ``x`` of a training batch, before it is dequantised, another like it, such as images
            mirrored at random.
        recompute: keep for the gradient what goes into a layer (of a flow in levels: into a step), and run that again
            when the gradient is taken: a third more time, and memory that hardly grows with the number of layers.
        channels_last: lay images and the weights of convolutions out in ``torch.channels_last``.
        compile: run the flow's methods through ``torch.compile`` while it trains: a minute of compiling, then steps
            of half the time or so for splines, two thirds for affine layers (on a CPU; needs a C++ compiler).
        checkpoint: a file to which the state of the fit is written after each epoch, and from which it goes on.
        checkpoint_seconds: the time from one write to the next, at a step; the end of the fit is always written.
        checkpoint_steps: the steps from one write to the next, likewise.
        seed: seeds split, shuffles and dropout (not the weights the flow comes with).
        accelerator: Lightning Fabric's: "auto", "cpu", "cuda", "mps"; the flow is moved there and back. Of several
            processes on a machine each has a GPU of its own.
        strategy: how several processes share the flow: "ddp", which "auto" stands for, has it whole in each; "fsdp"
            spreads parameters, gradients and the optimizer's numbers over them, for a flow too large for one device, of
            which an objective may call those methods alone that give a log-density. At the end of an epoch the flow is
            whole in each process, to be evaluated.
        precision: "bf16-mixed" to train with the networks (conditioners, embedding) in bfloat16, and the maps and
            densities in the flow's precision; by default all is in that.
        progress: whether to show a bar, or its label; by default, and with a label, on a terminal alone.

    Shapes:
        x: ``(rows, *event_shape)``; context: ``(rows, context_features)``, or ``(rows, ...)``, also of integers, where
        the flow has an embedding; weights: ``(rows,)``.

    Returns:
        The history, and why the fit ended.

    Raises:
        TypeError: integer data, or something that is no data.
        ValueError: a shape that is not the flow's, a number that is not finite, a constant column, fewer rows than a
            batch, an option out of range, or a checkpoint that is cut short, or is that of another fit.

    References:
        Adam: A Method for Stochastic Optimization, Kingma and Ba, 2015 (arXiv:1412.6980);
        SGDR: Stochastic Gradient Descent with Warm Restarts, Loshchilov and Hutter, 2017 (arXiv:1608.03983);
        Training Deep Nets with Sublinear Memory Cost, Chen et al., 2016 (arXiv:1604.06174).

    Example:
        >>> from pyroflows import fit, realnvp
        >>> x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)) * 3 + 1
        >>> result = fit(realnvp(2, num_layers=2), x, epochs=5, seed=0)
        >>> result.stopped
        'all 5 epochs done'
    """
    options = FitOptions() if options is None else options
    accumulate, optimizer, weight_decay = options.accumulate, options.optimizer, options.weight_decay
    schedule, warmup, clip_norm = options.schedule, options.warmup, options.max_grad_norm
    average, max_skipped, steps_per_epoch = options.ema_decay, options.max_skipped, options.steps_per_epoch
    augment, recompute, channels_last = options.augment, options.activation_checkpointing, options.channels_last
    compile, strategy, precision, accelerator = options.compile, options.strategy, options.precision, device
    checkpoint_seconds, checkpoint_steps = options.checkpoint_seconds, options.checkpoint_steps
    if not isinstance(flow, Flow):
        raise TypeError(f"expected a Flow; got {type(flow).__name__}")
    check_sizes(epochs=epochs, max_skipped=max_skipped, accumulate=accumulate)
    for name, size in (
        ("patience", patience),
        ("steps_per_epoch", steps_per_epoch),
        ("checkpoint_steps", checkpoint_steps),
    ):
        if size is not None:
            check_sizes(**{name: size})
    check_option("schedule", schedule, ("cosine", "constant"))
    check_option("optimizer", optimizer, ("adam", "adamax"))
    check_option("strategy", strategy, ("auto", "ddp", "fsdp"))
    check_number("learning_rate", learning_rate, "(0, inf)")
    for name, value in (
        ("max_grad_norm", clip_norm),
        ("max_seconds", max_seconds),
        ("checkpoint_seconds", checkpoint_seconds),
    ):
        if value is not None:
            check_number(name, value, "(0, inf)")
    check_number("weight_decay", weight_decay, "[0, inf)")
    check_number("warmup", warmup, "[0, 1)")
    check_number("ema_decay", average, "[0, 1)")
    if augment is not None and not callable(augment):
        raise TypeError(f"expected augment to be a function; got {type(augment).__name__}")
    for name, often in (("checkpoint_seconds", checkpoint_seconds), ("checkpoint_steps", checkpoint_steps)):
        if checkpoint is None and often is not None:
            raise ValueError(f"expected {name} beside a checkpoint; got {often} alone")
    if channels_last and len(flow.event_shape) != 3:
        raise ValueError(f"expected a flow of images (C, H, W) for channels_last; got {tuple(flow.event_shape)}")
    if x is None and objective is negative_log_likelihood:
        raise ValueError("expected data, or an objective that needs none; got neither")
    if compile and recompute:
        raise ValueError("compile cannot be combined with activation_checkpointing")
    if strategy == "fsdp" and (compile or channels_last):
        raise ValueError("expected strategy='fsdp' without compile and channels_last; got it beside one of them")
    if x is None and augment is not None:
        raise ValueError("expected data for augment; got none")

    dtypes = {t.dtype for t in (*flow.parameters(), *flow.buffers()) if t.is_floating_point()}
    if len(dtypes) > 1:
        got = " and ".join(sorted(map(str, dtypes)))
        raise TypeError(f"expected a flow whose prior and layers are of one dtype; got {got}")
    own = {torch.float32: "32-true", torch.float64: "64-true"}.get(flow.dtype)
    if own is None or precision not in (None, own, "bf16-mixed"):
        raise ValueError(
            f"expected a flow of float32 or float64, and precision to be its own or 'bf16-mixed'; "
            f"got a flow of {flow.dtype} and {precision!r}"
        )
    home = flow.device
    fabric = distributed.launch(accelerator, home, own)
    with seeded(seed, fabric.device), distributed.together(fabric.device), contextlib.ExitStack() as stack:
        file = None if checkpoint is None else Checkpoint(checkpoint, checkpoint_seconds, checkpoint_steps)
        state = None if file is None else distributed.on_first_rank(file.load)
        if state is not None:
            set_random_state(state["start"], fabric.device)  # so that the same rows are held out
        start = random_state(fabric.device)
        train, held_out = prepare(flow, x, context, weights, validation, batch_size, steps_per_epoch, fabric.device)
        if isinstance(train, Rows) and train.batch_size < accumulate:
            raise ValueError(f"expected at least accumulate={accumulate} rows a batch; got {train.batch_size}")
        parameters = [p for p in flow.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("expected a flow with parameters to train; got none")
        steps = _Options(
            learning_rate=float(learning_rate),
            weight_decay=float(weight_decay),
            schedule=schedule,
            warmup=float(warmup),
            max_grad_norm=math.inf if clip_norm is None else float(clip_norm),
            ema_decay=float(average),
            optimizer=optimizer,
            batch_size=train.batch_size if isinstance(train, Rows) else None,
            steps_per_epoch=train.steps,
            accumulate=int(accumulate),
            channels_last=bool(channels_last),
            precision=precision or own,
            seed=None if seed is None else int(seed),
            objective=_name(objective),
            augment=_name(augment),
        )
        alone = distributed.world_size() == 1
        marks = {} if file is None and alone else _marks(steps, flow, train, held_out)
        _refuse_differences(distributed.all_gather(marks))
        if file is not None and state is not None:
            file.check(state["marks"], marks)
        for part in flow.modules():
            if hasattr(part, "restart_if_untrained"):
                part.restart_if_untrained()  # type: ignore[operator]
        stack.callback(flow.to, home)
        fabric.to_device(flow)
        distributed.synchronize(flow)
        trained: Any = flow
        if strategy == "fsdp" and not alone:
            if state is not None:
                flow.load_state_dict(state["weights"])
            # Norms that start write to parameters, which is lost on those that are spread.
            _start(flow, objective, train, augment, accumulate, fabric.device)
            trained = copy.deepcopy(flow)
        for mode, wanted in ((laid_out, channels_last), (mixed, precision == "bf16-mixed"), (recomputing, recompute)):
            if wanted:
                stack.enter_context(mode(trained))
        if trained is not flow:
            trained = shard(trained)
            parameters = [p for p in trained.parameters() if p.requires_grad]
        wrapped = fabric.setup_optimizers(_optimizer(steps, parameters))
        if compile:
            stack.enter_context(compiled(flow))
        trainer = _Trainer(
            fabric,
            flow,
            trained,
            wrapped,
            objective,
            augment,
            train,
            held_out,
            steps,
            epochs=epochs,
            patience=patience,
            max_seconds=None if max_seconds is None else float(max_seconds),
            max_skipped=max_skipped,
            file=file,
            origin={"marks": marks, "start": start},
        )
        if state is not None:
            trainer.resume(state)
        return trainer.run(progress)


@dataclass(frozen=True)
class _Options:
    """What decides about the steps of a fit."""

    learning_rate: float
    weight_decay: float
    schedule: str
    warmup: float
    max_grad_norm: float
    ema_decay: float
    optimizer: str
    batch_size: int | None
    steps_per_epoch: int | None
    accumulate: int
    channels_last: bool
    precision: str
    seed: int | None
    objective: str | None
    augment: str | None


def _marks(options: _Options, flow: Flow, train: Any, held_out: Rows | None) -> dict[str, Any]:
    """What has to be the same where a fit goes on from a checkpoint."""
    rows = [rows for rows in (train, held_out) if isinstance(rows, Rows)]
    data = fingerprint(*(tensor for each in rows for tensor in (each.x, each.context, each.weights)))
    return {**asdict(options), "flow": fingerprint(flow), "data": data}


def _refuse_differences(marks: list[dict[str, Any]]) -> None:
    """Refuse processes that are not about the same fit: their sums would mean nothing, or never end."""
    for name, value in marks[0].items():
        for rank, other in enumerate(marks):
            if other[name] != value:
                raise ValueError(f"expected the same {name} in every process; got another in process {rank} than in 0")


def _name(function: object) -> str | None:
    return None if function is None else getattr(function, "__qualname__", type(function).__name__)


def _optimizer(options: _Options, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    rate, weight_decay = options.learning_rate, options.weight_decay
    if options.optimizer == "adamax":
        return torch.optim.Adamax(parameters, rate, weight_decay=weight_decay, foreach=True)
    return torch.optim.Adam(parameters, rate, weight_decay=weight_decay, fused=True)


def _start(flow: Flow, objective: Objective, train: Any, augment: Any, accumulate: int, device: torch.device) -> None:
    """Have the norms of a flow start from the first batch, as they do in the first step of another strategy."""
    if all(getattr(part, "_started", True) for part in flow.modules()):
        return
    place, state, own = train.place, random_state(device), distributed.rank_random_state()
    batch = next(iter(train.after(0)))
    x, context, weights = batch.x, batch.context, batch.weights
    flow.train()
    with distributed.rank_rng():
        if x is not None:
            x = x if augment is None else augment(x)
            number = min(distributed.all_gather(min(accumulate, len(x))))
            x = x.tensor_split(number)[0]
            context = None if context is None else context[: len(x)]
            weights = None if weights is None else weights[: len(x)]
        objective(flow, *Batch(x, context, weights).inputs)
    train.go_to(place)
    set_random_state(state, device)
    distributed.set_rank_random_state(own)


@dataclass
class _Trainer:
    """The state of one fit."""

    fabric: Any
    flow: Flow
    trained: Any  # the flow, or a copy of it that is spread over processes
    optimizer: Any
    objective: Objective
    augment: Callable[[Tensor], Tensor] | None
    train: Rows | Batches | Steps
    held_out: Rows | None
    options: _Options
    epochs: int
    patience: int | None
    max_seconds: float | None
    max_skipped: int
    file: Checkpoint | None
    origin: dict[str, Any]  # what a checkpoint says of the fit it is of

    def __post_init__(self) -> None:
        self.result = FitResult({k: [] for k in ("train", "validation", "gradient_norm", "learning_rate", "seconds")})
        self.total = self.epochs * self.train.steps if self.train.steps else None
        # Skipped steps are counted where they happen, so that no step waits for the device.
        self.skipped = torch.zeros(2, device=self.fabric.device)  # in all, in a row
        self.parameters = list(self.trained.parameters())
        self.is_spread = self.trained is not self.flow
        self.averaged = [p.detach().clone() for p in self.parameters] if self.options.ema_decay else []
        self.first: dict[str, Tensor] | None = self._weights()  # until there are best ones
        self.best: dict[str, Tensor] | None = None
        self.began = time.perf_counter()
        self.done = 0  # steps of the present epoch
        self.sums = torch.zeros(3, device=self.fabric.device)  # their finite losses, gradient norms, and number

    def run(self, progress: bool | str | None) -> FitResult:
        from tqdm.auto import tqdm

        result = self.result
        label, disable = (
            (progress, None) if isinstance(progress, str) else (None, None if progress is None else not progress)
        )
        disable = True if distributed.rank() else disable
        try:
            with tqdm(
                total=self.total, initial=result.steps, desc=label, disable=disable, unit="step", leave=False
            ) as bar:
                while not result.stopped:
                    train, norm = self._epoch(bar)
                    if self.total is None:
                        self.total = self.epochs * result.steps
                    self._exchange()
                    if self.is_spread:
                        self.flow.load_state_dict(gather(self.trained.state_dict()))
                    with distributed.rank_rng():
                        loss = self._evaluate(train)
                    if self.is_spread:
                        for buffer, value in zip(self.trained.buffers(), self.flow.buffers(), strict=True):
                            buffer.copy_(value)  # the statistics of norms
                    self._note(train, loss, norm)
                    self._exchange()
                    result.stopped = self._why_stop()
                    self._save(epoch_ended=True)
        finally:
            # Also after an interrupt or an error of the objective the flow has its best weights, if it had an epoch.
            kept = self.first if self.best is None and self._blown() else self.best
            if kept is not None:
                self.flow.load_state_dict(kept)
            self.flow.eval()
        distributed.synchronize(self.flow)
        return result

    def _save(self, *, epoch_ended: bool = False) -> None:
        """Put the state into the checkpoint, where it is due."""
        if self.file is None:
            return
        seconds = self._seconds() if self.file.seconds is not None else 0.0
        if self.result.stopped or self.file.due(seconds, self.result.steps, epoch_ended=epoch_ended):
            state = self._state()
            if distributed.rank() == 0:
                self.file.save(state)
            self.file.written = seconds, self.result.steps

    def _state(self) -> dict[str, Any]:
        """All that the next step depends on."""
        result = self.result
        result.seconds = result.history["seconds"][-1] if result.stopped else self._seconds()
        return {
            **self.origin,
            "result": asdict(result),
            "done": self.done,
            "sums": self.sums,
            "epoch_steps": self.total // self.epochs if self.total else None,
            "weights": gather(self.trained.state_dict()),
            "averaged": gather(self.averaged),
            "optimizer": gather(self.optimizer.optimizer.state_dict()),
            "skipped": self.skipped,
            "first": self.first,
            "best": self.best,
            "place": self.train.place,
            "random": random_state(self.fabric.device),
            "apart": distributed.all_gather(distributed.rank_random_state()),
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from the state of a checkpoint."""
        self.result = FitResult(**state["result"])
        if state["epoch_steps"]:
            self.total = self.epochs * state["epoch_steps"]
        self.flow.load_state_dict(state["weights"])
        for average, value in zip(self.averaged, state["averaged"], strict=True):
            average.copy_(spread(value, average))
        kept = state["optimizer"]["state"]
        trained = [p for p in self.parameters if p.requires_grad]
        for number, values in kept.items():
            kept[number] = {k: v if v.dim() == 0 else spread(v, trained[number]) for k, v in values.items()}
        self.optimizer.optimizer.load_state_dict(state["optimizer"])
        self.skipped.copy_(state["skipped"])
        self.first, self.best = state["first"], state["best"]
        self.train.go_to(state["place"])
        self.done = state["done"]
        self.sums.copy_(state["sums"])
        self.began = time.perf_counter() - self.result.seconds
        set_random_state(state["random"], self.fabric.device)
        if len(state["apart"]) == distributed.world_size():  # else the others have new ones
            distributed.set_rank_random_state(state["apart"][distributed.rank()])
        if self.file is not None:
            self.file.written = self.result.seconds, self.result.steps
        if not self.done:
            self.result.stopped = self._why_stop()

    def _weights(self) -> dict[str, Tensor]:
        # Kept in the memory of the CPU: a GPU's is short with a large flow.
        return {name: value.to("cpu", copy=True) for name, value in self.flow.state_dict().items()}

    @torch.no_grad()
    def _exchange(self) -> None:
        """Put the averaged weights in the place of those that are trained, or back."""
        for parameter, average in zip(self.parameters, self.averaged, strict=False):
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)

    def _note(self, train: float, loss: float, norm: float) -> None:
        """Put an epoch down, and keep its weights, which are in place, if they are the best."""
        result, history = self.result, self.result.history
        history["train"].append(train)
        if self.held_out is not None:
            history["validation"].append(loss)
        history["gradient_norm"].append(norm)
        history["learning_rate"].append(self.optimizer.param_groups[0]["lr"])
        history["seconds"].append(self._seconds())
        result.skipped_steps, result.seconds = int(self.skipped[0]), history["seconds"][-1]
        # Without rows held out the last epoch is the best: a lower training loss before was luck. One that ended in
        # steps that were not finite may have left weights that blew up before.
        better = loss < result.best_loss or self.held_out is None
        if math.isfinite(loss) and better and not self._blown():
            result.best_loss, result.best_epoch = loss, len(history["train"]) - 1
            self.best, self.first = self._weights(), None

    def _why_stop(self) -> str:
        if self._blown():
            return f"loss or gradient not finite in {self.max_skipped} steps in a row"
        if self.max_seconds is not None and self.result.seconds >= self.max_seconds:
            return f"max_seconds={self.max_seconds:.4g} reached"
        epoch = len(self.result.history["train"]) - 1
        waited = epoch - (self.result.best_epoch or 0)
        if self.patience is not None and self.held_out is not None and waited >= self.patience:
            return f"no better validation loss in {self.patience} epochs"
        return f"all {self.epochs} epochs done" if epoch >= self.epochs - 1 else ""

    def _blown(self) -> bool:
        return bool(self.skipped[1] >= self.max_skipped)

    def _seconds(self) -> float:
        """Give the time since the start, on the first process's clock."""
        return float(distributed.broadcast(time.perf_counter() - self.began))

    def _epoch(self, bar: Any) -> tuple[float, float]:
        self.trained.train()
        shown, timed = 0.0, self.max_seconds is not None
        # Reading the count makes a GPU wait: there it is looked at now and then.
        often = 1 if self.fabric.device.type == "cpu" else 50
        for batch in self.train.after(self.done):
            elapsed = self._seconds() if timed else time.perf_counter() - self.began
            self._set_rate(elapsed)
            with distributed.rank_rng():
                loss, norm, bad = self._step(batch)
            self.sums += torch.where(bad > 0, 0, torch.stack([loss, norm, torch.ones_like(loss)]).float())
            self.result.steps += 1
            self.done += 1
            bar.update()
            if elapsed - shown > 0.5 and not bar.disable:
                shown = elapsed
                bar.set_postfix(loss=f"{float(loss):.3f}")
            if self.max_seconds is not None and elapsed >= self.max_seconds:
                break
            if (self.done - 1) % often == 0 and self._blown():
                break
            self._save()
        if not self.done:
            raise ValueError(
                f"expected batches in every epoch; got none in epoch {len(self.result.history['train'])}: "
                "a generator can be read once, a list or a DataLoader again"
            )
        mean = (self.sums / self.sums[2].clamp(min=1)).tolist()
        found = (mean[0], mean[1]) if self.sums[2] else (math.nan, math.nan)
        self.done = 0
        self.sums.zero_()
        return found

    def _set_rate(self, elapsed: float) -> None:
        steps, warmup = self.result.steps, self.options.warmup
        done = steps / self.total if self.total else 0.0
        if self.max_seconds is not None:
            done = min(max(done, elapsed / self.max_seconds), 1.0)
        # Where the number of steps is not known yet, a hundred warm up.
        step = 1 / self.total if self.total else warmup * (steps + 1) / 100
        rise = min(1.0, (done + step) / warmup) if warmup else 1.0
        fall = (1 + math.cos(math.pi * done)) / 2 if self.options.schedule == "cosine" else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * rise * fall

    def _step(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for part in self._parts(batch):
            loss = self.objective(self.trained, *part.inputs)
            if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
                got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise TypeError(f"expected an objective that gives a scalar tensor with a gradient; got {got}")
            share = part.share * batch.share
            loss = loss if share == 1 else loss * share
            # What is spread averages its gradients over the processes.
            self.fabric.backward(loss * distributed.world_size() if self.is_spread else loss)
            losses.append(loss.detach())
        loss = self._over_processes(torch.stack(losses).sum())
        norm = gather(torch.nn.utils.clip_grad_norm_(self.parameters, self.options.max_grad_norm, foreach=True))
        bad = (~(loss.isfinite() & norm.isfinite())).float()
        if self.options.optimizer == "adam":
            # The fused optimizer reads this flag on the device and leaves the step out.
            self.optimizer.optimizer.found_inf = bad
            self.optimizer.step()
        elif not bad:  # a GPU waits here, which is little beside the steps of a flow of images
            self.optimizer.step()
        self.skipped += bad
        self.skipped[1] *= bad
        if self.averaged:
            # The first steps are soon forgotten: early on, the average looks back over a fifth of them.
            weight = max(1 - self.options.ema_decay, 5 / (self.result.steps + 5))
            torch._foreach_lerp_(self.averaged, [p.detach() for p in self.parameters], weight)
        return loss, norm, bad

    def _over_processes(self, loss: Tensor) -> Tensor:
        """Give the loss of the whole batch, and leave its gradient, as sums over the processes.

        That is done here and not by a module around the flow, as an objective may call any of a flow's methods, as
        often as it likes, and leave parameters out.
        """
        if distributed.world_size() == 1:
            return loss
        if self.is_spread:
            return distributed.all_reduce(loss)
        trained = [p for p in self.parameters if p.requires_grad]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad.flatten() for p in trained]
        parts = [*gradients, loss.to(gradients[0])[None]]
        sums = distributed.all_reduce(torch.cat(parts)).split([len(part) for part in parts])
        for parameter, gradient in zip(trained, sums, strict=False):
            parameter.grad.copy_(gradient.view_as(parameter))  # in its layout, of which a fused optimizer knows one
        return sums[-1][0]

    def _parts(self, batch: Batch) -> Iterator[Batch]:
        """Yield the parts of a batch that are run one after another; ``share`` is the part's share of its rows."""
        number, x = self.options.accumulate, batch.x
        if x is None:
            for _ in range(number):
                yield Batch(None, share=1 / number)
            return
        if self.augment is not None:
            shape, dtype = x.shape, x.dtype
            x = self.augment(x)
            if not isinstance(x, Tensor) or x.shape != shape or x.dtype != dtype:
                got = f"{x.dtype} of {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"expected augment to give {dtype} of {tuple(shape)}, as it gets; got {got}")
        # The same number in every process: norms in training sum over all of them in each part.
        rows, number = len(x), min(distributed.all_gather(min(number, len(x)))) if number > 1 else 1
        columns = (self._laid_out(x), batch.context, batch.weights)
        parts = [[None] * number if column is None else column.tensor_split(number) for column in columns]
        for part, context, weights in zip(*parts, strict=True):
            yield Batch(part, context, weights, len(part) / rows)

    def _laid_out(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if self.options.channels_last else x

    @torch.no_grad()
    def _evaluate(self, train: float) -> float:
        """Give the loss on the rows held out, in the flow's own precision; without such rows that of training."""
        self.flow.eval()
        if isinstance(self.train, Rows):
            _set_batch_statistics(self.flow, self.train)
        if self.held_out is None:
            return train
        rows = len(self.held_out.x)
        total = 0.0
        for part in self.held_out.slices(distributed.rank_slice(rows)):
            batch = self.held_out[part]
            batch = batch._replace(x=self._laid_out(batch.x))  # type: ignore[arg-type]
            total += float(self.objective(self.flow, *batch.inputs)) * (part.stop - part.start)
        return sum(distributed.all_gather(total)) / rows


@torch.no_grad()
def _set_batch_statistics(flow: Flow, train: Rows) -> None:
    """Give every BatchNorm of the stack the statistics of the whole train set, in one pass from data to latent."""
    layers = flow.layers
    if not any(isinstance(layer, BatchNorm) for layer in layers):
        return
    train = train.sample(_STATISTICS_ROWS)
    mine = distributed.rank_slice(len(train.x))
    parts = train.slices(mine)
    if flow.dequantizer is None:
        x = train.x[mine]
    else:
        x = torch.cat([flow.dequantizer(train.x[rows])[0] for rows in parts])
    context = train.context
    if context is not None:
        context = torch.cat([flow.embed(context[rows]) for rows in parts])  # type: ignore[misc]
    parts = [slice(rows.start - mine.start, rows.stop - mine.start) for rows in parts]
    for layer in reversed(layers):
        if isinstance(layer, BatchNorm):
            layer.set_statistics(x)
        given = layer.context_for(context)
        found = [layer.inverse_and_log_det(x[rows], None if given is None else given[rows])[0] for rows in parts]
        x = torch.cat(found)
