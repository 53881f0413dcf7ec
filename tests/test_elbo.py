"""The objectives: path gradients against closed forms, frozen copies and Pyro's own, for every kind of guide."""

from __future__ import annotations

import copy
import math
import statistics
import time
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from contract import count_conditioners, make_flow
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from pyro.infer.autoguide.effect import AutoNormalMessenger
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyroflows import Flow, StandardNormal, iaf, realnvp
from pyroflows.inference.elbo import ImportanceWeightedELBO, PathELBO, TemperedELBO

DOUBLE = torch.float64
LOC = torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE)
TRIL = torch.tensor([[0.5, 0.0, 0.0], [0.3, 2.0, 0.0], [-0.2, 0.1, 1.0]], dtype=DOUBLE)


def target():
    pyro.sample("z", dist.MultivariateNormal(LOC, scale_tril=TRIL))


def target_score(z):
    return -(z - LOC) @ torch.cholesky_inverse(TRIL)


def parameter(*values):
    return nn.Parameter(torch.tensor(values, dtype=DOUBLE))


def gradients(elbo, model, guide, *args, of, seed=1):
    """The gradients of one step by the parameters given."""
    for p in of:
        p.grad = None
    torch.manual_seed(seed)
    elbo.loss_and_grads(model, guide, *args)
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in of]


def assert_close(found, wanted, atol=1e-10):
    torch.testing.assert_close(found, wanted, rtol=atol, atol=atol)


class Fed(dist.Normal):
    """A normal whose noise is given: rows of a table in their order, or the whole table to all particles at once."""

    noise: ClassVar[dict] = {}

    def rsample(self, sample_shape=()):
        rows = Fed.noise[self.batch_shape[-1]]
        if len(self.batch_shape) > 1:
            return self.loc + self.scale * rows
        return self.loc + self.scale * next(rows)


# Closed forms


def test_gradient_of_a_diagonal_gaussian_is_the_closed_form():
    loc, scale = parameter(0.1, 0.2, 0.3), parameter(0.5, 1.0, 2.0)

    def guide():
        pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    found = gradients(PathELBO(), target, guide, of=[loc, scale])
    torch.manual_seed(1)
    noise = torch.randn(3, dtype=DOUBLE)
    path = target_score(loc + scale * noise) + noise / scale
    assert_close(found, [-path, -path * noise])


def test_gradient_of_a_full_gaussian_is_the_closed_form():
    loc, tril = parameter(0.1, 0.2, 0.3), nn.Parameter(2 * TRIL.mT.tril() + torch.eye(3, dtype=DOUBLE))

    def guide():
        pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=tril))

    found = gradients(PathELBO(), target, guide, of=[loc, tril])
    torch.manual_seed(1)
    noise = torch.randn(3, dtype=DOUBLE)
    path = target_score(loc + tril @ noise) + torch.linalg.solve(tril.mT, noise)
    assert_close(found, [-path, -path[:, None] * noise])


@pytest.mark.parametrize("vectorized", [False, True])
def test_gradient_of_auto_normal_is_the_closed_form(vectorized):
    def model():
        pyro.sample("z", dist.LogNormal(LOC, 2.0).to_event(1))

    guide = AutoNormal(model)
    guide()
    loc, scale = guide.locs.z_unconstrained, guide.scales.z_unconstrained
    elbo = PathELBO(4, vectorize_particles=vectorized, max_plate_nesting=0)
    found = gradients(elbo, model, guide, of=[loc, scale])
    torch.manual_seed(1)
    noise = (
        torch.randn(4, 3, dtype=DOUBLE) if vectorized else torch.stack([torch.randn(3, dtype=DOUBLE) for _ in "1234"])
    )
    spread = guide.scales.z
    path = -(guide.locs.z + spread * noise - LOC) / 4 + noise / spread
    wanted = [-path.mean(0), -(path * noise).mean(0) * scale.sigmoid()]  # the scale is a softplus
    assert_close(found, [w.detach() for w in wanted])


def test_gradient_of_auto_multivariate_normal_is_the_closed_form():
    guide = AutoMultivariateNormal(target, init_scale=0.7)
    guide()
    of = [guide.loc, guide.scale_unconstrained, guide.scale_tril_unconstrained]
    found = gradients(PathELBO(), target, guide, of=of)
    torch.manual_seed(1)
    noise = torch.randn(3, dtype=DOUBLE)
    tril = guide.scale[:, None] * guide.scale_tril
    z = guide.loc + tril @ noise
    path = (target_score(z) + torch.linalg.solve(tril.mT, noise)).detach()
    assert_close(found, list(torch.autograd.grad(-(path * z).sum(), of)))


