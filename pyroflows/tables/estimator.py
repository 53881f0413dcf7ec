"""Flows as scikit-learn estimators: a density, and a classifier by Bayes' rule."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from sklearn import clone
from sklearn.base import BaseEstimator, ClassifierMixin, ClassNamePrefixFeaturesOutMixin, DensityMixin, TransformerMixin
from sklearn.utils import check_random_state, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_consistent_length, check_is_fitted, validate_data
from torch import Tensor

from pyroflows.arguments import as_tensor, check_finite, check_number, check_option, check_sizes
from pyroflows.contexts import seeded
from pyroflows.distributed import choose_device
from pyroflows.flow import Flow
from pyroflows.tables.best import EFFORTS, fit_best
from pyroflows.tables.fitting import fit_table
from pyroflows.training import FitOptions

__all__ = ["FlowClassifier", "FlowDensity"]

_CHUNK_ROWS = 8192


@dataclass(eq=False, repr=False)
class FlowDensity(ClassNamePrefixFeaturesOutMixin, TransformerMixin, DensityMixin, BaseEstimator):
    r"""A density of the rows of a table, or of the rows given a class or numbers, by a normalizing flow.

    .. math:: \log p(x \mid y) = \log p_Z(f^{-1}(x; y)) + \log|\det df^{-1}/dx|

    It is trained by maximum likelihood in single precision, and scores in double precision, so that the score of a row
    does not depend on the other rows. Equal rows become one row with the sum of their weights: a weight of two is the
    same as a row that comes twice, and no row is both trained on and held out.

    Args:
        flow: "auto" for the best density of a table, or "nsf", "maf", "realnvp", "glow", "nice", "iaf", "planar",
            "radial", or a function that builds a flow, see :func:`table_flow`. Splines ("nsf") bend within bounds; the
            affine flows can give a row between clusters a density so low that it ruins a mean, and for a single column
            learn no more than a normal distribution. By "auto" Gaussian mixtures with shrunk covariances are compared
            on held-out rows, in coordinates that straighten skewed and bounded columns; the best few are averaged, and
            spline couplings are trained on them and taken if they gain more than the error of that. A conditional
            density is by "nsf" then.
        effort: of "auto": "quick" for the mixtures alone, "default", or "best", which tries more and longer.
        num_layers, hidden_features: number of layers, widths of hidden layers; None for the flow's default.
        flow_options: other options of the flow, such as ``{"num_bins": 16}``.
        conditional: None for the density of the rows, whatever ``y`` is; "class" for their density given a class label
            ``y``; "number" for that given one number or several.
        standardize: whether a flow other than "auto" standardizes the columns.
        validation: share of the rows, or of their weight, to hold out, to choose the best epoch and when to stop, 0 or
            None for none ("auto" holds out rows all the same: up to 1,500 rows a third, three times); or rows, or
            ``(X, y)``; or a splitter of scikit-learn, of which the last split is used, such as ``TimeSeriesSplit()``
            for rows in the order of time, or ``GroupKFold()`` with ``fit(X, groups=...)``.
        epochs, learning_rate, batch_size, patience: as for :func:`fit`; None for 100, 0.001, 256 and 20, or for what
            "auto" takes by itself. An epoch has at least ten steps.
        max_seconds: limit of the time of training, as for :func:`fit`; of "auto" without that of the mixtures.
        fit_options: fields of :class:`FitOptions`, such as ``{"weight_decay": 1e-5}``.
        device: "cpu", "cuda" (also "cuda:1"), or "auto" for a GPU if there is one.
        random_state: an integer, a RandomState or None, for weights, rows held out and shuffles.
        verbose: whether to show a progress bar on a terminal.

    Attributes:
        flow_: the :class:`Flow`, in the units of the columns, in double precision.
        result_: the :class:`FitResult`, with losses in nats in these units.
        n_iter_: number of epochs.
        selection_: of "auto", what was tried and what was taken, see :class:`Selection`.
        classes_: the class labels, if it is conditional on them.
        n_features_in_, feature_names_in_: number of columns, and their names in a data frame.

    Shapes:
        X: ``(rows, columns)``; y: ``(rows,)`` or ``(rows, numbers)``; sample_weight: ``(rows,)``.

    Raises:
        ValueError: numbers that are not finite, named by row and column, a constant column, fewer than two different
            rows, an option out of range, or a missing ``y`` if it is conditional.

    References:
        Masked Autoregressive Flow for Density Estimation, Papamakarios et al., 2017 (arXiv:1705.07057).

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X = load_iris().data
        >>> density = FlowDensity("maf", num_layers=2, hidden_features=(16,), epochs=5, random_state=0).fit(X)
        >>> density.score_samples(X).shape, density.sample(3, random_state=0).shape
        ((150,), (3, 4))
    """

    flow: str | Callable[..., Flow] = "auto"
    _: KW_ONLY
    effort: str = "default"
    num_layers: int | None = None
    hidden_features: Sequence[int] | None = None
    flow_options: Mapping[str, Any] | None = None
    conditional: str | None = None
    standardize: bool = True
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    validation: Any = 0.1
    patience: int | None = None
    max_seconds: float | None = None
    fit_options: Mapping[str, Any] | None = None
    device: str = "cpu"
    random_state: int | np.random.RandomState | None = None
    verbose: bool = False

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None, groups: Any = None) -> "FlowDensity":
        """Train the flow on rows, each of weight one by default, and on their ``y`` if it is conditional.

        The ``groups`` of the rows are for a splitter that needs them, such as ``GroupKFold``.
        """
        if self.conditional is not None:
            check_option("conditional", self.conditional, ("class", "number"))
        check_option("effort", self.effort, tuple(EFFORTS))
        device = _device(self.device)
        x = self._rows(X, reset=True)
        weights = _sample_weights(sample_weight, x)
        is_used = weights > 0
        context = self._learn_targets(x, y, is_used)
        split = _last_split(self, x, y, groups, is_used)
        rows, validation = _hold_out(self, x[is_used], context, weights[is_used], split)
        flow_options = {"num_layers": self.num_layers, "hidden_features": self.hidden_features}
        limits = ("batch_size", "epochs", "learning_rate", "patience", "max_seconds")
        arguments = {name: getattr(self, name) for name in limits if getattr(self, name) is not None}
        arguments |= {"device": device, "progress": None if self.verbose else False, "seed": _seed(self.random_state)}
        arguments["flow_options"] = {name: value for name, value in flow_options.items() if value is not None}
        arguments["flow_options"] |= dict(self.flow_options or {})
        is_best = isinstance(self.flow, str) and self.flow == "auto" and self.conditional is None
        (self._fit_best if is_best else self._fit_named)(rows, validation, arguments)
        self.n_iter_ = len(self.result_.history["train"])
        self._n_features_out = x.shape[1]
        return self

    def _fit_best(self, rows: Any, validation: Any, arguments: dict[str, Any]) -> None:
        arguments["options"] = FitOptions(**self.fit_options) if self.fit_options else None
        arguments |= {"columns": getattr(self, "feature_names_in_", None), "effort": self.effort}
        self.flow_, self.result_, self.selection_ = fit_best(rows[0], rows[2], validation, **arguments)

    def _fit_named(self, rows: Any, validation: Any, arguments: dict[str, Any]) -> None:
        x, context, weights = rows
        self.flow_, self.result_ = fit_table(
            x,
            "nsf" if self.flow == "auto" else self.flow,
            context=context,
            weights=weights,
            validation=validation,
            columns=getattr(self, "feature_names_in_", None),
            min_steps=10,
            standardize=self.standardize,
            options=FitOptions(**self.fit_options or {}),
            **{"patience": 20, **arguments},
        )

    def score_samples(self, X: Any, y: Any = None) -> np.ndarray:
        """Return the log-density of each row, in nats, in the units of the columns."""
        return self._map("log_prob", self._rows(X), y)

    def score(self, X: Any, y: Any = None) -> float:
        """Return the mean log-density of the rows, in nats, in the units of the columns."""
        return float(self.score_samples(X, y).mean())

    def sample(
        self, n_samples: int = 1, random_state: int | np.random.RandomState | None = None, *, y: Any = None
    ) -> np.ndarray:
        """Draw rows; from a conditional density given ``y``, one value for all rows or one for each."""
        check_is_fitted(self)
        check_sizes(n_samples=n_samples)
        flow = self.flow_.to(_device(self.device))
        context = self._context(y if self.conditional is None else self._broadcast(y, n_samples), n_samples)
        with seeded(_seed(random_state), flow.device):
            if context is None:
                sizes = [min(_CHUNK_ROWS, n_samples - start) for start in range(0, n_samples, _CHUNK_ROWS)]
                chunks = [flow.sample((size,)).cpu() for size in sizes]
            else:
                chunks = [flow.sample((), part).cpu() for part in context.to(flow.device).split(_CHUNK_ROWS)]
        return torch.cat(chunks).numpy()

    def transform(self, X: Any, y: Any = None) -> np.ndarray:
        """Return the latents of rows."""
        return self._map("encode", self._rows(X), y)

    def fit_transform(self, X: Any, y: Any = None, sample_weight: Any = None) -> np.ndarray:
        """Train the flow on rows, and return their latents."""
        return self.fit(X, y, sample_weight).transform(X, y)

    def inverse_transform(self, X: Any, y: Any = None) -> np.ndarray:
        """Return the rows of latents."""
        check_is_fitted(self)
        z = check_array(X, dtype=np.float64, ensure_all_finite=False)
        if z.shape[1] != self.n_features_in_:
            raise ValueError(f"expected latents of {self.n_features_in_} columns; got {z.shape[1]}")
        check_finite("X", z)
        return self._map("decode", z, y)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = self.conditional is not None
        return tags

    def __getstate__(self) -> dict[str, Any]:
        # A pickle can be read where there is no GPU.
        state = super().__getstate__()
        if "flow_" in state and state["flow_"].device.type != "cpu":
            state["flow_"] = copy.deepcopy(state["flow_"]).cpu()
        return state

    def _rows(self, X: Any, *, reset: bool = False) -> np.ndarray:
        if not reset:
            check_is_fitted(self)
        options = {"dtype": np.float64, "ensure_all_finite": False, "ensure_min_samples": 2 if reset else 1}
        rows = validate_data(self, X, reset=reset, **options)
        check_finite("X", rows, getattr(self, "feature_names_in_", None))
        return rows

    def _learn_targets(self, x: np.ndarray, y: Any, is_used: np.ndarray) -> np.ndarray | None:
        """Learn the classes, or how many numbers ``y`` has, from the rows that are used, and return their context."""
        if self.conditional is None:
            return None
        targets = self._targets(y)
        check_consistent_length(x, targets)
        targets = targets[is_used]
        if self.conditional == "class":
            self.classes_, targets = np.unique(targets, return_inverse=True)
        else:
            self._numbers_of_y = targets.shape[1]
        return targets

    def _targets(self, y: Any) -> np.ndarray:
        """Return class labels, ``(rows,)``, or numbers, ``(rows, numbers)``."""
        _refuse_missing(y, self.conditional)
        if self.conditional == "class":
            return np.asarray(column_or_1d(y))
        numbers = check_array(y, dtype=np.float64, ensure_2d=False, ensure_all_finite=False, input_name="y")
        numbers = numbers[:, None] if numbers.ndim == 1 else numbers
        check_finite("y", numbers)
        return numbers

    def _context(self, y: Any, rows: int) -> Tensor | None:
        """Return the context of rows, as the flow takes it."""
        if self.conditional is None:
            return None
        targets = self._targets(y)
        if len(targets) != rows:
            raise ValueError(f"expected y for each of {rows} rows; got {len(targets)}")
        if self.conditional == "number":
            if targets.shape[1] != self._numbers_of_y:
                raise ValueError(f"expected {self._numbers_of_y} numbers a row in y; got {targets.shape[1]}")
            return as_tensor(targets)
        is_unknown = ~np.isin(targets, self.classes_)
        if is_unknown.any():
            labels = ", ".join(map(str, self.classes_))
            others = list(map(str, np.unique(targets[is_unknown])))
            got = ", ".join(others[:10]) + (f" and {len(others) - 10} others" if len(others) > 10 else "")
            raise ValueError(f"expected class labels among {labels}; got {got}")
        return as_tensor(np.searchsorted(self.classes_, targets))

    def _broadcast(self, y: Any, rows: int) -> np.ndarray:
        """Return ``y`` for each row, from one for all rows or one for each."""
        _refuse_missing(y, self.conditional)
        targets = np.asarray(y)
        has_many = self.conditional == "number" and self._numbers_of_y > 1
        shape = (rows, self._numbers_of_y) if has_many else (rows,)
        try:
            return np.broadcast_to(targets if has_many else targets.reshape(-1), shape)
        except ValueError:
            raise ValueError(f"expected y as one value or as {rows}, one for each; got shape {targets.shape}") from None

    @torch.no_grad()
    def _map(self, method: str, rows: np.ndarray, y: Any) -> np.ndarray:
        flow = self.flow_.to(_device(self.device))
        context, parts = self._context(y, len(rows)), as_tensor(rows).split(_CHUNK_ROWS)
        contexts = [None] * len(parts) if context is None else context.to(flow.device).split(_CHUNK_ROWS)
        pairs = zip(parts, contexts, strict=True)
        return np.concatenate([getattr(flow, method)(x.to(flow.device), given).cpu().numpy() for x, given in pairs])


@dataclass(eq=False, repr=False)
class FlowClassifier(ClassifierMixin, BaseEstimator):
    r"""A generative classifier: the density of the rows given each class, by one flow, and Bayes' rule.

    .. math:: P(k \mid x) = \frac{\pi_k \, p(x \mid k)}{\sum_j \pi_j \, p(x \mid j)}

    Args:
        density: a :class:`FlowDensity`, of which a copy that is conditional on the class is fitted; by default one with
            its default options.
        priors: the probabilities of the classes, in the order of ``classes_``; by default their shares of the weights.

    Attributes:
        density_: the fitted density, which also draws rows of a class: ``density_.sample(10, y="a")``.
        classes_: the class labels.
        class_prior_: their probabilities.
        n_features_in_, feature_names_in_: number of columns, and their names in a data frame.

    Shapes:
        X: ``(rows, columns)``; y, sample_weight: ``(rows,)``.

    Raises:
        TypeError: the density is not a :class:`FlowDensity`.
        ValueError: as in :class:`FlowDensity`; or a ``y`` that is not a class label, or priors that are not
            probabilities.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> density = FlowDensity("maf", num_layers=2, hidden_features=(16,), epochs=5, random_state=0)
        >>> classifier = FlowClassifier(density).fit(X, y)
        >>> classifier.predict_proba(X).shape, classifier.score(X, y) > 0.9
        ((150, 3), True)
    """

    density: FlowDensity | None = None
    _: KW_ONLY
    priors: Sequence[float] | None = None

    def fit(self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None) -> "FlowClassifier":
        """Train the density of rows given their class, and count the classes; groups are as for the density."""
        if self.density is not None and not isinstance(self.density, FlowDensity):
            raise TypeError(f"expected density as a FlowDensity; got {type(self.density).__name__}")
        rows, labels = validate_data(self, X, y, dtype=np.float64, ensure_all_finite=False, ensure_min_samples=2)
        check_classification_targets(labels)
        density = FlowDensity() if self.density is None else clone(self.density)
        self.density_ = density.set_params(conditional="class").fit(X, labels, sample_weight, groups)
        self.classes_ = self.density_.classes_
        weights = _sample_weights(sample_weight, rows)
        is_used = weights > 0
        counts = np.bincount(np.searchsorted(self.classes_, labels[is_used]), weights=weights[is_used])
        self.class_prior_ = counts / counts.sum()
        if self.priors is not None:
            priors = np.asarray(self.priors, dtype=np.float64)
            if priors.shape != self.classes_.shape or not (priors > 0).all() or not np.isclose(priors.sum(), 1):
                expected = f"expected {len(self.classes_)} priors above 0 that sum to 1, one a class"
                raise ValueError(f"{expected}; got {self.priors}")
            self.class_prior_ = priors
        return self

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Return the log-probability of each class, ``(rows, classes)``."""
        check_is_fitted(self)
        rows = validate_data(self, X, reset=False, dtype=np.float64, ensure_all_finite=False)
        log_probs = [self.density_.score_samples(X, np.full(len(rows), label)) for label in self.classes_]
        joint = np.stack(log_probs, axis=1) + np.log(self.class_prior_)
        return joint - np.logaddexp.reduce(joint, axis=1, keepdims=True)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probability of each class, ``(rows, classes)``."""
        return np.exp(self.predict_log_proba(X))

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable class of each row."""
        best = self.predict_log_proba(X).argmax(axis=1)  # first, since it checks that there are classes
        return self.classes_[best]


