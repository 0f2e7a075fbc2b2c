"""Whether tissue or its origin decides which tiles are neighbours.

The origin (a centre, a scanner, a staining) is what a robust encoder would not see. Over all tiles
of a task, whose neighbours (cosine) of the tile's own group are passed over:

``ri``
    PathoROB's robustness index: of the first k neighbours of all tiles that are either of the same
    class from elsewhere (SO) or of another class from the same origin (OS), the share that is SO.
    0.5 where there are none. k is given, or the one with the best kNN balanced accuracy of `KS`.
``support``
    the share of tiles with any such neighbour: an index can rest on a tenth of them.
``mari``
    the same with neighbours weighted by exp(-d / τ), d the cosine distance and τ the median d of
    those neighbours (croma 1.0).
``croma``
    the median over tiles of (d_OS - d_SO) / (d_OS + d_SO), d the mean distance to the 5 nearest of
    either kind: above 0, tissue is nearer (croma 1.0). ``croma_tail`` is the mean of the lowest
    tenth, ``croma_support`` the share of tiles that have five of both.

Sources: PathoROB (bifold-pathomics, 46594e9) and croma (clemsgrs, 96de54e). Numbers move with
pooling and k, so both stand in the results. Shapes: N tiles, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eosin.configs.errors import InputError
from eosin.eval.intervals import draw_groups, index_groups, interval, tail_of
from eosin.eval.metrics import SummedMetric, balanced_accuracy, confusion_matrix
from eosin.eval.probe import normalise, one_hot

KS = (1, 3, 5, 7, 9, 11, 21, 31, 41, 51, 61, 71, 81, 91, 101)
MARGIN_NEIGHBOURS = 5
TAIL = 0.1
AT_ONCE = 512

Features = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Confounding:
    """See the module."""

    k: int
    accuracy: float
    """Balanced accuracy of the classes by the k neighbours."""
    ri: float
    low: float
    high: float
    """95 % interval of `ri` over groups."""
    support: float
    mari: float
    tau: float
    croma: float | None
    """None where no tile has five neighbours of both kinds."""
    croma_tail: float | None
    croma_support: float


def confounding(
    features: Features,
    labels: Indices,
    origins: Sequence[str],
    groups: Sequence[str],
    *,
    k: int = 0,
    draws: int = 1000,
    seed: int = 0,
    device: torch.device | None = None,
) -> Confounding:
    """All figures.

    Args:
        features: [N, D].
        labels: of the tiles, [N].
        origins: where each tile is from.
        groups: whose tiles are no neighbours of each other.
        k: neighbours; 0: chosen by kNN balanced accuracy of the classes.
        draws: of the bootstrap over groups.
        seed: of the draws.
        device: where to compute; None: the CPU.

    Raises:
        InputError: there is only one origin, or only one group.
    """
    origin, n_origins = index_groups(origins)
    group, n_groups = index_groups(groups)
    if n_origins < 2 or n_groups < 2:
        raise InputError(
            f"robustness needs two origins and two groups; there are {n_origins} and {n_groups}"
        )
    found = _search(features, labels, origin, group, k or max(KS), device or torch.device("cpu"))
    if not k:
        accuracies = [_knn_accuracy(found.classes[:, :option], labels) for option in KS]
        k = KS[int(np.argmax(accuracies))]
    same = found.classes[:, :k] == labels[:, None]
    native = found.origins[:, :k] == origin[:, None]
    there = found.classes[:, :k] >= 0
    so, os = same & ~native & there, ~same & native & there
    typed = found.distances[:, :k][so | os]
    tau = float(np.median(typed)) if len(typed) and np.median(typed) > 0 else 0.2
    pulls = np.exp(-found.distances[:, :k] / tau)
    sums = np.zeros((n_groups, 2))
    np.add.at(sums, group, np.stack([so.sum(axis=1), os.sum(axis=1)], axis=1))
    index = SummedMetric(sums, _share)
    strata = np.zeros(n_groups, np.int64)
    low, high = interval(index(draw_groups(strata, draws, seed)), tail_of(strata))
    margins = _margins(found)
    worst = np.sort(margins)[: max(1, int(np.ceil(TAIL * len(margins))))] if len(margins) else None
    return Confounding(
        k=k,
        accuracy=_knn_accuracy(found.classes[:, :k], labels),
        ri=float(index(np.ones((1, n_groups)))[0]),
        low=low,
        high=high,
        support=float((so | os).any(axis=1).mean()),
        mari=float(_share(np.array([[(pulls * so).sum(), (pulls * os).sum()]]))[0]),
        tau=tau,
        croma=float(np.median(margins)) if len(margins) else None,
        croma_tail=float(worst.mean()) if worst is not None else None,
        croma_support=len(margins) / len(labels),
    )


@dataclass(frozen=True)
class _Found:
    """Of each tile, its neighbours from other groups, and the nearest of both kinds."""

    classes: Indices
    """[N, k]; -1 where there are fewer."""
    origins: Indices
    distances: Floats
    to_so: Floats
    """[N, 5]: to the nearest of the same class from elsewhere; inf where there are none."""
    to_os: Floats


def _search(
    features: Features, labels: Indices, origins: Indices, groups: Indices, k: int,
    device: torch.device,
) -> _Found:  # fmt: skip
    unit = torch.from_numpy(normalise(features.astype(np.float32))).to(device)
    y, o, g = (torch.from_numpy(x).to(device) for x in (labels, origins, groups))
    parts: list[tuple[Tensor, ...]] = []
    k, m = min(k, len(unit)), min(MARGIN_NEIGHBOURS, len(unit))
    for start in range(0, len(unit), AT_ONCE):
        rows = slice(start, start + AT_ONCE)
        near = unit[rows] @ unit.T  # [n, N]
        own = g[rows, None] == g
        near.masked_fill_(own, -torch.inf)
        top = near.topk(k, dim=1)
        absent = ~top.values.isfinite()
        same, native = y[rows, None] == y, o[rows, None] == o
        so = near.masked_fill(~same | native, -torch.inf).topk(m, dim=1).values
        os = near.masked_fill(same | ~native, -torch.inf).topk(m, dim=1).values
        parts.append(
            (
                y[top.indices].masked_fill(absent, -1),
                o[top.indices].masked_fill(absent, -1),
                (1 - top.values.double()).clamp(min=0),
                (1 - so.double()).clamp(min=0),
                (1 - os.double()).clamp(min=0),
            )
        )
    return _Found(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))


def _knn_accuracy(classes: Indices, labels: Indices) -> float:
    """Balanced accuracy of the majority of neighbours [N, k], the lowest class among equals."""
    n_classes = int(labels.max()) + 1
    counts = np.stack([(classes == c).sum(axis=1) for c in range(n_classes)], axis=1)
    told = counts.any(axis=1)
    votes = one_hot(counts.argmax(axis=1)[told], n_classes)
    return float(balanced_accuracy(confusion_matrix(labels[told], votes)))


def _share(sums: Floats) -> Floats:
    """SO over SO and OS, [..., 2] → [...]; 0.5 where there are none."""
    total = sums.sum(axis=-1)
    share: Floats = np.divide(sums[..., 0], total, out=np.full_like(total, 0.5), where=total > 0)
    return share


def _margins(found: _Found) -> Floats:
    """CRoMa of each tile that has enough neighbours of both kinds."""
    if found.to_so.shape[1] < MARGIN_NEIGHBOURS:
        return np.empty(0)
    so, os = found.to_so.mean(axis=1), found.to_os.mean(axis=1)
    there = np.isfinite(so) & np.isfinite(os) & (so + os > 0)
    margins: Floats = (os[there] - so[there]) / (os[there] + so[there])
    return margins
