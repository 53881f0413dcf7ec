"""FlowDensity and FlowClassifier: scikit-learn's checks, densities in the data's units, weights, conditions."""

import pickle
from functools import partial

import numpy as np
import pandas as pd
import pytest
import scipy.integrate
import scipy.stats
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits, load_iris, load_wine
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    KFold,
    PredefinedSplit,
    StratifiedKFold,
    TimeSeriesSplit,
    cross_val_score,
    train_test_split,
)
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator, parametrize_with_checks

import pyroflows
from pyroflows.data import load_table
from pyroflows.tables import fit_table, table_flow
from pyroflows.tables.estimator import FlowClassifier, FlowDensity
from pyroflows.tables.fitting import _split
from pyroflows.tables.rows import merge_rows

FLOWS = ("maf", "nsf", "realnvp", "glow", "nice", "iaf", "planar", "radial")
tiny = {"num_layers": 1, "hidden_features": (4,), "epochs": 1, "fit_options": {"steps_per_epoch": 2}}
fast = partial(FlowDensity, "realnvp", random_state=0, **tiny)


def small(flow="nsf", **options):
    return FlowDensity(flow, **{"num_layers": 2, "hidden_features": (16,), "epochs": 3, "random_state": 0, **options})


def correlated(rows, seed=0):
    rng = np.random.RandomState(seed)
    return rng.randn(rows, 2) @ np.array([[2.0, 0.0], [1.5, 0.5]]).T + [10.0, -3.0]


@parametrize_with_checks([fast(), FlowClassifier(fast()), FlowDensity(effort="quick", random_state=0)])
def test_scikit_learns_checks(estimator, check):
    check(estimator)


@pytest.mark.slow
@pytest.mark.parametrize("flow", FLOWS)
def test_scikit_learns_checks_of_every_flow(flow):
    density = FlowDensity(flow, num_layers=2, hidden_features=(8,), epochs=2, random_state=0)
    for estimator in (density, FlowClassifier(density)):
        failed = [
            found for found in check_estimator(estimator, on_skip=None, on_fail=None) if found["status"] == "failed"
        ]
        assert not failed


@pytest.mark.slow
@pytest.mark.parametrize("rows", (2, 5, 20))
def test_default_options_on_few_rows(rows):
    x = correlated(rows)
    density = FlowDensity(random_state=0).fit(x)
    wide = scipy.stats.multivariate_normal(x.mean(0), 100 * np.eye(2)).logpdf(correlated(500, seed=1)).mean()
    assert np.median(density.score_samples(correlated(500, seed=1))) > (wide if rows > 5 else -np.inf)


def test_package_gives_the_estimators_on_demand():
    assert pyroflows.FlowDensity is FlowDensity
    assert pyroflows.FlowClassifier is FlowClassifier
    with pytest.raises(AttributeError, match="has no attribute 'FlowRegressor'"):
        pyroflows.FlowRegressor  # noqa: B018


# Densities in the units of the data


def test_pipeline_scores_as_own_scaling():
    table = load_table("diabetes", standardize=False)
    x, test = (np.delete(part.double().numpy(), 1, axis=1) for part in (table.train, table.test))
    own = small().fit(x)
    pipeline = make_pipeline(StandardScaler(), small(standardize=False)).fit(x)
    log_det = -np.log(pipeline[0].scale_).sum()
    np.testing.assert_allclose(pipeline.score_samples(test) + log_det, own.score_samples(test), rtol=0, atol=1e-9)


def test_units():
    x = correlated(200)
    near, far = small().fit(x), small().fit(x * 1000 + 5e6)
    difference = far.score_samples(x * 1000 + 5e6) - near.score_samples(x)
    np.testing.assert_allclose(difference, -2 * np.log(1000), atol=1e-6)
    offset = near.result_.best_loss - far.result_.best_loss
    assert offset == pytest.approx(-2 * np.log(1000), abs=1e-3)


