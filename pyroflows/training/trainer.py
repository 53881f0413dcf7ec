"""The training loop, its optimizers and the statistics of its batch norms."""

import inspect
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pyroflows import distributed
from pyroflows.contexts import random_state, set_random_state
from pyroflows.flow import Flow
from pyroflows.layers.norms import BatchNorm
from pyroflows.training.batches import Batch, Batches, Rows, Steps, as_channels_last, parts_of
from pyroflows.training.checkpoint import Checkpoint
from pyroflows.training.options import FitOptions, FitResult

__all__ = ["Adam", "Adamax", "Trainer"]

_SAVED = ("epoch_step", "sums", "skipped", "best_weights")  # attributes of a trainer
_STATISTICS_ROWS = 2**17  # of data in a file
_MIN_EPOCH = 10  # steps of an epoch of patience
_EARLY, _LATE = 0.02, 0.9  # shares of max_seconds from which on it is judged whether the fit will reach it
_PACE_STEPS = 10  # from which the time of the steps left is told


def _without_compiler(optimizer: type[torch.optim.Optimizer]) -> Any:
    """Derive an optimizer without the wrappers of its methods that import torch's compiler, which takes seconds."""
    names = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
    methods: dict[str, Any] = {name: inspect.unwrap(getattr(optimizer, name)) for name in names}
    methods["step"] = torch.no_grad()(inspect.unwrap(optimizer.step))
    return type(optimizer.__name__, (optimizer,), methods)


Adam = _without_compiler(torch.optim.Adam)
Adamax = _without_compiler(torch.optim.Adamax)


