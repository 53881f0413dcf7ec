"""A fitted posterior: draws, a verdict, ArviZ, predictions, Markov chains, files."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pyro.infer.enum import config_enumerate
from torch import Tensor

from pyroflows.arguments import check_number, check_option, check_sizes
from pyroflows.contexts import seeded
from pyroflows.files import read, write
from pyroflows.flow import Flow
from pyroflows.inference import diagnosis
from pyroflows.inference.arviz_groups import ArvizGroups, Coords, Dims
from pyroflows.inference.chains import Ensemble
from pyroflows.inference.coordinates import moved, non_centred, recentred, recentred_by_draws
from pyroflows.inference.diagnosis import Chains, Weights
from pyroflows.inference.guide import AutoFlow, Builder
from pyroflows.inference.learning import guide_of_draws, points_of_draws, with_evidence
from pyroflows.inference.log_joint import LogJoint, refuse_randomness
from pyroflows.inference.loo import loo
from pyroflows.inference.refine import REFINEMENTS, refine_by_ensemble, refine_by_nuts
from pyroflows.inference.sites import LatentSite, Model, ModelStructure, check_model
from pyroflows.inference.watch import Watch
from pyroflows.models import realnvp
from pyroflows.recipe import describe, is_plain, restore
from pyroflows.training import FitResult

__all__ = ["Posterior", "posterior_by_chains", "require_log_joint"]

_NUM_DRAWS = 10_000  # of a guide, to compute the weights from
_HEADER = {"recipe", "options", "max_triangular", "latents", "notes", "seconds", "chains"}  # of a file, at least


def require_log_joint(guide: AutoFlow) -> LogJoint:
    """Return the log joint density of a guide's model; refuse one that is not of all data, or has parameters."""
    if not isinstance(guide, AutoFlow):
        raise TypeError(f"expected an AutoFlow; got {type(guide).__name__}")
    guide.require_flow()
    log_joint = guide.log_joint
    if log_joint is None:
        raise ValueError("expected a guide with its model; got one without, as after unpickling")
    if subsampled := ", ".join(map(repr, log_joint.structure.subsampled)):
        got = f"the subsampled plate {subsampled}: leave subsample_size out, or train an AutoFlow by SVI"
        raise ValueError(f"expected a model of all its data; got {got}")
    if parameters := ", ".join(map(repr, log_joint.structure.parameters)):
        got = f"{parameters}: train them by SVI with an AutoFlow"
        raise ValueError(f"expected a model without parameters of its own, which a posterior does not train; got {got}")
    return log_joint


def _figure(name: str, doc: str) -> Any:
    """Return a property of a posterior: a figure of its weights or of its chains."""

    def figure(posterior: "Posterior") -> Any:
        source = posterior._sampled
        return getattr(source if hasattr(source, name) else posterior._weights(), name)

    return property(figure, doc=doc)


def _evidence_figure(index: int, doc: str) -> Any:
    """Return a property of a posterior: the error of its evidence, or what is wrong with it."""

    def figure(posterior: "Posterior") -> Any:
        if posterior._sampled:
            return posterior._sampled.evidence_error()[index]
        return posterior._weights().evidence_error(posterior.missed)[index]

    return property(figure, doc=doc)


def _from_draws(
    draws: Any,
    model: Model,
    *args: Any,
    flow: Builder | Flow = realnvp,
    max_seconds: float | None = None,
    seed: int | None = None,
    progress: bool | None = None,
    **kwargs: Any,
) -> "Posterior":
    """Return the posterior by draws of any sampler, with a flow fitted to them, and the evidence.

    Args:
        draws: values of each latent site, ``(draws, *shape)`` or ``(chains, draws, *shape)``, at least 50 of each
            chain; or ArviZ's data with a group "posterior". Draws of one chain are taken as in the order of a chain.
        model: the Pyro model of the draws.
        args, kwargs: its arguments.
        flow: builder of the flow, or a ready one, as in :class:`AutoFlow`.
        max_seconds: a limit of wall time for flow and evidence.
        seed: seeds both, and restores torch's generator afterwards; None uses the global generator.
        progress: whether to show bars, by default on a terminal only.

    Raises:
        TypeError: draws of another kind.
        ValueError: a site is missing or has another shape, a draw has no density under the model, or too few draws.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mean, 1.0).expand(y.shape).to_event(1), obs=y)
        >>> y = torch.tensor([0.5, 1.5, 1.0])
        >>> draws = {"mean": 0.75 + 0.5 * torch.randn(4, 500, generator=torch.Generator().manual_seed(0))}
        >>> posterior = Posterior.from_draws(draws, model, y, seed=0)
        >>> posterior.verdict, round(posterior.log_evidence, 1)
        ('trust', -4.1)
    """
    check_model(model)
    check_number("max_seconds", max_seconds, "(0, inf)", optional=True)
    with seeded(seed), Watch(max_seconds, progress) as watch:
        enumerated = config_enumerate(model)
        log_joint = LogJoint(enumerated, args, kwargs)
        refuse_randomness(log_joint)
        u = points_of_draws(log_joint, draws)
        if log_joint.hierarchical:
            straight = non_centred(log_joint)
            log_joint, flat = recentred_by_draws(straight, moved(u.flatten(0, 1), log_joint, straight))
            u = flat.view_as(u)
        chains = with_evidence(Chains.of(u), log_joint, watch)
        guide = AutoFlow(enumerated, flow, "none", log_joint=log_joint)
        posterior = posterior_by_chains(guide, log_joint, chains, watch)
    posterior.seconds = watch.seconds()
    return posterior


