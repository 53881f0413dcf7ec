"""The private names of libraries: each does what it is used for, so that a release that changes it fails here."""

import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.infer.autoguide.guides import prototype_hide_fn
from pyro.nn import PyroModule
from torch import nn

from pyroflows.private import (
    DispatchMode,
    check_prototype,
    contents,
    inside_functorch,
    inside_pyro_call,
    make_plates,
    name_in_store,
    registries,
    version,
)


def test_torch_func_is_seen_at_work():
    seen = []

    def row(x):
        seen.append(inside_functorch())
        return x.sum()

    assert not inside_functorch()
    torch.func.vmap(row)(torch.ones(2, 3))
    torch.func.grad(row)(torch.ones(3))
    assert seen == [True, True]
    assert not inside_functorch()


def test_writes_in_place_move_the_version():
    x = torch.ones(3)
    before = version(x)
    x.add_(1)
    assert version(x) > before
    with torch.inference_mode():
        assert version(torch.ones(3)) == 0


def test_the_contents_of_a_module_are_its_modes_parameters_and_buffers():
    module = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.BatchNorm1d(3)), nn.Identity())
    module[2].eval()
    modes, tensors = contents(module)
    assert sorted(modes) == sorted(part.training for part in module.modules())
    assert {id(tensor) for tensor in tensors} == {id(t) for t in (*module.parameters(), *module.buffers())}


class Outer(PyroModule):
    def __init__(self):
        super().__init__("outer")
        self.inner = PyroModule("unnamed")
        self.inner.layer = nn.Linear(2, 3)
        self.seen = []

    def forward(self):
        self.seen.append(inside_pyro_call(self))
        return self.inner.layer


def test_the_name_in_pyros_store_is_the_one_that_a_call_registers():
    module = Outer()
    module()
    names = {f"{name_in_store(module.inner, 'layer')}$$${name}" for name in ("weight", "bias")}
    assert set(pyro.get_param_store().keys()) == names == {"outer.inner.layer$$$weight", "outer.inner.layer$$$bias"}


def test_a_call_of_a_pyro_module_is_seen():
    module = Outer()
    assert not inside_pyro_call(module)
    module()
    assert module.seen == [True]
    assert not inside_pyro_call(module)


def rows(size=3):
    with pyro.plate("rows", size):
        pyro.sample("x", dist.Normal(0.0, 1.0))


def test_a_guide_in_a_list_is_compared_with_the_whole_model():
    guides = AutoGuideList(rows)
    guides.append(AutoNormal(rows))
    guides()
    latents = poutine.block(rows, prototype_hide_fn)
    check_prototype(guides, poutine.trace(latents).get_trace())
    with pytest.raises(AssertionError):
        check_prototype(guides, poutine.trace(latents).get_trace(4))


def test_plates_of_a_guide_are_made_without_a_run():
    guide = AutoNormal(rows)
    guide()
    guide.plates = {}
    make_plates(guide)
    assert list(guide.plates) == ["rows"]
    assert guide.plates["rows"].size == 3


def test_a_dispatch_mode_sees_operations_and_imports_no_compiler():
    names = []

    class Names(DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.overloadpacket.__name__)
            return func(*args, **kwargs or {})

    with Names():
        torch.ones(2) + 1
    assert names == ["ones", "add"]
    code = (
        "import sys, torch; from pyroflows import maf; from pyroflows.recipe import describe; "
        "describe(maf(2, num_layers=1)); assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_a_module_has_registered_is_what_unpickling_sets():
    module = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, affine=False))
    module[0].register_buffer("unsaved", torch.ones(1), persistent=False)
    for part in module.modules():
        state = part.__getstate__()
        assert registries(part).items() <= {name: state[name] for name in registries(part)}.items()
    assert registries(module[0])["_non_persistent_buffers_set"] == {"unsaved"}
    assert registries(module[1])["_parameters"] == {"weight": None, "bias": None}
    assert list(registries(module)["_modules"]) == ["0", "1"]
