"""One contract over every layer, flow and prior: inverses, log-determinants, shapes, gradients, compilation."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from contract import (
    BATCHES,
    FLOWS,
    LAYERS,
    PRIORS,
    assert_close,
    assert_every_parameter_learns,
    assert_reads_no_number,
    bijection_cases,
    contexts,
    count_conditioners,
    data,
    latents,
    make,
    make_flow,
    perturb,
)

from pyroflows import ActNorm, BatchNorm, Flow, Inverse, MaskedAutoregressive, check
from pyroflows.bijection import Bijection

FLOW_CASES = [(name, features, context) for name in FLOWS for features in (1, 2, 5, 17) for context in (0, 3)]

each_layer = pytest.mark.parametrize("name", LAYERS)
each_flow = pytest.mark.parametrize("name", FLOWS)
with_and_without_context = pytest.mark.parametrize("context_features", [0, 3])


def tolerance(name):
    return 1e-6 if any(word in name for word in ("spline", "nsf", "planar", "radial")) else 1e-8


def autograd_log_det(method, x, context):
    """Row by row ``log|det|`` of the Jacobian, one backward pass an output."""
    x = x.detach().requires_grad_()
    y, _ = method(x, context)
    rows = [torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0] for i in range(y.shape[1])]
    return torch.linalg.slogdet(torch.stack(rows, 1)).logabsdet


def assert_contract(bijection, atol):
    for forward, points in ((True, latents(bijection, 4)), (False, data(bijection, 4))):
        there, back = bijection.forward_and_log_det, bijection.inverse_and_log_det
        if not forward:
            there, back = back, there
        context = contexts(bijection, 4)
        result, log_det = there(points, context)
        returned, log_det_back = back(result, context)
        assert result.dtype == log_det.dtype == torch.float64
        assert log_det.shape == (4,)
        assert_close(returned, points, atol)
        assert_close(log_det_back, -log_det, atol)
        assert_close(log_det, autograd_log_det(there, points, context), atol)


@pytest.mark.parametrize("name, features, context_features", bijection_cases())
def test_layer_inverts_and_its_log_det_is_that_of_its_jacobian(name, features, context_features):
    layer = make(name, features, context_features)
    assert layer.context_features in (0, context_features)
    assert_contract(layer, tolerance(name))


@pytest.mark.parametrize("name, features, context_features", FLOW_CASES)
def test_flow_inverts_and_its_log_det_is_that_of_its_jacobian(name, features, context_features):
    assert_contract(make_flow(name, features, context_features).bijection, tolerance(name))


@each_flow
def test_check_agrees(name):
    flow = make_flow(name, 3, 2)
    report = check(flow, flow.sample((4,), torch.zeros(2).double()), context=torch.zeros(2).double())
    assert report.ok, str(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@with_and_without_context
@each_layer
def test_layer_keeps_batch_shape_and_dtype(name, context_features, dtype):
    layer = make(name, 3, context_features).to(dtype)
    for batch in BATCHES:
        context = contexts(layer, *batch, dtype=dtype)
        y, log_det = layer.forward_and_log_det(latents(layer, *batch, dtype=dtype), context)
        x, log_det_back = layer.inverse_and_log_det(y, context)
        assert x.shape == y.shape == (*batch, 3)
        assert log_det.shape == log_det_back.shape == batch
        assert {t.dtype for t in (x, y, log_det, log_det_back)} == {dtype}
        assert (
            layer.forward_shape(torch.Size((*batch, 3))) == layer.inverse_shape(torch.Size((*batch, 3))) == (*batch, 3)
        )


@each_layer
def test_layer_broadcasts_input_against_context(name):
    layer = make(name, 3, 2)
    if not layer.context_features:
        return
    x, context = latents(layer, 4, 1), contexts(layer, 5)
    y, log_det = layer.forward_and_log_det(x, context)
    assert y.shape == (4, 5, 3)
    assert log_det.shape == (4, 5)
    each, each_log_det = layer.forward_and_log_det(x.expand(4, 5, 3).reshape(20, 3), context.repeat(4, 1))
    assert_close(y.reshape(20, 3), each)
    assert_close(log_det.reshape(20), each_log_det)
    back, log_det_back = layer.inverse_and_log_det(y[:, :1], context)
    assert back.shape == (4, 5, 3)
    assert log_det_back.shape == (4, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@with_and_without_context
@each_flow
def test_flow_keeps_batch_shape_and_dtype(name, context_features, dtype):
    flow = make_flow(name, 3, context_features).to(dtype)
    for batch in BATCHES:
        x, context = torch.randn(*batch, 3, dtype=dtype), contexts(flow, *batch, dtype=dtype)
        log_prob = flow.log_prob(x, context)
        if batch != (0,) or flow.prior.has_rsample:
            sample = flow.sample((), context) if context_features else flow.sample(batch)
            assert sample.shape == (*batch, 3)
        assert log_prob.shape == batch
        assert sample.dtype == log_prob.dtype == dtype
        distribution = flow(context)
        assert distribution.batch_shape == (batch if context_features else ())
        assert distribution.event_shape == (3,)
        if batch != (0,):
            torch.testing.assert_close(distribution.log_prob(x), log_prob)
            assert distribution.sample((2,)).shape == (2, *distribution.batch_shape, 3)


@pytest.mark.parametrize("training", [False, True])
@with_and_without_context
@each_flow
def test_flow_on_meta_gives_shapes(name, context_features, training):
    flow = FLOWS[name](3, context_features).double().train(training)
    assert_reads_no_number(flow, contexts(flow, 3))


@pytest.mark.parametrize("name", ["realnvp", "iaf, diagonal normal", "realnvp, dense, student"])
def test_flow_accepts_an_empty_batch_as_a_distribution(name):
    flow = make_flow(name, 2)
    assert flow().log_prob(torch.zeros(0, 2).double()).shape == (0,)
    assert flow().sample((0,)).shape == (0, 2)


def test_empty_sample_of_a_mixture():
    assert make_flow("maf, shuffle, batchnorm, mixture", 2).sample((0,)).shape == (0, 2)


@each_flow
def test_context_gives_the_batch_shape(name):
    flow = make_flow(name, 2, 3)
    many, one = torch.randn(8, 3).double(), torch.randn(3).double()
    assert flow(many).batch_shape == (8,)
    assert flow(one).batch_shape == ()
    assert flow.sample((5,), many).shape == (5, 8, 2)
    assert flow.sample((5,), one).shape == (5, 2)
    x = torch.randn(8, 2).double()
    assert_close(flow.log_prob(x, one), flow.log_prob(x, one.expand(8, 3)))
    assert_close(flow(one).log_prob(x), flow.log_prob(x, one))
    assert_close(flow(many).log_prob(x[0]), flow.log_prob(x[0].expand(8, 2), many))
    assert flow(many).expand((5, 8)).log_prob(x).shape == (5, 8)
    assert flow(many).expand((5, 8)).sample().shape == (5, 8, 2)


@with_and_without_context
@each_flow
def test_one_density_whichever_way_it_is_asked(name, context_features):
    flow = make_flow(name, 4, context_features)
    context = contexts(flow, 6)
    x = torch.randn(6, 4).double()
    assert_close(flow(context).log_prob(x), flow.log_prob(x, context), tolerance(name))
    if flow.prior.has_rsample:
        sample, log_prob = flow.rsample_and_log_prob(() if context_features else (6,), context)
        assert_close(flow.log_prob(sample, context), log_prob, tolerance(name))
        distribution = flow(context)
        sample = distribution.rsample(() if context_features else (6,))
        assert_close(distribution.log_prob(sample), flow.log_prob(sample, context), tolerance(name))


@each_flow
def test_samples_follow_the_seed(name):
    flow = make_flow(name, 2, 1)
    context = torch.zeros(1).double()
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(flow.sample((4,), context))
    assert torch.equal(*draws)
    assert not draws[0].requires_grad


@with_and_without_context
@each_flow
def test_every_parameter_learns_from_log_prob(name, context_features):
    flow = make_flow(name, 5, context_features).train()
    flow.log_prob(torch.randn(20, 5).double(), contexts(flow, 20)).sum().backward()
    for parameter_name, parameter in flow.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@with_and_without_context
@each_layer
def test_every_parameter_of_a_layer_learns_in_both_directions(name, context_features):
    assert_every_parameter_learns(make(name, 5, context_features), rows=20)


@each_layer
def test_layer_gradients_are_right(name):
    layer = make(name, 3, 2)
    context = contexts(layer, 2)
    inputs = [latents(layer, 2).requires_grad_()]
    if context is not None:
        inputs.append(context.requires_grad_())
    assert torch.autograd.gradcheck(layer.forward_and_log_det, inputs, fast_mode=True)
    inputs[0] = data(layer, 2).requires_grad_()
    assert torch.autograd.gradcheck(layer.inverse_and_log_det, inputs, fast_mode=True)


@each_layer
def test_domain_and_codomain_hold_what_the_layer_takes_and_gives(name):
    layer = make(name, 3)
    assert layer.domain.event_dim == layer.codomain.event_dim == 1
    assert layer.codomain.check(layer(latents(layer, 50))).all()
    assert layer.domain.check(layer.inv(data(layer, 50))).all()
    assert layer.inv.domain is layer.codomain
    assert layer.inv.codomain is layer.domain


@with_and_without_context
@each_layer
def test_layer_survives_copy_pickle_and_state_dict_with_a_live_record(name, context_features):
    layer = make(name, 3, context_features)
    x, context = latents(layer, 4), contexts(layer, 4)
    y = layer(x, context)
    expected = layer.forward_and_log_det(x, context)
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    fresh = LAYERS[name](3, context_features).double().eval()
    fresh.load_state_dict(layer.state_dict())
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(saved, weights_only=False), fresh]
    for other in copies:
        torch.testing.assert_close(other.forward_and_log_det(x, context), expected)
        torch.testing.assert_close(other(x, context), y)
        assert other.inv is not layer.inv
    assert repr(layer).startswith(type(layer).__name__)


@each_flow
def test_flow_survives_state_dict_into_another(name):
    flow = make_flow(name, 3, 2)
    torch.manual_seed(1)
    other = FLOWS[name](3, 2).double().eval()
    other.load_state_dict(flow.state_dict())
    x, context = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    assert torch.equal(other.log_prob(x, context), flow.log_prob(x, context))


@pytest.mark.parametrize("batch", [10, 10_000])
def test_pickle_carries_no_data(batch):
    flow = make_flow("maf", 3)
    size = len(pickle.dumps(flow))
    distribution = flow()
    x = torch.randn(batch, 3).double()
    z = x
    for transform in reversed(distribution.transforms):
        z = transform.inv(z)
    assert any(layer._record is not None for layer in flow.layers)
    assert len(pickle.dumps(flow)) == size
    assert "_record" not in str(flow.state_dict().keys())


@with_and_without_context
@each_flow
def test_vmap_of_log_prob_is_the_batch(name, context_features):
    flow = make_flow(name, 3, context_features)
    arguments = [t for t in (torch.randn(4, 3).double(), contexts(flow, 4)) if t is not None]
    assert_close(torch.func.vmap(flow.log_prob)(*arguments), flow.log_prob(*arguments))
    per_row = torch.func.vmap(torch.func.grad(lambda x, *context: flow.log_prob(x, *context)))(*arguments)
    x = arguments[0].requires_grad_()
    assert_close(per_row, torch.autograd.grad(flow.log_prob(*arguments).sum(), x)[0])


@pytest.mark.parametrize("context_features", [2])
@each_flow
def test_functional_call_gives_gradients_of_every_parameter(name, context_features):
    flow = make_flow(name, 3, context_features)
    parameters = dict(flow.named_parameters())
    x, context = torch.randn(4, 3).double(), contexts(flow, 4)

    def loss(parameters):
        return torch.func.functional_call(_Scored(flow), {f"flow.{k}": v for k, v in parameters.items()}, (x, context))

    gradients = torch.func.grad(loss)(parameters)
    assert all(gradient.any() for gradient in gradients.values())


class _Scored(torch.nn.Module):
    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, x, context):
        return self.flow.log_prob(x, context).sum()


@pytest.mark.parametrize("name, training", [*((name, True) for name in FLOWS), ("glow", False), ("maf", False)])
def test_log_prob_compiles_to_one_graph(name, training):
    torch._dynamo.reset()
    flow = make_flow(name, 3, 2).double().train(training)
    x, context = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    expected = copy.deepcopy(flow).log_prob(x, context)
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend="eager")
    assert_close(compiled(x, context), expected)


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("name", ["realnvp", "maf"])
def test_fresh_flow_starts_its_actnorms_when_compiled(name, fullgraph):
    torch._dynamo.reset()
    flow = FLOWS[name](3, 0).double().train()
    twin = copy.deepcopy(flow)
    x = 3 + 2 * torch.randn(50, 3).double()
    compiled = torch.compile(flow.log_prob, fullgraph=fullgraph, backend="eager")
    for _ in range(2):
        assert_close(compiled(x), twin.log_prob(x))
    assert all(layer.initialized for layer in flow.layers if isinstance(layer, ActNorm))


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)  # inductor's own
@pytest.mark.parametrize("name", ["realnvp", "nsf"])
def test_log_prob_compiles_with_inductor(name):
    torch._dynamo.reset()
    flow = make_flow(name, 3).train()
    x = torch.randn(20, 3).double()
    expected = flow.log_prob(x)
    wanted = torch.autograd.grad(expected.sum(), list(flow.parameters()))
    found = torch.compile(flow.log_prob, fullgraph=True)(x)
    assert_close(found, expected)
    assert_close(torch.autograd.grad(found.sum(), list(flow.parameters())), wanted)


# Conditioners, counted


def passes(flow, *, forward):
    """How often each conditioner may run: once, or the slow way through an autoregressive layer a few times."""
    wanted = {}
    for number, layer in enumerate(flow.layers):
        inner, way = (layer.bijection, not forward) if isinstance(layer, Inverse) else (layer, forward)
        slow = isinstance(inner, MaskedAutoregressive) and way
        path = f"bijection.layers.{number}." + ("bijection." if inner is not layer else "") + "conditioner"
        if hasattr(inner, "conditioner") and inner.conditioner is not None:
            wanted[path] = range(layer.latent_shape[0] + 3) if slow else range(1, 2)
    return wanted


def assert_counts(calls, wanted, more=0):
    assert calls.keys() == wanted.keys()
    for path, count in calls.items():
        assert count in wanted[path] or count - more in wanted[path], path


@with_and_without_context
@each_flow
def test_each_conditioner_runs_once_to_score(name, context_features):
    flow = make_flow(name, 3, context_features)
    context, x = contexts(flow, 4), torch.randn(4, 3).double()
    calls = count_conditioners(flow)
    flow(context).log_prob(x)
    assert_counts(calls, passes(flow, forward=False))


@pytest.mark.parametrize("afresh", [False, True])
@with_and_without_context
@each_flow
def test_each_conditioner_runs_once_to_sample_and_score(name, context_features, afresh):
    flow = make_flow(name, 3, context_features)
    context = contexts(flow, 4)
    calls = count_conditioners(flow)
    distribution = flow(context)
    draw = distribution.rsample if flow.prior.has_rsample else distribution.sample
    x = draw(() if context_features else (4,))
    # A sample of a prior that is not reparameterised is drawn without gradients, so it is scored without them.
    with torch.set_grad_enabled(flow.prior.has_rsample):
        found = (flow(context) if afresh else distribution).log_prob(x)
    assert_counts(calls, passes(flow, forward=True))
    assert_close(found, flow.log_prob(x, context), tolerance(name))


def test_maf_scores_in_one_pass_and_iaf_samples_in_one():
    for name, forward in (("maf", False), ("iaf", True)):
        flow = make_flow(name, 7)
        assert set(passes(flow, forward=forward).values()) == {range(1, 2)}
        assert set(passes(flow, forward=not forward).values()) == {range(10)}
        cost, price = flow.bijection.forward_passes, flow.bijection.inverse_passes
        assert (cost < price) is forward


@pytest.mark.parametrize("name", PRIORS)
def test_prior_in_a_flow(name):
    prior = PRIORS[name](3)
    flow = perturb(Flow(prior, LAYERS["coupling, affine"](3, 0)).double(), 0.1)
    assert isinstance(flow.bijection, Bijection)
    x = flow.sample((6,))
    assert_close(flow().log_prob(x), flow.log_prob(x))
    assert torch.func.vmap(flow.log_prob)(x).shape == (6,)


def test_batchnorm_in_training_normalises_with_the_batch():
    flow = FLOWS["realnvp, batchnorm and reverse"](3, 0).train()
    x = 5 + 3 * torch.randn(100, 3)
    torch.testing.assert_close(flow().log_prob(x), flow.log_prob(x))
    assert all(layer.mean.any() for layer in flow.layers if isinstance(layer, BatchNorm))


# The score, carried along


def score_tolerance(name):
    return 1e-6 if "spline" in name or "nsf" in name else 1e-8


def score_of_standard_normal(back, y, context):
    """The gradient at ``y`` of the log-density of a standard normal, pushed there by the inverse of ``back``."""
    y = y.detach().requires_grad_()
    x, log_det = back(y, context)
    return torch.autograd.grad((-x.square().sum(-1) / 2 + log_det).sum(), y)[0]


@pytest.mark.parametrize("name, features, context_features", bijection_cases())
def test_layer_carries_the_score(name, features, context_features):
    layer = make(name, features, context_features)
    for forward, points in ((True, latents(layer, 4)), (False, data(layer, 4))):
        there, back, carried = layer.forward_and_log_det, layer.inverse_and_log_det, layer.forward_and_score
        if not forward:
            there, back, carried = back, there, layer.inverse_and_score
        context = contexts(layer, 4)
        result, log_det, score = carried(points, -points, context)
        assert not score.requires_grad
        assert_close(score, score_of_standard_normal(back, result, context), score_tolerance(name))
        for found, wanted in zip((result, log_det), there(points, context), strict=True):
            assert_close(found, wanted, 1e-12)


@pytest.mark.parametrize("name, features, context_features", FLOW_CASES)
def test_flow_carries_the_score(name, features, context_features):
    flow = make_flow(name, features, context_features)
    context = contexts(flow, 4)
    if flow.prior.has_rsample:
        x, log_prob, score = flow.rsample_and_score((3,) if context_features else (3, 4), context)
    else:
        z = flow.prior.sample((3, 4)).requires_grad_()
        log_prob = flow.prior.log_prob(z)
        x, log_det, score = flow.bijection.forward_and_score(z, torch.autograd.grad(log_prob.sum(), z)[0], context)
        log_prob = log_prob - log_det
    assert x.shape == score.shape == (3, 4, features)
    x = x.detach().requires_grad_()
    wanted = flow.log_prob(x, context)
    assert_close(log_prob, wanted, score_tolerance(name))
    assert_close(score, torch.autograd.grad(wanted.sum(), x)[0], score_tolerance(name))
    assert not score.requires_grad


@with_and_without_context
@each_layer
def test_graphs_beside_the_score_are_those_without(name, context_features):
    layer = make(name, 4, context_features)
    for latent_grad in (False, True):
        x, context = latents(layer, 3).requires_grad_(latent_grad), contexts(layer, 3)
        inputs = [*([x] if latent_grad else []), *layer.parameters()]
        if not inputs:
            continue
        gradients = []
        for y, log_det in (layer.forward_and_log_det(x, context), layer.forward_and_score(x, -x, context)[:2]):
            loss = y.square().sum() + (log_det * torch.arange(1, 4)).sum()
            gradients.append(torch.autograd.grad(loss, inputs))
        assert_close(*gradients)
    with torch.no_grad():
        found = layer.forward_and_score(x, -x, context)
    assert not any(t.requires_grad for t in found)
    assert_close(found, layer.forward_and_score(x, -x, context))


@with_and_without_context
@each_layer
def test_score_keeps_batch_shape_and_dtype(name, context_features):
    layer = make(name, 3, context_features).float()
    for batch in BATCHES:
        x, context = latents(layer, *batch, dtype=torch.float32), contexts(layer, *batch, dtype=torch.float32)
        y, log_det, score = layer.forward_and_score(x, -x, context)
        x, log_det_back, score_back = layer.inverse_and_score(y, score, context)
        assert {t.shape for t in (x, y, score, score_back)} == {(*batch, 3)}
        assert log_det.shape == log_det_back.shape == batch
        assert {t.dtype for t in (y, log_det, score, score_back)} == {torch.float32}
    if layer.context_features:
        x, context = latents(layer, 4, 1, dtype=torch.float32), contexts(layer, 5, dtype=torch.float32)
        y, log_det, score = layer.forward_and_score(x, -x, context)
        assert y.shape == score.shape == (4, 5, 3)
        assert log_det.shape == (4, 5)


@with_and_without_context
@pytest.mark.parametrize("name", [n for n in FLOWS if n not in ("planar", "radial") and "maf" not in n])
def test_each_conditioner_runs_once_to_sample_and_score_with_its_gradient(name, context_features):
    flow = make_flow(name, 3, context_features)
    context = contexts(flow, 4)
    calls = count_conditioners(flow)
    flow.rsample_and_score((), context)
    # The score of an autoregressive spline flow is read off the inverse, a single pass more.
    assert_counts(calls, passes(flow, forward=True), more=name == "nsf, autoregressive")


def test_score_through_wild_autoregressive_layers_is_that_of_their_inverse():
    layer = make("inverse autoregressive", 12, scale=0.8)
    x = latents(layer, 50)
    score = layer.forward_and_score(x, -x)[2]
    assert_close(score, Bijection.forward_and_score(layer, x, -x)[2], 1e-6)
    assert score.abs().max() > 100


def test_score_in_training_is_that_of_the_direction_taken():
    norm = LAYERS["batchnorm"](3, 0).double().train()
    x = torch.randn(20, 3).double()
    before = norm.mean.clone()
    _, _, score = norm.forward_and_score(x, -x)
    assert torch.equal(norm.mean, before)
    assert_close(score, -x / norm.variance.add(norm.eps).sqrt())
    act = ActNorm(3).double().train()
    with torch.no_grad():
        act.forward_and_score(x, -x)
    assert not act.initialized


@pytest.mark.parametrize("name", ["coupling, affine", "radial", "compose", "inverse autoregressive"])
def test_refuses_a_score_of_another_shape(name):
    layer = make(name, 3)
    x = latents(layer, 4)
    with pytest.raises(ValueError, match=r"expected a score of shape \(4, 3\), that of the point; got \(4, 2\)"):
        layer.forward_and_score(x, x[:, :2])
    with pytest.raises(TypeError, match=r"expected a score of shape \(4, 3\), that of the point; got float"):
        layer.forward_and_score(x, 1.0)
    with pytest.raises(ValueError, match=r"expected a tensor of shape \(\*batch, 3\); got \(4, 2\)"):
        layer.inverse_and_score(x[:, :2], x)
