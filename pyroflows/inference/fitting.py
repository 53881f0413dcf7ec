"""Fit the posterior of any Pyro model in one call: a start, coordinates, a guide, and chains where it is not enough."""

import functools
import inspect
from collections.abc import Callable, Mapping
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
from pyroflows.inference.guide import AutoFlow, Builder, start_of
from pyroflows.inference.guide_fit import FEW_TRAINED, MIN_DRAWS, SHALLOW, GuideFit, needs_chains
from pyroflows.inference.log_joint import LogJoint, refuse_randomness
from pyroflows.inference.posterior import Posterior, posterior_by_chains, require_log_joint
from pyroflows.inference.refine import refine_by_ensemble
from pyroflows.inference.sites import Model, check_model, device_of
from pyroflows.inference.watch import Watch
from pyroflows.models import realnvp

__all__ = ["fit_posterior"]

_START_SHARE = 0.4  # of the time, for the search of a Gaussian to start at
_CENTRED = 0.1  # centring of an entry that makes coordinates other than non-centred ones


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
    is left to gain. Sites whose location or scale depend on other latents are put between centred and non-centred
    coordinates, whichever have the best such Gaussian. Short runs at several learning rates choose one, until one of
    them brings the guide near; stages of twice as many steps each follow, from 250 or 500, with a cosine schedule and
    averaged weights, each by the total or the path gradient, whichever has the smaller variance at its start. A stage
    that led to a worse ELBO is undone. The fit ends when a stage changes neither the spread of the log weights nor the
    guide's means and standard deviations, or when the draws are right (an effective share of 94 % and errors of moments
    of 5 % after a stage). The verdict is based on the importance weights of new draws. If these are not to be trusted,
    many Markov chains are run (see :meth:`Posterior.refine`); without stages, if there are more than ten latents and
    no short run brought the guide near; and at once, if there are more than fifty and the Gaussian at a mode is far
    off, or more than 512, since the ELBO then rarely leads to a guide that can be trusted.

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
        if log_joint.dim > FEW_TRAINED and log_joint.hierarchical:
            log_joint = non_centred(log_joint)
        is_early = partial(watch.is_over, share=_START_SHARE)
        at_once = refine == "auto" and init == "auto" and needs_chains(log_joint, is_early)
        layers: dict[str, Any] = {"num_layers": SHALLOW} if flow is realnvp and log_joint.dim > 1 else {}
        make = partial(AutoFlow, enumerated, flow, "none" if at_once else init, **layers)
        guide = make(log_joint=log_joint, out_of_time=is_early)
        require_log_joint(guide)
        guide_fit = GuideFit(guide, log_joint, num_draws, watch)
        trains = refine == "never" or not (at_once or guide_fit.starts_far_off())
        if trains:
            if log_joint.hierarchical and log_joint.dim <= FEW_TRAINED and not guide_fit.starts_well():
                guide = _in_best_coordinates(guide, make, watch)
                log_joint = require_log_joint(guide)
                guide_fit = GuideFit(guide, log_joint, num_draws, watch)
            guide_fit.find_learning_rate()
            if trains := refine == "never" or guide_fit.is_promising:
                guide_fit.run_stages(max_steps)
            guide = guide_fit.guide
        evaluations = log_joint.evaluations
        weights = importance_sample(guide, log_joint, guide_fit.affordable_draws() if trains else MIN_DRAWS)
        posterior = Posterior(guide, guide_fit.results, [*notes_on(log_joint), *guide_fit.notes], weights=weights)
        if refine == "auto" and (not trains or posterior.verdict == "do not trust"):
            posterior, evaluations = _refined(posterior, watch, trained=trains), log_joint.evaluations
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


def _refined(posterior: Posterior, watch: Watch, *, trained: bool) -> Posterior:
    """Return the posterior by an ensemble of chains; by a guide that was trained if there is no time for them."""
    if watch.is_over("refining"):
        return posterior
    guide, log_joint = posterior.guide, posterior.log_joint
    ensemble = refine_by_ensemble(guide, log_joint, posterior.weights, posterior.missed, watch)
    if ensemble.complete or not trained:
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
