"""The protocol written once: records that answer once and never go stale, contexts, inverses, messages."""

from __future__ import annotations

import gc
import weakref

import pyro
import pytest
import torch
from contract import make, make_flow
from pyro.optim.clipped_adam import ClippedAdam
from torch import nn

from pyroflows import (
    ActNorm,
    Affine,
    BatchNorm,
    Bijection,
    Compose,
    Conditioned,
    Coupling,
    DenseLinear,
    ElementwiseAffine,
    Flow,
    Inverse,
    LULinear,
    MaskedAutoregressive,
    Permutation,
    Spline,
    StandardNormal,
    maf,
    nsf,
    realnvp,
)


class Counted(Bijection):
    """``y = e^s x``, which counts its evaluations."""

    def __init__(self, features=2, *, forward_passes=1, inverse_passes=1, context_features=0):
        super().__init__(features, context_features=context_features)
        self.log_scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("offset", torch.tensor(0.0))
        self.forward_passes, self.inverse_passes = forward_passes, inverse_passes
        self.calls = []

    def forward_and_log_det(self, x, context=None):
        self.calls.append("forward")
        shift = self.offset if context is None else self.offset + context.sum(-1, keepdim=True)
        return x * self.log_scale.exp() + shift, (self.log_scale * x.shape[-1]).expand(x.shape[:-1])

    def inverse_and_log_det(self, y, context=None):
        self.calls.append("inverse")
        shift = self.offset if context is None else self.offset + context.sum(-1, keepdim=True)
        return (y - shift) * (-self.log_scale).exp(), (-self.log_scale * y.shape[-1]).expand(y.shape[:-1])


# A record answers once, and only on the way back


def test_there_and_back_evaluates_once():
    layer, x = Counted(), torch.randn(3, 2)
    y = layer(x)
    assert layer.inv(y) is x
    assert layer.calls == ["forward"]
    layer.calls.clear()
    z = layer.inv(y)
    assert layer(z) is y
    assert layer.calls == ["inverse"]


def test_the_way_forth_is_evaluated_each_time():
    layer, x = Counted(), torch.randn(3, 2)
    assert layer(x) is not layer(x)
    assert layer.calls == ["forward"] * 2


def test_returning_is_free_once():
    layer, x = Counted(), torch.randn(3, 2)
    y = layer(x)
    layer.inv(y)
    assert layer.inv(y) is not x
    assert layer.calls == ["forward", "inverse"]


def test_scoring_is_free_once():
    layer, x = Counted(), torch.randn(3, 2)
    y = layer(x)
    first = layer.log_abs_det_jacobian(x, y)
    assert layer.calls == ["forward"]
    second = layer.log_abs_det_jacobian(x, y)
    assert len(layer.calls) == 2
    assert torch.equal(first, second)
    assert first is not second


def test_scoring_backwards_gives_the_other_sign():
    layer, y = Counted(), torch.randn(3, 2)
    x = layer.inv(y)
    assert torch.equal(layer.inv.log_abs_det_jacobian(y, x), torch.full((3,), -1.0))
    assert torch.equal(layer.log_abs_det_jacobian(x, y), torch.full((3,), 1.0))


def test_an_equal_tensor_is_not_the_same_tensor():
    layer, x = Counted(), torch.randn(3, 2)
    y = layer(x)
    assert layer.inv(y.clone()) is not x
    assert layer.calls == ["forward", "inverse"]


@pytest.mark.parametrize(
    "forward_passes, inverse_passes, wanted", [(5, 1, "inverse"), (1, 5, "forward"), (1, 1, "forward")]
)
@pytest.mark.parametrize("inverted", [False, True])
def test_a_pair_without_record_is_scored_the_cheap_way(forward_passes, inverse_passes, wanted, inverted):
    layer = Counted(forward_passes=forward_passes, inverse_passes=inverse_passes)
    x = torch.randn(3, 2)
    y = layer(x)
    layer.clear_cache()
    layer.calls.clear()
    if inverted:
        found = -Inverse(layer).log_abs_det_jacobian(y, x)
    else:
        found = layer.log_abs_det_jacobian(x, y)
    assert layer.calls == [wanted]
    assert torch.equal(found, torch.full((3,), 1.0))


