"""Metrics against scikit-learn; the bootstrap against a naive loop and against its promise."""

import warnings

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

from eosin.eval.probe import Outcome, one_hot
from eosin.eval.scoring import compare, score
from eosin.eval.statistics import (
    METRICS,
    confusion_matrix,
    draw_groups,
    grouped_confusion,
    interval,
    resample,
)

CLASSES = 4
REFERENCE = {
    "balanced_accuracy": balanced_accuracy_score,
    "accuracy": accuracy_score,
    "macro_f1": lambda labels, predictions: f1_score(labels, predictions, average="macro"),
}
Labels = npt.NDArray[np.int64]


def made_up(seed: int, n: int = 60, groups: int = 8) -> tuple[Labels, Labels, Labels]:
    """Labels, predictions that are right two times in three, groups; one class is rare."""
    generator = np.random.default_rng(seed)
    labels = generator.choice(CLASSES, n, p=[0.5, 0.3, 0.17, 0.03])
    wrong = generator.random(n) < 1 / 3
    predictions = np.where(wrong, generator.integers(0, CLASSES, n), labels)
    return labels, predictions, generator.integers(0, groups, n)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", range(5))
def test_metrics_are_scikit_learns_also_where_classes_are_absent(metric: str, seed: int) -> None:
    labels, predictions, _ = made_up(seed, n=25)
    confusion = confusion_matrix(labels, one_hot(predictions, CLASSES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a predicted class that no label has
        expected = REFERENCE[metric](labels, predictions)
    assert float(METRICS[metric](confusion)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_resamples_equal_a_loop_that_copies_the_tiles_of_the_drawn_groups(metric: str) -> None:
    labels, predictions, groups = made_up(0)
    confusions = grouped_confusion(labels, one_hot(predictions, CLASSES), groups, 8)
    draws = draw_groups(8, 30, seed=1)
    assert (draws.sum(axis=1) == 8).all()
    fast = resample(confusions, draws, METRICS[metric])
    for weights, value in zip(draws, fast, strict=True):
        rows = np.concatenate(
            [np.flatnonzero(groups == g) for g in range(8) for _ in range(int(weights[g]))]
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            expected = REFERENCE[metric](labels[rows], predictions[rows])
        assert value == pytest.approx(expected, abs=1e-12)


def test_a_class_that_a_resample_lacks_makes_no_value_undefined() -> None:
    labels, groups = np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2])
    confusions = grouped_confusion(labels, one_hot(labels, 2), groups, 3)
    for metric in METRICS.values():
        values = resample(confusions, draw_groups(3, 500, seed=0), metric)
        np.testing.assert_array_equal(values, 1.0)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Patients differ in how hard they are; tiles of one patient share that."""
    generator = np.random.default_rng(0)
    covered_by_groups = covered_by_tiles = 0
    trials, n_groups, tiles_each = 200, 40, 10
    for trial in range(trials):
        ease = generator.beta(6, 2, n_groups)  # mean 0.75
        right = generator.random((n_groups, tiles_each)) < ease[:, None]
        labels = np.zeros(n_groups * tiles_each, np.int64)
        votes = one_hot((~right).ravel().astype(np.int64), 2)
        for groups, count in (
            (np.repeat(np.arange(n_groups), tiles_each), "groups"),
            (np.arange(n_groups * tiles_each), "tiles"),
        ):
            confusions = grouped_confusion(labels, votes, groups, groups.max() + 1)
            draws = draw_groups(len(confusions), 200, trial)
            low, high = interval(resample(confusions, draws, METRICS["accuracy"]))
            if count == "groups":
                covered_by_groups += low <= 0.75 <= high
            else:
                covered_by_tiles += low <= 0.75 <= high
    assert 0.89 <= covered_by_groups / trials <= 0.99
    assert covered_by_tiles < covered_by_groups  # what resampling tiles would claim


def test_differences_are_paired_and_none_of_an_encoder_with_itself() -> None:
    labels, predictions, groups = made_up(2, n=400, groups=25)
    worse = predictions.copy()
    worse[::9] = (labels[::9] + 1) % CLASSES
    names = [f"patient{g}" for g in groups]

    def scored(encoder: str, which: Labels) -> list[tuple[float, float, float]]:
        ours = score(
            "a", "knn", Outcome(votes=one_hot(predictions, CLASSES)), labels, names, 500, 7
        )
        theirs = score(
            encoder, "knn", Outcome(votes=one_hot(which, CLASSES)), labels, names, 500, 7
        )
        found = [compare(a, b) for a, b in zip(ours, theirs, strict=True)]
        assert [d.metric for d in found] == list(METRICS)
        return [(d.value, d.low, d.high) for d in found]

    assert scored("b", predictions) == [(0.0, 0.0, 0.0)] * len(METRICS)
    for value, low, high in scored("b", worse):
        assert 0 < low < value < high


def test_a_score_is_the_value_on_all_tiles_and_lies_in_its_interval() -> None:
    labels, predictions, groups = made_up(3, n=300, groups=30)
    outcome = Outcome(votes=one_hot(predictions, CLASSES), chosen={"C": 0.1})
    entries = score("e", "p", outcome, labels, [str(g) for g in groups], 1000, 0)
    for entry in entries:
        record = entry.score
        assert record.value == pytest.approx(REFERENCE[record.metric](labels, predictions))
        assert record.low < record.value < record.high
        assert record.chosen == {"C": 0.1}