def test_density_of_one_column_integrates_to_one_and_has_both_peaks():
    rng = np.random.RandomState(0)
    x = np.r_[rng.randn(300) - 4, rng.randn(300) * 0.5 + 2][:, None]
    density = FlowDensity("nsf", num_layers=2, hidden_features=(16,), epochs=15, random_state=0).fit(x)
    grid = np.linspace(-40, 40, 8001)
    p = np.exp(density.score_samples(grid[:, None]))
    assert scipy.integrate.trapezoid(p, grid) == pytest.approx(1, abs=1e-3)
    assert scipy.integrate.trapezoid(p[grid < -1], grid[grid < -1]) == pytest.approx(0.5, abs=0.03)
    truth = 0.5 * scipy.stats.norm(-4, 1).pdf(x[:, 0]) + 0.5 * scipy.stats.norm(2, 0.5).pdf(x[:, 0])
    assert density.score(x) == pytest.approx(np.log(truth).mean(), abs=0.08)


def test_normal_data_meet_their_entropy():
    x = correlated(3000)
    covariance = np.array([[2.0, 0.0], [1.5, 0.5]]).T
    entropy = scipy.stats.multivariate_normal(cov=covariance.T @ covariance).entropy()
    density = small(epochs=5).fit(x)
    assert -density.score(correlated(3000, seed=1)) == pytest.approx(entropy, abs=0.05)
    drawn = density.sample(4000, random_state=0)
    np.testing.assert_allclose(drawn.mean(0), [10, -3], atol=0.2)
    np.testing.assert_allclose(np.cov(drawn.T), np.cov(x.T), atol=0.4)


@pytest.mark.parametrize("flow", FLOWS)
def test_latents_and_back_whatever_stands_beside(flow):
    x = correlated(60)
    density = small(flow, epochs=1).fit(x)
    z = density.transform(x)
    np.testing.assert_allclose(density.inverse_transform(z), x, atol=1e-6)
    np.testing.assert_allclose(density.transform(x[7:8]), z[7:8], atol=1e-9)
    np.testing.assert_allclose(density.score_samples(x[13::-1]), density.score_samples(x)[13::-1], atol=1e-9)


@pytest.mark.parametrize("flow", FLOWS)
def test_one_column_of_any_flow(flow):
    x = correlated(60)[:, :1]
    density = small(flow, epochs=2).fit(x)
    assert density.sample(3, random_state=0).shape == (3, 1)
    assert -density.score(x) == pytest.approx(scipy.stats.norm(scale=x.std()).entropy(), abs=0.3)


# Life in scikit-learn


def test_grid_search_picks_a_size():
    x = load_table("iris").train.numpy()
    search = GridSearchCV(small(), {"num_layers": [1, 3]}, cv=2).fit(x)
    scores = search.cv_results_["mean_test_score"]
    assert search.best_params_["num_layers"] == [1, 3][int(np.argmax(scores))]
    assert np.isfinite(scores).all()
    assert scores[0] != scores[1]
    assert search.best_estimator_.score(x) > scipy.stats.norm().logpdf(x).sum(1).mean()


@pytest.mark.slow
def test_cross_validation_in_two_processes():
    x, y = load_iris(return_X_y=True)
    density = small()
    for estimator in (density, FlowClassifier(density)):
        one, two = (cross_val_score(estimator, x, y, cv=3, n_jobs=jobs) for jobs in (1, 2))
        np.testing.assert_allclose(one, two, rtol=1e-5)


def test_pickle_and_clone():
    x = correlated(100)
    density = small().fit(x)
    again = pickle.loads(pickle.dumps(density))
    assert np.array_equal(again.score_samples(x), density.score_samples(x))
    assert np.array_equal(again.sample(5, random_state=1), density.sample(5, random_state=1))
    with pytest.raises(NotFittedError):
        clone(density).score_samples(x)
    assert np.array_equal(clone(density).fit(x).score_samples(x), density.score_samples(x))


