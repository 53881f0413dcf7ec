"""Class labels as a context."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyroflows.arguments import check_sizes

__all__ = ["OneHot"]


class OneHot(nn.Module):
    """Class labels as vectors of zeros and a one, the embedding of class-conditional flows.

    Args:
        num_classes: number of classes, labelled from 0.

    Shapes:
        labels: ``(*batch,)``, integers; output: ``(*batch, num_classes)``.

    Raises:
        TypeError: the labels are not integers.
        ValueError: a label is not one of the classes (looked for on the CPU alone, where it costs nothing).

    Example:
        >>> OneHot(3)(torch.tensor([2, 0]))
        tensor([[0., 0., 1.],
                [1., 0., 0.]])
    """

    table: Tensor

    def __init__(self, num_classes: int):
        super().__init__()
        check_sizes(num_classes=num_classes)
        self.register_buffer("table", torch.eye(num_classes), persistent=False)

    def forward(self, labels: Tensor) -> Tensor:
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"expected class labels that are integers; got {labels.dtype}")
        if labels.device.type == "cpu" and labels.numel() and not torch.compiler.is_compiling():
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= len(self.table):
                raise ValueError(f"expected class labels from 0 to {len(self.table) - 1}; got {low} to {high}")
        return self.table[labels.long()]

    def extra_repr(self) -> str:
        return str(len(self.table))
