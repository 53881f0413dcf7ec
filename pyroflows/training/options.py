"""Options of a fit that most users leave alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

__all__ = ["FitOptions"]


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """Options of a fit that most users leave alone; the trainer and the checkpoint read them as well.

    Args:
        optimizer: "adam" (fused) or "adamax".
        weight_decay: L2 penalty on all parameters.
        schedule: "cosine" (to zero) or "constant".
        warmup: share of training during which the learning rate rises.
        max_grad_norm: largest norm of the gradient; None for no clipping.
        ema_decay: decay of an exponential moving average of the weights, such as 0.999, which is then evaluated and
            kept; 0 for none. It looks back over at most a fifth of the steps taken.
        accumulate: parts in which a batch is run, one after another, so that larger batches fit into memory.
        steps_per_epoch: steps in an epoch; by default a full pass, or 100 if there are no data.
        max_skipped: consecutive steps that may be skipped because loss or gradient is not finite.
        augment: function from the ``x`` of a training batch, before dequantization, to another like it.
        activation_checkpointing: keep only the inputs of layers for the gradient, and run each layer again for it.
        channels_last: use ``torch.channels_last`` for images and the weights of convolutions.
        compile: run the flow's methods through ``torch.compile`` while it trains.
        strategy: "ddp", which "auto" stands for, or "fsdp", which shards parameters, gradients and optimizer state.
        precision: "bf16-mixed" to run the networks in bfloat16; None for the flow's own precision.
        checkpoint_seconds: seconds between two writes of the checkpoint.
        checkpoint_steps: steps between two writes of the checkpoint.

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
    max_skipped: int = 20
    augment: Callable[[Tensor], Tensor] | None = None
    activation_checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False
    strategy: str = "auto"
    precision: str | None = None
    checkpoint_seconds: float | None = None
    checkpoint_steps: int | None = None
