"""Retrieval of tiles of the same class, ``retrieval/cosine@1``.

Every test tile asks, every tile of train and val can answer; features are centred with the mean of
what can answer and compared by cosine. Over the tiles that ask:

``acc@k``
    whether any of the first k answers has the class (k = 1, 3, 5);
``mMV@5``
    whether the majority of the first 5 does (Chen et al. 2022, Yottixel's tradition); a tie is lost
    unless the class leads it by its nearest answer, where other code counts every tie as won;
``mAP``
    the precision at every answer of the class, averaged over all tiles of the class that there are,
    whatever their rank.

The votes of this protocol are those of the majority of 5.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from eosin.eval.neighbours import AT_ONCE, centred
from eosin.eval.probe import Family, Labelled, Outcome, normalise

PROTOCOL = "retrieval/cosine@1"
KS = (1, 3, 5)
MAJORITY = 5


def run(
    labelled: Labelled,
    test_features: npt.NDArray[np.float32],
    n_classes: int,
    seed: int,
    wanted: Sequence[str],
) -> dict[str, Outcome]:
    """See `Family`; `seed` is not used: there is no chance in it."""
    references, queries = (normalise(x) for x in centred(labelled.features, test_features))
    device = labelled.device
    among = torch.from_numpy(references).to(device).T.contiguous()
    asking = torch.from_numpy(queries).to(device)
    classes = torch.from_numpy(labelled.labels).to(device)
    amounts = torch.bincount(classes, minlength=n_classes)
    ranks = torch.arange(1, len(references) + 1, device=device, dtype=torch.float32)
    parts: dict[str, list[torch.Tensor]] = {}
    for block in asking.split(AT_ONCE):
        order = (block @ among).sort(dim=1, descending=True, stable=True).indices
        ranked = classes[order]  # [Q, M]
        for k in KS:
            first = F.one_hot(ranked[:, :k], n_classes).amax(dim=1)
            parts.setdefault(f"acc@{k}", []).append(first.float())
        majority = F.one_hot(_majority(ranked[:, :MAJORITY], n_classes), n_classes)
        parts.setdefault(f"mMV@{MAJORITY}", []).append(majority.float())
        columns = []
        for label in range(n_classes):
            hit = (ranked == label).float()
            precision = (hit.cumsum(dim=1) / ranks).mul_(hit).sum(dim=1)
            columns.append(precision / amounts[label].clamp(min=1))
        parts.setdefault("mAP", []).append(torch.stack(columns, dim=1))
    values = {name: torch.cat(rows).cpu().numpy() for name, rows in parts.items()}
    votes = values[f"mMV@{MAJORITY}"].astype(np.float64)
    return {PROTOCOL: Outcome(votes=votes, values=values)}


def _majority(answers: torch.Tensor, n_classes: int) -> torch.Tensor:
    """The most frequent class of each row [Q, k]; among equals, the one with the nearest answer."""
    k = answers.shape[1]
    counts = F.one_hot(answers, n_classes)  # [Q, k, C]
    nearness = (counts * torch.arange(k, 0, -1, device=answers.device)[:, None]).amax(dim=1)
    return (counts.sum(dim=1) * (k + 1) + nearness).argmax(dim=1)


FAMILY = Family(
    protocols={
        PROTOCOL: "test tiles ask, train and val answer by cosine of centred features: acc@1, 3, "
        "5, majority of 5, mean average precision"
    },
    run=run,
)
