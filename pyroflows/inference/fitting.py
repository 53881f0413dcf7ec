"""Fit the posterior of any Pyro model in one call: a search for a learning rate, then stages."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pyro.infer.enum import config_enumerate
from torch import Tensor

from pyroflows import distributed
from pyroflows.arguments import check_number, check_option, check_sizes
from pyroflows.contexts import seeded
from pyroflows.flow import Flow
from pyroflows.inference.coordinates import best_centring, non_centred, recentred
from pyroflows.inference.density import density_model
from pyroflows.inference.diagnosis import importance_sample, notes_on
from pyroflows.inference.guide import AutoFlow, Builder, deepened, start_of
from pyroflows.inference.log_joint import LogJoint, refuse_randomness
from pyroflows.inference.posterior import Posterior, posterior_by_chains, require_log_joint
from pyroflows.inference.refine import refine_by_ensemble
from pyroflows.inference.sites import Model, check_model, device_of
from pyroflows.inference.watch import Watch
from pyroflows.models import realnvp
from pyroflows.priors import Prior
from pyroflows.training import FitOptions, FitResult, fit

__all__ = ["fit_posterior"]

_RATES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
_CONVERGED = 0.1  # nats; the spread of the log weights at which a fit ends, with an ESS of 99 %
_SHALLOW, _DEEP = 4, 8  # couplings: at first, and after a stage, or where log weights spread by more nats than this
_HARD = 0.5
_SMALL_ERROR, _FEW_DRAWS = 0.05, 2000  # errors of moments that need no more training, and the draws to judge them by
_ENOUGH = 0.25, 0.94, 0.03  # spread, effective share and errors that end a fit after a stage
_GRADIENTS = 8  # of each kind, to compare their variances
_START_SHARE = 0.4  # of the time, for the search of a Gaussian to start at
_VERDICT_SHARE = 0.25  # of the time, at most, to compute the weights from draws
_NUM_DRAWS, _MIN_DRAWS = 10_000, 200  # to compute them from, and the least if time is short
_FEW = 50  # latents, up to which the ELBO leads to a good guide from anywhere
_MANY = 512  # latents, from which on a step of the ELBO is too dear
_FAR_OFF = 1.0  # nats; the spread of a Gaussian's log weights above which it does not from more
_CENTRED = 0.1  # centring of an entry that makes coordinates other than non-centred ones
_OFF_SUPPORT = 100.0  # nats that a draw without a density costs


def fit_posterior(
    model: Model | None = None,
    *args: Any,
    log_density: Callable[..., Tensor] | None = None,
    start: Mapping[str, Any] | None = None,
    supports: Mapping[str, Any] | None = None,
    flow: Builder | Flow = realnvp,
    init: str | Mapping[str, Any] = "auto",
    num_draws: int = 128,
    max_steps: int = 3500,
    max_seconds: float | None = None,
    refine: str = "auto",
    seed: int | None = None,
    progress: bool | None = None,
    **kwargs: Any,
) -> Posterior:
    r"""Fit a flow to the posterior of a Pyro model by the ELBO; return the posterior, with a verdict on the fit.

    The guide starts at the best Gaussian found (see :func:`find_init`), and stays there if its weights say that little
    is left to gain. Short runs at several learning rates choose one; stages of 500 steps, 1,000 and so on follow, with
    a cosine schedule and averaged weights, each by the total or the path gradient, whichever has the smaller variance
    at its start. A stage that led to a worse ELBO is undone. The fit ends when a stage changes neither the spread of
    the log weights nor the guide's means and standard deviations, or when that spread is small (an effective share of
    99 %). The verdict is based on the importance weights of new draws. If these are not to be trusted, many Markov
    chains are run (see :meth:`Posterior.refine`); at once, without stages, if there are many latents and the Gaussian
    is far off, since the ELBO then rarely leads to a guide that can be trusted.

    Under ``torchrun`` the processes share the draws of each step, and compute the same posterior as one process but for
    rounding. Pass the same model and data to all, on the device of each.

    Args:
        model: a Pyro model; discrete latents are summed out.
        args, kwargs: its arguments.
        log_density, start, supports: instead of a model, the log-density of a posterior, a value of each parameter to
            start from, and where they live, as in :func:`density_model`.
        flow: builder of the flow, or a ready one, as in :class:`AutoFlow`.
        init: the Gaussian to start at, or values of sites to search from, ``{site: value}``, as in :class:`AutoFlow`.
        num_draws: draws in a step, over all processes.
        max_steps: the largest number of steps, without those of the search for a learning rate.
        max_seconds: a limit of wall time for the whole call.
        refine: "auto" runs chains where the guide is not to be trusted and time is left, "never" leaves them out.
        seed: seeds all draws and weights, and restores torch's generator afterwards; None uses the global generator.
        progress: whether to show bars; by default only on a terminal. A line at most every ten seconds goes to the
            logger "pyroflows", at level INFO.

    Raises:
        TypeError: both a model and a density or neither, or an array or a data frame among the model's arguments, with
            which it fails.
        ValueError: the model has no continuous latents, subsampled plates, learnable parameters of its own
            (``pyro.param``: train those by ``SVI`` with an :class:`AutoFlow`), random numbers outside its sites,
            data with NaN or stretched to fit their distribution, or arguments named like options here.

    References:
        Advances in Black-Box VI: Normalizing Flows, Importance Weighting, and Optimization, Agrawal et al., 2020
        (arXiv:2006.10343); Sticking the Landing, Roeder et al., 2017 (arXiv:1703.09194); Robust, Accurate Stochastic
        Optimization for Variational Inference, Dhaka et al., 2020 (arXiv:2009.00666).

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        ...     pyro.sample("y", dist.Normal(mean, 1.0).expand(y.shape).to_event(1), obs=y)
        >>> posterior = fit_posterior(model, torch.tensor([1.0, 2.0, 3.0]), max_steps=100, seed=0)
        >>> posterior.verdict, round(float(posterior.draws(1000)["mean"].mean()), 1)
        ('trust', 2.0)
    """
    if log_density is not None:
        model, init = _model_of(model, log_density, start, supports), start if init == "auto" and start else init
    if model is None:
        raise TypeError("expected a model, or log_density= and start=; got neither")
    check_model(model)
    _check_argument_names(model)
    check_sizes(num_draws=num_draws, max_steps=max_steps)
    check_number("max_seconds", max_seconds, "(0, inf)", optional=True)
    check_option("refine", refine, ("auto", "never"))
    device = device_of(args, kwargs, start or {})
    distributed.initialize(device)
    with seeded(seed), distributed.together(device), Watch(max_seconds, progress) as watch:
        if num_draws < distributed.world_size():
            raise ValueError(f"expected at least one draw in a step for each process; got num_draws={num_draws}")
        enumerated = config_enumerate(model)
        log_joint = LogJoint(enumerated, args, kwargs, start=start_of(init))
        refuse_randomness(log_joint)
        if log_joint.dim > _FEW and log_joint.hierarchical:
            log_joint = non_centred(log_joint)
        is_large = log_joint.dim > _MANY and refine == "auto" and init == "auto"
        layers: dict[str, Any] = {"num_layers": _SHALLOW} if flow is realnvp and log_joint.dim > 1 else {}
        make = partial(AutoFlow, enumerated, flow, "none" if is_large else init, **layers)
        guide = make(log_joint=log_joint, out_of_time=partial(watch.is_over, share=_START_SHARE))
        require_log_joint(guide)
        guide_fit = GuideFit(guide, log_joint, num_draws, watch)
        trains = refine == "never" or not guide_fit.starts_far_off()
        if trains:
            if log_joint.hierarchical and log_joint.dim <= _FEW and not guide_fit.starts_well():
                guide = _in_best_coordinates(guide, make, watch)
                log_joint = require_log_joint(guide)
                guide_fit = GuideFit(guide, log_joint, num_draws, watch)
            guide_fit.find_learning_rate()
            guide_fit.run_stages(max_steps)
            guide = guide_fit.guide
        evaluations = log_joint.evaluations
        weights = importance_sample(guide, log_joint, guide_fit.affordable_draws() if trains else _MIN_DRAWS)
        posterior = Posterior(guide, guide_fit.results, [*notes_on(log_joint), *guide_fit.notes], weights=weights)
        if refine == "auto" and posterior.verdict == "do not trust":
            posterior, evaluations = _refined(posterior, watch), log_joint.evaluations
        posterior.evaluations = evaluations
        posterior.seconds = watch.seconds()
        return posterior


def _in_best_coordinates(guide: AutoFlow, make: Callable[..., AutoFlow], watch: Watch) -> AutoFlow:
    """Return a guide that starts at the best Gaussian in centred, non-centred, or partly centred coordinates."""
    guides, out_of_time = [guide], partial(watch.is_over, share=_START_SHARE)
    straight = non_centred(require_log_joint(guide))
    guides.append(make(log_joint=straight, out_of_time=out_of_time))
    factor = guides[-1].inits[0].scale_tril
    precision = torch.cholesky_inverse(factor).diagonal()
    centring = best_centring(straight, precision)
    if any((value > _CENTRED).any() for value in centring.values()) and not out_of_time("searching for coordinates"):
        guides.append(make(log_joint=recentred(straight, centring), out_of_time=out_of_time))
    return max(guides, key=lambda guide: guide.inits[0].elbo)


def _refined(posterior: Posterior, watch: Watch) -> Posterior:
    """Return the posterior by an ensemble of chains; the guide's own if there is no time for them."""
    if watch.is_over("refining"):
        return posterior
    guide, log_joint = posterior.guide, posterior.log_joint
    ensemble = refine_by_ensemble(guide, log_joint, posterior.weights, posterior.missed, watch)
    if ensemble.complete:
        return posterior_by_chains(guide, log_joint, ensemble, watch, posterior.results)
    notes = [*posterior.notes, "the chains ended at max_seconds before they had reached the posterior"]
    return Posterior(guide, posterior.results, notes, weights=posterior.weights, missed=posterior.missed)