def test_random_state():
    x = correlated(100)
    state = torch.random.get_rng_state()
    scores = [small(random_state=seed).fit(x).score_samples(x) for seed in (0, 0, 1)]
    assert np.array_equal(scores[0], scores[1])
    assert not np.allclose(scores[0], scores[2])
    density = small().fit(x)
    first, second = density.sample(4, random_state=0), density.sample(4, random_state=1)
    assert not np.allclose(first, second)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_data_frames():
    frame = pd.DataFrame(correlated(80), columns=["height", "weight"])
    density = small(epochs=1).set_output(transform="pandas").fit(frame)
    assert list(density.feature_names_in_) == ["height", "weight"]
    latent = density.transform(frame)
    assert list(latent.columns) == ["flowdensity0", "flowdensity1"] == list(density.get_feature_names_out())
    assert density.fit_transform(frame).equals(latent)
    with pytest.raises(ValueError, match="feature names"):
        density.score_samples(frame[["weight", "height"]])
    frame.loc[5, "weight"] = np.nan
    with pytest.raises(ValueError, match="expected finite numbers in X; got NaN in row 5, column 'weight'"):
        density.fit(frame)


def test_kinds_of_input():
    x = correlated(50)
    x.flags.writeable = False
    density = small(epochs=1).fit(x)
    single = small(epochs=1).fit(x.astype(np.float32))
    np.testing.assert_allclose(single.score_samples(x), density.score_samples(x), atol=0.05)
    assert density.score_samples(x.tolist()).dtype == density.score_samples(x.astype(np.float32)).dtype == np.float64
    assert np.isfinite(small(epochs=1).fit(x[:2]).score(x[:2]))


def test_attributes():
    density = small(epochs=3).fit(correlated(100))
    assert density.n_iter_ == 3 == len(density.result_.history["validation"])
    assert density.flow_.dtype == torch.float64
    assert density.score(correlated(100)) == density.score_samples(correlated(100)).mean()
    assert small(validation=0, epochs=2).fit(correlated(30)).result_.history["validation"] == []


# Weights


def test_weight_of_two_is_a_row_twice():
    x = correlated(60)
    weight = np.random.RandomState(0).randint(0, 4, 60)
    order = np.random.RandomState(1).permutation(weight.sum())
    weighted = small().fit(x, sample_weight=weight)
    repeated = small().fit(x.repeat(weight, 0)[order])
    assert np.array_equal(weighted.score_samples(x), repeated.score_samples(x))
    np.testing.assert_allclose(small().fit(x, sample_weight=np.full(60, 0.3)).score(x), small().fit(x).score(x), 1e-6)


def test_a_value_that_most_rows_have_is_learned_from():
    x = np.where(np.arange(500) < 400, 0.0, np.random.RandomState(0).normal(5, 1, 500))[:, None]
    for seed in range(3):
        density = FlowDensity(num_layers=1, hidden_features=(4,), validation=0.5, learning_rate=0.01, epochs=20)
        drawn = density.set_params(random_state=seed).fit(x).sample(1000, random_state=0)
        assert 0.5 < (abs(drawn) < 1).mean() < 0.95  # where none of it was learned it was below 0.01


def test_equal_rows_are_on_one_side_or_divided():
    x = np.r_[np.zeros(60), np.arange(1, 41).repeat(3)][:, None]
    training, held_out, divided = _split(x, None, None, 0.2, seed=0, is_continuous=True)
    assert not divided.any()
    assert sorted([*training, *held_out]) == list(range(180))
    assert set(x[training, 0]) & set(x[held_out, 0]) == {0.0}  # more rows than are held out: one by one
    assert 24 < len(held_out) <= 36
    merged, _, weights = merge_rows(x, None, np.ones(180))
    training, held_out, divided = _split(merged, None, weights, 0.2, seed=0, is_continuous=True)
    assert merged[divided, 0].tolist() == [0.0]
    assert set(training) & set(held_out) == set(np.flatnonzero(divided))
    assert len(held_out) == 1 + int(0.2 * 41)
    for share in (0.0, 0.02):  # too little for a row
        training, held_out, divided = _split(merged[:30], None, weights[:30], share, seed=0, is_continuous=True)
        assert len(training) == 30
        assert not held_out.size
        assert not divided.any()