class Posterior:
    """A fitted posterior: its draws, a verdict on them, and predictions.

    Args:
        guide: the guide, built and trained.
        results: of the fits that trained it.
        notes: events during them that the reason should mention.
        chains: Markov chains, if the posterior is theirs instead of the guide's, or draws of a few in unconstrained
            space, ``(chains, draws, latents)``.
        weights: importance weights of the guide's draws; by default computed from new draws.
        missed: modes that the guide does not cover; by default searched for.

    Attributes:
        log_joint: the density of the model.
        verdict: "trust", "resample" (use the draws of :meth:`resampled`, not those of :meth:`draws`) or "do not trust".
        reason: of the verdict.
        weights: importance weights of the guide's draws; None for chains.
        chains: draws of the chains in unconstrained space, ``(chains, draws, latents)``; None for a guide.
        seconds: wall time of the fit.
        evaluations: number of evaluations of the model's density in the fit, without those for the verdict.
    """

    def __init__(
        self,
        guide: AutoFlow,
        results: Sequence[FitResult] = (),
        notes: Sequence[str] = (),
        *,
        chains: Chains | Ensemble | Tensor | None = None,
        weights: Weights | None = None,
        missed: Sequence[Tensor] | None = None,
    ):
        self.guide, self.results, self.notes = guide, list(results), list(notes)
        self._sampled = Chains.of(chains) if isinstance(chains, Tensor) else chains
        self.chains = self._sampled.u if self._sampled else None
        self.log_joint = require_log_joint(guide)
        self.seconds, self.evaluations = math.nan, 0
        self.weights: Weights | None = None
        self.missed = list(missed or ())
        if self._sampled is None:
            self.weights = weights or diagnosis.importance_sample(guide, self.log_joint, _NUM_DRAWS)
            if missed is None:
                self.missed = diagnosis.missed_modes(guide, self.log_joint, self.weights)
            self.verdict, reason = self.weights.verdict(self.missed)
        else:
            self.verdict, reason = self._sampled.verdict()
        self.reason = "; ".join([reason, *self.notes])

    # Diagnostics

    elbo = _figure("elbo", "The evidence lower bound, in nats.")
    elbo_error = _figure("elbo_error", "The standard error of :attr:`elbo`.")
    log_evidence = _figure("log_evidence", "The log evidence in nats, by importance or bridge sampling; see its note.")
    khat = _figure("khat", "The Pareto shapes of the importance weights, over several sets of draws.")

    log_evidence_error = _evidence_figure(0, "The standard error of :attr:`log_evidence`; infinite if it is unknown.")
    log_evidence_note = _evidence_figure(
        1, "What is wrong with :attr:`log_evidence`, such as a missed mode, or nothing."
    )

    @property
    def _ensemble(self) -> Ensemble | None:
        return self._sampled if isinstance(self._sampled, Ensemble) else None

    def _weights(self) -> Weights:
        if self.weights is None:
            raise ValueError("expected a posterior by a guide, whose draws have weights; got one by Markov chains")
        return self.weights

    @property
    def ess(self) -> float:
        """The effective number of draws: by Kish's formula for weights, the smallest over the latents for chains."""
        return self._sampled.ess if self._sampled else self._weights().ess

    @property
    def rhat(self) -> float:
        """The largest R-hat over the latents: nested for an ensemble of chains, split for a few of them."""
        if self._sampled is None:
            raise ValueError("expected a posterior by Markov chains; got one by a guide")
        return self._sampled.rhat

    # Draws

    def draws(self, n: int = 1000) -> dict[str, Tensor]:
        """Draw values of latent and deterministic sites, ``(n, *shape)``: the guide's, or at random from the chains."""
        return self._values(self._draw(n))

    def resampled(self, n: int = 1000) -> dict[str, Tensor]:
        """Draw values of the sites, each ``(n, *shape)``, by smoothed weights (:func:`psis`), which mend errors."""
        return self._values(_resample(self, n))

    @torch.no_grad()
    def _values(self, u: Tensor) -> dict[str, Tensor]:
        return self.log_joint.constrain(u, deterministic=bool(self.log_joint.structure.deterministic))

    def _draw(self, n: int) -> Tensor:
        check_sizes(n=n)
        if self.chains is None:
            return self.guide.require_flow().sample(n)
        flat = self.chains.flatten(0, 1)
        if n > len(flat):
            raise ValueError(f"expected at most {len(flat)} draws, the number that the chains hold; got n={n}")
        return flat[torch.randperm(len(flat), device=flat.device)[:n]]

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the guide's log-density of the sites' values, see :meth:`AutoFlow.log_prob`."""
        return self.guide.log_prob(values)

    def predictive(self, *args: Any, num_draws: int = 1000, **kwargs: Any) -> dict[str, Tensor]:
        """Draw what the model would observe, each site ``(num_draws, *shape)``.

        Args:
            args, kwargs: arguments of the model, such as new inputs; by default those of the fit. Observations among
                them are replaced by draws.
            num_draws: the number of draws; resampled ones if the verdict is "resample".
        """
        check_sizes(num_draws=num_draws)
        if not args and not kwargs:
            args, kwargs = self.log_joint.args, self.log_joint.kwargs
        u = _resample(self, num_draws) if self.verdict == "resample" else self._draw(num_draws)
        return self.log_joint.predict(u, args, kwargs)

    def to_arviz(
        self,
        num_draws: int = 4000,
        *,
        resample: bool | None = None,
        coords: Coords | None = None,
        dims: Dims | None = None,
        predictive: bool = True,
        likelihood_factors: Sequence[str] | Mapping[str, str] | None = None,
    ) -> Any:
        """Return draws, log-likelihoods, predictions and observations as ArviZ holds them, and warn of a bad posterior.

        Entries that are masked out are no observations: they are left out of every group but the posterior, where the
        others then are in one dimension, ``<site>_observed``. Scales of observations do not count.

        Args:
            num_draws: of a guide, in one chain, since they are independent; or about so many of an ensemble of chains,
                by leaving chains out. Those of NUTS are returned whole.
            resample: whether the draws are resampled by their weights; by default if the verdict is "resample".
            coords: labels along dimensions, by their names.
            dims: names of the dimensions of sites; by default plates name those that they make.
            predictive: whether to draw what the model would observe, at the draws of the latents.
            likelihood_factors: the ``pyro.factor`` statements that are log-likelihoods of data, as of censored ones:
                names, each a variable of its own, or ``{factor: site}`` to add each to that of an observed site. If
                the model has factors, log-likelihoods are left out until this is told.

        Returns:
            ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (1.x): "posterior" with deterministic sites,
            "log_likelihood", "posterior_predictive" and "observed_data" if the model has observations, "sample_stats"
            with "lp" and, for the guide's own draws, "log_q" and the smoothed, normalised "log_weight". The attributes
            of all have the verdict, its reason, and the figures of the weights or of the chains.
        """
        check_sizes(num_draws=num_draws)
        resample = self.verdict == "resample" if resample is None else resample
        groups = _arviz_groups(self, _select(self, num_draws, resample), resample, coords, dims)
        groups.add_sample_stats(None if self.weights is None or resample else self.guide.require_flow())
        groups.add_observations(predictive=predictive, factors=likelihood_factors)
        for note in [*_cautions(self, resample), *groups.notes]:
            warnings.warn(note, stacklevel=2)
        return groups.build()

    def summary(self, num_draws: int = 4000, *, coords: Coords | None = None, dims: Dims | None = None) -> Any:
        """Return ArviZ's table of the sites with the verdict, and warn of a posterior that is not to be trusted.

        A guide's draws are independent, and those of a bad guide too, so that neither R-hat nor an effective sample
        size of the draws says anything: "ess_weights" is that of the importance weights, of ``len(weights.u)`` draws.
        Of an ensemble of chains "ess" and "nested_rhat" are the smallest and the largest over all latents.

        Args:
            num_draws: of a guide, resampled by their weights if the verdict is "resample"; or of an ensemble.
            coords, dims: as in :meth:`to_arviz`.
        """
        return _summary(self, num_draws, coords, dims)

    def refine(
        self,
        method: str = "ensemble",
        *,
        num_chains: int | None = None,
        num_draws: int | None = None,
        num_warmup: int | None = None,
        max_seconds: float | None = None,
        seed: int | None = None,
        progress: bool | None = None,
    ) -> "Posterior":
        """Run Markov chains; return the posterior by their draws.

        "ensemble" (see :func:`pyroflows.inference.chains.run_ensemble`) anneals many particles from the scale of the
        prior to the posterior, lets each start a chain of Hamiltonian Monte Carlo, and finds the evidence too; if the
        chains do not converge, others follow in the latent space of the guide, if it is of use. "nuts" runs Pyro's NUTS
        there (see :func:`neutra`), one chain after the other, each from a draw of the guide or a mode that it misses.

        Args:
            method: "ensemble" or "nuts".
            num_chains: number of chains; a multiple of 4 and at least 16 of an ensemble, by the number of latents (4).
            num_draws: of each chain, by the number of chains (250).
            num_warmup: steps of each chain that adapt it, 50 (200).
            max_seconds: a limit of wall time; each chain of NUTS has an equal share of it.
            seed: seeds the chains, and restores torch's generator afterwards; None uses the global generator.
            progress: whether to show bars; by default only on a terminal. A line at most every ten seconds goes to the
                logger "pyroflows".

        Raises:
            ValueError: another method or size, or there was no time for draws of NUTS.
        """
        check_option("method", method, REFINEMENTS)
        sizes = {"num_chains": num_chains, "num_draws": num_draws, "num_warmup": num_warmup}
        check_sizes(optional=True, **sizes)
        check_number("max_seconds", max_seconds, "(0, inf)", optional=True)
        with seeded(seed), Watch(max_seconds, progress) as watch:
            chains = _refined(self, method, watch, **sizes)
            refined = posterior_by_chains(self.guide, self.log_joint, chains, watch, self.results)
        refined.seconds = watch.seconds()
        return refined

    from_draws = staticmethod(_from_draws)
    loo = loo

    def save(self, path: str | Path) -> None:
        """Write the guide's flow, and the weighted draws or the chains, as one safetensors file."""
        _write(self, path)

    @staticmethod
    def load(
        path: str | Path, model: Model, *args: Any, flow: Builder | Flow | None = None, **kwargs: Any
    ) -> "Posterior":
        """Read what :meth:`save` wrote, with the model and its arguments, which no file holds.

        Args:
            path: of the file.
            model: the model that was fitted.
            args, kwargs: its arguments.
            flow: the ready flow or the builder that the guide was made with; needed only if a part of it is of a class
                of the user's own.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a posterior, is damaged, or belongs to another model, data or flow.
        """
        return _read(path, model, args, kwargs, flow)

    def __repr__(self) -> str:
        return _describe(self)