def _model_of(model: Model | None, log_density: Callable[..., Tensor], start: Any, supports: Any) -> Model:
    if model is not None:
        raise TypeError(f"expected a model or log_density=; got both, and the model {model!r}")
    if start is None:
        raise TypeError("expected start={parameter: value} beside log_density=; got none")
    return density_model(log_density, start, supports)


def _check_argument_names(model: Model) -> None:
    """Refuse a model with arguments that are named like options of fit_posterior."""
    options = set(inspect.getfullargspec(fit_posterior).kwonlyargs)
    try:
        bound = model.keywords if isinstance(model, functools.partial) else ()
        taken = sorted(options & set(inspect.signature(model).parameters).difference(bound))
    except (TypeError, ValueError):
        return
    if taken:
        got = f"{', '.join(map(repr, taken))}: bind them by functools.partial"
        raise ValueError(f"expected a model whose arguments have other names than fit_posterior's options; got {got}")


class _RankSlice(Prior):
    """A prior of which each process draws its slice of the latents that all processes draw alike."""

    def __init__(self, prior: Prior):
        super().__init__(prior.event_shape)
        self.prior = prior

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with distributed.shared_rng():
            return self.prior.rsample(sample_shape)[distributed.rank_slice(sample_shape[0])]

    def log_prob(self, z: Tensor) -> Tensor:
        return self.prior.log_prob(z)


