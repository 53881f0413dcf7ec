"""What the contract runs over: constructors of layers, flows, priors; a new one gets all its tests by one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributions import biject_to

from pyroflows import (
    MLP,
    ActNorm,
    Affine,
    BatchNorm,
    Bijection,
    Compose,
    ConvCoupling,
    Coupling,
    DenseLinear,
    DiagonalNormal,
    ElementwiseAffine,
    Flow,
    Gaussianize,
    GaussianMixture,
    Inverse,
    InvertibleConv,
    Logit,
    LULinear,
    MaskedAutoregressive,
    Multiscale,
    Permutation,
    Planar,
    Prior,
    Radial,
    ResNet,
    Sigmoid,
    Sinh,
    Spline,
    Squeeze,
    Standardize,
    StandardNormal,
    StudentT,
    TriangularAffine,
    Uniform,
    glow,
    iaf,
    maf,
    nice,
    nsf,
    planar,
    radial,
    realnvp,
)
from pyroflows.networks.data_dependent import DataDependent

__all__ = [
    "BATCHES",
    "FLOWS",
    "IMAGE_FLOWS",
    "IMAGE_LAYERS",
    "LAYERS",
    "PRIORS",
    "Method",
    "assert_close",
    "assert_every_parameter_learns",
    "assert_reads_no_number",
    "bijection_cases",
    "contexts",
    "count_conditioners",
    "data",
    "latents",
    "make",
    "make_flow",
    "make_image_flow",
    "make_image_layer",
    "perturb",
]

Module = TypeVar("Module", bound=nn.Module)
HIDDEN = (12, 12)
BATCHES = [(), (3,), (2, 3), (0,)]


def _coupling(features: int, context_features: int, **options) -> Bijection:
    return Coupling(features, context_features=context_features, **{"hidden_features": HIDDEN, **options})


def _autoregressive(features: int, context_features: int, **options) -> Bijection:
    return MaskedAutoregressive(features, context_features=context_features, **{"hidden_features": HIDDEN, **options})


def _batchnorm(features: int, context_features: int) -> Bijection:
    layer = BatchNorm(features)
    layer.set_statistics(1 + 2 * torch.randn(50, features))
    return layer


def _triangular(features: int, diagonal: bool) -> Bijection:
    layer = TriangularAffine(features, diagonal=diagonal)
    scale = torch.randn(features, features).tril(-1) + torch.diag(1 + torch.rand(features))
    layer.start_at(torch.randn(features), scale)
    return layer


LAYERS: dict[str, Callable[[int, int], Bijection]] = {
    "actnorm": lambda d, c: ActNorm(d),
    "batchnorm": _batchnorm,
    "elementwise affine": lambda d, c: ElementwiseAffine(d, context_features=c),
    "standardize": lambda d, c: Standardize(torch.randn(d), 0.5 + torch.rand(d)),
    "sinh": lambda d, c: Sinh(torch.randn(d), 0.5 + torch.rand(d)),
    "gaussianize": lambda d, c: Gaussianize(torch.randn(d, 3), 0.5 + torch.rand(d, 3), 0.2 + torch.rand(d, 3)),
    "sigmoid": lambda d, c: Sigmoid(d),
    "sigmoid with a margin": lambda d, c: Sigmoid(d, alpha=0.05),
    "logit": lambda d, c: Logit(d),
    "logit with a margin": lambda d, c: Logit(d, alpha=0.05),
    "permutation, reverse": lambda d, c: Permutation(d, "reverse"),
    "permutation, random": lambda d, c: Permutation(d, "random", seed=1),
    "permutation, given": lambda d, c: Permutation(d, torch.arange(d).roll(1)),
    "triangular": lambda d, c: _triangular(d, diagonal=False),
    "triangular, diagonal": lambda d, c: _triangular(d, diagonal=True),
    "lu": lambda d, c: LULinear(d),
    "lu, identity without bias": lambda d, c: LULinear(d, init="identity", bias=False),
    "dense": lambda d, c: DenseLinear(d),
    "dense, identity without bias": lambda d, c: DenseLinear(d, init="identity", bias=False),
    "planar": lambda d, c: Planar(d, context_features=c, hidden_features=HIDDEN),
    "radial": lambda d, c: Radial(d, context_features=c, hidden_features=HIDDEN),
    "coupling, affine": _coupling,
    "coupling, flipped": lambda d, c: _coupling(d, c, flip=True),
    "coupling, checkerboard": lambda d, c: _coupling(d, c, mask="checkerboard"),
    "coupling, checkerboard flipped": lambda d, c: _coupling(d, c, mask="checkerboard", flip=True),
    "coupling, mask of one": lambda d, c: _coupling(d, c, mask=torch.arange(d) == d // 2),
    "coupling, mask of all": lambda d, c: _coupling(d, c, mask=[True] * d),
    "coupling, sigmoid scale": lambda d, c: _coupling(d, c, transformer=Affine(scale="sigmoid")),
    "coupling, bounded shift": lambda d, c: _coupling(d, c, transformer=Affine(bound=1.0, shift_bound=0.5)),
    "coupling, additive": lambda d, c: _coupling(d, c, transformer="additive"),
    "coupling, spline": lambda d, c: _coupling(d, c, transformer="spline", flip=True),
    "coupling, residual": lambda d, c: _coupling(d, c, residual=True, activation="silu"),
    "coupling, no hidden layer": lambda d, c: _coupling(d, c, hidden_features=()),
    "coupling, own conditioner": lambda d, c: Coupling(
        d, context_features=c, conditioner=MLP(d // 2, 2 * (d - d // 2), hidden_features=(7,), context_features=c)
    ),
    "autoregressive, affine": _autoregressive,
    "autoregressive, reversed": lambda d, c: _autoregressive(d, c, order="reversed"),
    "autoregressive, random": lambda d, c: _autoregressive(d, c, order="random", seed=1),
    "autoregressive, given order": lambda d, c: _autoregressive(d, c, order=torch.arange(d).roll(1)),
    "autoregressive, sigmoid scale": lambda d, c: _autoregressive(d, c, transformer=Affine(scale="sigmoid")),
    "autoregressive, additive": lambda d, c: _autoregressive(d, c, transformer="additive"),
    "autoregressive, spline": lambda d, c: _autoregressive(d, c, transformer=Spline(num_bins=5, bound=2.0)),
    "autoregressive, residual": lambda d, c: _autoregressive(d, c, residual=True, activation="tanh"),
    "autoregressive, narrow": lambda d, c: _autoregressive(d, c, hidden_features=(2, 3), activation="tanh"),
    "autoregressive, no hidden layer": lambda d, c: _autoregressive(d, c, hidden_features=()),
    "inverse autoregressive": lambda d, c: Inverse(_autoregressive(d, c)),
    "inverse of the inverse": lambda d, c: Inverse(Inverse(_autoregressive(d, c))),
    "inverse planar": lambda d, c: Inverse(Planar(d, context_features=c, hidden_features=HIDDEN)),
    "compose": lambda d, c: Compose([_coupling(d, c), ActNorm(d), LULinear(d), _autoregressive(d, c), Sigmoid(d)]),
    "compose of composes": lambda d, c: Compose(
        [Compose([LULinear(d)]), Inverse(Compose([_coupling(d, c), Sigmoid(d)]).inv)]
    ),
    "inverse of a compose": lambda d, c: Inverse(Compose([Planar(d), _coupling(d, c), Permutation(d, "reverse")])),
}

SMALL = {"num_layers": 3, "hidden_features": HIDDEN}

FLOWS: dict[str, Callable[[int, int], Flow]] = {
    "realnvp": lambda d, c: realnvp(d, context_features=c, **SMALL),
    "realnvp, batchnorm and reverse": lambda d, c: realnvp(
        d, context_features=c, norm="batchnorm", permutation="reverse", mask="checkerboard", scale="sigmoid", **SMALL
    ),
    "realnvp, nothing between": lambda d, c: realnvp(d, context_features=c, norm="none", permutation="none", **SMALL),
    "realnvp, dense, student": lambda d, c: realnvp(
        d, context_features=c, permutation="dense", prior=StudentT(d, learnable=True), **SMALL
    ),
    "glow": lambda d, c: glow(d, context_features=c, num_steps=3, hidden_features=HIDDEN),
    "glow, additive": lambda d, c: glow(
        d, context_features=c, num_steps=3, hidden_features=HIDDEN, coupling="additive"
    ),
    "nice": lambda d, c: nice(d, context_features=c, **SMALL),
    "maf": lambda d, c: maf(d, context_features=c, **SMALL),
    "maf, shuffle, batchnorm, mixture": lambda d, c: maf(
        d,
        context_features=c,
        residual=False,
        order="random",
        permutation="shuffle",
        norm="batchnorm",
        prior=GaussianMixture(d, 3, seed=0),
        **SMALL,
    ),
    "iaf": lambda d, c: iaf(d, context_features=c, **SMALL),
    "iaf, diagonal normal": lambda d, c: iaf(d, context_features=c, order="reversed", prior=DiagonalNormal(d), **SMALL),
    "nsf": lambda d, c: nsf(d, context_features=c, **SMALL),
    "nsf, autoregressive": lambda d, c: nsf(d, context_features=c, autoregressive=True, **SMALL),
    "planar": lambda d, c: planar(d, context_features=c, **SMALL),
    "radial": lambda d, c: radial(d, context_features=c, **SMALL),
}

Shape = tuple[int, int, int]


def _conv(shape: Shape, context_features: int, **options) -> Bijection:
    return ConvCoupling(shape, context_features=context_features, **{"hidden_channels": 6, **options})


def _resnet(shape: Shape, context_features: int, **options) -> Bijection:
    kept = shape[0] // 2
    network = ResNet(
        kept,
        2 * (shape[0] - kept),
        hidden_channels=8,
        num_blocks=2,
        context_features=context_features,
        **{"activation": "silu", **options},
    )
    return ConvCoupling(shape, context_features=context_features, conditioner=network)


def _multiscale(shape: Shape, context_features: int) -> Bijection:
    squeeze = Squeeze(shape)
    channels, height, width = squeeze.latent_shape
    below = Compose(
        [_conv((channels // 2, height, width), context_features), InvertibleConv((channels // 2, height, width))]
    )
    return Multiscale([below, Compose([_conv(squeeze.latent_shape, context_features), squeeze])])


IMAGE_LAYERS: dict[str, Callable[[Shape, int], Bijection]] = {
    "squeeze": lambda s, c: Squeeze(s),
    "unsqueeze": lambda s, c: Squeeze((s[0], 2 * s[1], 2 * s[2])).inv,
    "actnorm": lambda s, c: ActNorm(s),
    "permutation, reverse": lambda s, c: Permutation(s, "reverse"),
    "permutation, random": lambda s, c: Permutation(s, "random", seed=1),
    "convolution": lambda s, c: InvertibleConv(s),
    "convolution, identity": lambda s, c: InvertibleConv(s, init="identity"),
    "convolution, full": lambda s, c: InvertibleConv(s, factored=False),
    "elementwise affine": lambda s, c: ElementwiseAffine(s, context_features=c),
    "sigmoid": lambda s, c: Sigmoid(s, alpha=0.05),
    "coupling": _conv,
    "coupling, flipped": lambda s, c: _conv(s, c, flip=True),
    "coupling, additive": lambda s, c: _conv(s, c, transformer="additive"),
    "coupling, sigmoid scale": lambda s, c: _conv(s, c, transformer=Affine(scale="sigmoid")),
    "coupling, spline": lambda s, c: _conv(s, c, transformer="spline"),
    "coupling, checkerboard": lambda s, c: _conv(s, c, mask="checkerboard"),
    "coupling, checkerboard flipped": lambda s, c: _conv(s, c, mask="checkerboard", flip=True),
    "coupling, checkerboard spline": lambda s, c: _conv(s, c, mask="checkerboard", transformer="spline"),
    "coupling, weight norm": lambda s, c: _conv(s, c, norm="weight", activation="silu"),
    "coupling, no norm": lambda s, c: _conv(s, c, norm="none", activation="tanh"),
    "coupling, residual": _resnet,
    "coupling, residual with group norm": lambda s, c: _resnet(s, c, norm="group"),
    "multiscale": _multiscale,
    "inverse of a multiscale": lambda s, c: Inverse(_multiscale(s, c)),
}

_GLOW = {"num_levels": 2, "num_steps": 2, "hidden_channels": 6}
_REALNVP = {"num_levels": 2, "num_blocks": 1, "hidden_channels": 4}

IMAGE_FLOWS: dict[str, Callable[[Shape, int], Flow]] = {
    "glow": lambda s, c: glow(s, context_features=c, **_GLOW),
    "glow, classes": lambda s, c: glow(s, num_classes=c, **_GLOW),
    "glow, additive and shuffled": lambda s, c: glow(
        s, context_features=c, coupling="additive", permutation="shuffle", learn_top=False, **_GLOW
    ),
    "glow, full convolutions, logit, mixture": lambda s, c: glow(
        s,
        context_features=c,
        permutation="conv-full",
        scale="sigmoid",
        norm="weight",
        alpha=0.05,
        prior=GaussianMixture(torch.Size(s).numel(), 3, seed=0),
        **_GLOW,
    ),
    "glow, one level": lambda s, c: glow(s, context_features=c, permutation="reverse", **{**_GLOW, "num_levels": 1}),
    "realnvp": lambda s, c: realnvp(s, context_features=c, **_REALNVP),
    "realnvp, no logit, one level": lambda s, c: realnvp(
        s, num_classes=c, alpha=None, norm="actnorm", **{**_REALNVP, "num_levels": 1}
    ),
}

PRIORS: dict[str, Callable[[int], Prior]] = {
    "standard normal": StandardNormal,
    "diagonal normal": DiagonalNormal,
    "mixture": lambda d: GaussianMixture(d, 3, seed=0),
    "mixture, full": lambda d: GaussianMixture(d, 2, covariance="full", seed=0),
    "mixture, fixed": lambda d: GaussianMixture(d, 2, learnable=False, seed=0),
    "student": StudentT,
    "student, learnable": lambda d: StudentT(d, df=4.0, learnable=True),
    "uniform": lambda d: Uniform(d, -20.0, 20.0),
}


def make(name: str, features: int, context_features: int = 0, *, scale: float = 0.1) -> Bijection:
    """A layer in float64 and evaluation mode, away from the identity."""
    torch.manual_seed(0)
    return perturb(LAYERS[name](features, context_features).double(), scale)


def make_flow(name: str, features: int, context_features: int = 0, *, scale: float = 0.04) -> Flow:
    """The same for a flow."""
    torch.manual_seed(0)
    return perturb(FLOWS[name](features, context_features).double(), scale)


def make_image_layer(name: str, shape: Shape, context_features: int = 0, *, scale: float = 0.1) -> Bijection:
    """A layer of images in float64 and evaluation mode, away from the identity."""
    torch.manual_seed(0)
    return perturb(IMAGE_LAYERS[name](shape, context_features).double(), scale)


def make_image_flow(name: str, shape: Shape, context_features: int = 0, *, scale: float = 0.04) -> Flow:
    """The same for a flow of images."""
    torch.manual_seed(0)
    return perturb(IMAGE_FLOWS[name](shape, context_features).double(), scale)


def perturb(module: Module, scale: float) -> Module:
    """Move every parameter; an ActNorm, and the norm of a network, counts as started."""
    for part in module.modules():
        if isinstance(part, ActNorm):
            part.train().forward_and_log_det(part.shift.detach().expand(part.latent_shape))
        elif isinstance(part, DataDependent) and part.awaits_data:
            part.initialize({})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module.eval()


def latents(bijection: Bijection, *batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Points of the latent side, in its domain."""
    return biject_to(bijection.domain)(torch.randn(*batch, *bijection.latent_shape, dtype=dtype))