def posterior_by_chains(
    guide: AutoFlow, log_joint: LogJoint, chains: Chains | Ensemble, watch: Watch, results: Sequence[FitResult] = ()
) -> Posterior:
    """Return the posterior by chains, with a guide whose flow is fitted to their draws if they have converged."""
    log_joint = chains.log_joint if isinstance(chains, Ensemble) else log_joint
    guide, note = guide_of_draws(guide, log_joint, chains.u, watch, train=chains.verdict()[0] == "trust")
    return Posterior(guide, results, [*diagnosis.notes_on(log_joint), note], chains=chains)


def _refined(posterior: Posterior, method: str, watch: Watch, **sizes: int | None) -> Chains | Ensemble:
    guide, log_joint, missed = posterior.guide, posterior.log_joint, posterior.missed
    if method == "nuts":
        return refine_by_nuts(guide, log_joint, missed, watch, **sizes)
    return refine_by_ensemble(guide, log_joint, posterior.weights, missed, watch, **sizes)


def _resample(posterior: Posterior, n: int) -> Tensor:
    """Return draws of a guide by their weights, or draws of the chains."""
    check_sizes(n=n)
    pool = posterior.weights
    if pool is None:
        return posterior._draw(n)
    if 2 * n > len(pool.u):
        pool = diagnosis.importance_sample(posterior.guide, posterior.log_joint, 2 * n)
    return pool.resample(n)


