"""Which tokens the losses of hidden tokens read, found on the host before a batch is sent away."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from eosin.pretrain.slide.batch import SlideBatch
from eosin.pretrain.upload import upload


class Asked(NamedTuple):
    """M hidden tokens, by source; everything on the device."""

    hidden: Tensor
    """bool [T]."""
    rows: tuple[Tensor, ...]
    """Of each source, its hidden tokens among the T, int64 [M_s]."""
    features: tuple[Tensor, ...]
    """And among the source's own, int64 [M_s]."""
    weights: tuple[Tensor, ...]
    """1 / (hidden tokens of the view) / (global views of all samples), fp32 [M_s]."""

    @property
    def joint_weights(self) -> Tensor:
        """Of all hidden tokens in the order of the stream, fp32 [M]."""
        if len(self.rows) == 1:
            return self.weights[0]
        return torch.cat(self.weights)[torch.cat(self.rows).argsort()]


def asked_of(batch: SlideBatch, device: torch.device) -> Asked:
    """What is asked of a batch that is still on the host.

    Args:
        batch: of the data path.
        device: where the networks are.
    """
    views = batch.n_global * len(batch.rows)
    view = np.repeat(batch.owner, batch.stream.lengths)  # of each token
    counts = np.bincount(view[batch.hidden], minlength=views)
    weight = (1 / np.maximum(counts, 1) / views).astype(np.float32)
    rows, features, weights = [], [], []
    for places in batch.stream.places:
        at = places.numpy()
        own = np.flatnonzero(batch.hidden[at])
        features.append(own)
        rows.append(at[own])
        weights.append(weight[view[at[own]]])
    moved = [
        tuple(upload(torch.from_numpy(part), device) for part in parts)
        for parts in (rows, features, weights)
    ]
    return Asked(upload(torch.from_numpy(batch.hidden), device), *moved)
