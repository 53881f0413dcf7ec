"""Fit the posterior of any Pyro model in one call, and say whether the fit can be trusted."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from pyro.infer.enum import config_enumerate
from torch import Tensor

from pyroflows._version import __version__
from pyroflows.arguments import check_number, check_sizes
from pyroflows.flow import Flow
from pyroflows.inference.density import LogJoint
from pyroflows.inference.diagnostics import importance_ess, psis
from pyroflows.inference.guide import AutoFlow
from pyroflows.inference.neutra import run_chains
from pyroflows.models import realnvp
from pyroflows.training import FitResult, fit

__all__ = ["Posterior", "Weights", "fit_posterior"]

_RATES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
_SETS = 5  # of draws, each with a k-hat of its own
_CHUNK = 2000  # points evaluated at once
_SHARE = 0.05  # of the posterior that a missed mode must hold to be named
_SKEWED = 5.0  # nats that the Gaussian at such a mode may lack, as where the posterior is not one there
_APART = 5.0  # from the guide's centre in its latent space, where such a mode must lie
_UNCOVERED = 20.0  # times the guide's density, where the posterior counts as not covered
_SETTLED = 0.1  # nats; the spread of the log weights at which a fit ends, ESS then being 99 %
_GRADIENTS = 8  # of each kind, whose spreads are compared


def fit_posterior(
    model: Callable[..., Any],
    *args: Any,
    flow: Callable[..., Flow] | Flow = realnvp,
    init: str = "auto",
    num_draws: int = 128,
    max_steps: int = 3500,
    max_seconds: float | None = None,
    seed: int | None = None,
    progress: bool | None = None,
    **kwargs: Any,
) -> Posterior:
    r"""Fit a flow to the posterior of a Pyro model by the ELBO, and judge it.

    The guide starts at the best Gaussian found (see :func:`find_start`). Short runs at several learning rates choose
    one; then stages of 500 steps, 1,000 and so on follow, with the rate falling along a half cosine and the
    weights averaged, each by the total or the path gradient, whichever is quieter at its start. A stage that led to a
    worse ELBO is taken back. The fit ends when a stage leaves the spread of the log weights, and the guide's means and
    standard deviations, where the one before had left them, or when that spread is small. It then draws afresh, and
    what the importance weights of those draws say is the verdict.

    Args:
        model: a Pyro model; discrete latents are summed out.
        args: its arguments.
        flow: builder of the flow, or a ready one, as in :class:`AutoFlow`.
        init: the Gaussian to start at, as in :class:`AutoFlow`.
        num_draws: draws a step.
        max_steps: the most steps taken, the search for a learning rate left out.
        max_seconds: a limit of wall time for the training.
        seed: seeds all draws and weights, and leaves torch's random numbers as they were; None to go on from those.
        progress: whether to show bars; by default on a terminal alone.
        kwargs: keyword arguments of the model.

    Returns:
        The posterior, with its verdict.

    Raises:
        ValueError: the model has no continuous latents, subsampled plates, learnable parameters of its own
            (``pyro.param``: train those by ``SVI`` with an :class:`AutoFlow`), or arguments named like options here.

    References:
        Advances in Black-Box VI: Normalizing Flows, Importance Weighting, and Optimization, Agrawal et al., 2020
        (arXiv:2006.10343); Sticking the Landing, Roeder et al., 2017 (arXiv:1703.09194); Robust, Accurate Stochastic
        Optimization for Variational Inference, Dhaka et al., 2020 (arXiv:2009.00666).

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> posterior = fit_posterior(model, torch.tensor([1.0, 2.0, 3.0]), max_steps=100, seed=0)
        >>> posterior.verdict.split(":")[0]
        'trust'
        >>> round(float(posterior.draws(1000)["mean"].mean()), 1)
        2.0
    """
    if not callable(model):
        raise TypeError(f"expected a Pyro model, a callable; got {type(model).__name__}")
    _refuse_names(model)
    check_sizes(num_draws=num_draws, max_steps=max_steps)
    if max_seconds is not None:
        check_number("max_seconds", max_seconds, "(0, inf)")
    began = time.perf_counter()
    with _seeded(seed):
        guide = AutoFlow(config_enumerate(model), flow, init, args=args, kwargs=kwargs)
        log_joint = _whole(guide)
        training = _Training(guide, log_joint, num_draws, max_seconds, progress)
        training.search()
        training.stages(max_steps)
        evaluations = log_joint.evaluations
        posterior = Posterior(guide, training.results, training.notes)
        posterior.evaluations = evaluations
        posterior.seconds = time.perf_counter() - began
        return posterior


def _refuse_names(model: Callable[..., Any]) -> None:
    own = inspect.signature(fit_posterior).parameters
    options = {name for name, parameter in own.items() if parameter.kind is inspect.Parameter.KEYWORD_ONLY}
    try:
        bound = model.keywords if isinstance(model, functools.partial) else ()
        taken = sorted(options & set(inspect.signature(model).parameters).difference(bound))
    except (TypeError, ValueError):
        return
    if taken:
        raise ValueError(
            f"expected a model whose arguments have other names than fit_posterior's options; got "
            f"{', '.join(map(repr, taken))}: bind them by functools.partial"
        )


def _whole(guide: AutoFlow) -> LogJoint:
    """Give the guide's log joint, or say why it is none of the whole posterior."""
    if not isinstance(guide, AutoFlow):
        raise TypeError(f"expected an AutoFlow; got {type(guide).__name__}")
    guide._built()
    log_joint = guide.log_joint
    if log_joint is None:
        raise ValueError("expected a guide with its model; got one without, as after unpickling")
    if log_joint.subsampled:
        raise ValueError(
            f"expected a model of all its data; got the subsampled plate {', '.join(map(repr, log_joint.subsampled))}: "
            f"leave subsample_size out, or train an AutoFlow by SVI"
        )
    if log_joint.parameters:
        raise ValueError(
            f"expected a model without parameters of its own, which a posterior does not train; got "
            f"{', '.join(map(repr, log_joint.parameters))}: train them by SVI with an AutoFlow"
        )
    return log_joint


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    if not isinstance(seed, Integral):
        raise TypeError(f"expected seed to be an integer; got {seed!r}")
    with torch.random.fork_rng():
        torch.manual_seed(int(seed))
        yield


