"""The best simple density of a table by cross-validation: averaged Gaussian mixtures in the best coordinates."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.special import logsumexp

from pyroflows.bijection import Bijection
from pyroflows.tables.marginals import COORDINATES, fit_coordinates, to_latent
from pyroflows.tables.mixtures import Mixture, MixtureOptions, fit_mixture

__all__ = ["Candidate", "Start", "StartSearch", "fit_start", "folds_of"]

_HANDFUL = 6
_HEAVY = 0.02  # share of the weight
_FEW_ROWS = 2500  # up to which every row is held out once
_MOST_ROWS = 20_000  # of a search
_FOLDS = 3  # of few rows
_SHRINKAGES = (0.0, 0.05, 0.2, 0.5, 1.0)
_FACTORS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 24, 32)
_COMPONENTS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48), (4, 8, 16, 32, 64)  # of few rows and of many
_PATIENCE = 2  # numbers of components without a better score, after which no more are tried
_MOST_COLUMNS = 300  # for whose distributions mixtures are fitted
_AVERAGED, _MOST_COMPONENTS = 5, 64  # candidates, and their components, unless one has more


@dataclass(frozen=True)
class Candidate:
    """A simple density: its coordinates, its mixture, and the log-density of each held-out row, in data units."""

    coordinates: str
    options: MixtureOptions
    scores: np.ndarray
    score: float


@dataclass(frozen=True)
class Start:
    """A simple density fitted to rows: layers from latents to rows, and the mixture of the latents."""

    layers: list[Bijection]
    mixture: Mixture


def folds_of(
    weights: np.ndarray, *, few: int = _FEW_ROWS, share: float = 0.2
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return rows to fit, rows held out, and the weights of these: three times if there are few rows, or a share once.

    All are in random order, so that the first of many are a fair sample.

    A row that weighs more than a fiftieth of all and than five others, such as the zeros of a column that is mostly
    zero, is fitted and held out each time. Of a handful of rows all are.
    """
    rows = len(weights)
    rng = np.random.default_rng(0)
    order = rng.permutation(rows)
    parts = np.array_split(order, _FOLDS) if rows <= few else [order[: int(share * rows)]]
    is_heavy = weights > max(_HEAVY, 5 / rows) * weights.sum() if rows >= _HANDFUL else np.ones(rows, bool)
    heavy = np.flatnonzero(is_heavy)
    divided = np.where(is_heavy, weights / len(parts), weights)
    folds = []
    for part in parts:
        fitted, held_out = (rng.permutation(np.union1d(those, heavy)) for those in (np.setdiff1d(order, part), part))
        folds.append((fitted, held_out, divided[held_out]))
    return folds


