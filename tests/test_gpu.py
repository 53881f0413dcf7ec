"""On a GPU: the numbers of the CPU, from every layer, flow and prior, in fits, posteriors and files."""

from __future__ import annotations

import copy
import math
import pickle

import contract
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyroflows import AutoFlow, FlowDensity, fit, fit_amortized, fit_posterior, glow, load, maf, nsf, realnvp
from pyroflows.training import FitOptions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a machine with a GPU")

SHAPE = (2, 4, 4)
LAYERS = {
    **{name: lambda name=name: contract.make(name, 5) for name in contract.LAYERS},
    **{f"image {name}": lambda name=name: contract.make_image_layer(name, SHAPE) for name in contract.IMAGE_LAYERS},
}
FLOWS = {
    **{name: lambda name=name: contract.make_flow(name, 5) for name in contract.FLOWS},
    **{f"image {name}": lambda name=name: contract.make_image_flow(name, SHAPE) for name in contract.IMAGE_FLOWS},
}


def assert_same(on_gpu, on_cpu, tolerance=1e-9):
    assert on_gpu.device.type == "cuda"
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=tolerance, atol=tolerance)


def gradients(module):
    return {name: p.grad.cpu() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("direction", ["forward_and_log_det", "inverse_and_log_det"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_gives_the_numbers_of_the_cpu(name, direction):
    layer = LAYERS[name]()
    points = contract.latents if direction.startswith("forward") else contract.data
    x, context = points(layer, 6).requires_grad_(), contract.contexts(layer, 6)
    twin = copy.deepcopy(layer).cuda()
    there = x.detach().cuda().requires_grad_()
    results = getattr(layer, direction)(x, context), getattr(twin, direction)(there, context and context.cuda())
    for on_cpu, on_gpu in zip(*results, strict=True):
        assert_same(on_gpu, on_cpu)
    for y, log_det in results:
        (y.square().sum() + log_det.sum()).backward()
    assert_same(there.grad, x.grad, 1e-7)
    torch.testing.assert_close(gradients(twin), gradients(layer), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_gives_the_numbers_of_the_cpu(name):
    flow = FLOWS[name]()
    x = flow.sample((6,))
    log_prob = flow.log_prob(x)
    twin = copy.deepcopy(flow).cuda()
    assert_same(twin.log_prob(x.cuda()), log_prob, 1e-8)
    assert_same(twin.decode(twin.encode(x.cuda())), x, 1e-6)
    drawn = twin.sample((6,))
    assert_same(twin.log_prob(drawn), flow.log_prob(drawn.cpu()), 1e-6)
    back = twin.cpu()
    torch.testing.assert_close(back.log_prob(x), log_prob)


@pytest.mark.parametrize("name", contract.PRIORS)
def test_a_prior_gives_the_numbers_of_the_cpu(name):
    prior = contract.PRIORS[name](3).double()
    x = prior.sample((5,))
    twin = copy.deepcopy(prior).cuda()
    assert_same(twin.log_prob(x.cuda()), prior.log_prob(x))
    assert twin.sample((5,)).device.type == "cuda"


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_is_built_on_the_default_device(name):
    build = contract.FLOWS.get(name)
    with torch.device("cuda"):
        flow = build(5, 0) if build else contract.IMAGE_FLOWS[name.removeprefix("image ")](SHAPE, 0)
        assert {tensor.device.type for tensor in (*flow.parameters(), *flow.buffers())} == {"cuda"}
        x = flow.eval().sample((4,)).clone()
        assert x.device.type == "cuda"
        assert flow.log_prob(x).isfinite().all()


# A score or a draw that waits for the GPU leaves it idle. What inverts by iteration asks when it has converged.
ITERATE = {"maf", "maf, shuffle, batchnorm, mixture", "nsf, autoregressive", "iaf", "iaf, diagonal normal", "planar"}


@pytest.mark.parametrize("operation", ["train", "log_prob", "sample"])
@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_does_not_wait_for_the_gpu(name, operation):
    if name in ITERATE and (operation == "sample") == (name not in ("iaf", "iaf, diagonal normal")):
        pytest.skip("inverts by iteration")
    flow = FLOWS[name]().float().cuda()
    x = flow.sample((8,)).clone()
    optimizer = torch.optim.Adam(flow.train(operation == "train").parameters(), fused=True)

    def run():
        if operation == "train":
            optimizer.zero_grad()
            (-flow.log_prob(x).mean()).backward()
            optimizer.step()
        elif operation == "log_prob":
            flow.log_prob(x)
        else:
            flow.sample((8,))

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def banana(rows, dtype=torch.float32):
    z = torch.randn(rows, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.stack([z[:, 0], z[:, 1] + z[:, 0] ** 2], 1).to(dtype)


def fit_on_gpu(flow, x, **settings):
    """A fit by its defaults, which moves the flow to the GPU and back."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = fit(flow, x, seed=0, **settings)
    assert torch.cuda.max_memory_allocated() > before
    assert flow.device.type == "cpu"
    return result


@pytest.mark.parametrize(
    "options",
    [{}, {"precision": "bf16-mixed"}, {"ema_decay": 0.9}, {"activation_checkpointing": True}, {"compile": True}],
    ids=lambda o: next(iter(o), "plain"),
)
@pytest.mark.parametrize("build", [maf, nsf, realnvp])
def test_a_fit_learns_a_density_and_its_file_opens_on_a_cpu(build, options, tmp_path):
    x, fresh = banana(4000), banana(8000)[4000:]
    flow = build(2, num_layers=3, hidden_features=(32,))
    result = fit_on_gpu(flow, x, epochs=15, learning_rate=3e-3, options=FitOptions(**options))
    assert math.isfinite(result.best_loss)
    truth = -(math.log(2 * math.pi) + 1)
    assert truth - 0.25 < flow.log_prob(fresh).mean() < truth + 0.05
    flow.save(tmp_path / "flow.safetensors")
    opened = load(tmp_path / "flow.safetensors", "cpu")
    torch.testing.assert_close(opened.log_prob(fresh), flow.log_prob(fresh))


def test_a_fit_resumes_from_its_checkpoint(tmp_path):
    x = banana(512)
    settings = {"learning_rate": 3e-3, "seed": 0, "checkpoint": tmp_path / "fit"}
    flows = []
    for _ in range(2):
        torch.manual_seed(0)
        flows.append(realnvp(2, num_layers=2, hidden_features=(16,)))
    whole = fit(flows[0], x, epochs=6, learning_rate=3e-3, seed=0)
    fit(flows[1], x, epochs=6, max_seconds=0.2, **settings)
    resumed = fit(flows[1], x, epochs=6, **settings)
    assert resumed.best_loss == pytest.approx(whole.best_loss, abs=2e-3)


def test_images_are_fitted():
    torch.manual_seed(0)
    x = torch.rand(64, 1, 8, 8)
    flow = glow((1, 8, 8), num_levels=2, num_steps=2, hidden_channels=8)
    result = fit_on_gpu(flow, x, epochs=3, batch_size=16)
    assert math.isfinite(result.best_loss)


@pytest.mark.parametrize("conditional", [None, "number"])
def test_an_estimator_scores_and_pickles(conditional):
    x = banana(600).numpy()
    estimator = FlowDensity("nsf", conditional=conditional, device="cuda", epochs=8, random_state=0)
    arguments = (x[:, :1], x[:, 1]) if conditional else (x,)
    estimator.fit(*arguments)
    scores = estimator.score_samples(*arguments)
    twin = pickle.loads(pickle.dumps(estimator))
    np.testing.assert_allclose(twin.score_samples(*arguments), scores, rtol=1e-4, atol=1e-4)
    assert np.isfinite(scores).all()


def test_a_posterior_is_fitted_where_the_data_are():
    y, sigma = torch.tensor([[28.0, 8, -3, 7, -1, 1, 18, 12], [15, 10, 16, 11, 9, 11, 10, 18]], device="cuda")

    def model(y=None):
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
        with pyro.plate("schools", 8):
            theta = pyro.sample("theta", dist.Normal(y.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal(mu + tau * theta, sigma), obs=y)

    posterior = fit_posterior(model, y, seed=0, max_steps=1500)
    assert posterior.draws(100)["theta"].device.type == "cuda"
    assert len(posterior.summary()) == 10
    assert float(posterior.log_evidence) == pytest.approx(-31.28, abs=0.1)
    posterior.to_arviz()


def test_a_posterior_of_a_density_is_fitted_and_refined_where_its_start_is():
    start = {"x": torch.zeros(3, device="cuda")}
    posterior = fit_posterior(log_density=lambda x: -x.square().sum(-1) / 2, start=start, seed=0, progress=False)
    refined = posterior.refine(num_chains=64, num_draws=20, seed=0)
    for each in (posterior, refined):
        assert each.verdict == "trust"
        assert each.draws(10)["x"].device.type == "cuda"
        assert each.log_evidence == pytest.approx(1.5 * math.log(2 * math.pi), abs=0.05)


def test_a_guide_trains_by_svi_with_a_default_device():
    with torch.device("cuda"):
        y = torch.tensor([1.0, 2.0, 1.5])

        def model():
            mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("n", 3):
                pyro.sample("y", dist.Normal(mu, 0.5), obs=y)

        guide = AutoFlow(model)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(num_particles=16, vectorize_particles=True))
        losses = [svi.step() for _ in range(200)]
        assert np.mean(losses[-20:]) == pytest.approx(4.00, abs=0.05)


def test_an_amortized_posterior_is_fitted():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 3):
            pyro.sample("y", dist.Normal(mu, 0.5))

    posterior = fit_amortized(model, "y", num_simulations=4000, seed=0, epochs=15, device="cuda")
    draws = posterior.draws(4000, torch.tensor([1.0, 2.0, 1.5]))["mu"]
    assert float(draws.mean()) == pytest.approx(18 / 13, abs=0.05)
    assert float(draws.std()) == pytest.approx(13**-0.5, abs=0.03)
