"""A linear probe on a share of the labels, ``ratio/linear-P@1`` for P of 1 to 100 per cent.

A draw takes P per cent of the tiles of each class of train, and of val as well, at least one each,
from (seed, draw) alone, so every encoder meets the same; the smaller shares of a draw lie within
the larger. On what was drawn it does exactly what ``linear/sklearn-l2`` does, so few labels also
choose C poorly. Five draws, one of 100 per cent. Votes are shares of draws: balanced accuracy is
the mean over draws.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from eosin.eval.linear import GRID, choose_and_fit
from eosin.eval.probe import Family, Labelled, Outcome, shares_of_runs

SHARES = (1, 5, 10, 25, 50, 100)
DRAWS = 5


def protocol_of(per_cent: int) -> str:
    """The name of the protocol at that share."""
    return f"ratio/linear-{per_cent}@1"


def run(
    labelled: Labelled,
    test_features: npt.NDArray[np.float32],
    n_classes: int,
    seed: int,
    wanted: Sequence[str],
) -> dict[str, Outcome]:
    """See `Family`."""
    found = {}
    for per_cent in SHARES:
        name = protocol_of(per_cent)
        if name not in wanted:
            continue
        outcomes = [
            choose_and_fit(
                labelled.only(draw_share(labelled, per_cent, seed, draw)),
                test_features,
                n_classes,
                GRID,
            )
            for draw in range(1 if per_cent == 100 else DRAWS)
        ]
        runs = np.stack([outcome.predictions for outcome in outcomes]).astype(np.int16)
        scores = np.stack([o.scores for o in outcomes if o.scores is not None]).mean(axis=0)
        found[name] = Outcome(
            votes=shares_of_runs(runs, n_classes),
            scores=scores,
            probabilities=True,
            runs=runs,
            chosen={"C": float(np.median([o.chosen["C"] for o in outcomes]))},
        )
    return found


def draw_share(labelled: Labelled, per_cent: int, seed: int, draw: int) -> npt.NDArray[np.intp]:
    """Rows that are drawn, ascending."""
    generator = np.random.Generator(np.random.Philox(key=[seed, draw]))
    rows = []
    for is_val in (False, True):
        for label in np.unique(labelled.labels):
            members = np.flatnonzero((labelled.labels == label) & (labelled.is_val == is_val))
            order = generator.permutation(members)
            rows.append(order[: max(1, round(len(members) * per_cent / 100))])
    return np.sort(np.concatenate(rows))


FAMILY = Family(
    protocols={
        protocol_of(p): f"linear/sklearn-l2 on {p} % of the tiles of each class of train and val; "
        + ("all of them" if p == 100 else f"mean of {DRAWS} draws")
        for p in SHARES
    },
    run=run,
)
