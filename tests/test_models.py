"""The named flows: what their options build, and that each learns a density it cannot start with."""

from __future__ import annotations

import copy

import pytest
import torch

from pyroflows import (
    ActNorm,
    BatchNorm,
    Coupling,
    DenseLinear,
    DiagonalNormal,
    ElementwiseAffine,
    Flow,
    Inverse,
    LULinear,
    MaskedAutoregressive,
    OneHot,
    Permutation,
    Planar,
    Radial,
    fit,
    glow,
    iaf,
    maf,
    nice,
    nsf,
    planar,
    radial,
    realnvp,
)

SMALL = {"num_layers": 2, "hidden_features": (16,)}


def kinds(flow):
    return [type(layer) for layer in flow.layers]


def test_layers_of_each():
    assert kinds(realnvp(3, **SMALL)) == [Coupling, LULinear, ActNorm] * 2
    assert kinds(glow(3, num_steps=2)) == [Coupling, LULinear, ActNorm] * 2
    assert kinds(nice(3, **SMALL)) == [ElementwiseAffine, Coupling, Coupling, ActNorm]
    assert kinds(maf(3, **SMALL)) == [MaskedAutoregressive, LULinear, ActNorm] * 2
    assert kinds(iaf(3, **SMALL)) == [Inverse, LULinear, ActNorm] * 2
    assert kinds(nsf(3, **SMALL)) == [Coupling, LULinear, ActNorm] * 2
    assert kinds(nsf(3, autoregressive=True, **SMALL)) == [MaskedAutoregressive, LULinear, ActNorm] * 2
    assert kinds(planar(3, **SMALL)) == [Planar, Planar, ActNorm]
    assert kinds(radial(3, **SMALL)) == [Radial, Radial, ActNorm]


@pytest.mark.parametrize(
    "permutation, kind",
    [("lu", LULinear), ("dense", DenseLinear), ("reverse", None), ("shuffle", Permutation), ("none", None)],
)
def test_permutations(permutation, kind):
    for build in (realnvp, maf, iaf, nsf):
        middle = [
            k for k in kinds(build(3, permutation=permutation, **SMALL)) if k in (LULinear, DenseLinear, Permutation)
        ]
        assert middle == ([] if kind is None else [kind] * 2)


@pytest.mark.parametrize(
    "build, features, more", [(maf, 4, {}), (maf, 4, {"order": [2, 0, 3, 1]}), (realnvp, 4, {}), (realnvp, 5, {})]
)
def test_a_reversal_is_that_of_the_paper_without_its_price(build, features, more):
    """Of the same weights, the stack is that of layers alike with a reversal after each."""
    options = {"num_layers": 4, "hidden_features": (16,), "norm": "none", **more}
    flow, plain = (build(features, permutation=p, **options) for p in ("reverse", "none"))
    stack = []
    for number, layer in enumerate(flow.layers):
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        alike = plain.layers[0] if number % 2 else layer
        if number % 2:
            alike = copy.deepcopy(alike)
            state = layer.state_dict()
            linears = [key for key in state if key.startswith("conditioner") and key.endswith(("weight", "bias"))]
            first, last = linears[0], linears[-2:]
            state[first] = state[first].flip(-1)
            for key in last:  # a coupling's log-scales come after all its shifts
                kinds = state[key].unflatten(0, (-1, 2) if build is maf else (2, -1))
                state[key] = kinds.flip(0 if build is maf else 1).flatten(0, 1)
            alike.load_state_dict({key: value for key, value in state.items() if key in linears}, strict=False)
        stack += [alike, Permutation(features, "reverse")]
    x = torch.randn(7, features, dtype=torch.float64)
    torch.testing.assert_close(Flow(flow.prior, stack).double().log_prob(x), flow.double().log_prob(x))


@pytest.mark.parametrize("norm, kind", [("actnorm", ActNorm), ("batchnorm", BatchNorm), ("none", None)])
def test_norms(norm, kind):
    for build in (realnvp, maf, iaf, nsf):
        found = [k for k in kinds(build(3, norm=norm, **SMALL)) if k in (ActNorm, BatchNorm)]
        assert found == ([] if kind is None else [kind] * 2)