def test_passes_add_up():
    slow, quick = MaskedAutoregressive(7), Coupling(7)
    assert (slow.forward_passes, slow.inverse_passes) == (2, 1)
    assert (slow.inv.forward_passes, slow.inv.inverse_passes) == (1, 2)
    stack = Compose([slow, quick, Inverse(MaskedAutoregressive(7))])
    assert (stack.forward_passes, stack.inverse_passes) == (4, 4)
    conditioned = MaskedAutoregressive(7, context_features=1).condition(torch.zeros(1))
    assert (conditioned.forward_passes, conditioned.inverse_passes) == (2, 1)


# The record never goes stale


def changes():
    def change(layer, x, y):
        with torch.no_grad():
            layer.log_scale.add_(1)

    def buffer(layer, x, y):
        layer.offset.add_(1)

    def replaced(layer, x, y):
        layer.log_scale = nn.Parameter(torch.tensor(2.0))

    def loaded(layer, x, y):
        layer.load_state_dict({"log_scale": torch.tensor(2.0), "offset": torch.tensor(1.0)})

    def mode(layer, x, y):
        layer.eval()

    def source(layer, x, y):
        x.add_(1)

    def result(layer, x, y):
        with torch.no_grad():
            y.add_(1)

    return {f.__name__: f for f in (change, buffer, replaced, loaded, mode, source, result)}


@pytest.mark.parametrize("name", changes())
def test_after_a_change_all_is_evaluated_anew(name):
    for ask in ("score", "return"):
        layer, x = Counted(), torch.randn(3, 2)
        y = layer(x)
        changes()[name](layer, x, y)
        layer.calls.clear()
        if ask == "score":
            assert torch.equal(layer.log_abs_det_jacobian(x, y), layer.forward_and_log_det(x)[1])
        else:
            torch.testing.assert_close(layer.inv(y), layer.inverse_and_log_det(y)[0])
        assert len(layer.calls) == 2


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.1, foreach=False),
    "adam, foreach": lambda p: torch.optim.Adam(p, 0.1, foreach=True),
    "adam, fused": lambda p: torch.optim.Adam(p, 0.1, fused=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.01, max_iter=2),
    "clipped adam": lambda p: ClippedAdam(p, 0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_same_tensor_after_a_step_has_its_new_density(optimizer):
    flow = make_flow("realnvp", 3).train()
    optimizer = OPTIMIZERS[optimizer](list(flow.parameters()))
    x = torch.randn(20, 3).double()
    distribution = flow()
    values = []

    def loss():
        optimizer.zero_grad()
        value = -distribution.log_prob(x).mean()
        value.backward()
        return value

    for _ in range(3):
        # A sample leaves a record, as does a mapping that is never scored.
        sample = distribution.rsample((5,))
        top = flow.layers[-1].inv(x)
        values.append(optimizer.step(loss).item())
        torch.testing.assert_close(distribution.log_prob(x), flow.log_prob(x))
        torch.testing.assert_close(distribution.log_prob(sample), flow.log_prob(sample))
        torch.testing.assert_close(
            flow.layers[-1].log_abs_det_jacobian(top, x), flow.layers[-1].forward_and_log_det(top)[1]
        )
    assert len(set(values)) == 3


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "pyro's clipped adam", "pyro's adam"])
def test_no_record_outlives_a_step(optimizer):
    for ask in ("score", "return"):
        layer, x = Counted(), torch.randn(3, 2)
        if optimizer in OPTIMIZERS:
            step = OPTIMIZERS[optimizer]([layer.log_scale]).step
        else:
            kind = pyro.optim.ClippedAdam if "clipped" in optimizer else pyro.optim.Adam
            wrapped = kind({"lr": 0.1})
            step = lambda *_: wrapped([layer.log_scale])  # noqa: E731
        layer.log_scale.grad = torch.ones(())
        y = layer(x)
        step(lambda: torch.tensor(1.0))
        assert layer.log_scale != 0.5
        if ask == "score":
            assert torch.equal(layer.log_abs_det_jacobian(x, y), layer.forward_and_log_det(x)[1])
        else:
            torch.testing.assert_close(layer.inv(y), layer.inverse_and_log_det(y)[0])


