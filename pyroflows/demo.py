"""The demo: flows beside simpler models of a table, of two moons and of a posterior; figures and a short report."""

from __future__ import annotations

import contextlib
import json
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal
from pyro.optim import ClippedAdam
from torch import Tensor

from pyroflows import plots
from pyroflows._version import __version__
from pyroflows.data import Table, TwoMoons, load_table
from pyroflows.flow import Flow
from pyroflows.inference import fit_posterior
from pyroflows.models import glow, nsf, realnvp
from pyroflows.priors import GaussianMixture, StudentT
from pyroflows.training import FitResult, fit

__all__ = ["PARTS", "Model", "Part", "run"]

# What is left of two minutes is for imports, scores and figures.
_FIT_SECONDS = 100.0


@dataclass(frozen=True)
class Model:
    """A fitted density: what gives log-densities of rows and draws rows, and how it came about.

    Args:
        name: in tables and figures.
        log_prob: gives the log-density of rows, in nats.
        sample: draws a number of rows.
        note: what validation chose, or what the flow is.
        seconds: of the fit, the choice included.
        result: of a flow's fit.
    """

    name: str
    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[int], Tensor]
    note: str
    seconds: float
    result: FitResult | None = None


@dataclass(frozen=True)
class Part:
    """What one part of the demo found.

    Args:
        title: its heading in the report.
        text: what was done, a paragraph.
        columns: of its table.
        rows: of its table, words and formatted numbers.
        numbers: the same and more, for ``report.json``.
        figures: file names of its figures, with a line about each.
    """

    title: str
    text: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Mapping[str, Any]
    figures: Mapping[str, str]


