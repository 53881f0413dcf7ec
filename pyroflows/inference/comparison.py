"""Models compared by their evidence or by leave-one-out cross-validation, and what a prior predicts."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer.enum import config_enumerate
from torch import Tensor

from pyroflows.arguments import check_option, check_sizes
from pyroflows.contexts import seeded
from pyroflows.inference.log_joint import LogJoint
from pyroflows.inference.posterior import Posterior
from pyroflows.inference.sites import Model, check_model, nested

__all__ = ["compare", "prior_predictive"]

_TRIES = 20


def compare(posteriors: Mapping[str, Posterior], *, by: str = "loo") -> Any:
    """Return a table of models of the same data, the best first.

    Args:
        posteriors: of two models or more, by names.
        by: "loo" compares what they predict of left-out observations (see :meth:`Posterior.loo`); "evidence" compares
            how likely the data are under each, which depends on the priors.

    Returns:
        A pandas data frame. By "loo" it is ArviZ's, by "evidence" it has the log evidence and its error in nats, the
        difference to the best and its error, the probability of each model if all are as likely before, and a note.
        Both have the verdict on each posterior.

    Raises:
        TypeError: something else than posteriors by names.
        ValueError: fewer than two, or other observations.

    References:
        Vehtari, Gelman and Gabry, 2017 (arXiv:1507.04544); Bayes Factors, Kass and Raftery, 1995.

    Example:
        >>> import pyro
        >>> from pyroflows import fit_posterior
        >>> def model(y, scale):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, scale))
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> y = torch.tensor([0.3, -0.4, 0.2])
        >>> fits = {f"scale {s:g}": fit_posterior(model, y, s, seed=0) for s in (1.0, 100.0)}
        >>> list(compare(fits, by="evidence").index)
        ['scale 1', 'scale 100']
    """
    check_option("by", by, ("loo", "evidence"))
    if not isinstance(posteriors, Mapping) or not all(isinstance(value, Posterior) for value in posteriors.values()):
        kinds = (
            [type(value).__name__ for value in posteriors.values()] if isinstance(posteriors, Mapping) else posteriors
        )
        raise TypeError(f"expected posteriors by names, {{name: Posterior}}; got {kinds!r}")
    if len(posteriors) < 2:
        raise ValueError(f"expected two posteriors or more; got {len(posteriors)}")
    observations = {name: _observations(posterior) for name, posterior in posteriors.items()}
    (first, expected), *others = observations.items()
    for name, values in others:
        if values.shape != expected.shape or not torch.allclose(values, expected):
            got = f"{len(expected)} in {first!r} and {len(values)} in {name!r}"
            reason = "others" if len(values) == len(expected) else got
            raise ValueError(f"expected posteriors of the same observations; got {reason}")
    table = _by_loo(posteriors) if by == "loo" else _by_evidence(posteriors)
    table["verdict"] = [posteriors[name].verdict for name in table.index]
    return table


def _observations(posterior: Posterior) -> Tensor:
    """Return the values of all observed sites, whatever their names, in order of size."""
    values = posterior.log_joint.structure.observations.values()
    return torch.cat([value.flatten().double().cpu() for value in values] or [torch.empty(0).double()]).sort().values


def _by_loo(posteriors: Mapping[str, Posterior]) -> Any:
    import arviz as az

    return az.compare({name: posterior.loo() for name, posterior in posteriors.items()})


def _by_evidence(posteriors: Mapping[str, Posterior]) -> Any:
    import pandas as pd

    rows = {
        name: (posterior.log_evidence, posterior.log_evidence_error, posterior.log_evidence_note)
        for name, posterior in posteriors.items()
    }
    table = pd.DataFrame.from_dict(rows, "index", columns=["log_evidence", "error", "note"])
    table = table.sort_values("log_evidence", ascending=False)
    best = table.iloc[0]
    table.insert(2, "difference", table["log_evidence"] - best["log_evidence"])
    errors = [math.hypot(error, best["error"]) if i else 0.0 for i, error in enumerate(table["error"])]
    table.insert(3, "difference_error", errors)
    table.insert(4, "probability", torch.tensor(table["difference"].to_numpy()).softmax(0).numpy())
    if unknown := [repr(name) for name, error in table["error"].items() if not math.isfinite(error)]:
        text = f"the place of {', '.join(unknown)} is not known, since the evidence is not to be trusted"
        warnings.warn(f"{text}: see the column 'note'", stacklevel=3)
    return table


def prior_predictive(
    model: Model, *args: Any, num_draws: int = 1000, seed: int | None = None, **kwargs: Any
) -> dict[str, Tensor]:
    """Draw from the prior of a model: latent and deterministic sites, and what it would observe.

    Args:
        model: a Pyro model.
        args, kwargs: its arguments; observations among them are replaced by draws.
        num_draws: the number of draws.
        seed: seeds them, and restores torch's generator afterwards; None uses the global generator.

    Returns:
        Values of each site, ``(num_draws, *shape)``.

    Raises:
        ValueError: the prior of a latent is improper, or its draws are not finite.

    References:
        Bayesian Workflow, Gelman et al., 2020 (arXiv:2011.01808).

    Example:
        >>> import pyro
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Normal(0.0, scale), obs=y)
        >>> draws = prior_predictive(model, torch.zeros(5), num_draws=100, seed=0)
        >>> {name: tuple(values.shape) for name, values in draws.items()}
        {'scale': (100,), 'y': (100, 5)}
    """
    check_model(model)
    check_sizes(num_draws=num_draws)
    with seeded(seed):
        log_joint = LogJoint(config_enumerate(model), args, kwargs)
        for name, node in log_joint.structure.latent_nodes.items():
            if any(isinstance(fn, dist.ImproperUniform) for fn in nested(node["fn"])):
                raise ValueError(f"expected priors that can be drawn from; got the improper one of site {name!r}")
        u = log_joint.initial.new_empty((0, log_joint.dim))
        for _ in range(_TRIES):
            number = num_draws - len(u)
            u = torch.cat([u, log_joint.prior_draws(number, seed=int(torch.randint(2**31, (), device="cpu")))])
            if len(u) == num_draws:
                break
        else:
            got = f"{len(u)} of {_TRIES * num_draws} such draws"
            raise ValueError(f"expected a prior with finite draws within its support; got {got}")
        return {**log_joint.constrain(u), **log_joint.predict(u, args, kwargs)}