def test_pyros_own_optimizer_moves_the_density():
    flow = make_flow("realnvp", 2).train()
    optimizer = pyro.optim.ClippedAdam({"lr": 0.1})
    x = torch.randn(5, 2).double()
    distribution = flow()
    sample = distribution.rsample((5,))
    (-distribution.log_prob(x).mean()).backward()
    optimizer(list(flow.parameters()))
    torch.testing.assert_close(distribution.log_prob(sample), flow.log_prob(sample))
    torch.testing.assert_close(distribution.log_prob(x), flow.log_prob(x))


def test_full_batch_training_needs_no_clear_cache():
    flow = make_flow("maf", 2).train()
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2, fused=True)
    x = 2 + torch.randn(50, 2).double()
    distribution, losses = flow(), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = -distribution.log_prob(x).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert len(set(losses)) == 30


def test_training_and_evaluation_differ_where_there_is_dropout_or_a_batchnorm():
    x = torch.randn(40, 3)
    for flow in (realnvp(3, dropout=0.5, num_layers=2), realnvp(3, norm="batchnorm", num_layers=2)):
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        distribution = flow.eval()()
        sample = distribution.sample((40,))
        flow.train()
        torch.manual_seed(1)
        found = distribution.log_prob(sample)
        torch.manual_seed(1)
        torch.testing.assert_close(found, flow.log_prob(sample))
        flow.eval()
        torch.testing.assert_close(distribution.log_prob(x), flow.log_prob(x))


def test_a_record_without_gradients_does_not_answer_where_gradients_are_asked():
    layer, x = Counted(), torch.randn(3, 2)
    with torch.no_grad():
        y = layer(x)
        assert layer.inv(y) is x
    assert layer.log_abs_det_jacobian(x, y).requires_grad
    assert len(layer.calls) == 2
    with torch.no_grad():
        y = layer(x)
    assert layer.inv(y).requires_grad


def test_a_record_with_gradients_answers_where_none_are_asked():
    layer, x = Counted(), torch.randn(3, 2)
    y = layer(x)
    with torch.no_grad():
        log_det = layer.log_abs_det_jacobian(x, y)
    assert layer.calls == ["forward"]
    assert not log_det.requires_grad


def test_flow_scores_with_gradients_what_was_sampled_without():
    flow = make_flow("iaf", 3)
    distribution = flow()
    x = distribution.sample((4,))
    assert distribution.log_prob(x).requires_grad
    assert not x.requires_grad


def test_inference_mode():
    flow = make_flow("realnvp", 2)
    with torch.inference_mode():
        distribution = flow()
        x = distribution.sample((3,))
        torch.testing.assert_close(distribution.log_prob(x), flow.log_prob(x), rtol=1e-12, atol=0)
        x.mul_(2)
        torch.testing.assert_close(distribution.log_prob(x), flow.log_prob(x), rtol=1e-12, atol=0)
    x = x.clone()
    assert distribution.log_prob(x).requires_grad


def test_gradient_with_respect_to_x_after_requires_grad_is_set():
    flow = make_flow("realnvp", 2)
    distribution = flow()
    with torch.no_grad():
        x = distribution.sample((3,))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(distribution.log_prob(x).sum(), x)
    other = x.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(flow.log_prob(other).sum(), other)
    torch.testing.assert_close(gradient, expected)


def test_backward_twice_through_the_same_sample():
    flow = make_flow("iaf", 3)
    x = flow().rsample((4,)).detach()
    for _ in range(2):
        flow().log_prob(x).sum().backward()


