"""Bits per dimension: how well a flow compresses discrete data, in the unit in which papers on images report it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyroflows.arguments import check_option, check_sizes
from pyroflows.contexts import evaluating, seeded
from pyroflows.flow import Flow
from pyroflows.networks.one_hot import OneHot

__all__ = ["BitsPerDim", "bits_per_dim"]


@dataclass(frozen=True)
class BitsPerDim:
    """What :func:`bits_per_dim` found; ``float()`` gives the value, ``str()`` says which of the two estimators it is.

    Args:
        value: bits per dimension, the mean over the rows.
        standard_error: of that mean, from the spread of the rows; nan for one row.
        estimator: "mean" or "log-mean-exp".
        num_draws: draws of the dequantisation noise for each row.
        rows: the number of rows.
        dims: the dimensions that were divided by.

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
        return (
            f"{self.value:.3f} +- {self.standard_error:.3f} bits per dimension "
            f"({self.estimator} over {draws} of noise; {rows} of {self.dims} dimensions)"
        )


def bits_per_dim(
    flow: Flow,
    x: Tensor | np.ndarray[Any, Any],
    context: Tensor | np.ndarray[Any, Any] | None = None,
    *,
    num_draws: int = 8,
    estimator: str = "mean",
    dims: int | None = None,
    batch_size: int = 256,
    seed: int | None = None,
) -> BitsPerDim:
    r"""Give the bits per dimension of discrete data under a flow with a dequantizer, with every constant in.

    .. math:: -\frac{1}{M \ln 2} \Bigl\langle \log p(y_k) - \log q(y_k \mid x) \Bigr\rangle_k, \qquad
        y_k \sim q(y \mid x)

    For pixels with :math:`L` levels and uniform noise :math:`-\log q` is the constant :math:`-M \log L`; a logit's
    Jacobian is in :math:`\log p`. The brackets are, for each row, the mean over draws, whose expectation is an upper
    bound on the bits of :math:`\log P(x)`, that which papers report; or the logarithm of the mean of the exponentials,
    a tighter bound and another, lower number. The two must not be compared with one another.

    The flow is evaluated in eval mode, without gradients, and left in the mode in which it was.

    Args:
        flow: a flow with a dequantizer.
        x: the discrete data, on any device.
        context: one for each row, where the flow takes one.
        num_draws: draws of noise for each row.
        estimator: "mean" or "log-mean-exp".
        dims: the dimensions to divide by, by default all; 784 for images of 28 x 28 that were padded to 32 x 32.
        batch_size: rows evaluated at once.
        seed: what draws the noise; torch's random state is then left as it was.

    Shapes:
        x: ``(rows, *event_shape)``; context: ``(rows, context_features)``, or what the flow's embedding takes.

    Raises:
        TypeError: something that is no flow, or data of a dtype that the dequantizer does not take.
        ValueError: the flow has no dequantizer, a value is none of the data's, there is no row, or an option is not one
            of those above.

    References:
        A note on the evaluation of generative models, Theis, van den Oord and Bethge, 2016 (arXiv:1511.01844);
        Importance Weighted Autoencoders, Burda, Grosse and Salakhutdinov, 2016 (arXiv:1509.00519).

    Example:
        >>> from pyroflows import Uniform
        >>> from pyroflows.dequantizers import UniformDequantizer
        >>> from pyroflows.layers import Permutation
        >>> flow = Flow(Uniform(4), Permutation(4, "reverse"), dequantizer=UniformDequantizer(4, num_levels=32))
        >>> print(bits_per_dim(flow, torch.randint(32, (10, 4)), seed=0))
        5.000 +- 0.000 bits per dimension (mean over 8 draws of noise; 10 rows of 4 dimensions)
    """
    if not isinstance(flow, Flow):
        raise TypeError(f"expected a Flow; got {type(flow).__name__}")
    if flow.dequantizer is None:
        raise ValueError(
            "expected a flow with a dequantizer, such as UniformDequantizer(flow.event_shape), without which there "
            "are no levels to count bits of; got one without"
        )
    check_sizes(num_draws=num_draws, batch_size=batch_size)
    check_option("estimator", estimator, ("mean", "log-mean-exp"))
    if dims is not None:
        check_sizes(dims=dims)
    if dims is not None and dims > flow.event_shape.numel():
        raise ValueError(f"expected dims of at most {flow.event_shape.numel()}, all of the data's; got {dims}")
    data = torch.as_tensor(x)
    given = None if context is None else torch.as_tensor(context)
    if data.shape[1:] != flow.event_shape or not len(data):
        expected = "(rows, " + ", ".join(map(str, flow.event_shape)) + ")"
        raise ValueError(f"expected data of shape {expected}, at least one row; got {tuple(data.shape)}")
    if given is not None and given.shape[:1] != data.shape[:1]:
        raise ValueError(f"expected a context for each of {len(data)} rows; got {tuple(given.shape)}")
    shape = getattr(flow.dequantizer, "event_shape", flow.event_shape)
    if shape != flow.event_shape:  # one of fewer dimensions would count the constants of these alone
        raise ValueError(f"expected a dequantizer of the flow's shape {tuple(flow.event_shape)}; got {tuple(shape)}")
    number = flow.event_shape.numel() if dims is None else int(dims)

    # A dequantizer of one's own need not have a check.
    check = getattr(flow.dequantizer, "check", lambda batch: None)
    rows = []
    with torch.no_grad(), evaluating(flow), seeded(seed, flow.device):
        for start in range(0, len(data), batch_size):
            part = slice(start, start + batch_size)
            batch = data[part].to(flow.device)
            check(batch)
            its = None if given is None else given[part].to(flow.device)
            if isinstance(flow.embedding, OneHot) and its is not None:
                flow.embedding.check(its)
            draws = torch.stack([flow.dequantized_log_prob(batch, its).double() for _ in range(num_draws)])
            if given is not None and draws.shape[1:] != batch.shape[:1]:
                raise ValueError(
                    f"expected a context that gives one log-density to each of {len(batch)} rows; "
                    f"got {tuple(draws.shape[1:])} from a context of shape {tuple(given.shape)}"
                )
            rows.append((draws.mean(0) if estimator == "mean" else draws.logsumexp(0) - math.log(num_draws)).cpu())
    bits = -torch.cat(rows) / (number * math.log(2))
    error = float(bits.std()) / math.sqrt(len(bits)) if len(bits) > 1 else math.nan
    return BitsPerDim(float(bits.mean()), error, estimator, num_draws, len(bits), number)
