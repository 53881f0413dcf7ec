"""The named flows: functions that give a Flow with good defaults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, overload

import torch
from torch import nn

from pyroflows.arguments import Shape, check_names, check_option, check_sizes
from pyroflows.bijection import Bijection, Inverse
from pyroflows.flow import Flow
from pyroflows.layers.actnorm import ActNorm
from pyroflows.layers.autoregressive import MaskedAutoregressive
from pyroflows.layers.batchnorm import BatchNorm
from pyroflows.layers.coupling import Coupling
from pyroflows.layers.linear import DenseLinear, LULinear
from pyroflows.layers.permutation import Permutation
from pyroflows.layers.planar import Planar
from pyroflows.layers.pointwise import ElementwiseAffine
from pyroflows.layers.radial import Radial
from pyroflows.layers.spline import Spline
from pyroflows.layers.transformers import Additive, Affine
from pyroflows.models.images import image_glow, image_realnvp
from pyroflows.priors import Prior, StandardNormal
from pyroflows.recipe import recorded

__all__ = ["glow", "iaf", "maf", "nice", "nsf", "planar", "radial", "realnvp"]

_PERMUTATIONS = ("lu", "dense", "reverse", "shuffle", "none")
_NORMS = ("actnorm", "batchnorm", "none")


def _flow(prior: Prior | None, features: int, layers: Sequence[Bijection]) -> Flow:
    return Flow(StandardNormal(features) if prior is None else prior, layers)


def _build(
    features: Shape, options: dict[str, Any], of_vectors: Callable[..., Flow], of_images: Callable[..., Flow]
) -> Flow:
    """Build the flow of vectors or that of images, whichever the shape asks for."""
    build = of_vectors if isinstance(features, Integral) else of_images
    check_names(options, build, but=("features",))
    return build(features, **options)


def _stack(
    make_layer: Callable[[int], Bijection], features: int, num_layers: int, permutation: str, norm: str
) -> list[Bijection]:
    """Stack layers, and after each, towards the data, a mixing of features and a norm, as in a step of Glow.

    A reversal costs nothing: every second layer is made for features in reverse.
    """
    check_sizes(features=features, num_layers=num_layers)
    check_option("permutation", permutation, _PERMUTATIONS)
    check_option("norm", norm, _NORMS)
    layers: list[Bijection] = []
    for number in range(num_layers):
        layers.append(make_layer(number))
        if permutation == "lu":
            layers.append(LULinear(features))
        elif permutation == "dense":
            layers.append(DenseLinear(features))
        elif permutation == "shuffle":
            layers.append(Permutation(features, "random"))
        if norm == "actnorm":
            layers.append(ActNorm(features))
        elif norm == "batchnorm":
            layers.append(BatchNorm(features))
    return layers


def _couplings(features: int, permutation: str, *, mask: str = "halves", **options: Any) -> Callable[[int], Bijection]:
    """Make couplings that move every feature in turn: the two sets take turns, or halves are moved in reverse."""
    check_sizes(features=features)
    if permutation != "reverse" or mask != "halves":
        return lambda number: Coupling(features, mask=mask, flip=number % 2 == 1, **options)
    upper = torch.arange(features) >= features // 2
    return lambda number: Coupling(features, mask=upper.flip(0) if number % 2 else upper, **options)


def _order(order: str | Sequence[int], permutation: str, number: int) -> str | Sequence[int]:
    """Give the order of an autoregressive layer of a stack."""
    if permutation != "reverse" or number % 2 == 0:
        return order
    if isinstance(order, str):
        return {"sequential": "reversed", "reversed": "sequential"}.get(order, order)
    return [len(order) - 1 - feature for feature in order]


@overload
def realnvp(
    features: int,
    *,
    context_features: int = 0,
    num_layers: int = 8,
    hidden_features: Sequence[int] = (128, 128),
    residual: bool = False,
    activation: str = "relu",
    dropout: float = 0.0,
    scale: str = "exp",
    mask: str = "halves",
    permutation: str = "lu",
    norm: str = "actnorm",
    prior: Prior | None = None,
) -> Flow: ...
@overload
def realnvp(
    features: Shape,
    *,
    num_levels: int = 2,
    num_blocks: int = 8,
    hidden_channels: int = 64,
    scale: str = "exp",
    norm: str = "weight",
    dropout: float = 0.0,
    num_classes: int = 0,
    context_features: int = 0,
    alpha: float | None = 0.05,
    prior: Prior | None = None,
    dequantizer: nn.Module | None = None,
) -> Flow: ...
@recorded
def realnvp(features: Shape, **options: Any) -> Flow:
    r"""RealNVP: affine couplings that take turns, quick in both directions; of vectors, or of images at several scales.

    A number of features gives the flow of vectors; the shape ``(C, H, W)`` of an image gives the paper's: at each
    scale three checkerboard couplings, a squeeze, three channel couplings, and half of the channels factored out; four
    checkerboard couplings at the last; residual networks whose width doubles at each scale; a logit transform.

    Args:
        features: number of features, or ``(C, H, W)``.
        options: those below.
        context_features: length of the context; 0 for none.
        scale: "exp" or "sigmoid", see :class:`Affine`.
        dropout: of the networks, in training only.
        prior: of the latent, a vector; by default a standard normal.

    Of vectors:
        num_layers: number of couplings (8).
        hidden_features: widths of the hidden layers of each network, or of its residual blocks (128, 128).
        residual: whether the networks are residual (False).
        activation: of the networks ("relu").
        mask: "halves" or "checkerboard"; the moved and the kept features take turns.
        permutation: after each coupling, towards the data: "lu", "dense", "reverse", "shuffle" or "none".
        norm: after each permutation: "actnorm", "batchnorm" or "none".

    Of images:
        num_levels: number of scales (2).
        num_blocks: residual blocks of each network (8).
        hidden_channels: their width at the first scale (64).
        norm: of the networks' convolutions: "weight", "actnorm", "group" or "none".
        num_classes: number of classes, if the context is a class label, an integer; 0 for none.
        alpha: of the logit transform between [0, 1] and the real line (0.05); None for no transform.
        dequantizer: what makes numbers of the pixels' levels, see :class:`Flow`.

    Shapes:
        x: ``(*batch, features)`` or ``(*batch, C, H, W)``; context: ``(*batch, context_features)``, or labels
        ``(*batch,)``.

    Raises:
        TypeError: an option that is not among those of the kind.
        ValueError: a size is not positive, an image's sides do not halve that often, or an option is not one of those
            above.

    References:
        Density estimation using Real NVP, Dinh et al., 2017 (arXiv:1605.08803).

    Example:
        >>> import torch
        >>> realnvp(3, num_layers=2, context_features=1).log_prob(torch.zeros(4, 3), torch.zeros(4, 1)).shape
        torch.Size([4])
        >>> realnvp((1, 8, 8), num_blocks=1, hidden_channels=8).sample((2,)).shape
        torch.Size([2, 1, 8, 8])
    """
    return _build(features, options, _vector_realnvp, image_realnvp)


def _vector_realnvp(
    features: int,
    *,
    context_features: int = 0,
    num_layers: int = 8,
    hidden_features: Sequence[int] = (128, 128),
    residual: bool = False,
    activation: str = "relu",
    dropout: float = 0.0,
    scale: str = "exp",
    mask: str = "halves",
    permutation: str = "lu",
    norm: str = "actnorm",
    prior: Prior | None = None,
) -> Flow:
    layer = _couplings(
        features,
        permutation,
        transformer=Affine(scale=scale),
        mask=mask,
        context_features=context_features,
        hidden_features=hidden_features,
        residual=residual,
        activation=activation,
        dropout=dropout,
    )
    return _flow(prior, features, _stack(layer, features, num_layers, permutation, norm))


@overload
def glow(
    features: int,
    *,
    context_features: int = 0,
    num_steps: int = 10,
    hidden_features: Sequence[int] = (128, 128),
    residual: bool = False,
    activation: str = "relu",
    dropout: float = 0.0,
    coupling: str = "affine",
    scale: str = "exp",
    permutation: str = "lu",
    prior: Prior | None = None,
) -> Flow: ...
@overload
def glow(
    features: Shape,
    *,
    num_levels: int = 3,
    num_steps: int = 16,
    hidden_channels: int = 512,
    permutation: str = "conv",
    coupling: str = "affine",
    scale: str = "exp",
    norm: str = "actnorm",
    num_classes: int = 0,
    context_features: int = 0,
    learn_top: bool = True,
    alpha: float | None = None,
    prior: Prior | None = None,
    dequantizer: nn.Module | None = None,
) -> Flow: ...
@recorded
def glow(features: Shape, **options: Any) -> Flow:
    r"""Glow: steps of ActNorm, an invertible linear map, and a coupling; of vectors, or of images at several scales.

    A number of features gives the flow of vectors; the shape ``(C, H, W)`` of an image gives the paper's: at each level
    a squeeze and ``num_steps`` steps, with 1x1 convolutions and convolutional couplings, after which half of the
    channels leave, under a learned prior given the others.

    Args:
        features: number of features, or ``(C, H, W)``.
        options: those below.
        context_features: length of the context; 0 for none.
        coupling: "affine" or "additive".
        scale: of affine couplings: "exp", or the paper's "sigmoid", see :class:`Affine`.
        prior: of the latent, a vector; by default a standard normal.

    Of vectors:
        num_steps: number of steps (10).
        hidden_features: widths of the hidden layers of each network, or of its residual blocks (128, 128).
        residual: whether the networks are residual (False).
        activation: of the networks ("relu").
        dropout: of the networks, in training only.
        permutation: "lu" (the 1x1 convolution, factored), "dense" (unfactored), "reverse", "shuffle" or "none".

    Of images:
        num_levels: number of levels (3); each halves height and width.
        num_steps: number of steps of each level (16).
        hidden_channels: channels of the hidden layers of each network (512).
        permutation: "conv" (1x1 convolutions, factored), "conv-full" (unfactored), "shuffle", "reverse" or "none".
        norm: of the networks' hidden convolutions: "actnorm", "weight", "group" or "none".
        num_classes: number of classes, if the context is a class label, an integer; 0 for none. The label reaches
            every network and learned prior.
        learn_top: whether mean and scale of the last level's latent are learned, given the context if there is one.
        alpha: of a logit transform between [0, 1] and the real line; None, as in the paper, for no transform.
        dequantizer: what makes numbers of the pixels' levels, see :class:`Flow`.

    Shapes:
        x: ``(*batch, features)`` or ``(*batch, C, H, W)``; context: ``(*batch, context_features)``, or labels
        ``(*batch,)``.

    Raises:
        TypeError: an option that is not among those of the kind.
        ValueError: a size is not positive, an image's sides do not halve that often, or an option is not one of those
            above.

    References:
        Glow: Generative Flow with Invertible 1x1 Convolutions, Kingma and Dhariwal, 2018 (arXiv:1807.03039).

    Example:
        >>> import torch
        >>> glow(2, num_steps=3).sample((5,)).shape
        torch.Size([5, 2])
        >>> flow = glow((1, 8, 8), num_levels=2, num_steps=2, hidden_channels=16, num_classes=10)
        >>> flow.sample((2,), torch.tensor([3, 7, 7])).shape
        torch.Size([2, 3, 1, 8, 8])
    """
    return _build(features, options, _vector_glow, image_glow)


def _vector_glow(
    features: int,
    *,
    context_features: int = 0,
    num_steps: int = 10,
    hidden_features: Sequence[int] = (128, 128),
    residual: bool = False,
    activation: str = "relu",
    dropout: float = 0.0,
    coupling: str = "affine",
    scale: str = "exp",
    permutation: str = "lu",
    prior: Prior | None = None,
) -> Flow:
    check_sizes(num_steps=num_steps)
    check_option("coupling", coupling, ("affine", "additive"))
    layer = _couplings(
        features,
        permutation,
        transformer=Affine(scale=scale) if coupling == "affine" else Additive(),
        context_features=context_features,
        hidden_features=hidden_features,
        residual=residual,
        activation=activation,
        dropout=dropout,
    )
    return _flow(prior, features, _stack(layer, features, num_steps, permutation, "actnorm"))


@recorded
def nice(
    features: int,
    *,
    context_features: int = 0,
    num_layers: int = 4,
    hidden_features: Sequence[int] = (128, 128),
    residual: bool = False,
    activation: str = "relu",
    dropout: float = 0.0,
    mask: str = "checkerboard",
    prior: Prior | None = None,
) -> Flow:
    r"""NICE: additive couplings that take turns, under a learned scale of each latent feature.

    Args:
        features: number of features.
        context_features: length of the context; 0 for none.
        num_layers: number of couplings.
        hidden_features: widths of the hidden layers of each network, or of its residual blocks.
        residual: whether the networks are residual.
        activation: of the networks.
        dropout: of the networks, in training only.
        mask: "checkerboard" or "halves"; the moved and the kept features take turns.
        prior: of the latent; by default a standard normal.

    Shapes:
        x: ``(*batch, features)``; context: ``(*batch, context_features)``.

    Raises:
        ValueError: a size is not positive, or an option is not one of those above.

    References:
        NICE: Non-linear Independent Components Estimation, Dinh et al., 2015 (arXiv:1410.8516).

    Example:
        >>> import torch
        >>> nice(4).log_prob(torch.zeros(4)).shape
        torch.Size([])
    """
    check_sizes(features=features, num_layers=num_layers)
    layer = _couplings(
        features,
        "none",
        transformer=Additive(),
        mask=mask,
        context_features=context_features,
        hidden_features=hidden_features,
        residual=residual,
        activation=activation,
        dropout=dropout,
    )
    couplings = _stack(layer, features, num_layers, "none", "none")
    return _flow(prior, features, [ElementwiseAffine(features), *couplings, ActNorm(features)])


@recorded
def maf(
    features: int,
    *,
    context_features: int = 0,
    num_layers: int = 5,
    hidden_features: Sequence[int] = (128, 128),
    residual: bool = True,
    activation: str = "relu",
    dropout: float = 0.0,
    order: str | Sequence[int] = "sequential",
    scale: str = "exp",
    permutation: str = "lu",
    norm: str = "actnorm",
    prior: Prior | None = None,
) -> Flow:
    r"""MAF: masked autoregressive layers, one pass to score, about three passes' work to sample.

    Args:
        features: number of features.
        context_features: length of the context; 0 for none.
        num_layers: number of autoregressive layers.
        hidden_features: widths of the hidden layers of each MADE, or of its residual blocks.
        residual: whether the MADEs are residual.
        activation: of the MADEs.
        dropout: of the MADEs, in training only.
        order: of every MADE: "sequential", "reversed", "random", or the features in the order of their dependence.
        scale: "exp" or "sigmoid", see :class:`Affine`.
        permutation: after each layer, towards the data: "lu", "dense", "reverse" (the paper's), "shuffle" or "none".
        norm: after each permutation: "actnorm", "batchnorm" (the paper's) or "none".
        prior: of the latent; by default a standard normal.

    Shapes:
        x: ``(*batch, features)``; context: ``(*batch, context_features)``.

    Raises:
        ValueError: a size is not positive, or an option is not one of those above.

    References:
        Masked Autoregressive Flow for Density Estimation, Papamakarios et al., 2017 (arXiv:1705.07057).

    Example:
        >>> import torch
        >>> maf(3, num_layers=2).log_prob(torch.zeros(4, 3)).shape
        torch.Size([4])
    """
    network: dict[str, Any] = {
        "context_features": context_features,
        "hidden_features": hidden_features,
        "residual": residual,
        "activation": activation,
        "dropout": dropout,
    }

    def layer(number: int) -> Bijection:
        turn = _order(order, permutation, number)
        return MaskedAutoregressive(features, transformer=Affine(scale=scale), order=turn, **network)

    return _flow(prior, features, _stack(layer, features, num_layers, permutation, norm))


@recorded
def iaf(
    features: int,
    *,
    context_features: int = 0,
    num_layers: int = 5,
    hidden_features: Sequence[int] = (128, 128),
    residual: bool = True,
    activation: str = "relu",
    dropout: float = 0.0,
    order: str | Sequence[int] = "sequential",
    scale: str = "exp",
    permutation: str = "lu",
    norm: str = "actnorm",
    prior: Prior | None = None,
) -> Flow:
    r"""IAF: inverse autoregressive layers, one pass to sample and score the sample; made for guides.

    Args:
        features: number of features.
        context_features: length of the context; 0 for none.
        num_layers: number of inverse autoregressive layers.
        hidden_features: widths of the hidden layers of each MADE, or of its residual blocks.
        residual: whether the MADEs are residual.
        activation: of the MADEs.
        dropout: of the MADEs, in training only.
        order: of every MADE: "sequential", "reversed", "random", or the features in the order of their dependence.
        scale: "exp" or "sigmoid", see :class:`Affine`.
        permutation: after each layer, towards the data: "lu", "dense", "reverse", "shuffle" or "none".
        norm: after each permutation: "actnorm", "batchnorm" or "none".
        prior: of the latent; by default a standard normal.

    Shapes:
        x: ``(*batch, features)``; context: ``(*batch, context_features)``.

    Raises:
        ValueError: a size is not positive, or an option is not one of those above.

    References:
        Improved Variational Inference with Inverse Autoregressive Flow, Kingma et al., 2016 (arXiv:1606.04934).

    Example:
        >>> import torch
        >>> x, log_prob = iaf(3, num_layers=2).rsample_and_log_prob((4,))
        >>> x.shape, log_prob.shape
        (torch.Size([4, 3]), torch.Size([4]))
    """
    network: dict[str, Any] = {
        "context_features": context_features,
        "hidden_features": hidden_features,
        "residual": residual,
        "activation": activation,
        "dropout": dropout,
    }

    def layer(number: int) -> Bijection:
        turn = _order(order, permutation, number)
        return Inverse(MaskedAutoregressive(features, transformer=Affine(scale=scale), order=turn, **network))

    return _flow(prior, features, _stack(layer, features, num_layers, permutation, norm))


@recorded
def nsf(
    features: int,
    *,
    autoregressive: bool = False,
    context_features: int = 0,
    num_layers: int = 5,
    hidden_features: Sequence[int] = (128, 128),
    residual: bool = True,
    activation: str = "relu",
    dropout: float = 0.0,
    num_bins: int = 8,
    bound: float = 3.0,
    permutation: str = "lu",
    norm: str = "actnorm",
    prior: Prior | None = None,
) -> Flow:
    r"""Neural spline flow: rational-quadratic splines in couplings, or autoregressive.

    Args:
        features: number of features.
        autoregressive: whether the layers are autoregressive (the work of a few passes to sample) or couplings.
        context_features: length of the context; 0 for none.
        num_layers: number of spline layers.
        hidden_features: widths of the hidden layers of each network, or of its residual blocks.
        residual: whether the networks are residual.
        activation: of the networks.
        dropout: of the networks, in training only.
        num_bins: bins of each spline.
        bound: half the width of the interval on which the splines bend.
        permutation: after each layer, towards the data: "lu", "dense", "reverse", "shuffle" or "none".
        norm: after each permutation: "actnorm", "batchnorm" or "none".
        prior: of the latent; by default a standard normal.

    Shapes:
        x: ``(*batch, features)``; context: ``(*batch, context_features)``.

    Raises:
        ValueError: a size is not positive, or an option is not one of those above.

    References:
        Neural Spline Flows, Durkan et al., 2019 (arXiv:1906.04032).

    Example:
        >>> import torch
        >>> nsf(3, autoregressive=True, num_layers=2).log_prob(torch.zeros(4, 3)).shape
        torch.Size([4])
    """
    options: dict[str, Any] = {
        "transformer": Spline(num_bins=num_bins, bound=bound),
        "context_features": context_features,
        "hidden_features": hidden_features,
        "residual": residual,
        "activation": activation,
        "dropout": dropout,
    }
    coupling = _couplings(features, permutation, **options)

    def layer(number: int) -> Bijection:
        if not autoregressive:
            return coupling(number)
        return MaskedAutoregressive(features, order=_order("sequential", permutation, number), **options)

    return _flow(prior, features, _stack(layer, features, num_layers, permutation, norm))


@recorded
def planar(
    features: int,
    *,
    context_features: int = 0,
    num_layers: int = 16,
    hidden_features: Sequence[int] = (64,),
    prior: Prior | None = None,
) -> Flow:
    r"""Planar flow: small maps that bend space along one direction each; scored by a root search.

    Args:
        features: number of features.
        context_features: length of the context; 0 for none.
        num_layers: number of planar layers.
        hidden_features: widths of the network that gives their parameters from a context.
        prior: of the latent; by default a standard normal.

    Shapes:
        x: ``(*batch, features)``; context: ``(*batch, context_features)``.

    Raises:
        ValueError: a size is not positive.

    References:
        Variational Inference with Normalizing Flows, Rezende and Mohamed, 2015 (arXiv:1505.05770).

    Example:
        >>> import torch
        >>> planar(2).log_prob(torch.zeros(3, 2)).shape
        torch.Size([3])
    """
    layers = _stack(
        lambda _: Planar(features, context_features=context_features, hidden_features=hidden_features),
        features,
        num_layers,
        "none",
        "none",
    )
    return _flow(prior, features, [*layers, ActNorm(features)])


@recorded
def radial(
    features: int,
    *,
    context_features: int = 0,
    num_layers: int = 16,
    hidden_features: Sequence[int] = (64,),
    prior: Prior | None = None,
) -> Flow:
    r"""Radial flow: small maps that draw space towards a point, or away from it.

    Args:
        features: number of features.
        context_features: length of the context; 0 for none.
        num_layers: number of radial layers.
        hidden_features: widths of the network that gives their parameters from a context.
        prior: of the latent; by default a standard normal.

    Shapes:
        x: ``(*batch, features)``; context: ``(*batch, context_features)``.

    Raises:
        ValueError: a size is not positive.

    References:
        Variational Inference with Normalizing Flows, Rezende and Mohamed, 2015 (arXiv:1505.05770).

    Example:
        >>> import torch
        >>> radial(2).log_prob(torch.zeros(3, 2)).shape
        torch.Size([3])
    """
    layers = _stack(
        lambda _: Radial(features, context_features=context_features, hidden_features=hidden_features),
        features,
        num_layers,
        "none",
        "none",
    )
    return _flow(prior, features, [*layers, ActNorm(features)])
