"""Models with every kind of site, for the tests of densities, guides and posteriors."""

from __future__ import annotations

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.ops.indexing import Vindex

tensor = partial(torch.tensor, dtype=torch.float64)


def close(found, wanted, atol=1e-8):
    torch.testing.assert_close(found, wanted, rtol=atol, atol=atol, check_dtype=False)


def scalar():
    scale = pyro.sample("scale", dist.HalfNormal(tensor(2.0)))
    pyro.sample("y", dist.Normal(0.0, scale), obs=tensor(1.0))


def vector():
    x = pyro.sample("x", dist.MultivariateNormal(tensor([1.0, 2.0, 3.0]), torch.eye(3).double() + 1))
    pyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=tensor(1.0))


def plate():
    mean = pyro.sample("mean", dist.StudentT(tensor(5.0)))
    with pyro.plate("rows", 5):
        theta = pyro.sample("theta", dist.LogNormal(mean, 1.0))
        pyro.sample("y", dist.Poisson(theta), obs=tensor([0.0, 1, 2, 3, 4]))


def nested():
    top = pyro.sample("top", dist.Normal(tensor(0.0), 1.0))
    with pyro.plate("outer", 3, dim=-2):
        a = pyro.sample("a", dist.Normal(top, 1.0))
        with pyro.plate("inner", 4, dim=-1):
            b = pyro.sample("b", dist.Gamma(tensor(2.0), 1.0))
            pyro.sample("y", dist.Normal(a + b, 1.0), obs=torch.arange(12.0).double().view(3, 4))
    with pyro.plate("other", 2, dim=-1):
        c = pyro.sample("c", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
        pyro.sample("v", dist.Normal(c, 1.0).to_event(1), obs=torch.ones(2, 3).double())


def simplex():
    with pyro.plate("rows", 2):
        p = pyro.sample("p", dist.Dirichlet(tensor([1.0, 2, 3, 4])))
        pyro.sample("y", dist.Categorical(p), obs=torch.tensor([0, 3]))


def ordered():
    base = dist.Normal(torch.zeros(3).double(), 1.0).to_event(1)
    cuts = pyro.sample("cuts", dist.TransformedDistribution(base, dist.transforms.OrderedTransform()))
    with pyro.plate("rows", 4):
        pyro.sample("y", dist.OrderedLogistic(torch.zeros(4).double(), cuts), obs=torch.arange(4))


def correlation():
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros(3).double(), 1.0).to_event(1))
    tril = pyro.sample("tril", dist.LKJCholesky(3, tensor(2.0)))
    pyro.sample(
        "y",
        dist.MultivariateNormal(torch.zeros(3).double(), scale_tril=scale[..., None] * tril),
        obs=tensor([1.0, -1, 2]),
    )


def bounded():
    a = pyro.sample("a", dist.Uniform(tensor(-1.0), 4.0))
    b = pyro.sample("b", dist.Pareto(tensor(2.0), 3.0))
    c = pyro.sample("c", dist.Beta(tensor(2.0), 3.0))
    d = pyro.sample("d", dist.ImproperUniform(constraints.greater_than(tensor(1.5)), (), ()))
    pyro.sample("y", dist.Normal(a + b + c, d), obs=tensor(1.0))


def extras():
    x = pyro.sample("x", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
    total = pyro.deterministic("total", x.sum(-1))
    pyro.factor("penalty", -(total**2))
    with pyro.plate("rows", 4), poutine.scale(scale=0.5), poutine.mask(mask=torch.tensor([True, False, True, True])):
        pyro.sample("y", dist.Normal(total, 1.0), obs=tensor([1.0, 2, 3, 4]))
    with pyro.plate("latent rows", 3), poutine.mask(mask=torch.tensor([True, False, True])):
        masked = pyro.sample("masked", dist.Normal(tensor(1.0), 2.0))
    with pyro.plate("more", 3):
        pyro.factor("held", -(masked**2))


def mean_field():
    with pyro.plate("rows", 3):
        x = pyro.sample("x", dist.ImproperUniform(constraints.positive, (), ()))
        pyro.sample("y", dist.Exponential(x), obs=tensor([1.0, 2, 3]))


def improper_ordered():
    x = pyro.sample("x", dist.ImproperUniform(constraints.ordered_vector, (), (3,)))
    pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=tensor([1.0, 2, 3]))


def interval_of_another():
    a = pyro.sample("a", dist.Gamma(tensor(2.0), 1.0))
    b = pyro.sample("b", dist.ImproperUniform(constraints.interval(0.0, a), (), ()))
    pyro.sample("y", dist.Normal(a - b, 1.0), obs=tensor(1.0))


def garch():
    a = pyro.sample("a", dist.Uniform(tensor(0.0), 1.0))
    with pyro.plate("rows", 2):
        b = pyro.sample("b", dist.Uniform(tensor(0.0), 1 - a))
        c = pyro.sample("c", dist.Dirichlet(torch.ones(3).double()))
        pyro.sample("y", dist.Normal(a + b, c.sum(-1)), obs=tensor([1.0, 2.0]))


def mixture(y):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2).double()))
    means = pyro.sample("means", dist.Normal(tensor([-2.0, 2.0]), 1.0).to_event(1))
    pyro.deterministic("gap", means[..., 1] - means[..., 0])
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        mean = pyro.deterministic("mean", Vindex(means)[..., z])
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


MODELS = (
    scalar,
    vector,
    plate,
    nested,
    simplex,
    ordered,
    correlation,
    bounded,
    extras,
    mean_field,
    improper_ordered,
    interval_of_another,
    garch,
)
