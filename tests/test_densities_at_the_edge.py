"""Densities where they are zero, log-determinants of a wrong shape, and dtypes that a density cannot have."""

import math

import pyro.distributions as dist
import pytest
import torch
from contract import LAYERS, data, latents, make
from torch import nn
from torch.distributions import biject_to

from pyroflows import (
    Bijection,
    Compose,
    Conditioned,
    Coupling,
    DiagonalNormal,
    ElementwiseAffine,
    Flow,
    Inverse,
    Logit,
    LogitNormal,
    MaskedAutoregressive,
    Multiscale,
    Prior,
    Sigmoid,
    Spline,
    StandardNormal,
    Uniform,
    check,
    fit,
    realnvp,
)


@pytest.mark.parametrize(
    "layers",
    [
        [Sigmoid(1)],
        [Inverse(Logit(1))],
        [ElementwiseAffine(1), Sigmoid(1)],
        [Compose([Sigmoid(1)]), ElementwiseAffine(1)],
    ],
)
def test_outside_the_support_and_on_its_ends_the_density_is_zero(layers):
    x = torch.tensor([[-0.5], [0.0], [1.0], [1.5], [0.3], [math.nan]], requires_grad=True)
    log_prob = Flow(StandardNormal(1), layers).log_prob(x)
    assert log_prob[:4].tolist() == [-math.inf] * 4
    assert log_prob[4].isfinite()
    assert log_prob[5].isnan()
    (gradient,) = torch.autograd.grad(log_prob[:5].sum(), x)
    assert gradient[:4].flatten().tolist() == [0.0] * 4
    assert gradient[4] != 0
    assert gradient[4].isfinite()


def test_parameters_have_finite_gradients_beside_rows_outside_the_support():
    flow = Flow(StandardNormal(2), [Coupling(2), Sigmoid(2)])
    log_prob = flow.log_prob(torch.tensor([[0.3, 0.4], [2.0, 0.5], [0.2, -1.0]]))
    assert log_prob.isfinite().tolist() == [True, False, False]
    log_prob[log_prob.isfinite()].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in flow.parameters())


