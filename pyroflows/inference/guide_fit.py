"""The training of a guide by the ELBO: a search for a learning rate, then stages until it has converged."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyroflows import distributed
from pyroflows.flow import Flow
from pyroflows.inference.diagnosis import importance_sample
from pyroflows.inference.guide import AutoFlow, deepened
from pyroflows.inference.init import draws_and_densities, find_init
from pyroflows.inference.log_joint import LogJoint
from pyroflows.inference.sites import MANY_LATENTS
from pyroflows.inference.watch import Watch
from pyroflows.priors import Prior
from pyroflows.training import FitOptions, FitResult, fit

__all__ = ["FEW_TRAINED", "MIN_DRAWS", "SHALLOW", "GuideFit", "needs_chains"]

_RATES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
_CONVERGED = 0.1  # nats; the spread of the log weights at which stages end
# The spread, in nats, below which a guide is near. Guides are then compared by it, since half its square is what an
# ELBO lacks, with less noise than the ELBO has; above it, four couplings are too few.
_NEAR = 0.5
_LOSS = 0.05  # nats of the ELBO that may be noise
SHALLOW, _DEEP = 4, 8  # couplings of the default guide: at first, and after a stage
_FEW_DRAWS = 4000  # to judge draws by
_RIGHT, _ENOUGH = (0.1, 0.99, 0.05), (0.25, 0.94, 0.05)  # spread, ESS and errors that end a fit, and after a stage
_GRADIENTS = 8  # of each kind, to compare their variances
_VERDICT_SHARE = 0.25  # of the time, at most, to compute the weights from draws
_NUM_DRAWS, MIN_DRAWS = 10_000, 200  # to compute them from, and the least if time is short
_ALWAYS_TRAINED = 10  # latents, up to which stages mend what short runs do not
FEW_TRAINED = 50  # latents, up to which the ELBO leads to a good guide from anywhere
_FAR_OFF = 1.0  # nats; the spread of a Gaussian's log weights above which it does not from more
_USELESS = 10.0  # nats; the spread for the Gaussian at a mode above which no other is of use either
_OFF_SUPPORT = 100.0  # nats that a draw without a density costs


def needs_chains(log_joint: LogJoint, out_of_time: Callable[[str], bool]) -> bool:
    """Whether training would be in vain: of too many latents, or of many and a useless Gaussian at the mode.

    That Gaussian takes a small part of the search for a better one.
    """
    if not FEW_TRAINED < log_joint.dim <= MANY_LATENTS:
        return log_joint.dim > MANY_LATENTS
    try:
        gaussian = find_init(log_joint, "laplace", out_of_time=out_of_time)[0]
    except ValueError:  # no mode with a Hessian of full rank
        return True
    _, log_p, log_q = draws_and_densities(gaussian, log_joint)
    return not float((log_p - log_q).std()) < _USELESS  # NaN if a draw has no density


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
        self.learning_rate, self.label, self.is_settled, self.spread = 3e-3, "", False, math.inf
        self.results: list[FitResult] = []
        self.notes: list[str] = []
        self.seconds_per_draw = 0.0  # to compute the weights from

    def _take(self, guide: AutoFlow) -> None:
        self.guide, self.flow = guide, guide.require_flow()
        self.rank_flow = Flow(_RankSlice(self.flow.prior), self.flow.layers)

    @property
    def is_promising(self) -> bool:
        """Whether the ELBO is likely to lead to a good guide, by the short runs."""
        return self.log_joint.dim <= _ALWAYS_TRAINED or self.spread < _NEAR

    def starts_far_off(self) -> bool:
        """Whether there are many latents, and the Gaussian at which the guide starts is of no use."""
        if self.log_joint.dim <= FEW_TRAINED:
            return False
        return self._evaluate(1000)[1] > _FAR_OFF

    def starts_well(self) -> bool:
        """Whether little is left to gain from the Gaussian at which the guide starts."""
        self.is_settled = self._has_little_to_gain(self._weights(), self._evaluate(1000)[1])
        return self.is_settled

    def find_learning_rate(self) -> None:
        """Choose the learning rate whose short run ends at the best guide, and keep the weights of that run.

        Nothing is run once little is left to gain.
        """
        initial = self._weights()
        began = self.watch.seconds()
        self._evaluate(MIN_DRAWS)
        self.seconds_per_draw = (self.watch.seconds() - began) / MIN_DRAWS
        number_of_draws = self.affordable_draws(1000)
        best, best_spread, _ = self._evaluate(number_of_draws)
        best_rate, weights = None, initial
        self.is_settled = self.is_settled or self._has_little_to_gain(initial, best_spread)
        for number, rate in enumerate(_RATES, 1):
            if best_rate and (number > 3 or best_spread < _NEAR):
                break  # the smaller rates are for posteriors on which the usual ones make the initial guide worse
            if self.is_settled or self._is_over():
                break
            self.flow.load_state_dict(initial)
            self._fit(100, rate, f"learning rate {number}")
            elbo, spread, _ = self._evaluate(number_of_draws)
            are_near = max(spread, best_spread) < _NEAR and elbo > best - _LOSS
            if spread < best_spread if are_near else elbo > best:
                best, best_spread, best_rate, weights = elbo, spread, rate, self._weights()
                self.is_settled = self._has_little_to_gain(weights, best_spread)
        self.spread = best_spread
        if best == -math.inf and not self._is_over():
            self.notes.append("no learning rate gave a finite ELBO")
        self.learning_rate = best_rate or _RATES[-1]
        self.flow.load_state_dict(weights)

    def run_stages(self, max_steps: int) -> None:
        """Train until the guide has converged."""
        steps = 0
        if self.is_settled:
            return
        if self._is_over():
            self.notes.append(f"the fit ended at max_seconds={self.watch.max_seconds:g}")
            return
        elbo, spread, moments = self._evaluate(4000)
        size = 250 if spread < _NEAR else 500
        while steps < max_steps and not self._has_little_to_gain(self._weights(), spread, trained=steps > 0):
            if self.guide.options.get("num_layers") == SHALLOW and (steps or spread >= _NEAR):
                self._take(deepened(self.guide, _DEEP))
            size = min(size, max_steps - steps)
            weights, before = self._weights(), (elbo, spread, moments)
            self._fit(size, self.learning_rate, f"steps {steps} to {steps + size}")
            steps += size
            elbo, spread, moments = self._evaluate(4000)
            is_worse = not elbo > before[0] - _LOSS
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
            if is_worse or spread < _CONVERGED or (steps >= 500 and spread > 0.8 * before[1] and drift < 0.05):
                break
        else:
            if steps >= max_steps and spread > _ENOUGH[0]:
                self.notes.append(f"the fit ended at max_steps={max_steps}, perhaps before it had converged")

    def _has_little_to_gain(self, weights: Mapping[str, Tensor], spread: float, *, trained: bool = False) -> bool:
        """Whether draws of the flow with these weights are right, by the sites as users read them too.

        After a stage less is enough, since the next would take twice its time.
        """
        most, least_ess, error = _ENOUGH if trained else _RIGHT
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
        return int(min(max(left / self.seconds_per_draw / 4, MIN_DRAWS), most))

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
