"""Warnings of our own fail a test, those of other packages do not."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

WARN = "import warnings; warnings.warn('a warning')"


@pytest.mark.parametrize("module", ["pyroflows", "pyroflows.layers.linear", "conftest", "contract", __name__])
def test_warnings_of_our_own_are_errors(module):
    with pytest.raises(UserWarning, match="a warning"):
        exec(WARN, {"__name__": module})


@pytest.mark.parametrize("module", ["torch", "arviz", "torch._dynamo.guards", "testing"])
def test_warnings_of_other_packages_are_not(module):
    with warnings.catch_warnings(record=True) as caught:
        exec(WARN, {"__name__": module})
    assert [str(warning.message) for warning in caught] == ["a warning"]


def test_numpys_warnings_about_our_numbers_are_errors():
    with pytest.raises(RuntimeWarning, match="divide by zero"):
        np.log(np.zeros(1))
