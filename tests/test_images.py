"""Looking at flows of images: samples, reconstructions, walks between images, and grids whose pixels are the levels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from pyroflows import ElementwiseAffine, Flow, StandardNormal, StudentT, Uniform, fit, glow, plots, realnvp
from pyroflows.dequantizers import UniformDequantizer
from pyroflows.images import interpolate, reconstruct, sample_images
from pyroflows.layers import Permutation, Sigmoid

SHAPE, LEVELS = (1, 8, 8), 17


def _dequantizer(shape=SHAPE, levels=LEVELS):
    return UniformDequantizer(shape, levels)


def _images(num, shape=SHAPE, levels=LEVELS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(levels, (num, *shape), generator=generator, dtype=torch.uint8)


def _modes(flow):
    return [module.training for module in flow.modules()]


def _state(flow):
    return {name: value.clone() for name, value in flow.state_dict().items()}


def _assert_unchanged(flow, before):
    for name, value in flow.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.fixture(scope="module")
def flow():
    """A flow after some steps on images whose left half is dark and right half bright."""
    images = _images(256) // 4
    images[..., 4:] += 12
    torch.manual_seed(0)
    flow = glow(SHAPE, num_levels=2, num_steps=2, hidden_channels=8, alpha=0.01, dequantizer=_dequantizer())
    fit(flow, images, epochs=15, batch_size=64, learning_rate=1e-2, seed=0, progress=False, device="cpu")
    return flow


@pytest.fixture(scope="module")
def labelled():
    """A flow after some steps on images that are dark in class 0 and bright in class 1."""
    labels = torch.arange(256) % 2
    images = _images(256) // 4 + (12 * labels[:, None, None, None]).to(torch.uint8)
    torch.manual_seed(0)
    flow = glow(SHAPE, num_levels=1, num_steps=2, hidden_channels=8, num_classes=2, dequantizer=_dequantizer())
    fit(
        flow,
        images,
        context=labels,
        epochs=40,
        batch_size=64,
        learning_rate=1e-2,
        seed=0,
        progress=False,
        device="cpu",
    )
    return flow


@pytest.mark.parametrize("num, batch_size", [(1, 64), (5, 2), (6, 3), (4, 1)])
def test_samples_are_levels_of_the_number_asked_for(flow, num, batch_size):
    drawn = sample_images(flow, num, batch_size=batch_size)
    assert drawn.shape == (num, *SHAPE)
    assert drawn.dtype == torch.uint8
    assert int(drawn.max()) < LEVELS
    assert len(drawn.unique(dim=0)) == num
    assert not drawn.requires_grad


def test_samples_are_those_of_the_flow(flow):
    drawn = sample_images(flow, 64, seed=0).float()
    assert float(drawn[..., 4:].mean() - drawn[..., :4].mean()) > 8


def test_a_batch_holds_no_more_than_it_should(flow, monkeypatch):
    sizes = []
    sample = Flow.sample

    def spy(self, shape=(), context=None, **options):
        sizes.append(shape)
        return sample(self, shape, context, **options)

    monkeypatch.setattr(Flow, "sample", spy)
    sample_images(flow, 7, batch_size=3)
    assert sizes == [(3,), (3,), (1,)]


def test_a_seed_repeats_the_samples_and_leaves_the_random_state(flow):
    before = torch.get_rng_state()
    first = sample_images(flow, 4, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(sample_images(flow, 4, seed=1), first)
    assert not torch.equal(sample_images(flow, 4, seed=2), first)
    unseeded = sample_images(flow, 4)
    assert not torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(sample_images(flow, 4), unseeded)


def test_a_temperature_narrows_the_samples_to_one_image(flow):
    spreads = [
        float(sample_images(flow, 64, temperature=temperature, seed=0).float().std(0).mean())
        for temperature in (0.0, 0.5, 1.0)
    ]
    assert spreads[0] == 0
    assert spreads[0] < spreads[1] < spreads[2]
    centre = flow.dequantizer.quantize(flow.decode(torch.zeros(1, 64)))
    assert torch.equal(sample_images(flow, 2, temperature=0.0), centre.expand(2, *SHAPE))


def test_samples_of_each_label(labelled):
    drawn = sample_images(labelled, 40, labels=torch.tensor([1, 0, 1]), batch_size=16, seed=0)
    assert drawn.shape == (3, 40, *SHAPE)
    bright, dark, again = (float(part.float().mean()) for part in drawn)
    assert min(bright, again) - dark > 6
    assert not torch.equal(drawn[0], drawn[2])


def test_samples_of_contexts_that_are_vectors():
    flow = glow(SHAPE, num_levels=1, num_steps=1, hidden_channels=4, context_features=3, dequantizer=_dequantizer())
    assert sample_images(flow, 2, labels=torch.randn(4, 3)).shape == (4, 2, *SHAPE)


def test_samples_of_a_flow_in_double_precision():
    flow = realnvp(
        SHAPE, num_levels=1, num_blocks=1, hidden_channels=4, dequantizer=UniformDequantizer(SHAPE, 300)
    ).double()
    drawn = sample_images(flow, 3, temperature=0.7)
    assert drawn.dtype == torch.int64
    assert drawn.shape == (3, *SHAPE)


def _mixed_modes(flow):
    flow.train()
    flow.bijection.eval()
    return flow


LOOKS = {
    "sample": lambda flow: sample_images(flow, 4, seed=0),
    "reconstruct": lambda flow: reconstruct(flow, _images(4)),
    "interpolate": lambda flow: interpolate(flow, _images(2), _images(2, seed=1), 3),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize("mode", [Flow.train, Flow.eval, _mixed_modes], ids=["train", "eval", "mixed"])
def test_every_module_is_left_in_its_mode_and_as_it_was(look, mode):
    # In train mode the first batch would set the parameters of the ActNorms, and dropout would change images.
    flow = mode(
        realnvp(SHAPE, num_blocks=1, hidden_channels=4, norm="actnorm", dropout=0.5, dequantizer=_dequantizer())
    )
    modes, before = _modes(flow), _state(flow)
    look(flow)
    assert _modes(flow) == modes
    _assert_unchanged(flow, before)


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_the_mode_is_restored_after_an_error(look, monkeypatch):
    flow = glow(SHAPE, num_levels=1, num_steps=1, hidden_channels=4, dequantizer=_dequantizer()).train()

    def fails(*_):
        assert not flow.training
        raise RuntimeError("on the way")

    monkeypatch.setattr(flow.dequantizer, "quantize", fails)
    with pytest.raises(RuntimeError, match="on the way"):
        look(flow)
    assert all(_modes(flow))


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_flow_without_a_dequantizer_is_refused(look):
    with pytest.raises(ValueError, match="expected a flow with a dequantizer, which knows the levels of the pixels"):
        look(glow(SHAPE, num_levels=1, num_steps=1, hidden_channels=4))


@pytest.mark.parametrize(
    "options, said",
    [
        ({"num": 0}, "expected num to be a positive integer; got 0"),
        ({"num": 2.0}, "expected num to be a positive integer; got 2.0"),
        ({"batch_size": 0}, "expected batch_size to be a positive integer; got 0"),
        ({"temperature": -0.1}, "expected temperature"),
        ({"labels": torch.tensor(1)}, "expected labels as a tensor, at least one; got the shape ()"),
        ({"labels": torch.tensor([], dtype=torch.int64)}, "at least one; got the shape (0,)"),
        ({"labels": [0, 1]}, "expected labels as a tensor, at least one; got list"),
        ({"labels": torch.tensor([2])}, "expected class labels from 0 to 1; got 2"),
        ({"labels": None}, "expected a context for the embedding; got none"),
    ],
)
def test_bad_options_of_sampling_are_one_sentence(labelled, options, said):
    with pytest.raises(ValueError) as caught:
        sample_images(labelled, **({"num": 2, "labels": torch.tensor([0])} | options))
    assert said in str(caught.value)


def test_a_prior_without_a_centre_takes_no_temperature():
    flow = Flow(Uniform(4), Permutation(4, "reverse"), dequantizer=_dequantizer(4))
    assert sample_images(flow, 3).shape == (3, 4)
    with pytest.raises(ValueError, match="expected temperature=1 for a Uniform"):
        sample_images(flow, 3, temperature=0.5)


def test_a_failed_draw_leaves_the_random_state(labelled):
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="expected class labels"):
        sample_images(labelled, 2, labels=torch.tensor([0, 5]), seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_sent_to_the_latent_comes_back(flow, labelled):
    images = _images(6)
    assert torch.equal(reconstruct(flow, images), images)
    assert torch.equal(reconstruct(labelled, images, torch.arange(6) % 2), images)
    deep = glow((3, 8, 8), num_levels=2, num_steps=3, hidden_channels=8, dequantizer=_dequantizer((3, 8, 8), 256))
    colours = _images(3, (3, 8, 8), 256)
    back = reconstruct(deep, colours)
    assert back.dtype == torch.uint8
    assert torch.equal(back, colours)


def test_another_class_gives_another_image_back(labelled):
    images = _images(4)
    y, _ = labelled.dequantizer(images)
    zeros, ones = torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.int64)
    turned = labelled.dequantizer.quantize(labelled.decode(labelled.encode(y, zeros), ones))
    assert not torch.equal(turned, reconstruct(labelled, images, ones))


@pytest.mark.parametrize("num", [2, 3, 8])
def test_a_walk_starts_and_ends_at_its_images(flow, num):
    start, end = _images(5), _images(5, seed=1)
    walk = interpolate(flow, start, end, num)
    assert walk.shape == (5, num, *SHAPE)
    assert walk.dtype == torch.uint8
    assert torch.equal(walk[:, 0], start)
    assert torch.equal(walk[:, -1], end)


def test_a_walk_is_straight_in_the_latent():
    # With a logit alone the latent's middle is that of the logits of both.
    flow = Flow(StudentT(4), Sigmoid(4, 0.01), dequantizer=_dequantizer(4, 256))
    walk = interpolate(flow, torch.zeros(1, 4, dtype=torch.uint8), torch.full((1, 4), 255), num=5)
    low, high = torch.special.logit(torch.tensor([0.01 + 0.98 * 0.5 / 256, 0.01 + 0.98 * 255.5 / 256]).double())
    share = torch.linspace(0, 1, 5, dtype=torch.float64)
    expected = (torch.sigmoid(low + share * (high - low)) - 0.01) / 0.98 * 256 - 0.5
    # The noise moves the ends by up to a level each.
    assert (walk[0].double() - expected[:, None]).abs().max() < 10
    assert (walk[0].double().diff(dim=0) > 0).all()


def test_a_walk_takes_a_context_for_each_pair(labelled):
    start, end, classes = _images(3), _images(3, seed=1), torch.tensor([0, 1, 1])
    walk = interpolate(labelled, start, end, 4, context=classes)
    assert walk.shape == (3, 4, *SHAPE)
    assert torch.equal(walk[:, 0], start)
    assert torch.equal(walk[:, -1], end)


@pytest.mark.parametrize("num", [1, 0, -3])
def test_a_walk_has_both_ends(flow, num):
    with pytest.raises(ValueError, match=f"expected num to be an integer of at least 2; got {num}"):
        interpolate(flow, _images(1), _images(1), num)


def test_a_walk_has_as_many_ends_as_starts(flow):
    with pytest.raises(ValueError, match=r"expected start and end of one shape; got \(2, 1, 8, 8\) and \(3, 1, 8, 8\)"):
        interpolate(flow, _images(2), _images(3))


@pytest.mark.parametrize("look", [reconstruct, lambda flow, images: interpolate(flow, images, images)])
def test_images_that_are_not_the_flows_are_refused(flow, look):
    with pytest.raises(TypeError, match="expected levels as integers from 0 to 16; got torch.float32"):
        look(flow, _images(2).float())
    with pytest.raises(ValueError, match=r"expected data of shape \(\*batch, 1, 8, 8\); got \(2, 3, 8, 8\)"):
        look(flow, _images(2, (3, 8, 8)))
    with pytest.raises(ValueError, match="expected levels from 0 to 16; got 200"):
        look(flow, torch.full((2, *SHAPE), 200, dtype=torch.uint8))


def _saved(images, tmp_path, **options):
    plots.save_image_grid(images, tmp_path / "grid.png", **options)
    with Image.open(tmp_path / "grid.png") as file:
        assert file.format == "PNG"
        return np.asarray(file)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_pixels_of_a_saved_grid_are_the_levels(tmp_path, channels):
    images = _images(5, (channels, 6, 4), 256)
    images[0].flatten()[:2] = torch.tensor([0, 255], dtype=torch.uint8)
    pixels = _saved(images, tmp_path, columns=3)
    assert pixels.shape == (2 * (6 + 1) + 1, 3 * (4 + 1) + 1, 3)
    for number, image in enumerate(images.expand(5, 3, 6, 4)):
        row, column = divmod(number, 3)
        top, left = 1 + 7 * row, 1 + 5 * column
        assert np.array_equal(pixels[top : top + 6, left : left + 4], image.permute(1, 2, 0).numpy())
    assert (pixels[0] == 128).all()  # what is between the images is grey


@pytest.mark.parametrize("levels", [2, 17, 32])
def test_the_highest_of_few_levels_is_white(tmp_path, levels):
    pixels = _saved(torch.arange(levels).reshape(1, 1, 1, levels), tmp_path, num_levels=levels)
    expected = np.floor(np.arange(levels) * 255 / (levels - 1) + 0.5)
    assert np.array_equal(pixels[0, :, 0], expected)


def test_a_grid_may_be_enlarged(tmp_path):
    images = _images(4, (3, 4, 4), 256)
    small, large = _saved(images, tmp_path, columns=2), _saved(images, tmp_path, columns=2, enlarge=3)
    assert np.array_equal(large, small.repeat(3, 0).repeat(3, 1))


def test_a_grid_is_drawn_on_the_axes_it_is_given(tmp_path):
    ax = Figure().subplots()
    images = _images(6, (1, 4, 4), 256)
    assert plots.image_grid(images, ax, columns=4, title="Noise") is ax
    assert ax.get_title() == "Noise"
    assert not len(ax.get_xticks())
    assert not len(ax.get_yticks())
    drawn = np.asarray(ax.images[0].get_array())
    assert np.array_equal((drawn * 255 + 0.5).astype(np.uint8), _saved(images, tmp_path, columns=4))


@pytest.mark.parametrize("draw", [plots.image_grid, lambda images, **options: plots.save_image_grid(images, "no.png")])
@pytest.mark.parametrize("shape", [(0, 1, 4, 4), (2, 2, 4, 4), (1, 4, 4), (2, 4, 4, 3)])
def test_a_grid_is_of_images(draw, shape):
    with pytest.raises(ValueError, match="expected images of shape"):
        draw(torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize("option", ["columns", "num_levels", "enlarge"])
def test_the_numbers_of_a_grid_are_positive(tmp_path, option):
    with pytest.raises(ValueError, match=f"expected {option}"):
        plots.save_image_grid(_images(2), tmp_path / "grid.png", **{option: 0})
    assert not (tmp_path / "grid.png").exists()


def test_labels_and_numbers_of_another_kind_are_refused(flow):
    labelled = glow(SHAPE, num_levels=1, num_steps=1, hidden_channels=4, num_classes=3, dequantizer=_dequantizer())
    assert sample_images(labelled, 2, labels=torch.arange(3)).shape == (3, 2, *SHAPE)
    with pytest.raises(ValueError, match=r"expected labels of one class, .* each; got the shape \(3, 1\)"):
        sample_images(labelled, 2, labels=torch.arange(3)[:, None])
    with pytest.raises(ValueError, match=r"expected num to be an integer of at least 2; got 2.5"):
        interpolate(flow, _images(1), _images(1), 2.5)


def test_interpolations_of_a_flow_whose_latent_is_an_image():
    flow = Flow(StandardNormal((1, 2, 2)), ElementwiseAffine((1, 2, 2)), dequantizer=UniformDequantizer((1, 2, 2), 4))
    images = torch.randint(4, (3, 1, 2, 2), dtype=torch.uint8)
    walk = interpolate(flow, images, images.flip(0), num=5)
    assert walk.shape == (3, 5, 1, 2, 2)
    assert torch.equal(walk[:, 0], images)
    assert torch.equal(walk[:, -1], images.flip(0))
