"""Checks of a flow: does it invert, and are its log-determinants those of its Jacobian?"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from pyroflows.bijection import Bijection
from pyroflows.flow import Flow

__all__ = ["CheckReport", "check"]


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
        flow._check_numbers(data=x, context=context)
    flow = copy.deepcopy(flow).eval()
    bijection = flow.bijection if isinstance(flow, Flow) else flow
    with torch.no_grad():
        if isinstance(flow, Flow):
            context = flow._embed(context)
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


def _slogdet(function, row: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    jacobian = torch.autograd.functional.jacobian(function, row)
    return torch.linalg.slogdet(jacobian.reshape(row.numel(), row.numel())).logabsdet


def _relative(found: Tensor, wanted: Tensor) -> float:
    return _largest((found - wanted) / (1 + wanted.abs()))


def _largest(errors: Tensor) -> float:
    return float(errors.abs().max())
