"""Dequantisation: noise of known density that makes discrete data continuous."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.arguments import (
    Shape,
    as_float_tensor,
    as_image_shape,
    as_shape,
    brief_shape,
    check_event_shape,
    check_integer,
    check_sizes,
    check_type,
)
from pyroflows.flow import Flow
from pyroflows.layers.conv_coupling import ConvCoupling
from pyroflows.layers.pointwise import Logit, Sigmoid
from pyroflows.priors import Uniform
from pyroflows.private import inside_functorch
from pyroflows.recipe import Recorded

__all__ = ["ColumnDequantizer", "Dequantizer", "UniformDequantizer", "VariationalDequantizer"]

_MARGIN = 1e-6  # distance of the base noise from 0 and 1, so that its logit is finite


class Dequantizer(Recorded, nn.Module):
    r"""Noise added to discrete data, so that the density of the sum bounds the probability of the data from below.

    .. math:: \log P(x) \ge \mathbb E_{q(y \mid x)}\bigl[\log p(y) - \log q(y \mid x)\bigr]

    The bound holds if :math:`q(y \mid x)` lies in the cell of numbers that :meth:`quantize` maps back to :math:`x`. A
    subclass defines ``forward`` and ``quantize``. On a CPU each call checks the values; on a GPU, which would have to
    wait for them, only :meth:`check` does.

    Args:
        shape: the event shape of the data.

    Shapes:
        x, y: ``(*batch, *event_shape)``; log_q: ``(*batch,)``.

    Raises:
        TypeError: the data are of the wrong dtype.
        ValueError: the data have another shape, or a value that they cannot have.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> dequantizer = UniformDequantizer(2, num_levels=4)
        >>> y, log_q = dequantizer(torch.tensor([[0, 3]]))
        >>> y, dequantizer.quantize(y)
        (tensor([[0.1241, 0.9421]]), tensor([[0, 3]], dtype=torch.uint8))
    """

    def __init__(self, shape: Shape):
        super().__init__()
        self.event_shape = as_shape(shape)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Draw ``y`` given ``x``; return it with its log-density."""
        raise NotImplementedError(f"{type(self).__name__} must define forward()")

    def quantize(self, y: Tensor) -> Tensor:
        """Return the discrete data in whose cell ``y`` lies."""
        raise NotImplementedError(f"{type(self).__name__} must define quantize()")

    def check(self, x: Tensor) -> None:
        """Raise an error for data that ``forward`` does not take, by dtype, shape and values, on any device."""
        self._check_form(x)
        self._check_values(x)

    def _check_values(self, x: Tensor) -> None:
        """Raise an error for values that the data cannot have; by default none."""

    def _check_form(self, x: Tensor) -> None:
        check_type("data as a tensor", x, Tensor)
        check_event_shape("data of shape", x, self.event_shape)

    def _check_call(self, x: Tensor) -> None:
        self._check_form(x)
        # A compiled graph and a mapped function cannot read values.
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and not inside_functorch():
            self._check_values(x)


class _Levels(Dequantizer):
    """Noise for the levels 0 to ``num_levels - 1``, whose cells divide [0, 1) evenly."""

    divisor: Tensor

    def __init__(self, shape: Shape, num_levels: int):
        super().__init__(shape)
        check_integer("num_levels", num_levels, 2)
        self.num_levels = num_levels
        # A tensor: a GPU would multiply by the reciprocal of a Python number, and its cells differ from a CPU's.
        self.register_buffer("divisor", torch.tensor(float(num_levels)), persistent=False)

    def quantize(self, y: Tensor) -> Tensor:
        level = (y * self.divisor).floor()
        # The product rounds, so a number near the edge of a cell is compared with the edges themselves.
        level = level + ((level + 1) / self.divisor <= y).to(y) - (level / self.divisor > y).to(y)
        return level.clamp(0, self.num_levels - 1).to(torch.uint8 if self.num_levels <= 256 else torch.int64)

    def _as_numbers(self, x: Tensor) -> Tensor:
        self._check_call(x)
        return x.to(self.divisor)

    def _number_in_cell(self, level: Tensor, u: Tensor) -> Tensor:
        """Return the number at a fraction ``u`` of the cell of its level, inside the cell even after rounding."""
        low, high = level / self.divisor, (level + 1) / self.divisor
        return torch.minimum((level + u) / self.divisor, torch.nextafter(high, low))

    @property
    def _log_cells(self) -> float:
        return self.event_shape.numel() * math.log(self.num_levels)

    def _check_form(self, x: Tensor) -> None:
        super()._check_form(x)
        if x.is_floating_point() or x.is_complex():
            raise TypeError(f"expected levels as integers from 0 to {self.num_levels - 1}; got {x.dtype}")

    def _check_values(self, x: Tensor) -> None:
        if not x.numel() or (x.dtype == torch.uint8 and self.num_levels >= 256):
            return
        low, high = (int(value) for value in x.aminmax())
        if low < 0 or high >= self.num_levels:
            raise ValueError(
                f"expected levels from 0 to {self.num_levels - 1}; got {low if low < 0 else high}: "
                f"num_levels, or the number of bits, is that of other data"
            )

    def extra_repr(self) -> str:
        return f"{brief_shape(self.event_shape)}, num_levels={self.num_levels}"