def run(output: str | Path, *, seed: int = 0, quick: bool = False) -> dict[str, Any]:
    """Run every part, print as it goes, and write figures, ``report.md`` and ``report.json``.

    Args:
        output: the folder to write to; made where it is missing.
        seed: of splits, data and fits.
        quick: a few seconds in all, to see that it runs; the numbers mean little.

    Returns:
        What ``report.json`` holds.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    began = time.perf_counter()
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    _say(f"pyroflows {__version__} demo: figures and a report in {output}, in at most two minutes")
    parts: dict[str, Part] = {}
    for name, part in PARTS.items():
        _say(f"\n{name}")
        # Each part's fits end by then, however busy the machine is; what one leaves of its time the next may use.
        parts[name] = part(output, seed, quick, began + _FIT_SECONDS * (len(parts) + 1) / len(PARTS))
        _say("")
        _say(_as_text(parts[name]))
    report = {
        "pyroflows": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "seed": seed,
        "quick": quick,
        "seconds": round(time.perf_counter() - began, 1),
        "parts": {name: part.numbers for name, part in parts.items()},
    }
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (output / "report.md").write_text(_as_markdown(parts.values(), report), encoding="utf-8")
    figures = [figure for part in parts.values() for figure in part.figures]
    _say(f"\nwritten in {report['seconds']:.0f} s:")
    for name in ("report.md", "report.json", *figures):
        _say(f"  {output / name}")
    return report


def moons(output: Path, seed: int, quick: bool, until: float) -> Part:
    """Two moons, where the true density is known: the distance of each model from it."""
    truth = TwoMoons(noise=0.05)
    train, validation = truth.sample(2000 if quick else 20_000, seed=seed), truth.sample(1000, seed=seed + 1)
    test = truth.sample(10_000, seed=seed + 2)
    with _one_thread(seed):
        # One Gaussian has to be torn in two, and leaves a thread between the moons; of two each takes one.
        two = GaussianMixture(2, 2, loc=torch.tensor([[0.0, 1.5], [0.0, -1.5]]))
        flows = {
            "Glow, mixture prior": glow(2, num_steps=8, hidden_features=(64, 64), prior=two),
            "neural spline flow": nsf(2, num_layers=4, hidden_features=(64, 64), residual=False),
        }
        models = _simple_models(train, validation, components=(4,) if quick else (8, 16, 24), ridges=(1e-6,))
        options = {"learning_rate": 5e-3, "warmup": 0.1}
        options |= {"epochs": 10, "batch_size": 256} if quick else {"epochs": 75, "batch_size": 1024}
        models += _fit_flows(flows, "", train, validation, seed, until, options)
        true_log_prob = truth.log_prob(test)
        scores = {model.name: _log_likelihoods(model, test) for model in models}
        shown = [model for model in models if model.name != "Gaussian"]
        samples = {model.name: model.sample(2000) for model in shown}

    numbers: dict[str, Any] = {
        "entropy": -_mean_and_error(true_log_prob)[0],
        "rows": {"train": len(train), "validation": len(validation), "test": len(test)},
        "models": {},
    }
    rows = []
    for model in models:
        (mean, error), (kl, kl_error) = map(_mean_and_error, (scores[model.name], true_log_prob - scores[model.name]))
        rows.append((model.name, f"{mean:.3f}", f"{kl:.3f} ± {kl_error:.3f}", f"{model.seconds:.0f}", model.note))
        numbers["models"][model.name] = _as_numbers(model, mean, error) | {"kl": kl, "kl_standard_error": kl_error}

    limits, highest = (-1.6, 2.6, -1.15, 1.65), float(truth.log_prob(truth.sample(2000, seed=0)).max().exp())
    figure = Figure(figsize=(3.1 * (len(shown) + 1), 5.2), layout="constrained")
    axes = figure.subplots(2, len(shown) + 1, sharex=True, sharey=True)
    pictures: list[tuple[str, Callable[[Tensor], Tensor], Tensor]] = [("the truth", truth.log_prob, test[:2000])]
    for model in shown:
        title = f"{model.name}\nKL {numbers['models'][model.name]['kl']:.3f} nats"
        pictures.append((title, model.log_prob, samples[model.name]))
    for (above, below), (title, log_prob, x) in zip(axes.T, pictures, strict=True):
        plots.density_2d(log_prob, limits, above, points=120, max_density=highest, colorbar=False, title=title)
        plots.samples_2d(x, below, limits=limits, title="2,000 samples")
    for ax in axes.flat:
        ax.label_outer()
    figure.suptitle("Two moons: densities, all on one colour scale, and samples")
    _save(figure, output / "moons.png")
    return Part(
        "Two moons",
        f"{len(train):,} points train every model, and {len(validation):,} more choose the number of components, the "
        f"bandwidth and when to stop. The table is over {len(test):,} fresh points. KL is the mean of log p(x) - "
        f"log q(x) with the exact density p; the entropy of p is {numbers['entropy']:.3f} nats, so no model's mean "
        f"log-likelihood is above {-numbers['entropy']:.3f} but by chance.",
        ("model", "log-likelihood (nats per row)", "KL from the truth (nats)", "seconds", "what it is"),
        rows,
        numbers,
        {"moons.png": "densities and samples of the truth and of the models"},
    )


def breast_cancer(output: Path, seed: int, quick: bool, until: float) -> Part:
    """A real table of thirty columns with long tails."""
    table = load_table("breast_cancer", seed=seed)
    with _one_thread(seed):
        # RealNVP's settings are those of seven tried that the validation rows of the splits 1, 2 and 3 liked best;
        # the spline flow's are close to the better of two.
        flows = {
            "RealNVP": realnvp(30, num_layers=6, hidden_features=(64,), dropout=0.4, prior=_heavy_tails(30)),
            "neural spline flow": nsf(
                30, num_layers=2, hidden_features=(32,), dropout=0.4, num_bins=4, bound=6.0, prior=_heavy_tails(30)
            ),
        }
        options = {"batch_size": 128, "learning_rate": 5e-3, "weight_decay": 1e-3, "patience": 60}
        options |= {"epochs": 10 if quick else 300}
        return _compare_on_table(table, flows, options, ("mean radius", "mean concavity"), output, seed, quick, until)


def _heavy_tails(features: int) -> StudentT:
    return StudentT(features, df=10.0, learnable=True)


# Effects of coaching on the test scores of eight schools, and their standard errors: Rubin, 1981.
_EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
_ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)


def posterior(output: Path, seed: int, quick: bool, until: float) -> Part:
    """The posterior of the eight schools by one call, its verdict, and a mean-field guide beside it."""
    data = torch.tensor(_EFFECTS), torch.tensor(_ERRORS)
    with _one_thread(seed):
        # Ten seconds are kept back, for the draws, the other guide and the figure.
        seconds = min(5.0 if quick else 60.0, max(2.0, round(until - 10.0 - time.perf_counter())))
        _say(f"  flow: fit_posterior, training for at most {seconds:.0f} s ...")
        steps = 20 if quick else 1500
        fitted = fit_posterior(_eight_schools, *data, max_steps=steps, max_seconds=seconds, seed=seed, progress=False)
        summary = fitted.summary().to_string()
        _say(_indented(f"{fitted!r}\n\n{summary}"))
        n = 4000
        draws = {"flow": fitted.resampled(n) if fitted.verdict == "resample" else fitted.draws(n)}
        draws["mean field"], found_by_svi = _mean_field(data, n, steps=100 if quick else 800)
        exact, density = _exact_schools(*data)

    judged = {"elbo": fitted.elbo, "seconds": round(fitted.seconds, 2), "note": f"{fitted.verdict}: {fitted.reason}"}
    found = {"exact": exact, "flow": judged, "mean field": found_by_svi}
    rows = []
    for name, numbers in found.items():
        for site in ("mu", "tau") if name in draws else ():
            values = draws[name][site].double()
            numbers |= {f"{site}_mean": float(values.mean()), f"{site}_sd": float(values.std())}
        moments = [f"{numbers[f'{site}_{moment}']:.2f}" for site in ("mu", "tau") for moment in ("mean", "sd")]
        rows.append((name, f"{numbers['elbo']:.3f}", *moments, f"{numbers['seconds']:.0f}", numbers["note"]))
    all_numbers = {
        "models": found,
        "verdict": fitted.verdict,
        "reason": fitted.reason,
        "log_evidence": fitted.log_evidence,
        "log_evidence_standard_error": fitted.log_evidence_error,
        "khat": list(fitted.khat),
        "ess": fitted.ess,
    }
    _save(_schools_figure(draws, density, found), output / "posterior.png")
    return Part(
        "A posterior: eight schools",
        "Rubin's eight schools (1981): mu is the mean effect of coaching on a test and tau the spread of the effects "
        "between schools, both in points; the effects are in units of tau, around mu (the non-centred form). The flow "
        "comes from one call, `fit_posterior(model, effects, errors)`, and its verdict is its own; the mean-field guide"
        " is trained by Pyro's SVI. Sums over a grid give the exact numbers, since the effects can be integrated out. "
        "The exact ELBO is the log evidence, which no guide exceeds but by chance; the flow's importance weights "
        f"put it at {fitted.log_evidence:.3f} ± {fitted.log_evidence_error:.3f} nats. ArviZ's summary of the flow's "
        f"draws:\n\n```text\n{summary}\n```",
        ("posterior", "ELBO (nats)", "mean of mu", "sd of mu", "mean of tau", "sd of tau", "seconds", "what it is"),
        rows,
        all_numbers,
        {"posterior.png": "draws of mu and tau by the flow and by the mean-field guide, over the exact posterior"},
    )


def _eight_schools(effects: Tensor, errors: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(effects)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("effects", dist.Normal(mu + tau * z, errors), obs=effects)


def _indented(text: str) -> str:
    return "\n".join("  " + line if line else "" for line in text.split("\n"))


def _mean_field(
    data: tuple[Tensor, Tensor], n: int, *, steps: int, seconds: float = 15.0
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train Pyro's mean-field guide; give draws of it, and its ELBO."""
    began, taken = time.perf_counter(), 0
    vectorized = {"vectorize_particles": True, "max_plate_nesting": 1}
    with pyro.get_param_store().scope():
        guide = AutoDiagonalNormal(_eight_schools)
        svi = SVI(_eight_schools, guide, ClippedAdam({"lr": 0.1, "lrd": 0.994}), Trace_ELBO(16, **vectorized))
        while taken < steps and time.perf_counter() - began < seconds:
            svi.step(*data)
            taken += 1
        numbers = {
            "elbo": -float(Trace_ELBO(20_000, **vectorized).loss(_eight_schools, guide, *data)),
            "seconds": round(time.perf_counter() - began, 2),
            "note": f"Pyro's AutoDiagonalNormal, {taken} steps of SVI",
        }
        draws = Predictive(_eight_schools, guide=guide, num_samples=n, parallel=True)(*data)
    return {name: draws[name].reshape(n) for name in ("mu", "tau")}, numbers


