"""The linear probe against scikit-learn by hand, and what it may look at."""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from eosin.eval import linear
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
    outcome = linear.probe(known, test_features, 3, seed=0)

    def standardised(fitted_on: np.ndarray, features: np.ndarray) -> np.ndarray:
        x = fitted_on.astype(np.float64)
        return (features.astype(np.float64) - x.mean(axis=0)) / x.std(axis=0)

    train, val = known.features[~known.is_val], known.features[known.is_val]
    best, best_score = 0.0, -1.0
    for c in linear.C_GRID:
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

    plain = linear.probe(known, test_features, 3, seed=0)
    wide = Labelled(features=widened(known.features), labels=known.labels, is_val=known.is_val)
    scaled = linear.probe(wide, widened(test_features), 3, seed=0)
    assert scaled.chosen == plain.chosen
    assert (scaled.predictions == plain.predictions).mean() > 0.98
    assert (plain.predictions == labels).mean() > 0.6