FLOWS = [
    "realnvp",
    "realnvp, dense, student",
    "glow",
    "nice",
    "iaf",
    "iaf, diagonal normal",
    "nsf",
    "maf",
    "planar",
    "radial",
]


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("name", FLOWS)
def test_gradient_of_a_flow_is_that_of_a_frozen_copy(name, vectorized):
    flow = make_flow(name, 3)
    frozen = copy.deepcopy(flow).requires_grad_(False)
    of = list(flow.parameters())

    def guide():
        pyro.module("flow", flow)
        pyro.sample("z", flow())

    def copied():
        z = flow().rsample((2,) if vectorized else ())
        return -(dist.MultivariateNormal(LOC, scale_tril=TRIL).log_prob(z) - frozen.log_prob(z)).mean()

    found = gradients(
        PathELBO(2 if vectorized else 1, vectorize_particles=vectorized, max_plate_nesting=0), target, guide, of=of
    )
    torch.manual_seed(1)
    wanted = torch.autograd.grad(copied(), of)
    assert_close(found, list(wanted), 1e-8)
    assert any(w.any() for w in wanted)


def test_gradient_of_pyros_own_flow_is_that_of_a_frozen_copy():
    def model():
        pyro.sample("z", dist.MultivariateNormal(LOC.float(), scale_tril=TRIL.float()))

    guide = AutoIAFNormal(model, hidden_dim=[8], num_transforms=2)
    guide()
    frozen = AutoIAFNormal(model, hidden_dim=[8], num_transforms=2)
    frozen()
    frozen.load_state_dict(guide.state_dict())
    of = list(guide.parameters())
    found = gradients(PathELBO(), model, guide, of=of)
    torch.manual_seed(1)
    z = guide.get_posterior().rsample()
    loss = frozen.get_posterior().log_prob(z) - dist.MultivariateNormal(LOC.float(), scale_tril=TRIL.float()).log_prob(
        z
    )
    assert_close(found, list(torch.autograd.grad(loss, of)), 1e-5)


# Nothing left where guide and target agree


@pytest.mark.parametrize("name", FLOWS)
def test_no_gradient_in_any_draw_where_flow_and_target_agree(name):
    flow = make_flow(name, 3)
    frozen = copy.deepcopy(flow).requires_grad_(False)
    of = list(flow.parameters())

    def guide():
        pyro.module("flow", flow)
        pyro.sample("z", flow())

    for seed in range(5):
        found = gradients(PathELBO(), lambda: pyro.sample("z", frozen()), guide, of=of, seed=seed)
        assert max(g.abs().max() for g in found) < 1e-9
    found = gradients(Trace_ELBO(), lambda: pyro.sample("z", frozen()), guide, of=of)
    assert max(g.abs().max() for g in found) > 1e-3


def test_no_gradient_in_any_draw_where_hierarchical_guide_and_target_agree():
    loc, slope, scale = parameter(0.3), parameter(-1.5), parameter(0.7)

    def program(loc, slope, scale):
        a = pyro.sample("a", dist.Normal(loc, 1.3).to_event(1))
        with pyro.plate("rows", 4):
            pyro.sample("b", dist.Normal(slope * a, scale))

    def model():
        program(*(p.detach() for p in (loc, slope, scale)))

    for elbo in (PathELBO(3), ImportanceWeightedELBO(3), PathELBO(3, vectorize_particles=True)):
        found = gradients(elbo, model, lambda: program(loc, slope, scale), of=[loc, slope, scale])
        assert_close(found, [torch.zeros_like(g) for g in found])


# Hierarchical guides


class Hierarchy(nn.Module):
    """A normal, a flow whose context it is, a normal whose location and scale both are, and a function of them."""

    def __init__(self):
        super().__init__()
        self.loc, self.log_scale = parameter(0.3), parameter(-0.4)
        self.flow = make_flow("realnvp", 2, 3)
        self.to_context = nn.Linear(1, 3).double()
        self.to_c = nn.Linear(3, 2).double()

    def a(self):
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)

    def b(self, a):
        return self.flow(self.to_context(a))

    def c(self, a, b):
        loc, log_scale = self.to_c(torch.cat([a, b], -1)).unbind(-1)
        return dist.Normal(loc, log_scale.exp())

    def forward(self):
        pyro.module("hierarchy", self)
        a = pyro.sample("a", self.a())
        b = pyro.sample("b", self.b(a))
        c = pyro.sample("c", self.c(a, b))
        pyro.sample("d", dist.Delta(b[..., 0] * c))

    def log_prob(self, a, b, c):
        return self.a().log_prob(a) + self.b(a).log_prob(b) + self.c(a, b).log_prob(c)


