"""Priors: distributions of the latent as modules, which return a Pyro distribution; and the logit-normal."""

import math
from collections.abc import Sequence
from numbers import Number
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor, nn
from torch.distributions import transform_to
from torch.distributions.utils import broadcast_all

from pyroflows.arguments import (
    Shape,
    as_float_tensor,
    as_shape,
    brief_shape,
    check_event_shape,
    check_number,
    check_option,
    check_sizes,
)
from pyroflows.recipe import Recorded

__all__ = ["DiagonalNormal", "GaussianMixture", "LogitNormal", "Prior", "StandardNormal", "StudentT", "Uniform"]

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


class Prior(Recorded, nn.Module):
    r"""A distribution over the latent that is a module, so that it moves, trains and saves with the flow.

    A subclass calls ``super().__init__(features)``, holds every number as a parameter or buffer, and defines
    ``forward()``, which returns a Pyro distribution without batch dimensions and with
    ``event_dim == len(event_shape)``. By default ``log_prob`` is that of this distribution; written as plain tensor
    code, it also works under ``torch.compile`` and ``torch.func.vmap``.

    Args:
        features: the number of features of the latent, or its event shape.

    Shapes:
        z: ``(*batch, *event_shape)``; log_prob: ``(*batch,)``.

    Raises:
        ValueError: the shape is not positive, or a latent has another shape.

    Example:
        >>> class Laplace(Prior):
        ...     def __init__(self, features):
        ...         super().__init__(features)
        ...         self.register_buffer("loc", torch.zeros(self.event_shape))
        ...
        ...     def forward(self):
        ...         return dist.Laplace(self.loc, torch.ones_like(self.loc)).to_event(len(self.event_shape))
        >>> Laplace(2).log_prob(torch.zeros(3, 2))
        tensor([-1.3863, -1.3863, -1.3863])
    """

    has_rsample: bool = True
    """Whether gradients pass through a sample to the prior's parameters."""

    def __init__(self, features: Shape):
        super().__init__()
        self.event_shape = as_shape(features)

    def forward(self) -> TorchDistribution:
        """Return the Pyro distribution at the present parameters."""
        raise NotImplementedError(f"{type(self).__name__} must define forward()")

    def log_prob(self, z: Tensor) -> Tensor:
        """Return the log-density of ``z``, shape ``(*batch,)``."""
        self._check(z)
        return _log_prob_anywhere(self(), z)

    def sample(self, sample_shape: Sequence[int] = (), *, temperature: float = 1.0) -> Tensor:
        """Draw latents of shape ``(*sample_shape, *event_shape)``, without gradients.

        The deviation from the centre is multiplied by the temperature, which must be 1 if the prior has no centre.
        """
        shape = Size(sample_shape)
        if 0 in shape:  # torch's categorical distribution cannot draw zero samples
            return self.sample().new_empty(shape + self.event_shape)
        with torch.no_grad():
            if temperature == 1.0:
                return self.rsample(shape) if self.has_rsample else self().sample(shape)
            check_number("temperature", temperature, "[0, inf)")
            return self._tempered(shape, float(temperature))

    def _tempered(self, shape: Size, temperature: float) -> Tensor:
        raise ValueError(f"expected temperature=1 for a {type(self).__name__}, which has no centre; got {temperature}")

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw latents through which gradients reach the parameters."""
        if not self.has_rsample:
            raise NotImplementedError(
                f"expected a reparameterised prior; got {type(self).__name__}, which has sample() but no rsample()"
            )
        return self().rsample(Size(sample_shape))

    def _check(self, z: Tensor) -> None:
        check_event_shape("a latent of shape", z, self.event_shape)

    def _sum(self, terms: Tensor) -> Tensor:
        return terms.sum(dim=tuple(range(-len(self.event_shape), 0)))

    def _register(self, name: str, value: Tensor, *, learnable: bool) -> None:
        """Register a parameter, or a buffer for a number that is not learned."""
        value = value.detach().clone(memory_format=torch.contiguous_format)
        if learnable:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    def extra_repr(self) -> str:
        return brief_shape(self.event_shape)


class _Normal(dist.Normal):
    """A normal that samples without ``torch.normal``, which makes a GPU's caller wait to check the scale."""

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(Size(sample_shape))


class _Joint(dist.Independent):
    """Independent features as one event; unlike torch's class it can sum over them in an empty batch."""

    def log_prob(self, value: Tensor) -> Tensor:
        return self.base_dist.log_prob(value).sum(dim=tuple(range(-self.reinterpreted_batch_ndims, 0)))