class UniformDequantizer(_Levels):
    r"""Uniform noise for levels, such as those of pixels, with the sum scaled to [0, 1).

    .. math:: y = \frac{x + u}{L}, \quad u \sim \mathcal U[0, 1)^M, \qquad \log q(y \mid x) = M \log L

    Args:
        shape: the event shape of the data, of :math:`M` numbers.
        num_levels: the number of levels :math:`L`; 256 for eight bits.

    Shapes:
        x: integers, ``(*batch, *event_shape)``; y: floats of the same shape; log_q: ``(*batch,)``.

    Raises:
        TypeError: the data are not integers.
        ValueError: another shape, or a level outside ``0, ..., num_levels - 1``.

    References:
        A note on the evaluation of generative models, Theis, van den Oord and Bethge, 2016 (arXiv:1511.01844).

    Example:
        >>> dequantizer = UniformDequantizer((1, 8, 8), num_levels=17)
        >>> x = torch.randint(17, (5, 1, 8, 8))
        >>> y, log_q = dequantizer(x)
        >>> bool((dequantizer.quantize(y) == x).all()), log_q.shape
        (True, torch.Size([5]))
    """

    def __init__(self, shape: Shape, num_levels: int = 256):
        super().__init__(shape, num_levels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        level = self._as_numbers(x)
        y = self._number_in_cell(level, torch.rand_like(level))
        return y, y.new_full(y.shape[: y.dim() - len(self.event_shape)], self._log_cells)


class VariationalDequantizer(_Levels):
    r"""Noise for levels of pixels whose distribution, given the image, is a conditional flow, trained with the model.

    .. math:: y = \frac{x + u}{L}, \quad u \sim q(u \mid x), \qquad \log q(y \mid x) = \log q(u \mid x) + M \log L

    The flow maps uniform noise through a logit, checkerboard couplings that see the image, and a sigmoid; it is
    initialised to nearly uniform noise. Its parameters belong to the model and tighten the bound on the same
    probability, so that the bits per dimension are comparable with those of uniform noise.

    Args:
        shape: ``(C, H, W)``.
        num_levels: the number of levels :math:`L`.
        hidden_channels, num_layers: channels of the couplings' networks, and number of couplings.

    Shapes:
        x: integers, ``(*batch, C, H, W)``; y: floats of the same shape; log_q: ``(*batch,)``.

    Raises:
        TypeError, ValueError: as by :class:`UniformDequantizer`.

    References:
        Flow++: Improving Flow-Based Generative Models with Variational Dequantization and Architecture Design, Ho et
        al., 2019 (arXiv:1902.00275).

    Example:
        >>> y, log_q = VariationalDequantizer((1, 8, 8), num_levels=17)(torch.randint(17, (5, 1, 8, 8)))
        >>> log_q.shape
        torch.Size([5])
    """

    def __init__(self, shape: Shape, num_levels: int = 256, hidden_channels: int = 32, num_layers: int = 4):
        super().__init__(as_image_shape(shape), num_levels)
        check_sizes(num_layers=num_layers)
        image = self.event_shape
        network = {"context_shape": image, "hidden_channels": hidden_channels}
        options: dict[str, Any] = {"mask": "checkerboard", "context_features": image.numel(), **network}
        couplings = [ConvCoupling(image, flip=number % 2 == 1, **options) for number in range(num_layers)]
        self.noise = Flow(Uniform(image, _MARGIN, 1 - _MARGIN), [Logit(image), *couplings, Sigmoid(image)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        level = self._as_numbers(x)
        context = (2 * level + 1) / self.num_levels - 1  # within [-1, 1]
        u, log_q = self.noise.rsample_and_log_prob((), context.flatten(-3))
        return self._number_in_cell(level, u), log_q + self._log_cells


class ColumnDequantizer(Dequantizer):
    r"""Uniform noise for those columns of a table that lie on a grid, such as counts; others stay as they are.

    .. math:: y_i = x_i + s_i u_i, \quad u_i \sim \mathcal U[0, 1), \qquad
        \log q(y \mid x) = -\sum_{i:\, s_i > 0} \log s_i

    A density fitted to integers has unbounded spikes at them; with noise it is bounded by their probabilities.

    Args:
        steps: the step :math:`s_i` of the grid of each column: 1 for integers, 0 for continuous numbers.
        offset: a point of each grid, one number or one for each column. A standardised column of integers has the step
            ``1 / scale`` and the offset ``-mean / scale``; :meth:`from_data` computes them.

    Shapes:
        x, y: ``(*batch, features)``; log_q: ``(*batch,)``.

    Raises:
        ValueError: a step is negative, a shape does not fit, a value is not on its grid, or a step is too small for the
            precision of the numbers.

    Example:
        >>> dequantizer = ColumnDequantizer([1.0, 0.0])
        >>> x = torch.tensor([[3.0, 0.25], [-1.0, 0.5]])
        >>> y, log_q = dequantizer(x)
        >>> bool((y[:, 1] == x[:, 1]).all()), dequantizer.quantize(y)
        (True, tensor([[ 3.0000,  0.2500], [-1.0000,  0.5000]]))
    """

    steps: Tensor
    offset: Tensor

    def __init__(self, steps: Tensor | Sequence[float], offset: Tensor | Sequence[float] | float = 0.0):
        steps, offset = as_float_tensor(steps), as_float_tensor(offset)
        if steps.dim() != 1 or not steps.numel() or not steps.isfinite().all() or (steps < 0).any():
            raise ValueError(f"expected steps as one non-negative number for each column; got {steps.tolist()}")
        if offset.shape not in ((), steps.shape) or not offset.isfinite().all():
            raise ValueError(f"expected an offset that is one finite number or {len(steps)}; got {offset.tolist()}")
        super().__init__(len(steps))
        self.register_buffer("steps", steps.clone())
        self.register_buffer("offset", offset.to(steps).expand(steps.shape).clone())

    @classmethod
    def from_data(
        cls, x: Tensor, *, mean: Tensor | Sequence[float] | None = None, scale: Tensor | Sequence[float] | None = None
    ) -> "ColumnDequantizer":
        """Build a dequantizer of the columns of rows ``x`` that hold only integers.

        ``mean`` and ``scale`` are those of a standardised table, such as a :class:`Table`, whose columns are tested in
        their original units, up to the rounding of their dtype.
        """
        if not isinstance(x, Tensor) or x.dim() != 2 or not x.numel():
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"expected rows as a tensor of shape (rows, features), at least one of each; got {got}")
        dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
        shift = _per_column("mean", mean, x.shape[1], 0.0)
        factor = _per_column("scale", scale, x.shape[1], 1.0)
        if not (factor > 0).all():
            raise ValueError(f"expected a positive scale for each column; got {factor.tolist()}")
        values = x.detach().cpu().double() * factor
        precision = torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0
        rounding = precision * (values.abs() + shift.abs())
        values = values + shift
        # If rounding is as large as the step, every number looks like an integer.
        integer = ((values - values.round()).abs() <= rounding).all(0) & (rounding < 0.1).all(0)
        steps = torch.where(integer, 1 / factor, 0.0)
        # The point of the grid nearest to zero, so that adding it loses little precision.
        offset = torch.where(integer, (shift.round() - shift) / factor, 0.0)
        return cls(steps.to(dtype), offset.to(dtype))

    @property
    def discrete(self) -> Tensor:
        """Which columns are dequantized, shape ``(features,)``; the others are continuous."""
        return self.steps > 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check_call(x)
        x = x.to(self.steps)
        point = self._number(x).round()
        low, high = self._edge(point), self._edge(point + 1)
        noisy = torch.minimum(low + self.steps * torch.rand_like(x), torch.nextafter(high, low))
        return torch.where(self.steps > 0, noisy, x), -self._cells().log().sum().expand(x.shape[:-1])

    def quantize(self, y: Tensor) -> Tensor:
        point = self._number(y).floor()
        point = point + (self._edge(point + 1) <= y).to(y) - (self._edge(point) > y).to(y)
        return torch.where(self.steps > 0, self._edge(point), y)

    def _edge(self, point: Tensor) -> Tensor:
        return self.offset + self.steps * point

    def _number(self, x: Tensor) -> Tensor:
        return (x - self.offset) / self._cells()

    def _cells(self) -> Tensor:
        return torch.where(self.steps > 0, self.steps, 1)

    def _check_values(self, x: Tensor) -> None:
        x = x.to(self.steps).flatten(0, -2) if x.dim() > 1 else x.to(self.steps)[None]
        precision = torch.finfo(x.dtype).eps
        rounding = precision * (x.abs() + self.offset.abs())
        coarse = (self.steps > 0) & x.isfinite() & (8 * rounding > self.steps)
        away = (x - self._edge(self._number(x).round())).abs()
        # The step itself is rounded, which adds up over many steps.
        off = (self.steps > 0) & ~(away <= 1e-3 * self.steps + 4 * rounding)
        bad = coarse if coarse.any() else off
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            step, offset, value = self.steps[column], self.offset[column], x[row, column].item()
            far = f"steps of {step:g} to be far above the precision of {x.dtype}"
            multiples = f"multiples of the step {step:g} from {offset:g} in column {column}"
            expected = far if coarse.any() else multiples
            raise ValueError(f"expected {expected}; got {value:.9g} in row {row}, column {column}")

    def extra_repr(self) -> str:
        return f"{len(self.steps)}, discrete={int((self.steps > 0).sum())}"


def _per_column(name: str, values: Tensor | Sequence[float] | None, columns: int, default: float) -> Tensor:
    tensor = torch.full((columns,), default) if values is None else torch.as_tensor(values).detach().cpu()
    if tensor.shape != (columns,) or not tensor.isfinite().all():
        raise ValueError(f"expected {name} as {columns} finite numbers, one a column; got shape {tuple(tensor.shape)}")
    return tensor.double()
