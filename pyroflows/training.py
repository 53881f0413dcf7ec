"""One training loop, for maximum likelihood and for any other objective of a flow."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyroflows.arguments import check_number, check_option, check_sizes
from pyroflows.flow import Flow
from pyroflows.layers.actnorm import ActNorm
from pyroflows.layers.batchnorm import BatchNorm

Array = Tensor | np.ndarray[Any, Any]

__all__ = ["FitResult", "Objective", "fit", "negative_log_likelihood"]

Batch = tuple[Tensor | None, Tensor | None]
Objective = Callable[[Any, Tensor | None, Tensor | None], Tensor]
"""Gives the loss, a scalar, of a flow on a batch of data and context."""

_EVALUATION_ROWS = 8192
_METHODS = ("log_prob", "rsample_and_log_prob", "rsample_and_score")


def negative_log_likelihood(flow: Any, x: Tensor | None, context: Tensor | None) -> Tensor:
    """The mean negative log-likelihood of a batch, in nats."""
    return -flow.log_prob(x, context).mean()


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
        seconds: wall time.
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
    validation: float | Array | tuple[Array, Array] | None = 0.1,
    epochs: int = 100,
    batch_size: int | None = None,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    schedule: str = "cosine",
    warmup: float = 0.05,
    clip_norm: float | None = 5.0,
    patience: int | None = 30,
    max_seconds: float | None = None,
    average: float = 0.0,
    max_skipped: int = 20,
    steps_per_epoch: int = 100,
    objective: Objective = negative_log_likelihood,
    compile: bool = False,
    seed: int | None = None,
    accelerator: str = "auto",
    precision: str | None = None,
    progress: bool | str | None = None,
) -> FitResult:
    r"""Train a flow, by default by maximum likelihood, and leave it with its best weights, in evaluation mode.

    The data go to the device whole and are shuffled there by index. Adam is fused; its learning rate warms up, then
    falls along a half cosine (of a stream whose length is not known, from the second epoch on). A step whose loss or
    gradient is not finite is left out and counted; after ``max_skipped`` in a row the fit ends. The random numbers of
    torch are as before where a seed is given.

    Args:
        flow: the flow; trained in place.
        x: data, a tensor or array, cast to the flow's dtype; or an iterable of batches (a DataLoader), each ``x``
            or ``(x, context)``; or None where the objective needs none (an ELBO).
        context: the context of each row, where the flow takes one and ``x`` is an array.
        validation: the share of rows to hold out; or data, or ``(data, context)``; 0 or None for none. A share is
            of an array's rows; batches of the user's own stay whole, and without data held out neither patience nor
            the choice of the best epoch applies: the last one's weights are kept.
        epochs: passes through the data.
        batch_size: rows a step; by default 256, or all rows where there are fewer. The rows left over by the last
            whole batch of an epoch wait for another epoch's shuffle.
        learning_rate: Adam's, at its highest.
        weight_decay: L2 penalty on all parameters.
        schedule: "cosine" (to zero) or "constant".
        warmup: the share of training during which the learning rate rises.
        clip_norm: the largest norm of the gradient; None for no clipping.
        patience: epochs without a better validation loss before the fit ends; None to go on.
        max_seconds: a limit of wall time; the schedule then ends with it.
        average: the decay of an exponential moving average of the weights, such as 0.999, which is then what is
            evaluated and kept; 0 for none. It looks back at most over a fifth of the steps taken.
        max_skipped: steps in a row that may be left out before the fit ends.
        steps_per_epoch: steps an epoch has where ``x`` is None.
        objective: gives the loss from the flow, a batch and its context.
        compile: run the flow's methods through ``torch.compile`` while it trains: a minute of compiling, then steps
            of half the time or so for splines, two thirds for affine layers (on a CPU; needs a C++ compiler).
        seed: seeds split, shuffles and dropout (not the weights the flow comes with).
        accelerator: Lightning Fabric's: "auto", "cpu", "cuda", "mps"; the flow is moved there and back.
        precision: "bf16-mixed" for Fabric's mixed precision in training; by default that of the flow.
        progress: whether to show a bar, or its label; by default, and with a label, on a terminal alone.

    Shapes:
        x: ``(rows, *event_shape)``; context: ``(rows, context_features)``, or ``(rows, ...)``, also of integers, where
        the flow has an embedding.

    Returns:
        The history, and why the fit ended.

    Raises:
        TypeError: integer data, or something that is no data.
        ValueError: a shape that is not the flow's, a number that is not finite, a constant column, fewer rows than a
            batch, or an option out of range.

    References:
        Adam: A Method for Stochastic Optimization, Kingma and Ba, 2015 (arXiv:1412.6980);
        SGDR: Stochastic Gradient Descent with Warm Restarts, Loshchilov and Hutter, 2017 (arXiv:1608.03983).

    Example:
        >>> from pyroflows import fit, realnvp
        >>> x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)) * 3 + 1
        >>> result = fit(realnvp(2, num_layers=2), x, epochs=5, seed=0)
        >>> result.stopped
        'all 5 epochs done'
    """
    from lightning_fabric import Fabric

    if not isinstance(flow, Flow):
        raise TypeError(f"expected a Flow; got {type(flow).__name__}")
    check_sizes(epochs=epochs, max_skipped=max_skipped, steps_per_epoch=steps_per_epoch)
    check_option("schedule", schedule, ("cosine", "constant"))
    for name, value in (("learning_rate", learning_rate), ("clip_norm", clip_norm), ("max_seconds", max_seconds)):
        if value is not None or name == "learning_rate":
            check_number(name, value, "(0, inf)")
    check_number("weight_decay", weight_decay, "[0, inf)")
    check_number("warmup", warmup, "[0, 1)")
    check_number("average", average, "[0, 1)")
    if patience is not None:
        check_sizes(patience=patience)
    if seed is not None and not isinstance(seed, Integral):
        raise TypeError(f"expected seed to be an integer; got {seed!r}")
    if x is None and objective is negative_log_likelihood:
        raise ValueError("expected data, or an objective that needs none; got neither")

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
    devices = [home.index] if home.type == "cuda" and accelerator in ("auto", "cuda", "gpu") else 1
    fabric = Fabric(accelerator=accelerator, devices=devices, precision=precision or own)
    with _seeded(seed, fabric.device):
        train, held_out = _prepare(flow, x, context, validation, batch_size, steps_per_epoch, fabric.device)
        parameters = [p for p in flow.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("expected a flow with parameters to train; got none")
        for layer in flow.modules():
            if isinstance(layer, ActNorm):
                layer.restart_if_untrained()
        fabric.to_device(flow)
        optimizer = torch.optim.Adam(parameters, learning_rate, weight_decay=weight_decay, fused=True)
        module, wrapped = fabric.setup(flow, optimizer)
        for method in _METHODS:
            module.mark_forward_method(method)
        trainer = _Trainer(
            fabric,
            flow,
            module,
            wrapped,
            objective,
            train,
            held_out,
            rate=learning_rate,
            warmup=warmup,
            cosine=schedule == "cosine",
            clip_norm=clip_norm or math.inf,
            max_seconds=max_seconds,
            average=average,
            max_skipped=max_skipped,
            epochs=epochs,
            patience=patience,
        )
        try:
            with _compiled(flow) if compile else contextlib.nullcontext():
                return trainer.run(progress)
        finally:
            flow.to(home)


@dataclass
class _Trainer:
    """The state of one fit."""

    fabric: Any
    flow: Flow
    module: Any  # the flow as Fabric wraps it
    optimizer: Any
    objective: Objective
    train: _Rows | _Batches | _Steps
    held_out: _Rows | None
    rate: float
    warmup: float
    cosine: bool
    clip_norm: float
    max_seconds: float | None
    average: float
    max_skipped: int
    epochs: int
    patience: int | None

    def __post_init__(self) -> None:
        self.result = FitResult({k: [] for k in ("train", "validation", "gradient_norm", "learning_rate", "seconds")})
        self.total = self.epochs * self.train.steps if self.train.steps else None
        # Skipped steps are counted where they happen, so that no step waits for the device.
        self.skipped = torch.zeros(2, device=self.fabric.device)  # in all, in a row
        self.parameters = list(self.flow.parameters())
        self.averaged = [p.detach().clone() for p in self.parameters] if self.average else []
        self.began = time.perf_counter()

    def run(self, progress: bool | str | None) -> FitResult:
        from tqdm.auto import tqdm

        result, first, best = self.result, self._weights(), None
        label, disable = (
            (progress, None) if isinstance(progress, str) else (None, None if progress is None else not progress)
        )
        try:
            with tqdm(total=self.total, desc=label, disable=disable, unit="step", leave=False) as bar:
                for epoch in range(self.epochs):
                    train, norm = self._epoch(bar)
                    if self.total is None:
                        self.total = self.epochs * result.steps
                    self._exchange()
                    loss = self._evaluate(train)
                    self._note(train, loss, norm)
                    # Without rows held out the last epoch is the best: a lower training loss before was luck. One that
                    # ended in steps that were not finite may have left weights that blew up before.
                    better = loss < result.best_loss or self.held_out is None
                    if math.isfinite(loss) and better and not self._blown():
                        result.best_loss, result.best_epoch, best = loss, epoch, self._weights()
                    result.stopped = self._why_stop(epoch)
                    if result.stopped:
                        break
                    self._exchange()
        finally:
            # Also after an interrupt or an error of the objective the flow has its best weights, if it had an epoch.
            if best is None and self._blown():
                best = first
            if best is not None:
                self.flow.load_state_dict(best)
            self.flow.eval()
        result.skipped_steps, result.seconds = int(self.skipped[0]), self._seconds()
        return result

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.flow.state_dict().items()}

    @torch.no_grad()
    def _exchange(self) -> None:
        """Put the averaged weights in the place of those that are trained, or back."""
        for parameter, average in zip(self.parameters, self.averaged, strict=False):
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)

    def _note(self, train: float, loss: float, norm: float) -> None:
        history = self.result.history
        history["train"].append(train)
        if self.held_out is not None:
            history["validation"].append(loss)
        history["gradient_norm"].append(norm)
        history["learning_rate"].append(self.optimizer.param_groups[0]["lr"])
        history["seconds"].append(self._seconds())

    def _why_stop(self, epoch: int) -> str:
        if self._blown():
            return f"loss or gradient not finite in {self.max_skipped} steps in a row"
        if self.max_seconds is not None and self._seconds() >= self.max_seconds:
            return f"max_seconds={self.max_seconds:.4g} reached"
        waited = epoch - (self.result.best_epoch or 0)
        if self.patience is not None and self.held_out is not None and waited >= self.patience:
            return f"no better validation loss in {self.patience} epochs"
        return f"all {self.epochs} epochs done" if epoch == self.epochs - 1 else ""

    def _blown(self) -> bool:
        return bool(self.skipped[1] >= self.max_skipped)

    def _seconds(self) -> float:
        return time.perf_counter() - self.began

    def _epoch(self, bar: Any) -> tuple[float, float]:
        self.flow.train()
        total = torch.zeros(3, device=self.fabric.device)  # finite losses, their gradient norms, their number
        shown, number = 0.0, -1
        # Reading the count makes a GPU wait: there it is looked at now and then.
        often = 1 if self.fabric.device.type == "cpu" else 50
        for number, (x, context) in enumerate(self.train):
            elapsed = self._seconds()
            self._set_rate(elapsed)
            loss, norm, bad = self._step(x, context)
            total += torch.where(bad > 0, 0, torch.stack([loss, norm, torch.ones_like(loss)]).float())
            self.result.steps += 1
            bar.update()
            if elapsed - shown > 0.5 and not bar.disable:
                shown = elapsed
                bar.set_postfix(loss=f"{float(loss):.3f}")
            if self.max_seconds is not None and elapsed >= self.max_seconds:
                break
            if number % often == 0 and self._blown():
                break
        if number < 0:
            raise ValueError(
                f"expected batches in every epoch; got none in epoch {len(self.result.history['train'])}: "
                "a generator can be read once, a list or a DataLoader again"
            )
        mean = (total / total[2].clamp(min=1)).tolist()
        return (mean[0], mean[1]) if total[2] else (math.nan, math.nan)

    def _set_rate(self, elapsed: float) -> None:
        steps = self.result.steps
        done = steps / self.total if self.total else 0.0
        if self.max_seconds is not None:
            done = min(max(done, elapsed / self.max_seconds), 1.0)
        # Where the number of steps is not known yet, a hundred warm up.
        step = 1 / self.total if self.total else self.warmup * (steps + 1) / 100
        rise = min(1.0, (done + step) / self.warmup) if self.warmup else 1.0
        fall = (1 + math.cos(math.pi * done)) / 2 if self.cosine else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * rise * fall

    def _step(self, x: Tensor | None, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.objective(self.module, x, context)
        if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"expected an objective that gives a scalar tensor with a gradient; got {got}")
        self.fabric.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm, foreach=True)
        loss = loss.detach()
        bad = (~(loss.isfinite() & norm.isfinite())).float()
        # The fused optimizer reads this flag on the device and leaves the step out.
        self.optimizer.optimizer.found_inf = bad
        self.optimizer.step()
        self.skipped += bad
        self.skipped[1] *= bad
        if self.average:
            # The first steps are soon forgotten: early on, the average looks back over a fifth of them.
            weight = max(1 - self.average, 5 / (self.result.steps + 5))
            torch._foreach_lerp_(self.averaged, [p.detach() for p in self.parameters], weight)
        return loss, norm, bad

    @torch.no_grad()
    def _evaluate(self, train: float) -> float:
        """Give the loss on the rows held out, in the flow's own precision; without such rows that of training."""
        self.flow.eval()
        if isinstance(self.train, _Rows):
            _set_batch_statistics(self.flow, self.train)
        if self.held_out is None:
            return train
        total = sum(float(self.objective(self.flow, x, c)) * len(x) for x, c in self.held_out.chunks())
        return total / len(self.held_out.x)


