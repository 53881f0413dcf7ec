"""Priors: SciPy's densities, pure log-densities, samples, dtypes, gradients and error messages."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pyroflows.priors import (
    DiagonalNormal,
    GaussianMixture,
    LogitNormal,
    Prior,
    StandardNormal,
    StudentT,
    Uniform,
)

torch.set_num_threads(1)


def disturbed(prior):
    prior = prior.double()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return prior


PRIORS = {
    "standard_normal": StandardNormal,
    "diagonal_normal": DiagonalNormal,
    "mixture": lambda shape: GaussianMixture(shape, 3),
    "mixture_of_one": lambda shape: GaussianMixture(shape, 1),
    "mixture_fixed": lambda shape: GaussianMixture(shape, 3, learnable=False, seed=1),
    "student_t": StudentT,
    "student_t_learnable": lambda shape: StudentT(shape, df=3.0, learnable=True),
    "uniform": lambda shape: Uniform(shape, -2.0, 2.0),
}
VECTOR_PRIORS = PRIORS | {
    "mixture_full": lambda n: GaussianMixture(n, 3, covariance="full"),
    "mixture_full_of_one": lambda n: GaussianMixture(n, 1, covariance="full", learnable=False),
}
ALL = pytest.mark.parametrize("name", VECTOR_PRIORS)


@ALL
@pytest.mark.parametrize("features", [1, 2, 5, 17])
def test_pure_log_prob_is_that_of_the_distribution(name, features):
    torch.manual_seed(0)
    prior = disturbed(VECTOR_PRIORS[name](features))
    distribution = prior()
    assert distribution.batch_shape == ()
    assert distribution.event_shape == prior.event_shape == (features,)
    assert prior.log_prob(torch.zeros(0, features)).shape == (0,)
    for batch in [(), (3,), (2, 3)]:
        z = torch.randn(*batch, features, dtype=torch.float64)
        log_prob = prior.log_prob(z)
        assert log_prob.shape == torch.Size(batch)
        torch.testing.assert_close(log_prob, distribution.log_prob(z), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", PRIORS)
def test_event_shapes(name):
    torch.manual_seed(0)
    prior = disturbed(PRIORS[name]((2, 3, 4)))
    z = prior.sample((5,))
    assert z.shape == (5, 2, 3, 4)
    torch.testing.assert_close(prior.log_prob(z), prior().log_prob(z), rtol=1e-11, atol=1e-11)
    assert "(2, 3, 4)" in repr(prior)


@ALL
def test_vmap(name):
    torch.manual_seed(0)
    prior = disturbed(VECTOR_PRIORS[name](3))
    z = torch.randn(6, 3, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(prior.log_prob)(z), prior.log_prob(z))
    score = torch.func.vmap(torch.func.grad(prior.log_prob))(z)
    torch.testing.assert_close(score, torch.func.jacrev(lambda z: prior.log_prob(z).sum())(z))


@ALL
def test_one_graph(name):
    prior = VECTOR_PRIORS[name](3)
    z = torch.randn(6, 3)
    compiled = torch.compile(prior.log_prob, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(z), prior.log_prob(z))


@ALL
def test_samples(name):
    torch.manual_seed(0)
    prior = VECTOR_PRIORS[name](3)
    for dtype in (torch.float32, torch.float64):
        prior = prior.to(dtype)
        for shape in [(), (2,), (2, 3)]:
            z = prior.sample(shape)
            assert z.shape == (*shape, 3)
            assert z.dtype == dtype
            assert not z.requires_grad
            assert prior.log_prob(z).dtype == dtype
    assert prior.has_rsample == prior().has_rsample
    if prior.has_rsample:
        learnable = any(parameter.requires_grad for parameter in prior.parameters())
        assert prior.rsample((2,)).requires_grad == learnable
    else:
        with pytest.raises(NotImplementedError, match="expected a reparameterised prior; got GaussianMixture"):
            prior.rsample()


@ALL
def test_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    prior = disturbed(VECTOR_PRIORS[name](3))
    z = torch.randn(4, 3, dtype=torch.float64)
    names = [name for name, _ in prior.named_parameters()]
    values = [value.detach().clone().requires_grad_() for value in prior.parameters()]

    def score(z, *values):
        held = {f"prior.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(_LogProb(prior), held, (z,))

    if values:
        prior.log_prob(z).sum().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in prior.parameters())
        assert torch.autograd.gradcheck(score, (z.requires_grad_(), *values))


class _LogProb(torch.nn.Module):
    def __init__(self, prior):
        super().__init__()
        self.prior = prior

    def forward(self, z):
        return self.prior.log_prob(z)


@ALL
def test_copies(name):
    torch.manual_seed(0)
    prior = disturbed(VECTOR_PRIORS[name](3))
    z = torch.randn(4, 3, dtype=torch.float64)
    fresh = VECTOR_PRIORS[name](3).double()
    fresh.load_state_dict(prior.state_dict())
    for other in (copy.deepcopy(prior), pickle.loads(pickle.dumps(prior)), fresh):
        torch.testing.assert_close(other.log_prob(z), prior.log_prob(z), rtol=0, atol=0)


@ALL
def test_a_site_of_a_model(name):
    prior = VECTOR_PRIORS[name](2)

    def model():
        with pyro.plate("rows", 4):
            return pyro.sample("z", prior())

    trace = pyro.poutine.trace(model).get_trace()
    torch.testing.assert_close(trace.log_prob_sum(), prior.log_prob(trace.nodes["z"]["value"]).sum())


@ALL
def test_a_latent_of_another_shape(name):
    with pytest.raises(ValueError, match=r"expected a latent of shape \(\*batch, 3\); got \(4, 1\)"):
        VECTOR_PRIORS[name](3).log_prob(torch.zeros(4, 1))


@ALL
@pytest.mark.parametrize("features", [0, -1, (), (2, 0), True])
def test_bad_features(name, features):
    with pytest.raises(ValueError, match="expected a positive number of features or a shape of positive sizes; got"):
        VECTOR_PRIORS[name](features)


def test_standard_normal_is_scipy_s():
    z = torch.randn(10, 4, dtype=torch.float64)
    expected = stats.norm.logpdf(z.numpy()).sum(-1)
    np.testing.assert_allclose(StandardNormal(4).double().log_prob(z), expected, rtol=1e-13)
    assert repr(StandardNormal(4)) == "StandardNormal(4)"
    assert not StandardNormal(4).state_dict()


def test_diagonal_normal_is_scipy_s():
    prior = disturbed(DiagonalNormal(4))
    z = torch.randn(10, 4, dtype=torch.float64)
    loc, scale = prior.loc.detach().numpy(), prior.log_scale.detach().exp().numpy()
    np.testing.assert_allclose(prior.log_prob(z).detach(), stats.norm.logpdf(z, loc, scale).sum(-1), rtol=1e-12)


# GaussianMixture


@pytest.mark.parametrize("components", [1, 2, 5])
def test_mixture_is_scipy_s(components):
    torch.manual_seed(0)
    loc = torch.randn(components, 3, dtype=torch.float64)
    factor = torch.randn(components, 3, 3, dtype=torch.float64).tril(-1) + torch.diag_embed(loc.exp())
    weights = torch.rand(components, dtype=torch.float64) + 0.1
    z = torch.randn(10, 3, dtype=torch.float64)
    full = GaussianMixture(3, components, covariance="full", loc=loc, scale_tril=factor, weights=weights)
    diagonal = GaussianMixture(3, components, loc=loc, scale=loc.exp(), weights=weights)
    for prior, covariances in ((full, factor @ factor.mT), (diagonal, torch.diag_embed((2 * loc).exp()))):
        densities = [
            stats.multivariate_normal.pdf(z, mean, covariance)
            for mean, covariance in zip(loc.numpy(), covariances.numpy(), strict=True)
        ]
        expected = np.log(np.stack(densities, -1) @ (weights / weights.sum()).numpy())
        np.testing.assert_allclose(prior.log_prob(z).detach(), expected, rtol=1e-10)
    torch.testing.assert_close(full.weights, weights / weights.sum())


def test_mixture_start():
    assert torch.equal(GaussianMixture(2, 5, seed=1).loc, GaussianMixture(2, 5, seed=1).loc)
    prior = GaussianMixture(2, 5, seed=1)
    assert torch.pdist(prior.loc).min() > 0
    torch.testing.assert_close(prior.loc.mean(0), torch.zeros(2))
    assert torch.equal(GaussianMixture(2, 1).loc, torch.zeros(1, 2))
    assert [name for name, _ in prior.named_parameters()] == ["loc", "log_scale", "logits"]
    fixed = GaussianMixture(2, 5, covariance="full", learnable=False)
    assert not list(fixed.parameters())
    assert set(fixed.state_dict()) == {"lower", "loc", "log_scale", "logits"}
    assert repr(prior) == "GaussianMixture(2, num_components=5, covariance='diagonal', learnable=True)"


def test_mixture_moments():
    torch.manual_seed(0)
    loc = torch.tensor([[-3.0, 0.0], [3.0, 1.0]])
    prior = GaussianMixture(2, 2, loc=loc, scale=0.5, weights=[1, 3], learnable=False)
    z = prior.sample((20_000,))
    torch.testing.assert_close(z.mean(0), torch.tensor([1.5, 0.75]), rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_components": 0}, "expected num_components to be a positive integer; got 0"),
        ({"covariance": "round"}, "expected covariance to be one of 'diagonal', 'full'; got 'round'"),
        ({"loc": torch.zeros(3)}, r"expected loc of shape \(3, 2\); got \(3,\)"),
        ({"scale": -1.0}, "expected scale to be positive and finite; got -1"),
        ({"scale": torch.ones(4)}, r"expected scale of a shape that broadcasts to \(3, 2\); got \(4,\)"),
        ({"weights": [1.0, 0.0, 1.0]}, "expected weights to be positive and finite; got 0..1"),
        ({"weights": torch.ones(2)}, r"expected weights of a shape that broadcasts to \(3,\); got \(2,\)"),
        ({"scale_tril": torch.eye(2)}, "`scale_tril` cannot be combined with"),
        ({"scale_tril": torch.ones(2, 2), "covariance": "full"}, "expected scale_tril to be lower triangular"),
        ({"scale_tril": -torch.eye(2), "covariance": "full"}, "expected scale_tril to be lower triangular"),
        ({"features": (2, 2), "covariance": "full"}, r"expected a vector of features for .*; got the shape \(2, 2\)"),
        ({"spread": 0.0}, r"expected spread in \(0, inf\); got 0.0"),
    ],
)
def test_bad_mixture(kwargs, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(**{"features": 2, "num_components": 3} | kwargs)


# StudentT and Uniform


def test_student_t_is_scipy_s():
    df = torch.tensor([0.7, 3.0, 30.0], dtype=torch.float64)
    z = 10 * torch.randn(10, 3, dtype=torch.float64)
    for learnable in (False, True):
        log_prob = StudentT(3, df=df, learnable=learnable).double().log_prob(z)
        np.testing.assert_allclose(log_prob.detach(), stats.t.logpdf(z, df.numpy()).sum(-1), rtol=1e-11)
    with pytest.raises(ValueError, match="expected df to be positive and finite; got 0"):
        StudentT(3, df=0.0)
    assert repr(StudentT(3, df=4.0)) == "StudentT(3, df=4, learnable=False)"


def test_uniform_is_closed():
    prior = Uniform(2, low=torch.tensor([0.0, -1.0]), high=3.0)
    z = torch.tensor([[0.0, -1.0], [3.0, 3.0], [1.0, 1.0], [-1e-6, 0.0], [0.0, 3.1], [math.nan, 0.0]])
    expected = torch.tensor([-math.log(12)] * 3 + [-math.inf] * 3)
    torch.testing.assert_close(prior.log_prob(z), expected)
    torch.testing.assert_close(prior().log_prob(z), expected)
    torch.testing.assert_close(prior().expand((6,)).log_prob(z), expected)
    assert repr(prior) == "Uniform(2, low=-1..0, high=3)"
    for low, high in ((1.0, 1.0), (torch.tensor([0.0, 2.0]), 1.0)):
        with pytest.raises(ValueError, match="expected low < high; got low="):
            Uniform(2, low, high)
    with pytest.raises(ValueError, match="expected high to be finite; got inf"):
        Uniform(2, 0.0, math.inf)


def test_one_s_own_prior_needs_only_forward():
    class Laplace(Prior):
        def __init__(self, features):
            super().__init__(features)
            self.register_buffer("loc", torch.zeros(self.event_shape))

        def forward(self):
            return dist.Laplace(self.loc, torch.ones_like(self.loc)).to_event(1)

    z = torch.randn(5, 2)
    torch.testing.assert_close(Laplace(2).log_prob(z), -z.abs().sum(-1) - 2 * math.log(2))
    assert Laplace(2).rsample((3,)).shape == (3, 2)
    with pytest.raises(NotImplementedError, match=r"Prior must define forward\(\)"):
        Prior(2)()


# LogitNormal


@settings(max_examples=100, deadline=None)
@given(y=st.floats(1e-300, 1 - 1e-15), loc=st.floats(-5, 5), scale=st.floats(0.1, 10))
def test_logit_normal_is_scipy_s(y, loc, scale):
    y, loc, scale = (torch.tensor(value, dtype=torch.float64) for value in (y, loc, scale))
    logit = math.log(y) - math.log1p(-y)
    distribution = LogitNormal(loc, scale)
    expected = stats.norm.logpdf(logit, loc, scale) - math.log(y) - math.log1p(-y)
    assert distribution.log_prob(y).item() == pytest.approx(expected, rel=1e-11, abs=1e-11)
    assert distribution.cdf(y).item() == pytest.approx(stats.norm.cdf(logit, loc, scale), rel=1e-9, abs=1e-300)


def test_logit_normal_quantiles():
    distribution = LogitNormal(torch.tensor(0.5, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64))
    q = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(distribution.cdf(distribution.icdf(q)), q)
    torch.testing.assert_close(distribution.icdf(torch.tensor(0.5, dtype=torch.float64)), distribution.median)
    y = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    assert distribution.log_prob(y).exp().mean().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logit_normal_tails(dtype):
    tiny = torch.finfo(dtype).tiny
    ends = torch.tensor([0.0, 1e3 * tiny, 1 - torch.finfo(dtype).eps, 1.0], dtype=dtype, requires_grad=True)
    log_prob = LogitNormal(torch.zeros(4, dtype=dtype), torch.full((4,), 3.0, dtype=dtype)).log_prob(ends)
    assert log_prob.isinf().tolist() == [True, False, False, True]
    log_prob[1:3].sum().backward()
    assert ends.grad.isfinite().all()
    wide = LogitNormal(torch.zeros((), dtype=dtype), torch.full((), 100.0, dtype=dtype))
    y = wide.sample((1000,))
    assert ((y > 0) & (y < 1)).all()
    assert wide.log_prob(y).isfinite().all()


def test_logit_normal_shapes_and_gradients():
    torch.manual_seed(0)
    loc, scale = torch.zeros(3, 1, requires_grad=True), torch.ones(4, requires_grad=True)
    distribution = LogitNormal(loc, scale)
    assert distribution.batch_shape == (3, 4)
    assert distribution.event_shape == ()
    wide = distribution.expand((2, 3, 4))
    assert isinstance(wide, LogitNormal)
    y = wide.rsample((5,))
    assert y.shape == (5, 2, 3, 4)
    y.sum().backward()
    assert loc.grad.abs().sum() > 0
    assert scale.grad.abs().sum() > 0
    assert wide.log_prob(y).shape == y.shape
    assert LogitNormal(0.0, 1.0).batch_shape == ()
    assert LogitNormal(0.0, 1.0).to_event(0).expand((2,)).sample().shape == (2,)
    with pytest.raises(ValueError, match="scale"):
        LogitNormal(torch.zeros(2), torch.tensor([1.0, -1.0]), validate_args=True)
    with pytest.raises(ValueError, match="support"):
        LogitNormal(0.0, 1.0, validate_args=True).expand((3,)).log_prob(torch.tensor(1.5))


def test_logit_normal_in_a_model():
    def model():
        with pyro.plate("rows", 3):
            return pyro.sample("p", LogitNormal(torch.tensor(0.0), torch.tensor(1.0)))

    trace = pyro.poutine.trace(model).get_trace()
    assert trace.nodes["p"]["value"].shape == (3,)
    guide = pyro.infer.autoguide.AutoNormal(model)
    loss = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO()).step()
    assert math.isfinite(loss)
    pyro.clear_param_store()


def test_student_t_draws_what_its_distribution_draws():
    prior = StudentT(3, df=torch.tensor([1.5, 4.0, 30.0])).double()
    draws = []
    for draw in (prior.rsample, lambda shape: prior().rsample(shape)):
        torch.manual_seed(0)
        draws.append(draw((100,)))
    torch.testing.assert_close(*draws)
