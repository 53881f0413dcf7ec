"""A fit that was interrupted, killed or had ended goes on from its checkpoint, and refuses that of another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from fits import Stream, affine, failing, fit, gaussian, same, small
from torch.utils.data import DataLoader, TensorDataset

from pyroflows import Permutation, realnvp
from pyroflows.training.checkpoint import Checkpoint

OPTIONS = {"epochs": 6, "batch_size": 32, "learning_rate": 1e-2, "seed": 0, "device": "cpu"}
CASES = {
    "plain": {},
    "averaged": {"ema_decay": 0.9, "optimizer": "adamax", "activation_checkpointing": True},
    "parts": {"accumulate": 3, "steps_per_epoch": 4, "ema_decay": 0.99},
    "unseeded": {"seed": None, "validation": 0.2},
    "mixed": {"precision": "bf16-mixed", "validation": None},
}


def resumable(norm="batchnorm"):
    torch.manual_seed(1)
    return realnvp(2, num_layers=2, hidden_features=(8,), dropout=0.1, norm=norm)


class Interrupted:
    """The likelihood, until a step of training at which something happens."""

    __qualname__ = "likelihood"

    def __init__(self, at=None, happens=None):
        self.left, self.happens = at, happens

    def __call__(self, flow, x, context):
        if torch.is_grad_enabled() and self.left is not None:
            self.left -= 1
            if self.left == 0:
                self.happens()
        return -flow.log_prob(x, context).mean()


def interrupt():
    raise KeyboardInterrupt


def same_results(first, second):
    for name, values in first.history.items():
        if name != "seconds":
            assert values == second.history[name], name
    for name in ("best_epoch", "best_loss", "stopped", "steps", "skipped_steps"):
        assert getattr(first, name) == getattr(second, name), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("at, norm", [(2, "batchnorm"), (13, "batchnorm"), (14, "actnorm")])
def test_an_interrupted_fit_goes_on_to_the_same_numbers(tmp_path, case, at, norm):
    options = {**OPTIONS, **CASES[case]}
    undisturbed = resumable(norm)
    wanted = fit(undisturbed, gaussian(), objective=Interrupted(), **options)
    path, flow = tmp_path / "fit.pt", resumable(norm)
    with pytest.raises(KeyboardInterrupt):
        fit(flow, gaussian(), objective=Interrupted(at, interrupt), checkpoint=path, **options)
    fresh = resumable(norm)
    if case == "unseeded" and at > 2:
        torch.randn(7)  # as whatever happened since
    found = fit(fresh, gaussian(), objective=Interrupted(), checkpoint=path, **options)
    same_results(wanted, found)
    assert same(undisturbed, fresh)
    assert [p.name for p in tmp_path.iterdir()] == ["fit.pt"]
    again = resumable(norm)
    returned = fit(again, gaussian(), objective=Interrupted(1, interrupt), checkpoint=path, **options)
    same_results(wanted, returned)
    assert returned.seconds == found.seconds
    assert same(undisturbed, again)
    assert not again.training


SCRIPT = """
import os, signal, sys, torch
sys.path.insert(0, {folder!r})
torch.set_num_threads(1)
from test_checkpoint import Interrupted, OPTIONS, fit, gaussian, resumable
objective = Interrupted({at}, lambda: os.kill(os.getpid(), signal.SIGKILL))
fit(resumable(), gaussian(), objective=objective, checkpoint={path!r}, **OPTIONS)
"""


def test_a_killed_fit_goes_on_to_the_same_numbers(tmp_path):
    path = tmp_path / "fit.pt"
    undisturbed, flow = resumable(), resumable()
    wanted = fit(undisturbed, gaussian(), objective=Interrupted(), **OPTIONS)
    script = SCRIPT.format(folder=os.path.dirname(__file__), path=str(path), at=13)
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    path.with_name("fit.pt.tmp").write_bytes(b"half a checkpoint")
    found = fit(flow, gaussian(), objective=Interrupted(), checkpoint=path, **OPTIONS)
    same_results(wanted, found)
    assert same(undisturbed, flow)
    assert len(found.history["seconds"]) == 6
    assert found.history["seconds"] == sorted(found.history["seconds"])


def test_what_a_killed_process_left_is_removed_and_no_other_file(tmp_path):
    names = ["fit.123.tmp", "fit.pt.123.tmp", "fit.notes.tmp"]
    for name in names:
        (tmp_path / name).touch()
    assert Checkpoint(tmp_path / "fit").load() is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fit.notes.tmp", "fit.pt.123.tmp"]


def test_a_finished_fit_goes_on_for_more_epochs(tmp_path):
    options = {**OPTIONS, "schedule": "constant", "warmup": 0.0}
    path, flow, whole = tmp_path / "fit.pt", resumable(), resumable()
    fit(flow, gaussian(), checkpoint=str(path), **{**options, "epochs": 3})
    result = fit(flow, gaussian(), checkpoint=str(path), **options)
    same_results(fit(whole, gaussian(), **options), result)
    assert same(flow, whole)
    fewer = fit(resumable(), gaussian(), checkpoint=path, **{**options, "epochs": 2})
    assert len(fewer.history["train"]) == 6


def test_seconds_count_over_resumes(tmp_path):
    path = tmp_path / "fit.pt"
    options = {**OPTIONS, "epochs": 10_000, "patience": None}
    first = fit(resumable(), gaussian(), checkpoint=path, max_seconds=0.3, checkpoint_seconds=100.0, **options)
    assert first.stopped == "max_seconds=0.3 reached"
    again = fit(resumable(), gaussian(), checkpoint=path, max_seconds=0.3, **options)
    assert (again.seconds, again.steps) == (first.seconds, first.steps)
    more = fit(resumable(), gaussian(), checkpoint=path, max_seconds=0.6, **options)
    assert more.steps > first.steps
    assert 0.6 <= more.seconds < 3
    assert more.history["seconds"][: len(first.history["seconds"])] == first.history["seconds"]


def test_a_checkpoint_is_written_now_and_then_and_at_the_end(tmp_path, monkeypatch):
    written = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: written.append(b) or replace(a, b))
    fit(resumable(), gaussian(), checkpoint=tmp_path / "each", **OPTIONS)
    assert len(written) == 6
    fit(resumable(), gaussian(), checkpoint=tmp_path / "end", checkpoint_seconds=100, **OPTIONS)
    assert written[6:] == [tmp_path / "end"]


def test_a_checkpoint_of_draws_and_of_a_stream(tmp_path):
    def objective(flow, x, context):
        return flow.rsample_and_log_prob((8,))[1].mean() + flow.prior.log_prob(torch.zeros(2))

    options = {"epochs": 4, "steps_per_epoch": 5, "objective": objective, "seed": 0}
    path, flow, whole = tmp_path / "draws", resumable(), resumable()
    wanted = fit(whole, **options)
    fit(flow, checkpoint=path, **{**options, "epochs": 2, "schedule": "cosine"})
    assert fit(flow, checkpoint=path, **options).steps == wanted.steps == 20

    def stream(at=None):
        options = {**OPTIONS, "batch_size": None, "objective": Interrupted(at, interrupt), "checkpoint": tmp_path / "s"}
        return fit(whole, DataLoader(Stream(), batch_size=None), **options)

    wanted = stream()
    (tmp_path / "s").unlink()
    with pytest.raises(KeyboardInterrupt):
        stream(25)
    assert stream().history["learning_rate"] == wanted.history["learning_rate"]


def test_a_shuffled_data_loader_goes_on_to_the_same_numbers(tmp_path):
    options = {**OPTIONS, "batch_size": None, "validation": gaussian(30, seed=1)}
    loader = DataLoader(TensorDataset(gaussian()), batch_size=40, shuffle=True)
    whole, flow = resumable(), resumable()
    wanted = fit(whole, loader, objective=Interrupted(), **options)
    with pytest.raises(KeyboardInterrupt):
        fit(flow, loader, objective=Interrupted(13, interrupt), checkpoint=tmp_path / "fit.pt", **options)
    same_results(wanted, fit(flow, loader, objective=Interrupted(), checkpoint=tmp_path / "fit.pt", **options))
    assert same(whole, flow)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 64}, "of a fit with batch_size=64; got 32"),
        ({"learning_rate": 0.1}, "of a fit with learning_rate=0.1; got 0.01"),
        ({"optimizer": "adamax"}, "of a fit with optimizer='adamax'; got 'adam'"),
        ({"ema_decay": 0.9}, "of a fit with ema_decay=0.9; got 0.0"),
        ({"accumulate": 2}, "of a fit with accumulate=2; got 1"),
        ({"schedule": "constant"}, "of a fit with schedule='constant'; got 'cosine'"),
        ({"seed": 1}, "of a fit with seed=1; got 0"),
        ({"validation": 0.3}, "of a fit with steps_per_epoch=4; got 5"),
        ({"augment": abs}, "of a fit with augment='abs'; got None"),
        ({"max_grad_norm": None}, "of a fit with max_grad_norm=None; got 5.0"),
    ],
)
def test_a_checkpoint_of_another_fit_is_refused(tmp_path, options, message):
    path = tmp_path / "fit.pt"
    fit(resumable(), gaussian(), checkpoint=path, **{**OPTIONS, "epochs": 1})
    flow = resumable()
    with pytest.raises(ValueError, match=f"expected the checkpoint {message} in .*fit.pt"):
        fit(flow, gaussian(), checkpoint=path, **{**OPTIONS, **options})
    assert same(flow, resumable())


def test_a_checkpoint_of_another_flow_or_other_data_is_refused(tmp_path):
    path = tmp_path / "fit.pt"
    fit(resumable(), gaussian(), checkpoint=path, **{**OPTIONS, "epochs": 1})
    for flow in (small(), realnvp(2, num_layers=2, hidden_features=(8,), dropout=0.2, norm="batchnorm"), affine()):
        with pytest.raises(ValueError, match="the checkpoint of a fit of this flow; got that of another in .*fit.pt"):
            fit(flow, gaussian(), checkpoint=path, **OPTIONS)
    with pytest.raises(ValueError, match="the checkpoint of a fit of this data; got that of another in .*fit.pt"):
        fit(resumable(), gaussian(seed=1), checkpoint=path, **OPTIONS)


def test_a_fit_with_weights_resumes_and_only_with_the_same(tmp_path):
    path, weights, (whole, flow) = tmp_path / "fit.pt", torch.rand(200), (resumable(), resumable())

    def objective(at=None):
        likelihood = Interrupted(at, interrupt)

        def weighted(flow, x, context, weights):
            return likelihood(flow, x, context) * weights.mean()

        return weighted

    expected = fit(whole, gaussian(), weights=weights, objective=objective(), **OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        fit(flow, gaussian(), weights=weights, objective=objective(13), checkpoint=path, **OPTIONS)
    for other in (None, torch.ones(200)):
        with pytest.raises(ValueError, match="the checkpoint of a fit of this data; got that of another"):
            fit(resumable(), gaussian(), weights=other, objective=objective(), checkpoint=path, **OPTIONS)
    result = fit(flow, gaussian(), weights=weights, objective=objective(), checkpoint=path, **OPTIONS)
    same_results(expected, result)
    assert same(whole, flow)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "fit.pt"
    fit(resumable(), gaussian(), checkpoint=path, **{**OPTIONS, "epochs": 1})
    whole = path.read_bytes()
    contents = [whole[:size] for size in (0, 1, 100, len(whole) // 2, len(whole) - 1)]
    contents += [b"a text\n" * 100, os.urandom(1000)]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(
            ValueError,
            match="got .*fit.pt, which is not one of this version, or truncated",
        ):
            fit(resumable(), gaussian(), checkpoint=path, **OPTIONS)
    for other in (resumable().state_dict(), [1, 2], {"format": "another"}, torch.zeros(3)):
        torch.save(other, path)
        with pytest.raises(
            ValueError,
            match="got .*fit.pt, which is not one of this version, or truncated",
        ):
            fit(resumable(), gaussian(), checkpoint=path, **OPTIONS)


def test_a_fit_that_blew_up_is_resumed_blown_up(tmp_path):
    path, flow = tmp_path / "fit.pt", resumable()
    options = {"objective": failing(lambda n: n > 12), "max_skipped": 3, "checkpoint": path, **OPTIONS}
    result = fit(flow, gaussian(), **options)
    assert result.stopped == "loss or gradient not finite in 3 steps in a row"
    again = resumable()
    same_results(result, fit(again, gaussian(), **options))
    assert same(flow, again)


def test_a_random_order_is_that_of_the_checkpoint(tmp_path):
    def fitted(seed, epochs):
        torch.manual_seed(seed)
        flow = realnvp(4, num_layers=2, hidden_features=(8,), permutation="shuffle")
        fit(flow, gaussian(features=4), checkpoint=tmp_path / "fit.pt", **{**OPTIONS, "epochs": epochs})
        return flow

    first = fitted(0, 2)
    orders = [layer.order for layer in first.layers if isinstance(layer, Permutation)]
    second = fitted(1, 3)
    found = [layer.order for layer in second.layers if isinstance(layer, Permutation)]
    assert all(map(torch.equal, orders, found))
