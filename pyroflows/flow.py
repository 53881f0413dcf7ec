"""A flow, which is a prior and a stack of bijections; its Pyro distribution; and its file."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import isfunction
from itertools import chain
from typing import Any

import torch
from pyro.distributions import TransformedDistribution
from torch import Size, Tensor, nn

from pyroflows.arguments import (
    Shape,
    as_sample_shape,
    batched_shape,
    check_context,
    check_placement,
    check_precision,
    check_type,
)
from pyroflows.bijection import Bijection, Pair, Triple
from pyroflows.caching import Record, caching
from pyroflows.compose import Compose
from pyroflows.contexts import evaluating
from pyroflows.files import read, write
from pyroflows.gradients import vjp
from pyroflows.priors import Prior
from pyroflows.recipe import Recorded, describe, restore

__all__ = ["Flow", "FlowDistribution", "load"]

_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


class Flow(Recorded, nn.Module):
    r"""A normalizing flow: a density model, a site of a Pyro model, and a variational guide.

    .. math:: \log p(x \mid c) = \log p_Z(f^{-1}(x; c)) + \log|\det df^{-1}/dx|

    Calling it returns a :class:`FlowDistribution`; its methods do the same without one, and compile, map and train.

    Args:
        prior: distribution of the latent.
        layers: bijections, the first nearest the latent, or one bijection.
        embedding: network through which every context passes first, once a call, and which trains with the layers,
            such as a convolution over a series or a table of words.
        dequantizer: module that turns discrete data, such as the levels of pixels, into continuous data, used by
            :meth:`dequantized_log_prob`, ``fit`` and ``bits_per_dim``.

    Shapes:
        x: ``(*batch, *event_shape)``; context: ``(*batch, context_features)``, or what the embedding maps to that;
        log_prob: ``(*batch,)``.

    Attributes:
        notes: JSON values about the flow, which :meth:`save` writes and :func:`pyroflows.load` reads.
        last_draw: the record of the last draw from a distribution of the flow, while the draw is alive.

    Raises:
        ValueError: the shapes of prior and layers do not match, or an input or context has another shape than the
            flow's, or a context is missing or not expected, or the embedding returns another shape.
        TypeError: an input is not a floating-point tensor of the flow's dtype.

    References:
        Normalizing Flows for Probabilistic Modeling and Inference, Papamakarios et al., 2021 (arXiv:1912.02762).

    Example:
        >>> from pyroflows import ActNorm, Coupling, StandardNormal
        >>> flow = Flow(StandardNormal(2), [Coupling(2), Coupling(2, flip=True)])
        >>> flow.log_prob(torch.zeros(3, 2)).shape, flow.sample((5,)).shape
        (torch.Size([3]), torch.Size([5, 2]))
        >>> flow().event_shape
        torch.Size([2])
        >>> image = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        >>> flow = Flow(StandardNormal(2), Coupling(2, context_features=3), embedding=image)
        >>> flow.sample((5,), torch.zeros(7, 1, 8, 8)).shape
        torch.Size([5, 7, 2])
    """

    last_draw: Record | None = None

    def __init__(
        self,
        prior: Prior,
        layers: Iterable[Bijection] | Bijection,
        *,
        embedding: nn.Module | None = None,
        dequantizer: nn.Module | None = None,
    ):
        super().__init__()
        check_type("a Prior", prior, Prior)
        bijection = Compose([layers] if isinstance(layers, Bijection) else layers)
        if prior.event_shape != bijection.latent_shape:
            expected = f"a prior of shape {tuple(bijection.latent_shape)}, the layers' latent"
            raise ValueError(f"expected {expected}; got {tuple(prior.event_shape)}")
        for name, module in (("an embedding", embedding), ("a dequantizer", dequantizer)):
            if module is not None:
                check_type(f"{name} that is a torch module", module, nn.Module)
        if embedding is not None and not bijection.context_features:
            raise ValueError("an embedding needs layers that take a context; got context_features=0")
        self.prior = prior
        self.bijection = bijection
        self.embedding = embedding
        self.dequantizer = dequantizer
        self.notes: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last_draw": None}

    @property
    def layers(self) -> list[Bijection]:
        """The layers, the first nearest the latent."""
        return list(self.bijection)

    @property
    def event_shape(self) -> Size:
        """The shape of one point of data."""
        return self.bijection.data_shape

    @property
    def context_features(self) -> int:
        """The length of the context, as the layers take it; 0 for an unconditional flow."""
        return self.bijection.context_features

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the flow's parameters and data."""
        return self._number().dtype

    @property
    def device(self) -> torch.device:
        """The device of the flow's parameters."""
        return self._number().device

    def _number(self) -> Tensor:
        numbers = (number for number in chain(self.parameters(), self.buffers()) if number.is_floating_point())
        return next(numbers, torch.empty(()))

    def forward(self, context: Tensor | None = None) -> "FlowDistribution":
        """Return the distribution given a context, whose batch shape it has."""
        return FlowDistribution(self, self.embed(context))

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the log-density of data, in nats."""
        self.check_input(data=x)
        return self.log_prob_embedded(x, self.embed(context))

    def log_prob_embedded(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Return the log-density of data given a context that has passed through the embedding."""
        z, log_det = self.bijection.inverse_and_log_det(x, context)
        return self.prior.log_prob(z) + log_det

    def dequantized_log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return an unbiased estimate of a lower bound on the log-probability of discrete data, in nats."""
        if self.dequantizer is None:
            raise ValueError("expected a flow with a dequantizer; got one without")
        y, log_q = self.dequantizer(x)
        return self.log_prob(y, context) - log_q

    def sample(self, shape: Shape = (), context: Tensor | None = None, *, temperature: float = 1.0) -> Tensor:
        """Draw data of shape ``(*shape, *batch, *event_shape)``, without gradients.

        A temperature below 1 narrows the prior around its centres: samples of images look better and vary less.
        """
        with torch.no_grad():
            context = self.embed(context)
            narrowed = {} if temperature == 1.0 else {"temperature": temperature}
            z = self.prior.sample(self._sample_shape(shape, context), **narrowed)
            return self.bijection.forward_and_log_det(z, context)[0].contiguous()

    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the latent of data, shape ``(*batch, *latent_shape)``; NaN for data outside the flow's support."""
        self.check_input(data=x)
        return _nan_outside(*self.bijection.inverse_and_log_det(x, self.embed(context)))

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the data of a latent, shape ``(*batch, *event_shape)``; NaN where the layers take no such latent."""
        self.check_input(latent=z)
        return _nan_outside(*self.bijection.forward_and_log_det(z, self.embed(context)))

    def rsample_and_log_prob(self, shape: Shape = (), context: Tensor | None = None) -> Pair:
        """Draw data with gradients, and return it with its log-density, in one pass."""
        context = self.embed(context)
        z = self.prior.rsample(self._sample_shape(shape, context))
        x, log_det = self.bijection.forward_and_log_det(z, context)
        return x.contiguous(), self.prior.log_prob(z) - log_det

    def rsample_and_score(self, shape: Shape = (), context: Tensor | None = None) -> Triple:
        """Draw data with gradients; return it, its log-density and, detached, its score, which path gradients need."""
        context = self.embed(context)
        z = self.prior.rsample(self._sample_shape(shape, context))
        with torch.enable_grad():
            z = z if z.requires_grad else z.detach().requires_grad_()
            log_prob = self.prior.log_prob(z)
        score = vjp(log_prob, None, z, torch.ones_like(log_prob))
        x, log_det, score = self.bijection.forward_and_score(z, score, context)
        return x.contiguous(), log_prob - log_det, score

    @contextmanager
    def cached(self) -> Iterator[None]:
        """Cache what depends only on the weights, for calls without gradients in a block.

        For a few rows masking weights and multiplying factors takes longer than the rest. Weights that are loaded,
        trained or written to within the block are noticed; in-place writes to ``p.data``, or through NumPy, are not.

        Example:
            >>> from pyroflows import maf
            >>> flow = maf(2, num_layers=2)
            >>> with flow.cached(), torch.no_grad():
            ...     scores = [flow.log_prob(row) for row in torch.zeros(5, 2)]
        """
        with caching(self):
            yield

    def save(self, path: str | os.PathLike[str], notes: Mapping[str, Any] | None = None) -> None:
        """Write the flow to a safetensors file, from which :func:`pyroflows.load` builds an equal one.

        The file holds the tensors, how the flow was built, and a checksum. It is replaced atomically. Parts of the
        user's own classes, such as an embedding or a conditioner, are saved by their attributes, whatever their
        constructors take.

        Args:
            path: path of the file.
            notes: JSON values about the flow; by default :attr:`notes`.

        Raises:
            TypeError: the notes are not JSON values.
            ValueError: a file cannot hold an attribute of one of the flow's parts, such as a function of the user's own
                outside the embedding, or the folder does not exist.
        """
        write(path, "flow", *header_of(self, self.notes if notes is None else notes, ("embedding",)))

    def export(self, x: Tensor, context: Tensor | None = None) -> torch.export.ExportedProgram:
        """Return the log-density as a program that runs without this package, for any number of rows.

        Args:
            x: at least two rows of the kind to score; their values do not matter.
            context: their context, if the flow takes one.

        Example:
            >>> from pyroflows import realnvp
            >>> flow = realnvp(3, num_layers=2).eval()
            >>> program = flow.export(torch.zeros(2, 3))  # torch.export.save(program, "flow.pt2") writes it
            >>> x = torch.randn(5, 3)
            >>> torch.allclose(program.module()(x), flow.log_prob(x))
            True
        """
        inputs = (x,) if context is None else (x, context)
        if min(len(tensor) for tensor in inputs) < 2:
            raise ValueError(f"expected at least two rows to export by; got shape {tuple(x.shape)}")
        rows = torch.export.Dim("rows")
        with evaluating(self):
            return torch.export.export(_LogProb(self), inputs, dynamic_shapes=tuple({0: rows} for _ in inputs))

    def _sample_shape(self, shape: Shape, context: Tensor | None) -> Size:
        self.check_input()
        return as_sample_shape(shape) + self.bijection.broadcast_batch(Size(), context)

    def embed(self, context: Tensor | None) -> Tensor | None:
        """Return the context that the layers take, from that of the user."""
        if context is not None:
            self.check_input(context=context)
        if self.embedding is None:
            return context
        if not isinstance(context, Tensor):
            got = "none" if context is None else type(context).__name__
            raise (ValueError if context is None else TypeError)(f"expected a context for the embedding; got {got}")
        embedded = self.embedding(context)
        if not isinstance(embedded, Tensor) or embedded.shape[-1:] != (self.context_features,):
            got = f"shape {tuple(embedded.shape)}" if isinstance(embedded, Tensor) else type(embedded).__name__
            expected = f"an embedding that returns {batched_shape((self.context_features,))}"
            raise ValueError(f"expected {expected}; got {got} from a context of shape {tuple(context.shape)}")
        return embedded

    def check_input(self, **inputs: Tensor | None) -> None:
        """Refuse tensors of another dtype or device than the flow's; the names are for the message."""
        if torch.compiler.is_compiling():
            return  # the walk over Pyro's modules, which define their own hash, would break the graph
        number = self._number()
        check_precision(number)
        for name, tensor in inputs.items():
            check_placement(name, tensor, number)