@torch.no_grad()
def _set_batch_statistics(flow: Flow, train: _Rows) -> None:
    """Give every BatchNorm of the stack the statistics of the whole train set, in one pass from data to latent."""
    layers = flow.layers
    if not any(isinstance(layer, BatchNorm) for layer in layers):
        return
    x, context = train.x, train.context
    if context is not None:
        context = torch.cat([flow._embed(context[rows]) for rows in train.slices()])  # type: ignore[misc]
    for layer in reversed(layers):
        if isinstance(layer, BatchNorm):
            layer.set_statistics(x)
        given = layer._context_for(context)
        parts = [
            layer.inverse_and_log_det(x[rows], None if given is None else given[rows])[0] for rows in train.slices()
        ]
        x = torch.cat(parts)


@contextlib.contextmanager
def _compiled(flow: Flow) -> Iterator[None]:
    """Put compiled methods in front of the flow's own for the length of a block."""
    for method in _METHODS:
        # Train and evaluation batches each have one shape: a graph for each is faster than one for all.
        object.__setattr__(flow, method, torch.compile(getattr(flow, method), dynamic=False))
    try:
        yield
    finally:
        for method in _METHODS:
            object.__delattr__(flow, method)


class _Rows:
    """Data that lie on the device, in batches by index shuffle."""

    def __init__(self, x: Tensor, context: Tensor | None, batch_size: int):
        self.x, self.context, self.batch_size = x, context, batch_size
        self.steps = len(x) // batch_size

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(len(self.x), device=self.x.device)
        for rows in order[: self.steps * self.batch_size].split(self.batch_size):
            yield self.x[rows], None if self.context is None else self.context[rows]

    def slices(self) -> list[slice]:
        return [slice(i, i + _EVALUATION_ROWS) for i in range(0, len(self.x), _EVALUATION_ROWS)]

    def chunks(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for rows in self.slices():
            yield self.x[rows], None if self.context is None else self.context[rows]


class _Batches:
    """Batches that come from the user, such as a DataLoader's."""

    def __init__(self, batches: Iterable[Any], flow: Flow, device: torch.device):
        self.batches, self.flow, self.device = batches, flow, device
        try:
            self.steps: int | None = len(batches)  # type: ignore[arg-type]
        except TypeError:  # a stream, or a DataLoader over one
            self.steps = None

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(self.batches):
            x, context = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
            if isinstance(x, (tuple, list)) and len(x) == 1:
                x = x[0]
            if not isinstance(x, Tensor) and not hasattr(x, "__array__"):
                raise TypeError(
                    f"expected batches that are tensors or arrays, or pairs of them; got {type(x).__name__}"
                )
            yield _data(self.flow, x, context, self.device, name=f"batch {number}")


class _Steps:
    """Steps without data."""

    def __init__(self, steps: int):
        self.steps = steps

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.steps):
            yield None, None