@dataclass
class _Training:
    """The search for a learning rate, and the stages."""

    guide: AutoFlow
    log_joint: LogJoint
    num_draws: int
    max_seconds: float | None
    progress: bool | None
    results: list[FitResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rate: float = _RATES[1]

    def __post_init__(self) -> None:
        self.flow: Flow = self.guide.flow
        self.began = time.perf_counter()

    def search(self) -> None:
        """Take the learning rate whose short run ends at the best ELBO, and go on from there."""
        start = self._weights()
        floor = self._evaluate(1000)[0]
        best = floor, _RATES[-1], start
        for number, rate in enumerate(_RATES, 1):
            if number > 3 and best[0] > floor:
                break  # the smaller rates are for posteriors on which the usual ones make a start worse
            self.flow.load_state_dict(start)
            self._fit(100, rate, f"learning rate {number}")
            score = self._evaluate(1000)[0]
            if score > best[0]:
                best = score, rate, self._weights()
        if best[0] == -math.inf:
            self.notes.append("no learning rate gave a finite ELBO")
        self.rate = best[1]
        self.flow.load_state_dict(best[2])

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.flow.state_dict().items()}

    def stages(self, max_steps: int) -> None:
        """Train until the guide has settled."""
        elbo, spread, moments = self._evaluate(4000)
        steps, size = 0, 500
        while steps < max_steps and spread > 0.02:
            size = min(size, max_steps - steps)
            weights, before = self._weights(), (elbo, spread, moments)
            self._fit(size, self.rate, f"steps {steps} to {steps + size}")
            steps += size
            elbo, spread, moments = self._evaluate(4000)
            worse = not elbo > before[0] - 0.05
            if worse:  # the stage led away: back to where it began, and smaller steps
                self.flow.load_state_dict(weights)
                (elbo, spread, moments), self.rate = before, self.rate / 3
            if self._out_of_time():
                self.notes.append(f"the fit ended at max_seconds={self.max_seconds:g}")
                break
            if worse and self.rate >= 1e-5:
                continue
            drift = max(float((new - old).abs().max()) for new, old in zip(moments, before[2], strict=True))
            size *= 2
            if worse or spread < _SETTLED or (spread > 0.8 * before[1] and drift < 0.05):
                break
        else:
            if steps >= max_steps and spread > _SETTLED:
                self.notes.append(f"the fit ended at max_steps={max_steps}, perhaps before it had settled")

    def _out_of_time(self) -> bool:
        return self.max_seconds is not None and time.perf_counter() - self.began >= self.max_seconds

    def _fit(self, steps: int, rate: float, label: str) -> None:
        left = None if self.max_seconds is None else max(self.max_seconds - time.perf_counter() + self.began, 0.01)
        result = fit(
            self.flow,
            None,
            objective=self._quieter(),
            epochs=max(1, steps // 50),
            steps_per_epoch=min(50, steps),
            learning_rate=rate,
            average=0.998,
            clip_norm=10.0,
            max_seconds=left,
            accelerator=self.flow.device.type,
            progress=label if self.progress is None else self.progress,
        )
        self.results.append(result)

    def _quieter(self) -> Callable[..., Tensor]:
        """Give the gradient, total or path, that varies less from draw to draw at the present weights."""
        parameters = list(self.flow.parameters())
        spread = {}
        for objective in (self.total, self.path):
            rows = []
            for _ in range(_GRADIENTS):
                loss = objective(self.flow)
                rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
            noise = float(torch.stack(rows).var(0).sum())
            spread[objective] = noise if math.isfinite(noise) else math.inf
        return min(spread, key=lambda objective: spread[objective])

    def total(self, flow: Any, *_: Any) -> Tensor:
        """The negative ELBO with its total gradient."""
        u, log_q = flow.rsample_and_log_prob(self.num_draws)
        log_p, score = self.log_joint.value_and_score(u)
        fine = log_p.isfinite()
        return self._loss(log_p, log_q, (score * (u - u.detach())).sum(-1) - (log_q - log_q.detach()), fine)

    def path(self, flow: Any, *_: Any) -> Tensor:
        """The negative ELBO with its path gradient, which is without noise where guide and posterior agree."""
        u, log_q, score_q = flow.rsample_and_score(self.num_draws)
        log_p, score = self.log_joint.value_and_score(u)
        fine = log_p.isfinite()
        return self._loss(log_p, log_q, ((score - score_q) * (u - u.detach())).sum(-1), fine)

    @staticmethod
    def _loss(log_p: Tensor, log_q: Tensor, gradient: Tensor, fine: Tensor) -> Tensor:
        """A draw without a density gives no gradient; a batch of such draws gives a loss that is not finite."""
        value = torch.where(fine, log_p - log_q.detach() + gradient, 0.0)
        return -value.sum() / fine.sum()

    @torch.no_grad()
    def _evaluate(self, draws: int) -> tuple[float, float, tuple[Tensor, Tensor]]:
        """Give ELBO (less its error), spread of the log weights, and moments in the units of the start."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            u, log_q = self.flow.rsample_and_log_prob(draws)
        log_w = self.log_joint.value(u) - log_q
        whitening: Any = self.flow.layers[-1]
        centred = u - whitening.loc
        if whitening.diagonal:
            x = centred / whitening.scale
        else:
            x = torch.linalg.solve_triangular(whitening.scale.T, centred, upper=True, left=False)
        log_w = log_w[log_w.isfinite()]
        if len(log_w) < 2:
            return -math.inf, math.inf, (x.mean(0), x.std(0))
        spread = float(log_w.std())
        return float(log_w.mean()) - spread / len(log_w) ** 0.5, spread, (x.mean(0), x.std(0))


@dataclass(frozen=True)
class Weights:
    """What the importance weights of fresh draws say of a guide.

    Args:
        u: the draws, in unconstrained space, ``(draws, latents)``.
        log_weights: log joint density minus the guide's log-density, ``(draws,)``; -inf where the former is not finite.
        elbo: the mean of the finite ones, in nats.
        elbo_error: its standard error.
        log_evidence: the logarithm of the mean weight.
        log_evidence_error: its standard error, to first order.
        khat: Pareto shapes of the weights, one for each of several sets of the draws.
        ess: Kish's effective number of draws.
        infinite: the share of draws whose log joint density is not finite.
        mean_error: the largest error of a mean, in standard deviations, as reweighting the draws shows it; NaN where
            values of sites are beyond the range of their dtype.
        sd_error: the largest relative error of a standard deviation, likewise.
    """

    u: Tensor
    log_weights: Tensor
    elbo: float
    elbo_error: float
    log_evidence: float
    log_evidence_error: float
    khat: tuple[float, ...]
    ess: float
    infinite: float
    mean_error: float
    sd_error: float

    @property
    def ess_ratio(self) -> float:
        """The effective number of draws as a share of the draws."""
        return self.ess / len(self.u)


@torch.no_grad()
def _weigh(guide: AutoFlow, log_joint: LogJoint, draws: int) -> Weights:
    """Draw from a guide and weigh the draws."""
    flow: Flow = guide.flow
    parts = [flow.rsample_and_log_prob(min(_CHUNK, draws - begin)) for begin in range(0, draws, _CHUNK)]
    u, log_q = torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts])
    return _weights_of(log_joint, u, (log_joint.value(u) - log_q).double())


@torch.no_grad()
def _weights_of(log_joint: LogJoint, u: Tensor, log_w: Tensor) -> Weights:
    draws, dim = u.shape
    finite = log_w[log_w.isfinite()]
    if len(finite) < 2:
        inf = math.inf
        return Weights(u, log_w, -inf, inf, -inf, inf, (inf,) * _SETS, 0.0, 1 - len(finite) / draws, inf, inf)
    log_mean = float(finite.logsumexp(0)) - math.log(draws)
    smoothed = psis(log_w)[0].exp()[:, None]
    # Means of the values as users read them; deviations of the unconstrained ones, which always exist.
    values = [value.reshape(draws, -1) for value in log_joint.constrain(u).values()]
    columns = torch.cat([u, *(value[:, (value != value[0]).any(0)] for value in values)], -1).to(smoothed)
    mean, sd, right = columns.mean(0), columns.std(0), (smoothed * columns).sum(0)
    right_sd = (smoothed * (columns - right) ** 2).sum(0).sqrt()
    return Weights(
        u=u,
        log_weights=log_w,
        elbo=float(finite.mean()),
        elbo_error=float(finite.std()) / len(finite) ** 0.5,
        log_evidence=log_mean,
        log_evidence_error=float((log_w - log_mean).exp().std()) / draws**0.5,
        khat=tuple(psis(part)[1] for part in log_w.chunk(_SETS)),
        ess=importance_ess(log_w),
        infinite=1 - len(finite) / draws,
        mean_error=float(((mean - right) / right_sd).abs().max()),
        sd_error=float((sd / right_sd - 1).abs()[:dim].max()),
    )


@torch.no_grad()
def _missed_modes(guide: AutoFlow, log_joint: LogJoint, weights: Weights) -> list[Tensor]:
    """Give modes that the search for a start came upon, which hold a share of the posterior the guide does not.

    A guide's own draws cannot show what it never draws. Draws from the Gaussian around another mode can: there the
    weight of a posterior that the guide covers is near one.
    """
    flow: Flow = guide.flow
    missed: list[Tensor] = []
    if not math.isfinite(weights.log_evidence):
        return missed
    for start in guide.starts:
        z = flow.bijection.inverse_and_log_det(start.loc.to(log_joint.dtype))[0]
        if start.elbo < weights.log_evidence + math.log(_SHARE) - _SKEWED or float(z.norm()) < _APART:
            continue
        noise = torch.randn(256, log_joint.dim, dtype=start.loc.dtype, device=start.loc.device)
        u = (start.loc + noise @ start.scale_tril.mT).to(log_joint.dtype)
        log_p = log_joint.value(u)
        log_g = torch.distributions.MultivariateNormal(
            start.loc, scale_tril=start.scale_tril, validate_args=False
        ).log_prob(u.to(start.loc))
        uncovered = log_p - weights.log_evidence - flow.log_prob(u) > math.log(_UNCOVERED)
        share = (log_p - log_g)[uncovered].logsumexp(0) - math.log(len(u)) - weights.log_evidence
        apart = all(float(((start.loc - mode) / start.scale_tril.norm(dim=-1)).abs().max()) > 1 for mode in missed)
        if uncovered.any() and float(share) > math.log(_SHARE) and apart:
            missed.append(start.loc.to(log_joint.dtype))
    return missed


def _judge(weights: Weights, missed: Sequence[Tensor], notes: Sequence[str]) -> tuple[str, str]:
    """Give the verdict, and why."""
    khat = sorted(weights.khat)[len(weights.khat) // 2]
    errors = f"errors of {weights.mean_error:.2f} sd in the means and {weights.sd_error:.0%} in the deviations"
    shown = f"the weights (median k-hat {khat:.2f}, ESS {weights.ess_ratio:.0%}) show {errors} at most"
    noted = "".join(f"; {note}" for note in notes)
    if missed:
        return (
            "do not trust",
            f"{len(missed)} other mode(s) with a share of the posterior are not covered: refine{noted}",
        )
    if weights.infinite > 0.01:
        return "do not trust", f"{weights.infinite:.1%} of the draws have no finite density{noted}"
    # One k-hat is a noisy number: where nearly all draws count, no tail of the weights has been seen.
    if not (weights.ess_ratio >= 0.8 or (khat < 0.7 and weights.ess_ratio > 0.1)):
        return (
            "do not trust",
            f"the weights are too uneven (median k-hat {khat:.2f}, ESS {weights.ess_ratio:.0%}){noted}",
        )
    if not math.isfinite(weights.mean_error):
        dtype = str(weights.u.dtype).removeprefix("torch.")
        return "do not trust", f"some values of the draws are beyond the range of {dtype}, and have no mean{noted}"
    if weights.ess_ratio >= 0.5 and weights.mean_error <= 0.1 and weights.sd_error <= 0.1:
        return "trust", f"{shown}{noted}"
    return "resample", f"{shown}, which resampling mends{noted}"


class Posterior:
    """A fitted posterior: its draws, what they are worth, and what they predict.

    Args:
        guide: the guide, built and trained.
        results: of the fits that trained it.
        notes: what happened in them that a verdict should name.
        chains: draws of Markov chains in unconstrained space, ``(chains, draws, latents)``, where the posterior is
            theirs and not the guide's.
        weights: what was found before, where it is known; by default the guide is drawn from and judged now.
        missed: modes that the guide does not cover, likewise.

    Attributes:
        verdict: "trust", "resample" (the draws of :meth:`resampled`, not those of :meth:`draws`) or "do not trust".
        reason: why.
        weights: the evidence, for the guide; None for chains.
        seconds: wall time of the fit.
        evaluations: of the model's density at one point, in the fit; the judging left out.
    """

    def __init__(
        self,
        guide: AutoFlow,
        results: Sequence[FitResult] = (),
        notes: Sequence[str] = (),
        *,
        chains: Tensor | None = None,
        weights: Weights | None = None,
        missed: Sequence[Tensor] | None = None,
    ):
        self.guide, self.results, self.notes, self.chains = guide, list(results), list(notes), chains
        self._log_joint = _whole(guide)
        self.seconds = math.nan
        self.evaluations = 0
        self.weights: Weights | None = None
        self.missed = list(missed or ())
        if chains is None:
            self.weights = weights or _weigh(guide, self._log_joint, _SETS * _CHUNK)
            if missed is None:
                self.missed = _missed_modes(guide, self._log_joint, self.weights)
            self.verdict, self.reason = _judge(self.weights, self.missed, self.notes)
        else:
            self.verdict, self.reason = self._judge_chains()

    # What the weights say

    @property
    def elbo(self) -> float:
        """The evidence lower bound, in nats."""
        return self._weights().elbo

    @property
    def elbo_error(self) -> float:
        """The standard error of :attr:`elbo`."""
        return self._weights().elbo_error

    @property
    def log_evidence(self) -> float:
        """The log evidence by importance sampling, in nats."""
        return self._weights().log_evidence

    @property
    def log_evidence_error(self) -> float:
        """The standard error of :attr:`log_evidence`."""
        return self._weights().log_evidence_error

    @property
    def khat(self) -> tuple[float, ...]:
        """The Pareto shapes of the importance weights, over several sets of draws."""
        return self._weights().khat

    @property
    def ess(self) -> float:
        """The effective number of draws: of the weights by Kish's formula, of chains the least over the latents."""
        return self._chain_statistics()[1] if self.weights is None else self.weights.ess

    @property
    def rhat(self) -> float:
        """The largest split R-hat of chains."""
        return self._chain_statistics()[0]

    def _weights(self) -> Weights:
        if self.weights is None:
            raise ValueError("expected a posterior by a guide, whose draws have weights; got one by Markov chains")
        return self.weights

    def _chain_statistics(self) -> tuple[float, float]:
        if self.chains is None:
            raise ValueError("expected a posterior by Markov chains; got one by a guide")
        import arviz as az

        data = _inference_data({"posterior": {"u": self.chains.cpu().numpy()}})
        rhat, ess = az.rhat(data), az.ess(data)
        return float(_dataset(rhat)["u"].max()), float(_dataset(ess)["u"].min())

    def _judge_chains(self) -> tuple[str, str]:
        rhat, ess = self._chain_statistics()
        assert self.chains is not None
        number = len(self.chains)
        said = f"the largest R-hat of {number} chains is {rhat:.3f} and the smallest effective sample size {ess:.0f}"
        if rhat < 1.02 and ess >= 50 * number:
            return "trust", said
        return "do not trust", f"{said}: run longer chains"

    # Draws

    def draws(self, n: int = 1000) -> dict[str, Tensor]:
        """Draw values of the sites, each ``(n, *shape)``: the guide's own, or at random from the chains."""
        return self._log_joint.constrain(self._draw(n))

    def resampled(self, n: int = 1000) -> dict[str, Tensor]:
        """Draw values of the sites, each ``(n, *shape)``, with the guide's error mended by smoothed weights (PSIS).

        References:
            Pareto Smoothed Importance Sampling, Vehtari et al., 2024 (arXiv:1507.02646).
        """
        return self._log_joint.constrain(self._resample(n))

    def _draw(self, n: int) -> Tensor:
        check_sizes(n=n)
        if self.chains is None:
            flow: Flow = self.guide.flow
            return flow.sample(n)
        flat = self.chains.flatten(0, 1)
        if n > len(flat):
            raise ValueError(f"expected at most {len(flat)} draws, as many as the chains hold; got n={n}")
        return flat[torch.randperm(len(flat))[:n]]

    def _resample(self, n: int) -> Tensor:
        check_sizes(n=n)
        if self.weights is None:
            return self._draw(n)
        pool = self.weights
        if 2 * n > len(pool.u):
            pool = _weigh(self.guide, self._log_joint, 2 * n)
        smoothed = psis(pool.log_weights)[0].exp()
        # Systematic resampling: each draw comes up as often as its weight says, to the nearest whole number.
        places = (torch.arange(n, dtype=torch.float64) + torch.rand((), dtype=torch.float64)) / n
        rows = torch.searchsorted(smoothed.cpu().cumsum(0), places).clamp(max=len(pool.u) - 1)
        return pool.u[rows[torch.randperm(n)].to(pool.u.device)]

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Give the guide's log-density of the sites' values, see :meth:`AutoFlow.log_prob`."""
        return self.guide.log_prob(values)

    def predictive(self, *args: Any, num_draws: int = 1000, **kwargs: Any) -> dict[str, Tensor]:
        """Draw what the model would observe, each site ``(num_draws, *shape)``.

        Args:
            args: arguments of the model, such as new inputs; by default those of the fit. Observations among them are
                drawn anew, whatever their values.
            num_draws: the number of draws; resampled ones where the verdict asks for it.
            kwargs: keyword arguments of the model.
        """
        check_sizes(num_draws=num_draws)
        if not args and not kwargs:
            args, kwargs = self._log_joint.args, self._log_joint.kwargs
        return self._log_joint.predict(self._best(num_draws), args, kwargs)

    def _best(self, n: int) -> Tensor:
        return self._resample(n) if self.verdict == "resample" else self._draw(n)

    # For ArviZ

    def to_arviz(self, num_draws: int = 4000, *, resample: bool | None = None) -> Any:
        """Give draws, log-likelihoods, observations and sample statistics as ArviZ holds them.

        Args:
            num_draws: of a guide, in four groups in the place of chains, or in one where there are few; Markov chains
                are given whole.
            resample: whether the draws are resampled by their weights; by default where the verdict asks for it.

        Returns:
            ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (1.x): "posterior" with deterministic sites,
            "log_likelihood" where the model has observations (none beside discrete latents), "sample_stats" with "lp"
            and, for the guide's own draws, "log_q" and the smoothed, normalised "log_weight"; "observed_data".
        """
        check_sizes(num_draws=num_draws)
        if self.chains is not None:
            chains, u = len(self.chains), self.chains.flatten(0, 1)
        else:
            chains = 4 if num_draws >= 16 else 1
            number = -(-num_draws // chains) * chains
            resample = self.verdict == "resample" if resample is None else resample
            u = self._resample(number) if resample else self._draw(number)
        joint = self._log_joint
        lp = joint.value(u)
        stats = {"lp": lp}
        if self.chains is None and not resample:
            with torch.no_grad():
                stats["log_q"] = torch.cat([self.guide.flow.log_prob(part) for part in u.split(_CHUNK)])
            if len(u) >= 32:
                stats["log_weight"] = psis(lp - stats["log_q"])[0]
        groups: dict[str, Any] = {"posterior": joint.constrain(u, deterministic=True), "sample_stats": stats}
        if joint.observations and not joint.enumerated:
            with torch.no_grad():
                parts = [joint.log_likelihood(part) for part in u.split(_CHUNK)]
            groups["log_likelihood"] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        arrays = {
            group: {name: v.detach().cpu().unflatten(0, (chains, -1)).numpy() for name, v in values.items()}
            for group, values in groups.items()
        }
        if joint.observations:
            arrays["observed_data"] = {name: v.detach().cpu().numpy() for name, v in joint.observations.items()}
        return _inference_data(arrays)

    def summary(self, num_draws: int = 4000) -> Any:
        """Give ArviZ's table of the sites: means, standard deviations, intervals, R-hat and effective sizes."""
        import arviz as az

        return az.summary(self.to_arviz(num_draws))

    # More

    def refine(
        self,
        *,
        num_chains: int = 4,
        num_draws: int = 250,
        num_warmup: int = 200,
        seed: int | None = None,
        progress: bool | None = None,
    ) -> Posterior:
        """Run NUTS in the latent space of the flow, where the posterior is near a standard normal; give its posterior.

        Args:
            num_chains: of chains, run one after the other, each from a draw of the guide or from a mode it misses.
            num_draws: of each chain.
            num_warmup: steps of each chain that adapt it.
            seed: seeds the chains, and leaves torch's random numbers as they were; None to go on from those.
            progress: whether to show Pyro's bars; by default on a terminal alone.

        References:
            NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural Transport, Hoffman et al., 2019
            (arXiv:1903.03704).
        """
        check_sizes(num_chains=num_chains, num_draws=num_draws, num_warmup=num_warmup)
        began = time.perf_counter()
        with _seeded(seed):
            places = torch.cat([*(mode[None] for mode in self.missed), self._draw(num_chains)])[:num_chains]
            chains = run_chains(self.guide, places, num_draws, num_warmup, progress)
        refined = Posterior(self.guide, self.results, self.notes, chains=chains)
        refined.seconds = time.perf_counter() - began
        return refined

    # Files

    def save(self, path: str | Path) -> None:
        """Write the guide's weights, the weighed draws or chains, and what they are of, as one safetensors file."""
        from safetensors.torch import save_file

        flow, options = self.guide._recipe
        header = {
            "format": 1,
            "pyroflows": __version__,
            "flow": _name_of(flow),
            "options": options,
            "max_triangular": self.guide.max_triangular,
            "latents": [[site.name, list(site.shape)] for site in self.guide.latents],
            "notes": self.notes,
            "seconds": self.seconds,
        }
        tensors = {f"flow.{name}": value for name, value in self.guide.flow.state_dict().items()}
        if self.chains is not None:
            tensors["chains"] = self.chains
        else:
            weights = self._weights()
            tensors |= {"u": weights.u, "log_weights": weights.log_weights}
        tensors["log_joint"] = self._log_joint.value(_few_of(tensors))
        if self.missed:
            tensors["missed"] = torch.stack(self.missed)
        save_file({k: v.contiguous() for k, v in tensors.items()}, str(path), {"posterior": json.dumps(header)})

    @staticmethod
    def load(
        path: str | Path,
        model: Callable[..., Any],
        *args: Any,
        flow: Callable[..., Flow] | Flow | None = None,
        **kwargs: Any,
    ) -> Posterior:
        """Read what :meth:`save` wrote, with the model and its arguments, which no file holds.

        Args:
            path: of the file.
            model: the model that was fitted.
            args: its arguments.
            flow: the ready flow or the builder of one's own that the guide was made with, where there was one.
            kwargs: its keyword arguments.

        Raises:
            ValueError: the file is no posterior, or one of another model or flow.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                header = json.loads((file.metadata() or {}).get("posterior", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"expected a posterior written by save; got a file that is none: {error}") from None
        if not isinstance(header, dict) or header.get("format") != 1:
            raise ValueError(f"expected a posterior of format 1; got {header and header.get('format')!r} in {path}")
        if flow is None:
            flow = _builder(header["flow"])
        guide = AutoFlow(
            config_enumerate(model),
            flow,
            "none",
            max_triangular=header["max_triangular"],
            args=args,
            kwargs=kwargs,
            **header["options"],
        )
        latents = [[site.name, list(site.shape)] for site in guide.latents]
        if latents != header["latents"]:
            raise ValueError(f"expected a model with the latents {header['latents']}; got {latents}")
        state = {name.removeprefix("flow."): v for name, v in tensors.items() if name.startswith("flow.")}
        try:
            guide.flow.load_state_dict(state)
        except RuntimeError:
            raise ValueError(f"expected the flow that the posterior in {path} was fitted with; got another") from None
        if not torch.allclose(_whole(guide).value(_few_of(tensors)), tensors["log_joint"], 1e-4, 1e-3):
            raise ValueError(
                f"expected the model and the data that the posterior in {path} was fitted to; got others, by their "
                f"density at its draws"
            )
        weights = None
        if "chains" not in tensors:
            weights = _weights_of(_whole(guide), tensors["u"], tensors["log_weights"])
        missed = list(tensors.get("missed", ()))
        posterior = Posterior(guide, (), header["notes"], chains=tensors.get("chains"), weights=weights, missed=missed)
        posterior.seconds = header["seconds"]
        return posterior

    def __repr__(self) -> str:
        if self.weights is None:
            return f"Posterior by chains ({self.verdict}: {self.reason})"
        seconds = f", {self.seconds:.1f} s" if math.isfinite(self.seconds) else ""
        return (
            f"Posterior of {self.guide.latent_dim} latents: {self.verdict}, since {self.reason}\n"
            f"ELBO {self.elbo:.3f} +- {self.elbo_error:.3f}, log evidence {self.log_evidence:.3f} +- "
            f"{self.log_evidence_error:.3f}, k-hat {min(self.khat):.2f} to {max(self.khat):.2f}, "
            f"ESS {self.ess:.0f} of {len(self.weights.u)}{seconds}"
        )


def _few_of(tensors: Mapping[str, Tensor]) -> Tensor:
    """Give a few draws of a saved posterior, by whose density a model is known again."""
    draws = tensors["chains"].flatten(0, 1) if "chains" in tensors else tensors["u"]
    return draws[:: max(1, len(draws) // 10)]


def _name_of(flow: Callable[..., Flow] | Flow) -> str:
    """Give the name of a builder of this package, or that the flow is the user's own."""
    from pyroflows import models

    name = getattr(flow, "__name__", "")
    return name if name in models.__all__ and flow is getattr(models, name) else "given"


def _builder(name: str) -> Callable[..., Flow]:
    from pyroflows import models

    if name not in models.__all__:
        raise ValueError(
            "expected flow=, since the posterior was fitted with a flow or a builder of the user's own; got none"
        )
    builder: Callable[..., Flow] = getattr(models, name)
    return builder


def _inference_data(groups: Mapping[str, Any]) -> Any:
    import arviz as az

    if "InferenceData" in vars(az):  # to ask ArviZ 1.x for it is to be warned
        return az.from_dict(**groups)
    return az.from_dict(dict(groups))


def _dataset(result: Any) -> Any:
    """ArviZ 1.x gives a tree where 0.x gives a dataset."""
    return result["posterior"] if "posterior" in getattr(result, "children", {}) else result
