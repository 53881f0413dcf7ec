"""Normalizing flows for Pyro: density models, sites of a model, and variational guides from the same layers."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pyroflows._version import __version__ as __version__

# Not in pyroflows.api, since scikit-learn takes a second to import.
_ESTIMATORS = ("FlowClassifier", "FlowDensity")

if TYPE_CHECKING:
    from pyroflows.api import *  # noqa: F403
    from pyroflows.api import __all__ as __all__
    from pyroflows.tables.estimator import FlowClassifier as FlowClassifier
    from pyroflows.tables.estimator import FlowDensity as FlowDensity
else:

    def __getattr__(name: str) -> Any:
        """Import a submodule or a public name on first use: ``pyroflows --help`` waits neither for torch nor Pyro."""
        is_special = name.startswith("__") and name != "__all__"
        if not is_special and find_spec(f"{__name__}.{name}"):
            return import_module(f"{__name__}.{name}")
        if not is_special:
            source = import_module("pyroflows.tables.estimator" if name in _ESTIMATORS else "pyroflows.api")
            if hasattr(source, name):
                return globals().setdefault(name, getattr(source, name))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *import_module("pyroflows.api").__all__, *_ESTIMATORS})
