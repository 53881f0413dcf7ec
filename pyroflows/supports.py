"""Supports: constraints on whole events."""

from typing import Any

from torch import Tensor
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions.transforms import IndependentTransform

__all__ = ["common_event_dim", "event_constraint"]


class _EventConstraint(constraints.independent):
    """A constraint on every number of an event; torch's own cannot check an empty batch."""

    def check(self, value: Tensor) -> Tensor:
        return self.base_constraint.check(value).flatten(-self.reinterpreted_batch_ndims).all(-1)


@biject_to.register(_EventConstraint)
def _biject_to_event(constraint: Any) -> IndependentTransform:
    return IndependentTransform(biject_to(constraint.base_constraint), constraint.reinterpreted_batch_ndims)


@transform_to.register(_EventConstraint)
def _transform_to_event(constraint: Any) -> IndependentTransform:
    return IndependentTransform(transform_to(constraint.base_constraint), constraint.reinterpreted_batch_ndims)


def common_event_dim(transform: Any) -> int:
    """Return the number of dimensions of an event, where it is the same at both ends of a transform."""
    ends = transform.domain.event_dim, transform.codomain.event_dim
    if ends[0] != ends[1]:  # an AttributeError, unlike torch's own, so that torch.jit.trace can look at a module
        raise AttributeError(f"expected domain.event_dim or codomain.event_dim, which are {ends[0]} and {ends[1]}")
    return int(ends[0])


def event_constraint(constraint: constraints.Constraint, dims: int) -> constraints.Constraint:
    """Return the constraint that holds if ``constraint`` holds for every number of an event of ``dims`` dimensions."""
    return _EventConstraint(constraint, dims)