def _last_split(density: "FlowDensity", x: np.ndarray, y: Any, groups: Any, is_used: np.ndarray) -> Any:
    """Return the rows to train on and to hold out by the last split of a splitter, as indices among those used.

    The splitter sees all rows, since it may have been made for them, as a ``PredefinedSplit`` is.
    """
    splitter = density.validation
    groups = _one_of_each_row("groups", groups, len(x))
    if not hasattr(splitter, "get_n_splits"):
        if groups is not None:
            raise ValueError(f"expected groups only with a splitter as validation; got validation={splitter!r}")
        return None
    *_, split = splitter.split(x, _one_of_each_row("y", y, len(x)), groups)
    index = is_used.cumsum() - 1
    training, held_out = (index[rows][is_used[rows]] for rows in split)
    if not (len(training) and len(held_out)):
        got = f"{len(training)} and {len(held_out)} in the last split of {splitter!r}"
        raise ValueError(f"expected rows of a weight to train on and to hold out; got {got}")
    return training, held_out


def _hold_out(
    density: "FlowDensity", x: np.ndarray, context: np.ndarray | None, weights: np.ndarray, split: Any
) -> tuple[Any, Any]:
    """Return rows, context and weights to train on, and the share or those to hold out."""
    columns, validation = (x, context, weights), density.validation
    if validation is None:
        return columns, 0.0
    if isinstance(validation, Real):
        check_number("validation", validation, "[0, 1)")
        return columns, float(validation)
    if split is not None:
        training, held_out = split
        missing = np.array([]) if context is None else np.setdiff1d(context, context[training])
        if density.conditional == "class" and len(missing):
            got = f"none of {density.classes_[missing[0]]!r} in the last split of {validation!r}"
            raise ValueError(f"expected rows of every class to train on; got {got}")
        constant = (x[training] == x[training][:1]).all(0) & (x != x[:1]).any(0)
        if constant.any():
            name = repr(getattr(density, "feature_names_in_", np.arange(len(constant)))[constant].tolist()[0])
            got = f"column {name}, which is constant there, in the last split of {validation!r}"
            raise ValueError(f"expected columns that vary in the rows to train on; got {got}")
        train, held = (
            (x[rows], None if context is None else context[rows], weights[rows]) for rows in (training, held_out)
        )
        return train, held
    given = validation if isinstance(validation, tuple) else (validation, None)
    holds_tables = isinstance(validation, list) and any(len(getattr(rows, "shape", ())) > 1 for rows in validation)
    if isinstance(validation, str) or len(given) != 2 or holds_tables:
        expected = "validation as a share, rows, a tuple (X, y) or a splitter of scikit-learn"
        got = f"a list of {len(validation)}" if holds_tables else repr(validation)
        raise TypeError(f"expected {expected}; got {got}")
    rows = density._rows(given[0])
    targets = density._context(given[1], len(rows))
    return columns, (rows, None if targets is None else targets.numpy(), None)


