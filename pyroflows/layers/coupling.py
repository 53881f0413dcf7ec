"""Coupling layers: some features transform the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.arguments import check_names, check_option, check_sizes
from pyroflows.bijection import Bijection
from pyroflows.gradients import vjp
from pyroflows.layers.transformers import Affine, Transformer, carry, make_transformer, transform
from pyroflows.networks.mlp import MLP

__all__ = ["Coupling"]


def _moved(features: int, mask: str | Sequence[bool] | Tensor, flip: bool) -> Tensor:
    """Which features the layer moves, as booleans."""
    if isinstance(mask, str):
        check_option("mask", mask, ("halves", "checkerboard"))
        position = torch.arange(features)
        moved = position >= features // 2 if mask == "halves" else position % 2 == 0
        # A single feature can only be moved.
        return ~moved if flip and features > 1 else moved
    if not isinstance(mask, Sequence) and not hasattr(mask, "__array__"):
        raise TypeError(f"expected a mask by name or of {features} booleans; got {mask!r}")
    given = torch.as_tensor(mask)
    if given.dtype != torch.bool or given.shape != (features,):
        raise ValueError(f"expected a mask of {features} booleans; got {given.tolist()!r} ({given.dtype})")
    moved = ~given if flip else given
    if not moved.any():
        raise ValueError(f"expected a mask that moves at least one of {features} features; got none")
    return moved


class Coupling(Bijection):
    r"""A coupling layer: the features it keeps give, through a network, the parameters that move the others.

    .. math:: y_k = x_k, \quad y_m = f(x_m; \theta(x_k, c)), \quad \log|\det dy/dx| = \sum_m \log|f'(x_m)|

    Args:
        features: number of features.
        transformer: "affine", "additive", "spline", or a :class:`Transformer` with options of its own.
        mask: "halves" (the second half moves), "checkerboard" (even positions move), or a boolean for each
            feature, true where it moves.
        flip: exchange the moved and the kept features.
        context_features: length of the context.
        conditioner: a network from ``(kept features, context)`` to ``(*batch, moved * num_parameters)``, the parameters
            of each feature one after another, but of affine ones all shifts before all log-scales; by default an
            :class:`MLP`.
        network: options of that MLP, such as ``hidden_features=(128, 128)`` or ``residual=True``.

    Shapes:
        x, y: ``(*batch, features)``; context: ``(*batch, context_features)``.

    Raises:
        ValueError: a size is not positive, a mask or option is not one of those above, or the conditioner gives another
            shape.

    References:
        Density estimation using Real NVP, Dinh et al., 2017 (arXiv:1605.08803);
        Neural Spline Flows, Durkan et al., 2019 (arXiv:1906.04032).

    Example:
        >>> layer = Coupling(4, mask="checkerboard", hidden_features=(16,))
        >>> layer(torch.zeros(3, 4)).shape
        torch.Size([3, 4])
    """

    to_parts: Tensor
    to_whole: Tensor
    _version = 2  # of what a state holds: in the first, an affine coupling's outputs had another order

    def __init__(
        self,
        features: int,
        *,
        transformer: str | Transformer = "affine",
        mask: str | Sequence[bool] | Tensor = "halves",
        flip: bool = False,
        context_features: int = 0,
        conditioner: nn.Module | None = None,
        **network: Any,
    ):
        check_sizes(features=features)
        super().__init__(features, context_features=context_features)
        moved = _moved(features, mask, flip)
        self.num_moved = int(moved.sum())
        self.transformer = make_transformer(transformer)
        self.num_outputs = self.num_moved * self.transformer.num_parameters
        parts = torch.cat([(~moved).nonzero()[:, 0], moved.nonzero()[:, 0]])
        # Two runs of features are views of the input; others are read and written by index.
        self.in_runs = torch.equal((parts - parts[0]) % features, torch.arange(features))
        self.moved_first = bool(moved[0])
        self.register_buffer("to_parts", parts)
        self.register_buffer("to_whole", parts.argsort())
        if conditioner is None:
            check_names(network, MLP, but=("in_features", "out_features", "context_features", "linear"))
            conditioner = MLP(
                features - self.num_moved,
                self.num_outputs,
                context_features=context_features,
                **network,
            )
        elif network:
            raise TypeError(f"expected no network options beside a conditioner; got {', '.join(network)}")
        self.conditioner = conditioner

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, moved = self._split(x)
        parameters = self._read(self.conditioner(kept, context))
        moved, log_det = transform(self.transformer, moved, parameters, forward=True)
        return self._merge(kept, moved), log_det

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, moved = self._split(y)
        parameters = self._read(self.conditioner(kept, context))
        moved, log_det = transform(self.transformer, moved, parameters, forward=False)
        return self._merge(kept, moved), log_det

    def forward_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._carry(x, score, context, forward=True)

    def inverse_and_score(
        self, y: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._carry(y, score, context, forward=False)

    def _carry(
        self, x: Tensor, score: Tensor, context: Tensor | None, *, forward: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Map, and take the score back through the graph that the map has just made, conditioner included."""
        score_kept, score_moved = self._split(score)
        with torch.enable_grad():
            kept, moved = self._split(x if x.requires_grad else x.detach().requires_grad_())
            moved = moved.view_as(moved)  # a node of its own, or the way to it would lead through the conditioner
            output = self.conditioner(kept, context)
            result, log_det = transform(self.transformer, moved, self._read(output), forward=forward, dims=())
        score_moved, to_output = carry(self.transformer, moved, output, result, log_det, score_moved, forward)
        score_kept = score_kept - vjp(output, None, kept, to_output)
        return self._merge(kept, result), log_det.sum(-1), self._merge(score_kept, score_moved)

    def _read(self, output: Tensor) -> Any:
        """Read the network's output as the transformer takes it."""
        if output.shape[-1] != self.num_outputs:
            raise ValueError(
                f"expected a conditioner that gives (*batch, {self.num_outputs}); got {tuple(output.shape)}"
            )
        if type(self.transformer) is Affine:  # each kind is read in one piece
            return output.split_with_sizes((self.num_moved, self.num_moved), -1)
        return output.unflatten(-1, (self.num_moved, self.transformer.num_parameters))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, notes: dict[str, Any], *args: Any) -> None:
        if notes.get("version") == 1 and type(self.transformer) is Affine:
            self._reorder(state, f"{prefix}conditioner.")
        super()._load_from_state_dict(state, prefix, notes, *args)

    def _reorder(self, state: dict[str, Any], prefix: str) -> None:
        """Put outputs that went feature by feature, a shift and a log-scale of each, into today's order."""
        if not isinstance(self.conditioner, MLP):
            raise ValueError(
                f"expected affine couplings whose networks are MLPs in a state of an earlier version, when outputs had "
                f"another order; got {type(self.conditioner).__name__}"
            )
        last = {id(parameter) for part in self.conditioner.last for parameter in part.parameters()}
        for name, parameter in self.conditioner.named_parameters():
            if id(parameter) in last and prefix + name in state:
                state[prefix + name] = state[prefix + name].unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        num_kept = x.shape[-1] - self.num_moved
        if self.in_runs and self.moved_first:
            moved, kept = x.split_with_sizes((self.num_moved, num_kept), -1)
            return kept, moved
        parts = x if self.in_runs else x.index_select(-1, self.to_parts)
        kept, moved = parts.split_with_sizes((num_kept, self.num_moved), -1)
        return kept, moved

    def _merge(self, kept: Tensor, moved: Tensor) -> Tensor:
        whole = torch.cat([moved, kept] if self.in_runs and self.moved_first else [kept, moved], -1)
        return whole if self.in_runs else whole.index_select(-1, self.to_whole)

    def extra_repr(self) -> str:
        return f"{self.latent_shape[0]}, moved={self.num_moved}, transformer={self.transformer}"
