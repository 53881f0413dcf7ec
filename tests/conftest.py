"""Settings of every test: one thread, one seed, an empty parameter store, Pyro's checks, and our own warnings."""

from __future__ import annotations

from pathlib import Path

import pyro
import pytest
import torch
from hypothesis import settings

collect_ignore = ["benchmarks/numpyro_models.py"]  # which needs JAX

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


def pytest_configure(config):
    """Turn warnings from the modules of this folder into errors; pyproject.toml does so for those of the package."""
    modules = "|".join(path.stem for path in Path(__file__).parent.glob("*.py"))
    config.addinivalue_line("filterwarnings", f"error:::({modules})$")


@pytest.fixture(autouse=True)
def _a_fresh_start():
    torch.manual_seed(0)
    pyro.clear_param_store()
    yield
    pyro.enable_validation(True)  # the default, which the first torch.compile of a process turns off
