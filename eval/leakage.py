"""How much an encoder knows of the slide rather than of the tissue.

Tiles of one slide share its staining and scanner, and an encoder may sort tiles by that: the
feature collapse that EXAONEPath describes (arXiv 2408.00380). No source gives it a number, so these
are shown, all without class labels, of groups (slides, else patients):

``enrichment``
    the share of a tile's 10 nearest neighbours (cosine) that are of its own group, over the share
    that chance would give; 1 is none.
``probe``
    balanced accuracy of a linear probe that names the group of held-out tiles of the same groups,
    of up to 50 groups; ``probe_chance`` is 1 / groups.
``explained``
    the share of the features' variance that lies between groups (η²), less what as many random
    groups of those sizes would explain: 0 is none.

The same numbers under stain normalisation say how much of it is colour. Classes that lie in slides
of their own raise all three: compare encoders on one task, not tasks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from eosin.eval.linear import GRID, choose_and_fit
from eosin.eval.metrics import balanced_accuracy, confusion_matrix
from eosin.eval.neighbours import nearest
from eosin.eval.probe import Labelled

NEIGHBOURS = 10
MOST_GROUPS = 50
MOST_TILES = 20_000

Features = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Leakage:
    """See the module."""

    enrichment: float
    probe: float | None
    """None where fewer than two groups have four tiles."""
    probe_chance: float | None
    explained: float


def leakage(
    features: Features, groups: Sequence[str], seed: int, device: torch.device
) -> Leakage | None:
    """All figures of features [N, D]; None where no group has two tiles, or there is only one."""
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2 or len(names) == len(index):
        return None
    generator = np.random.Generator(np.random.Philox(key=seed))
    if len(index) > MOST_TILES:
        rows = np.sort(generator.permutation(len(index))[:MOST_TILES])
        features, index = features[rows], index[rows]
    score, chance = _probe(features, index, generator, seed, device)
    return Leakage(
        enrichment=enrichment(features, index, device),
        probe=score,
        probe_chance=chance,
        explained=explained(features, index),
    )


def enrichment(features: Features, groups: Indices, device: torch.device) -> float:
    """See the module; `groups` are indices [N]."""
    same, n = 0.0, len(features)
    k = min(NEIGHBOURS, n - 1)
    for found in nearest(features, features, k + 1, device):
        own = np.arange(found.queries.start, found.queries.start + len(found.rows))
        # a copy of the tile may stand before it: itself is left out wherever it is
        others = found.rows != own[:, None]
        others &= np.cumsum(others, axis=1) <= k
        same += float((others & (groups[found.rows] == groups[own][:, None])).sum())
    sizes = np.bincount(groups)
    chance = float((sizes * (sizes - 1)).sum()) / (n * (n - 1))
    return same / (n * k) / chance


def explained(features: Features, groups: Indices) -> float:
    """See the module; adjusted as ε² is (Kelley 1935)."""
    x = features.astype(np.float64)
    x -= x.mean(axis=0)
    counts = np.bincount(groups)
    here = counts > 0
    sums = np.zeros((len(counts), x.shape[1]))
    np.add.at(sums, groups, x)
    between = float((np.square(sums[here]) / counts[here, None]).sum())
    total = float(np.square(x).sum())
    freedom = len(x) - int(here.sum())
    if total <= 0 or freedom < 1:
        return 0.0
    noise = (total - between) / freedom
    return max(0.0, (between - (int(here.sum()) - 1) * noise) / total)


def _probe(
    features: Features,
    groups: Indices,
    generator: np.random.Generator,
    seed: int,
    device: torch.device,
) -> tuple[float | None, float | None]:
    """Balanced accuracy of naming a tile's group, and chance."""
    sizes = np.bincount(groups)
    named = np.argsort(-sizes, kind="stable")[:MOST_GROUPS]
    named = np.sort(named[sizes[named] >= 4])
    if len(named) < 2:
        return None, None
    parts = np.full(len(groups), -1)
    for group in named:
        rows = generator.permutation(np.flatnonzero(groups == group))
        # of four tiles one is test and one val, in turn
        parts[rows] = np.array([2, 1, 0, 0])[np.arange(len(rows)) % 4]
    labels = np.searchsorted(named, groups)
    known, test = (parts == 0) | (parts == 1), parts == 2
    labelled = Labelled(
        features=features[known], labels=labels[known], is_val=parts[known] == 1, device=device
    )
    outcome = choose_and_fit(labelled, features[test], len(named), GRID)
    confusion = confusion_matrix(labels[test], outcome.votes)
    return float(balanced_accuracy(confusion)), 1 / len(named)
