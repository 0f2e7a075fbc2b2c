"""The linear probes against scikit-learn, scipy and plain torch."""

import copy

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from eosin.eval import linear, linear_eva, linear_uni
from eosin.eval.probe import Labelled


def blobs(seed: int, n: int = 240) -> tuple[Labelled, np.ndarray, np.ndarray]:
    """Three overlapping classes in 6 dimensions of very different scales; test features, labels."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, n)
    centres = generator.normal(size=(3, 6))
    scales = 10.0 ** np.arange(-3, 3)
    features = ((centres[labels] + generator.normal(size=(n, 6))) * scales).astype(np.float32)
    known = Labelled(features=features[:160], labels=labels[:160], is_val=np.arange(160) % 4 == 0)
    return known, features[160:], labels[160:]


def test_it_chooses_c_on_val_and_refits_on_train_and_val_as_written_out_by_hand() -> None:
    known, test_features, _ = blobs(0)
    outcome = linear.run(known, test_features, 3, 0, [linear.L2])[linear.L2]

    def standardised(fitted_on: np.ndarray, features: np.ndarray) -> np.ndarray:
        x = fitted_on.astype(np.float64)
        return (features.astype(np.float64) - x.mean(axis=0)) / x.std(axis=0)

    train, val = known.features[~known.is_val], known.features[known.is_val]
    best, best_score = 0.0, -1.0
    for c in linear.GRID:
        model = LogisticRegression(C=c, max_iter=5000)
        model.fit(standardised(train, train), known.labels[~known.is_val])
        predictions = model.predict(standardised(train, val))
        score = balanced_accuracy_score(known.labels[known.is_val], predictions)
        if score > best_score + 1e-12:
            best, best_score = c, score
    assert outcome.chosen == {"C": best}
    model = LogisticRegression(C=best, max_iter=5000)
    model.fit(standardised(known.features, known.features), known.labels)
    expected = model.predict(standardised(known.features, test_features))
    np.testing.assert_array_equal(outcome.predictions, expected)


def test_the_scale_of_a_feature_does_not_matter_and_a_constant_one_does_no_harm() -> None:
    known, test_features, labels = blobs(1)
    factors = np.array([1e3, 1e-2, 1, 7, 1e2, 1], np.float32)

    def widened(features: np.ndarray) -> np.ndarray:
        constant = np.full((len(features), 1), 5, np.float32)
        return np.concatenate([features * factors, constant], axis=1)

    plain = linear.run(known, test_features, 3, 0, [linear.L2])[linear.L2]
    wide = Labelled(features=widened(known.features), labels=known.labels, is_val=known.is_val)
    scaled = linear.run(wide, widened(test_features), 3, 0, [linear.L2])[linear.L2]
    assert scaled.chosen == plain.chosen
    assert (scaled.predictions == plain.predictions).mean() > 0.98
    assert (plain.predictions == labels).mean() > 0.6


def test_dinos_sweep_takes_features_as_they_are_and_c_by_accuracy() -> None:
    known, test_features, _ = blobs(2)
    known = Labelled(features=known.features * 100, labels=known.labels, is_val=known.is_val)
    outcome = linear.run(known, test_features * 100, 3, 0, [linear.SWEEP])[linear.SWEEP]
    train, val = ~known.is_val, known.is_val

    def fit(rows: np.ndarray, c: float) -> LogisticRegression:
        model = LogisticRegression(C=c, solver="newton-cholesky", tol=1e-8)
        return model.fit(known.features[rows].astype(np.float64), known.labels[rows])

    scores = [
        (fit(train, c).predict(known.features[val]) == known.labels[val]).mean()
        for c in linear.SWEEP_GRID
    ]
    assert len(linear.SWEEP_GRID) == 45 and outcome.chosen["C"] in linear.SWEEP_GRID
    chosen = linear.SWEEP_GRID.index(outcome.chosen["C"])
    assert scores[chosen] >= max(scores) - 1 / val.sum()  # a tile on the edge may fall either way
    model = fit(train | val, outcome.chosen["C"])
    expected = model.predict_proba(test_features.astype(np.float64) * 100)
    assert outcome.scores is not None
    np.testing.assert_allclose(outcome.scores, expected, atol=2e-3)


def test_unis_rule_fixes_c() -> None:
    known, test_features, _ = blobs(3)
    outcome = linear.run(known, test_features, 3, 0, [linear.UNI])[linear.UNI]
    assert outcome.chosen == {"C": 6 * 3 / 100}
    model = LogisticRegression(C=0.18, solver="newton-cholesky", tol=1e-8)
    model.fit(known.features.astype(np.float64), known.labels)
    assert outcome.scores is not None
    expected = model.predict_proba(test_features.astype(np.float64))
    np.testing.assert_allclose(outcome.scores, expected, atol=2e-3)


def test_unis_torch_probe_minimises_what_its_code_says_and_not_the_squared_norm() -> None:
    known, test_features, _ = blobs(4)
    even = (3 / 10.0 ** np.arange(-3, 3)).astype(np.float32)  # features of one scale
    known = Labelled(features=known.features * even, labels=known.labels, is_val=known.is_val)
    test_features = test_features * even
    outcome = linear_uni.run(known, test_features, 3, 0, [linear_uni.PROTOCOL])
    c = 6 * 3 / 100
    x, y = known.features.astype(np.float64), known.labels

    def objective(flat: np.ndarray, squared: bool) -> float:
        weights, biases = flat[:18].reshape(3, 6), flat[18:]
        losses = -log_softmax(x @ weights.T + biases, axis=1)[np.arange(len(y)), y]
        norm = np.linalg.norm(weights)
        return float(losses.mean() + 0.5 / c * (norm**2 if squared else norm))

    def probabilities(squared: bool) -> np.ndarray:
        start = np.full(21, 1e-3)  # the norm has no slope at zero
        found = minimize(objective, start, args=(squared,), method="BFGS", tol=1e-9)
        weights, biases = found.x[:18].reshape(3, 6), found.x[18:]
        return np.exp(log_softmax(test_features @ weights.T + biases, axis=1))

    scores = outcome[linear_uni.PROTOCOL].scores
    assert scores is not None
    np.testing.assert_allclose(scores, probabilities(squared=False), atol=5e-3)
    assert np.abs(scores - probabilities(squared=True)).max() > 0.05


def test_a_run_of_evas_probe_is_what_it_would_be_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_eva, "STEPS", 60)
    monkeypatch.setattr(linear_eva, "BATCH", 32)
    monkeypatch.setattr(linear_eva, "RATE", 3e-2)
    known, test_features, _ = blobs(5)
    outcome = linear_eva.run(known, test_features, 3, 0, [linear_eva.PROTOCOL])
    runs = outcome[linear_eva.PROTOCOL].runs
    assert runs is not None and len(runs) == linear_eva.RUNS
    for index, run in enumerate(runs):
        np.testing.assert_array_equal(run, alone(known, test_features, index))
    assert len({run.tobytes() for run in runs}) > 1
    expected = np.stack([(runs == c).mean(axis=0) for c in range(3)], axis=1)
    np.testing.assert_allclose(outcome[linear_eva.PROTOCOL].votes, expected)


def alone(known: Labelled, test_features: np.ndarray, index: int) -> np.ndarray:
    """One seed of eva's probe, written out: 4 steps a pass, 15 passes, patience 3."""
    generator = np.random.Generator(np.random.Philox(key=[0, index]))
    layer = torch.nn.Linear(6, 3)
    bound = 6**-0.5
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(generator.uniform(-bound, bound, (6, 3)).T))
        layer.bias.copy_(torch.from_numpy(generator.uniform(-bound, bound, 3)))
    train, val = known.only(~known.is_val), known.only(known.is_val)
    x, y = torch.from_numpy(train.features), torch.from_numpy(train.labels)
    optimiser = torch.optim.AdamW(layer.parameters(), lr=linear_eva.RATE)
    best, best_score, since = copy.deepcopy(layer), -1.0, 0
    for _ in range(15):
        for rows in torch.from_numpy(generator.permutation(len(x))).split(32):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(layer(x[rows]), y[rows]).backward()
            optimiser.step()
        predicted = layer(torch.from_numpy(val.features)).argmax(dim=1).numpy()
        score = balanced_accuracy_score(val.labels, predicted)
        since += 1
        if score > best_score + 1e-12:
            best, best_score, since = copy.deepcopy(layer), score, 0
        if since > 3:
            break
    found: np.ndarray = best(torch.from_numpy(test_features)).argmax(dim=1).numpy()
    return found