def hierarchical_model(strength):
    a = pyro.sample("a", dist.Normal(torch.zeros(1, dtype=DOUBLE), 1.0).to_event(1))
    b = pyro.sample("b", dist.StudentT(4.0, a.sin().expand((*a.shape[:-1], 2)), 1.0).to_event(1))
    c = pyro.sample("c", dist.Normal((a * b).sum(-1), 2.0))
    d = pyro.sample("d", dist.Cauchy(torch.zeros((), dtype=DOUBLE), 1.0))
    pyro.sample("y", dist.Normal(strength * (c + d) + b.sum(-1), 0.5), obs=torch.tensor(1.3, dtype=DOUBLE))


def drawn_by_hand(guide, strength):
    """A draw with its graph, and the log-joint and log-density there, the latter of a frozen copy."""
    a = guide.a().rsample()
    b = guide.b(a).rsample()
    c = guide.c(a, b).rsample()
    values = {"a": a, "b": b, "c": c, "d": b[..., 0] * c}
    joint = poutine.trace(poutine.condition(hierarchical_model, values)).get_trace(strength).log_prob_sum()
    return joint, copy.deepcopy(guide).requires_grad_(False).log_prob(a, b, c)


def hierarchy():
    torch.manual_seed(3)
    return Hierarchy(), nn.Parameter(torch.tensor(0.8, dtype=DOUBLE))


def test_gradient_of_a_hierarchical_guide_is_that_of_a_frozen_copy():
    guide, strength = hierarchy()
    of = [*guide.parameters(), strength]
    found = gradients(PathELBO(), hierarchical_model, guide_of(guide), strength, of=of)
    torch.manual_seed(1)
    joint, log_q = drawn_by_hand(guide, strength)
    assert_close(found, list(torch.autograd.grad(log_q - joint, of)))
    assert all(g.any() for g in found)


def guide_of(guide):
    return lambda strength: guide()


def test_gradient_of_a_hierarchical_guide_is_that_of_finite_differences():
    guide, strength = hierarchy()
    found = gradients(PathELBO(), hierarchical_model, guide_of(guide), strength, of=[guide.loc, guide.log_scale])
    frozen = copy.deepcopy(guide)

    def loss():
        torch.manual_seed(1)
        a = guide.a().rsample()
        b = guide.b(a).rsample()
        c = guide.c(a, b).rsample()
        values = {"a": a, "b": b, "c": c, "d": b[..., 0] * c}
        joint = poutine.trace(poutine.condition(hierarchical_model, values)).get_trace(strength).log_prob_sum()
        return (frozen.log_prob(a, b, c) - joint).item()

    for p, gradient in zip([guide.loc, guide.log_scale], found, strict=True):
        ends = []
        for step in (1e-5, -2e-5):
            p.data += step
            ends.append(loss())
        p.data += 1e-5
        assert gradient.item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)


def test_doubly_reparameterised_gradient_of_a_hierarchical_guide():
    guide, strength = hierarchy()
    of = [*guide.parameters(), strength]
    found = gradients(ImportanceWeightedELBO(5), hierarchical_model, guide_of(guide), strength, of=of)
    torch.manual_seed(1)
    draws = [drawn_by_hand(guide, strength) for _ in range(5)]
    shares = torch.stack([joint - log_q for joint, log_q in draws]).softmax(0).detach()
    of_guide = -sum(share**2 * (joint - log_q) for share, (joint, log_q) in zip(shares, draws, strict=True))
    of_model = -sum(share * joint for share, (joint, _) in zip(shares, draws, strict=True))
    wanted = [*torch.autograd.grad(of_guide, of[:-1], retain_graph=True), *torch.autograd.grad(of_model, of[-1:])]
    assert_close(found, wanted)
    assert shares.max() < 0.9


# Particles, plates, masks


ROWS = torch.tensor([0.5, -1.0, 2.0, 0.1, 0.7, -0.3], dtype=DOUBLE)


