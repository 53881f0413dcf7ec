"""Small flows, data and objectives for the tests of training, and `fit` with all its options as keywords."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch.utils.data import IterableDataset

import pyroflows
from pyroflows import ElementwiseAffine, FitOptions, Flow, LULinear, StandardNormal, realnvp

__all__ = ["Stream", "affine", "failing", "fit", "gaussian", "same", "small"]

_FIELDS = {field.name for field in dataclasses.fields(FitOptions)}


def fit(flow, x=None, **options):
    """Call `pyroflows.fit`; keywords that are fields of FitOptions go there."""
    fields = {name: options.pop(name) for name in _FIELDS & options.keys()}
    return pyroflows.fit(flow, x, options=FitOptions(**fields), **options)


def affine(features=2, **options):
    return Flow(StandardNormal(features), [LULinear(features), ElementwiseAffine(features, **options)])


def small(**options):
    return realnvp(2, num_layers=2, hidden_features=(8,), **options)


def gaussian(rows=200, features=2, seed=0):
    return 3 + 2 * torch.randn(rows, features, generator=torch.Generator().manual_seed(seed))


def same(first, second):
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def failing(when):
    """The likelihood, which is not finite at the training steps for which `when` holds."""
    count = [0]

    def objective(flow, x, context):
        loss = -flow.log_prob(x, context).mean()
        if torch.is_grad_enabled():
            count[0] += 1
            if when(count[0]):
                loss = loss * math.nan
        return loss

    return objective


class Stream(IterableDataset):
    def __iter__(self):
        yield from gaussian().split(20)
