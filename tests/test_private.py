"""The private names of libraries: each does what it is used for, so that a release that changes it fails here."""

import torch
from torch import nn

from pyroflows.private import contents, inside_functorch, version


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
