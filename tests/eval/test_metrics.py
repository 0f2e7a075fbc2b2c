"""Metrics against scikit-learn, plain and with groups that count more than once."""

import warnings

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    cohen_kappa_score,
    f1_score,
    log_loss,
    roc_auc_score,
)

from eosin.eval import ranking
from eosin.eval.metrics import OF_VOTES, calibration_error, confusion_matrix, metrics_of
from eosin.eval.probe import Outcome, one_hot

CLASSES = 4
REFERENCE = {
    "balanced_accuracy": balanced_accuracy_score,
    "accuracy": accuracy_score,
    "macro_f1": lambda labels, predictions: f1_score(labels, predictions, average="macro"),
    "kappa": cohen_kappa_score,
}
Labels = npt.NDArray[np.int64]


def made_up(seed: int, n: int = 60, groups: int = 8) -> tuple[Labels, Labels, Labels]:
    """Labels, predictions that are right two times in three, groups; one class is rare."""
    generator = np.random.default_rng(seed)
    labels = generator.choice(CLASSES, n, p=[0.5, 0.3, 0.17, 0.03])
    wrong = generator.random(n) < 1 / 3
    predictions = np.where(wrong, generator.integers(0, CLASSES, n), labels)
    return labels, predictions, generator.integers(0, groups, n)


def probabilities(seed: int, labels: Labels, n_classes: int) -> npt.NDArray[np.float32]:
    """Probabilities that lean to the truth, on a coarse grid so that there are ties."""
    generator = np.random.default_rng(seed)
    raw = np.exp(generator.normal(size=(len(labels), n_classes)) + np.eye(n_classes)[labels])
    coarse = np.round(16 * raw / raw.sum(axis=1, keepdims=True)) + 1
    return (coarse / coarse.sum(axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("metric", OF_VOTES)
@pytest.mark.parametrize("seed", range(5))
def test_metrics_are_scikit_learns_also_where_classes_are_absent(metric: str, seed: int) -> None:
    labels, predictions, _ = made_up(seed, n=25)
    confusion = confusion_matrix(labels, one_hot(predictions, CLASSES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a predicted class that no label has
        expected = REFERENCE[metric](labels, predictions)
    assert float(OF_VOTES[metric](confusion)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", OF_VOTES)
def test_weights_of_groups_equal_a_loop_that_copies_their_tiles(metric: str) -> None:
    labels, predictions, groups = made_up(0)
    outcome = Outcome(votes=one_hot(predictions, CLASSES))
    weights = np.random.default_rng(1).multinomial(8, np.full(8, 1 / 8), 30).astype(float)
    fast = metrics_of(outcome, labels, groups, 8)[metric](weights)
    for row, value in zip(weights, fast, strict=True):
        rows = np.concatenate(
            [np.flatnonzero(groups == g) for g in range(8) for _ in range(int(row[g]))]
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            expected = REFERENCE[metric](labels[rows], predictions[rows])
        assert value == pytest.approx(expected, abs=1e-12)


def test_a_class_that_a_resample_lacks_makes_no_value_undefined() -> None:
    labels, groups = np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2])
    outcome = Outcome(votes=one_hot(labels, 2), scores=one_hot(labels, 2).astype(np.float32))
    weights = np.random.default_rng(0).multinomial(3, np.full(3, 1 / 3), 500).astype(float)
    found = metrics_of(outcome, labels, groups, 3)
    for name in ("balanced_accuracy", "accuracy", "macro_f1"):
        np.testing.assert_array_equal(found[name](weights), 1.0)
    assert set(found["auroc"](weights)) == {0.5, 1.0}  # a draw of one class ranks nothing


@pytest.mark.parametrize("n_classes", [2, 5])
@pytest.mark.parametrize("paired", [True, False])
def test_the_weighted_area_is_scikit_learns(
    n_classes: int, paired: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "MOST_PAIRED_GROUPS", 99 if paired else 0)
    monkeypatch.setattr(ranking, "_AT_ONCE", 1000)
    generator = np.random.default_rng(n_classes)
    labels, groups = generator.integers(0, n_classes, 300), generator.integers(0, 12, 300)
    scores = probabilities(0, labels, n_classes)
    weights = generator.random((7, 12)) * generator.integers(0, 3, (7, 12))
    found = ranking.Ranking(scores, labels, groups, 12)(weights)
    for row, value in zip(weights, found, strict=True):
        classes = [1] if n_classes == 2 else range(n_classes)
        expected = np.mean(
            [roc_auc_score(labels == c, scores[:, c], sample_weight=row[groups]) for c in classes]
        )
        assert value == pytest.approx(expected, abs=1e-9)


def test_calibration_figures_are_those_of_their_definitions() -> None:
    generator = np.random.default_rng(0)
    labels, groups = generator.integers(0, 3, 400), generator.integers(0, 9, 400)
    scores = probabilities(1, labels, 3)
    outcome = Outcome(votes=one_hot(scores.argmax(axis=1), 3), scores=scores, probabilities=True)
    found = metrics_of(outcome, labels, groups, 9)
    one = np.ones((1, 9))
    assert found["nll"](one)[0] == pytest.approx(log_loss(labels, scores), rel=1e-5)
    brier = np.mean([((p - np.eye(3)[c]) ** 2).sum() for p, c in zip(scores, labels, strict=True)])
    assert found["brier"](one)[0] == pytest.approx(brier, rel=1e-5)
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (scores.max(axis=1) > low) & (scores.max(axis=1) <= low + 1 / 15)
        if inside.any():
            right = (scores[inside].argmax(axis=1) == labels[inside]).mean()
            error += inside.mean() * abs(right - scores[inside].max(axis=1).mean())
    assert found["ece"](one)[0] == pytest.approx(error, abs=1e-6)


def test_a_calibrated_probe_has_less_error_than_an_overconfident_one() -> None:
    generator = np.random.default_rng(0)
    truth = generator.random(20_000)
    labels = (generator.random(20_000) < truth).astype(np.int64)
    groups = np.zeros(20_000, np.int64)
    calibrated = np.stack([1 - truth, truth], axis=1)
    sharp = calibrated**3 / (calibrated**3).sum(axis=1, keepdims=True)
    one = np.ones((1, 1))
    assert calibration_error(calibrated, labels, groups, 1)(one)[0] < 0.01
    assert calibration_error(sharp, labels, groups, 1)(one)[0] > 0.08


def test_values_count_each_tile_by_its_own_class() -> None:
    labels, groups = np.array([0, 1, 1]), np.array([0, 1, 1])
    table = np.array([[1, 0], [0, 0.5], [9, 0.25]], np.float32)
    outcome = Outcome(votes=one_hot(labels, 2), values={"mAP": table})
    value = metrics_of(outcome, labels, groups, 2)["mAP"]
    np.testing.assert_allclose(value(np.array([[1.0, 1.0], [2, 0]])), [1.75 / 3, 1])