@pytest.mark.parametrize("alpha", [0.0, 1e-5, 0.05, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saturated_sample_can_be_scored(alpha, dtype):
    flow = Flow(StandardNormal(3), [ElementwiseAffine(3), Sigmoid(3, alpha)]).to(dtype)
    z = torch.linspace(-1000, 1000, 801, dtype=dtype)[:, None].expand(-1, 3)
    assert flow.log_prob(flow.decode(z)).isfinite().all()


def samples_of_a_flow_of_images(seed, dtype, learning_rate):
    torch.manual_seed(seed)
    flow = realnvp((3, 16, 16), num_levels=2, num_blocks=1, hidden_channels=8).to(dtype)
    optimizer = torch.optim.Adam(flow.parameters(), learning_rate)
    x = torch.rand(8, 3, 16, 16, dtype=dtype)
    for _ in range(3):
        optimizer.zero_grad()
        (-flow.log_prob(x).mean()).backward()
        optimizer.step()
    return flow.eval(), flow.sample((16,))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("dtype", "learning_rate"), [(torch.float32, 0.01), (torch.float64, 0.1), (torch.float64, 0.5)]
)
def test_images_that_saturate_can_be_scored(seed, dtype, learning_rate):
    flow, samples = samples_of_a_flow_of_images(seed, dtype, learning_rate)
    assert samples.isfinite().all()
    assert flow.log_prob(samples).isfinite().all()


def test_images_that_saturate_have_a_score_in_single_precision_if_only_minus_infinity():
    # Densities are e to the -1e25 and less here, for some machines' rounding below the range of single precision.
    flow, samples = samples_of_a_flow_of_images(0, torch.float32, 0.1)
    log_prob = flow.log_prob(samples)
    assert samples.isfinite().all()
    assert (log_prob.isfinite() | log_prob.isneginf()).all()


@pytest.mark.parametrize("learning_rate", [0.001, 0.01])
def test_images_survive_full_steps_of_adam_with_no_option_set(learning_rate):
    torch.manual_seed(0)
    flow = realnvp((3, 16, 16))
    optimizer = torch.optim.Adam(flow.parameters(), learning_rate)
    x = torch.rand(8, 3, 16, 16)
    for _ in range(3):
        optimizer.zero_grad()
        (-flow.log_prob(x).mean()).backward()
        optimizer.step()
    samples = flow.eval().sample((8,))
    assert samples.isfinite().all()
    assert flow.log_prob(samples).isfinite().all()


@pytest.mark.parametrize("name", LAYERS)
def test_torchs_own_hooks_give_the_map_alone(name):
    layer = make(name, 3)
    x, y = latents(layer, 4), data(layer, 4)
    torch.testing.assert_close(layer._call(x), layer.forward_and_log_det(x)[0])
    torch.testing.assert_close(layer._inverse(y), layer.inverse_and_log_det(y)[0])


def bounded_stacks(context_features=0):
    """Stacks whose data end is an interval, by name; the interval is (0, 1) unless the last layer moves it."""
    coupling = Coupling(2, context_features=context_features, hidden_features=(8,))
    return {
        "sigmoid": [coupling, Sigmoid(2)],
        "inverse of a logit": [coupling, Inverse(Logit(2))],
        "nested": [Compose([coupling, Compose([Sigmoid(2)])])],
        "inverse of a compose": [Inverse(Compose([Logit(2), coupling.inv]))],
        "there, back and there": [Sigmoid(2), Logit(2), coupling, Sigmoid(2)],
        "moved": [coupling, Sigmoid(2), ElementwiseAffine(2)],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("context_features", [0, 2])
@pytest.mark.parametrize("name", bounded_stacks())
def test_rows_outside_have_no_density_and_do_not_touch_the_gradients_of_those_inside(name, context_features, dtype):
    torch.manual_seed(0)
    flow = Flow(DiagonalNormal(2), bounded_stacks(context_features)[name]).to(dtype)
    x = torch.tensor([[0.3, 0.4], [-0.1, 0.5], [0.5, 0.0], [1.0, 0.5], [0.2, 7.0], [0.9, 0.1]], dtype=dtype)
    context = torch.randn(6, 2, dtype=dtype) if context_features else None
    inside = [0, 5]
    found = []
    for rows in (slice(None), inside):
        given = None if context is None else context[rows].clone().requires_grad_()
        point = x[rows].clone().requires_grad_()
        log_prob = flow.log_prob(point, given)
        total = log_prob[log_prob.isfinite()].sum()
        leaves = [point, *flow.parameters()] + ([] if given is None else [given])
        found.append((log_prob, torch.autograd.grad(total, leaves)))
    (all_rows, slopes), (alone, expected) = found
    assert all_rows.isneginf().tolist() == [False, True, True, True, True, False]
    torch.testing.assert_close(all_rows[inside], alone)
    for slope, wanted in zip(slopes, expected, strict=True):
        torch.testing.assert_close(slope[inside] if len(slope) == 6 and wanted.shape != slope.shape else slope, wanted)
    assert flow.encode(x, context).isnan().any(-1).tolist() == [False, True, True, True, True, False]


class OnInterval(Prior):
    """A prior by any distribution of one number."""

    def __init__(self, features, distribution):
        super().__init__(features)
        self.distribution = distribution
        self.register_buffer("number", torch.zeros(features))

    def forward(self):
        return self.distribution.expand(self.event_shape).to_event(1)


@pytest.mark.parametrize(
    ("distribution", "outside"),
    [
        (LogitNormal(torch.tensor(0.0), torch.tensor(1.0)), [-0.5, 0.0, 1.0, 1.5]),
        (dist.TransformedDistribution(dist.Normal(0.0, 1.0), [dist.transforms.SigmoidTransform()]), [-0.5, 1.5]),
        (dist.Beta(2.0, 2.0), [-0.5, 0.0, 1.0, 1.5]),
        (dist.Gamma(2.0, 1.0), [-0.5, 0.0]),
        (dist.LogNormal(0.0, 1.0), [-0.5, 0.0]),
    ],
    ids=["logit-normal", "sigmoid of a normal", "beta", "gamma", "log-normal"],
)
def test_a_prior_of_ones_own_has_no_density_outside_its_support(distribution, outside):
    flow = Flow(OnInterval(2, distribution), [ElementwiseAffine(2)])
    x = torch.tensor([[0.3, 0.6], *([value, 0.5] for value in outside)], requires_grad=True)
    log_prob = flow.log_prob(x)
    torch.testing.assert_close(log_prob[0], distribution.log_prob(x[0]).sum())
    assert log_prob[1:].isneginf().all()
    log_prob[0].backward()
    assert x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in flow.parameters())
    assert flow.log_prob(flow.sample((100,))).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [name for name in LAYERS if "sigmoid scale" not in name])
