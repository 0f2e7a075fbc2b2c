"""Few-shot prototypes against a plain loop over the same episodes."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from eosin.eval import fewshot
from eosin.eval.metrics import balanced_accuracy, confusion_matrix
from eosin.eval.probe import Labelled


def blobs(counts: tuple[int, ...], offset: float) -> tuple[Labelled, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(counts)), counts)
    centres = generator.normal(size=(len(counts), 8))
    features = centres[labels] + generator.normal(size=(len(labels), 8)) + offset
    test_labels = generator.integers(0, len(counts), 40)
    test = centres[test_labels] + generator.normal(size=(40, 8)) + offset
    is_val = np.zeros(len(labels), np.bool_)
    labelled = Labelled(features=features.astype(np.float32), labels=labels, is_val=is_val)
    return labelled, test.astype(np.float32), test_labels


def naive_episode(labelled: Labelled, queries: np.ndarray, supports: np.ndarray) -> np.ndarray:
    """SimpleShot with UNI's semantics, one query and one prototype at a time, in float64."""
    features = labelled.features.astype(np.float64)
    mean = features[supports.ravel()].mean(axis=0)

    def transform(x: np.ndarray) -> np.ndarray:
        return np.asarray((x - mean) / np.linalg.norm(x - mean))

    prototypes = [np.mean([transform(features[i]) for i in rows], axis=0) for rows in supports]
    return np.array(
        [
            np.argmin([np.linalg.norm(transform(query) - p) for p in prototypes])
            for query in queries.astype(np.float64)
        ]
    )


@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_votes_and_score_are_those_of_a_plain_loop_over_episodes(
    monkeypatch: pytest.MonkeyPatch, offset: float
) -> None:
    monkeypatch.setattr(fewshot, "EPISODES", 70)
    monkeypatch.setattr(fewshot, "AT_ONCE", 30 * 40 * 3)  # in three parts
    labelled, queries, labels = blobs((20, 30, 9), offset)
    outcome = fewshot.probe(labelled, queries, 3, seed=5)
    assert outcome.chosen == {"shots": 8.0}
    members = [np.flatnonzero(labelled.labels == c) for c in range(3)]
    supports = fewshot.draw_supports(members, 8, seed=5)
    predictions = [naive_episode(labelled, queries, support) for support in supports]
    votes = np.mean([np.eye(3)[p] for p in predictions], axis=0)
    assert np.abs(outcome.votes - votes).max() <= 1 / 70 + 1e-9  # a tie may fall otherwise
    assert (np.abs(outcome.votes - votes) > 1e-9).mean() < 0.01
    mean_score = np.mean([balanced_accuracy_score(labels, p) for p in predictions])
    score = balanced_accuracy(confusion_matrix(labels, outcome.votes))
    assert float(score) == pytest.approx(mean_score, abs=1e-3)


def test_supports_are_of_their_class_without_repeats_and_depend_on_seed_and_episode_alone() -> None:
    members = [np.arange(0, 10), np.arange(10, 40)]
    supports = fewshot.draw_supports(members, 4, seed=0)
    assert supports.shape == (fewshot.EPISODES, 2, 4)
    for label, rows in enumerate(members):
        assert np.isin(supports[:, label], rows).all()
    assert all(len(set(s)) == 4 for s in supports.reshape(-1, 4))
    np.testing.assert_array_equal(fewshot.draw_supports(members, 4, seed=0), supports)
    assert (fewshot.draw_supports(members, 4, seed=1) != supports).any()
    assert len({s.tobytes() for s in supports}) > 0.99 * fewshot.EPISODES
    # Every tile is drawn about equally often.
    assert np.bincount(supports[:, 0].ravel(), minlength=10).std() < 40


@pytest.mark.parametrize(("smallest", "shots"), [(1, 1), (3, 2), (16, 16), (50, 16)])
def test_shots_are_the_most_that_the_smallest_class_affords(smallest: int, shots: int) -> None:
    labelled, queries, _ = blobs((60, smallest), 0.0)
    assert fewshot.probe(labelled, queries, 2, seed=0).chosen == {"shots": float(shots)}


def test_every_number_of_shots_has_its_protocol_and_thunder_takes_the_majority() -> None:
    labelled, queries, _ = blobs((40, 9), 0.0)
    found = fewshot.run(labelled, queries, 2, 0, list(fewshot.FAMILY.protocols))
    afforded = {fewshot.protocol_of(s) for s in (1, 2, 4, 8)}
    assert set(found) == {fewshot.PROTOCOL, fewshot.VOTE, *afforded}
    eight = found[fewshot.protocol_of(8)]
    np.testing.assert_array_equal(found[fewshot.PROTOCOL].votes, eight.votes)
    assert eight.runs is not None and eight.runs.shape == (fewshot.EPISODES, 40)
    np.testing.assert_allclose(eight.votes[:, 1], (eight.runs == 1).mean(axis=0))
    vote = found[fewshot.VOTE]
    assert set(vote.votes.ravel()) == {0.0, 1.0} and vote.runs is None
    np.testing.assert_array_equal(vote.predictions, eight.predictions)
