"""Checks of a flow: whether it inverts, whether its log-determinants are right, and whether its latent is normal."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyroflows.arguments import check_number, check_sizes
from pyroflows.bijection import Bijection
from pyroflows.diagnostics.arrays import Array, NumPyArray, as_rows
from pyroflows.flow import Flow

__all__ = ["CheckReport", "NormalQuantiles", "check", "normal_quantiles"]


@dataclass(frozen=True)
class CheckReport:
    """Errors measured by :func:`check`, each the largest over the rows.

    Args:
        data_error, latent_error: of ``forward(inverse(x))``, relative to ``1 + |x|``, and of the latent likewise.
        forward_log_det_error, inverse_log_det_error: against autograd, absolute, in nats.
        tolerance, rows: the largest error allowed, and the number of rows checked.
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
        head = f"check of {self.rows} rows, tolerance {self.tolerance:g}: {'ok' if self.ok else 'FAILS'}"
        for name, error in self._errors().items():
            head += f"\n{name:<26}{error:10.2e}  {'ok' if error <= self.tolerance else 'FAILS'}"
        return head


def check(
    flow: Flow | Bijection, x: Tensor, *, context: Tensor | None = None, tolerance: float | None = None
) -> CheckReport:
    """Check on data that a flow inverts and that its log-determinants are right; the report prints.

    The check runs on a copy of the flow, in evaluation mode and in the flow's precision. The Jacobian comes from
    autograd, row by row: pass tens of rows, not millions.

    Args:
        flow: a flow or a bijection.
        x: the data.
        context: of each row, if the flow takes a context.
        tolerance: the largest error allowed; by default 1e-6 in float64, 1e-3 in float32.

    Shapes:
        x: ``(rows, *event_shape)``; context: ``(rows, context_features)`` or ``(context_features,)``, or what the
        flow's embedding maps to that.

    Raises:
        TypeError, ValueError: not a flow or a bijection, or data or a context that do not fit it, or no rows.

    Example:
        >>> from pyroflows import check, realnvp
        >>> check(realnvp(2), torch.randn(10, 2)).ok
        True
    """
    if not isinstance(flow, Flow | Bijection):
        raise TypeError(f"expected a Flow or a Bijection; got {type(flow).__name__}")
    shape = flow.event_shape if isinstance(flow, Flow) else flow.data_shape
    if not isinstance(x, Tensor) or x.dim() != 1 + len(shape):
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"expected rows of shape (rows, {', '.join(map(str, shape))}); got {got}")
    if len(x) == 0:
        raise ValueError("expected at least one row; got none")
    if tolerance is None:
        tolerance = 1e-6 if x.dtype == torch.float64 else 1e-3
    copied = copy.deepcopy(flow).eval()
    bijection = copied.bijection if isinstance(copied, Flow) else copied
    with torch.no_grad():
        if isinstance(copied, Flow):
            copied.check_input(data=x, context=context)
            context = copied.embed(context)
        z, inverse_log_det = bijection.inverse_and_log_det(x, context)
        x_back, forward_log_det = bijection.forward_and_log_det(z, context)
        z_back, _ = bijection.inverse_and_log_det(x_back, context)
    errors = (
        (x_back - x) / (1 + x.abs()),
        (z_back - z) / (1 + z.abs()),
        forward_log_det - _log_abs_dets(bijection.forward_and_log_det, z, context),
        inverse_log_det - _log_abs_dets(bijection.inverse_and_log_det, x, context),
    )
    data, latent, forward, inverse = (float(error.abs().max()) for error in errors)
    return CheckReport(data, latent, forward, inverse, tolerance, len(x))


def _log_abs_dets(direction: Callable[..., tuple[Tensor, Tensor]], rows: Tensor, context: Tensor | None) -> Tensor:
    """Return the log-determinants of one direction at each row, from Jacobians by autograd."""
    contexts = [None] * len(rows) if context is None else context.expand(len(rows), -1)
    jacobian = torch.autograd.functional.jacobian
    jacobians = [jacobian(lambda v, c=c: direction(v, c)[0], row) for row, c in zip(rows, contexts, strict=True)]
    return torch.stack([matrix.reshape(rows[0].numel(), -1) for matrix in jacobians]).slogdet().logabsdet


@dataclass(frozen=True)
class NormalQuantiles:
    """Quantiles of a latent and of a standard normal, from :func:`normal_quantiles`.

    Args:
        expected, low, high: medians and central intervals of the order statistics of a normal sample, ``(points,)``.
        observed: order statistics of the latent, ``(points, features)``.
        distance: Kolmogorov-Smirnov distance of each feature from the normal, ``(features,)``.
        level: the probability that an order statistic of a normal sample is within its interval.
    """

    expected: NumPyArray
    observed: NumPyArray
    low: NumPyArray
    high: NumPyArray
    distance: NumPyArray
    level: float


def normal_quantiles(z: Array, *, points: int = 200, level: float = 0.99) -> NormalQuantiles:
    r"""Compare the quantiles of a latent with those of a standard normal, feature by feature.

    The k-th smallest of n standard normal numbers is

    .. math:: z_{(k)} = \Phi^{-1}(u), \qquad u \sim \mathrm{Beta}(k, n + 1 - k)

    Args:
        z: the latent of data, such as ``flow.encode(x)``, of a flow whose prior is a standard normal.
        points: the largest number of order statistics: all, or spread evenly over the range of the normal.
        level: as in :class:`NormalQuantiles`.

    Shapes:
        z: ``(rows, features)``.

    Raises:
        TypeError, ValueError: not numbers, another shape, no rows, not finite, or a level that is no probability.

    Example:
        >>> quantiles = normal_quantiles(np.random.default_rng(0).normal(size=(1000, 2)))
        >>> quantiles.observed.shape, bool((quantiles.distance < 0.05).all())
        ((160, 2), True)
    """
    from scipy.stats import beta, kstest, norm

    check_sizes(points=points)
    check_number("level", level, "(0, 1)")
    rows = np.sort(as_rows("z", z), axis=0)
    num = len(rows)
    extreme = norm.isf(0.5 / num) if num > 1 else 0.0
    ranks = np.arange(num) if num <= points else np.rint(norm.cdf(np.linspace(-extreme, extreme, points)) * num - 0.5)
    ranks = np.unique(ranks.astype(int))
    tail = (1 - level) / 2
    expected, low, high = norm.ppf(beta.ppf(np.array([[0.5], [tail], [1 - tail]]), ranks + 1, num - ranks))
    distance = np.array([kstest(feature, "norm", method="asymp").statistic for feature in rows.T])
    return NormalQuantiles(expected, rows[ranks], low, high, distance, level)