def test_what_extreme_latents_give_can_be_scored(name, dtype):
    layer = make(name, 3, 2).to(dtype)
    context = torch.randn(2, dtype=dtype) if layer.context_features else None
    for map_ in (layer, layer.inv):
        ends = torch.tensor([-1e5, -1e3, -100, -30, -17, 17, 30, 100, 1e3, 1e5], dtype=dtype)
        point = biject_to(map_.domain)(ends[:, None].expand(-1, 3))
        image, _ = map_.forward_and_log_det(point, context)
        back, log_det = map_.inverse_and_log_det(image, context)
        assert image.isfinite().all()
        assert back.isfinite().all()
        assert log_det.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layer", [Coupling, MaskedAutoregressive])
def test_a_spline_keeps_the_ends_of_a_uniform_prior(layer, dtype):
    torch.manual_seed(0)
    spline = layer(2, transformer=Spline(num_bins=5, bound=3.0), hidden_features=(8,))
    for parameter in spline.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    flow = Flow(Uniform(2, -3.0, 3.0), [spline]).to(dtype)
    near = [torch.tensor(3.0, dtype=dtype)]
    for _ in range(20):
        near.append(torch.nextafter(near[-1], torch.zeros_like(near[-1])))
    near = torch.cat([torch.stack(near), -torch.stack(near), torch.linspace(-3, 3, 20, dtype=dtype)])
    x = flow.decode(torch.cartesian_prod(near, near))
    assert (x.abs() <= 3).all()
    assert flow.log_prob(x).isfinite().all()


def test_a_uniform_prior_never_draws_an_end_which_a_logit_does_not_take(monkeypatch):
    flow = Flow(Uniform(1), [Logit(1)])
    assert flow.decode(torch.tensor([[0.0], [0.5], [1.0], [2.0]])).isnan().flatten().tolist() == [
        True,
        False,
        True,
        True,
    ]
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.zeros(shape, **options))
    assert flow.log_prob(flow.sample((3,))).isfinite().all()
    assert flow.rsample_and_log_prob((3,))[1].isfinite().all()