class FlowDistribution(TransformedDistribution):
    """The distribution of a flow, which scores by the flow's own ``log_prob``, and its last draw without another pass.

    The flow holds the last draw of its distributions weakly, and scores it once from the pass that made it, if nothing
    has changed since. Any other value, and the draw from then on, is scored at the parameters that the flow has then.

    Args:
        flow: the flow.
        context: its context after the embedding, if it takes one.

    Example:
        >>> from pyroflows import realnvp
        >>> distribution = realnvp(2)()
        >>> x = distribution.rsample((5,))
        >>> distribution.log_prob(x).shape
        torch.Size([5])
    """

    def __init__(self, flow: Flow, context: Tensor | None = None):
        check_context(context, flow.context_features, Size())
        self.flow, self.context = flow, context
        fixed = [layer if context is None else layer.condition(context) for layer in (flow.bijection, *flow.layers)]
        super().__init__(flow.prior(), fixed[:1])  # torch derives the shapes from the stack as one, which is quicker
        self.transforms = fixed[1:]

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "FlowDistribution":
        new = type(self).__new__(type(self)) if _instance is None else _instance
        new.flow, new.context = self.flow, self.context
        return super().expand(batch_shape, _instance=new)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return self._draw(self.flow.prior.sample, sample_shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self._draw(self.flow.prior.rsample, sample_shape)

    def _draw(self, sample_prior: Callable[..., Tensor], sample_shape: Sequence[int]) -> Tensor:
        z = sample_prior(Size(sample_shape) + self.batch_shape)
        x, log_det = self.flow.bijection.forward_and_log_det(z, self.context)
        x = x.contiguous()  # for callers that view it in another shape
        self.flow.last_draw = None if x is z else Record(self.flow, "last_draw", z, x, log_det, self.context)
        return x

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        record = self.flow.last_draw
        if record is not None and not value.is_inference() and record.is_valid(self.flow, value, self.context):
            self.flow.last_draw = None
            return self.flow.prior.log_prob(record.source) - record.current_log_det()
        self.flow.check_input(data=value)
        log_prob = self.flow.log_prob_embedded(value, self.context)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))


