"""Samples, reconstructions and interpolations of a flow of images, as levels of pixels."""

from typing import Any

import torch
from torch import Tensor

from pyroflows.arguments import check_integer, check_sizes
from pyroflows.contexts import evaluating, seeded
from pyroflows.flow import Flow

__all__ = ["interpolate", "reconstruct", "sample_images"]


@torch.no_grad()
def sample_images(
    flow: Flow,
    num: int,
    *,
    temperature: float = 1.0,
    labels: Tensor | None = None,
    batch_size: int = 64,
    seed: int | None = None,
) -> Tensor:
    """Draw images as levels of pixels.

    Args:
        flow: a flow with a dequantizer.
        num: number of images, for each label if there are labels.
        temperature: factor of the latent's deviations; about 0.7 looks best, 1 is the model.
        labels: class labels, or contexts, of a flow that takes them.
        batch_size: number of images drawn at once.
        seed: seed of the draws, which then leave torch's random state as it was; None for the global generator.

    Shapes:
        labels: ``(num_labels,)``; images: ``(num, C, H, W)``, or ``(num_labels, num, C, H, W)``.

    Raises:
        ValueError: no dequantizer, a size that is not positive, no labels, or a prior without temperature.

    Example:
        >>> from pyroflows import UniformDequantizer, glow
        >>> flow = glow((1, 8, 8), num_levels=1, num_steps=1, dequantizer=UniformDequantizer((1, 8, 8), 17))
        >>> sample_images(flow, 3, temperature=0.7, seed=0).shape
        torch.Size([3, 1, 8, 8])
    """
    dequantizer = _dequantizer(flow)
    check_sizes(num=num, batch_size=batch_size)
    if labels is not None and (not isinstance(labels, Tensor) or not labels.dim() or not len(labels)):
        got = f"the shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"expected labels as a tensor, at least one; got {got}")
    contexts = [None] if labels is None else [label.to(flow.device) for label in labels]
    sizes = [min(batch_size, num - start) for start in range(0, num, batch_size)]
    with evaluating(flow), seeded(seed, flow.device):
        images = [
            torch.cat([dequantizer.quantize(flow.sample((n,), context, temperature=temperature)) for n in sizes])
            for context in contexts
        ]
    if images[0].shape[1:] != flow.event_shape:
        raise ValueError(f"expected labels of one class, or one context, each; got the shape {tuple(labels.shape)}")  # type: ignore[union-attr]
    return images[0] if labels is None else torch.stack(images)


@torch.no_grad()
def reconstruct(flow: Flow, images: Tensor, context: Tensor | None = None) -> Tensor:
    """Map images to the latent and back, which returns the same images if the flow inverts.

    Args:
        flow: a flow with a dequantizer.
        images: levels of pixels.
        context: the context of each image, if the flow takes one.

    Shapes:
        images, result: ``(num, C, H, W)``.

    Raises:
        TypeError, ValueError: the flow has no dequantizer, or the images have other levels or another shape.

    Example:
        >>> from pyroflows import UniformDequantizer, glow
        >>> flow = glow((1, 8, 8), num_levels=1, num_steps=1, dequantizer=UniformDequantizer((1, 8, 8), 17))
        >>> images = torch.randint(17, (5, 1, 8, 8), dtype=torch.uint8)
        >>> torch.equal(reconstruct(flow, images), images)
        True
    """
    dequantizer = _dequantizer(flow)
    with evaluating(flow):
        y, _ = dequantizer(images)
        return dequantizer.quantize(flow.decode(flow.encode(y, context), context))


@torch.no_grad()
def interpolate(flow: Flow, start: Tensor, end: Tensor, num: int = 8, *, context: Tensor | None = None) -> Tensor:
    """Interpolate between pairs of images along straight lines in the latent.

    Args:
        flow, context: as in :func:`reconstruct`, which says what is refused; a context for each pair.
        start, end: the first and the last image of each pair, levels of pixels.
        num: number of images from start to end, both included, at least 2.

    Shapes:
        start, end: ``(pairs, C, H, W)``; images: ``(pairs, num, C, H, W)``.

    References:
        Glow: Generative Flow with Invertible 1x1 Convolutions, Kingma and Dhariwal, 2018 (arXiv:1807.03039).

    Example:
        >>> from pyroflows import UniformDequantizer, glow
        >>> flow = glow((1, 8, 8), num_levels=1, num_steps=1, dequantizer=UniformDequantizer((1, 8, 8), 17))
        >>> start, end = torch.randint(17, (2, 3, 1, 8, 8), dtype=torch.uint8)
        >>> interpolate(flow, start, end, num=5).shape
        torch.Size([3, 5, 1, 8, 8])
    """
    dequantizer = _dequantizer(flow)
    check_integer("num", num, 2)
    if start.shape != end.shape:
        raise ValueError(f"expected start and end of one shape; got {tuple(start.shape)} and {tuple(end.shape)}")
    with evaluating(flow):
        first, last = (flow.encode(dequantizer(images)[0], context) for images in (start, end))
        fraction = torch.linspace(0, 1, num).to(first).view(-1, *[1] * first.dim())
        # The last point is the end itself: the difference, added back, would round.
        line = torch.where(fraction < 1, first + fraction * (last - first), last)
        return dequantizer.quantize(flow.decode(line, context)).transpose(0, 1)  # from (num, pairs, C, H, W)


def _dequantizer(flow: Flow) -> Any:
    if flow.dequantizer is None:
        raise ValueError("expected a flow with a dequantizer, which knows the levels of the pixels; got one without")
    return flow.dequantizer