def test_two_distributions_of_one_flow_do_not_mix():
    flow = make_flow("realnvp", 2, 3)
    one, other = flow(torch.randn(4, 3).double()), flow(torch.randn(4, 3).double())
    x, y = one.rsample(), other.rsample()
    torch.testing.assert_close(one.log_prob(x), flow.log_prob(x, one.transforms[0].context))
    torch.testing.assert_close(other.log_prob(x), flow.log_prob(x, other.transforms[0].context))
    torch.testing.assert_close(one.log_prob(y), flow.log_prob(y, one.transforms[0].context))


def test_one_layer_twice_in_a_stack():
    layer = make("coupling, affine", 4)
    flow = Flow(StandardNormal(4), [layer, Permutation(4, "reverse"), layer]).double()
    x = flow().rsample((3,))
    torch.testing.assert_close(flow().log_prob(x), flow.log_prob(x))
    y = torch.randn(3, 4).double()
    torch.testing.assert_close(flow().log_prob(y), flow.log_prob(y))


def test_a_change_of_context_in_place_is_seen():
    flow = make_flow("nsf", 2, 3)
    context = torch.randn(4, 3).double()
    distribution = flow(context)
    x = distribution.rsample()
    context.add_(1)
    torch.testing.assert_close(distribution.log_prob(x), flow.log_prob(x, context))


# The record holds nothing back


def test_the_result_is_held_weakly():
    layer, x = Counted(), torch.randn(3, 2)
    y = layer(x)
    source, result = weakref.ref(x), weakref.ref(y)
    assert layer._record is not None
    del x, y
    gc.collect()
    assert result() is None
    assert source() is None
    assert layer._record is None


def test_a_layer_and_its_inverse_are_freed():
    layer = Counted()
    y = layer(torch.randn(3, 2))
    inverse = layer.inv
    references = [weakref.ref(layer), weakref.ref(inverse)]
    del layer, inverse, y
    gc.collect()
    assert [r() for r in references] == [None, None]


def test_clear_cache_and_with_cache():
    layer, x = Counted(), torch.randn(3, 2)
    y = layer(x)
    assert layer.with_cache(0) is layer.with_cache(1) is layer
    layer.inv.bijection.clear_cache()
    assert layer.inv(y) is not x


def test_moving_the_dtype_drops_the_record():
    layer, x = Counted(), torch.randn(3, 2)
    y = layer(x)
    layer.double()
    assert layer.inv(y.double()).dtype == torch.float64


# Inverse, Conditioned, Compose


def test_inverse_shows_the_parameters():
    layer = MaskedAutoregressive(3)
    assert [id(p) for p in layer.inv.parameters()] == [id(p) for p in layer.parameters()]
    assert next(iter(dict(layer.inv.named_parameters()))).startswith("bijection.")
    assert layer.inv is layer.inv
    assert layer.inv.inv is layer
    assert Inverse(layer).inv is layer
    layer.inv.eval()
    assert not layer.conditioner.training


def test_inverse_swaps_shapes_and_sides():
    class Folded(Bijection):
        def __init__(self):
            super().__init__(4, data_shape=(2, 2))

        def forward_and_log_det(self, x, context=None):
            return x.unflatten(-1, (2, 2)), x.new_zeros(x.shape[:-1])

        def inverse_and_log_det(self, y, context=None):
            return y.flatten(-2), y.new_zeros(y.shape[:-2])

    layer = Folded()
    assert (layer.inv.latent_shape, layer.inv.data_shape) == ((2, 2), (4,))
    assert layer.forward_shape(torch.Size([5, 4])) == (5, 2, 2)
    assert layer.inv.forward_shape(torch.Size([5, 2, 2])) == (5, 4)
    assert (layer.domain.event_dim, layer.codomain.event_dim) == (1, 2)
    flow = Flow(StandardNormal(4), [LULinear(4), layer])
    assert flow.event_shape == flow().event_shape == (2, 2)
    x = flow().rsample((3,))
    torch.testing.assert_close(flow().log_prob(x), flow.log_prob(x))
    assert x.shape == (3, 2, 2)
    with pytest.raises(ValueError, match=r"expected a tensor of shape \(\*batch, 2, 2\); got \(3, 4\)"):
        flow.log_prob(torch.zeros(3, 4))


