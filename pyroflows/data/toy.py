"""Toy densities in the plane: seeded samples, and their exact log-density."""

import functools
import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Generator, Size, Tensor
from torch.distributions import MultivariateNormal

from pyroflows.arguments import check_counts, check_event, check_integer, check_number, check_sizes

__all__ = [
    "TOY_DENSITIES",
    "Checkerboard",
    "Circles",
    "EightGaussians",
    "Pinwheel",
    "RandomGaussianMixture",
    "Spirals",
    "ToyDensity",
    "TwoMoons",
]

LOG_2PI = math.log(2 * math.pi)


def _uniform(generator: Generator | None, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def _normal(generator: Generator | None, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _choice(generator: Generator | None, n: int, choices: int) -> Tensor:
    return torch.randint(choices, (n,), generator=generator)


def _either(first: Tensor, second: Tensor, generator: Generator | None) -> Tensor:
    return torch.where(_choice(generator, len(first), 2)[:, None] == 0, first, second)


def _polar(radius: Tensor, angle: Tensor) -> Tensor:
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1)


def _quadrature(end: float, width: float) -> tuple[Tensor, Tensor]:
    """Return Gauss-Legendre nodes and weights on [0, ``end``], 12 to a panel; panels are at most ``width`` long."""
    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(12))
    panels = math.ceil(end / width)
    starts = torch.arange(panels, dtype=torch.float64)
    step = end / panels
    return ((starts[:, None] + (nodes + 1) / 2) * step).flatten(), (weights * step / 2).repeat(panels)


class ToyDensity:
    """A density with seeded samples and an exact log-density; a subclass defines ``_draw`` and ``_log_density``.

    The parameters of the densities here must be positive, and a seed at least 0: a ValueError says which is not.

    Example:
        >>> class Square(ToyDensity):
        ...     def _draw(self, n, generator):
        ...         return torch.rand(n, 2, generator=generator)
        ...
        ...     def _log_density(self, x):
        ...         return torch.where(((x >= 0) & (x <= 1)).all(-1), 0.0, -math.inf)
        >>> Square().log_prob(Square().sample(3, seed=0))
        tensor([0., 0., 0.])
    """

    @property
    def features(self) -> int:
        """The length of one sample."""
        return 2

    def sample(self, n: int, *, seed: int | None = None) -> Tensor:
        """Draw independent points.

        Args:
            n: number of points.
            seed: of the points; None draws from torch's global generator.

        Shapes:
            result: ``(n, features)``, float32.

        Raises:
            ValueError: ``n`` is not a positive integer, or ``seed`` not a non-negative one.
        """
        check_sizes(n=n)
        if seed is not None:
            check_counts(seed=seed)
        with torch.device("cpu"):  # the same points wherever they are used
            points = self._draw(n, None if seed is None else Generator().manual_seed(seed)).float()
        return points.to(torch.get_default_device())

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log-density in nats, computed in float64 and returned in the dtype of ``x``; it has gradients.

        Args:
            x: points, shape ``(*batch, features)``.

        Shapes:
            result: ``(*batch,)``.

        Raises:
            TypeError: ``x`` is not a floating-point tensor.
            ValueError: ``x`` has another shape.
        """
        check_event(x, Size((self.features,)))
        log_prob = self._log_density(x.double().reshape(-1, self.features))
        return log_prob.reshape(x.shape[:-1]).to(x.dtype)

    def _draw(self, n: int, generator: Generator | None) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define _draw(n, generator)")

    def _log_density(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define _log_density(x)")


class _Parametric(ToyDensity):
    """A density whose parameters are the fields of a dataclass: positive numbers, and a seed of at least 0."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.type is int:
                check_integer(field.name, value, 0 if field.name == "seed" else 1)
            else:
                check_number(field.name, value, "(0, inf)")


