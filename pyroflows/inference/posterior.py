"""A fitted posterior: draws, a verdict, ArviZ, predictions, Markov chains, files."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyroflows.arguments import check_sizes
from pyroflows.contexts import seeded
from pyroflows.flow import Flow
from pyroflows.inference.guide import AutoFlow
from pyroflows.inference.importance import (
    Weights,
    diagnose,
    importance_sample,
    missed_modes,
    resample,
    summarize_weights,
)
from pyroflows.inference.inference_data import chain_statistics, diagnose_chains, inference_data
from pyroflows.inference.log_joint import LogJoint
from pyroflows.inference.neutra import run_chains
from pyroflows.inference.posterior_file import read_guide, write_guide
from pyroflows.training import FitResult

__all__ = ["Posterior", "require_log_joint"]

_NUM_DRAWS = 10_000  # of a guide, to compute the weights from


def require_log_joint(guide: AutoFlow) -> LogJoint:
    """Return the log joint density of a guide's model; refuse one that is not of all data, or has parameters."""
    if not isinstance(guide, AutoFlow):
        raise TypeError(f"expected an AutoFlow; got {type(guide).__name__}")
    guide.require_flow()
    log_joint = guide.log_joint
    if log_joint is None:
        raise ValueError("expected a guide with its model; got one without, as after unpickling")
    if subsampled := log_joint.structure.subsampled:
        raise ValueError(
            f"expected a model of all its data; got the subsampled plate {', '.join(map(repr, subsampled))}: "
            f"leave subsample_size out, or train an AutoFlow by SVI"
        )
    if parameters := log_joint.structure.parameters:
        raise ValueError(
            f"expected a model without parameters of its own, which a posterior does not train; got "
            f"{', '.join(map(repr, parameters))}: train them by SVI with an AutoFlow"
        )
    return log_joint