def _prepare(
    flow: Flow,
    x: Any,
    context: Any,
    validation: Any,
    batch_size: int | None,
    steps_per_epoch: int,
    device: torch.device,
) -> tuple[_Rows | _Batches | _Steps, _Rows | None]:
    if batch_size is not None:
        check_sizes(batch_size=batch_size)
    share = 0.0
    if isinstance(validation, (Real, bool)):
        check_number("the share of validation rows", validation, "[0, 1)")
        share, validation = float(validation), None
    held_out = None
    if isinstance(validation, tuple) and len(validation) != 2:
        raise ValueError(f"expected validation as (data, context); got {len(validation)} items")
    if validation is not None:
        rows, its_context = validation if isinstance(validation, tuple) else (validation, None)
        held_out = _Rows(*_data(flow, rows, its_context, device, name="validation data"), _EVALUATION_ROWS)
        if len(held_out.x) == 0:
            raise ValueError("expected at least one row of validation data; got none")
    if not isinstance(x, Tensor) and not hasattr(x, "__array__"):
        if context is not None or batch_size is not None:
            name = "context" if context is not None else "batch_size"
            raise ValueError(f"expected {name} beside a tensor or an array alone; got it beside {type(x).__name__}")
        if x is None:
            return _Steps(steps_per_epoch), held_out
        if not isinstance(x, Iterable) or isinstance(x, str):
            raise TypeError(f"expected data as a tensor, an array or batches; got {type(x).__name__}")
        return _Batches(x, flow, device), held_out
    data, given = _data(flow, x, context, device, name="data")
    _refuse_constant_columns(data)
    if share and held_out is None:
        order = torch.randperm(len(data), device=device)
        number = max(1, int(share * len(data)))
        kept, held = order[number:], order[:number]
        held_out = _Rows(data[held], None if given is None else given[held], _EVALUATION_ROWS)
        data, given = data[kept], None if given is None else given[kept]
    if batch_size is None:
        batch_size = min(256, len(data))
    if len(data) < batch_size or len(data) == 0:
        raise ValueError(f"expected at least batch_size={batch_size} training rows; got {len(data)}")
    return _Rows(data, given, batch_size), held_out


