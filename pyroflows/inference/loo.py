"""Leave-one-out cross-validation of a posterior by ArviZ, with a warning for each observation that it fails for."""

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pyroflows.inference.posterior import Posterior

__all__ = ["loo"]

_NAMED = 10  # observations that a warning names at most


def loo(
    posterior: "Posterior",
    *,
    num_draws: int = 4000,
    likelihood_factors: Sequence[str] | Mapping[str, str] | None = None,
) -> Any:
    """Return the expected log predictive density of left-out observations, by Pareto-smoothed importance sampling.

    Each entry of each observed site counts as an observation, named such as "y[3]", unless it is masked out. One
    warning names those at which the estimate fails, since the posterior without them is too far from that with them.

    Args:
        posterior: the posterior.
        num_draws: draws to compute it from, resampled ones if the verdict is "resample".
        likelihood_factors: as in :meth:`Posterior.to_arviz`.

    Returns:
        ArviZ's ``ELPDData``, with an entry for each observation.

    Raises:
        ValueError: the model has no observations with a log-likelihood of their own.

    References:
        Practical Bayesian Model Evaluation Using Leave-One-Out Cross-Validation and WAIC, Vehtari, Gelman and Gabry,
        2017 (arXiv:1507.04544).

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyroflows import fit_posterior
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> posterior = fit_posterior(model, torch.tensor([1.0, 2.0, 3.0]), seed=0)
        >>> len(posterior.loo().pareto_k)
        3
    """
    import arviz as az

    data = posterior.to_arviz(num_draws, predictive=False, likelihood_factors=likelihood_factors)
    groups = data.groups() if callable(data.groups) else data.groups
    if not any(group.strip("/") == "log_likelihood" for group in groups):
        raise ValueError("expected a model with observations that have a log-likelihood of their own; got none")
    of_entries = _by_entry(data)
    efficiency = 1.0
    if posterior.chains is not None:
        efficiency = min(1.0, posterior.ess / posterior.chains.shape[:2].numel())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = az.loo(of_entries, pointwise=True, reff=efficiency)
    good = float(getattr(result, "good_k", None) or 0.7)
    names = result.pareto_k["observation"].values
    if bad := [f"{name} ({k:.2f})" for name, k in zip(names, result.pareto_k.values, strict=True) if k > good]:
        others = f" and {len(bad) - _NAMED} others" if len(bad) > _NAMED else ""
        listed = ", ".join(bad[:_NAMED]) + others
        text = f"the density of left-out observations is not to be trusted at {listed}, whose k-hat is above {good:.2f}"
        warnings.warn(f"{text}: fit the model without them, or take one with heavier tails", stacklevel=2)
    return result


def _by_entry(data: Any) -> Any:
    """Return ArviZ's data with the log-likelihoods of all sites along one dimension, "observation"."""
    import arviz as az
    import xarray as xr

    parts, labels = [], []
    for name, values in data["log_likelihood"].data_vars.items():
        array = values.values
        parts.append(array.reshape(*array.shape[:2], -1))
        places = [values.coords[dim].values for dim in values.dims[2:]]
        grid = np.stack(np.meshgrid(*places, indexing="ij"), -1).reshape(-1, len(places)) if places else [()]
        labels += [f"{name}[{', '.join(map(str, place))}]" if len(place) else str(name) for place in grid]
    joined = xr.Dataset(
        {"observations": (["chain", "draw", "observation"], np.concatenate(parts, -1))}, {"observation": labels}
    )
    datasets = {"posterior": _dataset(data["posterior"]), "log_likelihood": joined}
    if "InferenceData" in vars(az):
        return az.InferenceData(**datasets)
    return xr.DataTree.from_dict(datasets)


def _dataset(group: Any) -> Any:
    return group.to_dataset() if hasattr(group, "to_dataset") else group
