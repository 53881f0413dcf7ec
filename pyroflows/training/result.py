"""What a fit did."""

import math
from dataclasses import dataclass, field

__all__ = ["FitResult"]


@dataclass
class FitResult:
    """What a fit did.

    Args:
        history: per epoch, lists under "train" and "validation" (mean loss in nats), "gradient_norm" (mean, before
            clipping), "learning_rate" (at the end) and "seconds" (since the start).
        best_epoch: the epoch whose weights the flow has, counted from 0; None if no epoch gave a finite loss.
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