def test_conditioned_shows_the_parameters_and_broadcasts():
    layer, context = Counted(context_features=3), torch.randn(8, 3)
    conditioned = layer.condition(context)
    assert list(conditioned.parameters()) == list(layer.parameters())
    assert conditioned.forward_shape(torch.Size([2])) == (8, 2)
    assert conditioned.inverse_shape(torch.Size([5, 1, 2])) == (5, 8, 2)
    y = conditioned(torch.zeros(2))
    assert y.shape == (8, 2)
    assert conditioned.inv(y).shape == (8, 2)
    assert conditioned.log_abs_det_jacobian(torch.zeros(8, 2), y).shape == (8,)
    assert Counted().condition(context).context_features == 0


def test_conditioned_counts():
    layer, context = Counted(context_features=3), torch.randn(8, 3)
    x = torch.randn(8, 2)
    y = layer.condition(context)(x)
    other = layer.condition(context)
    assert other.inv(y) is x
    other.log_abs_det_jacobian(x, y)
    assert layer.calls == ["forward"]


def test_another_context_is_another_map():
    layer, context = Counted(context_features=3), torch.randn(8, 3)
    x = torch.randn(8, 2)
    y = layer.condition(context)(x)
    moved = layer.condition(context + 1)
    torch.testing.assert_close(moved.inv(y), x - 3 * (-layer.log_scale).exp())
    y = layer.condition(context)(x)
    layer.calls.clear()
    moved.log_abs_det_jacobian(x, y)
    assert layer.calls == ["forward"]


def test_compose_gives_its_context_to_those_that_take_one():
    stack = Compose([Counted(), Counted(context_features=3), LULinear(2)])
    assert stack.context_features == 3
    context = torch.randn(5, 3)
    y, log_det = stack.forward_and_log_det(torch.randn(5, 2), context)
    assert log_det.shape == (5,)
    assert stack.inverse_and_log_det(y, context)[0].shape == (5, 2)
    assert (len(stack), stack[1]) == (3, list(stack)[1])


def test_compose_evaluates_each_layer_once_there_and_back():
    layers = [Counted(), Counted(), Counted()]
    stack = Compose([layers[0], Compose(layers[1:])])
    x = torch.randn(4, 2)
    y = stack(x)
    assert stack.inv(y) is x
    stack.log_abs_det_jacobian(x, y)
    assert [layer.calls for layer in layers] == [["forward"]] * 3


def test_nested_inverse_evaluates_once():
    layer = Counted()
    nested = Compose([Inverse(Compose([layer]))])
    x = torch.randn(4, 2)
    y = nested(x)
    nested.log_abs_det_jacobian(x, y)
    assert nested.inv(y) is x or layer.calls == ["inverse", "forward"]


