"""Model files: equal flows come back, damaged and foreign files are refused by a sentence, and a kill spoils none."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import re
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from contract import (
    FLOWS,
    IMAGE_FLOWS,
    IMAGE_LAYERS,
    LAYERS,
    PRIORS,
    make,
    make_flow,
    make_image_flow,
    make_image_layer,
    perturb,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import pyroflows
from pyroflows import (
    MLP,
    ActNorm,
    AutoFlow,
    Bijection,
    Compose,
    Coupling,
    DiagonalNormal,
    Flow,
    GaussianMixture,
    MaskedAutoregressive,
    OneHot,
    Permutation,
    Planar,
    Posterior,
    Prior,
    Spline,
    Standardize,
    StandardNormal,
    TriangularAffine,
    fit,
    glow,
    load,
    maf,
    nsf,
    planar,
    realnvp,
)
from pyroflows.dequantizers import ColumnDequantizer, Dequantizer, UniformDequantizer, VariationalDequantizer
from pyroflows.files import FORMAT, _checksum, read, replacing
from pyroflows.recipe import Recorded

FILES = Path(__file__).parent / "files"
SMALL = {"num_layers": 2, "hidden_features": (8,)}


def conditions(flow, *batch):
    """A context for a batch, labels where the flow takes these."""
    if not flow.context_features:
        return None
    if isinstance(flow.embedding, OneHot):
        return torch.randint(flow.context_features, batch)
    return torch.randn(*batch, flow.context_features, dtype=flow.dtype)


def assert_equal(found, flow):
    """Two flows of equal numbers, that give equal numbers."""
    assert type(found) is Flow
    assert repr(found) == repr(flow)
    for of in (lambda f: f.state_dict(), lambda f: dict(f.named_buffers())):  # the latter with those that are not saved
        expected, got = of(flow), of(found)
        assert expected.keys() == got.keys()
        for name in expected:
            assert expected[name].dtype == got[name].dtype, name
            assert torch.equal(expected[name].cpu(), got[name].cpu()), name
    for (name, a), (_, b) in zip(flow.named_parameters(), found.named_parameters(), strict=True):
        assert a.requires_grad is b.requires_grad, name
    assert not any(part.training for part in found.modules())
    assert found.notes == flow.notes


def assert_comes_back(flow, folder, context=None, classes=()):
    """Through a file, and through that of what came back."""
    path = folder / "flow.safetensors"
    flow.eval()
    for source in (flow, None):
        (source or load(path, classes=classes)).save(path)
        found = load(path, classes=classes)
        assert_equal(found, flow)
    torch.manual_seed(3)
    x = flow.sample((4,), None if context is None else context[0])
    torch.manual_seed(3)
    again = found.sample((4,), None if context is None else context[0])
    # A matrix may lie in memory by rows where it lay by columns, which LAPACK shows in the last digit.
    error = 100 * torch.finfo(flow.dtype).eps
    assert torch.allclose(again, x, error, error)
    assert torch.allclose(found.log_prob(x, context), flow.log_prob(x, context), error, error)
    return found


# What comes back


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("context_features", [0, 2])
def test_a_named_flow_comes_back(name, context_features, tmp_path):
    flow = make_flow(name, 3, context_features)
    assert_comes_back(flow, tmp_path, conditions(flow, 4))


@pytest.mark.parametrize("name", IMAGE_FLOWS)
def test_a_named_flow_of_images_comes_back(name, tmp_path):
    flow = make_image_flow(name, (2, 4, 4), 3)
    assert_comes_back(flow, tmp_path, conditions(flow, 4))


def test_every_layer_comes_back(tmp_path):
    layers = [make(name, 3, 2) for name in LAYERS] + [make_image_layer(name, (2, 4, 4), 3) for name in IMAGE_LAYERS]
    for layer in layers:
        flow = Flow(StandardNormal(layer.latent_shape), layer).double().eval()
        flow.save(tmp_path / "flow")
        assert_equal(load(tmp_path / "flow"), flow)


@pytest.mark.parametrize("name", PRIORS)
def test_every_prior_comes_back(name, tmp_path):
    assert_comes_back(Flow(perturb(PRIORS[name](3), 0.1), Coupling(3, hidden_features=(4,))), tmp_path)


def test_arguments_that_are_tensors_arrays_and_modules_come_back(tmp_path):
    loc = torch.tensor([[0.0, 1.0, 2.0], [1.0, 2.0, 3.0]])
    prior = GaussianMixture(3, 2, covariance="full", loc=loc, scale_tril=torch.eye(3), weights=[1.0, 2.0])
    own = MLP(1, 4, hidden_features=(5,), activation="tanh")
    layers = [
        Coupling(np.int64(3), mask=torch.tensor([True, False, True]), conditioner=own),
        MaskedAutoregressive(3, order=np.array([2, 0, 1]), transformer=Spline(num_bins=4), hidden_features=[6]),
        Permutation(3, torch.tensor([1, 2, 0])),
        Compose(Planar(3) for _ in range(2)).inv,
        TriangularAffine(3, diagonal=True),
        Standardize(torch.tensor([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0], dtype="float32")),
    ]
    flow = Flow(prior, (layer for layer in layers))
    assert_comes_back(flow, tmp_path)


def test_parts_of_a_named_flow_in_a_flow_of_ones_own_come_back(tmp_path):
    x = 5 + 3 * torch.randn(200, 3)
    named = nsf(3, norm="batchnorm", **SMALL)
    flow = Flow(named.prior, [*named.layers, Standardize.from_data(x)])
    fit(flow, x, epochs=2, batch_size=50, progress=False, seed=0)
    found = assert_comes_back(flow, tmp_path)
    fit(found, x, epochs=1, batch_size=50, progress=False, seed=0)  # what came back trains


def test_a_layer_that_stands_twice_stands_twice_again(tmp_path):
    layer = Planar(2)
    found = assert_comes_back(Flow(StandardNormal(2), [layer, Permutation(2, "reverse"), layer]), tmp_path)
    assert found.layers[0] is found.layers[2]


@pytest.mark.parametrize(
    "embedding, context",
    [
        (OneHot(2), torch.tensor([1, 0, 1])),
        (MLP(5, 2, hidden_features=(4,)), torch.randn(3, 5)),
        (Standardize(torch.ones(2), torch.ones(2)).inv, torch.randn(3, 2)),
        (
            nn.Sequential(
                nn.Unflatten(1, (1, 12)),
                nn.Conv1d(1, 3, 5, stride=2, bias=False),
                nn.BatchNorm1d(3),
                nn.GELU(),
                nn.Flatten(),
                nn.LayerNorm(12, bias=False),
                nn.Dropout(0.1),
                nn.Linear(12, 2),
            ),
            torch.randn(3, 12),
        ),
        (
            nn.Sequential(nn.Embedding(4, 3), nn.Flatten(), nn.Linear(6, 2), nn.Softplus(beta=2.0)),
            torch.ones(3, 2).int(),
        ),
    ],
    ids=["labels", "mlp", "bijection", "convolutions", "words"],
)
def test_an_embedding_comes_back(embedding, context, tmp_path):
    flow = Flow(StandardNormal(2), Coupling(2, context_features=2, hidden_features=(4,)), embedding=embedding).eval()
    flow.save(tmp_path / "flow")
    found = load(tmp_path / "flow")
    assert_equal(found, flow)
    x = torch.randn(3, 2)
    assert torch.equal(found.log_prob(x, context), flow.log_prob(x, context))


@pytest.mark.parametrize(
    "dequantizer, x",
    [
        (UniformDequantizer((1, 4, 4), num_levels=17), torch.randint(17, (2, 1, 4, 4))),
        (VariationalDequantizer((1, 4, 4), 17, hidden_channels=3, num_layers=2), torch.randint(17, (2, 1, 4, 4))),
        (ColumnDequantizer([1.0] * 3 + [0.0], [0.5, 0.0, 0.0, 0.0]), torch.tensor([[0.5, 1.0, 2.0, 0.3]])),
    ],
)
def test_a_dequantizer_comes_back(dequantizer, x, tmp_path):
    options = {"num_levels": 1, "num_steps": 1, "hidden_channels": 3}
    if x.dim() == 4:
        flow = glow((1, 4, 4), dequantizer=dequantizer, **options)
    else:
        flow = Flow(StandardNormal(4), ActNorm(4), dequantizer=dequantizer)
    flow.eval().save(tmp_path / "flow")
    found = load(tmp_path / "flow")
    assert_equal(found, flow)
    scores = []
    for each in (flow, found):
        torch.manual_seed(0)
        scores.append(each.dequantized_log_prob(x))
    assert torch.equal(*scores)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_come_back_whatever_the_default(dtype, tmp_path):
    flow = realnvp(3, **SMALL).to(dtype)
    flow.save(tmp_path / "flow")
    torch.set_default_dtype(torch.float64)
    try:
        found = load(tmp_path / "flow")
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == dtype
    assert_equal(found, flow.eval())


def test_a_flow_without_any_number_keeps_its_dtype(tmp_path):
    flow = Flow(StandardNormal(2), Permutation(2, "reverse")).double()
    assert_comes_back(flow, tmp_path)


def test_it_is_loaded_onto_a_device(tmp_path):
    maf(3, **SMALL).save(tmp_path / "flow")
    assert load(tmp_path / "flow", device="meta").device.type == "meta"
    if torch.cuda.is_available():
        flow = maf(3, **SMALL).cuda()
        flow.save(tmp_path / "flow")
        found = load(tmp_path / "flow", "cuda")
        assert found.device.type == "cuda"
        assert_equal(found, flow.eval())


def test_frozen_parameters_stay_frozen(tmp_path):
    flow = maf(3, **SMALL)
    flow.layers[0].requires_grad_(False)
    assert_comes_back(flow, tmp_path)


def test_notes_come_back_and_stay(tmp_path):
    flow = planar(2, num_layers=1)
    assert flow.notes == {}
    notes = {"rows": 10, "columns": ["a", "ü"], "loss": 1.5, "none": None, "nested": {"yes": True}}
    flow.save(tmp_path / "flow", notes=notes)
    found = load(tmp_path / "flow")
    assert found.notes == notes
    found.save(tmp_path / "again")
    assert load(tmp_path / "again").notes == notes
    assert read(tmp_path / "again", "flow")[0]["notes"] == notes


@pytest.mark.parametrize("notes", [{"a": (1, 2)}, {1: "a"}, {"a": float("nan")}, {"a": torch.ones(2)}, {"a": {1, 2}}])
def test_notes_that_json_would_change_are_refused(notes, tmp_path):
    with pytest.raises(TypeError, match="expected notes of JSON values, .*; got"):
        planar(2).save(tmp_path / "flow", notes=notes)
    assert not list(tmp_path.iterdir())


def test_notes_and_classes_of_other_types_are_refused(tmp_path):
    with pytest.raises(TypeError, match="expected notes as a dict of JSON values; got str"):
        planar(2).save(tmp_path / "flow", notes="fitted on Monday")
    planar(2).save(tmp_path / "flow")
    with pytest.raises(TypeError, match="expected classes as a list of classes, and functions; got <class"):
        load(tmp_path / "flow", classes=Double)


def test_the_header_says_what_is_inside(tmp_path):
    maf(3, num_layers=2).save(tmp_path / "flow")
    header, tensors = read(tmp_path / "flow", "flow")
    assert header["format"] == FORMAT
    assert header["kind"] == "flow"
    assert header["dtype"] == "float32"
    assert header["versions"]["torch"] == torch.__version__
    assert header["recipe"]["make"] == "maf"
    assert header["recipe"]["with"]["num_layers"] == 2
    assert header["recipe"]["with"]["norm"] == "actnorm"  # a default, named too
    with safe_open(tmp_path / "flow", "pt") as file:  # by the public format alone
        assert len(json.loads(file.metadata()["pyroflows"])["sha256"]) == 64
        assert set(file.keys()) == set(tensors)


def test_copies_and_pickles_are_saved_alike(tmp_path):
    flow = Flow(StandardNormal(3), maf(3, **SMALL).layers)
    flow.save(tmp_path / "flow")
    for number, other in enumerate((copy.deepcopy(flow), pickle.loads(pickle.dumps(flow)))):
        other.save(tmp_path / f"{number}")
        assert (tmp_path / f"{number}").read_bytes() == (tmp_path / "flow").read_bytes()
    assert not [name for name in flow.state_dict() if "argument" in name]


def test_random_numbers_are_left_alone(tmp_path):
    torch.manual_seed(0)
    flow = maf(3, order="random", permutation="shuffle", **SMALL)
    state = torch.get_rng_state()
    flow.save(tmp_path / "flow")
    load(tmp_path / "flow")
    assert torch.equal(torch.get_rng_state(), state)


# Parts of the user's own


class Double(Bijection):
    def __init__(self, features, factor=2.0):
        super().__init__(features)
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward_and_log_det(self, x, context=None):
        return self.factor * x, (self.factor.log() * x.shape[-1]).expand(x.shape[:-1])

    def inverse_and_log_det(self, y, context=None):
        return y / self.factor, -(self.factor.log() * y.shape[-1]).expand(y.shape[:-1])


class Times(Bijection):
    def __init__(self, features, factor=2.0):
        super().__init__(features)
        self.factor, self.calls = factor, 0

    def forward_and_log_det(self, x, context=None):
        return self.factor * x, x.new_full(x.shape[:-1], x.shape[-1] * math.log(self.factor))

    def inverse_and_log_det(self, y, context=None):
        return y / self.factor, y.new_full(y.shape[:-1], -y.shape[-1] * math.log(self.factor))


class Around(Bijection):
    def __init__(self, inside):
        super().__init__(inside.latent_shape)
        self.other_name = inside

    def forward_and_log_det(self, x, context=None):
        return self.other_name.forward_and_log_det(x, context)

    def inverse_and_log_det(self, y, context=None):
        return self.other_name.inverse_and_log_det(y, context)


def test_a_class_of_ones_own_is_loaded_when_it_is_given(tmp_path):
    flow = Flow(StandardNormal(2), [Coupling(2, hidden_features=(4,)), Double(2, factor=3.0)])
    assert_comes_back(flow, tmp_path, classes=[Double])
    with pytest.raises(ValueError, match=r"classes=\[Double\], since the file names test_files.Double, .*; got none"):
        load(tmp_path / "flow.safetensors")


class Within(nn.Module):
    """A conditioner with an attribute of any kind."""

    def __init__(self, attribute, out_features=2):
        super().__init__()
        self.linear, self.attribute = nn.Linear(1, out_features), attribute

    def forward(self, x, context=None):
        return self.linear(x)


@pytest.mark.parametrize(
    "conditioner, message",
    [
        (
            lambda: Within(lambda x: x),
            r"attributes that a file can hold, .*; got the function <lambda> as Flow.layers\[0\].conditioner.at",
        ),
        (lambda: Within({"a": [torch.Generator()]}), r"got a Generator as .*.conditioner.attribute\['a'\]\[0\]"),
        (lambda: Within([nn.Linear(1, 2)]), "expected registered modules and parameters; got a Linear as .*ModuleList"),
        (lambda: Within([nn.Parameter(torch.ones(2))]), r"got a Parameter as .*.conditioner.attribute\[0\], which"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(1, 2)), "got a hook or a parametrization of the mod"),
        (
            lambda: MLP(1, 2, linear=lambda a, b: nn.Linear(a, b)),
            "expected the argument 'linear' of MLP to be plain, or to be in the attribute of that name; got another as",
        ),
    ],
)
def test_a_part_that_no_file_can_hold_is_refused_by_its_place(conditioner, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Flow(StandardNormal(2), Coupling(2, conditioner=conditioner())).save(tmp_path / "flow")
    assert not list(tmp_path.iterdir())


def test_a_flow_changed_by_hand_is_refused_and_one_made_of_its_parts_saved(tmp_path):
    flow = maf(3, **SMALL)
    flow.bijection.layers.append(ActNorm(3))
    with pytest.raises(ValueError, match="modified after construction; got a change in bijection.layers"):
        flow.save(tmp_path / "flow")
    assert_comes_back(Flow(flow.prior, flow.layers), tmp_path)


def test_attributes_of_a_layer_of_ones_own_come_back_as_they_are(tmp_path):
    layer = Times(2, factor=3.0)
    layer.calls += 1
    layer.factor = 4.0
    flow = Flow(StandardNormal(2), [layer, Around(Planar(2))])
    found = assert_comes_back(flow, tmp_path, classes=[Times, Around])
    assert (found.layers[0].factor, found.layers[0].calls) == (4.0, 1)


def test_what_layers_are_made_with_is_remembered_without_modules_and_is_not_what_was_passed():
    mask = torch.tensor([True, False])
    layer = Coupling(2, mask=mask, conditioner=MLP(1, 2))
    mask[:] = False
    _, args, options = layer._arguments
    assert args == (2,)
    assert torch.equal(options["mask"], torch.tensor([True, False]))
    assert options["conditioner"] is ...
    assert all(issubclass(kind, Recorded) for kind in (Bijection, Prior, Dequantizer, Flow, MLP))


# Refusals


def stamp(path, header, tensors):
    save_file(tensors, path, {"pyroflows": json.dumps({**header, "sha256": _checksum(header, tensors)})})


def forge(path, flow, change):
    """Write a file as if by save, checksum included, whose header was changed."""
    flow.save(path)
    header, tensors = read(path, "flow")
    stamp(path, change(header) or header, tensors)


class Network(Recorded, torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 2)

    def forward(self, x, context=None):
        return self.linear(x)


def test_a_network_of_ones_own_comes_back(tmp_path):
    flow = Flow(StandardNormal(2), Coupling(2, conditioner=Network()))
    flow.save(tmp_path / "flow")
    assert torch.equal(load(tmp_path / "flow", classes=[Network]).log_prob(torch.ones(2)), flow.log_prob(torch.ones(2)))


def refused(path, message="expected a flow written by save; got", **options):
    with pytest.raises(ValueError, match=message) as error:
        load(path, **options)
    assert type(error.value) is ValueError
    assert "\n" not in str(error.value)


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none")
    with pytest.raises(ValueError, match="expected the path of a file in a folder that exists; got"):
        maf(2).save(tmp_path / "none" / "flow")
    with pytest.raises(ValueError, match="expected the path of a file"):
        maf(2).save(tmp_path)


class Harmful:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code was run')",))


def test_foreign_files_are_refused_and_run_nothing(tmp_path):
    flow, path = maf(3, **SMALL), tmp_path / "file"
    contents = {
        "empty": b"",
        "text": b"this is no flow\n" * 30,
        "pickle": pickle.dumps(flow),
        "harm": pickle.dumps(Harmful()),
        "length": (2**62).to_bytes(8, "little") + b"{}",
        "zeros": bytes(1000),
    }
    for whole in (flow, flow.state_dict(), Harmful()):
        file = io.BytesIO()
        torch.save(whole, file)
        contents[str(len(contents))] = file.getvalue()
    for content in contents.values():
        path.write_bytes(content)
        refused(path, "which is not a valid safetensors file")
    save_file({"a": torch.ones(2)}, path)
    refused(path, "which is not a file of pyroflows")
    save_file({"a": torch.ones(2)}, path, {"pyroflows": "[" * 100_000})
    refused(path, "which is not a file of pyroflows")
    refused(tmp_path, "which is a folder")


def test_a_file_of_another_kind_is_said_to_be_that(tmp_path):
    flow, path = maf(2, num_layers=1), tmp_path / "file"
    flow.save(path)
    whole, file, array = path.read_bytes(), io.BytesIO(), io.BytesIO()
    torch.save(flow.state_dict(), file)
    np.save(array, np.ones(3))
    for content, kind in (
        (b"", "it is empty"),
        (b"a,b\n1,2\n" * 100, "it is a text, such as a table"),
        ("höhe;breite\r\n1;2\r\n".encode(), "it is a text, such as a table"),
        (pickle.dumps(flow), "it is a pickle, which could run code"),
        (file.getvalue(), "it is a zip archive, as torch.save or NumPy writes it"),
        (array.getvalue(), "it is a NumPy array"),
        (whole[:-5], "it is cut short"),
        (whole[:200], "it is cut short"),
    ):
        path.write_bytes(content)
        refused(path, f"expected a flow written by save; got .*, which is not a valid safetensors file: {kind}")
    for other in (3, None, flow):
        with pytest.raises(TypeError, match="expected the path of a file; got (int|NoneType|Flow)"):
            load(other)
    with pytest.raises(FileNotFoundError, match="expected a flow written by save; got .*none, which does not exist"):
        load(tmp_path / "none")


def test_a_file_of_another_class_says_what_it_holds_and_who_reads_it(tmp_path):
    path = tmp_path / "file"
    maf(2, num_layers=1).save(path)
    message = r"expected a posterior written by save; got .*, which holds a flow \(maf\): read it by pyroflows.load"
    with pytest.raises(ValueError, match=message):
        Posterior.load(path, line, X, 0.5 + X)
    guided(num_layers=2, hidden_features=(4,)).save(path)
    refused(path, r"which holds a posterior \(Flow\): read it by pyroflows.Posterior.load")


def test_a_posterior_of_another_model_says_whose_latents_the_file_holds(tmp_path):
    path = tmp_path / "posterior"
    guided(num_layers=2, hidden_features=(4,)).save(path)

    def other(x, y):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)

    message = r"expected the model of the posterior in .*posterior, with the latents b \(2,\); got scale \(\)"
    with pytest.raises(ValueError, match=message):
        Posterior.load(path, other, X, 0.5 + X)
    with pytest.raises(TypeError, match="expected a Pyro model, a callable; got int"):
        Posterior.load(path, 3, X, 0.5 + X)


def test_files_of_format_4_load(tmp_path):
    x = torch.tensor([[0.5, -1.0], [2.0, 0.3]], dtype=torch.float64)
    context = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 0.5]], dtype=torch.float64)
    flow = load(FILES / "maf_of_format_4.safetensors")
    expected = torch.tensor([-2.462877062943072, -3.882877056094793], dtype=torch.float64)
    torch.testing.assert_close(flow.log_prob(x), expected)
    flow = load(FILES / "flow_of_format_4.safetensors", classes=[Double])
    expected = torch.tensor([-4.37957070275599, -4.416322203570932], dtype=torch.float64)
    torch.testing.assert_close(flow.log_prob(x, context), expected)
    assert flow.notes == {"rows": 10}
    flow.save(tmp_path / "again")
    found = load(tmp_path / "again", classes=[Double])
    torch.testing.assert_close(found.log_prob(x, context), expected)


def test_an_older_realnvp_of_images_keeps_its_wider_bounds():
    flow = load(FILES / "image_realnvp_of_wide_bounds.safetensors")
    x = torch.arange(1, 17, dtype=torch.float64).view(1, 4, 4) / 20
    assert flow.log_prob(x).item() == pytest.approx(-41.65451083622459)


def test_a_newer_format_is_refused_by_its_number(tmp_path):
    forge(tmp_path / "flow", planar(2), lambda header: {**header, "format": 99, "recipe": "a new one"})
    refused(
        tmp_path / "flow", f"written by a newer version, in format 99: pyroflows .* reads format {FORMAT}; update pyro"
    )


@pytest.mark.parametrize("version", [2, 3])
def test_an_older_format_is_refused_by_its_number(tmp_path, version):
    forge(tmp_path / "flow", planar(2), lambda header: {**header, "format": version})
    message = f"written by an older version, in format {version}: pyroflows .* reads format {FORMAT}; save it again"
    refused(tmp_path / "flow", message)


def test_a_posterior_of_format_1_is_refused(tmp_path):
    save_file({"u": torch.zeros(2)}, tmp_path / "old", {"posterior": json.dumps({"format": 1, "flow": "realnvp"})})
    with pytest.raises(ValueError, match="written by an older version, in format 1: "):
        Posterior.load(tmp_path / "old", line, X, 0.5 + X)


@pytest.mark.parametrize(
    "make, message",
    [
        ("os.system", "expected builders and classes of pyroflows and torch.nn; got 'os.system'"),
        ("nn.modules", "expected builders and classes of pyroflows and torch.nn; got 'nn.modules'"),
        ("fit", "got 'fit'"),
        ("__import__", "got '__import__'"),
        (["maf"], "got \"\\['maf'\\]\""),
        ("own.Layer", r"expected classes=\[Layer\], since the file names Layer, of the user's own; got none"),
        ("nn.Linear", "cannot be followed: .*unexpected keyword"),
        ("iaf", "expected .* as .*, by the recipe; got"),
        ("Planar", "cannot be followed"),
        ("radial", "expected .* as .*, by the recipe; got"),
    ],
)
def test_what_is_not_to_be_made_is_refused_by_name(make, message, tmp_path):
    def change(header):
        header["recipe"]["make"] = make

    forge(tmp_path / "flow", planar(2, num_layers=1), change)
    refused(tmp_path / "flow", message)


def layer_by_attributes(**parts):
    names = ("attributes", "parameters", "buffers", "unsaved", "modules")
    return {"make": "torch.nn.modules.linear.Linear", **{name: parts.get(name, {}) for name in names}}


@pytest.mark.parametrize(
    "node, message",
    [
        ({"make": "maf", "attributes": {}}, "expected the attributes of an object of a class of torch; got 'maf'"),
        (
            {"make": "Planar", "attributes": {}},
            "expected the attributes of an object of a class of torch; got 'Planar'",
        ),
        ({"make": "subprocess.Popen", "attributes": {"args": "ls"}}, "got 'subprocess.Popen'"),
        ({"make": "torch.nn.modules.module.functools.partial", "attributes": {}}, "got 'torch.nn.modules.module.func"),
        ({"make": "torch.distributions.constraints.Any", "attributes": {}}, "got 'torch.distributions.constraints.Any"),
        (
            {"make": "own.Net", "from": "a.Net", "attributes": {}},
            r"expected classes=\[Net\], since the file names a.Net",
        ),
        ({"name": "own.Net", "from": "a.Net"}, r"expected classes=\[Net\], since the file names a.Net"),
        ({"name": "os.system"}, "expected names of pyroflows and torch; got 'os.system'"),
        ({"name": "torch.load"}, "expected names of pyroflows and torch; got 'torch.load'"),
        ({"name": "torch.from_file"}, "expected names of pyroflows and torch; got 'torch.from_file'"),
        ({"name": "nn.functional.torch"}, "expected names of pyroflows and torch; got 'nn.functional.torch'"),
        ({"name": "maf"}, "cannot be followed"),
        ({"dtype": "load"}, "cannot be followed"),
        ({"device": "nonsense"}, "cannot be followed"),
        ({"dict": [[1, 2], [3]]}, "cannot be followed"),
        ({"set": [{"list": []}]}, "cannot be followed"),
        ({"array": "none"}, "cannot be followed"),
        (layer_by_attributes(parameters={"weight": [[10**12], "float32"]}), "more memory than its tensors account for"),
        (layer_by_attributes(buffers={"weight": [[10**6, 10**6], "int8"]}), "more memory than its tensors account for"),
        (layer_by_attributes(parameters={"weight": "a"}), "cannot be followed"),
        (layer_by_attributes(modules={"a": 3}), "cannot be followed|expected"),
        (layer_by_attributes(unsaved={"a": {"tensor": "none"}}), "cannot be followed"),
        (layer_by_attributes(attributes={"forward": 3}), "cannot be followed|expected"),
    ],
)
def test_nothing_else_is_made_by_attributes_or_named(node, message, tmp_path):
    def change(header):
        header["recipe"]["with"]["prior"] = node

    forge(tmp_path / "flow", planar(2, num_layers=1), change)
    refused(tmp_path / "flow", message)


@pytest.mark.parametrize("ties", [[["a", "b"]], [["bijection.layers.0.u", "none"]], 3, [[1, 2]]])
def test_ties_that_make_no_sense_are_refused(ties, tmp_path):
    forge(
        tmp_path / "flow",
        planar(2, num_layers=1),
        lambda header: {**header, "recipe": {**header["recipe"], "ties": ties}},
    )
    refused(tmp_path / "flow", "cannot be followed")


GIANTS = [
    (planar, {"features": 10**12}),
    (planar, {"features": 3}),
    (planar, {"num_layers": 10**9}),
    (maf, {"features": 10**7}),
    (maf, {"features": 10**15}),
    (maf, {"hidden_features": [10**9]}),
    pytest.param(maf, {"hidden_features": [1] * 10**4}, marks=pytest.mark.slow),
    (nsf, {"num_bins": 10**11}),
    (glow, {"features": [10**6, 10**6, 10**6]}),
    (glow, {"features": [1, 2**40, 2**40]}),
    (glow, {"num_levels": 10**12}),
    pytest.param(glow, {"num_steps": 10**9}, marks=pytest.mark.slow),
    (glow, {"num_classes": 10**8}),
]


@pytest.mark.parametrize("builder, sizes", GIANTS)
def test_giant_sizes_in_a_whole_file_take_no_memory(builder, sizes, tmp_path):
    def change(header):
        header["recipe"]["with"].update(sizes)

    options = {"num_levels": 1, "num_steps": 1, "hidden_channels": 2} if builder is glow else {"num_layers": 1}
    forge(tmp_path / "flow", builder((1, 4, 4) if builder is glow else 2, **options), change)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(tmp_path / "flow", "expected")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kB


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.pop("recipe") and None,
        lambda header: header.pop("frozen") and None,
        lambda header: header.update(dtype="int64"),
        lambda header: header.update(dtype=["float32"]),
        lambda header: header.update(notes=[1]),
        lambda header: header.update(frozen=["nothing"]),
        lambda header: header.update(frozen=[1]),
        lambda header: header.update(kind="posterior"),
        lambda header: header.update(recipe=None),
        lambda header: header.update(recipe={"tensor": "state.none"}),
        lambda header: header.update(recipe={"same": 3}),
        lambda header: header["recipe"].pop("with") and None,
        lambda header: header["recipe"]["with"].update(prior={"make": "StandardNormal", "with": {"features": -1}}),
        lambda header: header["recipe"]["with"].update(prior=json.loads('{"with":' * 500 + "1" + "}" * 500)),
    ],
)
def test_a_whole_file_with_a_header_that_makes_no_sense_is_refused(change, tmp_path):
    def changed(header):
        change(header)

    forge(tmp_path / "flow", planar(2, num_layers=1), changed)
    refused(tmp_path / "flow", "expected")


def test_other_tensors_than_the_recipes_are_refused(tmp_path):
    planar(2, num_layers=1).save(tmp_path / "flow")
    header, tensors = read(tmp_path / "flow", "flow")
    name = next(name for name in tensors if name.endswith("u"))
    for changed in ({**tensors, name: tensors[name][:1]}, {**tensors, "state.more": torch.ones(2)}):
        stamp(tmp_path / "flow", header, changed)
        refused(tmp_path / "flow", "expected .* by the recipe; got")
    del tensors[name]
    stamp(tmp_path / "flow", header, tensors)
    refused(tmp_path / "flow", r"expected a floating-point tensor of shape \(2,\) as .*, by the recipe; got none")


# Posteriors


def line(x, y=None):
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(b[..., 0:1] + b[..., 1:2] * x, 0.5), obs=y)


X = torch.linspace(-1, 2, 20)


def guided(builder=realnvp, **options):
    torch.manual_seed(0)
    return Posterior(AutoFlow(line, builder, "none", args=(X, 0.5 + X), **options))


def test_a_posterior_is_no_flow_and_a_damaged_one_is_refused(tmp_path):
    path = tmp_path / "posterior"
    guided(prior=DiagonalNormal(2), num_layers=2, hidden_features=(4,)).save(path)
    refused(path, "expected a flow written by save; got .*, which holds a posterior")
    assert isinstance(Posterior.load(path, line, X, 0.5 + X).guide.flow.prior, DiagonalNormal)
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="expected a posterior written by save; got .*, which is damaged"):
        Posterior.load(path, line, X, 0.5 + X)
    tensors = load_file(path)
    save_file(tensors, path, {"pyroflows": "{}"})
    with pytest.raises(ValueError, match="which is not a file of pyroflows"):
        Posterior.load(path, line, X, 0.5 + X)


# Damage


def corrupt(whole, other, rng):
    """Give a file that was damaged in one of ten ways."""
    data, size = bytearray(whole), len(whole)
    begin, end = sorted(rng.integers(0, size, 2).tolist())
    end = min(end, begin + 64) if rng.random() < 0.5 else end
    header = 8 + int.from_bytes(whole[:8], "little")
    match rng.integers(10):
        case 0:
            data[rng.integers(size)] ^= 1 << int(rng.integers(8))
        case 1:
            for place in rng.integers(0, size, rng.integers(2, 20)):
                data[place] = rng.integers(256)
        case 2:
            del data[begin:]
        case 3:
            del data[begin:end]
        case 4:
            data[begin:end] = bytes(end - begin)
        case 5:
            data[begin:end] = other[begin:end]
        case 6:
            data = data[:header] + other[8 + int.from_bytes(other[:8], "little") :]
        case 7:
            data += rng.bytes(int(rng.integers(1, 100)))
        case 8:  # the length of the header
            data[:8] = int(rng.choice([0, 1, header, header - 9, 2**31, 2**63, int(rng.integers(size))])).to_bytes(
                8, "little"
            )
        case 9:  # a number or a name in the header
            text = whole[8:header]
            swaps = [
                (b"F32", b"F64"),
                (b"I64", b"F64"),
                (b"BOOL", b"U8"),
                (b"state", b"other"),
                (b"flow", b"posterior"),
            ]
            swaps += [(b'"', b"'"), (b"[2", b"[9999999999"), (b"1", b"7"), (b"},", b"}},"), (b"format", b"FORMAT")]
            swaps += [(b"planar", b"realnvp"), (b"2", b"-2"), (b"0", b"1e9"), (b"data_offsets", b"dat\xc3_offsets")]
            old, new = swaps[rng.integers(len(swaps))]
            text = text.replace(old, new, int(rng.integers(1, 4)))
            data = len(text).to_bytes(8, "little") + text + whole[header:]
    return bytes(data)


def refusal(path):
    """Give the flow of a file, or the sentence that refuses it."""
    try:
        return load(path)
    except ValueError as error:
        return str(error) if type(error) is ValueError else repr(error)


def check_corrupted(number, folder):
    """Load so many damaged files, seeded; give how many were refused."""
    flows = [planar(2, num_layers=1), Flow(StandardNormal(2), [ActNorm(2), Standardize(torch.ones(2), torch.ones(2))])]
    flows.append(realnvp(2, num_layers=1, hidden_features=(3,)))
    wholes = []
    for flow in flows:
        flow.save(folder / "flow", notes={"rows": 1000})
        wholes.append((folder / "flow").read_bytes())
    rng, refusals = np.random.default_rng(0), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(number):
        chosen = int(rng.integers(len(flows)))
        (folder / "flow").write_bytes(corrupt(wholes[chosen], wholes[chosen - 1], rng))
        found = refusal(folder / "flow")
        if isinstance(found, Flow):
            state = found.state_dict()
            assert any(
                state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in other)
                for other in (flows[index].state_dict() for index in (chosen, chosen - 1))
            )
        else:
            assert re.fullmatch("expected a flow written by save; got [^\n]+", found)
            refusals += 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    return refusals


def test_corrupted_files_are_refused_or_load_whole(tmp_path):
    assert check_corrupted(300, tmp_path) > 250


@pytest.mark.slow
def test_ten_thousand_corrupted_files_are_refused_or_load_whole(tmp_path):
    refusals = check_corrupted(10_000, tmp_path)
    print(f"{refusals} of 10000 refused, the others equal")
    assert refusals > 9_000


# Kills

KILLED = """
    import json, os, random, signal, sys, time, torch
    from pyroflows import load, realnvp
    torch.set_num_threads(1)
    path, kills, flows = sys.argv[1], int(sys.argv[2]), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        flows.append(realnvp(4, num_layers=2, hidden_features=(512, 512)))
    folder = os.path.dirname(path)
    flows[0].save(path)
    random.seed(0)
    found = []
    for number in range(kills):
        child = os.fork()
        if not child:
            while True:
                for flow in flows[::-1]:
                    flow.save(path)
        time.sleep(random.uniform(0.05, 0.25))
        deadline = time.monotonic() + 10
        while number % 2 and len(os.listdir(folder)) == 1 and time.monotonic() < deadline:
            pass  # every second kill falls into a write
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        state = load(path).state_dict()
        same = [all(torch.equal(value, state[name]) for name, value in flow.state_dict().items()) for flow in flows]
        left = [name for name in os.listdir(folder) if name.endswith(".tmp")]
        for name in left:
            os.unlink(os.path.join(folder, name))
        found.append([same.index(True), len(left)])
    print(json.dumps(found))
