"""Flows as scikit-learn estimators: a density, and a classifier by Bayes' rule."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.base import (
    BaseEstimator,
    ClassifierMixin,
    ClassNamePrefixFeaturesOutMixin,
    DensityMixin,
    TransformerMixin,
    clone,
)
from sklearn.utils import check_random_state, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    _check_sample_weight,
    check_array,
    check_consistent_length,
    check_is_fitted,
    validate_data,
)
from torch import Tensor, nn

from pyroflows.arguments import check_number, check_option, check_sizes, check_varying
from pyroflows.bijection import Bijection
from pyroflows.contexts import seeded
from pyroflows.flow import Flow
from pyroflows.layers.pointwise import Standardize
from pyroflows.tables import table_flow
from pyroflows.training import FitOptions, fit

__all__ = ["FlowClassifier", "FlowDensity"]

_ROWS_AT_ONCE = 8192
_STEPS_OF_AN_EPOCH = 10


class FlowDensity(ClassNamePrefixFeaturesOutMixin, TransformerMixin, DensityMixin, BaseEstimator):
    r"""A density of the rows of a table, or of the rows given a class or numbers, by a normalizing flow.

    .. math:: \log p(x \mid y) = \log p_Z(f^{-1}(x; y)) + \log|\det df^{-1}/dx|

    It is trained by maximum likelihood, in single precision, and scores in double, so that the score of a row does not
    depend on the rows beside it. Equal rows are taken together and their weights added: a weight of two is the same as
    a row given twice, and no row is both learned from and held out.

    Args:
        flow: "nsf", "maf", "realnvp", "glow", "nice", "iaf", "planar", "radial", or a function that builds a flow, see
            :func:`table_flow`. Splines ("nsf") bend within bounds; the affine ones can give a row between clusters a
            density so low that it ruins a mean, and of a single column learn no more than a normal distribution.
        num_layers: number of its layers; None for the flow's own.
        hidden_features: widths of the hidden layers of its networks; None for the flow's own.
        flow_options: its other options, such as ``{"num_bins": 16}``.
        conditional: None for the density of the rows, beside which any ``y`` is left alone; "class" for their density
            given a class label ``y``; "number" for that given one number or several.
        standardize: whether the flow starts with the standardisation of the columns.
        epochs: passes through the rows, at most; one of fewer than ten steps counts once it has ten.
        batch_size: rows a step, or all rows where there are fewer.
        learning_rate: of Adam, at its highest.
        validation: the share of rows to hold out, which say which epoch was the best; 0 for none.
        patience: epochs without a better likelihood of these before training ends; None to go on.
        max_seconds: a limit of wall time.
        fit_options: other options of :func:`fit`, such as ``{"weight_decay": 1e-5}``.
        device: "cpu", "cuda" (also "cuda:1"), or "auto" for a GPU where there is one.
        random_state: an integer, a RandomState or None, of weights, rows held out and shuffles.
        verbose: whether to show a bar of progress on a terminal.

    Attributes:
        flow_: the :class:`Flow`, in the units of the columns, of float64.
        result_: the :class:`FitResult`, its losses in nats in these units.
        n_iter_: epochs done.
        classes_: the class labels, where it is conditional on them.
        n_features_in_: number of columns.
        feature_names_in_: their names, of a data frame.

    Shapes:
        X: ``(rows, columns)``; y: ``(rows,)`` or ``(rows, numbers)``; sample_weight: ``(rows,)``.

    Raises:
        ValueError: numbers that are not finite, named by row and column, a constant column, fewer than two different
            rows, an option out of range, or ``y`` missing where it is conditional.

    References:
        Masked Autoregressive Flow for Density Estimation, Papamakarios et al., 2017 (arXiv:1705.07057).

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X = load_iris().data
        >>> density = FlowDensity("maf", num_layers=2, hidden_features=(16,), epochs=5, random_state=0).fit(X)
        >>> density.score_samples(X).shape, density.sample(3, random_state=0).shape
        ((150,), (3, 4))
    """

    def __init__(
        self,
        flow: str | Callable[..., Flow] = "nsf",
        *,
        num_layers: int | None = None,
        hidden_features: Sequence[int] | None = None,
        flow_options: Mapping[str, Any] | None = None,
        conditional: str | None = None,
        standardize: bool = True,
        epochs: int = 100,
        batch_size: int = 256,
        learning_rate: float = 1e-3,
        validation: float = 0.1,
        patience: int | None = 20,
        max_seconds: float | None = None,
        fit_options: Mapping[str, Any] | None = None,
        device: str = "cpu",
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ):
        self.flow = flow
        self.num_layers = num_layers
        self.hidden_features = hidden_features
        self.flow_options = flow_options
        self.conditional = conditional
        self.standardize = standardize
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.validation = validation
        self.patience = patience
        self.max_seconds = max_seconds
        self.fit_options = fit_options
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> FlowDensity:
        """Train the flow on rows, each of weight one by default, and on their ``y`` where it is conditional."""
        if self.conditional is not None:
            check_option("conditional", self.conditional, ("class", "number"))
        check_number("validation", self.validation, "[0, 1)")
        check_sizes(batch_size=self.batch_size)
        device = self._device()
        x = self._rows(X, reset=True)
        weight = _check_sample_weight(sample_weight, x, dtype=np.float64, ensure_non_negative=True)
        x, y, weight = x[weight > 0], self._targets(x, y, weight > 0), weight[weight > 0]
        x, y, weight = _merged(x, y, weight)
        if len(x) < 2:
            raise ValueError(f"expected at least 2 different rows of a weight above zero; got {len(x)}")
        check_varying(x, getattr(self, "feature_names_in_", None))

        rng = check_random_state(self.random_state)
        seed = int(rng.randint(np.iinfo(np.int32).max))
        order = torch.from_numpy(np.random.RandomState(seed).permutation(len(x)))
        # A row of more weight than is held out, such as the zero of most rows, is on either side with a part of it.
        heavy = torch.from_numpy(weight > (1 + 1e-9) * self.validation * weight.sum())[order]
        held = order[~heavy][: int(self.validation * len(x))]
        kept = order[~torch.isin(order, held)]
        if len(held):
            held = torch.cat((held, order[heavy]))
        data, given = _tensor(x), None if y is None else _tensor(y)
        scale = None
        if self.standardize:
            mean = np.average(x, axis=0, weights=weight)
            std = np.sqrt(np.average((x - mean) ** 2, axis=0, weights=weight))
            scale = Standardize(_tensor(mean), _tensor(std))
        own = {"num_layers": self.num_layers, "hidden_features": self.hidden_features}
        sizes: dict[str, Any] = {name: size for name, size in own.items() if size is not None}
        sizes.update(self.flow_options or {})
        with seeded(seed):
            flow = table_flow(data, self.flow, context=given, standardize=scale or False, **sizes)
        weights = None if (weight == weight[0]).all() else _tensor(weight)
        training = _Training(flow, scale, weights is not None)
        options: dict[str, Any] = {
            "epochs": self.epochs,
            "batch_size": min(self.batch_size, len(kept)),
            "learning_rate": self.learning_rate,
            "patience": self.patience,
            "max_seconds": self.max_seconds,
            "device": device.type,
            "progress": None if self.verbose else False,
        }
        more: dict[str, Any] = {}
        if len(kept) // options["batch_size"] < _STEPS_OF_AN_EPOCH:
            more["steps_per_epoch"] = _STEPS_OF_AN_EPOCH
        held_out: Any = None
        if len(held):
            held_out = training.rows(data, given, _scaled(weights, order[heavy], self.validation), held)
            weights = _scaled(weights, order[heavy], 1 - self.validation)
        rows, context = training.rows(data, given, weights, kept)
        self.result_ = fit(
            training.flow.to(device),
            rows,
            context=context,
            validation=held_out,
            objective=training.loss,
            seed=seed,
            options=FitOptions(**more | dict(self.fit_options or {})),
            **options,
        )
        if self.result_.best_epoch is None:
            raise ValueError(f"expected a finite likelihood after an epoch at least; got none: {self.result_.stopped}")
        self.flow_ = flow.to(device, torch.float64)
        self.n_iter_ = len(self.result_.history["train"])
        self._n_features_out = x.shape[1]
        return self

    def score_samples(self, X: Any, y: Any = None) -> np.ndarray:
        """Give the log-density of each row, in nats, in the units of the columns."""
        return self._map("log_prob", *self._read(X, y))

    def score(self, X: Any, y: Any = None) -> float:
        """Give the mean log-density of the rows, in nats, in the units of the columns."""
        return float(self.score_samples(X, y).mean())

    def sample(
        self, n_samples: int = 1, random_state: int | np.random.RandomState | None = None, *, y: Any = None
    ) -> np.ndarray:
        """Draw rows; of a conditional density given ``y``, one value for all of them or one for each."""
        check_is_fitted(self)
        check_sizes(n_samples=n_samples)
        context = None
        if self.conditional is not None:
            context = self._context(self._spread(y, n_samples), n_samples)
        seed = int(check_random_state(random_state).randint(np.iinfo(np.int32).max))
        flow = self._placed_flow()
        parts = []
        with seeded(seed, flow.device):
            for i in range(0, n_samples, _ROWS_AT_ONCE):
                rows = min(_ROWS_AT_ONCE, n_samples - i)
                given = None if context is None else context[i : i + rows].to(flow.device)
                parts.append(flow.sample(() if given is not None else (rows,), given).cpu().numpy())
        return np.concatenate(parts)

    def transform(self, X: Any, y: Any = None) -> np.ndarray:
        """Give the latents of rows."""
        return self._map("encode", *self._read(X, y))

    def fit_transform(self, X: Any, y: Any = None, sample_weight: Any = None) -> np.ndarray:
        """Train the flow on rows, and give their latents."""
        return self.fit(X, y, sample_weight).transform(X, y)

    def inverse_transform(self, X: Any, y: Any = None) -> np.ndarray:
        """Give the rows of latents."""
        check_is_fitted(self)
        z = check_array(X, dtype=np.float64, ensure_all_finite=False)
        if z.shape[1] != self.n_features_in_:
            raise ValueError(f"expected latents of {self.n_features_in_} columns; got {z.shape[1]}")
        _refuse_nonfinite("X", z)
        return self._map("decode", _tensor(z), self._context(y, len(z)))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = self.conditional is not None
        return tags

    def __getstate__(self) -> dict[str, Any]:
        # A pickle is to be read where there is no GPU as well.
        state = super().__getstate__()
        if "flow_" in state and state["flow_"].device.type != "cpu":
            state["flow_"] = copy.deepcopy(state["flow_"]).cpu()
        return state

    def _device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError:
            device = None
        if device is None or device.type not in ("cpu", "cuda"):
            raise ValueError(f"expected device to be 'cpu', 'cuda' or 'auto'; got {self.device!r}")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"expected a GPU that torch sees, for device={self.device!r}; got none")
        return device

    def _placed_flow(self) -> Flow:
        return self.flow_.to(self._device())

    def _rows(self, X: Any, *, reset: bool) -> np.ndarray:
        rows = validate_data(
            self, X, reset=reset, dtype=np.float64, ensure_all_finite=False, ensure_min_samples=2 if reset else 1
        )
        _refuse_nonfinite("X", rows, getattr(self, "feature_names_in_", None))
        return rows

    def _targets(self, x: np.ndarray, y: Any, kept: np.ndarray) -> np.ndarray | None:
        """Learn what ``y`` is, from the rows that are kept, and give that of these."""
        if self.conditional is None:
            return None
        self._refuse_missing(y)
        check_consistent_length(x, y)
        if self.conditional == "class":
            self.classes_, labels = np.unique(_labels(y)[kept], return_inverse=True)
            return labels
        numbers = _numbers(y)[kept]
        self._numbers_of_y = numbers.shape[1]
        return numbers

    def _read(self, X: Any, y: Any) -> tuple[Tensor, Tensor | None]:
        check_is_fitted(self)
        x = self._rows(X, reset=False)
        return _tensor(x), self._context(y, len(x))

    def _context(self, y: Any, rows: int) -> Tensor | None:
        """Give what the flow takes of ``y``, for so many rows."""
        if self.conditional is None:
            return None
        self._refuse_missing(y)
        given = _numbers(y) if self.conditional == "number" else _labels(y)
        if len(given) != rows:
            raise ValueError(f"expected y for each of {rows} rows; got {len(given)}")
        if self.conditional == "number":
            if given.shape[1] != self._numbers_of_y:
                raise ValueError(f"expected {self._numbers_of_y} numbers a row in y; got {given.shape[1]}")
            return _tensor(given)
        unknown = ~np.isin(given, self.classes_)
        if unknown.any():
            raise ValueError(
                f"expected class labels among {', '.join(map(str, self.classes_))}; got {given[unknown][0]}"
            )
        return _tensor(np.searchsorted(self.classes_, given))

    def _refuse_missing(self, y: Any) -> None:
        if y is None:
            # The words that scikit-learn looks for.
            raise ValueError(f"requires y to be passed, but the target y is None: conditional={self.conditional!r}")

    def _spread(self, y: Any, rows: int) -> np.ndarray:
        """Give one value of ``y`` for each of so many rows."""
        self._refuse_missing(y)
        given = np.asarray(y)
        many = self.conditional == "number" and self._numbers_of_y > 1
        shape = (rows, self._numbers_of_y) if many else (rows,)
        try:
            return np.broadcast_to(given if many else given.reshape(-1), shape)
        except ValueError:
            raise ValueError(f"expected y as one value or as {rows}, one for each; got shape {given.shape}") from None

    @torch.no_grad()
    def _map(self, method: str, x: Tensor, context: Tensor | None) -> np.ndarray:
        flow = self._placed_flow()
        parts = []
        for i in range(0, len(x), _ROWS_AT_ONCE):
            rows = slice(i, i + _ROWS_AT_ONCE)
            given = None if context is None else context[rows].to(flow.device)
            parts.append(getattr(flow, method)(x[rows].to(flow.device), given).cpu().numpy())
        return np.concatenate(parts)


class FlowClassifier(ClassifierMixin, BaseEstimator):
    r"""A generative classifier: the density of the rows given each class, by one flow, and Bayes' rule.

    .. math:: P(k \mid x) = \frac{\pi_k \, p(x \mid k)}{\sum_j \pi_j \, p(x \mid j)}

    Args:
        density: a :class:`FlowDensity` with the options to be used, of which a copy is fitted that is conditional on
            the class; by default one with all its defaults.
        priors: the probabilities of the classes, in the order of ``classes_``; by default their shares of the rows.

    Attributes:
        density_: the fitted density, which also draws rows of a class: ``density_.sample(10, y="a")``.
        classes_: the class labels.
        class_prior_: their probabilities.
        n_features_in_: number of columns.
        feature_names_in_: their names, of a data frame.

    Shapes:
        X: ``(rows, columns)``; y, sample_weight: ``(rows,)``.

    Raises:
        TypeError: the density is none.
        ValueError: what :class:`FlowDensity` refuses, a ``y`` that is no class label, or priors that are no
            probabilities.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> density = FlowDensity("maf", num_layers=2, hidden_features=(16,), epochs=5, random_state=0)
        >>> classifier = FlowClassifier(density).fit(X, y)
        >>> classifier.predict_proba(X).shape, classifier.score(X, y) > 0.9
        ((150, 3), True)
    """

    def __init__(self, density: FlowDensity | None = None, *, priors: Sequence[float] | None = None):
        self.density = density
        self.priors = priors

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> FlowClassifier:
        """Train the density of rows given their class, and count the classes."""
        if self.density is not None and not isinstance(self.density, FlowDensity):
            raise TypeError(f"expected density as a FlowDensity; got {type(self.density).__name__}")
        rows, labels = validate_data(self, X, y, dtype=np.float64, ensure_all_finite=False, ensure_min_samples=2)
        check_classification_targets(labels)
        density = FlowDensity() if self.density is None else clone(self.density)
        self.density_ = density.set_params(conditional="class").fit(X, labels, sample_weight)
        self.classes_ = self.density_.classes_
        weight = _check_sample_weight(sample_weight, rows, dtype=np.float64)
        kept = weight > 0
        counts = np.bincount(np.searchsorted(self.classes_, labels[kept]), weights=weight[kept])
        self.class_prior_ = counts / counts.sum()
        if self.priors is not None:
            priors = np.asarray(self.priors, dtype=np.float64)
            if priors.shape != self.classes_.shape or not (priors > 0).all() or not np.isclose(priors.sum(), 1):
                raise ValueError(
                    f"expected {len(self.classes_)} priors above 0 that sum to 1, one a class; got {self.priors}"
                )
            self.class_prior_ = priors
        return self

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Give the log-probability of each class, ``(rows, classes)``."""
        check_is_fitted(self)
        rows = validate_data(self, X, reset=False, dtype=np.float64, ensure_all_finite=False)
        given = [self.density_.score_samples(X, np.full(len(rows), label)) for label in self.classes_]
        joint = np.stack(given, axis=1) + np.log(self.class_prior_)
        return joint - np.logaddexp.reduce(joint, axis=1, keepdims=True)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Give the probability of each class, ``(rows, classes)``."""
        return np.exp(self.predict_log_proba(X))

    def predict(self, X: Any) -> np.ndarray:
        """Give the most probable class of each row."""
        best = self.predict_log_proba(X).argmax(axis=1)
        return self.classes_[best]


class _Training:
    """A flow without its standardisation and embedding, whose work is done beforehand in double precision."""

    def __init__(self, flow: Flow, scale: Standardize | None, weighted: bool):
        self.scale, self.embedding, self.weighted = scale, flow.embedding, weighted
        layers = flow.layers if scale is None else flow.layers[:-1]
        front = None
        if weighted:
            features = max(1, flow.context_features)
            layers, front = [*layers, _Weighted(flow.event_shape[0], features)], _AllButWeight(features)
        self.flow = Flow(flow.prior, layers, embedding=front).float()
        self.offset = 0.0 if scale is None else float(scale.std.log().sum())

    def rows(self, x: Tensor, y: Tensor | None, weights: Tensor | None, chosen: Tensor) -> tuple[Tensor, Tensor | None]:
        """Give what the flow is trained on: rows, and the context whose last column is their weights."""
        x = x[chosen]
        parts = [] if y is None or self.embedding is None else [self.embedding(y[chosen])]
        if weights is not None:
            weights = weights[chosen]
            parts.append((weights / weights.mean())[:, None])
        if self.scale is not None:
            x = self.scale.inverse_and_log_det(x)[0]
        return x, torch.cat(parts, 1) if parts else None

    def loss(self, flow: Any, x: Tensor | None, context: Tensor | None) -> Tensor:
        """The mean negative log-likelihood, in the units of the columns."""
        log_prob = flow.log_prob(x, context)
        if self.weighted and context is not None:
            log_prob = log_prob * context[..., -1]
        return self.offset - log_prob.mean()


class _Weighted(Bijection):
    r"""The identity, which takes a context so that weights of rows reach the objective of :func:`fit`.

    .. math:: y = x, \qquad \log|\det dy/dx| = 0
    """

    def __init__(self, features: int, context_features: int):
        super().__init__(features, context_features=context_features)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x, x.new_zeros(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return y, y.new_zeros(y.shape[:-1])


class _AllButWeight(nn.Module):
    """Gives the context that layers take of one with a weight behind it, or the weight where there is nothing else."""

    def __init__(self, features: int):
        super().__init__()
        self.features = features

    def forward(self, context: Tensor) -> Tensor:
        return context[..., : self.features]


def _merged(
    x: np.ndarray, y: np.ndarray | None, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Take equal rows together, with the sum of their weights, in sorted order."""
    table = x if y is None else np.column_stack((x, y))
    order = np.argsort(table[:, 0], kind="stable")
    if (np.diff(table[order, 0]) == 0).any():  # the other columns decide, which takes as many sorts
        order = np.lexsort(table.T[::-1])
    table, weight = table[order], weight[order]
    first = np.flatnonzero(np.r_[True, (table[1:] != table[:-1]).any(1)])
    order = order[first]
    return x[order], None if y is None else y[order], np.add.reduceat(weight, first)


def _scaled(weights: Tensor | None, rows: Tensor, factor: float) -> Tensor | None:
    return None if weights is None else weights.index_copy(0, rows, factor * weights[rows])


def _tensor(array: np.ndarray) -> Tensor:
    # A copy, since torch takes neither an array that is not to be written to nor one that is read backwards.
    return torch.from_numpy(np.array(array, order="C"))


def _labels(y: Any) -> np.ndarray:
    return np.asarray(column_or_1d(y))


def _numbers(y: Any) -> np.ndarray:
    numbers = check_array(y, dtype=np.float64, ensure_2d=False, ensure_all_finite=False, input_name="y")
    numbers = numbers[:, None] if numbers.ndim == 1 else numbers
    _refuse_nonfinite("y", numbers)
    return numbers


def _refuse_nonfinite(name: str, rows: np.ndarray, columns: Any = None) -> None:
    bad = ~np.isfinite(rows)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        got = "NaN" if np.isnan(rows[row, column]) else str(rows[row, column])
        where = repr(columns[column]) if columns is not None else column
        raise ValueError(f"expected finite numbers in {name}; got {got} in row {row}, column {where}")