def _data(flow: Flow, x: Any, context: Any, device: torch.device, *, name: str) -> tuple[Tensor, Tensor | None]:
    """Give data and context as tensors of the flow's dtype on the device, or say what is wrong with them."""
    data = _as_tensor(x, flow, device, name)
    if data.shape[1:] != flow.event_shape:
        expected = "(rows, " + ", ".join(map(str, flow.event_shape)) + ")"
        raise ValueError(f"expected {name} of shape {expected}; got {tuple(data.shape)}")
    embedded = flow.embedding is not None
    given = None if context is None else _as_tensor(context, flow, device, f"context of {name}", integers=embedded)
    if not embedded:
        flow.bijection._batch_shape(data.shape[:1], given)
    elif given is None:
        flow._embed(None)  # says that it is missing
    if given is not None and given.shape[: 1 if embedded else -1] != data.shape[:1]:
        raise ValueError(f"expected a context for each of {len(data)} rows; got {tuple(given.shape)}")
    return data, given


def _as_tensor(x: Any, flow: Flow, device: torch.device, name: str, *, integers: bool = False) -> Tensor:
    try:
        given = x.detach() if isinstance(x, Tensor) else torch.from_numpy(np.ascontiguousarray(np.asarray(x)))
    except TypeError:
        raise TypeError(f"expected {name} as a tensor or an array of numbers; got {type(x).__name__}") from None
    if integers and not given.is_floating_point():
        return given.to(device)
    if not given.is_floating_point():
        raise TypeError(f"expected {name} of floating-point numbers; got {given.dtype}: convert or dequantise them")
    tensor = given.to(device, flow.dtype)
    finite = tensor.isfinite()
    if not finite.all():
        where = (~finite).nonzero()
        row, *column = where[0].tolist()
        number = given[(row, *column)]
        raise ValueError(
            f"expected finite numbers in {name}; got {float(number)} in row {row}, column {', '.join(map(str, column))}"
            f"{f', beyond the range of {flow.dtype}' if number.isfinite() else ''} ({len(where)} such numbers in all)"
        )
    return tensor


def _refuse_constant_columns(data: Tensor) -> None:
    if len(data) < 2:
        raise ValueError(f"expected at least 2 rows of data; got {len(data)}")
    constant = (data == data[0]).all(0).flatten().nonzero()[:, 0].tolist()
    if constant:
        shown = ", ".join(map(str, constant[:10])) + (", ..." if len(constant) > 10 else "")
        raise ValueError(f"expected columns that vary, since a constant one has no density; got column {shown}")


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed torch for the length of a block, and give its random state back afterwards."""
    if seed is None:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