def _one_of_each_row(name: str, values: Any, rows: int) -> np.ndarray | None:
    """Return values as an array; refuse those that are not one of each row."""
    if values is None:
        return None
    values = np.asarray(values)
    if values.shape[:1] != (rows,):
        raise ValueError(f"expected {name} of length {rows}, one for each row; got shape {values.shape}")
    return values


def _device(name: str) -> torch.device:
    if name == "auto":  # other accelerators lack double precision
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = choose_device(name)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"expected device to be 'cpu', 'cuda' or 'auto'; got {name!r}")
    return device


def _seed(random_state: int | np.random.RandomState | None) -> int:
    return int(check_random_state(random_state).randint(np.iinfo(np.int32).max))


def _sample_weights(sample_weight: Any, rows: np.ndarray) -> np.ndarray:
    """Return a weight of at least 0 for each row; by default ones."""
    if sample_weight is None:
        return np.ones(len(rows))
    weights = check_array(sample_weight, dtype=np.float64, ensure_2d=False, input_name="sample_weight")
    if weights.shape != (len(rows),):
        raise ValueError(f"expected sample_weight of shape ({len(rows)},); got {weights.shape}")
    if (weights < 0).any():
        raise ValueError(f"expected no negative sample_weight; got {weights.min():g}")
    return weights


def _refuse_missing(y: Any, conditional: str | None) -> None:
    if y is None:
        # The words that scikit-learn looks for.
        raise ValueError(f"requires y to be passed, but the target y is None: conditional={conditional!r}")
