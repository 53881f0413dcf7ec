"""A posterior that is known by its log-density alone, as a Pyro model."""

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyroflows.inference.sites import Model

__all__ = ["density_model"]


def density_model(
    log_density: Callable[..., Tensor], start: Mapping[str, Any], supports: Mapping[str, Any] | None = None
) -> Model:
    r"""Return a Pyro model whose posterior has a log-density, which need not be normalised.

    Args:
        log_density: a function of the parameters by name, for many points at once; torch must be able to differentiate
            it.
        start: a value of each parameter, which gives its shape, dtype and device, and from which a fit searches.
        supports: constraints, such as ``constraints.positive``; by default the parameters are real. The density is that
            of the parameters themselves: no Jacobian is left to the caller.

    Shapes:
        Of the arguments of ``log_density``: ``(points, *shape)`` for each parameter; of its result: ``(points,)``.

    Raises:
        TypeError, ValueError: no parameters, a start outside its support or not finite, supports of unknown parameters,
            or in a run: a log-density of another shape, or one without a gradient.

    Example:
        >>> y = torch.tensor([1.0, 2.0, 1.5])
        >>> def log_density(mean, scale):
        ...     return dist.Normal(mean[:, None], scale[:, None]).log_prob(y).sum(-1) - mean**2 / 2 - scale
        >>> start = {"mean": torch.tensor(0.0), "scale": torch.tensor(1.0)}
        >>> model = density_model(log_density, start, {"scale": constraints.positive})
        >>> sorted(pyro.poutine.trace(pyro.poutine.condition(model, data=start)).get_trace().stochastic_nodes)
        []
    """
    if not callable(log_density):
        raise TypeError(f"expected log_density to be a function of the parameters; got {type(log_density).__name__}")
    values = {name: _as_start(name, value) for name, value in start.items()}
    if not values:
        raise ValueError("expected a start for each parameter; got none")
    named = ", ".join(map(repr, values))
    if unknown := ", ".join(map(repr, sorted((supports or {}).keys() - values.keys()))):
        raise ValueError(f"expected supports of parameters among {named}; got {unknown}")
    priors = {name: _improper(name, value, (supports or {}).get(name)) for name, value in values.items()}

    def model() -> None:
        parts = {name: pyro.sample(name, prior) for name, prior in priors.items()}
        first = next(iter(values))
        batch = parts[first].shape[: parts[first].dim() - values[first].dim()]
        points = {name: part.reshape(-1, *values[name].shape).to(values[name]) for name, part in parts.items()}
        result = log_density(**points)
        number = len(points[first])
        if not isinstance(result, Tensor) or result.shape != (number,):
            got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"expected a log-density for each of the points, of shape ({number},); got {got}")
        if any(point.requires_grad for point in points.values()) and not result.requires_grad:
            advice = "write it in torch, or as a torch.autograd.Function that takes finite differences"
            raise ValueError(f"expected a log-density with a gradient by torch; got one without: {advice}")
        pyro.factor("log_density", result.reshape(batch))

    return model


def _as_start(name: str, value: Any) -> Tensor:
    tensor = torch.as_tensor(value)
    tensor = tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())
    if not tensor.isfinite().all():
        raise ValueError(f"expected a finite start of parameter {name!r}; got {value!r}")
    return tensor.detach()


def _improper(name: str, value: Tensor, support: Any) -> dist.ImproperUniform:
    support = constraints.real if support is None else support
    support = constraints.independent(support, value.dim() - support.event_dim)
    if not bool(support.check(value)):
        raise ValueError(f"expected a start of parameter {name!r} within its support {support}; got {value}")
    return dist.ImproperUniform(support, (), value.shape)
