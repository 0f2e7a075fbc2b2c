"""The nearest references of every query, once, for whatever is then asked of them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from eosin.eval.probe import normalise

AT_ONCE = 512
"""Queries whose similarities to all references are held at a time."""


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """The k nearest references of some queries, the nearest first."""

    queries: slice
    """Which queries these are."""
    rows: npt.NDArray[np.int64]
    """[Q, k]: rows of the references."""
    similarities: npt.NDArray[np.float32]
    """[Q, k]: cosines, descending; among equals, the first row first."""


def nearest(
    queries: npt.NDArray[np.float32],
    references: npt.NDArray[np.float32],
    k: int,
    device: torch.device,
) -> Iterator[Nearest]:
    """The k nearest by cosine, a block of queries at a time.

    On vectors of unit length the order of cosines is that of Euclidean distances.

    Args:
        queries: [N, D].
        references: [M, D].
        k: at most M of them are found.
        device: where to compute.
    """
    k = min(k, len(references))
    among = torch.from_numpy(normalise(references)).to(device).T.contiguous()
    wanted = torch.from_numpy(normalise(queries)).to(device)
    for start in range(0, len(queries), AT_ONCE):
        block = wanted[start : start + AT_ONCE] @ among  # [Q, M]
        found = torch.topk(block, k, dim=1, sorted=False)
        # by row, then, keeping that order among equals, by similarity
        rows, by_row = found.indices.sort(dim=1)
        similarities = found.values.gather(1, by_row)
        similarities, order = similarities.sort(dim=1, descending=True, stable=True)
        yield Nearest(
            queries=slice(start, start + len(block)),
            rows=rows.gather(1, order).cpu().numpy(),
            similarities=similarities.cpu().numpy(),
        )


def centred(
    features: npt.NDArray[np.float32], *others: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], ...]:
    """`features` and `others` less the mean of `features`."""
    mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    return tuple(x - mean for x in (features, *others))
