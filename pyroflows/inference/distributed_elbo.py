"""An ELBO over several processes, for Pyro's SVI."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyroflows import distributed
from pyroflows.contexts import random_state, set_random_state
from pyroflows.inference.sites import device_of

__all__ = ["DistributedELBO"]


class DistributedELBO(ELBO):
    r"""The mean of an ELBO over the processes that ``torchrun`` has started, for ``SVI``.

    .. math:: \frac1R \sum_{r=1}^R \widehat{\mathrm{ELBO}}_r

    Each process draws its own particles, and rows of a subsampled plate that no other process draws if there are
    enough. Each term is scaled to the whole plate, and so is their mean: a step of :math:`R` processes is that of one
    process with :math:`R` times the particles and :math:`R` times the ``subsample_size``. Losses, gradients and
    parameters are the same in all processes. With a single process the result is that of the ELBO.

    Args:
        elbo: an ELBO of Pyro or of this package.

    Raises:
        TypeError: ``elbo`` is not an ELBO.

    References:
        Automatic Differentiation Variational Inference, Kucukelbir et al., 2017 (arXiv:1603.00788).

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO, autoguide
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", len(y), subsample_size=10) as rows:
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y[rows])
        >>> elbo, adam = DistributedELBO(Trace_ELBO()), pyro.optim.Adam({"lr": 0.01})
        >>> loss = SVI(model, autoguide.AutoNormal(model), adam, elbo).step(torch.ones(100))
    """

    def __init__(self, elbo: ELBO):
        if not isinstance(elbo, ELBO):
            raise TypeError(f"expected an ELBO; got {type(elbo).__name__}")
        super().__init__(num_particles=elbo.num_particles)
        self.elbo = elbo
        self._streams: Any = None  # of random numbers, which the first step creates

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Return an estimate of the loss, from all processes."""
        with self._all_processes(model, guide, args, kwargs):
            with distributed.rank_rng():
                loss = self.elbo.loss(model, guide, *args, **kwargs)
            return _mean_number(loss, device_of(args, kwargs))

    def loss_and_grads(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Return an estimate of the loss, and add its gradient to every parameter's, from all processes."""
        with self._all_processes(model, guide, args, kwargs):
            with distributed.rank_rng(), poutine.trace(param_only=True) as capture:
                loss = self.elbo.loss_and_grads(model, guide, *args, **kwargs)
            for parameter in _parameters(capture) if distributed.world_size() > 1 else ():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                _mean(parameter.grad)
            return _mean_number(loss, device_of(args, kwargs))

    def _get_trace(self, *args: Any) -> Any:
        raise NotImplementedError("a DistributedELBO runs the ELBO that it was built with")

    @contextmanager
    def _all_processes(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        device = device_of(args, kwargs)
        is_first = self._streams is None
        if is_first:
            distributed.initialize(device)
        with distributed.together(device, self._streams) as self._streams, _DistinctRows():
            if is_first and distributed.world_size() > 1:
                self._synchronize(model, guide, args, kwargs, device)
            yield

    def _synchronize(self, model: Any, guide: Any, args: Any, kwargs: Any, device: torch.device) -> None:
        """Copy the parameters of the first process to all, after a run that creates them."""
        state = random_state(device)
        with torch.no_grad(), poutine.trace(param_only=True) as capture:
            self.elbo.loss(model, guide, *args, **kwargs)
        set_random_state(state, device)
        for part in (model, guide):
            if isinstance(part, nn.Module):
                distributed.synchronize(part)
        for parameter in _parameters(capture):
            distributed.broadcast_(parameter)


class _DistinctRows(Messenger):
    """Draws the rows of a subsampled plate so that the processes have different ones."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or not site_is_subsample(msg) or distributed.world_size() == 1:
            return
        size, number = msg["fn"].size, msg["fn"].subsample_size
        if number is None or number >= size:
            return
        with distributed.shared_rng():
            rows = torch.randperm(size, device=msg["fn"].device)
        msg["value"], msg["done"] = rows.roll(-distributed.rank() * number)[:number], True


def _parameters(capture: Any) -> list[Tensor]:
    return [site["value"].unconstrained() for site in capture.trace.nodes.values()]


def _mean(x: Any) -> Any:
    return distributed.all_reduce(x).div_(distributed.world_size())


def _mean_number(x: float, device: torch.device) -> float:
    return float(_mean(torch.tensor(x, dtype=torch.float64, device=device)))
