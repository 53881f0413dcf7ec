"""Fit the posterior of any Pyro model in one call: the search for a learning rate, and the stages."""

from __future__ import annotations

import functools
import inspect
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.infer.enum import config_enumerate
from torch import Size, Tensor

from pyroflows import distributed
from pyroflows.arguments import check_number, check_sizes
from pyroflows.contexts import seeded
from pyroflows.flow import Flow
from pyroflows.inference.guide import AutoFlow
from pyroflows.inference.log_joint import LogJoint, device_of
from pyroflows.inference.posterior import Posterior, whole_log_joint
from pyroflows.models import realnvp
from pyroflows.training import FitOptions, FitResult, fit

__all__ = ["fit_posterior"]

_RATES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
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

    Under ``torchrun`` the processes share the draws of each step, and come to the same posterior as one process but for
    rounding. All are to be given the same model and data, on the device of each.

    Args:
        model: a Pyro model; discrete latents are summed out.
        args: its arguments.
        flow: builder of the flow, or a ready one, as in :class:`AutoFlow`.
        init: the Gaussian to start at, as in :class:`AutoFlow`.
        num_draws: draws a step, over all processes.
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
    device = device_of(args, kwargs)
    distributed.initialize(device)
    with seeded(seed), distributed.together(device):
        if num_draws < distributed.world_size():
            raise ValueError(f"expected at least a draw a step for each process; got num_draws={num_draws}")
        guide = AutoFlow(config_enumerate(model), flow, init, args=args, kwargs=kwargs)
        log_joint = whole_log_joint(guide)
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


@contextmanager
def _own_draws(flow: Flow) -> Iterator[None]:
    """Have this process's part of the prior's draws in the place of all, which all processes draw alike."""
    if distributed.world_size() == 1:
        yield
        return
    whole = flow.prior.rsample

    def own(shape: Size) -> Tensor:
        with distributed.shared_rng():
            return whole(shape)[distributed.rank_slice(shape[0])]

    object.__setattr__(flow.prior, "rsample", own)
    try:
        yield
    finally:
        object.__delattr__(flow.prior, "rsample")


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
        return self.max_seconds is not None and self._seconds() >= self.max_seconds

    def _seconds(self) -> float:
        return float(distributed.broadcast(time.perf_counter() - self.began))

    def _fit(self, steps: int, rate: float, label: str) -> None:
        left = None if self.max_seconds is None else max(self.max_seconds - self._seconds(), 0.01)
        result = fit(
            self.flow,
            None,
            objective=self._quieter(),
            epochs=max(1, steps // 50),
            learning_rate=rate,
            max_seconds=left,
            device=self.flow.device.type,
            options=FitOptions(steps_per_epoch=min(50, steps), ema_decay=0.998, max_grad_norm=10.0),
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
                gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
                rows.append(distributed.all_reduce(gradient) / distributed.world_size())
            noise = float(torch.stack(rows).var(0).sum())
            spread[objective] = noise if math.isfinite(noise) else math.inf
        return min(spread, key=lambda objective: spread[objective])

    def total(self, flow: Any, *_: Any) -> Tensor:
        """The negative ELBO with its total gradient."""
        with _own_draws(flow):
            u, log_q = flow.rsample_and_log_prob(self.num_draws)
        log_p, score = self.log_joint.value_and_score(u)
        fine = log_p.isfinite()
        return self._loss(log_p, log_q, (score * (u - u.detach())).sum(-1) - (log_q - log_q.detach()), fine)

    def path(self, flow: Any, *_: Any) -> Tensor:
        """The negative ELBO with its path gradient, which is without noise where guide and posterior agree."""
        with _own_draws(flow):
            u, log_q, score_q = flow.rsample_and_score(self.num_draws)
        log_p, score = self.log_joint.value_and_score(u)
        fine = log_p.isfinite()
        return self._loss(log_p, log_q, ((score - score_q) * (u - u.detach())).sum(-1), fine)

    @staticmethod
    def _loss(log_p: Tensor, log_q: Tensor, gradient: Tensor, fine: Tensor) -> Tensor:
        """A draw without a density gives no gradient; a batch of such draws gives a loss that is not finite."""
        value = torch.where(fine, log_p - log_q.detach() + gradient, 0.0)
        return -value.sum() / (distributed.all_reduce(fine.sum()) / distributed.world_size())

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