def local_model(rows):
    shift = pyro.sample("shift", dist.Normal(torch.zeros(2, dtype=DOUBLE), 1.0).to_event(1))
    with pyro.plate("rows", 6, subsample=rows), poutine.scale(scale=0.5):
        b = pyro.sample("b", dist.Normal(shift[..., 0], 1.0).mask(ROWS[rows] > -0.5))
        pyro.sample("y", dist.Normal(b + shift[..., 1], 0.4), obs=ROWS[rows])


class Local(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.arange(2, dtype=DOUBLE))
        self.log_scale = nn.Parameter(-0.1 * torch.ones(2, dtype=DOUBLE))
        self.locs = nn.Parameter(torch.arange(6, dtype=DOUBLE) / 5)
        self.slope = nn.Parameter(torch.tensor(0.4, dtype=DOUBLE))
        self.normal = dist.Normal

    def forward(self, rows):
        shift = pyro.sample("shift", self.normal(self.loc, self.log_scale.exp()).to_event(1))
        with pyro.plate("rows", 6, subsample=rows), poutine.scale(scale=0.5), poutine.mask(mask=ROWS[rows] > -0.5):
            loc = self.locs[rows] + self.slope * shift.sum(-1)
            pyro.sample("b", self.normal(loc, 0.5))


def local_loss(guide, frozen, rows):
    shift = guide.loc + guide.log_scale.exp() * torch.randn(2, dtype=DOUBLE)
    b = guide.locs[rows] + guide.slope * shift.sum() + 0.5 * torch.randn(len(rows), dtype=DOUBLE)
    kept, scale = ROWS[rows] > -0.5, 0.5 * 6 / len(rows)
    joint = dist.Normal(0.0, 1.0).log_prob(shift).sum()
    joint = joint + scale * (dist.Normal(shift[0], 1.0).log_prob(b) * kept).sum()
    joint = joint + scale * dist.Normal(b + shift[1], 0.4).log_prob(ROWS[rows]).sum()
    log_q = dist.Normal(frozen.loc, frozen.log_scale.exp()).log_prob(shift).sum()
    loc = frozen.locs[rows] + frozen.slope * shift.sum()
    return log_q + scale * (dist.Normal(loc, 0.5).log_prob(b) * kept).sum() - joint


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5], [4, 1, 2]])
def test_subsampled_plates_scales_and_masks(rows):
    guide, rows = Local(), torch.tensor(rows)
    of = list(guide.parameters())
    found = gradients(PathELBO(), local_model, guide, rows, of=of)
    torch.manual_seed(1)
    loss = local_loss(guide, copy.deepcopy(guide).requires_grad_(False), rows)
    assert_close(found, list(torch.autograd.grad(loss, of)))
    torch.manual_seed(1)
    assert PathELBO().loss(local_model, guide, rows) == pytest.approx(loss.item())


@pytest.mark.parametrize("objective", [PathELBO, ImportanceWeightedELBO, TemperedELBO])
def test_vectorised_equals_looped(objective):
    guide, rows = Local(), torch.tensor([4, 1, 2])
    guide.normal = Fed
    of = list(guide.parameters())
    table = {2: torch.randn(7, 2, dtype=DOUBLE), 3: torch.randn(7, 3, dtype=DOUBLE)}
    options = {"entropy": 0.7, "likelihood": 0.3} if objective is TemperedELBO else {}
    results = []
    for vectorized in (False, True):
        elbo = objective(7, vectorize_particles=vectorized, max_plate_nesting=1, **options)
        fed = {size: noise.unsqueeze(1) if size == 2 else noise for size, noise in table.items()}
        Fed.noise = fed if vectorized else {size: iter(noise) for size, noise in table.items()}
        results.append(gradients(elbo, local_model, guide, rows, of=of))
        Fed.noise = fed if vectorized else {size: iter(noise) for size, noise in table.items()}
        results[-1].append(torch.tensor(elbo.loss(local_model, guide, rows)))
    assert_close(*results)


