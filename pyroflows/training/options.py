"""Options of a fit that most users leave alone, and what a fit did."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyroflows.arguments import check_number, check_option, check_sizes

__all__ = ["FitOptions", "FitResult"]


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """Options of a fit that most users leave alone.

    Args:
        optimizer: "adam" (fused) or "adamax".
        weight_decay: L2 penalty on all parameters.
        schedule: "cosine" (to zero) or "constant".
        warmup: share of training during which the learning rate rises, below 1, or a number of steps.
        max_grad_norm: largest norm of the gradient; None for no clipping.
        ema_decay: decay of an exponential moving average of the weights, such as 0.999, which is then evaluated and
            kept; 0 for none. It looks back over at most a fifth of the steps taken.
        accumulate: parts in which a batch is run, one after another, so that larger batches fit into memory. The step
            is that of the whole batch if the objective is a mean over rows; norms that start from data see one part.
        steps_per_epoch: steps in an epoch; by default a pass over the rows, or 100 without data. With an array, a
            shuffle then runs on through epochs until all rows were seen.
        judge_start: whether the weights before the first step are a candidate for the best ones, as epoch -1, if rows
            are held out.
        max_skipped: steps in a row that may be skipped, because loss or gradient is not finite, before the fit ends.
        augment: function from the ``x`` of a training batch, before dequantization, to another of the same shape, such
            as images mirrored at random.
        activation_checkpointing: keep only the inputs of layers (of a multiscale flow: of steps) for the gradient, and
            run each again when it is taken: a third more time, and memory that hardly grows with the number of layers.
        channels_last: use ``torch.channels_last`` for images and the weights of convolutions.
        compile: run the flow's methods through ``torch.compile``: a minute of compiling, then steps of about half the
            time for splines, two thirds for affine layers (on a CPU; needs a C++ compiler).
        strategy: how several processes share the flow: "ddp", which "auto" stands for, has a copy in each; "fsdp"
            shards parameters, gradients and optimizer state, for a flow too large for one device. With "fsdp" an
            objective may call only the methods that compute a log-density; to evaluate, each process has a copy.
        precision: "bf16-mixed" to train conditioners and embedding, not maps and densities, in bfloat16; or None.
        checkpoint_seconds: seconds between two writes of the checkpoint, at a step; the end is always written.
        checkpoint_steps: steps between two writes of the checkpoint. Without either it is written after each epoch.

    Raises:
        TypeError: an option is of another type.
        ValueError: an option is out of range, or cannot be combined with another.

    Example:
        >>> FitOptions(weight_decay=1e-4, ema_decay=0.999).max_grad_norm
        5.0
    """

    optimizer: str = "adam"
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.05
    max_grad_norm: float | None = 5.0
    ema_decay: float = 0.0
    accumulate: int = 1
    steps_per_epoch: int | None = None
    judge_start: bool = False
    max_skipped: int = 20
    augment: Callable[[Tensor], Tensor] | None = None
    activation_checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False
    strategy: str = "auto"
    precision: str | None = None
    checkpoint_seconds: float | None = None
    checkpoint_steps: int | None = None

    def __post_init__(self) -> None:
        check_option("optimizer", self.optimizer, ("adam", "adamax"))
        check_option("schedule", self.schedule, ("cosine", "constant"))
        check_option("strategy", self.strategy, ("auto", "ddp", "fsdp"))
        if self.precision not in (None, "bf16-mixed"):
            raise ValueError(f"expected precision to be None or 'bf16-mixed'; got {self.precision!r}")
        check_number("weight_decay", self.weight_decay, "[0, inf)")
        check_number("warmup", self.warmup, "[0, inf)")
        check_number("ema_decay", self.ema_decay, "[0, 1)")
        check_number("max_grad_norm", self.max_grad_norm, "(0, inf)", optional=True)
        check_number("checkpoint_seconds", self.checkpoint_seconds, "(0, inf)", optional=True)
        check_sizes(accumulate=self.accumulate, max_skipped=self.max_skipped)
        check_sizes(optional=True, steps_per_epoch=self.steps_per_epoch, checkpoint_steps=self.checkpoint_steps)
        if self.augment is not None and not callable(self.augment):
            raise TypeError(f"expected augment to be a function; got {type(self.augment).__name__}")
        if self.compile and self.precision == "bf16-mixed" and torch.__version__ < "2.14":
            raise ValueError(
                "compile=True cannot be combined with precision='bf16-mixed' before torch 2.14, whose compiler traces "
                f"autocast; got torch {torch.__version__}"
            )
        if self.compile and self.activation_checkpointing:
            raise ValueError("compile=True cannot be combined with activation_checkpointing=True")
        if self.strategy == "fsdp" and (self.compile or self.channels_last):
            raise ValueError("strategy='fsdp' cannot be combined with compile=True or channels_last=True")


@dataclass
class FitResult:
    """What a fit did.

    Args:
        history: per epoch, lists under "train" and "validation" (mean loss in nats), "gradient_norm" (mean, before
            clipping), "learning_rate" (at the end) and "seconds" (since the start).
        best_epoch: the epoch whose weights the flow has, counted from 0; None if no epoch gave a finite loss, -1 for
            the weights before the first, see ``judge_start`` of :class:`FitOptions`.
        best_loss: its loss on the validation rows, or on the training rows without any.
        stopped: why the fit ended.
        steps: the optimizer steps taken.
        skipped_steps: the steps skipped because loss or gradient was not finite.
        seconds: wall time, over all runs of a fit with a checkpoint.
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
