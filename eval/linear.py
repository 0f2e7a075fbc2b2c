"""Linear probes: logistic regressions with an L2 penalty on frozen features.

All of them minimise scikit-learn's objective, ``C · Σ cross-entropy + ½‖W‖²`` with a free bias, by
`logistic`, all values of C at once. They differ in whether the features are standardised and in how
C comes about:

``linear/sklearn-l2@2``
    features standardised with mean and deviation of the tiles that are fitted on, so that one grid
    of C suits encoders whose features differ in scale; C of 8 by balanced accuracy on val. (@1 was
    the same, solved by scikit-learn, which stops earlier at weak penalties.)
``linear/dinov2-sweep45@1``
    DINOv2's: features as they are, C of 45 from 1e-6 to 1e5 by accuracy on val (Oquab et al. 2024,
    and the grid of its evaluation code).
``linear/uni-l2@1``
    UNI's rule for C, ``D · classes / 100``, on features as they are: nothing is chosen. For what
    UNI's own code minimises, whose norm is not squared, see `linear_uni`.

Where C is chosen, it is fitted on train, the smallest among equals is taken, and the last fit is on
train and val together.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from eosin.eval.logistic import fit_logistic
from eosin.eval.metrics import accuracy, balanced_accuracy, confusion_matrix
from eosin.eval.probe import Family, Labelled, Outcome, one_hot

L2 = "linear/sklearn-l2@2"
SWEEP = "linear/dinov2-sweep45@1"
UNI = "linear/uni-l2@1"

GRID = tuple(10.0**exponent for exponent in range(-6, 2))
SWEEP_GRID = tuple(float(c) for c in 10 ** np.linspace(-6, 5, 45))
TOLERANCE = 1e-7
STEEPEST = 1e-5
"""A fit ends where no slope of the mean objective is larger: a tenth of scikit-learn's ``tol``."""

Array = npt.NDArray[np.float64]


def run(
    labelled: Labelled,
    test_features: npt.NDArray[np.float32],
    n_classes: int,
    seed: int,
    wanted: Sequence[str],
) -> dict[str, Outcome]:
    """See `Family`; `seed` is not used: nothing is left to chance."""
    found = {}
    if L2 in wanted:
        found[L2] = choose_and_fit(labelled, test_features, n_classes, GRID)
    if SWEEP in wanted:
        found[SWEEP] = choose_and_fit(
            labelled, test_features, n_classes, SWEEP_GRID, standardise=False, criterion=accuracy
        )
    if UNI in wanted:
        c = labelled.features.shape[1] * n_classes / 100
        probabilities = _fit(labelled, test_features, n_classes, (c,), False)[0]
        found[UNI] = outcome_of(probabilities, {"C": c})
    return found


def choose_and_fit(
    labelled: Labelled,
    test_features: npt.NDArray[np.float32],
    n_classes: int,
    grid: Sequence[float],
    *,
    standardise: bool = True,
    criterion: Callable[[Array], Array] = balanced_accuracy,
) -> Outcome:
    """Fits on train, takes the C with the best `criterion` on val, fits on train and val."""
    train, val = labelled.only(~labelled.is_val), labelled.only(labelled.is_val)
    on_val = _fit(train, val.features, n_classes, grid, standardise)
    scores = [
        float(criterion(confusion_matrix(val.labels, one_hot(p.argmax(axis=1), n_classes))))
        for p in on_val
    ]
    best = grid[int(np.argmax(scores))]
    probabilities = _fit(labelled, test_features, n_classes, (best,), standardise)[0]
    return outcome_of(probabilities, {"C": best})


def outcome_of(probabilities: Array, chosen: dict[str, float]) -> Outcome:
    """The outcome of a probe that gives each class a probability, [N, C]."""
    return Outcome(
        votes=one_hot(probabilities.argmax(axis=1), probabilities.shape[1]),
        scores=probabilities.astype(np.float32),
        probabilities=True,
        chosen=chosen,
    )


def _fit(
    known: Labelled,
    features: npt.NDArray[np.float32],
    n_classes: int,
    grid: Sequence[float],
    standardise: bool,
) -> Array:
    """Probabilities [K, N, C] of `features` by models fitted on all of `known`, one for each C."""
    fitted = known.features
    if standardise:
        mean = fitted.mean(axis=0, dtype=np.float64)
        deviation = fitted.std(axis=0, dtype=np.float64)
        deviation[deviation == 0] = 1
        fitted, features = (((x - mean) / deviation).astype(np.float32) for x in (fitted, features))
    models = fit_logistic(
        fitted,
        known.labels,
        n_classes,
        grid,
        tolerance=TOLERANCE,
        steepest=STEEPEST,
        device=known.device,
    )
    return models.probabilities(features)


FAMILY = Family(
    protocols={
        L2: "logistic regression on standardised features; C of 8 values by balanced accuracy on "
        "val, then fitted on train and val",
        SWEEP: "logistic regression on features as they are; C of 45 values from 1e-6 to 1e5 by "
        "accuracy on val, then fitted on train and val (DINOv2)",
        UNI: "logistic regression on features as they are, C = features · classes / 100, fitted on "
        "train and val (UNI's rule, norm squared)",
    },
    run=run,
    usual=(L2,),
)
