"""Looking at a flow of images: samples, reconstructions and the way between two images, as levels of pixels."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from pyroflows.arguments import check_sizes
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
        num: number of images; of each label, where there are labels.
        temperature: by which the latent's deviations are multiplied; about 0.7 looks best, 1 is the model.
        labels: the classes to draw, or contexts, of a flow that takes these.
        batch_size: images drawn at once.
        seed: what draws them; torch's random state is then left as it was.

    Shapes:
        labels: ``(num_labels,)``; images: ``(num, C, H, W)``, or ``(num_labels, num, C, H, W)``.

    Raises:
        ValueError: the flow has no dequantizer, a size is not positive, there is no label, or the prior takes no
            temperature.

    Example:
        >>> from pyroflows import glow
        >>> from pyroflows.dequantizers import UniformDequantizer
        >>> flow = glow((1, 8, 8), num_levels=1, num_steps=1, dequantizer=UniformDequantizer((1, 8, 8), 17))
        >>> sample_images(flow, 3, temperature=0.7, seed=0).shape
        torch.Size([3, 1, 8, 8])
    """
    dequantizer = _dequantizer(flow)
    check_sizes(num=num, batch_size=batch_size)
    if labels is not None and (not isinstance(labels, Tensor) or not labels.dim() or not len(labels)):
        got = f"the shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"expected labels as a tensor, at least one; got {got}")
    given = [None] if labels is None else [label.to(flow.device) for label in labels]
    sizes = [min(batch_size, num - start) for start in range(0, num, batch_size)]
    with evaluating(flow), seeded(seed, flow.device):
        drawn = [
            torch.cat([dequantizer.quantize(flow.sample((n,), label, temperature=temperature)) for n in sizes])
            for label in given
        ]
    if drawn[0].shape[1:] != flow.event_shape:
        raise ValueError(f"expected labels of one class, or one context, each; got the shape {tuple(labels.shape)}")  # type: ignore[union-attr]
    return drawn[0] if labels is None else torch.stack(drawn)


@torch.no_grad()
def reconstruct(flow: Flow, images: Tensor, context: Tensor | None = None) -> Tensor:
    """Send images to the latent and back; what comes back is what was sent, if the flow inverts.

    Args:
        flow: a flow with a dequantizer.
        images: levels of pixels.
        context: the context of each, where the flow takes one.

    Shapes:
        images: ``(num, C, H, W)``, and so what is given back.

    Raises:
        TypeError, ValueError: the flow has no dequantizer, or the images are not of its levels or shape.

    Example:
        >>> from pyroflows import glow
        >>> from pyroflows.dequantizers import UniformDequantizer
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
    """Walk from images to others along straight lines in the latent.

    Args:
        flow: a flow with a dequantizer.
        start: the images to start from, levels of pixels.
        end: as many to end at.
        num: images on the way, both ends among them.
        context: the context of each pair, where the flow takes one.

    Shapes:
        start, end: ``(pairs, C, H, W)``; images: ``(pairs, num, C, H, W)``.

    Raises:
        TypeError, ValueError: the flow has no dequantizer, the images are not of its levels or shape, or ``num`` is
            below 2.

    References:
        Glow: Generative Flow with Invertible 1x1 Convolutions, Kingma and Dhariwal, 2018 (arXiv:1807.03039).

    Example:
        >>> from pyroflows import glow
        >>> from pyroflows.dequantizers import UniformDequantizer
        >>> flow = glow((1, 8, 8), num_levels=1, num_steps=1, dequantizer=UniformDequantizer((1, 8, 8), 17))
        >>> images = torch.randint(17, (2, 1, 8, 8), dtype=torch.uint8)
        >>> walk = interpolate(flow, images[:1], images[1:], num=5)
        >>> walk.shape, torch.equal(walk[:, 0], images[:1]), torch.equal(walk[:, -1], images[1:])
        (torch.Size([1, 5, 1, 8, 8]), True, True)
    """
    dequantizer = _dequantizer(flow)
    if not isinstance(num, Integral) or num < 2:
        raise ValueError(f"expected at least 2 images on the way; got {num!r}")
    if start.shape != end.shape:
        shapes = f"{tuple(start.shape)} and {tuple(end.shape)}"
        raise ValueError(f"expected as many images to end at as to start from, of the same shape; got {shapes}")
    with evaluating(flow):
        first, last = (flow.encode(dequantizer(images)[0], context) for images in (start, end))
        share = torch.linspace(0, 1, num).to(first).view(-1, *[1] * first.dim())
        # Ends as they are: their difference, added back, would round.
        way = torch.where(share < 1, first + share * (last - first), last)
        walk = flow.decode(way, context)  # (num, pairs, C, H, W)
        return dequantizer.quantize(walk).transpose(0, 1)


def _dequantizer(flow: Flow) -> Any:
    if flow.dequantizer is None:
        raise ValueError("expected a flow with a dequantizer, which knows the levels of pixels; got one without")
    return flow.dequantizer
