"""Retrieval and prototypes against plain loops and scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from sklearn.neighbors import NearestCentroid

from eosin.eval import prototypes, retrieval
from eosin.eval.probe import Labelled


def made_up(seed: int) -> tuple[Labelled, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 4, 230)
    features = generator.normal(size=(230, 10)) + np.eye(10)[labels] + 3
    features = features.astype(np.float32)
    known = Labelled(features=features[:150], labels=labels[:150], is_val=np.zeros(150, np.bool_))
    return known, features[150:], labels[150:]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "AT_ONCE", 33)


@pytest.mark.usefixtures("small_blocks")
def test_every_figure_is_that_of_a_loop_over_the_tiles_that_ask() -> None:
    known, queries, labels = made_up(0)
    outcome = retrieval.run(known, queries, 4, 0, [retrieval.PROTOCOL])[retrieval.PROTOCOL]
    mean = known.features.astype(np.float64).mean(axis=0)
    a, b = (x.astype(np.float64) - mean for x in (known.features, queries))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    for row, (query, label) in enumerate(zip(b, labels, strict=True)):
        similarity = a @ query
        ranked = known.labels[np.argsort(-similarity)]
        for k in (1, 3, 5):
            assert outcome.values[f"acc@{k}"][row, label] == (label in ranked[:k])
        expected = average_precision_score(known.labels == label, similarity)
        assert outcome.values["mAP"][row, label] == pytest.approx(expected, abs=1e-5)
        counts = np.bincount(ranked[:5], minlength=4)
        leaders = np.flatnonzero(counts == counts.max())
        winner = next(c for c in ranked if c in leaders)
        assert outcome.values["mMV@5"][row].tolist() == np.eye(4)[winner].tolist()
        assert outcome.predictions[row] == winner


def test_prototypes_are_the_nearest_centroids_of_centred_unit_features() -> None:
    known, queries, _ = made_up(1)
    outcome = prototypes.run(known, queries, 4, 0, [prototypes.PROTOCOL])[prototypes.PROTOCOL]
    mean = known.features.mean(axis=0)
    a, b = (x - mean for x in (known.features, queries))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    expected = NearestCentroid().fit(a, known.labels).predict(b)
    np.testing.assert_array_equal(outcome.predictions, expected)
