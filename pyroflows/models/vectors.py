"""The named flows: functions that build a Flow with good defaults."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, Protocol, Unpack, cast, overload

import torch
from torch import nn

from pyroflows.arguments import Shape, check_names, check_option, check_sizes, is_integer
from pyroflows.bijection import Bijection, Inverse
from pyroflows.flow import Flow
from pyroflows.layers.autoregressive import MaskedAutoregressive
from pyroflows.layers.coupling import Coupling
from pyroflows.layers.linear import DenseLinear, LULinear
from pyroflows.layers.norms import ActNorm, BatchNorm
from pyroflows.layers.planar_radial import Planar, Radial
from pyroflows.layers.pointwise import ElementwiseAffine
from pyroflows.layers.rearrange import Permutation
from pyroflows.layers.spline import Spline
from pyroflows.layers.transformers import Additive, Affine, as_affine
from pyroflows.models.images import image_glow, image_realnvp
from pyroflows.networks.mlp import NetworkOptions
from pyroflows.priors import Prior, StandardNormal
from pyroflows.recipe import recorded

__all__ = ["glow", "iaf", "maf", "nice", "nsf", "planar", "radial", "realnvp"]

_NORMS: dict[str, Callable[[int], list[Bijection]]] = {
    "actnorm": lambda features: [ActNorm(features)],
    "batchnorm": lambda features: [BatchNorm(features)],
    "none": lambda features: [],
}
# Made from the features and the number of the layer, which is the seed of a permutation: all flows built alike have the
# same, so that parameters mean the same in each of them.
_PERMUTATIONS: dict[str, Callable[[int, int], list[Bijection]]] = {
    "lu": lambda features, number: [LULinear(features)],
    "dense": lambda features, number: [DenseLinear(features)],
    "reverse": lambda features, number: [],  # every second layer is built for reversed features instead
    "shuffle": lambda features, number: [Permutation(features, "random", seed=number)],
    "none": lambda features, number: [],
}

P = ParamSpec("P")
Q = ParamSpec("Q")


class _Builder(Protocol[P, Q]):
    @overload
    def __call__(self, features: int, *args: P.args, **kwargs: P.kwargs) -> Flow: ...
    @overload
    def __call__(self, features: Shape, *args: Q.args, **kwargs: Q.kwargs) -> Flow: ...


def _or_for_images(
    of_images: Callable[Concatenate[Shape, Q], Flow], **defaults: Any
) -> Callable[[Callable[Concatenate[int, P], Flow]], _Builder[P, Q]]:
    """Decorate a builder of flows of vectors, so that the shape of an image gives a flow of images.

    Defaults given here are written into the recipe, and so into files; a file without them has those of the builder.
    """

    def decorate(of_vectors: Callable[Concatenate[int, P], Flow]) -> _Builder[P, Q]:
        @functools.wraps(of_vectors)
        def build(features: Any, **options: Any) -> Flow:
            builder, network = (of_vectors, NetworkOptions.__annotations__) if is_integer(features) else (of_images, ())
            check_names(options, builder, exclude=("features", "network"), also=network)
            return cast(Any, builder)(features, **options)

        del build.__wrapped__  # its signature is that of one of the two
        make = recorded(build)

        @functools.wraps(build)
        def with_defaults(features: Any, **options: Any) -> Flow:
            return make(features, **(options if is_integer(features) else {**defaults, **options}))

        return cast(_Builder[P, Q], with_defaults)

    return decorate


def _with_options(builder: Callable[P, Flow]) -> Callable[P, Flow]:
    """Decorate a builder of flows of vectors, so that its recipe is kept, and all its options are named in errors."""
    network = NetworkOptions.__annotations__ if "network" in inspect.signature(builder).parameters else ()

    @functools.wraps(builder)
    def build(*args: P.args, **options: P.kwargs) -> Flow:
        check_names(options, builder, exclude=("network",), also=network)
        return builder(*args, **options)

    return recorded(build)


def _flow(prior: Prior | None, embedding: nn.Module | None, features: int, layers: Sequence[Bijection]) -> Flow:
    return Flow(StandardNormal(features) if prior is None else prior, layers, embedding=embedding)


def _stack(
    make_layer: Callable[[int], Bijection], features: int, num_layers: int, permutation: str, norm: str
) -> list[Bijection]:
    """Stack layers, each followed, towards the data, by a permutation or linear map and by a norm, as in Glow."""
    check_sizes(features=features, num_layers=num_layers)
    check_option("permutation", permutation, _PERMUTATIONS)
    check_option("norm", norm, _NORMS)
    layers: list[Bijection] = []
    for number in range(num_layers):
        layers += [make_layer(number), *_PERMUTATIONS[permutation](features, number), *_NORMS[norm](features)]
    return layers


def _couplings(features: int, permutation: str, *, mask: str = "halves", **options: Any) -> Callable[[int], Bijection]:
    """Return a builder of alternating couplings: of a mask and its complement, or of reversed features."""
    check_sizes(features=features)
    if permutation != "reverse" or mask != "halves":
        return lambda number: Coupling(features, mask=mask, flip=number % 2 == 1, **options)
    upper = torch.arange(features) >= features // 2
    return lambda number: Coupling(features, mask=upper.flip(0) if number % 2 else upper, **options)


def _autoregressive(
    features: int, permutation: str, order: str | Sequence[int], **options: Any
) -> Callable[[int], Bijection]:
    """Return a builder of autoregressive layers, by default residual, of one order or alternating with its reverse."""
    options = {"residual": True, **options}
    reversed_order: str | Sequence[int] = order
    if permutation == "reverse":
        named = {"sequential": "reversed", "reversed": "sequential", "random": "random"}
        reversed_order = named.get(order, order) if isinstance(order, str) else [features - 1 - i for i in order]
    return lambda number: MaskedAutoregressive(
        features, order=reversed_order if number % 2 else order, **{"seed": number, **options}
    )


@_or_for_images(image_realnvp, scale=Affine(bound=2.0, shift_bound=5.0))
def realnvp(
    features: int,
    *,
    context_features: int = 0,
    num_layers: int = 8,
    scale: str | Affine = "exp",
    mask: str = "halves",
    permutation: str = "lu",
    norm: str = "actnorm",
    embedding: nn.Module | None = None,
    prior: Prior | None = None,
    **network: Unpack[NetworkOptions],
) -> Flow:
    r"""RealNVP: alternating affine couplings, fast both ways, for vectors or for images at several scales.

    A shape ``(C, H, W)`` gives the multi-scale flow of the paper: at each scale three checkerboard couplings, a squeeze
    and three channel couplings, after which half of the channels are factored out; at the last scale four checkerboard
    couplings; residual networks whose width doubles at each scale; and a logit transform.

    Args:
        features: number of features, or ``(C, H, W)``.
        context_features: length of the context, as the layers take it; 0 for none.
        embedding: network that computes it from the user's context, see :class:`Flow`; cannot be combined with
            ``num_classes``.
        scale: "exp" or "sigmoid", or an :class:`Affine` with bounds of its own; of images by default one of log-scales
            to 2 and shifts to 5, without which full steps of Adam overshoot.
        dropout: dropout of the networks, in training only (0).
        prior: prior of the latent, a vector; by default a standard normal.

    Of vectors:
        num_layers: number of couplings (8).
        hidden_features, residual, activation: as in :class:`MLP`.
        mask: "halves" or "checkerboard"; transformed and identity features alternate.
        permutation: after each coupling, towards the data: "lu", "dense", "reverse", "shuffle" or "none".
        norm: after each permutation: "actnorm", "batchnorm" or "none".

    Of images:
        num_levels: number of scales (2).
        num_blocks: residual blocks of each network (8).
        hidden_channels: width of the networks at the first scale (64).
        norm: norm of the networks' convolutions: "weight", "actnorm", "group" or "none".
        num_classes: number of classes if the context is a class label, an integer; 0 for none.
        alpha: margin of the logit transform from [0, 1] to the real line (0.05); None for no transform.
        dequantizer: dequantizer of the pixels' levels, see :class:`Flow`.

    Shapes:
        x: ``(*batch, features)`` or ``(*batch, C, H, W)``; context: ``(*batch, context_features)``, or labels
        ``(*batch,)``.

    Raises:
        TypeError: an option of the other kind of data.
        ValueError: a size is not positive, an image cannot be halved as often, or an option is not one of those above.

    References:
        Density estimation using Real NVP, Dinh et al., 2017 (arXiv:1605.08803).

    Example:
        >>> realnvp(3, num_layers=2, context_features=1).log_prob(torch.zeros(4, 3), torch.zeros(4, 1)).shape
        torch.Size([4])
        >>> realnvp((1, 8, 8), num_blocks=1, hidden_channels=8).sample((2,)).shape
        torch.Size([2, 1, 8, 8])
    """
    transformer = as_affine(scale)
    options: dict[str, Any] = {"transformer": transformer, "context_features": context_features, **network}
    layer = _couplings(features, permutation, mask=mask, **options)
    return _flow(prior, embedding, features, _stack(layer, features, num_layers, permutation, norm))


@_or_for_images(image_glow)
def glow(
    features: int,
    *,
    context_features: int = 0,
    num_steps: int = 10,
    coupling: str = "affine",
    scale: str = "exp",
    permutation: str = "lu",
    embedding: nn.Module | None = None,
    prior: Prior | None = None,
    **network: Unpack[NetworkOptions],
) -> Flow:
    r"""Glow: steps of ActNorm, an invertible linear map and a coupling, for vectors or for images at several scales.

    A shape ``(C, H, W)`` gives the multi-scale flow of the paper: at each level a squeeze and ``num_steps`` steps, with
    1x1 convolutions and convolutional couplings, after which half of the channels are factored out, with a learned
    prior given the others.

    Args:
        features: number of features, or ``(C, H, W)``.
        context_features, embedding: as in :func:`realnvp`.
        coupling: "affine" or "additive".
        scale: scale of affine couplings: "exp", or "sigmoid" as in the paper, see :class:`Affine`.
        prior: prior of the latent, a vector; by default a standard normal.

    Of vectors:
        num_steps: number of steps (10).
        network: ``hidden_features``, ``residual``, ``activation`` and ``dropout`` of each :class:`MLP`.
        permutation: "lu" (factored), "dense", "reverse", "shuffle" or "none".

    Of images:
        num_levels: number of levels (3); each halves height and width.
        num_steps: number of steps of each level (16).
        hidden_channels: channels of the hidden layers of each network (512).
        permutation: "conv" (1x1 convolutions, factored), "conv-full" (unfactored), "shuffle", "reverse" or "none".
        norm: of the networks' hidden convolutions: "actnorm", "weight", "group" or "none".
        num_classes: number of classes, if the context is a class label, an integer; 0 for none. The label reaches
            every network and learned prior.
        learn_top: whether mean and scale of the last level's latent are learned, given the context if there is one.
        alpha: margin of a logit transform from [0, 1] to the real line; None, as in the paper, for no transform.
        dequantizer: dequantizer of the pixels' levels, see :class:`Flow`.

    Shapes:
        x: ``(*batch, features)`` or ``(*batch, C, H, W)``; context: ``(*batch, context_features)``, or labels
        ``(*batch,)``.

    Raises:
        TypeError: an option of the other kind of data.
        ValueError: a size is not positive, an image cannot be halved as often, or an option is not one of those above.

    References:
        Glow: Generative Flow with Invertible 1x1 Convolutions, Kingma and Dhariwal, 2018 (arXiv:1807.03039).

    Example:
        >>> glow(2, num_steps=3).sample((5,)).shape
        torch.Size([5, 2])
        >>> flow = glow((1, 8, 8), num_levels=2, num_steps=2, hidden_channels=16, num_classes=10)
        >>> flow.sample((2,), torch.tensor([3, 7, 7])).shape
        torch.Size([2, 3, 1, 8, 8])
    """
    check_sizes(num_steps=num_steps)
    check_option("coupling", coupling, ("affine", "additive"))
    transformer = Affine(scale=scale) if coupling == "affine" else Additive()
    layer = _couplings(features, permutation, transformer=transformer, context_features=context_features, **network)
    return _flow(prior, embedding, features, _stack(layer, features, num_steps, permutation, "actnorm"))


@_with_options
def nice(
    features: int,
    *,
    context_features: int = 0,
    num_layers: int = 4,
    mask: str = "checkerboard",
    embedding: nn.Module | None = None,
    prior: Prior | None = None,
    **network: Unpack[NetworkOptions],
) -> Flow:
    r"""NICE: alternating additive couplings, and a learned scale of each latent feature.

    Args:
        features: number of features.
        num_layers: number of couplings.
        network: ``hidden_features``, ``residual``, ``activation`` and ``dropout`` of each :class:`MLP`.
        mask: "checkerboard" or "halves"; transformed and identity features alternate.
        context_features, embedding, prior: as in :func:`maf`.

    Shapes:
        x: ``(*batch, features)``; context: ``(*batch, context_features)``.

    Raises:
        ValueError: a size is not positive, or an option is not one of those above.

    References:
        NICE: Non-linear Independent Components Estimation, Dinh et al., 2015 (arXiv:1410.8516).

    Example:
        >>> nice(4).log_prob(torch.zeros(4)).shape
        torch.Size([])
    """
    check_sizes(features=features, num_layers=num_layers)
    options: dict[str, Any] = {"transformer": Additive(), "context_features": context_features, **network}
    layer = _couplings(features, "none", mask=mask, **options)
    couplings = _stack(layer, features, num_layers, "none", "none")
    return _flow(prior, embedding, features, [ElementwiseAffine(features), *couplings, ActNorm(features)])


@_with_options
def maf(
    features: int,
    *,
    context_features: int = 0,
    num_layers: int = 5,
    order: str | Sequence[int] = "sequential",
    scale: str = "exp",
    permutation: str = "lu",
    norm: str = "actnorm",
    embedding: nn.Module | None = None,
    prior: Prior | None = None,
    **network: Unpack[NetworkOptions],
) -> Flow:
    r"""MAF: masked autoregressive layers; scoring takes one pass, sampling the time of about three.

    Args:
        features: number of features.
        context_features: length of the context, as the layers take it; 0 for none.
        embedding: network that computes it from the user's context, see :class:`Flow`.
        num_layers: number of autoregressive layers.
        network: ``hidden_features``, ``residual`` (here True), ``activation`` and ``dropout`` of each :class:`MADE`.
        order: "sequential", "reversed", "random", or the features in the order of their dependence.
        scale: "exp" or "sigmoid", see :class:`Affine`.
        permutation: after each layer, towards the data: "lu", "dense", "reverse" (as in the paper), "shuffle", "none".
        norm: after each permutation: "actnorm", "batchnorm" (as in the paper) or "none".
        prior: prior of the latent; by default a standard normal.

    Shapes:
        x: ``(*batch, features)``; context: ``(*batch, context_features)``.

    Raises:
        ValueError: a size is not positive, or an option is not one of those above.

    References:
        Masked Autoregressive Flow for Density Estimation, Papamakarios et al., 2017 (arXiv:1705.07057).

    Example:
        >>> maf(3, num_layers=2).log_prob(torch.zeros(4, 3)).shape
        torch.Size([4])
    """
    options: dict[str, Any] = {"transformer": Affine(scale=scale), "context_features": context_features, **network}
    layer = _autoregressive(features, permutation, order, **options)
    return _flow(prior, embedding, features, _stack(layer, features, num_layers, permutation, norm))


@_with_options
def iaf(
    features: int,
    *,
    context_features: int = 0,
    num_layers: int = 5,
    order: str | Sequence[int] = "sequential",
    scale: str = "exp",
    permutation: str = "lu",
    norm: str = "actnorm",
    embedding: nn.Module | None = None,
    prior: Prior | None = None,
    **network: Unpack[NetworkOptions],
) -> Flow:
    r"""IAF: inverse autoregressive layers; sampling and scoring the sample take one pass, as guides need.

    Args:
        features, context_features, embedding, num_layers, order, scale, permutation, norm, prior: as in :func:`maf`.
        network: ``hidden_features``, ``residual`` (here True), ``activation`` and ``dropout`` of each :class:`MADE`.

    Shapes:
        x: ``(*batch, features)``; context: ``(*batch, context_features)``.

    References:
        Improved Variational Inference with Inverse Autoregressive Flow, Kingma et al., 2016 (arXiv:1606.04934).

    Example:
        >>> x, log_prob = iaf(3, num_layers=2).rsample_and_log_prob((4,))
        >>> x.shape, log_prob.shape
        (torch.Size([4, 3]), torch.Size([4]))
    """
    options: dict[str, Any] = {"transformer": Affine(scale=scale), "context_features": context_features, **network}
    layer = _autoregressive(features, permutation, order, **options)
    layers = _stack(lambda number: Inverse(layer(number)), features, num_layers, permutation, norm)
    return _flow(prior, embedding, features, layers)


@_with_options
def nsf(
    features: int,
    *,
    autoregressive: bool = False,
    context_features: int = 0,
    num_layers: int = 5,
    num_bins: int = 8,
    bound: float = 3.0,
    permutation: str = "lu",
    norm: str = "actnorm",
    embedding: nn.Module | None = None,
    prior: Prior | None = None,
    **network: Unpack[NetworkOptions],
) -> Flow:
    r"""Neural spline flow: rational-quadratic splines in couplings, or autoregressive.

    Args:
        features: number of features.
        autoregressive: whether the layers are autoregressive, slower to sample, or couplings.
        num_layers: number of spline layers.
        context_features, embedding, permutation, norm, prior: as in :func:`maf`.
        network: ``hidden_features``, ``residual`` (here True), ``activation`` and ``dropout`` of each :class:`MLP`.
        num_bins, bound: options of each :class:`Spline`.

    Shapes:
        x: ``(*batch, features)``; context: ``(*batch, context_features)``.

    References:
        Neural Spline Flows, Durkan et al., 2019 (arXiv:1906.04032).

    Example:
        >>> nsf(3, autoregressive=True, num_layers=2).log_prob(torch.zeros(4, 3)).shape
        torch.Size([4])
    """
    transformer = Spline(num_bins=num_bins, bound=bound)
    network = {"residual": True, **network}
    options: dict[str, Any] = {"transformer": transformer, "context_features": context_features, **network}
    if autoregressive:
        layer = _autoregressive(features, permutation, "sequential", **options)
    else:
        layer = _couplings(features, permutation, **options)
    return _flow(prior, embedding, features, _stack(layer, features, num_layers, permutation, norm))


@_with_options
def planar(
    features: int,
    *,
    context_features: int = 0,
    num_layers: int = 16,
    hidden_features: Sequence[int] = (64,),
    embedding: nn.Module | None = None,
    prior: Prior | None = None,
) -> Flow:
    r"""Planar flow: layers that each move points along one direction; scoring solves for a root.

    Args:
        features: number of features.
        num_layers: number of planar layers.
        hidden_features: widths of the network that computes their parameters from a context.
        context_features, embedding, prior: as in :func:`maf`.

    Shapes:
        x: ``(*batch, features)``; context: ``(*batch, context_features)``.

    Raises:
        ValueError: a size is not positive.

    References:
        Variational Inference with Normalizing Flows, Rezende and Mohamed, 2015 (arXiv:1505.05770).

    Example:
        >>> planar(2).log_prob(torch.zeros(3, 2)).shape
        torch.Size([3])
    """
    options: dict[str, Any] = {"context_features": context_features, "hidden_features": hidden_features}
    layers = _stack(lambda _: Planar(features, **options), features, num_layers, "none", "none")
    return _flow(prior, embedding, features, [*layers, ActNorm(features)])


@_with_options
def radial(
    features: int,
    *,
    context_features: int = 0,
    num_layers: int = 16,
    hidden_features: Sequence[int] = (64,),
    embedding: nn.Module | None = None,
    prior: Prior | None = None,
) -> Flow:
    r"""Radial flow: layers that each move points towards a centre or away from it.

    Args:
        features, context_features, embedding, num_layers, hidden_features, prior: as in :func:`planar`.

    Shapes:
        x: ``(*batch, features)``; context: ``(*batch, context_features)``.

    References:
        Variational Inference with Normalizing Flows, Rezende and Mohamed, 2015 (arXiv:1505.05770).

    Example:
        >>> radial(2).log_prob(torch.zeros(3, 2)).shape
        torch.Size([3])
    """
    options: dict[str, Any] = {"context_features": context_features, "hidden_features": hidden_features}
    layers = _stack(lambda _: Radial(features, **options), features, num_layers, "none", "none")
    return _flow(prior, embedding, features, [*layers, ActNorm(features)])
