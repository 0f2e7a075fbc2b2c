"""The batched solver against scikit-learn's, one penalty at a time."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.special import logsumexp, softmax
from sklearn.linear_model import LogisticRegression

from eosin.configs.errors import InputError
from eosin.eval import logistic
from eosin.eval.logistic import fit_logistic

GRID = tuple(float(c) for c in 10 ** np.linspace(-6, 3, 19))


def made_up(
    n_classes: int, n: int = 400, dim: int = 24, seed: int = 0
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Overlapping classes; features of very different scales, far from the origin."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, n_classes, n)
    centres = 0.6 * generator.normal(size=(n_classes, dim))
    scales = (1 + np.arange(dim)) ** -1.0
    features = (centres[labels] + generator.normal(size=(n, dim))) * scales + 3
    return features.astype(np.float32), labels


def objective(
    features: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    c: float,
    weights: npt.NDArray[np.float64],
    biases: npt.NDArray[np.float64],
) -> float:
    logits = features.astype(np.float64) @ weights.T + biases
    losses = logsumexp(logits, axis=1) - logits[np.arange(len(labels)), labels]
    return float((weights**2).sum() / 2 + c * losses.sum())


@pytest.mark.parametrize("n_classes", [3, 7])
def test_probabilities_and_objectives_are_scikit_learns_over_the_grid(n_classes: int) -> None:
    features, labels = made_up(n_classes)
    found = fit_logistic(features, labels, n_classes, GRID, tolerance=1e-12, steepest=1e-9)
    probabilities = found.probabilities(features)
    for i, c in enumerate(GRID):
        model = LogisticRegression(C=c, solver="newton-cholesky", tol=1e-8)
        model.fit(features.astype(np.float64), labels)
        np.testing.assert_allclose(
            probabilities[i], model.predict_proba(features.astype(np.float64)), atol=1e-3
        )
        theirs = objective(features, labels, c, model.coef_, model.intercept_)
        ours = objective(features, labels, c, found.weights[i], found.biases[i])
        assert ours <= theirs * (1 + 1e-6)
        assert found.objectives[i] == pytest.approx(ours, rel=1e-9)


def test_two_classes_have_one_logit() -> None:
    features, labels = made_up(2)
    found = fit_logistic(features, labels, 2, (0.1, 1.0), tolerance=1e-12, steepest=1e-9)
    model = LogisticRegression(C=1.0, solver="newton-cholesky", tol=1e-10)
    model.fit(features.astype(np.float64), labels)
    np.testing.assert_allclose(
        found.probabilities(features)[1], model.predict_proba(features), atol=1e-6
    )
    logits = features.astype(np.float64) @ model.coef_[0] + model.intercept_[0]
    losses = np.logaddexp(0, np.where(labels == 1, -logits, logits))
    expected = (model.coef_**2).sum() / 2 + losses.sum()
    assert found.objectives[1] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("c", [1e2, 1e5])
def test_separable_classes_end_lower_than_scikit_learn(c: float) -> None:
    features, labels = made_up(3, n=40)
    found = fit_logistic(features, labels, 3, (c,), tolerance=1e-7)
    model = LogisticRegression(C=c, max_iter=1000).fit(features.astype(np.float64), labels)
    theirs = objective(features, labels, c, model.coef_, model.intercept_)
    assert objective(features, labels, c, found.weights[0], found.biases[0]) <= theirs * 1.0001


def test_float32_and_float64_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = made_up(4)
    exact = fit_logistic(features, labels, 4, GRID[:12], tolerance=1e-10, steepest=1e-7)
    monkeypatch.setattr(logistic, "DOUBLE_BELOW", 0)
    rough = fit_logistic(features, labels, 4, GRID[:12], tolerance=1e-7, steepest=1e-5)
    np.testing.assert_allclose(
        rough.probabilities(features), exact.probabilities(features), atol=3e-3
    )
    np.testing.assert_allclose(rough.objectives, exact.objectives, rtol=1e-4)


def test_blocks_of_rows_and_of_penalties_change_no_solution(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features, labels = made_up(3)
    whole = fit_logistic(features, labels, 3, GRID[:10], tolerance=1e-12, steepest=1e-9)
    monkeypatch.setattr(logistic, "ROWS", 37)
    monkeypatch.setattr(logistic, "TOGETHER", 3)
    parts = fit_logistic(features, labels, 3, GRID[:10], tolerance=1e-12, steepest=1e-9)
    np.testing.assert_allclose(
        parts.probabilities(features), whole.probabilities(features), atol=1e-5
    )


def test_the_loss_of_certain_tiles_keeps_its_precision_in_float32() -> None:
    features = np.array([[10.0], [-10.0]], np.float32)
    problem = logistic._Problem(features, np.array([0, 1]), 2, torch.device("cpu"))
    problem.rows, problem.dtype = problem.rows.float(), torch.float32
    models = torch.tensor([[[1.0, 0], [-1.0, 0]]])
    values, slopes = problem.evaluate(models, torch.zeros(1))
    expected = np.log1p(np.exp(-20.0))
    assert float(values[0]) == pytest.approx(expected, rel=1e-4)
    share = softmax([-10.0, 10.0])[0]
    assert float(slopes.abs().max()) == pytest.approx(10 * share, rel=1e-4)


def test_bad_features_and_grids_are_refused() -> None:
    features, labels = made_up(2)
    with pytest.raises(ValueError, match="ascend"):
        fit_logistic(features, labels, 2, (1.0, 0.1))
    features[3, 2] = np.nan
    with pytest.raises(InputError, match="not finite"):
        fit_logistic(features, labels, 2, (1.0,))