class GuideFit:
    """The fit of a guide: a search for a learning rate, then stages until the guide has converged."""

    def __init__(self, guide: AutoFlow, log_joint: LogJoint, num_draws: int, watch: Watch):
        self.log_joint, self.num_draws, self.watch = log_joint, num_draws, watch
        self._take(guide)
        self.learning_rate, self.label, self.is_settled = 3e-3, "", False
        self.results: list[FitResult] = []
        self.notes: list[str] = []
        self.seconds_per_draw = 0.0  # to compute the weights from

    def _take(self, guide: AutoFlow) -> None:
        self.guide, self.flow = guide, guide.require_flow()
        self.rank_flow = Flow(_RankSlice(self.flow.prior), self.flow.layers)

    def starts_far_off(self) -> bool:
        """Whether there are many latents, and the Gaussian at which the guide starts is of no use."""
        if self.log_joint.dim <= _FEW:
            return False
        return self.log_joint.dim > _MANY or self._evaluate(1000)[1] > _FAR_OFF

    def starts_well(self) -> bool:
        """Whether little is left to gain from the Gaussian at which the guide starts."""
        return self._has_little_to_gain(self._weights(), self._evaluate(1000)[1])

    def find_learning_rate(self) -> None:
        """Choose the learning rate whose short run ends at the best ELBO, and keep the weights of that run.

        Nothing is run once little is left to gain.
        """
        initial = self._weights()
        began = self.watch.seconds()
        self._evaluate(_MIN_DRAWS)
        self.seconds_per_draw = (self.watch.seconds() - began) / _MIN_DRAWS
        number_of_draws = self.affordable_draws(1000)
        floor, best_spread, _ = self._evaluate(number_of_draws)
        best = floor, _RATES[-1], initial
        for number, rate in enumerate(_RATES, 1):
            if number > 3 and best[0] > floor:
                break  # the smaller rates are for posteriors on which the usual ones make the initial guide worse
            self.is_settled = self._has_little_to_gain(best[2], best_spread)
            if self.is_settled or self._is_over():
                break
            self.flow.load_state_dict(initial)
            self._fit(100, rate, f"learning rate {number}")
            elbo, spread, _ = self._evaluate(number_of_draws)
            if elbo > best[0]:
                best, best_spread = (elbo, rate, self._weights()), spread
        if best[0] == -math.inf and not self._is_over():
            self.notes.append("no learning rate gave a finite ELBO")
        self.learning_rate = best[1]
        self.flow.load_state_dict(best[2])

    def run_stages(self, max_steps: int) -> None:
        """Train until the guide has converged."""
        steps, size = 0, 500
        if self._is_over():
            self.notes.append(f"the fit ended at max_seconds={self.watch.max_seconds:g}")
            return
        if self.is_settled:
            return
        elbo, spread, moments = self._evaluate(4000)
        while steps < max_steps and not self._has_little_to_gain(self._weights(), spread, trained=steps > 0):
            if self.guide.options.get("num_layers") == _SHALLOW and (steps or spread > _HARD):
                self._take(deepened(self.guide, _DEEP))
            size = min(size, max_steps - steps)
            weights, before = self._weights(), (elbo, spread, moments)
            self._fit(size, self.learning_rate, f"steps {steps} to {steps + size}")
            steps += size
            elbo, spread, moments = self._evaluate(4000)
            is_worse = not elbo > before[0] - 0.05
            if is_worse:  # back to where the stage began, and smaller steps
                self.flow.load_state_dict(weights)
                (elbo, spread, moments), self.learning_rate = before, self.learning_rate / 3
            if self._is_over():
                self.notes.append(f"the fit ended at max_seconds={self.watch.max_seconds:g}")
                break
            if is_worse and self.learning_rate >= 1e-5:
                continue
            drift = max(float((new - old).abs().max()) for new, old in zip(moments, before[2], strict=True))
            size *= 2
            if is_worse or spread < _CONVERGED or (spread > 0.8 * before[1] and drift < 0.05):
                break
        else:
            if steps >= max_steps and spread > _ENOUGH[0]:
                self.notes.append(f"the fit ended at max_steps={max_steps}, perhaps before it had converged")

    def _has_little_to_gain(self, weights: Mapping[str, Tensor], spread: float, *, trained: bool = False) -> bool:
        """Whether draws of the flow with these weights are right, by the sites as users read them too.

        After a stage less is enough, since the next would take twice its time.
        """
        most, least_ess, error = _ENOUGH if trained else (_CONVERGED, 0.99, _SMALL_ERROR)
        if spread >= most:
            return False
        self.flow.load_state_dict(weights)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found = importance_sample(self.guide, self.log_joint, _FEW_DRAWS)
        return found.ess_ratio >= least_ess and max(found.mean_error, found.sd_error) <= error and not found.tail

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.flow.state_dict().items()}

    def _time_left(self) -> float | None:
        """Return the seconds left for training, without those for the verdict; None without a limit."""
        if self.watch.max_seconds is None:
            return None
        verdict = min(_VERDICT_SHARE * self.watch.max_seconds, _NUM_DRAWS * self.seconds_per_draw)
        return self.watch.max_seconds - verdict - self.watch.seconds()

    def _is_over(self) -> bool:
        left = self._time_left()
        return left is not None and left <= 0

    def affordable_draws(self, most: int = _NUM_DRAWS) -> int:
        """Return a number of draws that a fourth of the time left pays for: a verdict asks for about four runs each."""
        if self.watch.max_seconds is None or not self.seconds_per_draw:
            return most
        left = max(self.watch.max_seconds - self.watch.seconds(), 0.0)
        return int(min(max(left / self.seconds_per_draw / 4, _MIN_DRAWS), most))

    def _fit(self, steps: int, learning_rate: float, label: str) -> None:
        self.watch.hide()  # the fit shows a bar of its own
        self.label = label
        result = fit(
            self.flow,
            None,
            objective=self._less_noisy_objective(),
            epochs=max(1, steps // 50),
            learning_rate=learning_rate,
            max_seconds=None if (left := self._time_left()) is None else max(left, 0.01),
            device=self.flow.device.type,
            options=FitOptions(steps_per_epoch=min(50, steps), ema_decay=0.998, max_grad_norm=10.0),
            progress=label if self.watch.progress is None else self.watch.progress,
        )
        self.results.append(result)
        self.watch.says(label)

    def _less_noisy_objective(self) -> Callable[..., Tensor]:
        """Return the objective, by the total or the path gradient, whose gradient has the smaller variance now."""
        parameters = list(self.flow.parameters())
        variances = {}
        for objective in (self.total, self.path):
            gradients = []
            for _ in range(_GRADIENTS):
                if self._is_over():
                    return self.total
                gradient = torch.cat([g.flatten() for g in torch.autograd.grad(objective(), parameters)])
                gradients.append(distributed.all_reduce(gradient) / distributed.world_size())
            variance = float(torch.stack(gradients).var(0).sum())
            variances[objective] = variance if math.isfinite(variance) else math.inf
        return min(variances, key=lambda objective: variances[objective])

    def total(self, *_: Any) -> Tensor:
        """Return the negative ELBO with its total gradient."""
        self.watch.says(self.label)
        u, log_q = self.rank_flow.rsample_and_log_prob(self.num_draws)
        log_p, score = self.log_joint.value_and_score(u)
        return self._loss(u, log_p, log_q, (score * (u - u.detach())).sum(-1) - (log_q - log_q.detach()))

    def path(self, *_: Any) -> Tensor:
        """Return the negative ELBO with its path gradient, which has no variance if guide and posterior agree."""
        self.watch.says(self.label)
        u, log_q, score_q = self.rank_flow.rsample_and_score(self.num_draws)
        log_p, score = self.log_joint.value_and_score(u)
        return self._loss(u, log_p, log_q, ((score - score_q) * (u - u.detach())).sum(-1))

    def _loss(self, u: Tensor, log_p: Tensor, log_q: Tensor, gradient: Tensor) -> Tensor:
        """Return the loss: the negative ELBO of the draws that have a density, and the cost of those that have none."""
        finite = log_p.isfinite()
        elbo = torch.where(finite, log_p - log_q.detach() + gradient, 0.0)
        number = distributed.all_reduce(finite.sum()).clamp(min=1) / distributed.world_size()
        loss = -elbo.sum() / number
        if not finite.all():
            # No path leads back to the support; the probability of such draws has a gradient by their log-density.
            log_q = self.flow.log_prob(u[~finite].detach())
            loss = loss + _OFF_SUPPORT / len(u) * (1 + log_q - log_q.detach()).sum()
        return loss

    @torch.no_grad()
    def _evaluate(self, num_draws: int) -> tuple[float, float, tuple[Tensor, Tensor]]:
        """Return the ELBO less its error, the spread of the log weights, and means and deviations in whitened units."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            u, log_q = self.flow.rsample_and_log_prob(num_draws)
        log_w = self.log_joint.value(u) - log_q
        whitening: Any = self.flow.layers[-1]
        centred = u - whitening.loc
        if whitening.diagonal:
            x = centred / whitening.scale
        else:
            x = torch.linalg.solve_triangular(whitening.scale.T, centred, upper=True, left=False)
        finite = log_w[log_w.isfinite()]
        if len(finite) < 2:
            return -math.inf, math.inf, (x.mean(0), x.std(0))
        spread, cost = float(finite.std()), _OFF_SUPPORT * (1 - len(finite) / len(log_w))
        return float(finite.mean()) - spread / len(finite) ** 0.5 - cost, spread, (x.mean(0), x.std(0))