@dataclass
class StartSearch:
    """Tries simple densities on held-out rows, within a budget of work that is the same on every machine.

    First one Gaussian: the shrinkage of its covariance or the factors of a factor analysis; then the number of
    Gaussians; then, in the two best coordinates, how far their covariances are shared, and a floor.

    Args:
        x: rows, of columns of variance 1.
        weights: of the rows, of mean 1.
        work: the budget, in multiplications.
        held_out: rows and their weights to judge candidates by, in place of rows of ``x``.
    """

    x: np.ndarray
    weights: np.ndarray
    work: float
    held_out: tuple[np.ndarray, np.ndarray] | None = None
    tried: dict[tuple[str, MixtureOptions], Candidate] = field(default_factory=dict)
    spent: float = 0.0

    def __post_init__(self) -> None:
        if len(self.x) > _MOST_ROWS:
            rows = np.random.default_rng(0).permutation(len(self.x))[:_MOST_ROWS]
            self.x, self.weights = self.x[rows], self.weights[rows]
        self.folds = folds_of(self.weights)
        if self.held_out is not None:
            number, (others, weights) = len(self.x), (part[:_MOST_ROWS] for part in self.held_out)
            self.x, self.weights = np.concatenate([self.x, others]), np.concatenate([self.weights, weights])
            self.folds = [(np.arange(number), np.arange(number, len(self.x)), weights)]
        self._held_out = np.unique(np.concatenate([held_out for _, held_out, _ in self.folds]))
        self._held_out_weights = self.weights[self._held_out]
        self._latents: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
        self._shares: dict[tuple[str, int, int], np.ndarray] = {}

    def run(self) -> "StartSearch":
        """Try candidates, the most promising first."""
        rows, columns = self.x.shape
        names = COORDINATES if columns <= _MOST_COLUMNS else COORDINATES[:2]
        best = {name: self._best_covariance(name) for name in names}
        for name in self._in_order(best):
            numbers = [number for number in _COMPONENTS[rows > _FEW_ROWS] if number <= max(rows / 8, 2)]
            options = [replace(best[name].options, components=number, rows=float(columns)) for number in numbers]
            best[name] = self._best_of(name, options, best[name], _PATIENCE)
        for name in self._in_order(best)[:2]:
            best[name] = self._polished(name, best[name])
        return self

    def _in_order(self, best: dict[str, Candidate]) -> list[str]:
        return sorted(best, key=lambda name: -best[name].score)

    def _best_covariance(self, name: str) -> Candidate:
        rows, columns = self.x.shape
        floor = 1e-6 if rows > 2 * columns else 1e-3
        first = self._try(name, MixtureOptions(shrinkage=_SHRINKAGES[0], floor=floor))
        options = [replace(first.options, shrinkage=value) for value in _SHRINKAGES[1:]]
        best = self._best_of(name, options, first, _PATIENCE)
        if columns < 8:
            return best
        factors = [replace(first.options, factors=number, floor=1e-6) for number in _FACTORS if number < columns // 2]
        return self._best_of(name, factors, best, 3)

    def _polished(self, name: str, best: Candidate) -> Candidate:
        """Vary one option after another."""
        rows, columns = self.x.shape
        if best.options.components > 1:
            shared = (0.1 * columns, 0.3 * columns, 3.0 * columns, 10.0 * columns, np.inf)
            best = self._best_of(name, [replace(best.options, rows=value) for value in shared], best, len(shared))
        if not best.options.factors:
            options = [replace(best.options, shrinkage=value) for value in _SHRINKAGES]
            best = self._best_of(name, options, best, len(options))
        floors = (1e-9, 1e-4, 1e-3, 1e-2, 1e-1)
        best = self._best_of(name, [replace(best.options, floor=value) for value in floors], best, _PATIENCE + 1)
        others = {round(best.options.components * factor) for factor in (0.67, 1.5)} - {1, best.options.components}
        numbers = sorted(number for number in others if 1 < number <= rows / 4)
        best = self._best_of(name, [replace(best.options, components=number) for number in numbers], best, _PATIENCE)
        if columns > 1:  # many Gaussians without correlations
            plain = MixtureOptions(rows=1.0, shrinkage=1.0, floor=1e-4)
            numbers = [number for number in (2, 4, 8, 12, 16, 24) if number <= rows / 6]
            options = [replace(plain, components=number, rows=max(1.0, columns / 4)) for number in numbers]
            best = self._best_of(name, options, best, _PATIENCE + 1)
        return best

    def _best_of(self, name: str, options: Iterable[MixtureOptions], best: Candidate, patience: int) -> Candidate:
        """Return the best candidate; stop after ``patience`` options in a row without a better score."""
        top, waited = -np.inf, 0
        for option in options:
            if self.spent + self._work_of(option) > self.work:
                break
            found = self._try(name, option)
            best = max(best, found, key=lambda candidate: candidate.score)
            waited = 0 if found.score > top else waited + 1
            top = max(top, found.score)
            if waited >= patience:
                break
        return best

    def _try(self, name: str, options: MixtureOptions) -> Candidate:
        if (name, options) in self.tried:
            return self.tried[name, options]
        if name not in self._latents:
            self._latents[name] = [self._fold(name, *fold[:2]) for fold in self.folds]
        scores = np.empty(len(self.x))
        for index, ((fitted, held_out, _), (z, others, log_det)) in enumerate(
            zip(self.folds, self._latents[name], strict=True)
        ):
            key = (name, options.components, index)
            weights = self.weights[fitted] / self.weights[fitted].mean()
            mixture, shares = fit_mixture(z, weights, options, self._shares.get(key))
            self._shares.setdefault(key, shares)
            scores[held_out] = mixture.log_prob(others) + log_det
        self.spent += self._work_of(options)
        scores = scores[self._held_out]
        score = float(np.average(scores, weights=self._held_out_weights))
        self.tried[name, options] = Candidate(name, options, scores, score)
        return self.tried[name, options]

    def _work_of(self, options: MixtureOptions) -> float:
        """Return about how many multiplications it takes to try a candidate."""
        rows, columns = self.x.shape
        iterations = 20 if options.components > 1 else 1
        factors = 25 * columns**3 if options.factors else 0
        return len(self.folds) * (iterations * options.components * (rows + columns) * columns**2 + factors)

    def _fold(self, name: str, fitted: np.ndarray, held_out: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        layers = fit_coordinates(name, self.x[fitted], self.weights[fitted])
        return to_latent(layers, self.x[fitted])[0], *to_latent(layers, self.x[held_out])

    def best_average(self) -> tuple[list[Candidate], np.ndarray, float]:
        """Return the candidates of one kind of coordinates, their shares and the score of their average.

        The shares have the best held-out likelihood, given one row of equal ones. An average that gains less than its
        standard error gives way to the best candidate alone.
        """
        best: tuple[list[Candidate], np.ndarray, float] = [], np.array([]), -np.inf
        for name in sorted({candidate.coordinates for candidate in self.tried.values()}, key=COORDINATES.index):
            groups: dict[tuple[int, bool, bool], Candidate] = {}
            for candidate in sorted(self.tried.values(), key=lambda candidate: candidate.score):
                if candidate.coordinates == name:
                    options = candidate.options
                    groups[options.components, options.shrinkage == 1, options.factors > 0] = candidate
            chosen = list[Candidate]()
            for candidate in sorted(groups.values(), key=lambda candidate: -candidate.score)[:_AVERAGED]:
                if not chosen or sum(found.options.components for found in [*chosen, candidate]) <= _MOST_COMPONENTS:
                    chosen.append(candidate)
            shares = self._shares_of(chosen)
            chosen = [candidate for candidate, share in zip(chosen, shares, strict=True) if share > 0.05]
            shares = shares[shares > 0.05] / shares[shares > 0.05].sum()
            score = float(np.average(_averaged(chosen, shares), weights=self._held_out_weights))
            best = max(best, (chosen, shares, score), key=lambda found: found[2])
        single = max(self.tried.values(), key=lambda candidate: candidate.score)
        gains = _averaged(best[0], best[1]) - single.scores
        is_clear = np.average(gains, weights=self._held_out_weights) > gains.std() / len(gains) ** 0.5
        return best if is_clear else ([single], np.ones(1), single.score)

    def _shares_of(self, chosen: list[Candidate]) -> np.ndarray:
        scores, weights = np.stack([candidate.scores for candidate in chosen], 1), self._held_out_weights
        shares = np.full(len(chosen), 1 / len(chosen))
        for _ in range(60):
            log_p = scores + np.log(shares)
            belongs = weights @ np.exp(log_p - logsumexp(log_p, axis=1, keepdims=True))
            shares = (belongs + 1 / len(chosen)) / (weights.sum() + 1)
        return shares


def _averaged(chosen: list[Candidate], shares: np.ndarray) -> np.ndarray:
    """Return the log-density of the held-out rows under an average of candidates."""
    return logsumexp(np.stack([candidate.scores for candidate in chosen], 1), axis=1, b=shares)


def fit_start(x: np.ndarray, weights: np.ndarray, chosen: list[Candidate], shares: np.ndarray) -> Start:
    """Fit an average of candidates to rows with weights of mean 1."""
    layers = fit_coordinates(chosen[0].coordinates, x, weights)
    z = to_latent(layers, x)[0]
    mixtures = [fit_mixture(z, weights, candidate.options)[0] for candidate in chosen]
    return Start(layers, Mixture.average(mixtures, shares))