"""


def killed(path, kills):
    """Kill a process that saves two flows in turn, so many times; give which the file held, and what was left."""
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(KILLED), str(path), str(kills)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_kill_leaves_a_whole_file(tmp_path):
    found = killed(tmp_path / "flow", 4)
    assert len(found) == 4
    assert any(left for _, left in found)  # a kill in the middle of a write


@pytest.mark.slow
def test_twenty_kills_leave_a_whole_file(tmp_path):
    found = killed(tmp_path / "flow", 20)
    inside = sum(left > 0 for _, left in found)
    print(
        f"20 kills, {inside} within a write: every file whole, {sum(held for held, _ in found)} times the second flow"
    )
    assert inside >= 5


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "flow"
    flow = planar(2)
    flow.save(path)
    whole = path.read_bytes()
    with pytest.raises(RuntimeError, match="in the middle"), replacing(path) as file:  # noqa: PT012
        file.write(b"half")
        raise RuntimeError("in the middle")
    assert path.read_bytes() == whole
    assert [entry.name for entry in tmp_path.iterdir()] == ["flow"]


def test_a_link_is_followed_and_a_device_left_alone(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "flow")
    flow = planar(2)
    flow.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_equal(load(tmp_path / "flow"), flow.eval())
    with pytest.raises(ValueError, match="expected the path of a file in a folder that exists; got /dev/null"):
        flow.save("/dev/null")


# Exports


def assert_exports(flow):
    context = conditions(flow, 2)
    program = flow.export(flow.sample((2,), None if context is None else context[0]), context)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    module = torch.export.load(file).module()
    for rows in (1, 2, 7):
        context = conditions(flow, rows)
        x = flow.sample((rows,), None if context is None else context[0])
        inputs = (x,) if context is None else (x, context)
        assert torch.allclose(module(*inputs), flow.log_prob(*inputs), atol=1e-12)


def test_an_exported_density_scores_alike_at_any_number_of_rows():
    assert_exports(make_flow("realnvp, nothing between", 3, 2))
    assert_exports(make_image_flow("glow, one level", (1, 4, 4), 3))


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("context_features", [0, 2])
def test_every_named_flow_exports(name, context_features):
    assert_exports(make_flow(name, 3, context_features))


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGE_FLOWS)
def test_every_named_flow_of_images_exports(name):
    assert_exports(make_image_flow(name, (2, 4, 4), 3))


def test_an_export_by_one_row_is_refused():
    with pytest.raises(ValueError, match=r"expected at least two rows to export by; got shape \(1, 3\)"):
        maf(3, **SMALL).export(torch.zeros(1, 3))


def test_load_is_public():
    assert pyroflows.load is load
    assert "load" in pyroflows.__all__


def test_a_flow_is_saved_after_a_compiler_left_its_functions_in_our_modules(tmp_path, monkeypatch):
    def left():
        pass

    left.__module__ = None
    monkeypatch.setattr("pyroflows.flow.__compiled_fn_1", left, raising=False)
    realnvp(2, num_layers=1).save(tmp_path / "flow")
    assert load(tmp_path / "flow").event_shape == (2,)
