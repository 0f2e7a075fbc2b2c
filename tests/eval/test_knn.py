"""Nearest neighbours against scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier

from eosin.eval import knn, neighbours
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


def test_more_queries_than_a_block_are_all_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(130, 4)).astype(np.float32)
    labels = generator.integers(0, 3, 100)
    labelled = Labelled(features=features[:100], labels=labels, is_val=np.zeros(100, np.bool_))
    whole = knn.probe(labelled, features[100:], 3, seed=0)
    monkeypatch.setattr(neighbours, "AT_ONCE", 7)
    np.testing.assert_array_equal(knn.probe(labelled, features[100:], 3, seed=0).votes, whole.votes)


def test_dinos_votes_are_those_of_a_loop_and_k_is_chosen_on_val() -> None:
    generator = np.random.default_rng(3)
    labels = generator.integers(0, 3, 400)
    features = (generator.normal(size=(400, 8)) + 0.5 * np.eye(8)[labels]).astype(np.float32)
    known = Labelled(features=features[:330], labels=labels[:330], is_val=np.arange(330) % 3 == 0)
    outcome = knn.run(known, features[330:], 3, 0, [knn.DINO])[knn.DINO]

    def by_hand(train: np.ndarray, of: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, queries))
        found = np.zeros((len(queries), 3))
        for row, similarity in enumerate(b @ a.T):
            order = np.argsort(-similarity)[:200]
            weights = np.exp(similarity[order] / 0.07)
            weights /= weights.sum()
            for i in range(min(k, len(order))):
                found[row, of[order[i]]] += weights[i]
        return found

    train, val = ~known.is_val, known.is_val
    scores = []
    for k in knn.DINO_KS:
        shares = by_hand(features[:330][train], labels[:330][train], features[:330][val], k)
        scores.append((shares.argmax(axis=1) == labels[:330][val]).mean())
    best = knn.DINO_KS[int(np.argmax(scores))]
    assert outcome.chosen == {"k": float(best)}
    shares = by_hand(features[:330], labels[:330], features[330:], best)
    np.testing.assert_array_equal(outcome.predictions, shares.argmax(axis=1))
    shares /= shares.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(outcome.scores, shares, atol=1e-5)


def test_thunders_k_is_chosen_by_macro_f1_on_val_and_its_references_are_train() -> None:
    generator = np.random.default_rng(4)
    labels = generator.integers(0, 4, 300)
    features = (generator.normal(size=(300, 8)) + 0.7 * np.eye(8)[labels]).astype(np.float32)
    known = Labelled(features=features[:240], labels=labels[:240], is_val=np.arange(240) % 4 == 0)
    outcome = knn.run(known, features[240:], 4, 0, [knn.THUNDER])[knn.THUNDER]
    train, val = ~known.is_val, known.is_val
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    scores = {}
    for k in knn.THUNDER_KS:
        model = KNeighborsClassifier(k).fit(unit[:240][train], labels[:240][train])
        scores[k] = f1_score(labels[:240][val], model.predict(unit[:240][val]), average="macro")
    best = max(scores, key=lambda k: scores[k])
    assert outcome.chosen == {"k": float(best)}
    model = KNeighborsClassifier(best).fit(unit[:240][train], labels[:240][train])
    np.testing.assert_array_equal(outcome.predictions, model.predict(unit[240:]))


def test_equal_similarities_are_in_the_order_of_the_references() -> None:
    references = np.repeat(np.eye(3, dtype=np.float32), 4, axis=0)
    (found,) = neighbours.nearest(references[:1], references, 12, torch.device("cpu"))
    assert found.rows[0].tolist() == list(range(12))
    assert found.similarities[0].tolist() == [1.0] * 4 + [0.0] * 8
