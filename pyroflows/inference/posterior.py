"""A fitted posterior: draws, a verdict, ArviZ, predictions, Markov chains, files."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pyro.infer.enum import config_enumerate
from torch import Tensor

from pyroflows.arguments import check_sizes
from pyroflows.contexts import seeded
from pyroflows.diagnostics.weights import psis
from pyroflows.files import read, write
from pyroflows.flow import Flow
from pyroflows.inference.guide import AutoFlow
from pyroflows.inference.log_joint import LogJoint
from pyroflows.inference.neutra import run_chains
from pyroflows.inference.weights import CHUNK, SETS, Weights, judge, missed_modes, weigh, weights_of
from pyroflows.recipe import describe, is_plain, load_state, restore
from pyroflows.training import FitResult

__all__ = ["Posterior", "whole_log_joint"]


def whole_log_joint(guide: AutoFlow) -> LogJoint:
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
        self._log_joint = whole_log_joint(guide)
        self.seconds = math.nan
        self.evaluations = 0
        self.weights: Weights | None = None
        self.missed = list(missed or ())
        if chains is None:
            self.weights = weights or weigh(guide, self._log_joint, SETS * CHUNK)
            if missed is None:
                self.missed = missed_modes(guide, self._log_joint, self.weights)
            self.verdict, self.reason = judge(self.weights, self.missed, self.notes)
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

    def _chains(self) -> Tensor:
        if self.chains is None:
            raise ValueError("expected a posterior by Markov chains; got one by a guide")
        return self.chains

    def _chain_statistics(self) -> tuple[float, float]:
        chains = self._chains().cpu().numpy()
        import arviz as az

        data = _inference_data({"posterior": {"u": chains}})
        rhat, ess = az.rhat(data), az.ess(data)
        return float(_dataset(rhat)["u"].max()), float(_dataset(ess)["u"].min())

    def _judge_chains(self) -> tuple[str, str]:
        rhat, ess = self._chain_statistics()
        number = len(self._chains())
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
            pool = weigh(self.guide, self._log_joint, 2 * n)
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
                stats["log_q"] = torch.cat([self.guide.flow.log_prob(part) for part in u.split(CHUNK)])
            if len(u) >= 32:
                stats["log_weight"] = psis(lp - stats["log_q"])[0]
        groups: dict[str, Any] = {"posterior": joint.constrain(u, deterministic=True), "sample_stats": stats}
        if joint.observations and not joint.enumerated:
            with torch.no_grad():
                parts = [joint.log_likelihood(part) for part in u.split(CHUNK)]
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
        with seeded(seed):
            places = torch.cat([*(mode[None] for mode in self.missed), self._draw(num_chains)])[:num_chains]
            chains = run_chains(self.guide, places, num_draws, num_warmup, progress)
        refined = Posterior(self.guide, self.results, self.notes, chains=chains)
        refined.seconds = time.perf_counter() - began
        return refined

    # Files

    def save(self, path: str | Path) -> None:
        """Write the guide's flow, the weighed draws or chains, and what they are of, as one safetensors file."""
        flow: Flow = self.guide.flow
        try:
            recipe, tensors = describe(flow, own=False)
        except ValueError:  # a part of the user's own, whose builder has to be given again
            recipe, tensors = None, {f"state.{name}": value for name, value in flow.state_dict().items()}
        header = {
            "recipe": recipe,
            "options": {name: value for name, value in self.guide._recipe[1].items() if is_plain(value)},
            "max_triangular": self.guide.max_triangular,
            "latents": [[site.name, list(site.shape)] for site in self.guide.latents],
            "notes": self.notes,
            "seconds": self.seconds,
        }
        if self.chains is not None:
            tensors["chains"] = self.chains
        else:
            weights = self._weights()
            tensors |= {"u": weights.u, "log_weights": weights.log_weights}
        tensors["log_joint"] = self._log_joint.value(_few_of(tensors))
        if self.missed:
            tensors["missed"] = torch.stack(self.missed)
        write(path, "posterior", header, tensors)

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
            flow: the ready flow or the builder that the guide was made with; needed only where a part of it is of a
                class of one's own.
            kwargs: its keyword arguments.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no posterior, or is damaged, or is one of another model or flow.
        """
        header, tensors = read(path, "posterior")
        if lacking := {"recipe", "options", "max_triangular", "latents", "notes", "seconds"} - header.keys():
            raise ValueError(f"expected a posterior written by save; got {path}, whose header lacks {min(lacking)}")
        if flow is None:
            flow, header["options"] = _flow_of(header, tensors)
        guide = AutoFlow(
            config_enumerate(model),
            flow,
            "none",
            max_triangular=header["max_triangular"],
            args=args,
            kwargs=kwargs,
            **({} if isinstance(flow, Flow) else header["options"]),
        )
        tensors = {name: value.to(guide.flow.device) for name, value in tensors.items()}
        latents = [[site.name, list(site.shape)] for site in guide.latents]
        if latents != header["latents"]:
            raise ValueError(f"expected a model with the latents {header['latents']}; got {latents}")
        state = {name.removeprefix("state."): v for name, v in tensors.items() if name.startswith("state.")}
        try:
            load_state(guide.flow, state, old=header["format"] < 3)
        except RuntimeError:
            raise ValueError(f"expected the flow that the posterior in {path} was fitted with; got another") from None
        if not torch.allclose(whole_log_joint(guide).value(_few_of(tensors)), tensors["log_joint"], 1e-4, 1e-3):
            raise ValueError(
                f"expected the model and the data that the posterior in {path} was fitted to; got others, by their "
                f"density at its draws"
            )
        weights = None
        if "chains" not in tensors:
            weights = weights_of(whole_log_joint(guide), tensors["u"], tensors["log_weights"])
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


def _flow_of(
    header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[Callable[..., Flow] | Flow, dict[str, Any]]:
    """Give what the guide in a file is to be made with: its flow, but for the layer that a guide adds, or a builder."""
    from pyroflows import models

    if header["recipe"] is not None:
        whole = restore(header["recipe"], tensors)
        if not isinstance(whole, Flow) or len(whole.layers) < 2:
            raise ValueError(f"expected the recipe of a guide's flow; got that of {type(whole).__name__}")
        return Flow(whole.prior, whole.layers[:-1]), {}
    if header.get("builder") not in models.__all__:  # as files of format 1 have
        raise ValueError(
            "expected flow=, since the posterior was fitted with a flow or a builder of the user's own; got none"
        )
    builder, options = getattr(models, header["builder"]), header["options"]
    if builder in (models.iaf, models.maf) and options.get("permutation", "reverse") == "reverse":
        options = {**options, "permutation": "shuffle"}  # a reversal was a layer then, whose order is in the file
    return builder, options


def _inference_data(groups: Mapping[str, Any]) -> Any:
    import arviz as az

    if "InferenceData" in vars(az):  # to ask ArviZ 1.x for it is to be warned
        return az.from_dict(**groups)
    return az.from_dict(dict(groups))


def _dataset(result: Any) -> Any:
    """ArviZ 1.x gives a tree where 0.x gives a dataset."""
    return result["posterior"] if "posterior" in getattr(result, "children", {}) else result