def data(bijection: Bijection, *batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Points of the data side, in its codomain."""
    return biject_to(bijection.codomain)(torch.randn(*batch, *bijection.data_shape, dtype=dtype))


def contexts(module: Bijection | Flow, *batch: int, dtype: torch.dtype = torch.float64) -> Tensor | None:
    """A context for a batch, where the module takes one."""
    return torch.randn(*batch, module.context_features, dtype=dtype) if module.context_features else None


def bijection_cases() -> list[tuple[str, int, int]]:
    """Name, features and context_features of every case; with a context only what takes one."""
    takes_context = {name: build(2, 3).context_features > 0 for name, build in LAYERS.items()}
    return [(n, d, c) for n in LAYERS for d in (1, 2, 5, 17) for c in (0, 3) if not c or takes_context[n]]


def assert_close(found, wanted, atol=1e-8):
    torch.testing.assert_close(found, wanted, rtol=atol, atol=atol)


def assert_every_parameter_learns(layer, rows):
    for method, points in ((layer.forward_and_log_det, latents), (layer.inverse_and_log_det, data)):
        layer.zero_grad()
        x = points(layer, rows).requires_grad_()
        result, log_det = method(x, contexts(layer, rows))
        (result.square().sum() + log_det.sum()).backward()
        assert x.grad.any()
        for parameter_name, parameter in layer.named_parameters():
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all(), parameter_name
            assert parameter.grad.any(), parameter_name


def assert_reads_no_number(flow, context=None):
    """Score, sample and take gradients on the device "meta", which has shapes but no numbers."""
    flow.to("meta")
    context = None if context is None else context.to("meta")
    x = torch.empty(3, *flow.event_shape, dtype=flow.dtype, device="meta", requires_grad=True)
    log_prob = flow.log_prob(x, context)
    assert log_prob.shape == (3,)
    assert log_prob.is_meta
    log_prob.sum().backward()
    assert x.grad.shape == x.shape
    assert flow.sample((3,) if context is None else (), context).shape == x.shape


class Method(nn.Module):
    """One method of a module as a call, which torch can trace, and hand other weights."""

    def __init__(self, module: nn.Module, name: str):
        super().__init__()
        self.module, self.name = module, name

    def forward(self, *arguments: Tensor | None):
        return getattr(self.module, self.name)(*arguments)


def count_conditioners(module):
    """Calls of each conditioner from now on."""
    calls = {name: 0 for name, _ in module.named_modules() if name.endswith("conditioner")}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    for name, part in module.named_modules():
        if name in calls:
            part.register_forward_hook(count(name))
    return calls