@dataclass
class Trainer:
    """The training loop and its state."""

    flow: Flow  # gets the best weights
    trained: Any  # what the objective gets: the flow, a stand-in with compiled methods, or a sharded copy
    train: Rows | Batches | Steps
    held_out: Rows | None
    objective: Callable[..., Tensor]
    learning_rate: float
    options: FitOptions
    checkpoint: Checkpoint | None
    epochs: int
    patience: int | None
    max_seconds: float | None

    def __post_init__(self) -> None:
        self.device = self.flow.device
        self.sharded = isinstance(self.trained, Flow) and self.trained is not self.flow
        self.parameters = list(self.trained.parameters())
        self.trainable = [p for p in self.parameters if p.requires_grad]
        # Adam is fused, so that it can skip a step without waiting for the device.
        kind, implementation = (Adam, "fused") if self.options.optimizer == "adam" else (Adamax, "foreach")
        decay = float(self.options.weight_decay)
        self.optimizer = kind(self.trainable, self.learning_rate, weight_decay=decay, **{implementation: True})
        self.ema = [p.detach().clone() for p in self.parameters] if self.options.ema_decay else []
        self.result = FitResult({k: [] for k in ("train", "validation", "gradient_norm", "learning_rate", "seconds")})
        self.total_steps = self.epochs * self.train.steps if self.train.steps else None
        # On the device, so that no step waits for it.
        self.skipped = torch.zeros(2, device=self.device)  # steps, in all and in a row
        self.sums = torch.zeros(3, device=self.device)  # of this epoch: losses, gradient norms, steps not skipped
        self.epoch_step = 0
        self.pace_start: tuple[int, float] | None = None  # steps and seconds after the first, which may compile
        self.ends_by_time: tuple[float, float] | None = None  # shares of time and schedule when that was sure
        self.best_weights = self._weights()  # the initial ones, until an epoch is the best
        self.began = time.perf_counter()

    def run(self, progress: bool | str | None) -> FitResult:
        """Train until there is a reason to stop, and leave the flow with its best weights."""
        result = self.result
        try:
            with _progress_bar(progress, self.total_steps, result.steps) as bar:
                if self.options.judge_start and self.held_out is not None and not result.steps:
                    loss = self._evaluate(math.nan)
                    result.best_loss, result.best_epoch = (loss, -1) if math.isfinite(loss) else (math.inf, None)
                while not result.stopped:
                    train_loss, gradient_norm = self._epoch(bar)
                    self.total_steps = self.total_steps or self.epochs * result.steps
                    _swap(self.parameters, self.ema)
                    self._record(train_loss, self._evaluate(train_loss), gradient_norm)
                    _swap(self.parameters, self.ema)
                    result.stopped = self._stop_reason()
                    self._save(epoch_ended=True)
        finally:
            # Also after an interrupt or an error of the objective the flow has its best weights, after an epoch.
            if result.best_epoch is not None or self._diverged():
                self.flow.load_state_dict(self.best_weights)
            self.flow.eval()
        distributed.synchronize(self.flow)
        return result

    def _epoch(self, bar: Any) -> tuple[float, float]:
        """Train for an epoch, or the rest of one; return the mean loss and gradient norm."""
        self.trained.train()
        shown = 0.0
        # Reading the count makes a GPU wait, so there it is read now and then.
        checked_steps = 1 if self.device.type == "cpu" else 50
        for batch in self.train.epoch(self.epoch_step):
            elapsed = time.perf_counter() - self.began if self.max_seconds is None else self._seconds()
            _set_learning_rate(self, elapsed)
            with distributed.rank_rng():
                loss, norm, bad = self._step(batch)
            self.sums += torch.where(bad > 0, 0, torch.stack([loss, norm, torch.ones_like(loss)]).float())
            self.result.steps += 1
            self.epoch_step += 1
            bar.update()
            if elapsed - shown > 0.5 and not bar.disable:
                shown = elapsed
                if self.max_seconds is not None and self.total_steps:  # so that the bar's end is that of the fit
                    possible = int(self.result.steps * self.max_seconds / elapsed)
                    bar.total = max(min(self.total_steps, possible), self.result.steps)
                bar.set_postfix(loss=f"{float(loss):.3f}")
            if self.max_seconds is not None and elapsed >= self.max_seconds:
                break
            if (self.epoch_step - 1) % checked_steps == 0 and self._diverged():
                break
            self._save()
        if not self.epoch_step:
            raise ValueError(
                f"expected batches in every epoch; got none in epoch {len(self.result.history['train'])}: "
                "a generator can be read once, a list or a DataLoader again"
            )
        loss, norm, steps = self.sums.tolist()
        self.epoch_step = 0
        self.sums.zero_()
        return (loss / steps, norm / steps) if steps else (math.nan, math.nan)

    def _step(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Take a step; return the loss, the norm of the gradient, and 1 if either is not finite, else 0."""
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for part in parts_of(batch, self.options):
            with distributed.weighted_rows(part.weights):
                loss = self.objective(self.trained, *part.inputs)
                if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
                    got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                    raise TypeError(f"expected an objective that returns a scalar tensor with a gradient; got {got}")
                share = part.share * batch.share
                loss = loss if share == 1 else loss * share
                # FSDP averages gradients over the ranks. Checkpointed layers run again, so within the block.
                (loss * distributed.world_size() if self.sharded else loss).backward()
            losses.append(loss.detach())
        loss = torch.stack(losses).sum()
        if distributed.world_size() > 1:
            loss = distributed.all_reduce(loss) if self.sharded else _sum_gradients(self.trainable, loss)
        max_norm = math.inf if self.options.max_grad_norm is None else float(self.options.max_grad_norm)
        norm = _gather(nn.utils.clip_grad_norm_(self.parameters, max_norm, foreach=True))
        bad = (~(loss.isfinite() & norm.isfinite())).float()
        if self.options.optimizer == "adam":
            # The fused optimizer reads this flag on the device, and skips the step.
            self.optimizer.found_inf = bad
            self.optimizer.step()
        elif not bad:  # waits for a GPU, which is little next to a step of a flow of images
            self.optimizer.step()
        self.skipped += bad
        self.skipped[1] *= bad
        if self.ema:
            # Early on, the average looks back over a fifth of the steps: the first ones are soon forgotten.
            decay = min(float(self.options.ema_decay), 1 - 5 / (self.result.steps + 5))
            get_ema_multi_avg_fn(decay)(self.ema, [p.detach() for p in self.parameters], None)
        return loss, norm, bad

    @torch.no_grad()
    def _evaluate(self, train_loss: float) -> float:
        """Return the loss on the held-out rows, in the flow's precision; without such rows that of training."""
        if self.sharded:
            self.flow.load_state_dict(_gather(self.trained.state_dict()))
        flow = self.flow if self.sharded else self.trained
        flow.eval()
        rows, total = self.held_out, 0.0
        with distributed.rank_rng():
            if isinstance(self.train, Rows):
                _set_batch_statistics(self.flow, self.train)
            if rows is not None:
                for part in rows.slices():
                    inputs = as_channels_last(rows[part], self.options).inputs
                    total += float(self.objective(flow, *inputs)) * (part.stop - part.start)
        if self.sharded:
            for buffer, value in zip(self.trained.buffers(), self.flow.buffers(), strict=True):
                buffer.copy_(value)  # the statistics of batch norms
        return train_loss if rows is None else sum(distributed.all_gather(total)) / len(rows)

    def _record(self, train_loss: float, loss: float, gradient_norm: float) -> None:
        """Add an epoch to the history, and keep its weights, which the flow has, if they are the best."""
        result, history = self.result, self.result.history
        history["train"].append(train_loss)
        if self.held_out is not None:
            history["validation"].append(loss)
        history["gradient_norm"].append(gradient_norm)
        history["learning_rate"].append(self.optimizer.param_groups[0]["lr"])
        history["seconds"].append(self._seconds())
        result.skipped_steps, result.seconds = int(self.skipped[0]), history["seconds"][-1]
        # Without held-out rows the last epoch is the best: a lower training loss before it was luck. An epoch that
        # ended in steps that were not finite may have weights that diverged before.
        better = loss < result.best_loss or self.held_out is None
        if math.isfinite(loss) and better and not self._diverged():
            result.best_loss, result.best_epoch = loss, len(history["train"]) - 1
            self.best_weights = self._weights()

    def _stop_reason(self) -> str:
        if self._diverged():
            return f"loss or gradient not finite in {self.options.max_skipped} steps in a row"
        if self.max_seconds is not None and self.result.seconds >= self.max_seconds:
            return f"max_seconds={self.max_seconds:.4g} reached"
        epoch = len(self.result.history["train"]) - 1
        waited = epoch - (self.result.best_epoch or 0)
        steps = self.result.steps / (epoch + 1)  # of an epoch
        if self.patience is not None and self.held_out is not None and self.ends_by_time is None:
            patience = self.patience if steps >= _MIN_EPOCH else math.ceil(self.patience * _MIN_EPOCH / steps)
            if waited >= patience:
                return f"no better validation loss in {patience} epochs"
        return f"all {self.epochs} epochs done" if epoch >= self.epochs - 1 else ""

    def _diverged(self) -> bool:
        return bool(self.skipped[1] >= self.options.max_skipped)

    def _seconds(self) -> float:
        """Return the time since the start, by the first rank's clock."""
        return float(distributed.broadcast(time.perf_counter() - self.began))

    def _weights(self) -> dict[str, Tensor]:
        # In the CPU's memory: a GPU's is short with a large flow.
        return {name: value.to("cpu", copy=True) for name, value in self.flow.state_dict().items()}

    def _save(self, *, epoch_ended: bool = False) -> None:
        """Write the checkpoint, if it is due."""
        if self.checkpoint is None:
            return
        seconds = self._seconds() if self.checkpoint.seconds is not None else 0.0
        if self.result.stopped or self.checkpoint.due(seconds, self.result.steps, epoch_ended=epoch_ended):
            state = self._state()
            if distributed.rank() == 0:
                self.checkpoint.save(state)
            self.checkpoint.written = seconds, self.result.steps

    def _state(self) -> dict[str, Any]:
        """Return all that the next step depends on."""
        result = self.result
        result.seconds = result.history["seconds"][-1] if result.stopped else self._seconds()
        with distributed.rank_rng():
            rank_random_states = distributed.all_gather(random_state(self.device))
        return {
            **{name: getattr(self, name) for name in _SAVED},
            "result": asdict(result),
            "steps_per_epoch": self.total_steps // self.epochs if self.total_steps else None,
            "weights": _gather(self.trained.state_dict()),
            "ema": _gather(self.ema),
            "optimizer": _gather(self.optimizer.state_dict()),
            "position": self.train.position,
            "random_state": random_state(self.device),
            "rank_random_states": rank_random_states,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from the state of a checkpoint, whose weights the flow has."""
        vars(self).update({name: state[name] for name in _SAVED})
        self.sums, self.skipped = self.sums.to(self.device), self.skipped.to(self.device)
        self.result = FitResult(**state["result"])
        if state["steps_per_epoch"]:
            self.total_steps = self.epochs * state["steps_per_epoch"]
        for average, value in zip(self.ema, state["ema"], strict=True):
            average.copy_(_shard_like(value, average))
        moments = state["optimizer"]["state"]
        for number, values in moments.items():
            like = self.trainable[number]
            moments[number] = {k: v if v.dim() == 0 else _shard_like(v, like) for k, v in values.items()}
        self.optimizer.load_state_dict(state["optimizer"])
        self.train.position = state["position"]
        self.began = time.perf_counter() - self.result.seconds
        set_random_state(state["random_state"], self.device)
        if len(state["rank_random_states"]) == distributed.world_size():  # else the others start new ones
            with distributed.rank_rng():
                set_random_state(state["rank_random_states"][distributed.rank()], self.device)
        if self.checkpoint is not None:
            self.checkpoint.written = self.result.seconds, self.result.steps
        if not self.epoch_step:
            self.result.stopped = self._stop_reason()


def _set_learning_rate(trainer: "Trainer", elapsed: float) -> None:
    """Set the rate by the share of the schedule that is done."""
    steps, total, warmup = trainer.result.steps, trainer.total_steps, trainer.options.warmup
    done, factor = _share_done(trainer, elapsed), 1.0
    if warmup >= 1:
        factor = min(1.0, (steps + 1) / warmup)
    elif warmup:  # until the number of steps is known, a hundred warm up
        factor = min(1.0, (done + (1 / total if total else warmup * (steps + 1) / 100)) / warmup)
    if trainer.options.schedule == "cosine":
        factor = factor * (1 + math.cos(math.pi * done)) / 2
    for group in trainer.optimizer.param_groups:
        group["lr"] = trainer.learning_rate * factor


def _share_done(trainer: "Trainer", elapsed: float) -> float:
    """Return the share of the steps taken, if their number is known, until it is sure that a limit of time comes first.

    A limit that is not reached changes nothing. That it will be is sure soon where only it or the last step ends the
    fit; where patience may, only late, and patience then no longer ends it. What is left of the schedule takes the time
    that is left.
    """
    steps, limit = trainer.result.steps, trainer.max_seconds
    done = steps / trainer.total_steps if trainer.total_steps else 0.0
    if limit is None or not steps:
        return done
    if trainer.pace_start is None:
        trainer.pace_start = steps, elapsed
    share, counted = min(elapsed / limit, 1.0), steps - trainer.pace_start[0]
    if trainer.ends_by_time is None and counted and share > _EARLY:
        steps_left = (trainer.total_steps or trainer.epochs * steps) - steps  # of a stream there may be more
        needed = steps_left * (elapsed - trainer.pace_start[1]) / counted
        is_patient = trainer.patience is not None and trainer.held_out is not None
        is_sure = not is_patient and counted >= _PACE_STEPS and needed > 2 * (limit - elapsed)
        if is_sure or (share > _LATE and needed > limit - elapsed):
            trainer.ends_by_time = share, done
    if trainer.ends_by_time is not None:
        share_then, done_then = trainer.ends_by_time
        done = done_then + (1 - done_then) * (share - share_then) / max(1 - share_then, 1e-9)
    return done


@torch.no_grad()
def _swap(parameters: list[nn.Parameter], averages: list[Tensor]) -> None:
    """Swap the weights that are trained with their averages, if there are any."""
    for parameter, average in zip(parameters, averages, strict=False):
        trained = parameter.clone()
        parameter.copy_(average)
        average.copy_(trained)


@torch.no_grad()
def _set_batch_statistics(flow: Flow, train: Rows) -> None:
    """Set the statistics of every BatchNorm of the stack from the training rows, in one pass from data to latent."""
    if not any(isinstance(layer, BatchNorm) for layer in flow.layers):
        return
    train = train.sample(_STATISTICS_ROWS)
    chunks = [train[rows] for rows in train.slices()]
    xs = [chunk.x if flow.dequantizer is None else flow.dequantizer(chunk.x)[0] for chunk in chunks]
    contexts = [None if chunk.context is None else flow.embed(chunk.context) for chunk in chunks]
    weights = None if train.weights is None else torch.cat([cast(Tensor, chunk.weights) for chunk in chunks])
    for layer in reversed(flow.layers):
        if isinstance(layer, BatchNorm):
            with distributed.weighted_rows(weights):
                layer.set_statistics(torch.cat(xs))
        xs = [layer.inverse_and_log_det(x, layer.context_for(c))[0] for x, c in zip(xs, contexts, strict=True)]


def _gather(tree: Any) -> Any:
    """Return a tree of lists and dicts with sharded tensors gathered; called on all ranks at once."""
    if isinstance(tree, dict):
        return {name: _gather(value) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_gather(value) for value in tree]
    return tree.full_tensor() if hasattr(tree, "full_tensor") else tree


@torch.no_grad()
def _shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a tensor sharded as another is, if it is; called on all ranks at once."""
    from torch.distributed.tensor import distribute_tensor

    if not hasattr(other, "placements"):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)  # type: ignore[attr-defined]


def _sum_gradients(parameters: list[nn.Parameter], loss: Tensor) -> Tensor:
    """Sum gradients, in place, and the loss over the ranks."""
    # Not by DistributedDataParallel, which sees only calls of a module's `forward`, and expects a gradient of every
    # parameter: an objective may call any of a flow's methods, several times, and leave parameters out.
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    parts = [*(gradient.flatten() for gradient in gradients), loss.to(gradients[0])[None]]
    sums = distributed.all_reduce(torch.cat(parts)).split([len(part) for part in parts])
    for parameter, gradient, total in zip(parameters, gradients, sums, strict=False):
        parameter.grad = gradient.copy_(total.view_as(gradient))  # in its layout, the one that a fused optimizer knows
    return sums[-1][0]


def _progress_bar(progress: bool | str | None, total: int | None, done: int) -> Any:
    """Return a bar of steps on the first rank: shown or not; by default, and with a label, shown on a terminal only."""
    from tqdm.auto import tqdm

    label = progress if isinstance(progress, str) else None
    disable = True if distributed.rank() else not progress if isinstance(progress, bool) else None
    return tqdm(total=total, initial=done, desc=label, disable=disable, unit="step", leave=False)