class Posterior:
    """A fitted posterior: its draws, a verdict on them, and predictions.

    Args:
        guide: the guide, built and trained.
        results: of the fits that trained it.
        notes: events during them that the reason should mention.
        chains: draws of Markov chains in unconstrained space, ``(chains, draws, latents)``, if the posterior is theirs
            instead of the guide's.
        weights: importance weights of the guide's draws; by default computed from new draws.
        missed: modes that the guide does not cover; by default searched for.

    Attributes:
        log_joint: the density of the model.
        verdict: "trust", "resample" (use the draws of :meth:`resampled`, not those of :meth:`draws`) or "do not trust".
        reason: of the verdict.
        weights: importance weights of the guide's draws; None for chains.
        seconds: wall time of the fit.
        evaluations: number of evaluations of the model's density in the fit, without those for the verdict.
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
        self.log_joint = require_log_joint(guide)
        self.seconds, self.evaluations = math.nan, 0
        self.weights: Weights | None = None
        self.missed = list(missed or ())
        if chains is None:
            self.weights = weights or importance_sample(guide, self.log_joint, _NUM_DRAWS)
            if missed is None:
                self.missed = missed_modes(guide, self.log_joint, self.weights)
            self.verdict, self.reason = diagnose(self.weights, self.missed, self.notes)
        else:
            self.verdict, self.reason = diagnose_chains(chains)

    # Diagnostics

    @property
    def elbo(self) -> float:
        """The evidence lower bound, in nats."""
        return self._require_weights().elbo

    @property
    def elbo_error(self) -> float:
        """The standard error of :attr:`elbo`."""
        return self._require_weights().elbo_error

    @property
    def log_evidence(self) -> float:
        """The log evidence by importance sampling, in nats."""
        return self._require_weights().log_evidence

    @property
    def log_evidence_error(self) -> float:
        """The standard error of :attr:`log_evidence`."""
        return self._require_weights().log_evidence_error

    @property
    def khat(self) -> tuple[float, ...]:
        """The Pareto shapes of the importance weights, over several sets of draws."""
        return self._require_weights().khat

    @property
    def ess(self) -> float:
        """The effective number of draws: by Kish's formula for weights, the smallest over the latents for chains."""
        return self._chain_statistics()[1] if self.weights is None else self.weights.ess

    @property
    def rhat(self) -> float:
        """The largest split R-hat of chains."""
        return self._chain_statistics()[0]

    def _require_weights(self) -> Weights:
        if self.weights is None:
            raise ValueError("expected a posterior by a guide, whose draws have weights; got one by Markov chains")
        return self.weights

    def _chain_statistics(self) -> tuple[float, float]:
        if self.chains is None:
            raise ValueError("expected a posterior by Markov chains; got one by a guide")
        return chain_statistics(self.chains)

    # Draws

    def draws(self, n: int = 1000) -> dict[str, Tensor]:
        """Draw values of the sites, each ``(n, *shape)``: the guide's own, or at random from the chains."""
        return self.log_joint.constrain(self._draw(n))

    def resampled(self, n: int = 1000) -> dict[str, Tensor]:
        """Draw values of the sites, each ``(n, *shape)``, with the guide's error corrected by smoothed weights (PSIS).

        References:
            Pareto Smoothed Importance Sampling, Vehtari et al., 2024 (arXiv:1507.02646).
        """
        return self.log_joint.constrain(self._resample(n))

    def _draw(self, n: int) -> Tensor:
        check_sizes(n=n)
        if self.chains is None:
            return self.guide.require_flow().sample(n)
        flat = self.chains.flatten(0, 1)
        if n > len(flat):
            raise ValueError(f"expected at most {len(flat)} draws, the number that the chains hold; got n={n}")
        return flat[torch.randperm(len(flat))[:n]]

    def _resample(self, n: int) -> Tensor:
        check_sizes(n=n)
        pool = self.weights
        if pool is None:
            return self._draw(n)
        if 2 * n > len(pool.u):
            pool = importance_sample(self.guide, self.log_joint, 2 * n)
        return resample(pool, n)

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the guide's log-density of the sites' values, see :meth:`AutoFlow.log_prob`."""
        return self.guide.log_prob(values)

    def predictive(self, *args: Any, num_draws: int = 1000, **kwargs: Any) -> dict[str, Tensor]:
        """Draw what the model would observe, each site ``(num_draws, *shape)``.

        Args:
            args: arguments of the model, such as new inputs; by default those of the fit. Observations among them are
                replaced by draws.
            num_draws: the number of draws; resampled ones if the verdict is "resample".
            kwargs: keyword arguments of the model.
        """
        check_sizes(num_draws=num_draws)
        if not args and not kwargs:
            args, kwargs = self.log_joint.args, self.log_joint.kwargs
        u = self._resample(num_draws) if self.verdict == "resample" else self._draw(num_draws)
        return self.log_joint.predict(u, args, kwargs)

    def to_arviz(self, num_draws: int = 4000, *, resample: bool | None = None) -> Any:
        """Return draws, log-likelihoods, observations and sample statistics as ArviZ holds them.

        Args:
            num_draws: of a guide, in four groups in place of chains, or in one if they are few; Markov chains are
                returned whole.
            resample: whether the draws are resampled by their weights; by default if the verdict is "resample".

        Returns:
            ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (1.x): "posterior" with deterministic sites,
            "log_likelihood" if the model has observations and no discrete latents, "sample_stats" with "lp" and, for
            the guide's own draws, "log_q" and the smoothed, normalised "log_weight"; "observed_data".
        """
        check_sizes(num_draws=num_draws)
        if self.chains is not None:
            return inference_data(self.log_joint, self.chains.flatten(0, 1), len(self.chains), None)
        num_chains = 4 if num_draws >= 16 else 1
        resample = self.verdict == "resample" if resample is None else resample
        number = -(-num_draws // num_chains) * num_chains
        u = self._resample(number) if resample else self._draw(number)
        return inference_data(self.log_joint, u, num_chains, None if resample else self.guide.require_flow())

    def summary(self, num_draws: int = 4000) -> Any:
        """Return ArviZ's table of the sites: means, standard deviations, intervals, R-hat and effective sizes."""
        import arviz as az

        return az.summary(self.to_arviz(num_draws))

    def refine(
        self,
        *,
        num_chains: int = 4,
        num_draws: int = 250,
        num_warmup: int = 200,
        seed: int | None = None,
        progress: bool | None = None,
    ) -> "Posterior":
        """Run NUTS in the latent space of the flow, where the posterior is nearly standard normal; return the result.

        Args:
            num_chains: number of chains, run one after the other, each from a draw of the guide or a mode it misses.
            num_draws: of each chain.
            num_warmup: steps of each chain that adapt it.
            seed: seeds the chains, and restores torch's generator afterwards; None uses the global generator.
            progress: whether to show Pyro's bars; by default only on a terminal.

        References:
            NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural Transport, Hoffman et al., 2019
            (arXiv:1903.03704).
        """
        check_sizes(num_chains=num_chains, num_draws=num_draws, num_warmup=num_warmup)
        began = time.perf_counter()
        with seeded(seed):
            starts = torch.cat([*(mode[None] for mode in self.missed), self._draw(num_chains)])[:num_chains]
            chains = run_chains(self.guide, starts, num_draws, num_warmup, progress)
        refined = Posterior(self.guide, self.results, self.notes, chains=chains)
        refined.seconds = time.perf_counter() - began
        return refined

    def save(self, path: str | Path) -> None:
        """Write the guide's flow, and the weighted draws or the chains, as one safetensors file."""
        weights = self.weights
        draws: Any = {"u": weights.u, "log_weights": weights.log_weights} if weights else {"chains": self.chains}
        if self.missed:
            draws["missed"] = torch.stack(self.missed)
        write_guide(path, self.guide, self.log_joint, draws, notes=self.notes, seconds=self.seconds)

    @staticmethod
    def load(
        path: str | Path,
        model: Callable[..., Any],
        *args: Any,
        flow: Callable[..., Flow] | Flow | None = None,
        **kwargs: Any,
    ) -> "Posterior":
        """Read what :meth:`save` wrote, with the model and its arguments, which no file holds.

        Args:
            path: of the file.
            model: the model that was fitted.
            args: its arguments.
            flow: the ready flow or the builder that the guide was made with; needed only if a part of it is of a class
                of the user's own.
            kwargs: its keyword arguments.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a posterior, is damaged, or belongs to another model, data or flow.
        """
        guide, draws, header = read_guide(path, model, args, kwargs, flow)
        chains, missed = draws.get("chains"), list(draws.get("missed", ()))
        weights = (
            summarize_weights(require_log_joint(guide), draws["u"], draws["log_weights"]) if chains is None else None
        )
        posterior = Posterior(guide, (), header["notes"], chains=chains, weights=weights, missed=missed)
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
