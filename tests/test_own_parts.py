"""Flows with networks, layers, priors and transformers of the user's own: saved, loaded, and equal in every number."""

from __future__ import annotations

import copy
import enum
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from contract import FLOWS, HIDDEN, IMAGE_FLOWS, LAYERS, PRIORS, contexts, make, perturb
from torch import nn
from torch.nn import functional as F

from pyroflows import (
    MLP,
    Bijection,
    Coupling,
    Flow,
    MaskedAutoregressive,
    Planar,
    Prior,
    StandardNormal,
    glow,
    iaf,
    load,
    maf,
    nice,
    nsf,
    planar,
    radial,
    realnvp,
)
from pyroflows.recipe import Recorded
from pyroflows.tables.fitting import fit_table


class Net(nn.Module):
    """A network that keeps none of its arguments."""

    def __init__(self, in_features, hidden=8, out_features=4, activation=torch.tanh):
        super().__init__()
        self.first, self.last = nn.Linear(in_features, hidden), nn.Linear(hidden, out_features)
        self.act = activation

    def forward(self, x):
        return self.last(self.act(self.first(x)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(1, 3, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(6, 5, batch_first=True)
        self.rnn = nn.RNN(5, 4, nonlinearity="relu", batch_first=True)

    def forward(self, x):
        return self.rnn(self.gru(self.lstm(x[..., None])[0])[0])[0][:, -1]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Linear(1, 8)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        h = self.encoder(self.words(x[..., None]))
        return self.last(self.attention(h, h, h)[0].mean(1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.last = nn.Linear(3, 4)

    def forward(self, x):
        return self.last(self.second(torch.relu(self.first(x))))


class Mode(enum.Enum):
    PLAIN = 1
    NEGATIVE = 2


@dataclass
class Config:
    width: int = 5
    mode: Mode = Mode.PLAIN


class Attributes(nn.Module):
    """Attributes of all kinds, each of which changes the result."""

    def __init__(self, seed, config):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("unsaved", torch.randn(3, 4, generator=generator), persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("nothing", None)
        self.register_parameter("none", None)
        self.mean = torch.randn(3, generator=generator)
        self.array, self.scalar = np.arange(4.0), np.float64(2.0)
        self.nested = {"a": [1, (2.5, None)], 3: {4}}
        self.kind, self.config, self.size = nn.ReLU, config, torch.Size((4,))
        self.ones = nn.ParameterList([nn.Parameter(torch.ones(4))])
        self.parts = nn.ModuleDict({"tanh": nn.Tanh(), "identity": nn.Identity()})

    def forward(self, x):
        x = -x if self.config.mode is Mode.NEGATIVE else x * self.config.width
        h = self.parts["tanh"]((x - self.mean.to(x)) @ self.unsaved.to(x)) * self.ones[0]
        return self.kind()(h + torch.as_tensor(self.array).to(x) * self.scalar * self.nested["a"][1][0])


class Spectrum(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, dtype=torch.complex128))
        self.register_buffer("unsaved", torch.randn(2, dtype=torch.complex64), persistent=False)

    def forward(self, x):
        return torch.view_as_real(torch.fft.rfft(x) * self.weight * self.unsaved).flatten(-2).to(x)


class Remembering(Recorded, nn.Module):
    """A network whose function only its constructor can make."""

    def __init__(self, width):
        super().__init__()
        self.linear, self.function = nn.Linear(3, width), lambda x: x**2

    def forward(self, x):
        return self.function(self.linear(x))


def swish(x):
    return x * torch.sigmoid(x)


def in_flow(embedding):
    inner = realnvp(2, num_layers=2, hidden_features=(6,), context_features=4)
    return Flow(inner.prior, inner.layers, embedding=embedding)


def moved(flow, dtype=torch.float64):
    """The flow away from its start, in a dtype."""
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for tensor in (*flow.parameters(), *flow.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return flow.eval()


def assert_scores_alike(found, flow):
    x = torch.randn(5, 2, dtype=flow.dtype)
    context = torch.randn(5, 3, dtype=flow.dtype) if flow.context_features else None
    error = 100 * torch.finfo(flow.dtype).eps
    expected = flow.log_prob(x, context)
    assert not torch.allclose(flow.log_prob(x + 1, context), expected)
    for each in (found, copy.deepcopy(found)):
        torch.testing.assert_close(each.log_prob(x, context), expected, rtol=error, atol=error)
    assert not any(part.training for part in found.modules())


def assert_comes_back(flow, folder, classes):
    path = folder / "flow.safetensors"
    for source in (flow, None):  # also what came back
        (source or load(path, classes=classes)).save(path)
        assert_scores_alike(load(path, classes=classes), flow)


EMBEDDINGS = {
    "network": (lambda: Net(3), [Net]),
    "function of torch": (lambda: Net(3, activation=F.gelu), [Net]),
    "activation": (lambda: Net(3, activation=nn.LeakyReLU(0.3)), [Net]),
    "function of one's own": (lambda: Net(3, activation=swish), [Net, swish]),
    "partial function": (lambda: Net(3, activation=partial(F.leaky_relu, negative_slope=0.3)), [Net]),
    "recurrent": (Recurrent, [Recurrent]),
    "attention": (Attention, [Attention]),
    "tied": (Tied, [Tied]),
    "attributes": (lambda: Attributes(3, Config(7, Mode.NEGATIVE)), [Attributes, Config, Mode]),
    "spectrum": (Spectrum, [Spectrum]),
    "of a function of its own": (lambda: Remembering(4), [Remembering]),
    "layers of torch": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Sigmoid()), []),
    "named layers": (lambda: nn.Sequential(OrderedDict(a=nn.Linear(3, 4), b=nn.Hardtanh())), []),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_an_embedding_of_ones_own_comes_back(name, dtype, tmp_path):
    torch.manual_seed(0)
    build, classes = EMBEDDINGS[name]
    flow = moved(in_flow(build()), dtype)
    assert_comes_back(flow, tmp_path, classes)
    torch.manual_seed(1)
    assert_scores_alike(load(tmp_path / "flow.safetensors", embedding=copy.deepcopy(flow.embedding)), flow)


def test_tied_weights_stay_tied(tmp_path):
    in_flow(Tied()).save(tmp_path / "flow")
    embedding = load(tmp_path / "flow", classes=[Tied]).embedding
    assert embedding.first.weight is embedding.second.weight


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
        lambda: torch.jit.script(nn.Linear(3, 4)),
        lambda: torch.compile(nn.Linear(3, 4)),
    ],
    ids=["parametrized", "scripted", "compiled"],
)
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_network_that_torch_has_changed_is_passed_built(build, tmp_path):
    flow = in_flow(build())
    flow.save(tmp_path / "flow")
    with pytest.raises(ValueError, match="expected embedding=..., built as it was, since .* cannot hold .*; got none"):
        load(tmp_path / "flow")
    found = load(tmp_path / "flow", embedding=build())
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in flow.state_dict().items())


@pytest.mark.parametrize("act", ["relu", "tanh"])
def test_a_constructor_is_not_called(act, tmp_path, monkeypatch):
    flow = moved(in_flow(Net(3, activation=getattr(torch, act))))
    flow.save(tmp_path / "flow")
    monkeypatch.setattr(Net, "__init__", None)
    assert_scores_alike(load(tmp_path / "flow", classes=[Net]), flow)


class Conditioner(nn.Module):
    def __init__(self, inputs, outputs, context_features=0):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(inputs + context_features, 7), nn.Tanh(), nn.Linear(7, outputs))

    def forward(self, x, context=None):
        return self.net(x if context is None else torch.cat([x, context.expand(*x.shape[:-1], -1)], -1))


class Scale:
    """A transformer of one's own; those below are the same by other means."""

    parameter_shapes = ((), ())

    def __init__(self, width=2.0):
        self.hidden_width = width

    def forward(self, x, shift, raw):
        return x * torch.exp(raw / self.hidden_width) + shift, raw / self.hidden_width

    def inverse(self, y, shift, raw):
        return (y - shift) * torch.exp(-raw / self.hidden_width), -raw / self.hidden_width


@dataclass(frozen=True)
class FrozenScale(Scale):
    hidden_width: float = 3.0


@dataclass(frozen=True, slots=True)
class SlottedScale:
    hidden_width: float = 3.0

    @property
    def parameter_shapes(self):
        return ((), ())

    forward, inverse = Scale.forward, Scale.inverse


class LearnedScale(nn.Module):
    parameter_shapes = ((), ())

    def __init__(self):
        super().__init__()
        self.hidden_width = nn.Parameter(torch.tensor(1.7))

    forward, inverse = Scale.forward, Scale.inverse


class Laplace(Prior):
    def __init__(self, features, scale):
        super().__init__(features)
        self.log_scale = nn.Parameter(torch.full((features,), float(scale)).log())

    def forward(self):
        return dist.Laplace(torch.zeros_like(self.log_scale), self.log_scale.exp()).to_event(1)


class FixedLaplace(Prior):
    def __init__(self, features):
        super().__init__(features)
        self.base = dist.Laplace(torch.zeros(features, dtype=torch.float64), 1.0).to_event(1)

    def forward(self):
        return self.base


class Tempered(Flow):
    def __init__(self, prior, layers, power, embedding):
        super().__init__(prior, layers, embedding=embedding)
        self.power = power

    def log_prob(self, x, context=None):
        return self.power * super().log_prob(x, context)


class Around(Bijection):
    """A layer that keeps its argument by another name, and a shift that is set afterwards."""

    def __init__(self, inside):
        super().__init__(inside.latent_shape, context_features=inside.context_features)
        self.other_name, self.shift, self.function = inside, torch.zeros(2), torch.tanh

    def forward_and_log_det(self, x, context=None):
        y, log_det = self.other_name.forward_and_log_det(x, context)
        return y + self.shift.to(y), log_det

    def inverse_and_log_det(self, y, context=None):
        return self.other_name.inverse_and_log_det(y - self.shift.to(y), context)


def shifted():
    layer = Around(Planar(2))
    layer.shift = torch.tensor([3.0, 4.0])
    return layer


def coupled(**options):
    options = {"hidden_features": (5,), **options} if "conditioner" not in options else options
    return Flow(StandardNormal(2), [Coupling(2, **options), Coupling(2, flip=True, hidden_features=(5,))])


PARTS = {
    "conditioner": (lambda: coupled(conditioner=Conditioner(1, 2)), [Conditioner]),
    "conditioner and embedding": (
        lambda: Flow(
            StandardNormal(2),
            [Coupling(2, conditioner=Conditioner(1, 2, 4), context_features=4, flip=flip) for flip in (False, True)],
            embedding=Net(3),
        ),
        [Net, Conditioner],
    ),
    "transformer": (lambda: coupled(transformer=Scale(3.0)), [Scale]),
    "frozen transformer": (lambda: coupled(transformer=FrozenScale(2.5)), [FrozenScale]),
    "slotted transformer": (lambda: coupled(transformer=SlottedScale(2.5)), [SlottedScale]),
    "learned transformer": (lambda: coupled(transformer=LearnedScale()), [LearnedScale]),
    "autoregressive transformer": (
        lambda: Flow(StandardNormal(2), MaskedAutoregressive(2, transformer=Scale(3.0), hidden_features=(5,)).inv),
        [Scale],
    ),
    "prior": (lambda: Flow(Laplace(2, 0.3), Planar(2)), [Laplace]),
    "prior with a distribution": (lambda: Flow(FixedLaplace(2), Planar(2)), [FixedLaplace]),
    "flow": (
        lambda: Tempered(StandardNormal(2), [Coupling(2, hidden_features=(4,), context_features=4)], 3.5, Net(3)),
        [Tempered, Net],
    ),
    "layer": (lambda: Flow(StandardNormal(2), [shifted(), Around(Coupling(2, hidden_features=(4,)))]), [Around]),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_ones_own_comes_back(name, tmp_path):
    torch.manual_seed(0)
    build, classes = PARTS[name]
    assert_comes_back(moved(build()), tmp_path, classes)
    with pytest.raises(ValueError, match=r"expected classes=\[.*\], since the file names test_own_parts\..*; got none"):
        load(tmp_path / "flow.safetensors")


# What is passed to load


class Sine(nn.Module):
    """A network with a function that no file can hold."""

    def __init__(self, scale=1.0, width=4):
        super().__init__()
        self.scale, self.function, self.linear = scale, lambda x: torch.sin(x), nn.Linear(3, width)

    def forward(self, x):
        return self.scale * self.linear(self.function(x))


def test_an_embedding_with_a_function_is_passed_built(tmp_path):
    flow = moved(in_flow(Sine(2.0)))
    flow.save(tmp_path / "flow")
    assert_scores_alike(load(tmp_path / "flow", embedding=Sine(2.0)), flow)


@pytest.mark.parametrize(
    "options, error, message",
    [
        (
            {},
            ValueError,
            r"embedding=Sine\(...\), built as it was, since a file cannot hold the function <lambda>",
        ),
        ({"classes": [Sine]}, ValueError, r"expected embedding=Sine\(...\), built as it was, since a file cannot hold"),
        ({"embedding": Net(3)}, ValueError, "expected Sine as embedding, by the recipe; got Net, in"),
        ({"embedding": Sine(3.0)}, ValueError, "expected 2.0 as embedding.scale, by the recipe; got 3.0, in"),
        ({"embedding": Sine(2.0, 5)}, ValueError, "expected 4 as embedding.linear.out_features, by the recipe; got 5"),
        ({"embedding": Sine}, TypeError, "expected an embedding that is built, a torch module; got the class Sine"),
        ({"embedding": "Sine"}, TypeError, "expected an embedding that is built, a torch module; got str"),
        ({"classes": ["Sine"]}, TypeError, "expected classes as a list of classes, and functions; got"),
    ],
)
def test_another_embedding_than_the_files_is_refused(options, error, message, tmp_path):
    in_flow(Sine(2.0)).save(tmp_path / "flow")
    with pytest.raises(error, match=message):
        load(tmp_path / "flow", **options)


def test_both_ways_are_named_for_an_embedding_whose_class_is_not_passed(tmp_path):
    in_flow(Attributes(1, Config())).save(tmp_path / "flow")
    message = r"expected classes=\[Attributes, Config, Mode\], or embedding=Attributes\(...\), built as it was, .*; "
    for classes, got in (((), "none"), ([Config], "test_own_parts.Config")):
        with pytest.raises(ValueError, match=f"{message}got {got}"):
            load(tmp_path / "flow", classes=classes)
    with pytest.raises(ValueError, match="expected the numbers that the file holds as embedding.unsaved; got others"):
        load(tmp_path / "flow", embedding=Attributes(2, Config()))


def test_an_embedding_for_a_flow_without_one_is_refused(tmp_path):
    maf(2, num_layers=1).save(tmp_path / "flow")
    with pytest.raises(ValueError, match="expected no embedding, since the flow in the file has none; got Net, in"):
        load(tmp_path / "flow", embedding=Net(3))


def test_two_classes_of_one_name_are_told_apart(tmp_path):
    first = type("Same", (Net,), {"__module__": "first"})
    second = type("Same", (Net,), {"__module__": "second", "forward": lambda self, x: -Net.forward(self, x)})
    flow = moved(in_flow(nn.Sequential(first(3, out_features=5), second(5))))
    flow.save(tmp_path / "flow")
    for classes in ([first, second], [second, first]):
        assert_scores_alike(load(tmp_path / "flow", classes=classes), flow)
    with pytest.raises(
        ValueError, match=r"classes=\[Same, Same\], .* names first.Same, second.Same, .*; got first.Same"
    ):
        load(tmp_path / "flow", classes=[first])
    flow = moved(in_flow(first(3)))
    flow.save(tmp_path / "flow")
    elsewhere = type("Same", (Net,), {"__module__": "elsewhere"})  # a class that was moved to another module
    assert_scores_alike(load(tmp_path / "flow", classes=[elsewhere]), flow)


def test_networks_that_are_not_registered_are_refused_also_in_an_embedding(tmp_path):
    embedding = Net(3)
    embedding.hidden = [nn.Linear(3, 4)]
    with pytest.raises(ValueError, match=r"registered modules.*; got a Linear as Flow.embedding.hidden\[0\], which st"):
        in_flow(embedding).save(tmp_path / "flow")
    layer = shifted()
    layer.hidden, layer.function = {"a": nn.Parameter(torch.ones(2))}, lambda x: x
    with pytest.raises(ValueError, match="expected registered modules and parameters; got a Parameter as Flow.layers"):
        Flow(StandardNormal(2), layer).save(tmp_path / "flow")


class Drawn(Bijection):
    """A layer whose numbers only the constructor draws, with a function that no file can hold."""

    def __init__(self, features):
        super().__init__(features)
        self.shift, self.function = torch.randn(features), lambda x: x

    forward_and_log_det, inverse_and_log_det = Around.forward_and_log_det, Around.inverse_and_log_det


def test_a_layer_that_its_constructor_would_build_otherwise_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"modified after construction; got a change in bijection.layers.0.shift"):
        Flow(StandardNormal(2), Drawn(2)).save(tmp_path / "flow")


def test_a_loaded_flow_trains_and_its_frozen_parameters_stay_frozen(tmp_path):
    flow = moved(in_flow(Net(3)))
    flow.embedding.first.requires_grad_(False)
    flow.save(tmp_path / "flow")
    found = load(tmp_path / "flow", classes=[Net])
    found.log_prob(torch.randn(5, 2).double(), torch.randn(5, 3).double()).sum().backward()
    assert found.embedding.first.weight.grad is None
    assert found.embedding.last.weight.grad.abs().sum() > 0


# embedding= of the named flows

BUILDERS = {"glow": glow, "iaf": iaf, "maf": maf, "nice": nice, "nsf": nsf, "planar": planar, "radial": radial}
BUILDERS["realnvp"] = realnvp


def test_all_named_flows_are_tried():
    assert {name.partition(",")[0] for name in FLOWS} == BUILDERS.keys()
    assert {name.partition(",")[0] for name in IMAGE_FLOWS} <= BUILDERS.keys()


@pytest.mark.parametrize("name", BUILDERS)
def test_a_named_flow_takes_an_embedding(name, tmp_path):
    sizes = {"num_steps": 2} if name == "glow" else {"num_layers": 2}
    options = {**sizes, "hidden_features": HIDDEN, "context_features": 4}
    flow = moved(BUILDERS[name](2, embedding=Net(3), **options))
    assert isinstance(flow.embedding, Net)
    assert_comes_back(flow, tmp_path, [Net])
    assert_scores_alike(load(tmp_path / "flow.safetensors", embedding=Net(3)), flow)
    with pytest.raises(ValueError, match="an embedding needs layers that take a context; got context_features=0"):
        BUILDERS[name](2, embedding=Net(3))


@pytest.mark.parametrize("builder", [glow, realnvp])
def test_a_named_flow_of_images_takes_an_embedding(builder, tmp_path):
    options = {"num_steps": 1} if builder is glow else {"num_blocks": 1}
    options |= {"num_levels": 1, "hidden_channels": 4}
    flow = moved(builder((1, 4, 4), context_features=4, embedding=Net(3), **options))
    flow.save(tmp_path / "flow")
    x, context = 0.1 + 0.8 * torch.rand(2, 1, 4, 4, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    for found in (load(tmp_path / "flow", classes=[Net]), load(tmp_path / "flow", embedding=Net(3))):
        torch.testing.assert_close(found.log_prob(x, context), flow.log_prob(x, context))
    with pytest.raises(ValueError, match="`num_classes` cannot be combined with `context_features` or `embedding`"):
        builder((1, 4, 4), num_classes=3, embedding=Net(3), **options)


def test_a_network_of_this_package_within_one_of_ones_own_comes_back(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.networks = nn.ModuleList([MLP(3, 4, hidden_features=(5,), zero_last=False) for _ in range(2)])

        def forward(self, x):
            return self.networks[0](x) + self.networks[1](x)

    assert_comes_back(moved(in_flow(Two())), tmp_path, [Two])


# Tables


def table(rows=600):
    rng = np.random.default_rng(0)
    context = rng.normal(5, 3, (rows, 3))
    x = np.abs(context[:, :1] - 5) + 0.2 * rng.normal(size=(rows, 2))  # no linear map of the context gives it
    return 1000 + 100 * x, context


def test_a_table_learns_an_embedding_of_its_context(tmp_path):
    x, context = table()
    torch.manual_seed(0)
    embedding = Net(3, out_features=2)
    before = copy.deepcopy(embedding.state_dict())
    options = {"num_layers": 1, "hidden_features": (8,), "embedding": embedding}
    flow, result = fit_table(x, "maf", context=context, flow_options=options, epochs=40, learning_rate=1e-2, seed=0)
    assert flow.context_features == 2
    assert result.best_loss < fit_table(x, "maf", context=context, flow_options=options, epochs=1, seed=0)[1].best_loss
    assert all(torch.equal(value, before[name]) for name, value in embedding.state_dict().items())
    assert not torch.equal(flow.embedding[1].first.weight.float(), embedding.first.weight)
    flow.save(tmp_path / "flow")
    rows = torch.from_numpy(x[:5]), torch.from_numpy(context[:5])
    expected = flow.eval().log_prob(*rows)
    torch.testing.assert_close(load(tmp_path / "flow", classes=[Net]).log_prob(*rows), expected)
    labels = np.arange(len(x)) % 3
    labelled, _ = fit_table(x, "nsf", context=labels, flow_options={**options, "num_layers": 1}, epochs=1, seed=0)
    assert labelled.log_prob(rows[0], torch.tensor([0, 1, 2, 0, 1])).shape == (5,)


def test_an_embedding_of_a_table_without_a_context_is_refused():
    with pytest.raises(ValueError, match="expected a context for the embedding; got none for Net"):
        fit_table(table()[0], "maf", flow_options={"embedding": Net(3)}, epochs=1)
    with pytest.raises(ValueError, match=r"an embedding that returns \(rows, context_features\); got shape \(\)"):
        fit_table(*table()[:1], "maf", context=table()[1], flow_options={"embedding": Total()}, epochs=1)


class Total(nn.Module):
    def forward(self, x):
        return x.sum()


def test_an_embedding_within_a_tables_builder_is_refused():
    x, context = table(20)
    with pytest.raises(ValueError, match="a flow without an embedding; got one with a Net: pass it as embedding= of"):
        fit_table(x, partial(maf, embedding=Net(3, out_features=3)), context=context, epochs=1)


# Subclasses of this package's own classes


@pytest.mark.parametrize("name", LAYERS)
def test_a_subclass_of_a_layer_comes_back(name, tmp_path):
    layer = make(name, 3, 2)
    mine = layer.__class__ = type("Mine", (type(layer),), {})
    flow = Flow(StandardNormal(layer.latent_shape), layer).double().eval()
    flow.save(tmp_path / "flow")
    found = load(tmp_path / "flow", classes=[mine])
    context = contexts(flow, 4)
    x = flow.sample(() if flow.context_features else (4,), context)
    torch.testing.assert_close(found.log_prob(x, context), flow.log_prob(x, context))
    assert found.state_dict().keys() == flow.state_dict().keys()
    assert type(found.layers[0]) is mine


@pytest.mark.parametrize("name", PRIORS)
def test_a_subclass_of_a_prior_comes_back(name, tmp_path):
    prior = perturb(PRIORS[name](2), 0.1)
    mine = prior.__class__ = type("Mine", (type(prior),), {})
    flow = Flow(prior, Planar(2)).eval()
    flow.save(tmp_path / "flow")
    x = flow.sample((4,))
    torch.testing.assert_close(load(tmp_path / "flow", classes=[mine]).log_prob(x), flow.log_prob(x))