def _exact_schools(effects: Tensor, errors: Tensor) -> tuple[dict[str, Any], tuple[Tensor, Tensor, Tensor]]:
    """Give the moments, and the density of mu and log tau with its axes: the effects are normal, and integrate out."""
    mu, log_tau = torch.linspace(-25, 35, 601, dtype=torch.float64), torch.linspace(-12, 6, 901, dtype=torch.float64)
    tau = log_tau[:, None].exp()
    scale = (errors.double() ** 2 + tau[..., None] ** 2).sqrt()  # (901, 1, schools)
    log_joint = dist.Normal(mu[:, None], scale).log_prob(effects.double()).sum(-1)
    log_joint = log_joint + dist.Normal(0.0, 5.0).log_prob(mu) + dist.HalfCauchy(5.0).log_prob(tau) + log_tau[:, None]
    log_evidence = float(log_joint.flatten().logsumexp(0) + ((mu[1] - mu[0]) * (log_tau[1] - log_tau[0])).log())
    density = (log_joint - log_evidence).exp()
    share = density / density.sum()
    numbers: dict[str, Any] = {"elbo": log_evidence, "seconds": 0.0, "note": "sums over a grid of mu and log tau"}
    for name, values in {"mu": mu.expand_as(share), "tau": tau.expand_as(share)}.items():
        mean = float((share * values).sum())
        numbers |= {f"{name}_mean": mean, f"{name}_sd": float((share * (values - mean) ** 2).sum()) ** 0.5}
    return numbers, (mu, log_tau, density)