@pytest.mark.parametrize("context_features", [0, 2])
def test_a_training_row_at_an_end_of_the_support_is_named(context_features):
    flow = Flow(StandardNormal(2), [Coupling(2, context_features=context_features), Sigmoid(2)])
    x = torch.rand(50, 2, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05
    x[7, 1] = 1.0
    context = torch.randn(50, 2) if context_features else None
    with pytest.raises(ValueError, match=r"expected data in the flow's support, .*; got 1 in row 7, column 1"):
        fit(flow, x, context=context, epochs=1, device="cpu")


class NotSummed(Bijection):
    def forward_and_log_det(self, x, context=None):
        return 2 * x, torch.full_like(x, math.log(2))

    def inverse_and_log_det(self, y, context=None):
        return y / 2, torch.full_like(y, -math.log(2))


@pytest.mark.parametrize("features", [1, 4])
def test_a_log_det_of_the_wrong_shape_is_refused(features):
    flow = Flow(StandardNormal(features), NotSummed(features))
    x = torch.zeros(4, features)
    message = rf"expected NotSummed to return a log-determinant of shape \(4,\).*got \(4, {features}\)"
    for call in (flow.log_prob, flow().log_prob, lambda x: check(flow, x), lambda x: check(flow.layers[0], x)):
        with pytest.raises(ValueError, match=message):
            call(x)
    with pytest.raises(ValueError, match=message):
        flow.sample((4,))


SHAPES = {
    "not summed": lambda full, event: full,
    "summed over all rows": lambda full, event: full.sum(),
    "of one row": lambda full, event: full.sum().reshape(1),
    "with the event kept": lambda full, event: full.sum(event, keepdim=True),
    "a column": lambda full, event: full.sum(event).unsqueeze(-1),
    "a number": lambda full, event: math.log(2),
}


class Double(Bijection):
    def __init__(self, shape, kind, context_features=0):
        super().__init__(shape, context_features=context_features)
        self.kind = kind

    def _log_det(self, x, sign):
        event = tuple(range(-len(self.latent_shape), 0))
        return SHAPES[self.kind](torch.full_like(x, sign * math.log(2)), event)

    def forward_and_log_det(self, x, context=None):
        return 2 * x, self._log_det(x, 1)

    def inverse_and_log_det(self, y, context=None):
        return y / 2, self._log_det(y, -1)


WRAPPED = {
    "alone": lambda shape, kind: Double(shape, kind),
    "inverse": lambda shape, kind: Inverse(Double(shape, kind)),
    "stack": lambda shape, kind: Compose([ElementwiseAffine(shape), Double(shape, kind)]),
    "nested": lambda shape, kind: Compose([Compose([Double(shape, kind)]), ElementwiseAffine(shape)]),
    "inverse of a stack": lambda shape, kind: Inverse(Compose([Double(shape, kind), ElementwiseAffine(shape)])),
    "conditioned": lambda shape, kind: Conditioned(Double(shape, kind, 2), torch.zeros(4, 2)),
    "multiscale": lambda shape, kind: Multiscale([Double((1, 2, 2), kind), ElementwiseAffine((2, 2, 2))]),
}


@pytest.mark.parametrize("shape", [(1,), (4,), (2, 2, 2)])
@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("kind", SHAPES)
def test_every_wrong_log_det_is_refused_wherever_the_layer_stands(kind, wrapped, shape):
    if wrapped == "multiscale" and len(shape) == 1:
        return
    layer = WRAPPED[wrapped](shape, kind)
    x, y = torch.zeros(4, *layer.latent_shape), torch.zeros(4, *layer.data_shape)
    flow = Flow(StandardNormal(layer.latent_shape), [layer])
    calls = [(layer.forward_and_log_det, x), (layer.inverse_and_log_det, y), (layer, x), (layer.inv, y)]
    calls += [(layer._call, x), (layer._inverse, y), (flow.log_prob, y), (flow.sample, (4,))]
    for call, argument in calls:
        with pytest.raises(ValueError, match=r"expected Double to return a log-determinant of shape \(4,\).*; got"):
            call(argument)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_flow_of_half_precision_is_refused_in_a_sentence(dtype):
    flow = realnvp(2, num_layers=2).to(dtype)
    for call in (lambda: flow.log_prob(torch.zeros(3, 2, dtype=dtype)), lambda: flow.sample((3,))):
        with pytest.raises(TypeError, match=f"expected a flow of float32 or float64.*got {dtype}: call flow.float()"):
            call()


def test_a_uniform_prior_behind_a_logit_scores_the_whole_line():
    flow = Flow(Uniform(1), [Logit(1)])
    assert flow.log_prob(torch.tensor([[-90.0], [0.0], [5.0]])).isfinite().all()
    assert isinstance(flow, nn.Module)