def test_an_interrupted_fit_leaves_the_best_weights_in_the_flow():
    flows, losses = [], []

    def interrupt(loss):
        losses.append(float(loss))
        if len(losses) == 200:
            raise KeyboardInterrupt

    x = correlated(2000) * 1000
    options = {"flow_options": {"num_layers": 2}, "min_steps": 10, "seed": 0, "epochs": 100}
    with pytest.raises(KeyboardInterrupt):
        fit_table(x, "maf", on_start=flows.append, on_step=interrupt, **options)
    with torch.no_grad():
        loss = -float(flows[0].double().log_prob(torch.from_numpy(x)).mean())
    assert loss == pytest.approx(losses[-1], abs=0.3)  # in the units of the columns


def test_weights_reach_the_optimum():
    rng = np.random.RandomState(0)
    x = np.r_[rng.randn(400) * 0.3 - 3, rng.randn(400) * 0.3 + 3][:, None]
    weight = np.repeat([3.0, 1.0], 400)
    density = FlowDensity("nsf", num_layers=2, hidden_features=(16,), epochs=30, random_state=0)
    drawn = density.fit(x, sample_weight=weight).sample(4000, random_state=0)
    assert (drawn < 0).mean() == pytest.approx(0.75, abs=0.03)
    y = (x[:, 0] > 0) ^ (rng.rand(800) < 0.5)
    given = clone(density).set_params(conditional="class", epochs=5).fit(x, y, sample_weight=weight)
    assert (given.sample(2000, random_state=0, y=True) < 0).mean() == pytest.approx(0.75, abs=0.06)


# Conditional densities, and the classifier


def test_density_given_a_number_meets_the_closed_form():
    rng = np.random.RandomState(0)
    y = rng.randn(1000) * 20 + 300
    x = np.c_[0.1 * y + rng.randn(1000), -y + 5 * rng.randn(1000)]
    density = small(conditional="number").fit(x, y)
    truth = scipy.stats.norm(0.1 * y, 1).logpdf(x[:, 0]) + scipy.stats.norm(-y, 5).logpdf(x[:, 1])
    assert density.score(x, y) == pytest.approx(truth.mean(), abs=0.05)
    assert np.abs(density.score_samples(x, y) - truth).mean() < 0.2
    drawn = density.sample(4000, random_state=0, y=320.0)
    np.testing.assert_allclose(drawn.mean(0), [32, -320], atol=0.6)
    np.testing.assert_allclose(drawn.std(0), [1, 5], rtol=0.1)
    each = density.sample(1000, random_state=0, y=y)
    assert np.corrcoef(each[:, 1], y)[0, 1] == pytest.approx(-0.97, abs=0.02)
    np.testing.assert_allclose(density.inverse_transform(density.transform(x, y), y), x, atol=1e-6)
    again = pickle.loads(pickle.dumps(density))
    assert np.array_equal(again.score_samples(x, y), density.score_samples(x, y))


def test_density_given_several_numbers():
    rng = np.random.RandomState(0)
    y = rng.randn(300, 2)
    x = y.sum(1, keepdims=True) + 0.1 * rng.randn(300, 1)
    density = small(conditional="number").fit(x, y)
    assert density.sample(500, random_state=0, y=[1.0, 2.0]).mean() == pytest.approx(3, abs=0.1)
    with pytest.raises(ValueError, match="expected 2 numbers a row in y; got 1"):
        density.score(x, y[:, 0])


