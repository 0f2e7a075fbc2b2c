"""What the intervals promise: coverage where patients differ, at 60 groups and at 11."""

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import accuracy_score

from eosin.eval.intervals import draw_groups, interval, stratify, tail_of
from eosin.eval.metrics import SummedMetric, accuracy, balanced_accuracy, grouped_confusion
from eosin.eval.probe import Outcome, one_hot
from eosin.eval.scoring import compare, draw, score

CLASSES = 4
Labels = npt.NDArray[np.int64]


def hard_and_easy_patients(
    n_groups: int, generator: np.random.Generator
) -> tuple[Labels, Labels, Labels]:
    """Labels, predictions, groups: tiles of a patient share how hard they are; 0.75 on average."""
    ease = generator.beta(6, 2, n_groups)
    groups = np.repeat(np.arange(n_groups), generator.integers(5, 40, n_groups))
    labels = generator.integers(0, 2, len(groups))
    right = generator.random(len(groups)) < ease[groups]
    return labels, np.where(right, labels, 1 - labels), groups


def covers(labels: Labels, predictions: Labels, groups: Labels, draws: int, seed: int) -> bool:
    n_groups = int(groups.max()) + 1
    sums = grouped_confusion(labels, one_hot(predictions, 2), groups, n_groups)
    strata = stratify(labels, groups, n_groups, 2)
    values = SummedMetric(sums, balanced_accuracy)(draw_groups(strata, draws, seed))
    low, high = interval(values, tail_of(strata))
    return low <= 0.75 <= high


@pytest.mark.parametrize(("n_groups", "least"), [(60, 0.93), (11, 0.92)])
def test_the_interval_covers_the_truth_as_often_as_it_says(n_groups: int, least: float) -> None:
    generator = np.random.default_rng(0)
    trials = 600
    by_groups = by_tiles = 0
    for trial in range(trials):
        labels, predictions, groups = hard_and_easy_patients(n_groups, generator)
        by_groups += covers(labels, predictions, groups, 1000, trial)
        if trial < 100:
            by_tiles += covers(labels, predictions, np.arange(len(labels)), 200, trial)
    assert least - 0.01 <= by_groups / trials <= 0.975
    assert by_tiles / 100 < 0.75  # what resampling tiles would claim


def test_the_spread_of_draws_is_that_of_the_mean_also_with_few_groups() -> None:
    generator = np.random.default_rng(1)
    values = generator.normal(size=6)
    for strata in (np.zeros(6, np.int64), np.array([0, 0, 0, 1, 1, 1])):
        weights = draw_groups(strata, 200_000, seed=0)
        np.testing.assert_allclose(weights.sum(axis=1), 6)
        drawn = (weights @ values / 6).var()
        parts = [values[strata == s] for s in np.unique(strata)]
        expected = sum(len(p) * p.var(ddof=1) for p in parts) / 36
        assert drawn == pytest.approx(expected, rel=0.02)


def test_a_stratum_is_a_most_frequent_class_and_never_a_single_group() -> None:
    labels = np.array([0, 0, 1, 1, 1, 0, 2, 0])
    groups = np.array([0, 0, 1, 1, 2, 2, 3, 4])
    # groups 0 and 4 are of class 0, 1 of class 1, 2 of both (the lower), 3 alone in class 2
    assert stratify(labels, groups, 5, 3).tolist() == [0, 0, 0, 0, 0]
    assert stratify(np.array([0, 0, 1, 1]), np.arange(4), 4, 2).tolist() == [0, 0, 1, 1]


def test_one_group_gives_a_point_and_no_error() -> None:
    strata = np.zeros(1, np.int64)
    weights = draw_groups(strata, 100, 0)
    assert (weights == 1).all()
    assert interval(weights[:, 0], tail_of(strata)) == (1.0, 1.0)


def some(seed: int, n: int, groups: int) -> tuple[Labels, Labels, list[str]]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, CLASSES, n)
    wrong = generator.random(n) < 1 / 3
    predictions = np.where(wrong, generator.integers(0, CLASSES, n), labels)
    return labels, predictions, [f"patient{g}" for g in generator.integers(0, groups, n)]


def test_differences_are_paired_and_none_of_an_encoder_with_itself() -> None:
    labels, predictions, groups = some(2, n=400, groups=25)
    worse = predictions.copy()
    worse[::9] = (labels[::9] + 1) % CLASSES
    draws = draw(labels, groups, CLASSES, 500, 7)

    def against(which: Labels) -> list[tuple[float, float, float]]:
        ours = score("a", "knn", Outcome(votes=one_hot(predictions, CLASSES)), draws)
        theirs = score("b", "knn", Outcome(votes=one_hot(which, CLASSES)), draws)
        found = [compare(a, b) for a, b in zip(ours, theirs, strict=True)]
        return [(d.value, d.low, d.high) for d in found]

    assert against(predictions) == [(0.0, 0.0, 0.0)] * 4
    for value, low, high in against(worse):
        assert 0 < low < value < high


def test_a_score_is_the_value_on_all_tiles_lies_in_its_interval_and_knows_its_runs() -> None:
    labels, predictions, groups = some(3, n=300, groups=30)
    other = predictions.copy()
    other[:50] = labels[:50]
    runs = np.stack([predictions, other]).astype(np.int16)
    votes = (one_hot(predictions, CLASSES) + one_hot(other, CLASSES)) / 2
    outcome = Outcome(votes=votes, runs=runs, chosen={"C": 0.1})
    entries = score("e", "p", outcome, draw(labels, groups, CLASSES, 1000, 0))
    by_metric = {entry.score.metric: entry.score for entry in entries}
    both = [accuracy_score(labels, run) for run in runs]
    assert by_metric["accuracy"].value == pytest.approx(np.mean(both))
    assert by_metric["accuracy"].spread == pytest.approx(np.std(both, ddof=1))
    for record in by_metric.values():
        assert record.low < record.value < record.high
        assert record.chosen == {"C": 0.1}
    assert accuracy(np.eye(2)) == 1