def _select(posterior: Posterior, n: int, resample: bool) -> Tensor:
    """Return draws of a guide, by their weights on request, or those of chains, ``(chains, draws, latents)``."""
    if posterior._ensemble:
        chains = posterior._ensemble.u
        number = max(n // chains.shape[1], 4)
        return chains[:: max(len(chains) // number, 1)]
    if posterior.chains is not None:
        return posterior.chains
    return (_resample(posterior, n) if resample else posterior._draw(n))[None]


def _arviz_groups(
    posterior: Posterior, u: Tensor, resampled: bool, coords: Coords | None, dims: Dims | None
) -> ArvizGroups:
    """Return the groups of draws, with the draws and the verdict on them."""
    source = "chains" if posterior.weights is None else "resampled" if resampled else "guide"
    attributes = {**_attributes(posterior), "draws": source}
    flat = u.flatten(0, 1)
    groups = ArvizGroups(posterior.log_joint, flat, len(u), coords=coords, dims=dims, attrs=attributes)
    groups.add_posterior()
    return groups


def _summary(posterior: Posterior, num_draws: int, coords: Coords | None, dims: Dims | None) -> Any:
    import arviz as az

    resample = posterior.verdict == "resample"
    groups = _arviz_groups(posterior, _select(posterior, num_draws, resample), resample, coords, dims)
    few = posterior.weights is None and posterior._ensemble is None
    table = az.summary(groups.build(), kind="all" if few else "stats")
    if not few:
        table["ess_weights" if posterior.weights else "ess"] = round(posterior.ess, 1)
    if posterior._ensemble:
        table["nested_rhat"] = round(posterior.rhat, 3)
    table["verdict"] = posterior.verdict
    table.attrs.update(_attributes(posterior))
    for note in _cautions(posterior, resample):
        warnings.warn(note, stacklevel=3)
    return table


def _attributes(posterior: Posterior) -> dict[str, Any]:
    """Return the verdict and the figures that it is based on, of types that a netCDF file holds."""
    names, evidence = ["verdict", "reason", "ess"], ["log_evidence", "log_evidence_error", "log_evidence_note"]
    if posterior.weights is None:
        names += ["rhat", *evidence]
        return {name: getattr(posterior, name) for name in names}
    names += ["elbo", *evidence]
    numbers = {"num_weights": len(posterior.weights.u), "missed_modes": len(posterior.missed)}
    return {name: getattr(posterior, name) for name in names} | {"khat": list(posterior.khat)} | numbers


def _cautions(posterior: Posterior, resampled: bool) -> list[str]:
    """Return what to warn of where draws are reported."""
    if posterior.verdict == "do not trust":
        return [f"do not trust this posterior: {posterior.reason}"]
    if posterior.verdict == "resample" and not resampled:
        return [f"these are the guide's own draws, which should be resampled: {posterior.reason}"]
    return []


def _describe(posterior: Posterior) -> str:
    seconds = f", {posterior.seconds:.1f} s" if math.isfinite(posterior.seconds) else ""
    error = f" +- {posterior.log_evidence_error:.3f}" if math.isfinite(posterior.log_evidence_error) else ""
    error += f" ({posterior.log_evidence_note})" if posterior.log_evidence_note else ""
    evidence = f"log evidence {posterior.log_evidence:.3f}{error}"
    kind, number = "by chains over ", posterior.chains.shape[:2].numel() if posterior.chains is not None else 0
    if posterior.weights is not None:
        kind, number = "of ", len(posterior.weights.u)
        evidence = f"ELBO {posterior.elbo:.3f} +- {posterior.elbo_error:.3f}, {evidence}"
    return (
        f"Posterior {kind}{posterior.guide.latent_dim} latents: {posterior.verdict}, since {posterior.reason}\n"
        f"{evidence}, ESS {posterior.ess:.0f} of {number}{seconds}"
    )


def _write(posterior: Posterior, path: str | Path) -> None:
    weights, flow = posterior.weights, posterior.guide.require_flow()
    try:
        recipe, tensors = describe(flow, own=False)
    except ValueError:  # a part of a class of the user's own, so that the builder has to be passed again
        recipe, tensors = None, {f"state.{name}": value for name, value in flow.state_dict().items()}
    draws: Any = {"u": weights.u, "log_weights": weights.log_weights} if weights else {"chains": posterior.chains}
    if posterior.missed:
        draws["missed"] = torch.stack(posterior.missed)
    draws |= {f"centring.{name}": value for name, value in posterior.log_joint.centring.items()}
    header = {
        "recipe": recipe,
        "options": {name: value for name, value in posterior.guide.options.items() if is_plain(value)},
        "max_triangular": posterior.guide.max_triangular,
        "latents": _shapes(posterior.guide.latents),
        "notes": posterior.notes,
        "seconds": posterior.seconds,
        "tail": weights.tail if weights else 0.0,
        "chains": posterior._sampled.figures() if posterior._sampled else None,
    }
    # The density at some draws verifies model and data on load.
    write(path, "posterior", header, {**tensors, **draws, "log_joint": posterior.log_joint.value(_few_of(draws))})


def _read(path: str | Path, model: Model, args: Any, kwargs: Any, flow: Builder | Flow | None) -> Posterior:
    guide, draws, header = _read_guide(path, model, args, kwargs, flow)
    missed = list(draws.get("missed", ()))
    chains: Any = draws.get("chains")
    if chains is not None:
        figures, log_joint = header["chains"], require_log_joint(guide)
        chains = Ensemble(log_joint, chains, **figures) if "num_islands" in figures else Chains(chains, **figures)
    weights = None
    if chains is None:
        weights = diagnosis.summarize_weights(require_log_joint(guide), draws["u"], draws["log_weights"])
        weights = replace(weights, tail=header.get("tail", 0.0))
    posterior = Posterior(guide, (), header["notes"], chains=chains, weights=weights, missed=missed)
    posterior.seconds = header["seconds"]
    return posterior


def _read_guide(
    path: str | Path, model: Model, args: Any, kwargs: Any, flow: Builder | Flow | None
) -> tuple[AutoFlow, dict[str, Tensor], dict[str, Any]]:
    """Return the guide of a model, the draws and the header in a file."""
    header, tensors = read(path, "posterior")
    if missing := _HEADER - header.keys():
        raise ValueError(f"expected a posterior written by save; got {path}, whose header lacks {min(missing)}")
    check_model(model)
    latents = _shapes(ModelStructure.of(config_enumerate(model), args, kwargs).latents)
    if latents != header["latents"]:
        expected, got = (
            ", ".join(f"{n} {tuple(shape)}" for n, shape in sites) for sites in (header["latents"], latents)
        )
        raise ValueError(f"expected the model of the posterior in {path}, with the latents {expected}; got {got}")
    options = {}
    if flow is None and header["recipe"] is None:
        reason = "the posterior was fitted with a flow or a builder of the user's own"
        raise ValueError(f"expected flow=, since {reason}; got none")
    if flow is None:
        fitted = restore(header["recipe"], tensors)
        if not isinstance(fitted, Flow) or len(fitted.layers) < 2:
            raise ValueError(f"expected the recipe of a guide's flow; got that of {type(fitted).__name__}")
        flow = Flow(fitted.prior, fitted.layers[:-1])  # the guide adds the last layer
    elif not isinstance(flow, Flow):
        options = header["options"]
    options["max_triangular"] = header["max_triangular"]
    enumerated = config_enumerate(model)
    log_joint = LogJoint(enumerated, args, kwargs)
    parts = {name.partition("centring.")[2]: value for name, value in tensors.items()}
    if centring := {name: parts[name] for name in log_joint.hierarchical if name in parts}:
        log_joint = recentred(log_joint, centring)
    guide = AutoFlow(enumerated, flow, "none", log_joint=log_joint, **options)
    state = {name.removeprefix("state."): value for name, value in tensors.items() if name.startswith("state.")}
    whole: Flow = guide.require_flow()
    try:
        whole.load_state_dict(state)
    except RuntimeError:
        raise ValueError(f"expected the flow that the posterior in {path} was fitted with; got another") from None
    draws = {name: value.to(whole.device) for name, value in tensors.items() if not name.startswith("state.")}
    if not torch.allclose(log_joint.value(_few_of(draws)), draws["log_joint"], 1e-4, 1e-3):
        got = "others, whose density at its draws differs"
        raise ValueError(f"expected the model and the data that the posterior in {path} was fitted to; got {got}")
    return guide, draws, header


def _shapes(latents: Sequence[LatentSite]) -> list[list[Any]]:
    return [[site.name, list(site.shape)] for site in latents]


def _few_of(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return a few draws of a saved posterior, at which the model's density is compared."""
    draws = tensors["chains"].flatten(0, 1) if "chains" in tensors else tensors["u"]
    return draws[:: max(1, len(draws) // 10)]
