"""One thread, one seed, an empty parameter store and Pyro's checks on, for every test."""

from __future__ import annotations

import pyro
import pytest
import torch
from hypothesis import settings
from torch.distributions import Distribution

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _a_fresh_start():
    torch.manual_seed(0)
    pyro.clear_param_store()
    checks = Distribution._validate_args
    yield
    # The first torch.compile of a process turns the checks of all distributions off.
    Distribution.set_default_validate_args(checks)
