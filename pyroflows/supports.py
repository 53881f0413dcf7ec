"""Supports: constraints on whole events."""

from typing import Any

from torch import Tensor
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions.transforms import IndependentTransform

__all__ = ["event_constraint"]


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


def event_constraint(constraint: constraints.Constraint, dims: int) -> constraints.Constraint:
    """Return the constraint that holds if ``constraint`` holds for every number of an event of ``dims`` dimensions."""
    return _EventConstraint(constraint, dims)
