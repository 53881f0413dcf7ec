"""Stacks of bijections."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyroflows.arguments import check_log_det, check_type
from pyroflows.bijection import Bijection, Pair, Triple

__all__ = ["Compose", "as_bijections"]


def as_bijections(name: str, bijections: Iterable[Bijection]) -> list[Bijection]:
    """Return the parts of a stack as a list: at least one, with contexts of one length."""
    check_type(f"a sequence of {name}s", bijections, Iterable)
    bijections = list(bijections)
    if not bijections:
        raise ValueError(f"expected at least one {name}; got none")
    for bijection in bijections:
        check_type(f"{name}s that are Bijections", bijection, Bijection)
    contexts = sorted({bijection.context_features for bijection in bijections} - {0})
    if len(contexts) > 1:
        raise ValueError(f"expected {name}s of one context length; got context_features of {contexts}")
    return bijections


class Compose(Bijection):
    r"""A stack of bijections, the first nearest the latent; a context goes to every layer that takes one.

    .. math:: \log|\det dy/dx| = \sum_k \log|\det dx_k / dx_{k-1}|

    Args:
        layers: bijections whose shapes follow on one another.

    Shapes:
        x: ``(*batch, *layers[0].latent_shape)``; y: ``(*batch, *layers[-1].data_shape)``.

    Raises:
        ValueError: no layer, shapes that do not follow, or contexts of different lengths.

    Example:
        >>> from pyroflows.layers import LULinear, Permutation
        >>> stack = Compose([LULinear(4), Permutation(4, "reverse")])
        >>> stack(torch.zeros(3, 4)).shape
        torch.Size([3, 4])
    """

    activation_checkpointing: bool = False
    """Whether to keep only each layer's input for the gradient, and evaluate the layer again when it is taken."""

    def __init__(self, layers: Iterable[Bijection]):
        layers = as_bijections("layer", layers)
        for number, (below, above) in enumerate(pairwise(layers)):
            if below.data_shape != above.latent_shape:
                raise ValueError(
                    f"expected layer {number + 1} to take shape {tuple(below.data_shape)}, "
                    f"as layer {number} gives it; got {tuple(above.latent_shape)}"
                )
        context_features = max(layer.context_features for layer in layers)
        super().__init__(layers[0].latent_shape, data_shape=layers[-1].data_shape, context_features=context_features)
        self.layers = nn.ModuleList(layers)
        self.domain, self.codomain = layers[0].domain, layers[-1].codomain
        self.forward_passes = sum(layer.forward_passes for layer in layers)
        self.inverse_passes = sum(layer.inverse_passes for layer in layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Bijection]:
        return iter(self.layers)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Bijection:
        return self.layers[index]  # type: ignore[return-value]

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Pair:
        y, log_det = self._run("forward_and_log_det", (x,), context)
        return y, log_det

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> Pair:
        x, log_det = self._run("inverse_and_log_det", (y,), context)
        return x, log_det

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Triple:
        y, log_det, score = self._run("forward_and_score", (x, score), context)
        return y, log_det, score

    def inverse_and_score(self, y: Tensor, score: Tensor, context: Tensor | None = None) -> Triple:
        x, log_det, score = self._run("inverse_and_score", (y, score), context)
        return x, log_det, score

    def _run(self, name: str, inputs: tuple[Tensor, ...], context: Tensor | None) -> tuple[Tensor, ...]:
        """Apply one method of every layer, and sum the log-determinants."""
        layers: list[Any] = list(self.layers)
        forward = name.startswith("forward")
        layers = layers if forward else layers[::-1]
        checkpointing = self.activation_checkpointing and torch.is_grad_enabled() and name.endswith("log_det")
        x, total = inputs[0], None
        batch = x.shape[: x.dim() - len(self.latent_shape if forward else self.data_shape)]
        for layer in layers:
            method = getattr(layer, f"unchecked_{name}")
            if checkpointing and not _checkpoints_within(layer):
                method = _checkpointed(layer, method)
            x, log_det, *score = method(*inputs, layer.context_for(context))
            check_log_det(layer, log_det, batch)
            inputs = (x, *score)
            total = log_det if total is None else total + log_det
        return (x, total, *score)


def _checkpoints_within(layer: Bijection) -> bool:
    return any(isinstance(part, Compose) and part.activation_checkpointing for part in layer.modules())


def _checkpointed(layer: Bijection, method: Callable[..., Any]) -> Callable[..., Any]:
    contexts = {"context_fn": lambda: (nullcontext(), _frozen_averages(layer))}
    return functools.partial(checkpoint, method, use_reentrant=False, **contexts)


@contextmanager
def _frozen_averages(layer: Bijection) -> Iterator[None]:
    """Keep the running averages of batch norms, which must follow a batch only once."""
    averages = [
        buffer
        for part in layer.modules()
        if part.training and hasattr(part, "momentum")
        for buffer in part.buffers(recurse=False)
    ]
    before = [buffer.clone() for buffer in averages]
    try:
        yield
    finally:
        for buffer, value in zip(averages, before, strict=True):
            buffer.data.copy_(value)  # past autograd, whose saved tensors have not changed