@dataclass(frozen=True)
class _Blurred(_Parametric):
    """Weighted points in the plane, each blurred by a normal of standard deviation ``noise``."""

    noise: float

    def _draw_point(self, n: int, generator: Generator | None) -> Tensor:
        raise NotImplementedError

    def _points(self) -> tuple[Tensor, Tensor]:
        """Return the points, (m, 2), of a mixture or a quadrature, and the logarithms of their weights, (m,)."""
        raise NotImplementedError

    def _draw(self, n: int, generator: Generator | None) -> Tensor:
        return self._draw_point(n, generator) + self.noise * _normal(generator, n, 2)

    def _log_density(self, x: Tensor) -> Tensor:
        points, log_weights = (values.to(x.device) for values in self._points())
        points, x = points / self.noise, x / self.noise
        # With the square expanded, the (n, points) numbers come from one matrix product.
        constants = log_weights - points.square().sum(-1) / 2
        parts = x.split(max(1, 2**18 // len(points)))  # small enough for the processor's cache
        log_sums = torch.cat([torch.logsumexp(torch.addmm(constants, part, points.T), -1) for part in parts])
        return log_sums - x.square().sum(-1) / 2 - LOG_2PI - 2 * math.log(self.noise)


@dataclass(frozen=True)
class TwoMoons(_Blurred):
    r"""Two interleaved half circles of radius 1, blurred by normal noise; at noise 0.05 the entropy is 0.289 nats.

    The arcs are those of scikit-learn's ``make_moons``, with random angles instead of a grid, so that points are
    independent and their density is an integral along the arcs, computed by quadrature:

    .. math:: p(x) = \frac{1}{2\pi} \sum_{c} \int_0^\pi \mathcal{N}(x;\, c(t), \sigma^2 I)\, dt

    Args:
        noise: the standard deviation of the noise.

    Example:
        >>> moons = TwoMoons(noise=0.05)
        >>> x = moons.sample(2000, seed=0)
        >>> bool((-moons.log_prob(x).mean() - 0.289).abs() < 0.05)
        True
    """

    noise: float = 0.05

    def _curves(self, t: Tensor) -> tuple[Tensor, Tensor]:
        outer = _polar(torch.ones_like(t), t)
        return outer, t.new_tensor([1.0, 0.5]) - outer

    def _draw_point(self, n: int, generator: Generator | None) -> Tensor:
        return _either(*self._curves(math.pi * _uniform(generator, n)), generator)

    def _points(self) -> tuple[Tensor, Tensor]:
        t, weights = _quadrature(math.pi, self.noise)
        return torch.cat(self._curves(t)), (weights.log() - math.log(2 * math.pi)).repeat(2)


@dataclass(frozen=True)
class Circles(_Blurred):
    r"""Two circles about the origin, of radius 1 and ``factor``, blurred by normal noise.

    The density of a blurred circle of radius R is known in closed form:

    .. math:: p_R(x) = \frac{1}{2\pi\sigma^2} \exp\left(-\frac{|x|^2 + R^2}{2\sigma^2}\right) I_0(R |x| / \sigma^2)

    Args:
        noise: the standard deviation of the noise.
        factor: the radius of the inner circle, between 0 and 1.

    Example:
        >>> Circles(factor=0.5).sample(3, seed=0).shape
        torch.Size([3, 2])
    """

    noise: float = 0.05
    factor: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.factor < 1:
            raise ValueError(f"expected factor to be between 0 and 1; got {self.factor!r}")

    def _draw_point(self, n: int, generator: Generator | None) -> Tensor:
        outer = _polar(torch.ones(n).double(), 2 * math.pi * _uniform(generator, n))
        return _either(outer, self.factor * outer, generator)

    def _log_density(self, x: Tensor) -> Tensor:
        variance = self.noise**2
        radius = x.new_tensor([1.0, self.factor])
        distance = torch.linalg.vector_norm(x, dim=-1)[:, None]
        # i0e is exp(-z) I_0(z): the exponent becomes a square, and nothing overflows far from the circles.
        log_rings = torch.special.i0e(radius * distance / variance).log() - (distance - radius) ** 2 / (2 * variance)
        return torch.logsumexp(log_rings, -1) - math.log(2 * variance) - LOG_2PI


@dataclass(frozen=True)
class Spirals(_Blurred):
    r"""Two spiral arms from the origin, each the other turned by half a turn, blurred by normal noise.

    The arms are those of FFJORD's ``2spirals``, without its second, uniform noise, so that the density is an integral
    along the arms, computed by quadrature. With the angle :math:`t = t_1 \sqrt{u}` and ``u`` uniform:

    .. math:: p(x) = \sum_{\pm} \int_0^{t_1} \frac{t}{t_1^2}\, \mathcal{N}(x;\, \pm c(t), \sigma^2 I)\, dt,
        \quad c(t) = \tfrac{t}{3} (-\cos t, \sin t), \quad t_1 = 2\pi\,\mathrm{turns}

    Args:
        noise: the standard deviation of the noise.
        turns: number of turns of an arm around the origin.

    References:
        FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models,
        Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud, 2019, arXiv:1810.01367

    Example:
        >>> Spirals().sample(3, seed=0).shape
        torch.Size([3, 2])
    """

    noise: float = 0.1
    turns: float = 1.5

    def _curves(self, t: Tensor) -> tuple[Tensor, Tensor]:
        arm = _polar(t / 3, math.pi - t)
        return arm, -arm

    def _draw_point(self, n: int, generator: Generator | None) -> Tensor:
        return _either(*self._curves(2 * math.pi * self.turns * _uniform(generator, n).sqrt()), generator)

    def _points(self) -> tuple[Tensor, Tensor]:
        end = 2 * math.pi * self.turns
        fastest = math.hypot(1, end) / 3
        t, weights = _quadrature(end, self.noise / fastest)
        return torch.cat(self._curves(t)), ((weights * t).log() - 2 * math.log(end)).repeat(2)


@dataclass(frozen=True)
class Checkerboard(ToyDensity):
    """The uniform density on every other cell, of side 2, of a 4x4 board around the origin; its entropy is ln 32 nats.

    Example:
        >>> Checkerboard().log_prob(torch.tensor([[-3.0, -3.0], [-1.0, -3.0]]))
        tensor([-3.4657,    -inf])
    """

    def _draw(self, n: int, generator: Generator | None) -> Tensor:
        column = _choice(generator, n, 4)
        row = 2 * _choice(generator, n, 2) + column % 2
        # The bound differs from the next cell in float32 too, so that rounding moves no point there.
        within = _uniform(generator, n, 2).clamp(max=1 - 2**-20)
        return 2 * (torch.stack((column, row), -1) + within) - 4

    def _log_density(self, x: Tensor) -> Tensor:
        cell = (x / 2 + 2).floor()
        inside = ((cell >= 0) & (cell < 4)).all(-1) & (cell.sum(-1) % 2 == 0)
        return torch.where(inside, -math.log(32), -math.inf)


@dataclass(frozen=True)
class EightGaussians(_Blurred):
    """Eight round normals of equal weight, evenly spaced on a circle.

    Args:
        noise: the standard deviation of each.
        radius: the radius of the circle.

    Example:
        >>> EightGaussians().log_prob(torch.tensor([[4.0, 0.0]]))
        tensor([-2.5310])
    """

    noise: float = 0.5
    radius: float = 4.0

    def _draw_point(self, n: int, generator: Generator | None) -> Tensor:
        return self._points()[0][_choice(generator, n, 8)]

    def _points(self) -> tuple[Tensor, Tensor]:
        angle = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
        return _polar(torch.full_like(angle, self.radius), angle), torch.full_like(angle, -math.log(8))


@dataclass(frozen=True)
class Pinwheel(_Parametric):
    r"""Normal arms about the origin, twisted into a pinwheel.

    A point of an arm is drawn around (1, 0), then rotated by the arm's angle and by :math:`\mathrm{rate} \cdot e^r`,
    with r its distance from the origin. In the original r is the first coordinate; with the distance the twist
    preserves areas, and the density is that of the normals, in closed form.

    Args:
        num_arms: number of arms.
        radial_scale: an arm's standard deviation in the direction of the origin.
        tangential_scale: its standard deviation across.
        rate: strength of the twist.

    References:
        Composing graphical models with neural networks for structured representations and fast inference,
        Johnson, Duvenaud, Wiltschko, Datta, Adams, 2016, arXiv:1603.06277

    Example:
        >>> Pinwheel(num_arms=3).sample(4, seed=0).shape
        torch.Size([4, 2])
    """

    num_arms: int = 5
    radial_scale: float = 0.3
    tangential_scale: float = 0.1
    rate: float = 0.25

    def _twist(self, distance: Tensor) -> Tensor:
        # Bounded, since the angle of an infinite twist is nan; no sample is that far from the origin.
        return self.rate * distance.clamp(max=20).exp()

    def _draw(self, n: int, generator: Generator | None) -> Tensor:
        point = _normal(generator, n, 2) * torch.tensor([self.radial_scale, self.tangential_scale]).double()
        along, across = (point + torch.tensor([1.0, 0.0])).unbind(-1)
        distance = torch.hypot(along, across)
        arm = _choice(generator, n, self.num_arms) * (2 * math.pi / self.num_arms)
        return _polar(distance, torch.atan2(across, along) + arm + self._twist(distance))

    def _log_density(self, x: Tensor) -> Tensor:
        distance = torch.linalg.vector_norm(x, dim=-1)[:, None]
        arms = torch.arange(self.num_arms, dtype=x.dtype, device=x.device) * (2 * math.pi / self.num_arms)
        angle = arms + self._twist(distance)  # (n, arms)
        along = x[:, :1] * angle.cos() + x[:, 1:] * angle.sin()
        across = x[:, 1:] * angle.cos() - x[:, :1] * angle.sin()
        squares = ((along - 1) / self.radial_scale) ** 2 + (across / self.tangential_scale) ** 2
        scales = self.num_arms * self.radial_scale * self.tangential_scale
        return torch.logsumexp(-squares / 2, -1) - math.log(scales) - LOG_2PI


@dataclass(frozen=True)
class RandomGaussianMixture(_Parametric):
    """A mixture of normals of equal weight, with random means and random full covariances.

    Means are normal with standard deviation 3; covariances have random axes, with standard deviations uniform between
    0.3 and 1.

    Args:
        features: the dimension.
        num_components: number of normals.
        seed: of the means and covariances; samples have another.

    Example:
        >>> RandomGaussianMixture(features=3, num_components=4).means.shape
        torch.Size([4, 3])
    """

    features: int = 2
    num_components: int = 5
    seed: int = 0

    @functools.cached_property
    def _parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = Generator().manual_seed(self.seed)
        means = 3 * _normal(generator, self.num_components, self.features)
        axes = torch.linalg.qr(_normal(generator, self.num_components, self.features, self.features)).Q
        return means, axes, 0.3 + 0.7 * _uniform(generator, self.num_components, self.features)

    @property
    def means(self) -> Tensor:
        """The means, shape ``(num_components, features)``, float64."""
        return self._parameters[0]

    @property
    def covariances(self) -> Tensor:
        """The covariances, shape ``(num_components, features, features)``, float64."""
        _, axes, scales = self._parameters
        return (axes * scales[:, None].square()) @ axes.mT

    def _draw(self, n: int, generator: Generator | None) -> Tensor:
        means, axes, scales = self._parameters
        component = _choice(generator, n, self.num_components)
        normal = scales[component] * _normal(generator, n, self.features)
        return means[component] + (axes[component] @ normal[..., None]).squeeze(-1)

    def _log_density(self, x: Tensor) -> Tensor:
        normals = MultivariateNormal(self.means.to(x.device), self.covariances.to(x.device), validate_args=False)
        return torch.logsumexp(normals.log_prob(x[:, None]), -1) - math.log(self.num_components)


TOY_DENSITIES: dict[str, type[ToyDensity]] = {
    "moons": TwoMoons,
    "circles": Circles,
    "spirals": Spirals,
    "checkerboard": Checkerboard,
    "eight_gaussians": EightGaussians,
    "pinwheel": Pinwheel,
    "gaussian_mixture": RandomGaussianMixture,
}