def _schools_figure(
    draws: Mapping[str, Mapping[str, Tensor]], exact: tuple[Tensor, Tensor, Tensor], found: Mapping[str, Any]
) -> Figure:
    """Draws of each guide over contours of the exact posterior, and the marginals of log tau."""
    mu, log_tau, density = (part.numpy() for part in exact)
    heights = np.sort(density.flatten())
    levels = [float(heights[np.searchsorted(heights.cumsum() / heights.sum(), 1 - part)]) for part in (0.95, 0.8, 0.5)]
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    *pairs, right = figure.subplots(1, 3)
    bins = np.linspace(-5.0, 4.0, 46)
    for ax, (name, sites), color, style in zip(pairs, draws.items(), plots.COLORS, ("-", "--"), strict=False):
        points = torch.stack([sites["mu"], sites["tau"]], -1)[:2000]
        title = f"{name}: {len(points):,} draws, ELBO {found[name]['elbo']:.3f} nats"
        names = ("mean effect mu (points)", "spread between schools tau (points, log scale)")
        plots.samples_2d(points, ax, color=color, names=names, title=title)
        ax.contour(mu, np.exp(log_tau), density, levels=levels, colors="black", linewidths=1)
        ax.plot([], [], color="black", label="exact: 50, 80 and 95 %")
        ax.set_yscale("log")
        ax.set(xlim=(-9, 18), ylim=(0.01, 60))
        ax.legend(loc="lower right")
        kind = {"histtype": "step", "density": True, "color": color, "linestyle": style, "linewidth": 1.6}
        right.hist(sites["tau"].log().numpy(), bins, label=name, **kind)
    right.plot(log_tau, density.sum(1) * (mu[1] - mu[0]), color="black", label="exact")
    right.set(title="Spread between schools", xlabel="log tau (tau in points)", ylabel="density", xlim=(-5, 4))
    right.legend(loc="upper left")
    figure.suptitle("Eight schools: the posterior by fit_posterior, by a mean-field guide, and exactly")
    return figure


PARTS: dict[str, Callable[[Path, int, bool, float], Part]] = {
    "breast_cancer": breast_cancer,
    "moons": moons,
    "posterior": posterior,
}
"""The parts in the order in which they run; each takes the folder, the seed, whether to be quick, and its end."""


