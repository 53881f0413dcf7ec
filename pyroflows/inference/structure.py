"""The structure of a Pyro model, read from its first run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor

from pyroflows.inference.sites import LatentSite, initial_value, is_deterministic, nested, unconstrained_value

__all__ = ["ModelStructure", "device_of"]

_SITE_KEYS = (
    *("type", "name", "fn", "value", "is_observed", "infer"),
    *("cond_indep_stack", "scale", "mask", "args", "kwargs"),
)
_PERIODIC = (dist.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)


def _floating_tensors(arguments: Any) -> Iterator[Tensor]:
    if isinstance(arguments, Tensor) and arguments.is_floating_point():
        yield arguments
    elif isinstance(arguments, Mapping):
        yield from _floating_tensors(tuple(arguments.values()))
    elif isinstance(arguments, (tuple, list)):
        for argument in arguments:
            yield from _floating_tensors(argument)


def device_of(*arguments: Any) -> torch.device:
    """Return the device of the first floating-point tensor among arguments, or the CPU."""
    return next(_floating_tensors(arguments), torch.empty(())).device


@dataclass
class ModelStructure:
    """The sites of a model, as its first run has them."""

    latents: list[LatentSite] = field(default_factory=list)  # the continuous ones, in the order of the vector
    latent_nodes: dict[str, dict[str, Any]] = field(default_factory=dict)  # their nodes in the trace
    initial: Tensor = field(default_factory=lambda: torch.empty(0))  # their values, as a point of unconstrained space
    discrete: dict[str, bool] = field(default_factory=dict)  # the discrete ones; whether the model enumerates each
    observations: dict[str, Tensor] = field(default_factory=dict)
    fixed: dict[str, Tensor] = field(default_factory=dict)  # the rows of each plate, the same in every run
    subsampled: list[str] = field(default_factory=list)  # the plates that take only some of their rows
    parameters: list[str] = field(default_factory=list)  # of ``pyro.param`` statements
    shapes: dict[str, Size] = field(default_factory=dict)  # of values, and of the observations' log-densities
    max_plate_nesting: int = 0

    @classmethod
    def of(cls, model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> "ModelStructure":
        """Run a model with each latent at its initial value, and read the trace."""
        trace = _first_run(model, args, kwargs)
        structure = cls(parameters=[name for name, node in trace.nodes.items() if node["type"] == "param"])
        samples = {name: node for name, node in trace.nodes.items() if node["type"] == "sample"}
        for name, node in samples.items():
            structure._read_plates(name, node)
        parts = []
        for name, node in samples.items():
            if site_is_subsample(node):
                continue
            if node["is_observed"]:
                structure._read_observed(name, node)
            elif node["fn"].support.is_discrete:
                structure._read_discrete(name, node)
            else:
                parts.append(structure._read_latent(name, node))
        if not sum(part.numel() for part in parts):
            raise ValueError("expected a model with continuous latent sites; got none")
        terms = [node["log_prob"] for node in samples.values()]
        # Priors with plain numbers draw float32 also in a model of float64 data, which must not lose its precision.
        dtype = reduce(torch.promote_types, [tensor.dtype for tensor in (*parts, *terms)])
        device = max((tensor.device for tensor in (*parts, *terms)), key=lambda device: device.type != "cpu")
        structure.initial = torch.cat([part.reshape(-1).to(device, dtype) for part in parts])
        return structure

    def _read_plates(self, name: str, node: Any) -> None:
        frames = [frame for frame in node["cond_indep_stack"] if frame.vectorized]
        self.max_plate_nesting = max([self.max_plate_nesting, *(-frame.dim for frame in frames)])
        if site_is_subsample(node):
            self.fixed[name] = node["value"]
            if len(node["value"]) < node["fn"].size:
                self.subsampled.append(name)

    def _read_observed(self, name: str, node: Any) -> None:
        deterministic = is_deterministic(node)
        self.shapes[name] = node["value" if deterministic else "log_prob"].shape
        if not deterministic and not isinstance(node["fn"], dist.Unit):
            self.observations[name] = node["value"]

    def _read_discrete(self, name: str, node: Any) -> None:
        if not node["fn"].has_enumerate_support:
            raise ValueError(
                f"expected continuous latents, or discrete ones of finite support, which are summed out; got site "
                f"{name!r} of {type(node['fn']).__name__}"
            )
        self.discrete[name] = "enumerate" in node["infer"]

    def _read_latent(self, name: str, node: Any) -> Tensor:
        """Append a continuous latent; return its initial value in unconstrained space."""
        fn = node["fn"]
        for frame in node["cond_indep_stack"]:
            if frame.name in self.subsampled:
                raise ValueError(
                    f"expected latents outside subsampled plates, since all minibatches would share them; got site "
                    f"{name!r} in plate {frame.name!r}, which draws {frame.size} of its rows: use AmortizedFlow"
                )
        for inner in nested(fn):
            if isinstance(inner, _PERIODIC):
                raise ValueError(
                    f"expected latents with a density over the reals or a part of them; got site {name!r} of "
                    f"{type(inner).__name__}, whose density is periodic: give it an ImproperUniform over one period "
                    f"and a factor"
                )
        part = unconstrained_value(name, fn.support, node["value"])
        start = self.latents[-1].stop if self.latents else 0
        shape = self.shapes[name] = node["value"].shape
        self.latents.append(LatentSite(name, shape, part.shape, start, fn.support, len(fn.batch_shape)))
        self.latent_nodes[name] = {key: node[key] for key in _SITE_KEYS}
        return part


def _first_run(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> poutine.Trace:
    """Run a model, as the user has it, with each latent at its initial value."""
    likes = [*_floating_tensors((args, kwargs)), torch.empty(()), torch.empty((), dtype=torch.float64)]
    unique = list({(like.dtype, like.device): like for like in likes}.values())
    for like in unique:
        try:
            with poutine.block(), torch.no_grad(), InitMessenger(partial(initial_value, like=like)):
                trace = poutine.trace(model).get_trace(*args, **kwargs)
                trace.compute_log_prob()
            return trace
        except RuntimeError:  # an improper prior's value of another dtype than the data in a closure
            if like is unique[-1]:
                raise
    raise AssertionError