def test_density_given_a_class():
    x, y = load_iris(return_X_y=True)
    names = np.array(["setosa", "versicolor", "virginica"])[y]
    density = small(conditional="class").fit(x, names)
    assert list(density.classes_) == ["setosa", "versicolor", "virginica"]
    for name in density.classes_:
        drawn = density.sample(500, random_state=0, y=name)
        np.testing.assert_allclose(drawn.mean(0), x[names == name].mean(0), atol=0.2)
    assert density.score(x, names) > small().fit(x).score(x)
    assert np.isfinite(cross_val_score(density, x, names, cv=StratifiedKFold(2))).all()


def test_classifier():
    x, y = load_wine(return_X_y=True)
    x, test, y, truth = train_test_split(x, y, stratify=y, random_state=0)
    assert FlowClassifier(small()).fit(x, y).score(test, truth) > 0.93


@pytest.mark.slow
def test_classifier_beside_others():
    digits, label = load_digits(return_X_y=True)
    digits = PCA(16, random_state=0).fit_transform(digits)
    for x, y in (load_iris(return_X_y=True), load_wine(return_X_y=True), (digits, label)):
        classifiers = (FlowClassifier(small(epochs=40)), GaussianNB(), LinearDiscriminantAnalysis())
        flow, *others = (cross_val_score(classifier, x, y, cv=5).mean() for classifier in classifiers)
        print(f"{x.shape}: flow {flow:.3f}, naive Bayes and linear discriminant {others[0]:.3f}, {others[1]:.3f}")
        assert flow > min(others) - 0.02


def test_classifiers_probabilities():
    x, y = load_iris(return_X_y=True)
    names = np.array(["a", "b", "c"])[y]
    classifier = FlowClassifier(small(epochs=1)).fit(x, names)
    given = classifier.density_.score_samples(x, np.full(150, "b")) + np.log(1 / 3)
    proba = classifier.predict_proba(x)
    np.testing.assert_allclose(proba.sum(1), 1)
    np.testing.assert_allclose(classifier.class_prior_, 1 / 3)
    everything = [classifier.density_.score_samples(x, np.full(150, name)) for name in "abc"]
    total = np.logaddexp.reduce(everything) + np.log(1 / 3)
    np.testing.assert_allclose(np.log(proba[:, 1]), given - total, atol=1e-9)
    sure = FlowClassifier(small(epochs=1), priors=[0.98, 0.01, 0.01]).fit(x, names)
    np.testing.assert_allclose(
        sure.predict_log_proba(x)[:, 0] - sure.predict_log_proba(x)[:, 1],
        classifier.predict_log_proba(x)[:, 0] - classifier.predict_log_proba(x)[:, 1] + np.log(98),
    )
    weighted = FlowClassifier(small(epochs=1)).fit(x, names, sample_weight=np.where(y == 0, 2, 1))
    np.testing.assert_allclose(weighted.class_prior_, [0.5, 0.25, 0.25])
    search = GridSearchCV(FlowClassifier(fast()), {"density__num_layers": [1, 2]}, cv=2).fit(x, names)
    assert search.best_score_ > 0.8


# What is refused

X = correlated(40)


