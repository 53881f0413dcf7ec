"""The contract over layers and flows of images, and what is true of images alone."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from contract import (
    BATCHES,
    IMAGE_FLOWS,
    IMAGE_LAYERS,
    assert_close,
    assert_every_parameter_learns,
    assert_reads_no_number,
    contexts,
    count_conditioners,
    data,
    latents,
    make_image_flow,
    make_image_layer,
)

from pyroflows import (
    ActNorm,
    Bijection,
    ConvCoupling,
    Flow,
    GaussianMixture,
    InvertibleConv,
    Multiscale,
    OneHot,
    Permutation,
    Squeeze,
    StudentT,
    check,
    fit,
    glow,
    realnvp,
)
from pyroflows.networks import ConvNet, ResNet

SHAPES = [(2, 4, 4), (3, 8, 8)]
ODD = (5, 2, 6)  # channels that do not halve, sides that differ
each_layer = pytest.mark.parametrize("name", IMAGE_LAYERS)
each_flow = pytest.mark.parametrize("name", IMAGE_FLOWS)
with_and_without_context = pytest.mark.parametrize("context_features", [0, 3])


def conditions(flow, *batch):
    """A context for a batch of a flow, labels where it takes these."""
    if not flow.context_features:
        return None
    if isinstance(flow.embedding, OneHot):
        return torch.randint(flow.context_features, batch)
    return torch.randn(*batch, flow.context_features).double()


def jacobian_log_det(method, points, context):
    """Row by row ``log|det|`` of the Jacobian by autograd, between shapes that may differ."""
    found = []
    for number, point in enumerate(points):
        given = None if context is None else context[number]
        jacobian = torch.func.jacrev(lambda x, given=given: method(x[None], given)[0][0].flatten())(point)
        found.append(torch.linalg.slogdet(jacobian.flatten(1)).logabsdet)
    return torch.stack(found)


def assert_contract(bijection, atol=1e-8):
    for forward, points in ((True, latents(bijection, 2)), (False, data(bijection, 2))):
        there, back = bijection.forward_and_log_det, bijection.inverse_and_log_det
        if not forward:
            there, back = back, there
        context = contexts(bijection, 2)
        result, log_det = there(points, context)
        returned, log_det_back = back(result, context)
        assert_close(returned, points, atol)
        assert_close(log_det_back, -log_det, atol)
        assert_close(log_det, jacobian_log_det(there, points, context), max(atol, 1e-8))


@pytest.mark.parametrize("shape", [*SHAPES, ODD])
@with_and_without_context
@each_layer
def test_layer_inverts_and_its_log_det_is_that_of_its_jacobian(name, context_features, shape):
    layer = make_image_layer(name, shape, context_features)
    if context_features and not layer.context_features:
        return
    assert_contract(layer, 1e-6 if "spline" in name else 1e-8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("context_features", [0, 3])
@each_flow
def test_flow_inverts_and_its_log_det_is_that_of_its_jacobian(name, context_features, shape):
    flow = make_image_flow(name, shape, context_features)
    assert flow.event_shape == shape
    assert flow.bijection.latent_shape == (torch.Size(shape).numel(),)
    assert_contract(flow.bijection)


@with_and_without_context
@each_layer
def test_layer_keeps_batch_shapes_and_dtype(name, context_features):
    for dtype in (torch.float32, torch.float64):
        layer = make_image_layer(name, (2, 4, 4), context_features).to(dtype)
        for batch in BATCHES:
            context = contexts(layer, *batch, dtype=dtype)
            y, log_det = layer.forward_and_log_det(latents(layer, *batch, dtype=dtype), context)
            x, log_det_back = layer.inverse_and_log_det(y, context)
            assert x.shape == (*batch, *layer.latent_shape) == layer.inverse_shape(y.shape)
            assert y.shape == (*batch, *layer.data_shape) == layer.forward_shape(x.shape)
            assert log_det.shape == log_det_back.shape == batch
            assert {t.dtype for t in (x, y, log_det, log_det_back)} == {dtype}
        if layer.context_features:
            y, log_det = layer.forward_and_log_det(latents(layer, 4, 1, dtype=dtype), contexts(layer, 3, dtype=dtype))
            assert y.shape == (4, 3, *layer.data_shape)
            assert log_det.shape == (4, 3)


@with_and_without_context
@each_layer
def test_every_parameter_of_a_layer_learns_in_both_directions(name, context_features):
    assert_every_parameter_learns(make_image_layer(name, (2, 4, 4), context_features), rows=4)


@each_layer
def test_layer_survives_copies_with_a_live_record(name):
    layer = make_image_layer(name, (2, 4, 4), 3)
    x, context = latents(layer, 2), contexts(layer, 2)
    y = layer(x, context)
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    fresh = IMAGE_LAYERS[name]((2, 4, 4), 3).double().eval()
    fresh.load_state_dict(layer.state_dict())
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(saved, weights_only=False), fresh]
    for other in copies:
        assert_close(other(x, context), y)
        assert other.inv is not layer.inv
    assert repr(layer)


@each_layer
def test_layer_carries_the_score(name):
    layer = make_image_layer(name, (2, 4, 4), 3)
    x, context = latents(layer, 2), contexts(layer, 2)
    y, _, score = layer.forward_and_score(x, -x, context)
    y = y.detach().requires_grad_()
    back, log_det = layer.inverse_and_log_det(y, context)
    log_prob = (-back.square() / 2).sum() + log_det.sum()
    assert_close(score, torch.autograd.grad(log_prob, y)[0], 1e-6 if "spline" in name else 1e-8)


@with_and_without_context
@each_flow
def test_one_density_whichever_way_it_is_asked(name, context_features):
    flow = make_image_flow(name, (2, 4, 4), context_features)
    context = conditions(flow, 3)
    calls = count_conditioners(flow)
    distribution = flow(context)
    assert distribution.batch_shape == ((3,) if context_features else ())
    assert distribution.event_shape == (2, 4, 4)
    draw = distribution.rsample if flow.prior.has_rsample else distribution.sample
    with torch.set_grad_enabled(flow.prior.has_rsample):
        x = draw(() if context_features else (3,))
        found = distribution.log_prob(x)
    assert set(calls.values()) == {1}
    assert_close(found, flow.log_prob(x, context))
    assert set(calls.values()) == {2}
    if context_features:
        assert flow.sample((5,), context).shape == (5, 3, 2, 4, 4)
        one = conditions(flow)
        assert flow(one).batch_shape == ()
        assert_close(flow.log_prob(x, one), flow.log_prob(x, one.expand(3, *one.shape)))


@pytest.mark.parametrize("training", [False, True])
@with_and_without_context
@each_flow
def test_flow_on_meta_gives_shapes(name, context_features, training):
    flow = IMAGE_FLOWS[name]((2, 4, 4), context_features).double().train(training)
    assert_reads_no_number(flow, conditions(flow, 3))


@pytest.mark.parametrize("name", ["glow", "realnvp", "glow, full convolutions, logit, mixture"])
def test_flow_maps_and_compiles(name):
    torch._dynamo.reset()
    flow = make_image_flow(name, (2, 4, 4))
    x = data(flow.bijection, 3)
    expected = flow.log_prob(x)
    assert_close(torch.func.vmap(flow.log_prob)(x), expected)
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend="eager")
    assert_close(compiled(x), expected)
    flow.train()
    torch._dynamo.reset()
    assert_close(torch.compile(flow.log_prob, backend="eager")(x), expected)


@each_flow
def test_flow_survives_state_dict_and_deepcopy(name):
    flow = make_image_flow(name, (2, 4, 4), 3)
    x, context = data(flow.bijection, 2), conditions(flow, 2)
    torch.manual_seed(1)
    other = IMAGE_FLOWS[name]((2, 4, 4), 3).double().eval()
    other.load_state_dict(flow.state_dict())
    for same in (other, copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert torch.equal(same.log_prob(x, context), flow.log_prob(x, context))


@each_flow
def test_every_parameter_learns_from_log_prob(name):
    flow = make_image_flow(name, (2, 4, 4), 3).train()
    flow.log_prob(data(flow.bijection, 6), conditions(flow, 6)).sum().backward()
    for parameter_name, parameter in flow.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", ["glow, classes", "realnvp"])
def test_check_agrees(name):
    flow = make_image_flow(name, (2, 4, 4), 3)
    context = conditions(flow, 2)
    report = check(flow, flow.sample((), context), context=context)
    assert report.ok, str(report)


def test_a_trained_glow_of_full_depth_round_trips_in_float32():
    torch.manual_seed(0)
    flow = glow((3, 32, 32), num_levels=3, num_steps=16, hidden_channels=16)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-3)
    for _ in range(5):
        x = torch.rand(8, 3, 32, 32)
        optimizer.zero_grad()
        loss = -flow.log_prob(x).mean()
        loss.backward()
        optimizer.step()
    flow.eval()
    with torch.no_grad():
        x = torch.rand(4, 3, 32, 32)
        assert_close(flow.decode(flow.encode(x)), x, 1e-3)


# Closed forms


def test_squeeze_orders_pixels_as_torch_does():
    x = torch.randn(2, 3, 8, 6)
    assert torch.equal(Squeeze((3, 8, 6)).inv(x), torch.nn.functional.pixel_unshuffle(x, 2))
    assert Squeeze((1, 9, 9), factor=3).inv(torch.zeros(1, 9, 9)).shape == (9, 3, 3)


@pytest.mark.parametrize("factored", [True, False])
def test_convolution_is_a_matrix_at_every_pixel(factored):
    layer = make_image_layer("convolution" if factored else "convolution, full", (3, 4, 2))
    mixing = layer.mixing
    matrix = (mixing.weight() if factored else mixing.weight).detach()
    y = torch.randn(5, 3, 4, 2).double()
    x, log_det = layer.inverse_and_log_det(y)
    assert_close(x, torch.einsum("ij,njhw->nihw", matrix, y))
    assert_close(log_det, 8 * torch.linalg.slogdet(matrix).logabsdet.expand(5))


def test_actnorm_of_an_image_standardises_channels():
    layer = ActNorm((3, 4, 4))
    y = torch.randn(50, 3, 4, 4) * torch.tensor([1.0, 2.0, 3.0])[:, None, None] + 5
    x = layer.inv(y)
    assert layer.shift.shape == (3, 1, 1)
    assert_close(x.mean((0, 2, 3)), torch.zeros(3), 1e-5)
    assert_close(x.std((0, 2, 3), correction=0), torch.ones(3), 1e-5)


def test_networks_start_standard_and_their_last_layer_at_zero():
    x = 3 + 2 * torch.randn(64, 2, 8, 8)
    for norm in ("actnorm", "weight"):
        for network in (ConvNet(2, 4, hidden_channels=8, norm=norm), ResNet(2, 4, hidden_channels=8, norm=norm)):
            assert not network(x).any()
            hidden = network.first(x)
            assert_close(hidden.mean((0, 2, 3)), torch.zeros(8), 1e-4)
            assert_close(hidden.std((0, 2, 3), correction=0), torch.ones(8), 1e-4)
            first = copy.deepcopy(network.state_dict())
            network(5 * x)  # only the first batch counts
            assert all(torch.equal(value, first[name]) for name, value in network.state_dict().items())


def test_what_only_was_looked_at_starts_anew():
    network = ConvNet(2, 4, hidden_channels=8)
    network(torch.randn(8, 2, 4, 4))
    network.first.reset_if_untrained()
    assert not network.first.initialized
    network(torch.randn(8, 2, 4, 4))
    with torch.no_grad():
        network.first.bias += 1
    network.first.reset_if_untrained()
    assert network.first.initialized


def test_a_flow_of_additive_couplings_keeps_volume():
    flow = glow((2, 4, 4), num_levels=1, num_steps=2, hidden_channels=4, coupling="additive", permutation="shuffle")
    flow.eval()
    _, log_det = flow.bijection.inverse_and_log_det(torch.randn(3, 2, 4, 4))
    assert_close(log_det, torch.zeros(3))


def test_multiscale_latent_holds_every_level_and_the_split_prior_starts_as_nothing():
    flow = glow((1, 8, 8), num_levels=3, num_steps=1, hidden_channels=4, permutation="none").eval()
    multiscale = flow.layers[0]
    assert isinstance(multiscale, Multiscale)
    assert multiscale.sizes == [16, 16, 32]
    x = torch.randn(2, 1, 8, 8)
    z = flow.encode(x)
    assert_close(z.sort(-1).values, x.flatten(1).sort(-1).values, 1e-5)  # so far only a reordering


# Temperature and classes


def test_temperature_narrows_the_latent():
    flow = glow((1, 4, 4), num_levels=1, num_steps=1, hidden_channels=4).eval()
    torch.manual_seed(0)
    wide = flow.encode(flow.sample((500,))).std()
    narrow = flow.encode(flow.sample((500,), temperature=0.5)).std()
    assert_close(narrow / wide, torch.tensor(0.5), 0.03)
    assert torch.equal(flow.sample((2,), temperature=0.0)[0], flow.sample((1,), temperature=0)[0])
    mixture = GaussianMixture(3, 2, loc=torch.tensor([[-5.0] * 3, [5.0] * 3]), covariance="full")
    assert_close(mixture.sample((100,), temperature=0.0).abs(), torch.full((100, 3), 5.0))
    with pytest.raises(ValueError, match="expected temperature=1 for a StudentT, which has no centre; got 0.7"):
        StudentT(3).sample((2,), temperature=0.7)
    with pytest.raises(ValueError, match=r"expected temperature in \[0, inf\); got -1"):
        flow.sample((2,), temperature=-1)


def test_labels_are_checked():
    flow = glow((1, 4, 4), num_levels=1, num_steps=1, hidden_channels=4, num_classes=3)
    x = torch.zeros(2, 1, 4, 4)
    assert flow.log_prob(x, torch.tensor([0, 2], dtype=torch.uint8)).shape == (2,)
    with pytest.raises(ValueError, match="expected class labels from 0 to 2; got 3"):
        flow.log_prob(x, torch.tensor([1, 3]))
    with pytest.raises(ValueError, match="expected class labels from 0 to 2; got -1"):
        flow.log_prob(x, torch.tensor([-1, 0]))
    with pytest.raises(TypeError, match=r"expected class labels that are integers; got torch.float32"):
        flow.log_prob(x, torch.zeros(2))
    with pytest.raises(ValueError, match="expected a context for the embedding; got none"):
        flow.log_prob(x)


# Bad input


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: glow((3, 28, 28)),
            "a height and width divisible by 8, for 3 halvings; got 28 x 28: use fewer",
        ),
        (lambda: glow((3, 4, 4)), "divisible by 8, for 3 halvings; got 4 x 4"),
        (lambda: glow((3, 33, 32)), "got 33 x 32"),
        (lambda: realnvp((3, 9, 9)), "divisible by 2, for 1 halvings; got 9 x 9"),
        (lambda: glow((28, 28)), r"expected the shape \(C, H, W\) of an image; got \(28, 28\)"),
        (lambda: glow((3, 8, 8), permutation="lu"), "expected permutation to be one of 'conv', 'conv-full', 'shuffle'"),
        (lambda: glow((3, 8, 8), coupling="cubic"), "expected coupling to be one of 'affine', 'additive'; got 'cubic'"),
        (lambda: glow((3, 8, 8), num_classes=3, context_features=2), "`num_classes` cannot be combined with"),
        (lambda: glow((3, 8, 8), norm="batch"), "expected norm to be one of 'actnorm', 'weight', 'group', 'none'"),
        (lambda: glow((3, 8, 8), hidden_channels=0), "expected hidden_channels to be a positive integer; got 0"),
        (lambda: ConvCoupling((1, 4, 4)), "expected at least 2 channels for mask='channels'; got 1: squeeze"),
        (lambda: ConvCoupling((4, 1, 1), mask="checkerboard"), "expected at least 2 pixels"),
        (lambda: ConvCoupling((4, 4, 4), mask="halves"), "expected mask to be one of 'channels', 'checkerboard'"),
        (lambda: Squeeze((1, 3, 4)), "expected a factor that divides the height 3 and the width 4; got 2"),
        (lambda: InvertibleConv((2, 4)), r"expected the shape \(C, H, W\) of an image; got \(2, 4\)"),
        (lambda: Permutation((2, 4)), r"expected a number of features or the shape \(C, H, W\)"),
        (lambda: Multiscale([]), "expected at least one level; got none"),
        (lambda: Multiscale([Squeeze((2, 8, 8)), Squeeze((1, 8, 8))]), "expected level 0 to give fewer channels"),
        (lambda: Multiscale([ActNorm(3)]), "expected level 0 to map images"),
        (lambda: ResNet(2, 2, dropout=1.0), r"expected dropout in \[0, 1\)"),
        (lambda: ConvNet(2, 2, context_features=5, context_shape=(1, 2, 2)), "expected context_features=4 for context"),
    ],
)
def test_refuses_with_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_refuses_options_of_the_other_kind():
    with pytest.raises(TypeError, match="expected options among num_levels, .*; got 'hidden_features'"):
        glow((3, 8, 8), hidden_features=(4,))
    with pytest.raises(TypeError, match="expected options among context_features, .*; got 'num_levels'"):
        realnvp(3, num_levels=2)
    with pytest.raises(TypeError, match="`conditioner` cannot be combined with options.*; got hidden_channels"):
        ConvCoupling((2, 2, 2), conditioner=ConvNet(1, 2), hidden_channels=3)


def test_fit_refuses_pixels_outside_the_logits_interval():
    flow = realnvp((1, 4, 4), num_levels=1, num_blocks=1, hidden_channels=4)
    pixels = torch.rand(20, 1, 4, 4)
    pixels[3, 0, 1, 2] = 1.5
    message = r"expected data in the flow's support, Interval\(.*-0.05.*, .*1.05.*\); got 1.5 in row 3, column .*1 such"
    with pytest.raises(ValueError, match=message):
        fit(flow, pixels, epochs=1, progress=False)


def test_refuses_images_of_another_shape_or_kind():
    flow = make_image_flow("glow", (2, 4, 4))
    assert isinstance(flow, Flow)
    assert isinstance(flow.bijection, Bijection)
    with pytest.raises(ValueError, match=r"expected a tensor of shape \(\*batch, 2, 4, 4\); got \(3, 1, 4, 4\)"):
        flow.log_prob(torch.zeros(3, 1, 4, 4).double())
    with pytest.raises(TypeError, match=r"expected a floating-point tensor; got torch.uint8"):
        flow.log_prob(torch.zeros(3, 2, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="expected a flow with a dequantizer; got one without"):
        flow.dequantized_log_prob(torch.zeros(3, 2, 4, 4, dtype=torch.uint8))


def test_a_flow_of_labels_is_mapped():
    flow = glow((1, 4, 4), num_levels=1, num_steps=1, hidden_channels=4, num_classes=3).eval()
    y, labels = torch.rand(5, 1, 4, 4), torch.tensor([0, 2, 1, 1, 0])
    assert_close(torch.func.vmap(flow.log_prob)(y, labels), flow.log_prob(y, labels), 1e-5)
    with pytest.raises(ValueError, match=r"expected class labels from 0 to 2; got 3"):
        flow.embedding.check(labels + 1)
    flow.embedding.check(labels[:0])


@pytest.mark.parametrize("mask", ["channels", "checkerboard"])
@pytest.mark.parametrize("channels, size", [(1, 3), (2, 3), (3, 3), (4, 1)])
def test_a_conditioner_of_ones_own_gives_a_parameter_for_each_number(mask, channels, size):
    network = torch.nn.Conv2d(4 if mask == "checkerboard" else 2, channels, size)  # without padding
    layer = ConvCoupling((4, 4, 4), mask=mask, conditioner=_Alone(network))
    if (mask, channels, size) == ("channels", 4, 1):
        assert layer.forward_and_log_det(torch.zeros(2, 4, 4, 4))[1].shape == (2,)
        return
    with pytest.raises(ValueError, match=rf"returns \(\*batch, [48], 4, 4\); got \(2, {channels}, "):
        layer.forward_and_log_det(torch.zeros(2, 4, 4, 4))


class _Alone(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, context=None):
        return self.network(x)