def _nan_outside(point: Tensor, log_det: Tensor) -> Tensor:
    """Return the image of a point, NaN where the point is outside of what the map takes."""
    outside = log_det.isneginf()
    return point.masked_fill(
        outside.reshape(outside.shape + (1,) * (point.dim() - outside.dim())), math.nan
    ).contiguous()


def _checked_notes(notes: Any) -> dict[str, Any]:
    check_type("notes as a dict of JSON values", notes, Mapping)
    try:
        same = json.loads(json.dumps(dict(notes), allow_nan=False)) == notes
    except (TypeError, ValueError):
        same = False
    if not same:
        raise TypeError(f"expected notes of JSON values, with strings as keys, and lists for tuples; got {notes!r}")
    return dict(notes)


def check_own(classes: Any, embedding: Any) -> None:
    """Refuse classes that are no list of classes and functions, and an embedding that is no module."""
    if not isinstance(classes, Sequence) or not all(isinstance(kind, type) or isfunction(kind) for kind in classes):
        raise TypeError(f"expected classes as a list of classes, and functions; got {classes!r}")
    if embedding is not None and not isinstance(embedding, nn.Module):
        got = f"the class {embedding.__name__}" if isinstance(embedding, type) else type(embedding).__name__
        raise TypeError(f"expected an embedding that is built, a torch module; got {got}")