@pytest.mark.parametrize(
    "density, x, y, weight, message",
    [
        (fast(), np.where(np.arange(80).reshape(40, 2) == 9, np.inf, X), None, None, "got inf in row 4, column 1"),
        (fast(), np.c_[X, np.ones(40)], None, None, "expected columns that vary, .*; got column 2"),
        (fast(), X[:1].repeat(5, 0), None, None, "expected at least 2 different rows of a weight above zero; got 1"),
        (fast(), X, None, np.zeros(40), "zero|positive"),
        (fast(), X, None, -np.ones(40), "[Nn]egative"),
        (fast(conditional="label"), X, None, None, "expected conditional to be one of 'class', 'number'; got 'label'"),
        (fast(conditional="class"), X, None, None, "requires y to be passed"),
        (fast(conditional="number"), X, np.full(40, np.nan), None, "finite numbers in y; got NaN in row 0, column 0"),
        (fast(conditional="number"), X, X[:39, 0], None, "inconsistent numbers of samples"),
        (fast().set_params(flow="mfa"), X, None, None, "expected flow to be one of .*; got 'mfa'"),
        (
            fast().set_params(device="gpu"),
            X,
            None,
            None,
            "expected device to be 'auto' or one that torch knows, .*; got 'gpu'",
        ),
        (fast(validation=1.0), X, None, None, r"validation in \[0, 1\); got 1.0"),
        (fast(batch_size=0), X, None, None, "expected batch_size to be a positive integer; got 0"),
        (fast(learning_rate=-1.0), X, None, None, "expected learning_rate in"),
        (fast(flow_options={"bins": 3}), X, None, None, "expected options among .*; got 'bins'"),
    ],
)
def test_fit_refuses(density, x, y, weight, message):
    with pytest.raises((ValueError, TypeError), match=message):
        density.fit(x, y, sample_weight=weight)


