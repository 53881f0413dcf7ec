"""Parameters initialised by the first batch of training data."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.private import inside_functorch

__all__ = ["DataDependent"]


class DataDependent(nn.Module):
    """A module some of whose parameters are initialised by the first batch that it sees in training mode.

    A subclass calls :meth:`wait_for_data` in its constructor and, if :attr:`takes_data`, :meth:`initialize`.

    References:
        Weight Normalization, Salimans and Kingma, 2016 (arXiv:1602.07868).
    """

    initialized: Tensor
    awaits_data: bool = False
    """The buffer ``initialized``, negated, for Python: no pass waits for a device to read it."""
    _values: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None  # before and after the initialisation

    @property
    def takes_data(self) -> bool:
        """Whether the next batch initialises the parameters.

        Under ``vmap`` it does not, since a row is not a batch; nor while ``torch.jit`` traces, since the graph would
        then set them in every call.
        """
        return self.awaits_data and self.training and not (inside_functorch() or torch.jit.is_tracing())

    def wait_for_data(self, *names: str) -> None:
        """Name the parameters that data initialise."""
        self.register_buffer("initialized", torch.tensor(False))
        self.awaits_data, self._names = True, names
        self.register_load_state_dict_post_hook(_read_buffer)

    @torch.no_grad()
    def initialize(self, values: Mapping[str, Tensor]) -> None:
        """Set parameters to values computed from data; those without a value stay as they are."""
        before = self._copy_parameters()
        for name, value in values.items():
            self.get_parameter(name).copy_(value)
        self._values = before, self._copy_parameters()
        self.initialized.fill_(True)
        self.awaits_data = False

    @torch.no_grad()
    def reset_if_untrained(self) -> None:
        """Wait for data again, unless the parameters were trained since they were initialised; a fit calls this."""
        if self._values is None:
            return
        before, after = self._values
        if all(torch.equal(self.get_parameter(name).to(value), value) for name, value in after.items()):
            for name, value in before.items():
                self.get_parameter(name).copy_(value)
            self.initialized.fill_(False)
            self.awaits_data, self._values = True, None

    def _copy_parameters(self) -> dict[str, Tensor]:
        return {name: self.get_parameter(name).detach().clone() for name in self._names}


def _read_buffer(module: DataDependent, _: Any) -> None:
    """Follow the buffer of a loaded state."""
    module.awaits_data, module._values = not module.initialized, None