def load(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    classes: Sequence[type] = (),
    embedding: nn.Module | None = None,
) -> Flow:
    """Read a flow that :meth:`Flow.save` wrote, in evaluation mode, without running code from the file.

    Args:
        path: path of the file.
        device: device of the flow.
        classes: the user's own classes, such as a layer or a network, from which the flow in the file was built, and
            functions, such as an activation. They are known by their names; their constructors are not called.
        embedding: the embedding, built as the flow's was, to take the weights in the file. Without it, the classes of
            an embedding must be among ``classes``, and its attributes such as a file can hold.

    Raises:
        FileNotFoundError: the file does not exist.
        TypeError: ``classes`` is not a list of classes, or ``embedding`` is not a module.
        ValueError: the file does not hold a flow, is damaged, was written by another version of the format, or names
            an unknown class or builder; or the embedding is not the one in the file.

    Example:
        >>> import tempfile
        >>> from pyroflows import maf
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     maf(3, num_layers=2).save(f"{folder}/flow.safetensors", notes={"rows": 1000})
        ...     load(f"{folder}/flow.safetensors").notes
        {'rows': 1000}
        >>> class Summary(nn.Module):  # of the numbers in a row
        ...     def forward(self, x):
        ...         return torch.stack([x.mean(-1), x.std(-1)], -1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     maf(3, context_features=2, embedding=Summary()).save(f"{folder}/flow.safetensors")
        ...     load(f"{folder}/flow.safetensors", classes=[Summary]).sample((5,), torch.zeros(100)).shape
        torch.Size([5, 3])
    """
    check_own(classes, embedding)
    return flow_of(*read(path, "flow"), path, classes, ("embedding",), embedding).to(device)


def header_of(flow: Flow, notes: Any, place: Sequence[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the header and the tensors of a file of a flow, one part of which, in a place, the user may build."""
    checked_notes = _checked_notes(notes)
    recipe, tensors = describe(flow, given=place)
    frozen = [name for name, parameter in flow.named_parameters() if not parameter.requires_grad]
    dtype = str(flow.dtype).removeprefix("torch.")
    return {"dtype": dtype, "notes": checked_notes, "frozen": frozen, "recipe": recipe}, tensors


def flow_of(
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    classes: Sequence[type],
    place: Sequence[str],
    part: nn.Module | None,
) -> Flow:
    """Return the flow of a header and tensors, on the CPU, given the user's classes, or the part that the user built.

    Raises:
        ValueError: they make no sense, or the classes or the part are not those of the flow.
    """
    try:
        flow = restore(header["recipe"], tensors, _DTYPES[header["dtype"]], classes, place, part)
        if not isinstance(flow, Flow) or not isinstance(header["notes"], dict):
            raise ValueError(f"expected a Flow; got {type(flow).__name__}")
        for name in header["frozen"]:
            flow.get_parameter(name).requires_grad_(False)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"expected a flow written by save; got {path}, whose header makes no sense: {error}") from None
    except ValueError as error:
        raise ValueError(f"{error}, in {path}") from None
    flow.notes = header["notes"]
    return flow


class _LogProb(nn.Module):
    """A module that returns the log-density when called, as an export needs one."""

    def __init__(self, flow: Flow):
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.flow.log_prob(x, context)
