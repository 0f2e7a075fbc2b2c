"""Linear probe ``linear/sklearn-l2@1``: logistic regression with a chosen L2 penalty.

scikit-learn's objective (C · Σ cross-entropy + ½‖W‖², bias free), float64, L-BFGS, on features
standardised with the mean and deviation of the tiles it is fitted on, so that one grid of C suits
encoders whose features differ in scale. C is the value of `C_GRID` with the best balanced accuracy
on val after a fit on train, the smallest among equals; then one fit on train and val together.
Differs from UNI's probe (one fixed C, not standardised, norm not squared) and from DINOv2's (45
values of C, not standardised).
"""

import warnings

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from eosin.eval.probe import Labelled, Outcome, one_hot
from eosin.eval.statistics import balanced_accuracy, confusion_matrix

PROTOCOL = "linear/sklearn-l2@1"
DESCRIPTION = (
    "logistic regression (L-BFGS) on standardised features; C of 8 values by balanced accuracy on "
    "val, then fitted on train and val"
)

C_GRID = tuple(10.0**exponent for exponent in range(-6, 2))
MAX_ITERATIONS = 1000


def probe(
    labelled: Labelled, test_features: npt.NDArray[np.float32], n_classes: int, seed: int
) -> Outcome:
    """Fits, chooses C on val, fits again; `seed` is not used: the fit is deterministic."""
    train, val = ~labelled.is_val, labelled.is_val
    scores = []
    for c in C_GRID:
        model = _fit(labelled.features[train], labelled.labels[train], c)
        predictions = model.predict(labelled.features[val])
        confusion = confusion_matrix(labelled.labels[val], one_hot(predictions, n_classes))
        scores.append(float(balanced_accuracy(confusion)))
    best = C_GRID[int(np.argmax(scores))]
    model = _fit(labelled.features, labelled.labels, best)
    return Outcome(votes=one_hot(model.predict(test_features), n_classes), chosen={"C": best})


def _fit(features: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], c: float) -> Pipeline:
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=MAX_ITERATIONS))
    with warnings.catch_warnings():
        # At the weakest penalties separable classes need more iterations than are worth it; a fit
        # that was stopped is a candidate like any other.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(features.astype(np.float64), labels)
