"""The named flows of images at several scales: Glow and RealNVP."""

from collections.abc import Callable
from typing import Any

from torch import Size, nn

from pyroflows.arguments import Shape, as_image_shape, check_option, check_sizes
from pyroflows.bijection import Bijection
from pyroflows.compose import Compose
from pyroflows.flow import Flow
from pyroflows.layers.conv_coupling import ConvCoupling
from pyroflows.layers.linear import InvertibleConv
from pyroflows.layers.multiscale import Multiscale
from pyroflows.layers.norms import ActNorm
from pyroflows.layers.pointwise import ElementwiseAffine, Sigmoid
from pyroflows.layers.rearrange import Permutation, Squeeze
from pyroflows.layers.transformers import Additive, Affine, as_affine, num_parameters
from pyroflows.networks.convnet import ResNet, ZeroConv
from pyroflows.networks.one_hot import OneHot
from pyroflows.priors import Prior, StandardNormal

__all__ = ["image_glow", "image_realnvp"]

# Made from the shape and the number of the step, which is the seed of a permutation, as in flows of vectors.
_PERMUTATIONS: dict[str, Callable[[Size, int], list[Bijection]]] = {
    "conv": lambda shape, number: [InvertibleConv(shape)],
    "conv-full": lambda shape, number: [InvertibleConv(shape, factored=False)],
    "shuffle": lambda shape, number: [Permutation(shape, "random", seed=number)],
    "reverse": lambda shape, number: [Permutation(shape, "reverse")],
    "none": lambda shape, number: [],
}


def image_glow(
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
    embedding: nn.Module | None = None,
    learn_top: bool = True,
    alpha: float | None = None,
    prior: Prior | None = None,
    dequantizer: nn.Module | None = None,
) -> Flow:
    """Build Glow for images; see :func:`pyroflows.glow`."""
    check_sizes(num_levels=num_levels, num_steps=num_steps, hidden_channels=hidden_channels)
    check_option("permutation", permutation, _PERMUTATIONS)
    check_option("coupling", coupling, ("affine", "additive"))
    context, embedding = _conditions(num_classes, context_features, embedding)
    transformer = Affine(scale=scale) if coupling == "affine" else Additive()
    network: dict[str, Any] = {"context_features": context, "hidden_channels": hidden_channels, "norm": norm}

    def step(shape: Size, number: int) -> Bijection:
        coupling_layer = ConvCoupling(shape, transformer=transformer, **network)
        return Compose([coupling_layer, *_PERMUTATIONS[permutation](shape, number), ActNorm(shape)])

    levels: list[Bijection] = []
    shape = _divisible(features, num_levels)
    for number in range(num_levels):
        squeeze = Squeeze(shape)
        shape = squeeze.latent_shape
        layers = [step(shape, step_number) for step_number in range(num_steps)]
        if number < num_levels - 1:
            layers.insert(0, _split_prior(shape, context))
        elif learn_top:
            layers.insert(0, ElementwiseAffine(shape, context_features=context, hidden_features=()))
        levels.insert(0, Compose([*layers, squeeze]))
        shape = _passed_on(shape)
    return _image_flow(levels, alpha, prior, embedding, dequantizer)


def image_realnvp(
    features: Shape,
    *,
    num_levels: int = 2,
    num_blocks: int = 8,
    hidden_channels: int = 64,
    scale: str | Affine = "exp",
    norm: str = "weight",
    dropout: float = 0.0,
    num_classes: int = 0,
    context_features: int = 0,
    embedding: nn.Module | None = None,
    alpha: float | None = 0.05,
    prior: Prior | None = None,
    dequantizer: nn.Module | None = None,
) -> Flow:
    """Build RealNVP for images; see :func:`pyroflows.realnvp`."""
    check_sizes(num_levels=num_levels, num_blocks=num_blocks, hidden_channels=hidden_channels)
    context, embedding = _conditions(num_classes, context_features, embedding)
    transformer = as_affine(scale)
    network: dict[str, Any] = {"num_blocks": num_blocks, "context_features": context, "norm": norm, "dropout": dropout}

    def couplings(shape: Size, mask: str, number: int, width: int) -> list[Bijection]:
        layers: list[Bijection] = []
        for index in range(number):
            flip = index % 2 == 1
            halves = (shape[0] // 2, shape[0] - shape[0] // 2)
            seen, transformed = halves[::-1] if flip else halves
            if mask == "checkerboard":
                seen = transformed = shape[0]
            conditioner = ResNet(seen, transformed * num_parameters(transformer), hidden_channels=width, **network)
            options: dict[str, Any] = {"mask": mask, "flip": flip, "context_features": context}
            coupling = ConvCoupling(shape, transformer=transformer, conditioner=conditioner, **options)
            layers.append(Compose([coupling, ActNorm(shape)]))
        return layers

    levels: list[Bijection] = []
    shape = _divisible(features, num_levels - 1, least=2)
    for number in range(num_levels):
        width = hidden_channels * 2**number
        if number == num_levels - 1:
            levels.insert(0, Compose(couplings(shape, "checkerboard", 4, width)))
            break
        squeeze = Squeeze(shape)
        above = couplings(shape, "checkerboard", 3, width)
        shape = squeeze.latent_shape
        levels.insert(0, Compose([*couplings(shape, "channels", 3, 2 * width), squeeze, *above]))
        shape = _passed_on(shape)
    return _image_flow(levels, alpha, prior, embedding, dequantizer)


def _conditions(num_classes: int, context_features: int, embedding: nn.Module | None) -> tuple[int, nn.Module | None]:
    """Return the length of the layers' context, and its embedding, if any: the user's, or that of class labels."""
    if not num_classes:
        return context_features, embedding
    if context_features or embedding is not None:
        raise ValueError("`num_classes` cannot be combined with `context_features` or `embedding`")
    return num_classes, OneHot(num_classes)


def _divisible(features: Shape, halvings: int, *, least: int = 1) -> Size:
    shape = as_image_shape(features)
    _, height, width = shape
    side = 2 ** min(halvings, 64)  # a file may ask for any number of halvings
    if height % side or width % side or (height // side) * (width // side) < least:
        raise ValueError(
            f"expected a height and width divisible by {side}, for {halvings} halvings; got {height} x {width}: "
            f"use fewer levels, or pad the images (pyroflows.data.pad_images)"
        )
    return shape


def _split_prior(shape: Size, context_features: int) -> Bijection:
    """Return Glow's learned prior of the channels that are factored out, given those that are passed on."""
    passed_on = shape[0] // 2
    network = ZeroConv(passed_on, 2 * (shape[0] - passed_on), context_features=context_features)
    return ConvCoupling(shape, conditioner=network, context_features=context_features)


def _passed_on(shape: Size) -> Size:
    """Return the shape of the channels that a level passes on."""
    return Size((shape[0] // 2, *shape[1:]))


def _image_flow(
    levels: list[Bijection],
    alpha: float | None,
    prior: Prior | None,
    embedding: nn.Module | None,
    dequantizer: nn.Module | None,
) -> Flow:
    multiscale = Multiscale(levels)
    layers: list[Bijection] = [multiscale]
    if alpha is not None:
        layers.append(Sigmoid(multiscale.data_shape, alpha))
    prior = StandardNormal(multiscale.latent_shape) if prior is None else prior
    return Flow(prior, layers, embedding=embedding, dequantizer=dequantizer)