def test_flow_in_a_plate():
    flow = make_flow("realnvp", 2)
    frozen = copy.deepcopy(flow).requires_grad_(False)
    of, weights = list(flow.parameters()), torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=DOUBLE)

    def model():
        with pyro.plate("rows", 4), poutine.scale(scale=3.0), poutine.mask(mask=weights.bool()):
            pyro.sample("z", dist.MultivariateNormal(LOC[:2], scale_tril=TRIL[:2, :2]))

    def guide():
        pyro.module("flow", flow)
        with pyro.plate("rows", 4), poutine.scale(scale=3.0), poutine.mask(mask=weights.bool()):
            pyro.sample("z", flow())

    for particles in (1, 5):
        elbo = PathELBO(particles, vectorize_particles=True, max_plate_nesting=1)
        found = gradients(elbo, model, guide, of=of)
        torch.manual_seed(1)
        z = flow().rsample((particles, 4) if particles > 1 else (4,))
        rows = frozen.log_prob(z) - dist.MultivariateNormal(LOC[:2], scale_tril=TRIL[:2, :2]).log_prob(z)
        assert_close(found, list(torch.autograd.grad(3 * (rows * weights).sum() / particles, of)))


def test_plates_are_found_for_vectorised_particles():
    guide = Local()
    elbo = PathELBO(3, vectorize_particles=True)
    assert math.isfinite(elbo.loss_and_grads(local_model, guide, torch.arange(6)))
    assert elbo.max_plate_nesting == 2


# Beside Pyro's own


def test_loss_is_that_of_trace_elbo():
    auto = AutoNormal(target)
    auto()
    for guide, model, args in (
        (auto, target, ()),
        (Local(), local_model, (torch.arange(6),)),
        (guide_of(hierarchy()[0]), hierarchical_model, (torch.tensor(0.8, dtype=DOUBLE),)),
    ):
        for particles, vectorized in ((1, False), (3, False)):
            losses = []
            for objective in (Trace_ELBO, PathELBO, TemperedELBO):
                elbo = objective(particles, vectorize_particles=vectorized)
                for loss in (elbo.loss, elbo.loss_and_grads, elbo.differentiable_loss):
                    torch.manual_seed(2)
                    losses.append(torch.as_tensor(loss(model, guide, *args)).item())
            assert losses == pytest.approx([losses[0]] * 9)


def test_mean_of_the_gradient_is_that_of_trace_elbo():
    guide, strength = hierarchy()
    of = [*guide.parameters(), strength]

    def moments(elbo):
        draws = [
            torch.cat(
                [g.flatten() for g in gradients(elbo, hierarchical_model, guide_of(guide), strength, of=of, seed=s)]
            )
            for s in range(200)
        ]
        draws = torch.stack(draws)
        return draws.mean(0), draws.var(0) / len(draws)

    (path, path_error), (total, total_error) = moments(PathELBO()), moments(Trace_ELBO())
    z = (path - total) / (path_error + total_error).sqrt().clamp_min(1e-12)
    assert z.abs().max() < 4.5
    assert z.square().mean() < 1.5


def test_total_gradient_is_that_of_trace_elbo():
    guide, strength = hierarchy()
    of = [*guide.parameters(), strength]
    both = [
        gradients(elbo, hierarchical_model, guide_of(guide), strength, of=of)
        for elbo in (Trace_ELBO(3), TemperedELBO(3, gradient="total"))
    ]
    assert_close(*both)


def test_gradient_of_the_model_is_that_of_trace_elbo():
    def model(strength):
        bias = pyro.param("bias", torch.tensor(0.2, dtype=DOUBLE))
        hierarchical_model(strength + bias)

    guide, strength = hierarchy()
    found = []
    for elbo in (Trace_ELBO(2), PathELBO(2)):
        pyro.clear_param_store()
        poutine.trace(model).get_trace(strength)
        of = [strength, pyro.param("bias").unconstrained()]
        found.append(gradients(elbo, model, guide_of(guide), strength, of=of))
    assert_close(*found)
    assert found[0][1] != 0