def test_later_refusals():
    density = fast(conditional="class").fit(X, X[:, 0] > 10)
    for call, message in (
        (lambda: density.score_samples(X), "requires y to be passed"),
        (lambda: density.score_samples(X, ["c"] * 40), "expected class labels among False, True; got c"),
        (lambda: density.score_samples(X, [True]), "expected y for each of 40 rows; got 1"),
        (
            lambda: density.sample(3, y=[True, False]),
            r"expected y as one value or as 3, one for each; got shape \(2,\)",
        ),
        (lambda: density.sample(0, y=True), "expected n_samples to be a positive integer; got 0"),
        (lambda: density.inverse_transform(X[:, :1], [True] * 40), "expected latents of 2 columns; got 1"),
        (lambda: FlowClassifier(priors=[1.0]).set_params(density=fast()).fit(X, X[:, 0] > 10), "expected 2 priors"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="expected density as a FlowDensity; got GaussianNB"):
        FlowClassifier(GaussianNB()).fit(X, X[:, 0] > 10)


# The flow of a table


@pytest.mark.parametrize("flow", FLOWS)
def test_flow_of_a_table_starts_as_its_normal_distribution(flow):
    torch.manual_seed(0)
    y = torch.randn(400, 1).double() * 20 + 300
    x = torch.cat([0.1 * y + torch.randn(400, 1), -y + 5 * torch.randn(400, 1)], 1).double()
    truth = torch.distributions.Normal(torch.cat([0.1 * y, -y], 1), torch.tensor([1.0, 5.0])).log_prob(x).sum(1).mean()
    made = table_flow(x, flow, context=y, num_layers=2)
    assert made.dtype == torch.float64
    with torch.no_grad():
        assert float(made.log_prob(x, y).mean() - truth) == pytest.approx(0, abs=0.6)


def test_flow_of_a_table_with_counts():
    torch.manual_seed(0)
    x = torch.stack([torch.poisson(torch.full((500,), 4.0)), torch.randn(500) * 100], 1)
    made = table_flow(x, "nsf", num_layers=2, hidden_features=(16,), integer_columns=[0])
    pyroflows.fit(made, x, epochs=20, seed=0)
    probability = scipy.stats.poisson(4).logpmf(x[:, 0]).mean() - scipy.stats.norm(scale=100).entropy()
    with torch.no_grad():
        assert float(made.dequantized_log_prob(x).mean()) == pytest.approx(probability, abs=0.15)
    assert torch.equal(made.dequantizer.quantize(made.sample((9,)))[:, 0] % 1, torch.zeros(9))


def test_flow_of_a_table_is_saved(tmp_path):
    x, y = correlated(60), np.arange(60) % 3
    for kind in ("class", "number"):
        density = fast(conditional=kind).fit(x, y)
        density.flow_.save(tmp_path / "flow")
        context = torch.tensor(y) if kind == "class" else torch.tensor(y)[:, None].double()
        with torch.no_grad():
            score = pyroflows.load(tmp_path / "flow").log_prob(torch.tensor(x), context)
        assert np.array_equal(score, density.score_samples(x, y))


ROWS = torch.tensor(X)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: table_flow(ROWS.long()), "expected rows as a tensor of floating-point numbers; got torch.int64"),
        (lambda: table_flow(ROWS[0]), r"expected rows of shape \(rows, columns\), .*; got \(2,\)"),
        (lambda: table_flow(ROWS / 0), "expected finite numbers in rows; got inf in row 0, column 0"),
        (
            lambda: table_flow(ROWS * 0),
            "expected columns that vary, since a constant one has no density; got column 0, 1",
        ),
        (lambda: table_flow(ROWS, 3), "expected the name of a flow or a function that builds one; got int"),
        (lambda: table_flow(ROWS, lambda *_, **__: 3), "expected the builder to return a flow of 2 features; got int"),
        (lambda: table_flow(ROWS, integer_columns=[2]), "expected integer_columns from 0 to 1; got 2"),
        (lambda: table_flow(ROWS, integer_columns=[0]), "expected multiples of the step 1 from 0 in column 0"),
        (lambda: table_flow(ROWS, context=[1]), "expected a context of numbers, .*; got list"),
        (lambda: table_flow(ROWS, context=torch.ones(3, 2)), "expected a context for each of 40 rows; got 3"),
        (lambda: table_flow(ROWS, context=-torch.ones(40).long()), "expected class labels from 0"),
    ],
)
def test_table_flow_refuses(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


# Rows to validate on


@pytest.mark.parametrize("seed", range(6))
def test_a_column_with_one_other_row_can_be_fitted_whatever_the_seed(seed):
    x = np.random.RandomState(0).randn(60, 2)
    x[:, 1] = 5.0
    x[3, 1] = 6.0
    density = FlowDensity("maf", num_layers=1, hidden_features=(4,), epochs=1, validation=0.5, random_state=seed)
    assert np.isfinite(density.fit(x).score(x))


def test_constant_columns_are_named_by_name_before_rows_are_held_out():
    frame = pd.DataFrame(np.random.RandomState(0).randn(40, 2), columns=["a", "b"]).assign(height=1.0)
    with pytest.raises(ValueError, match="height"):
        FlowDensity(epochs=1).fit(frame)


def test_rows_to_validate_on():
    rng = np.random.RandomState(0)
    x, y = rng.randn(200, 2), rng.randint(0, 2, 200)
    held, held_y = 2 * rng.randn(50, 2), rng.randint(0, 2, 50)
    options = {"num_layers": 1, "hidden_features": (4,), "epochs": 3, "random_state": 0}
    density = FlowDensity("maf", validation=held, **options).fit(x)
    assert -density.score(held) == pytest.approx(density.result_.best_loss, abs=1e-4)
    frame = pd.DataFrame(x, columns=["a", "b"])
    same = FlowDensity("maf", validation=pd.DataFrame(held, columns=["a", "b"]), **options).fit(frame)
    assert same.score(frame) == pytest.approx(density.score(x))
    given = FlowDensity("maf", validation=(held, held_y), conditional="class", **options).fit(x, y)
    assert -given.score(held, held_y) == pytest.approx(given.result_.best_loss, abs=1e-4)
    with pytest.raises(ValueError, match="3 features"):
        FlowDensity("maf", validation=np.zeros((4, 3)), **options).fit(x)
    with pytest.raises(ValueError, match="class labels among 0, 1; got 7"):
        FlowDensity("maf", validation=(held, held_y + 7), conditional="class", **options).fit(x, y)
    with pytest.raises(TypeError, match=r"a share, rows, a tuple \(X, y\) or a splitter.*got 'half'"):
        FlowDensity("maf", validation="half", **options).fit(x)
    with pytest.raises(TypeError, match=r"a tuple \(X, y\) or a splitter of scikit-learn; got a list of 2"):
        FlowDensity("maf", validation=[held, held_y], conditional="class", **options).fit(x, y)
    with pytest.raises(ValueError, match="groups only with a splitter"):
        FlowDensity("maf", **options).fit(x, groups=y)


def test_a_splitter_chooses_the_rows_to_validate_on():
    rng = np.random.RandomState(0)
    x, groups = rng.randn(120, 2), np.repeat(np.arange(6), 20)
    options = {"num_layers": 1, "hidden_features": (4,), "epochs": 3, "random_state": 0}
    for splitter, its_groups in ((TimeSeriesSplit(3), None), (GroupKFold(3), groups), (KFold(4), None)):
        *_, (_, held) = splitter.split(x, None, its_groups)
        density = FlowDensity("maf", validation=splitter, **options).fit(x, groups=its_groups)
        assert -density.score(x[held]) == pytest.approx(density.result_.best_loss, abs=1e-4)
    labels = np.where(groups == 5, "late", "early")
    with pytest.raises(ValueError, match="every class to train on; got none of .*late"):
        FlowDensity("maf", validation=TimeSeriesSplit(5), conditional="class", **options).fit(x, labels)


def test_a_splitter_gets_the_labels_of_a_density_without_condition():
    x, labels = np.random.RandomState(0).randn(60, 2), np.arange(60) % 3
    options = {"num_layers": 1, "hidden_features": (4,), "epochs": 1, "random_state": 0}
    density = FlowDensity("maf", validation=StratifiedKFold(3), **options).fit(x, labels)
    assert len(density.result_.history["validation"]) == 1


def test_groups_reach_the_splitter_of_a_classifier_and_are_checked():
    x, labels, groups = np.random.RandomState(0).randn(60, 2), np.arange(60) % 2, np.arange(60) // 10
    options = {"num_layers": 1, "hidden_features": (4,), "epochs": 1, "random_state": 0}
    density = FlowDensity("maf", validation=GroupKFold(3), **options)
    assert FlowClassifier(density).fit(x, labels, groups=groups.tolist()).predict(x).shape == (60,)
    with pytest.raises(ValueError, match=r"expected groups of length 60, one for each row; got shape \(50,\)"):
        density.fit(x, groups=groups[:50])


def test_a_column_that_varies_only_in_the_held_out_split_is_named():
    x = pd.DataFrame(np.random.RandomState(0).randn(60, 2), columns=["day", "sales"]).assign(shop=1.0)
    x.loc[59, "shop"] = 2.0
    with pytest.raises(ValueError, match="in the rows to train on; got column 'shop', which is constant there, in the"):
        FlowDensity("maf", validation=TimeSeriesSplit(3), epochs=1).fit(x)


def test_a_splitter_made_for_all_rows_stands_beside_rows_without_weight():
    x = correlated(60)
    fold, weights = np.where(np.arange(60) % 3, -1, 0), (np.arange(60) % 4 > 0).astype(float)
    options = {"num_layers": 1, "hidden_features": (4,), "epochs": 2, "random_state": 0}
    density = FlowDensity("maf", validation=PredefinedSplit(fold), **options).fit(x, sample_weight=weights)
    used = weights > 0
    same = FlowDensity("maf", validation=PredefinedSplit(fold[used]), **options).fit(x[used])
    np.testing.assert_array_equal(density.score_samples(x), same.score_samples(x))
    with pytest.raises(ValueError, match="rows of a weight to train on and to hold out; got 40 and 0 in the last"):
        FlowDensity("maf", validation=PredefinedSplit(fold), **options).fit(x, sample_weight=-1.0 * fold)


def test_validation_none_holds_nothing_out():
    x = np.random.RandomState(0).randn(60, 2)
    options = {"num_layers": 1, "hidden_features": (4,), "epochs": 2, "random_state": 0}
    scores = [FlowDensity("maf", validation=none, **options).fit(x).score(x) for none in (None, 0)]
    assert scores[0] == scores[1]