# Messages


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: Counted(0), ValueError, r"expected a positive number of features.*got 0"),
        (lambda: Counted(-3), ValueError, r"expected a positive number of features.*got -3"),
        (lambda: Counted(()), ValueError, r"expected a positive number of features.*got \(\)"),
        (lambda: Counted(True), ValueError, "expected a positive number of features.*got True"),
        (lambda: Counted(2.5), (ValueError, TypeError), "expected.*2.5"),
        (lambda: Counted(context_features=-1), ValueError, "expected context_features to be a non-negative.*got -1"),
        (lambda: Counted(context_features=1.5), ValueError, "expected context_features to be a non-negative.*got 1.5"),
        (lambda: Counted()(torch.zeros(3)), ValueError, r"expected a tensor of shape \(\*batch, 2\); got \(3,\)"),
        (lambda: Counted()(torch.tensor(0.0)), ValueError, r"expected a tensor of shape \(\*batch, 2\); got \(\)"),
        (lambda: Counted()([0.0, 0.0]), TypeError, r"expected a tensor of shape \(\*batch, 2\); got list"),
        (
            lambda: Counted()(torch.zeros(2, dtype=torch.long)),
            TypeError,
            "expected a floating-point tensor; got torch.int64",
        ),
        (
            lambda: Counted()(torch.zeros(2), torch.zeros(1)),
            ValueError,
            "expected no context.*context_features=0; got one",
        ),
        (
            lambda: Counted(context_features=3)(torch.zeros(2)),
            ValueError,
            r"expected a context of shape \(\*batch, 3\); got none",
        ),
        (
            lambda: Counted(context_features=3)(torch.zeros(8, 2), torch.zeros(8, 2)),
            ValueError,
            r"expected a context of shape \(\*batch, 3\); got \(8, 2\)",
        ),
        (
            lambda: Counted(context_features=3)(torch.zeros(4, 2), torch.zeros(5, 3)),
            ValueError,
            r"expected a context whose batch shape broadcasts with \(4,\); got \(5, 3\)",
        ),
        (
            lambda: Counted(context_features=3)(torch.zeros(2), torch.zeros(3, dtype=torch.long)),
            TypeError,
            "expected a floating-point context; got torch.int64",
        ),
        (lambda: Counted(context_features=3)(torch.zeros(2), [1, 2, 3]), TypeError, "expected a context.*got list"),
        (lambda: Counted().forward_shape(torch.Size([3])), ValueError, r"expected a shape \(\*batch, 2\); got \(3,\)"),
        (lambda: Inverse(nn.Linear(2, 2)), TypeError, "expected a Bijection; got Linear"),
        (lambda: Conditioned(nn.Linear(2, 2), torch.zeros(1)), TypeError, "expected a Bijection; got Linear"),
        (lambda: Conditioned(Counted(), torch.zeros(1)), ValueError, "expected no context"),
        (lambda: Compose([]), ValueError, "expected at least one layer; got none"),
        (lambda: Compose([nn.Linear(2, 2)]), TypeError, "expected layers that are Bijections; got Linear"),
        (lambda: Compose([Counted(2), Counted(3)]), ValueError, r"expected layer 1 to take shape \(2,\).*got \(3,\)"),
        (
            lambda: Compose([Counted(context_features=1), Counted(context_features=2)]),
            ValueError,
            r"expected layers of one context length; got context_features of \[1, 2\]",
        ),
        (lambda: Bijection(2)(torch.zeros(2)), NotImplementedError, "Bijection must define forward_and_log_det"),
        (lambda: Flow(nn.Linear(2, 2), Counted()), TypeError, "expected a Prior; got Linear"),
        (lambda: Flow(StandardNormal(3), Counted()), ValueError, r"expected a prior of shape \(2,\).*got \(3,\)"),
        (
            lambda: realnvp(2).log_prob(torch.zeros(2).double()),
            TypeError,
            "expected data of the flow's torch.float32.*64",
        ),
        (lambda: realnvp(2).log_prob(torch.zeros(3, 5)), ValueError, r"\(\*batch, 2\); got \(3, 5\)"),
        (
            lambda: realnvp(2).sample((-1,)),
            ValueError,
            r"expected a sample shape of non-negative integers; got \(-1,\)",
        ),
        (lambda: realnvp(2).sample((1.5,)), ValueError, "expected a sample shape of non-negative integers"),
        (lambda: realnvp(2, context_features=1).sample(3), ValueError, r"expected a context of shape.*got none"),
        (lambda: realnvp(2)(torch.zeros(1)), ValueError, "expected no context"),
        (lambda: realnvp(2, context_features=1)(), ValueError, "got none"),
        (
            lambda: Coupling(2, mask="thirds"),
            ValueError,
            "expected mask to be one of 'halves', 'checkerboard'; got 'thirds'",
        ),
        (lambda: Coupling(2, mask=[True]), ValueError, r"expected a mask of 2 booleans; got \[True\]"),
        (lambda: Coupling(2, mask=[1, 0]), ValueError, r"expected a mask of 2 booleans; got \[1, 0\]"),
        (
            lambda: Coupling(2, mask=[False, False]),
            ValueError,
            "a mask that transforms at least one.*got none",
        ),
        (lambda: Coupling(2, transformer="cubic"), ValueError, "expected transformer to be one of.*got 'cubic'"),
        (
            lambda: Coupling(2, conditioner=nn.Identity(), dropout=0.1),
            TypeError,
            "`conditioner` cannot be combined with options.*got dropout",
        ),
        (lambda: Coupling(2, width=3), TypeError, "width"),
        (lambda: MaskedAutoregressive(2, width=3), TypeError, "width"),
        (lambda: Coupling(0), ValueError, "expected .*features.*got 0"),
        (lambda: MaskedAutoregressive(0), ValueError, "expected .*features.*got 0"),
        (lambda: MaskedAutoregressive(3, order="up"), ValueError, "expected order to be one of.*got 'up'"),
        (lambda: MaskedAutoregressive(3, order=[0, 0, 1]), ValueError, r"a permutation of 0, ..., 2; got \[0, 0, 1\]"),
        (lambda: Coupling(3, hidden_features=(3, 0)), ValueError, r"hidden_features\b.*0"),
        (
            lambda: Coupling(3, hidden_features=(3, 4), residual=True),
            ValueError,
            r"one width; got hidden_features=\(3, 4\)",
        ),
        (lambda: Coupling(3, activation="cosine"), ValueError, "expected activation to be one of.*got 'cosine'"),
        (lambda: Coupling(3, dropout=1.0), ValueError, r"expected dropout in \[0, 1\); got 1.0"),
        (lambda: Spline(num_bins=1), ValueError, r"expected num_bins in \[2, inf\); got 1"),
        (lambda: Spline(bound=-1.0), ValueError, r"expected bound in \(0, inf\)"),
        (lambda: Spline(min_size=0.2), ValueError, r"expected min_size in \(0, 0.125\); got 0.2"),
        (lambda: Affine(scale="softplus"), ValueError, "expected scale to be one of 'exp', 'sigmoid'; got 'softplus'"),
        (lambda: Affine(bound=0.0), ValueError, r"expected bound in \(0, inf\); got 0.0"),
        (lambda: BatchNorm(2, momentum=0.0), ValueError, r"expected momentum in \(0, 1\]; got 0.0"),
        (lambda: BatchNorm(2, eps=0.0), ValueError, r"expected eps in \(0, inf\); got 0.0"),
        (
            lambda: LULinear(2, init="zeros"),
            ValueError,
            "expected init to be one of 'orthogonal', 'identity'; got 'zeros'",
        ),
        (lambda: DenseLinear(0), ValueError, "expected .*features.*got 0"),
        (lambda: Permutation(3, "sorted"), ValueError, "expected order to be 'reverse', 'random' or.*got 'sorted'"),
        (lambda: Permutation(3, [0, 1]), ValueError, r"expected order to be a permutation.*got \[0, 1\]"),
        (lambda: ActNorm(0), ValueError, "got 0"),
        (lambda: ElementwiseAffine(-1), ValueError, "got -1"),
        (lambda: realnvp(2, num_layers=0), ValueError, "expected num_layers to be a positive integer; got 0"),
        (lambda: realnvp(2, num_layers=2.0), ValueError, "expected num_layers to be a positive integer; got 2.0"),
        (lambda: realnvp(2, permutation="swap"), ValueError, "expected permutation to be one of.*got 'swap'"),
        (lambda: realnvp(2, norm="layernorm"), ValueError, "expected norm to be one of.*got 'layernorm'"),
        (lambda: realnvp(2, prior=StandardNormal(3)), ValueError, r"expected a prior of shape \(2,\)"),
        (lambda: realnvp(2, hidden=(3,)), TypeError, "hidden"),
        (lambda: realnvp(0), ValueError, "expected features to be a positive integer; got 0"),
        (lambda: realnvp(-2), ValueError, "expected features to be a positive integer; got -2"),
        (lambda: maf(2, context_features=-1), ValueError, "expected context_features to be a non-negative.*got -1"),
        (lambda: maf(2, order=3), (ValueError, TypeError), "order"),
        (lambda: nsf(2, num_bins=1), ValueError, r"expected num_bins in \[2, inf\); got 1"),
    ],
)
def test_messages_say_what_was_expected_and_what_came(call, error, message):
    with pytest.raises(error, match=message):
        call()