def test_deterministic_sites_keep_their_total_gradient():
    loc, log_scale = parameter(0.3), parameter(-0.5)

    def guide():
        pyro.param("a parameter, without which Trace_ELBO does nothing", loc)
        noise = pyro.sample("noise", dist.Normal(torch.zeros(1, dtype=DOUBLE), 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(loc + log_scale.exp() * noise, log_density=-log_scale))

    def model():
        pyro.sample("z", dist.Normal(LOC[:1], 2.0))

    both = [gradients(elbo, model, guide, of=[loc, log_scale]) for elbo in (Trace_ELBO(), PathELBO())]
    assert_close(*both)

    def point():
        return AutoDelta(model, init_loc_fn=lambda site: torch.ones(1, dtype=DOUBLE))

    for elbo in (PathELBO(), ImportanceWeightedELBO(2), TemperedELBO(2)):
        guide = point()
        guide()
        assert_close(gradients(elbo, model, guide, of=[guide.z]), [(1 - LOC[:1]) / 4])


def test_guide_without_latents():
    weight = parameter(0.5)

    def model():
        pyro.sample("y", dist.Normal(weight, 1.0), obs=torch.ones(1, dtype=DOUBLE))

    for elbo in (PathELBO(), ImportanceWeightedELBO(3), TemperedELBO(), PathELBO(2, vectorize_particles=True)):
        assert_close(gradients(elbo, model, lambda: None, of=[weight]), [torch.full_like(weight, -0.5)])


@pytest.mark.parametrize("objective", [PathELBO, ImportanceWeightedELBO, TemperedELBO])
def test_differentiable_loss_has_the_gradient_of_a_step(objective):
    guide, strength = hierarchy()
    of = [*guide.parameters(), strength]
    found = gradients(objective(3), hierarchical_model, guide_of(guide), strength, of=of)
    torch.manual_seed(1)
    loss = objective(3).differentiable_loss(hierarchical_model, guide_of(guide), strength)
    assert_close(list(torch.autograd.grad(loss, of)), found)


def test_as_a_module():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = PyroParam(torch.zeros(2))

        def forward(self):
            pyro.sample("z", dist.Normal(self.loc, 1.0).to_event(1))

    model, flow = Model(), realnvp(2, num_layers=1, hidden_features=(4,))

    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.flow = flow

        def forward(self):
            pyro.sample("z", self.flow())

    loss = PathELBO(4, vectorize_particles=True)(model, Guide())
    loss().backward()
    assert all(p.grad is not None for p in loss.parameters())


@pytest.mark.parametrize("optimizer", [pyro.optim.Adam, pyro.optim.ClippedAdam])
def test_svi_finds_a_gaussian_by_each_objective(optimizer):
    for objective in (PathELBO, TemperedELBO, ImportanceWeightedELBO):
        pyro.clear_param_store()
        elbo = objective(8, vectorize_particles=True, max_plate_nesting=0)
        svi = SVI(target, AutoMultivariateNormal(target), optimizer({"lr": 0.1}), elbo)
        losses = [svi.step() for _ in range(300)]
        assert sum(losses[:10]) > 10
        assert abs(sum(losses[-50:])) < 2


# Weights and bounds


def test_tempered_weights():
    guide, strength = hierarchy()
    elbo = TemperedELBO(entropy=0.3, likelihood=0.6)
    of = [*guide.parameters(), strength]

    def by_hand():
        torch.manual_seed(1)
        joint, log_q = drawn_by_hand(guide, strength)
        torch.manual_seed(1)
        a = guide.a().rsample()
        b = guide.b(a).rsample()
        c = guide.c(a, b).rsample()
        loc = strength * (c + b[..., 0] * c) + b.sum(-1)
        likelihood = dist.Normal(loc, 0.5).log_prob(torch.tensor(1.3, dtype=DOUBLE))
        return elbo.entropy * log_q - (joint - likelihood) - elbo.likelihood * likelihood

    for weights in ((0.3, 0.6), (2.0, 0.0), (0.0, 1.0)):
        elbo.entropy, elbo.likelihood = weights
        found = gradients(elbo, hierarchical_model, guide_of(guide), strength, of=of)
        loss = by_hand()
        wanted = torch.autograd.grad(loss, of, allow_unused=True)
        assert_close(found, [torch.zeros_like(p) if w is None else w for p, w in zip(of, wanted, strict=True)])
        torch.manual_seed(1)
        assert elbo.loss(hierarchical_model, guide_of(guide), strength) == pytest.approx(loss.item())


def test_tempered_weights_reach_the_jacobian_of_a_constraint():
    def model():
        pyro.sample("z", dist.LogNormal(LOC, 1.0).to_event(1))

    guide = AutoNormal(model)
    guide()
    torch.manual_seed(1)
    found = TemperedELBO(entropy=0.0).loss(model, guide)
    torch.manual_seed(1)
    z = (guide.locs.z + guide.scales.z * torch.randn(3, dtype=DOUBLE)).exp()
    assert found == pytest.approx(-dist.LogNormal(LOC, 1.0).log_prob(z).sum().item())


def test_importance_weighted_bound_is_that_of_renyi():
    guide = AutoNormal(target)
    guide()
    for vectorized in (False, True):
        losses = []
        for elbo in (
            ImportanceWeightedELBO(20, vectorize_particles=vectorized, max_plate_nesting=0),
            RenyiELBO(0, 20, vectorize_particles=vectorized, max_plate_nesting=0),
        ):
            for loss in (elbo.loss, elbo.loss_and_grads):
                torch.manual_seed(4)
                losses.append(loss(target, guide))
        assert losses == pytest.approx([losses[0]] * 4)


def test_importance_weighted_bound_of_one_draw_is_the_elbo():
    guide, strength = hierarchy()
    of = [*guide.parameters(), strength]
    both = [
        gradients(elbo, hierarchical_model, guide_of(guide), strength, of=of)
        for elbo in (PathELBO(), ImportanceWeightedELBO(1))
    ]
    assert_close(*both)


def test_importance_weighted_gradient_is_that_of_the_bound_in_the_mean():
    loc, scale = parameter(0.0, -1.0, 0.0), parameter(1.0, 1.5, 1.2)

    def guide():
        pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    def moments(elbo):
        draws = torch.stack([torch.cat(gradients(elbo, target, guide, of=[loc, scale], seed=s)) for s in range(400)])
        return draws.mean(0), draws.var(0) / len(draws)

    found, error = moments(ImportanceWeightedELBO(6, vectorize_particles=True, max_plate_nesting=0))
    pyro.param("unused", torch.zeros(()))

    def total():
        z = loc + scale * torch.randn(6, 3, dtype=DOUBLE)
        weights = dist.MultivariateNormal(LOC, scale_tril=TRIL).log_prob(z) - dist.Normal(loc, scale).to_event(
            1
        ).log_prob(z)
        return torch.cat(torch.autograd.grad(math.log(6) - weights.logsumexp(0), [loc, scale]))

    draws = torch.stack([total() for _ in range(400)])
    z = (found - draws.mean(0)) / (error + draws.var(0) / len(draws)).sqrt()
    assert z.abs().max() < 4
    assert (error < draws.var(0) / len(draws)).sum() >= 4


# One evaluation


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("build", [realnvp, iaf])
def test_each_conditioner_runs_once_a_step(build, vectorized):
    flow = build(4, num_layers=3, hidden_features=(8,)).double()
    calls = count_conditioners(flow)

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(4, dtype=DOUBLE), 1.0).to_event(1))

    def guide():
        pyro.module("flow", flow)
        pyro.sample("z", flow())

    elbo = PathELBO(5, vectorize_particles=vectorized, max_plate_nesting=0)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
    runs = 1 if vectorized else 5
    for objective in (svi.step, svi.evaluate_loss):
        for name in calls:
            calls[name] = 0
        objective()
        assert set(calls.values()) == {runs}
        assert len(calls) == 3


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"norm": "none", "permutation": "none"}])
def test_path_gradient_costs_at_most_one_and_a_half_total_gradients(options):
    flow = realnvp(10, num_layers=8, hidden_features=(64, 64), **options)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-5)

    def total():
        x, log_q = flow.rsample_and_log_prob((128,))
        return (log_q + x.square().sum(-1) / 2).mean()

    def path():
        x, _, score = flow.rsample_and_score((128,))
        leaf = x.detach().requires_grad_()
        of_target = torch.autograd.grad(-leaf.square().sum() / 2, leaf)[0]
        return ((score - of_target) * x).sum(-1).mean()

    times = {total: [], path: []}
    for _ in range(100):
        for loss, taken in times.items():
            start = time.perf_counter()
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
            taken.append(time.perf_counter() - start)
    total_time, path_time = (statistics.median(taken) for taken in times.values())
    assert path_time <= 1.5 * total_time


