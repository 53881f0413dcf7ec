"""One-hot class labels as a context."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows.arguments import check_sizes
from pyroflows.private import inside_functorch
from pyroflows.recipe import Recorded

__all__ = ["OneHot"]


class OneHot(Recorded, nn.Module):
    """One-hot vectors of class labels, the embedding of class-conditional flows.

    Args:
        num_classes: number of classes, labelled from 0.

    Shapes:
        labels: ``(*batch,)``, integers; output: ``(*batch, num_classes)``.

    Raises:
        TypeError: the labels are not integers.
        ValueError: a label is not one of the classes; a call checks this only on a CPU, :meth:`check` on any device.

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
        self.check_dtype(labels)
        # A compiled graph and a mapped function cannot read values.
        if labels.device.type == "cpu" and not torch.compiler.is_compiling() and not inside_functorch():
            self.check(labels)
        return F.embedding(labels.long(), self.table)

    def check(self, labels: Tensor) -> None:
        """Raise an error for labels that are not those of the classes."""
        self.check_dtype(labels)
        if not labels.numel():
            return
        highest = len(self.table) - 1
        if labels.min() < 0 or labels.max() > highest:
            others = labels[(labels < 0) | (labels > highest)].unique().tolist()
            raise ValueError(f"expected class labels from 0 to {highest}; got {_listed(others)}")

    @staticmethod
    def check_dtype(labels: Tensor) -> None:
        """Raise a TypeError for labels that are not integers."""
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"expected class labels that are integers; got {labels.dtype}")

    def extra_repr(self) -> str:
        return str(len(self.table))


def _listed(labels: list[int]) -> str:
    """Return a few labels as text, or the number and range of many, in ascending order."""
    if len(labels) > 5:
        return f"{len(labels)} others, from {labels[0]} to {labels[-1]}"
    *first, last = map(str, labels)
    return f"{', '.join(first)} and {last}" if first else last
