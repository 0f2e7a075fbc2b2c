"""Nearest neighbours against scikit-learn's."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from eosin.eval import knn
from eosin.eval.probe import Labelled


@pytest.mark.parametrize("n_classes", [2, 5])
def test_votes_are_those_of_scikit_learn_on_centred_unit_features(n_classes: int) -> None:
    generator = np.random.default_rng(n_classes)
    labels = generator.integers(0, n_classes, 300)
    features = generator.normal(size=(300, 16)) + 0.3 * labels[:, None] + 4
    features = features.astype(np.float32)
    known, queries = features[:200], features[200:]
    outcome = knn.probe(
        Labelled(features=known, labels=labels[:200], is_val=np.zeros(200, np.bool_)),
        queries, n_classes, seed=0,
    )  # fmt: skip
    centre = known.mean(axis=0)
    unit = [
        (x - centre) / np.linalg.norm(x - centre, axis=1, keepdims=True) for x in (known, queries)
    ]
    reference = KNeighborsClassifier(20).fit(unit[0], labels[:200])
    np.testing.assert_array_equal(outcome.predictions, reference.predict(unit[1]))
    np.testing.assert_array_equal(outcome.votes.sum(axis=1), 1)


def test_a_tie_goes_to_the_lowest_label_and_k_shrinks_to_the_references() -> None:
    features = np.array([[1, 0], [-1, 0]], np.float32)
    labelled = Labelled(features=features, labels=np.array([1, 0]), is_val=np.zeros(2, np.bool_))
    outcome = knn.probe(labelled, np.array([[2, 0.1], [-3, 0]], np.float32), 2, seed=0)
    assert outcome.chosen == {"k": 2.0}
    assert outcome.predictions.tolist() == [0, 0]


def test_more_queries_than_a_chunk_are_all_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(130, 4)).astype(np.float32)
    labels = generator.integers(0, 3, 100)
    labelled = Labelled(features=features[:100], labels=labels, is_val=np.zeros(100, np.bool_))
    whole = knn.probe(labelled, features[100:], 3, seed=0)
    monkeypatch.setattr(knn, "CHUNK", 7)
    np.testing.assert_array_equal(knn.probe(labelled, features[100:], 3, seed=0).votes, whole.votes)