def test_model_is_passed_once_where_it_has_no_parameters():
    passes = []

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z.clone()

        @staticmethod
        def backward(ctx, gradient):
            passes.append(1)
            return gradient

    def model(weight):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("likelihood", -weight * Marked.apply(z).square().sum(-1))

    guide = AutoNormal(model)
    for weight, wanted in ((1.0, 1), (nn.Parameter(torch.ones(())), 2)):
        passes.clear()
        PathELBO().loss_and_grads(model, guide, weight)
        assert len(passes) == wanted


# Refusals


def test_refuses_a_guide_without_a_path():
    def model():
        pyro.sample("n", dist.Poisson(torch.ones(3)).to_event(1))

    def guide():
        pyro.sample("n", dist.Poisson(torch.ones(3)).to_event(1))

    for elbo in (PathELBO(), TemperedELBO(gradient="total"), ImportanceWeightedELBO(2)):
        for objective in (elbo.loss, elbo.loss_and_grads, elbo.differentiable_loss):
            with pytest.raises(
                TypeError, match="^expected a guide whose sites all have an rsample; got 'n' of Poisson$"
            ):
                objective(model, guide)


def test_refuses_a_factor_that_claims_no_path():
    def guide():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.zeros(()), has_rsample=False)

    with pytest.raises(TypeError, match="got 'f' of Unit"):
        PathELBO().loss(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), guide)


