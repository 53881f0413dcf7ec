"""Bits per dimension of discrete data, the unit in which papers on images report likelihoods."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyroflows.arguments import check_option, check_sizes
from pyroflows.contexts import evaluating, seeded
from pyroflows.diagnostics.arrays import Array
from pyroflows.flow import Flow
from pyroflows.networks.one_hot import OneHot

__all__ = ["BitsPerDim", "bits_per_dim"]


@dataclass(frozen=True)
class BitsPerDim:
    """The result of :func:`bits_per_dim`; ``float()`` returns the value, ``str()`` names the estimator.

    Args:
        value, standard_error: bits per dimension, the mean over the rows, and its error; nan for one row.
        estimator, num_draws, dims: as in :func:`bits_per_dim`.
        rows: the number of rows.

    Example:
        >>> print(BitsPerDim(2.1034, 0.0121, "mean", 8, 180, 64))
        2.103 +- 0.012 bits per dimension (mean over 8 draws of noise; 180 rows of 64 dimensions)
    """

    value: float
    standard_error: float
    estimator: str
    num_draws: int
    rows: int
    dims: int

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        draws = "1 draw" if self.num_draws == 1 else f"{self.num_draws} draws"
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows"
        bits = f"{self.value:.3f} +- {self.standard_error:.3f} bits per dimension"
        return f"{bits} ({self.estimator} over {draws} of noise; {rows} of {self.dims} dimensions)"


def bits_per_dim(
    flow: Flow,
    x: Array,
    context: Array | None = None,
    *,
    num_draws: int = 8,
    estimator: str = "mean",
    dims: int | None = None,
    batch_size: int = 256,
    seed: int | None = None,
) -> BitsPerDim:
    r"""Compute the bits per dimension of discrete data under a flow with a dequantizer, all constants included.

    .. math:: -\frac{1}{M \ln 2} \Bigl\langle \log p(y_k) - \log q(y_k \mid x) \Bigr\rangle_k, \qquad
        y_k \sim q(y \mid x)

    For pixels with :math:`L` levels and uniform noise, :math:`-\log q` is the constant :math:`-M \log L`; the Jacobian
    of a logit is part of :math:`\log p`. The brackets are either the mean over the draws of a row, whose expectation is
    the upper bound on the bits of :math:`\log P(x)` that papers report, or the logarithm of the mean of the
    exponentials, a tighter bound and a lower number. Do not compare one with the other.

    Args:
        flow: a flow with a dequantizer, evaluated in evaluation mode without gradients.
        x: the discrete data, on any device.
        context: of each row, if the flow takes a context.
        num_draws: draws of noise for each row.
        estimator: "mean" or "log-mean-exp".
        dims: the number of dimensions to divide by, by default all; 784 for images of 28 x 28 padded to 32 x 32.
        batch_size: rows evaluated at once.
        seed: of the noise, which leaves torch's random state unchanged; None uses the global generator.

    Shapes:
        x: ``(rows, *event_shape)``; context: ``(rows, context_features)``, or what the flow's embedding takes.

    Raises:
        TypeError, ValueError: not a flow with a dequantizer of its shape, or data or a context that these do not take.

    References:
        A note on the evaluation of generative models, Theis, van den Oord and Bethge, 2016 (arXiv:1511.01844);
        Importance Weighted Autoencoders, Burda, Grosse and Salakhutdinov, 2016 (arXiv:1509.00519).

    Example:
        >>> from pyroflows import Permutation, Uniform, UniformDequantizer
        >>> flow = Flow(Uniform(4), Permutation(4, "reverse"), dequantizer=UniformDequantizer(4, num_levels=32))
        >>> print(bits_per_dim(flow, torch.randint(32, (10, 4)), seed=0))
        5.000 +- 0.000 bits per dimension (mean over 8 draws of noise; 10 rows of 4 dimensions)
    """
    check_sizes(num_draws=num_draws, batch_size=batch_size)
    check_option("estimator", estimator, ("mean", "log-mean-exp"))
    _check_flow(flow)
    event_dims = flow.event_shape.numel()
    dims = event_dims if dims is None else dims
    check_sizes(dims=dims)
    if dims > event_dims:
        raise ValueError(f"expected dims of at most {event_dims}, all of the data's; got {dims}")
    data = torch.as_tensor(x)
    if data.shape[1:] != flow.event_shape or not len(data):
        expected = f"(rows, {', '.join(map(str, flow.event_shape))})"
        raise ValueError(f"expected data of shape {expected}, at least one row; got {tuple(data.shape)}")
    contexts = None if context is None else torch.as_tensor(context)
    if contexts is not None and contexts.shape[:1] != data.shape[:1]:
        raise ValueError(f"expected a context for each of {len(data)} rows; got {tuple(contexts.shape)}")

    log_probs = []
    with torch.no_grad(), evaluating(flow), seeded(seed, flow.device):
        for start in range(0, len(data), batch_size):
            part = slice(start, start + batch_size)
            draws = _log_prob_draws(flow, data[part], None if contexts is None else contexts[part], num_draws)
            log_probs.append(draws.mean(0) if estimator == "mean" else draws.logsumexp(0) - math.log(num_draws))
    bits = -torch.cat(log_probs).cpu() / (dims * math.log(2))
    error = float(bits.std()) / math.sqrt(len(bits)) if len(bits) > 1 else math.nan
    return BitsPerDim(float(bits.mean()), error, estimator, num_draws, len(bits), int(dims))


def _check_flow(flow: Flow) -> None:
    if not isinstance(flow, Flow):
        raise TypeError(f"expected a Flow; got {type(flow).__name__}")
    if flow.dequantizer is None:
        raise ValueError("expected a flow with a dequantizer, such as UniformDequantizer(flow.event_shape); got none")
    # A dequantizer of fewer dimensions would count the constants of these alone.
    shape = getattr(flow.dequantizer, "event_shape", flow.event_shape)
    if shape != flow.event_shape:
        raise ValueError(f"expected a dequantizer of the flow's shape {tuple(flow.event_shape)}; got {tuple(shape)}")


def _log_prob_draws(flow: Flow, x: Tensor, context: Tensor | None, num_draws: int) -> Tensor:
    """Return the dequantised log-densities of a batch of rows, ``(num_draws, rows)``."""
    x = x.to(flow.device)
    getattr(flow.dequantizer, "check", lambda _: None)(x)  # a user's own dequantizer need not have one
    if context is not None:
        context = context.to(flow.device)
        if isinstance(flow.embedding, OneHot):
            flow.embedding.check(context)
    draws = torch.stack([flow.dequantized_log_prob(x, context).double() for _ in range(num_draws)])
    if context is not None and draws.shape[1:] != x.shape[:1]:
        got = f"{tuple(draws.shape[1:])} from a context of shape {tuple(context.shape)}"
        raise ValueError(f"expected a context that gives one log-density to each of {len(x)} rows; got {got}")
    return draws