def _compare_on_table(
    table: Table,
    flows: Mapping[str, Flow],
    options: Mapping[str, Any],
    pair: tuple[str, str],
    output: Path,
    seed: int,
    quick: bool,
    until: float,
) -> Part:
    """Fit simple models and flows to a table, score them on its test rows, and draw what they make of two columns."""
    models = _simple_models(
        table.train,
        table.validation,
        (1, 2) if quick else (1, 2, 3, 4, 6, 8),
        (1e-6, 1e-3, 1e-1),
        ("full", "tied", "diag"),
    )
    models += _fit_flows(flows, ", Student t prior", table.train, table.validation, seed, until, options)
    scores = {model.name: _log_likelihoods(model, table.test) for model in models}
    numbers: dict[str, Any] = {
        "rows": {"train": len(table.train), "validation": len(table.validation), "test": len(table.test)},
        "columns": list(table.columns),
        "models": {},
    }
    rows = []
    for model in models:
        mean, error = _mean_and_error(scores[model.name])
        above, above_error = _mean_and_error(scores[model.name] - scores["Gaussian mixture"])
        difference = "-" if model.name == "Gaussian mixture" else f"{above:+.2f} ± {above_error:.2f}"
        rows.append((model.name, f"{mean:.2f} ± {error:.2f}", difference, f"{model.seconds:.0f}", model.note))
        numbers["models"][model.name] = _as_numbers(model, mean, error) | {
            "above_mixture": above,
            "above_mixture_standard_error": above_error,
        }

    figure = Figure(figsize=(15, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    points = {name: (n["log_likelihood"], n["standard_error"]) for name, n in numbers["models"].items()}
    plots.log_likelihoods(points, left, title=f"{len(table.test)} test rows, with standard errors")
    fits = {model.name: model.result for model in models if model.result is not None}
    plots.training_curves(fits, middle, title="Validation rows; dots: the weights kept", skip=3)
    # The flow whose validation loss is the lowest: which one draws is no matter for the test rows.
    best_name = min(fits, key=lambda name: fits[name].best_loss)
    best = next(model for model in models if model.name == best_name)
    places = [table.columns.index(name) for name in pair]
    data = table.in_units(torch.cat([table.train, table.validation, table.test]))[:, places]
    drawn = table.in_units(best.sample(len(data)))[:, places]
    plots.samples_2d(data, right, color=plots.COLORS[6], label=f"{len(data)} rows of data")
    low, high = data.amin(0), data.amax(0)
    room = 0.08 * (high - low)
    plots.samples_2d(
        drawn, right, color=plots.COLORS[1], label="as many samples", names=pair, title=f"Data and the {best.name}"
    )
    lowest, highest = (low - room).tolist(), (high + room).tolist()
    right.set(xlim=(lowest[0], highest[0]), ylim=(lowest[1], highest[1]))
    right.legend(framealpha=0.9, loc="upper left")
    figure.suptitle(f"{table.name}: {table.features} columns, standardised for the fits")
    _save(figure, output / f"{table.name}.png")
    return Part(
        f"A real table: {table.name}",
        f"{table.features} columns, standardised by its {len(table.train)} train rows; {len(table.validation)} others "
        f"choose components, covariances, ridge, bandwidth and when to stop; {len(table.test)} test rows are "
        "scored once. The flows' settings were fixed beforehand, by validation rows of other splits of the same "
        "table. The column beside it is the difference from the Gaussian mixture row by row, which the spread "
        "between easy and hard rows does not blur.",
        ("model", "test log-likelihood (nats per row)", "above the mixture", "seconds", "what it is"),
        rows,
        numbers,
        {f"{table.name}.png": "test log-likelihoods, training curves, and samples beside the data"},
    )


def _simple_models(
    train: Tensor,
    validation: Tensor,
    components: Sequence[int],
    ridges: Sequence[float],
    covariances: Sequence[str] = ("full",),
) -> list[Model]:
    """Fit a Gaussian, a Gaussian mixture and a kernel density, each with the options that validation rows like best."""
    from sklearn import mixture
    from sklearn.neighbors import KernelDensity

    x, held_out = train.double().numpy(), validation.double().numpy()

    def model(name: str, tries: Mapping[str, Any]) -> Model:
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a mixture that has not converged is a candidate like another
            fitted = {note: estimator.fit(x) for note, estimator in tries.items()}
            note = max(fitted, key=lambda note: float(fitted[note].score_samples(held_out).mean()))
        best = fitted[note]
        _say(f"  {name}: {note}, {time.perf_counter() - began:.1f} s")

        def sample(n: int) -> Tensor:
            rows = best.sample(n, random_state=0) if isinstance(best, KernelDensity) else best.sample(n)[0]
            return torch.from_numpy(rows).float()

        def log_prob(rows: Tensor) -> Tensor:
            return torch.from_numpy(best.score_samples(rows.double().numpy()))

        return Model(name, log_prob, sample, note, time.perf_counter() - began)

    mixtures = {
        f"{number} components, {covariance} covariance, ridge {ridge:g}": mixture.GaussianMixture(
            number, covariance_type=covariance, reg_covar=ridge, random_state=0
        )
        for number in components
        for covariance in covariances
        for ridge in ridges
    }
    # A relative error of 1e-3 in a density is 0.001 nats.
    bandwidths = np.geomspace(0.01, 0.08, 7) if x.shape[1] < 5 else np.geomspace(0.1, 2.0, 13)
    kernels = {f"bandwidth {width:.3g}": KernelDensity(bandwidth=width, rtol=1e-3) for width in bandwidths}
    return [
        model("Gaussian", {"full covariance": mixture.GaussianMixture(1, random_state=0)}),
        model("Gaussian mixture", mixtures),
        model("kernel density", kernels),
    ]


def _fit_flows(
    flows: Mapping[str, Flow],
    notes: str,
    train: Tensor,
    validation: Tensor,
    seed: int,
    until: float,
    options: Mapping[str, Any],
) -> list[Model]:
    """Fit flows one by one, each in its share of the time that is left."""
    models: list[Model] = []
    for name, flow in flows.items():
        seconds = max(2.0, (until - time.perf_counter()) / (len(flows) - len(models)))
        _say(f"  {name}: fitting, at most {seconds:.0f} s ...")
        result = fit(
            flow,
            train,
            validation=validation,
            seed=seed,
            max_seconds=seconds,
            progress=False,
            accelerator="cpu",
            **options,
        )
        _say(f"  {name}: {result.steps} steps, {result.seconds:.1f} s, {result.stopped}")
        size = sum(parameter.numel() for parameter in flow.parameters())
        note = f"{size:,} parameters{notes}, {result.steps} steps"
        models.append(
            Model(name, flow.log_prob, lambda n, flow=flow: flow.sample((n,)), note, result.seconds, result)  # type: ignore[misc]
        )
    return models


@torch.no_grad()
def _log_likelihoods(model: Model, rows: Tensor) -> Tensor:
    return model.log_prob(rows).double()


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    return float(values.double().mean()), float(values.double().std() / len(values) ** 0.5)


@contextlib.contextmanager
def _one_thread(seed: int) -> Iterator[None]:
    """Compute on one thread, and seed torch; both are as before afterwards.

    Networks this small gain nothing from more threads, which wait for one another wherever a core is busy.
    """
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    threads = torch.get_num_threads()
    with threadpool_limits(1), torch.random.fork_rng([]):
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _as_numbers(model: Model, mean: float, error: float) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "log_likelihood": mean,
        "standard_error": error,
        "seconds": round(model.seconds, 2),
        "note": model.note,
    }
    if model.result is not None:
        numbers |= {"steps": model.result.steps, "stopped": model.result.stopped}
    return numbers


def _as_text(part: Part) -> str:
    table = [list(part.columns[:-1]), *(list(row[:-1]) for row in part.rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return "\n".join(
        "  " + "  ".join(cell.rjust(width) if at else cell.ljust(width) for at, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in table)
    )


def _as_markdown(parts: Sequence[Part] | Any, report: Mapping[str, Any]) -> str:
    lines = [
        "# pyroflows demo",
        "",
        f"pyroflows {report['pyroflows']}, torch {report['torch']}, seed {report['seed']}, "
        f"{report['seconds']:.0f} s. All numbers are in `report.json`; higher log-likelihoods are better; ± is one "
        "standard error.",
    ]
    if report["quick"]:
        lines += ["", "This was a quick run: the fits were cut short, and the numbers mean little."]
    for part in parts:
        lines += ["", f"## {part.title}", "", part.text, ""]
        lines += ["| " + " | ".join(part.columns) + " |", "|" + " --- |" * len(part.columns)]
        lines += ["| " + " | ".join(row) + " |" for row in part.rows]
        for name, about in part.figures.items():
            lines += ["", f"![{about}]({name})"]
    return "\n".join(lines) + "\n"


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110)


def _say(line: str) -> None:
    print(line, flush=True)