class StandardNormal(Prior):
    r"""Independent standard normals, without parameters.

    .. math:: \log p(z) = -\tfrac12 \sum_i (z_i^2 + \log 2\pi)

    Args:
        features: the number of features of the latent, or its event shape.

    Example:
        >>> StandardNormal(2).log_prob(torch.zeros(2))
        tensor(-1.8379)
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, features: Shape):
        super().__init__(features)
        self.register_buffer("loc", torch.zeros(self.event_shape), persistent=False)
        self.register_buffer("scale", torch.ones(self.event_shape), persistent=False)

    def forward(self) -> TorchDistribution:
        return _Joint(_Normal(self.loc, self.scale, validate_args=False), len(self.event_shape))

    def _tempered(self, shape: Size, temperature: float) -> Tensor:
        return temperature * self().sample(shape)

    def log_prob(self, z: Tensor) -> Tensor:
        self._check(z)
        # Not the tensor's number of elements, which a trace takes for a tensor of single precision.
        return -0.5 * self._sum(z.square()) - self.event_shape.numel() * _HALF_LOG_TWO_PI


class DiagonalNormal(Prior):
    r"""Independent normals with a learnable location and scale, initialised to standard normals.

    .. math:: \log p(z) = -\sum_i \tfrac12 \left(\frac{z_i - \mu_i}{\sigma_i}\right)^2 + \log \sigma_i
        + \tfrac12 \log 2\pi

    Args:
        features: the number of features of the latent, or its event shape.

    Example:
        >>> DiagonalNormal(2).log_prob(torch.zeros(3, 2)).shape
        torch.Size([3])
    """

    def __init__(self, features: Shape):
        super().__init__(features)
        self.loc = nn.Parameter(torch.zeros(self.event_shape))
        self.log_scale = nn.Parameter(torch.zeros(self.event_shape))

    def forward(self) -> TorchDistribution:
        return _Joint(_Normal(self.loc, self.log_scale.exp(), validate_args=False), len(self.event_shape))

    def _tempered(self, shape: Size, temperature: float) -> Tensor:
        return self.loc + temperature * (self().sample(shape) - self.loc)

    def log_prob(self, z: Tensor) -> Tensor:
        self._check(z)
        standard = (z - self.loc) * torch.exp(-self.log_scale)
        return self._sum(-0.5 * standard.square() - self.log_scale - _HALF_LOG_TWO_PI)


class GaussianMixture(Prior):
    r"""A mixture of Gaussians, fixed or learnable, for multimodal latents.

    .. math:: p(z) = \sum_k w_k \, \mathcal N(z; \mu_k, L_k L_k^\top)

    Without ``loc`` the means are drawn at random and centred. Samples are not reparameterised.

    Args:
        features: the number of features of the latent, or its event shape.
        num_components: the number of Gaussians.
        learnable: whether weights (of two or more), means and covariances are parameters; otherwise buffers.
        covariance: ``"diagonal"`` or ``"full"``.
        loc: the means, shape ``(num_components, *event_shape)``.
        scale: the standard deviations, of a shape that broadcasts to that of ``loc``; 1 if not given.
        scale_tril: Cholesky factors of full covariances, shape ``([num_components,] features, features)``.
        weights: positive weights, shape ``(num_components,)``, normalised here; equal if not given.
        spread, seed: the standard deviation and the seed of the random means; torch's global generator if not given.

    Raises:
        ValueError: a number, shape or sign does not fit, or ``covariance="full"`` for an event that is not a vector.

    Example:
        >>> GaussianMixture(2, 3, seed=0).sample((5,)).shape
        torch.Size([5, 2])
    """

    has_rsample = False
    loc: Tensor
    log_scale: Tensor
    lower: Tensor
    logits: Tensor

    def __init__(
        self,
        features: Shape,
        num_components: int,
        *,
        learnable: bool = True,
        covariance: str = "diagonal",
        loc: Tensor | None = None,
        scale: Tensor | float | None = None,
        scale_tril: Tensor | None = None,
        weights: Tensor | Sequence[float] | None = None,
        spread: float = 2.0,
        seed: int | None = None,
    ):
        super().__init__(features)
        check_sizes(num_components=num_components)
        check_option("covariance", covariance, ("diagonal", "full"))
        if covariance == "full" and len(self.event_shape) != 1:
            got = tuple(self.event_shape)
            raise ValueError(f"expected a vector of features for covariance='full'; got the shape {got}")
        if scale_tril is not None and (covariance != "full" or scale is not None):
            raise ValueError("`scale_tril` cannot be combined with `scale` or with covariance='diagonal'")
        self.num_components, self.covariance, self.learnable = num_components, covariance, learnable
        shape = (num_components, *self.event_shape)
        if loc is None:
            check_number("spread", spread, "(0, inf)")
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            loc = spread * torch.randn(shape, generator=generator, device="cpu").to(torch.get_default_device())
            loc = loc - loc.mean(dim=0)
        loc = as_float_tensor(loc)
        if loc.shape != shape:
            raise ValueError(f"expected loc of shape {shape}; got {tuple(loc.shape)}")
        loc = _as_parameter("loc", loc, shape)
        scale = _as_parameter("scale", 1.0 if scale is None else scale, shape, positive=True)
        weights = _as_parameter("weights", 1.0 if weights is None else weights, (num_components,), positive=True)
        if covariance == "full":
            lower = torch.zeros(num_components, *self.event_shape, *self.event_shape)
            if scale_tril is not None:
                lower = _as_parameter("scale_tril", scale_tril, lower.shape)
                scale = lower.diagonal(dim1=-2, dim2=-1)
                if not (scale > 0).all() or not torch.equal(lower, lower.tril()):
                    raise ValueError("expected scale_tril to be lower triangular with a positive diagonal; got another")
            self._register("lower", lower.tril(-1).to(loc), learnable=learnable)
        self._register("loc", loc, learnable=learnable)
        self._register("log_scale", scale.to(loc).log(), learnable=learnable)
        # The weight of a single component is 1.
        self._register("logits", weights.to(loc).log().log_softmax(dim=0), learnable=learnable and num_components > 1)

    @property
    def weights(self) -> Tensor:
        """The normalised weights, shape ``(num_components,)``."""
        return self.logits.softmax(dim=0)

    def forward(self) -> TorchDistribution:
        if self.covariance == "full":
            components = dist.MultivariateNormal(self.loc, scale_tril=self._factor(), validate_args=False)
        else:
            components = _Joint(_Normal(self.loc, self.log_scale.exp(), validate_args=False), len(self.event_shape))
        choice = dist.Categorical(logits=self.logits, validate_args=False)
        return dist.MixtureSameFamily(choice, components, validate_args=False)

    def _tempered(self, shape: Size, temperature: float) -> Tensor:
        component = dist.Categorical(logits=self.logits, validate_args=False).sample(shape)
        standard = temperature * torch.randn(shape + self.event_shape, dtype=self.loc.dtype, device=self.loc.device)
        if self.covariance == "full":
            return self.loc[component] + (self._factor()[component] @ standard.unsqueeze(-1)).squeeze(-1)
        return self.loc[component] + self.log_scale[component].exp() * standard

    def log_prob(self, z: Tensor) -> Tensor:
        self._check(z)
        if self.covariance == "full":
            standard = self._whiten(z)
        else:
            dims = len(self.event_shape)
            standard = (z.unsqueeze(-dims - 1) - self.loc) * torch.exp(-self.log_scale)
        of_components = self._sum(-0.5 * standard.square() - self.log_scale - _HALF_LOG_TWO_PI)
        return torch.logsumexp(of_components + self.logits.log_softmax(dim=0), dim=-1)

    def _whiten(self, z: Tensor) -> Tensor:
        """Return latents in standard coordinates of each component, ``(*batch, components, features)``."""
        # One product with all inverse factors; from the middle of the means, so that it cancels no digits.
        factor, centre = self._factor(), self.loc.mean(dim=0)
        eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
        offset = (inverse @ (self.loc - centre).unsqueeze(-1)).flatten()
        centred = z - centre
        standard = torch.nn.functional.linear(centred, inverse.flatten(0, 1).to(centred), -offset.to(centred))
        return standard.unflatten(-1, self.loc.shape)

    def _factor(self) -> Tensor:
        return self.lower.tril(-1) + torch.diag_embed(self.log_scale.exp())

    def extra_repr(self) -> str:
        options = f"covariance={self.covariance!r}, learnable={self.learnable}"
        return f"{super().extra_repr()}, num_components={self.num_components}, {options}"


class StudentT(Prior):
    r"""Independent Student t variables, for heavy tails, which a Lipschitz flow cannot make from a Gaussian.

    .. math:: \log p(z) = \sum_i \log\frac{\Gamma(\frac{\nu_i + 1}2)}{\Gamma(\frac{\nu_i}2) \sqrt{\pi \nu_i}}
        - \frac{\nu_i + 1}2 \log\left(1 + \frac{z_i^2}{\nu_i}\right)

    Args:
        features: the number of features of the latent, or its event shape.
        df: the degrees of freedom, one number or one for each feature.
        learnable: whether the degrees of freedom are learned, one for each feature.

    Raises:
        ValueError: a degree of freedom is not positive and finite.

    References:
        Tails of Lipschitz Triangular Flows, Jaini et al., 2020 (arXiv:1907.04481).

    Example:
        >>> StudentT(2, df=3.0).log_prob(torch.zeros(2))
        tensor(-2.0018)
    """

    loc: Tensor
    log_df: Tensor

    def __init__(self, features: Shape, *, df: Tensor | float = 5.0, learnable: bool = False):
        super().__init__(features)
        log_df = _as_parameter("df", df, self.event_shape, positive=True).log()
        self.learnable = learnable
        self.register_buffer("loc", torch.zeros(self.event_shape), persistent=False)
        self._register("log_df", log_df, learnable=learnable)

    @property
    def df(self) -> Tensor:
        """The degrees of freedom, shape ``event_shape``."""
        return self.log_df.exp()

    def forward(self) -> TorchDistribution:
        each = dist.StudentT(self.df, self.loc, torch.ones_like(self.loc), validate_args=False)
        return _Joint(each, len(self.event_shape))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        # As torch's StudentT draws it, which when it is made copies a number to a GPU, for which the caller waits.
        half = 0.5 * self.df
        normal = torch.randn(Size(sample_shape) + self.event_shape, dtype=half.dtype, device=half.device)
        return normal * dist.Gamma(half, half, validate_args=False).rsample(Size(sample_shape)).rsqrt()

    def log_prob(self, z: Tensor) -> Tensor:
        self._check(z)
        df = self.df
        peak = torch.lgamma(0.5 * (df + 1)) - torch.lgamma(0.5 * df) - 0.5 * (self.log_df + math.log(math.pi))
        return self._sum(peak - 0.5 * (df + 1) * torch.log1p(z.square() / df))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, df={_brief(self.df)}, learnable={self.learnable}"


class Uniform(Prior):
    r"""Independent uniforms on closed intervals; the log-density outside is minus infinity.

    .. math:: \log p(z) = -\sum_i \log(b_i - a_i), \qquad a_i \le z_i \le b_i

    Args:
        features: the number of features of the latent, or its event shape.
        low, high: the ends of the intervals, one number or one for each feature.

    Raises:
        ValueError: an interval is empty or not finite.

    Example:
        >>> Uniform(2, low=-1.0).log_prob(torch.tensor([[0.0, 1.0], [0.0, 1.5]]))
        tensor([-1.3863,    -inf])
    """

    low: Tensor
    high: Tensor

    def __init__(self, features: Shape, low: Tensor | float = 0.0, high: Tensor | float = 1.0):
        super().__init__(features)
        self.register_buffer("low", _as_parameter("low", low, self.event_shape))
        self.register_buffer("high", _as_parameter("high", high, self.event_shape))
        if not (self.low < self.high).all():
            raise ValueError(f"expected low < high; got low={_brief(self.low)}, high={_brief(self.high)}")

    def forward(self) -> TorchDistribution:
        # Not validated, so that a latent outside has log-density minus infinity and raises no error.
        return _Joint(_ClosedUniform(self.low, self.high, validate_args=False), len(self.event_shape))

    def log_prob(self, z: Tensor) -> Tensor:
        self._check(z)
        return self._sum(_log_uniform(z, self.low, self.high))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, low={_brief(self.low)}, high={_brief(self.high)}"


class _ClosedUniform(dist.Uniform):
    """A uniform on a closed interval: torch's excludes the upper end, to which a latent may be rounded."""

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        # torch's uniform numbers may be 0, where a logit has no value.
        shape = self._extended_shape(Size(sample_shape))
        share = torch.rand(shape, dtype=self.low.dtype, device=self.low.device)
        return self.low + share.clamp(min=torch.finfo(share.dtype).eps / 4) * (self.high - self.low)

    def log_prob(self, value: Tensor) -> Tensor:
        return _log_uniform(value, self.low, self.high)