def test_refuses_a_flow_with_a_prior_without_a_path():
    flow = make_flow("maf, shuffle, batchnorm, mixture", 2)
    with pytest.raises(TypeError, match="got 'z' of FlowDistribution"):
        PathELBO().loss(
            lambda: pyro.sample("z", dist.Normal(LOC[:2], 1.0).to_event(1)), lambda: pyro.sample("z", flow())
        )


def test_refuses_a_latent_that_the_guide_does_not_draw():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("k", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})

    message = "expected a guide that draws every latent of the model, none of them enumerated; got none for 'k' of "
    with pytest.raises(ValueError, match=f"^{message}Categorical$"):
        PathELBO().loss_and_grads(model, lambda: pyro.sample("z", dist.Normal(0.0, 1.0)))


def test_refuses_a_messenger():
    with pytest.raises(
        TypeError, match="expected a guide that is a function or a module; got the messenger AutoNormal"
    ):
        PathELBO().loss(target, AutoNormalMessenger(target))


@pytest.mark.parametrize(
    "make, kind, message",
    [
        (lambda: PathELBO(0), ValueError, "expected num_particles to be a positive integer; got 0"),
        (lambda: TemperedELBO(entropy=-1.0), ValueError, r"expected entropy in \[0, inf\); got -1.0"),
        (lambda: TemperedELBO(likelihood="1"), TypeError, r"expected likelihood in \[0, inf\); got '1'"),
        (
            lambda: TemperedELBO(gradient="score"),
            ValueError,
            "expected gradient to be one of 'path', 'total'; got 'score'",
        ),
        (lambda: setattr(TemperedELBO(), "likelihood", math.nan), ValueError, "expected likelihood in"),
    ],
)
def test_refuses_what_it_cannot_use(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_frozen_flow_trains_what_comes_before():
    loc = parameter(0.1, 0.2)
    flow = Flow(StandardNormal(2), list(make_flow("realnvp, nothing between", 2).layers)).double().requires_grad_(False)

    def guide():
        a = pyro.sample("a", dist.Normal(loc, 1.0).to_event(1))
        pyro.sample("b", dist.TransformedDistribution(dist.Normal(a, 1.0).to_event(1), flow.layers))

    def model():
        pyro.sample("a", dist.Normal(LOC[:2], 1.0).to_event(1))
        pyro.sample("b", dist.Normal(LOC[:2], 1.0).to_event(1))

    found = gradients(PathELBO(), model, guide, of=[loc])
    torch.manual_seed(1)
    a = loc + torch.randn(2, dtype=DOUBLE)
    b = flow.bijection.forward_and_log_det(a + torch.randn(2, dtype=DOUBLE))[0]
    log_q = dist.Normal(loc.detach(), 1.0).log_prob(a).sum()
    log_q = log_q + dist.TransformedDistribution(dist.Normal(a, 1.0).to_event(1), flow.layers).log_prob(b)
    joint = dist.Normal(LOC[:2], 1.0).log_prob(a).sum() + dist.Normal(LOC[:2], 1.0).log_prob(b).sum()
    assert_close(found, list(torch.autograd.grad(log_q - joint, [loc])))


@pytest.mark.parametrize("vectorize", [False, True])
def test_a_plate_may_draw_its_rows_in_the_model(vectorize):
    y = torch.linspace(-1, 1, 12)

    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 12, subsample_size=4) as rows:
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y[rows])

    def guide():
        pyro.sample("mean", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 0.1))

    pyro.clear_param_store()
    options = {"num_particles": 4, "vectorize_particles": vectorize, "max_plate_nesting": 1}
    assert PathELBO(**options).loss_and_grads(model, guide) > 0
    assert pyro.param("loc").grad.isfinite()
