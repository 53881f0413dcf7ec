"""Checks of a flow: does it invert, are its log-determinants those of its Jacobian, is its latent normal?"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyroflows.arguments import check_number, check_sizes
from pyroflows.bijection import Bijection
from pyroflows.flow import Flow

__all__ = ["CheckReport", "NormalQuantiles", "check", "normal_quantiles"]


@dataclass(frozen=True)
class CheckReport:
    """The errors that :func:`check` found, each the largest over the rows.

    Args:
        data_error: of ``forward(inverse(x))``, relative to ``1 + |x|``.
        latent_error: of ``inverse(forward(z))``, relative to ``1 + |z|``.
        forward_log_det_error: against autograd, absolute, in nats.
        inverse_log_det_error: against autograd, absolute, in nats.
        tolerance: what each may be.
        rows: the rows looked at.
    """

    data_error: float
    latent_error: float
    forward_log_det_error: float
    inverse_log_det_error: float
    tolerance: float
    rows: int

    @property
    def ok(self) -> bool:
        """Whether every error is a number within the tolerance."""
        return all(error <= self.tolerance for error in self._errors().values())

    def _errors(self) -> dict[str, float]:
        return {
            "data -> latent -> data": self.data_error,
            "latent -> data -> latent": self.latent_error,
            "log-det, latent to data": self.forward_log_det_error,
            "log-det, data to latent": self.inverse_log_det_error,
        }

    def __str__(self) -> str:
        lines = [
            f"{name:<26}{error:10.2e}  {'ok' if error <= self.tolerance else 'FAILS'}"
            for name, error in self._errors().items()
        ]
        head = f"check of {self.rows} rows, tolerance {self.tolerance:g}: {'ok' if self.ok else 'FAILS'}"
        return "\n".join([head, *lines])


def check(
    flow: Flow | Bijection, x: Tensor, *, context: Tensor | None = None, tolerance: float | None = None
) -> CheckReport:
    """Check that a flow inverts and that its log-determinants are right, on the user's own data.

    The flow is looked at in evaluation mode and in its own precision, and is left as it was. The Jacobian comes
    from autograd, row by row; hand over tens of rows, not millions.

    Args:
        flow: a flow or a bijection.
        x: data; rows to check.
        context: the context of each row, where the flow takes one.
        tolerance: the largest error allowed; by default 1e-6 in float64, 1e-3 in float32.

    Shapes:
        x: ``(rows, *event_shape)``; context: ``(rows, context_features)`` or ``(context_features,)``, or what the
        flow's embedding maps to that.

    Returns:
        A report that prints, and whose ``ok`` says whether all is well.

    Raises:
        TypeError, ValueError: ``x`` or ``context`` does not fit the flow.

    Example:
        >>> from pyroflows import check, realnvp
        >>> check(realnvp(2), torch.randn(10, 2)).ok
        True
    """
    bijection = flow.bijection if isinstance(flow, Flow) else flow
    if not isinstance(bijection, Bijection):
        raise TypeError(f"expected a Flow or a Bijection; got {type(flow).__name__}")
    if not isinstance(x, Tensor) or x.dim() != 1 + len(bijection.data_shape):
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"expected rows of shape (rows, {', '.join(map(str, bijection.data_shape))}); got {got}")
    if len(x) == 0:
        raise ValueError("expected at least one row; got none")
    if isinstance(flow, Flow):
        flow.check_input(data=x, context=context)
    flow = copy.deepcopy(flow).eval()
    bijection = flow.bijection if isinstance(flow, Flow) else flow
    with torch.no_grad():
        if isinstance(flow, Flow):
            context = flow.embed(context)
        z, inverse_log_det = bijection.inverse_and_log_det(x, context)
        back, forward_log_det = bijection.forward_and_log_det(z, context)
        z_back, _ = bijection.inverse_and_log_det(back, context)
    if tolerance is None:
        tolerance = 1e-6 if x.dtype == torch.float64 else 1e-3
    contexts = [None] * len(x) if context is None else list(context.expand(len(x), -1))
    forward_jacobian, inverse_jacobian = [], []
    for z_row, x_row, c in zip(z, x, contexts, strict=True):
        forward_jacobian.append(_slogdet(lambda v, c=c: bijection.forward_and_log_det(v, c)[0], z_row))
        inverse_jacobian.append(_slogdet(lambda v, c=c: bijection.inverse_and_log_det(v, c)[0], x_row))
    return CheckReport(
        data_error=_relative(back, x),
        latent_error=_relative(z_back, z),
        forward_log_det_error=_largest(forward_log_det - torch.stack(forward_jacobian)),
        inverse_log_det_error=_largest(inverse_log_det - torch.stack(inverse_jacobian)),
        tolerance=tolerance,
        rows=len(x),
    )


@dataclass(frozen=True)
class NormalQuantiles:
    """What :func:`normal_quantiles` found.

    Args:
        expected: the medians of order statistics of a standard normal sample, ``(points,)``.
        observed: those of the latent, ``(points, features)``.
        low: below which chance takes them seldom, ``(points,)``.
        high: above which it takes them seldom, ``(points,)``.
        distance: Kolmogorov and Smirnov's, of each feature from the normal, ``(features,)``.
        level: the probability with which each is between ``low`` and ``high``.
    """

    expected: np.ndarray[Any, Any]
    observed: np.ndarray[Any, Any]
    low: np.ndarray[Any, Any]
    high: np.ndarray[Any, Any]
    distance: np.ndarray[Any, Any]
    level: float


def normal_quantiles(z: Tensor | np.ndarray[Any, Any], *, points: int = 200, level: float = 0.99) -> NormalQuantiles:
    r"""Compare the quantiles of a latent with those of a standard normal, feature by feature.

    The k-th smallest of n standard normal numbers is

    .. math:: z_{(k)} = \Phi^{-1}(u), \qquad u \sim \mathrm{Beta}(k, n + 1 - k)

    Args:
        z: the latent of data, such as ``flow.encode(x)``, of a flow whose prior is a standard normal.
        points: order statistics to look at, at most: all, or spread evenly over the normal's range.
        level: the probability with which each one of a normal latent is in the band.

    Shapes:
        z: ``(rows, features)``.

    Raises:
        TypeError: not numbers.
        ValueError: another shape, no rows, numbers that are not finite, or a level that is no probability.

    Example:
        >>> found = normal_quantiles(np.random.default_rng(0).normal(size=(1000, 2)))
        >>> found.observed.shape, bool((found.distance < 0.05).all())
        ((160, 2), True)
    """
    from scipy.stats import beta, norm

    from pyroflows.diagnostics.arrays import as_array

    check_sizes(points=points)
    check_number("level", level, "(0, 1)")
    rows = np.sort(as_array("z", z, 2), axis=0)
    if 0 in rows.shape:
        raise ValueError(f"expected at least one row and one feature; got shape {rows.shape}")
    num = len(rows)
    far = norm.isf(0.5 / num) if num > 1 else 0.0
    ranks = np.arange(num) if num <= points else np.rint(norm.cdf(np.linspace(-far, far, points)) * num - 0.5)
    ranks = np.unique(ranks.astype(int))
    quantiles = norm.ppf(beta.ppf(np.array([[0.5], [(1 - level) / 2], [(1 + level) / 2]]), ranks + 1, num - ranks))
    cdf, steps = norm.cdf(rows), np.arange(num + 1)[:, None] / num
    distance = np.maximum(steps[1:] - cdf, cdf - steps[:-1]).max(0)
    return NormalQuantiles(quantiles[0], rows[ranks], quantiles[1], quantiles[2], distance, level)


def _slogdet(function, row: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    jacobian = torch.autograd.functional.jacobian(function, row)
    return torch.linalg.slogdet(jacobian.reshape(row.numel(), row.numel())).logabsdet


def _relative(found: Tensor, wanted: Tensor) -> float:
    return _largest((found - wanted) / (1 + wanted.abs()))


def _largest(errors: Tensor) -> float:
    return float(errors.abs().max())