def test_every_feature_is_moved():
    x = torch.randn(5, 4)
    for build in (realnvp, nsf, nice):
        flow = build(4, **({"permutation": "none", "norm": "none"} if build is not nice else {}), **SMALL)
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        assert (flow.eval().bijection(x) != x).any(0).all()


@pytest.mark.parametrize("build", [realnvp, glow, nice, maf, iaf, nsf, planar, radial])
def test_prior_and_context_arrive(build):
    prior = DiagonalNormal(2)
    flow = build(2, context_features=3, prior=prior)
    assert flow.prior is prior
    assert flow.context_features == 3


@pytest.mark.parametrize("build", [realnvp, glow, nice, maf, iaf, nsf, planar, radial])
@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"features": 0}, ValueError, "features.*got 0"),
        ({"features": -1}, ValueError, "features.*got -1"),
        ({"features": 2.0}, (ValueError, TypeError), "features.*2.0"),
        ({"features": 2, "context_features": -1}, ValueError, "context_features.*got -1"),
        ({"features": 2, "hidden_features": (0,)}, ValueError, "hidden_features.*got"),
        ({"features": 2, "n_layers": 3}, TypeError, "n_layers"),
    ],
)
def test_wrong_sizes_and_names(build, options, error, message):
    if build in (planar, radial) and "hidden_features" in options:
        options = {**options, "context_features": 1}
    with pytest.raises(error, match=message):
        build(**options)


@pytest.mark.parametrize(
    "build, options",
    [
        (realnvp, {"num_layers": 4}),
        (glow, {"num_steps": 4}),
        (maf, {"num_layers": 3}),
        (nsf, {"num_layers": 3, "num_bins": 4}),
        (nsf, {"num_layers": 2, "num_bins": 4, "autoregressive": True}),
        (nice, {"num_layers": 4}),
    ],
)
def test_each_learns_a_banana(build, options):
    """The banana's entropy is 1.92 nats; the best Gaussian needs 3.22."""
    x, held = (_banana(rows, seed) for rows, seed in ((3000, 0), (1000, 1)))
    gaussian = torch.distributions.MultivariateNormal(x.mean(0), x.T.cov())
    torch.manual_seed(0)
    flow = build(2, hidden_features=(32, 32), **options)
    fit(flow, x, validation=held, epochs=12, learning_rate=5e-3, batch_size=200, seed=0)
    with torch.no_grad():
        found = -flow.log_prob(held).mean()
    assert found < -gaussian.log_prob(held).mean() - 0.6


def _banana(rows, seed):
    x, noise = torch.randn(2, rows, generator=torch.Generator().manual_seed(seed))
    return torch.stack([x, x.square() + 0.4 * noise], 1)


@pytest.mark.parametrize("permutation", ["lu", "reverse", "shuffle", "none"])
@pytest.mark.parametrize("mask", ["halves", "checkerboard"])
@pytest.mark.parametrize("features", [2, 4, 5])
def test_every_latent_is_a_nonlinear_function_of_the_data(permutation, mask, features):
    torch.manual_seed(0)
    flow = realnvp(features, permutation=permutation, mask=mask, activation="tanh", hidden_features=(8,))
    flow = flow.double().eval()
    for parameter in flow.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    x, step = torch.randn(2, 200, features, dtype=torch.float64)
    z = [flow.bijection.inverse_and_log_det(x + k * step)[0] for k in (-1, 0, 1)]
    bend = (z[0] - 2 * z[1] + z[2]).abs().amax(0)
    assert (bend > 1e-3).all()


@pytest.mark.parametrize(
    "num_classes, labels, message",
    [
        (3, [3], "expected class labels from 0 to 2; got 3"),
        (3, [1, 3, 0, 3], "expected class labels from 0 to 2; got 3"),
        (3, [5, -1, 2, 3], "expected class labels from 0 to 2; got -1, 3 and 5"),
        (3, list(range(40)), "expected class labels from 0 to 2; got 37 others, from 3 to 39"),
        (1, [0, 1], "expected class labels from 0 to 0; got 1"),
    ],
)
def test_labels_of_no_class_are_named(num_classes, labels, message):
    for shape in ((-1,), (1, -1)):
        with pytest.raises(ValueError) as error:
            OneHot(num_classes)(torch.tensor(labels, dtype=torch.int8).reshape(shape))
        assert str(error.value) == message