class LogitNormal(TorchDistribution):
    r"""The distribution of a normal variable's sigmoid, on (0, 1).

    .. math:: \log p(y) = \log \mathcal N(\operatorname{logit} y; \mu, \sigma^2) - \log y - \log(1 - y)

    Args:
        loc, scale: the mean and the standard deviation of the logit.
        validate_args: whether arguments and values are checked.

    Shapes:
        value: ``(*sample_shape, *batch_shape)``, where ``loc`` and ``scale`` broadcast to ``batch_shape``.

    Raises:
        ValueError: the scale is not positive, or a value is outside [0, 1].

    Example:
        >>> LogitNormal(torch.tensor(0.0), torch.tensor(1.0)).log_prob(torch.tensor(0.5))
        tensor(0.4674)
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"loc": constraints.real, "scale": constraints.positive}
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, loc: Tensor | float, scale: Tensor | float, validate_args: bool | None = None):
        self.loc, self.scale = broadcast_all(loc, scale)
        batch_shape = Size() if isinstance(loc, Number) and isinstance(scale, Number) else self.loc.shape
        super().__init__(batch_shape, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "LogitNormal":
        new = self._get_checked_instance(LogitNormal, _instance)
        new.loc, new.scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        super(LogitNormal, new).__init__(Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = self._extended_shape(Size(sample_shape))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        logit = self.loc + self.scale * noise
        # The sigmoid of a large logit rounds to 0 or 1, at which the density is zero.
        info = torch.finfo(logit.dtype)
        return torch.sigmoid(logit).clamp(info.tiny, 1 - info.eps)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        inside = (value > 0) & (value < 1)
        value = torch.where(inside, value, 0.5)  # at the ends the formula would be infinity minus infinity
        log_value, log_rest = value.log(), torch.log1p(-value)
        standard = (log_value - log_rest - self.loc) / self.scale
        log_prob = -0.5 * standard.square() - self.scale.log() - _HALF_LOG_TWO_PI - log_value - log_rest
        return torch.where(inside, log_prob, -math.inf)

    def cdf(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        standard = (value.log() - torch.log1p(-value) - self.loc) / self.scale
        return 0.5 * torch.erfc(-standard * math.sqrt(0.5))  # torch.special.ndtr rounds the lower tail to zero

    def icdf(self, value: Tensor) -> Tensor:
        return torch.sigmoid(self.loc + self.scale * torch.special.ndtri(value))

    @property
    def median(self) -> Tensor:
        return torch.sigmoid(self.loc)


def _as_parameter(name: str, value: Any, shape: Sequence[int], *, positive: bool = False) -> Tensor:
    """Return a number or tensor of the user in the shape of a parameter."""
    tensor = as_float_tensor(value)
    try:
        parameter = tensor.expand(shape).clone()
    except RuntimeError:
        shapes = f"{tuple(shape)}; got {tuple(tensor.shape)}"
        raise ValueError(f"expected {name} of a shape that broadcasts to {shapes}") from None
    if not tensor.isfinite().all() or (positive and not (tensor > 0).all()):
        raise ValueError(f"expected {name} to be {'positive and ' if positive else ''}finite; got {_brief(tensor)}")
    return parameter


def _log_prob_anywhere(distribution: TorchDistribution, z: Tensor) -> Tensor:
    """Return a distribution's log-density: outside of its support minus infinity, with finite gradients inside."""
    support = distribution.support
    if getattr(support, "base_constraint", support) in (constraints.real, constraints.real_vector):
        return distribution.log_prob(z)
    try:
        inner = transform_to(support)(torch.zeros_like(z))
    except NotImplementedError:  # a support of the user's own
        return distribution.log_prob(z)
    outside = ~support.check(torch.where(z.isnan(), inner, z))  # NaN stays NaN
    z = _replaced(z, outside, inner)
    with torch.no_grad():  # an end that belongs to the support may have density zero too, and an infinite slope
        outside = outside | distribution.log_prob(z).isneginf()
    z = _replaced(z, outside, inner)
    return distribution.log_prob(z).masked_fill(outside, -math.inf)


def _replaced(z: Tensor, rows: Tensor, by: Tensor) -> Tensor:
    return torch.where(rows.reshape(rows.shape + (1,) * (z.dim() - rows.dim())), by, z)


def _log_uniform(z: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.where((z >= low) & (z <= high), -torch.log(high - low), -math.inf)


def _brief(values: Tensor) -> str:
    """Return the value if all are equal, otherwise the range."""
    low, high = values.min().item(), values.max().item()
    return f"{low:g}" if low == high else f"{low:g}..{high:g}"
