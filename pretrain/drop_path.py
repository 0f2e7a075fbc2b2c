"""Stochastic depth by batch subset: a residual branch is computed for a part of the sequences only.

The kept count is exact (DINOv2's `drop_add_residual_stochastic_depth`), so the saved FLOPs are
real. Subsets are drawn for fixed groups of samples, keyed by (seed, step, group): the same whatever
the batch is split over.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

STREAM = 0x0D20  # keeps these draws apart from those of other modules under one seed


@dataclass(frozen=True)
class DropPath:
    """The draws of one training step."""

    rate: float
    """Share of sequences that skip a branch, 0 ≤ rate < 1."""
    seed: int
    step: int
    group_size: int
    """Samples a group; divides the batch."""
    first_group: int = 0
    """Global number of this process's first group."""

    @property
    def keep(self) -> int:
        """Samples of a group that a branch is computed for; one at least."""
        return max(int(self.group_size * (1 - self.rate)), 1)

    @property
    def scale(self) -> float:
        """What makes up for the samples that are left out: sequences over kept sequences."""
        return self.group_size / self.keep

    def kept(self, layer: int, branch: int, crop_group: int, sequences: int, batch: int) -> Tensor:
        """Indices of the sequences that a branch computes, int64, ascending.

        Args:
            layer: index of the block.
            branch: 0 for attention, 1 for the feed-forward.
            crop_group: index of the crop group (globals, locals).
            sequences: sequences in the crop group, view-major: sequence = view · batch + sample.
            batch: samples on this process.
        """
        return torch.from_numpy(self.draw(layer + 1, crop_group, sequences, batch)[layer, branch])

    def draw(
        self, layers: int, crop_group: int, sequences: int, batch: int
    ) -> NDArray[np.int64]:  # [layers, 2, kept]
        """`kept` of all branches of the first `layers` blocks at once; one stream a group."""
        views, groups = sequences // batch, batch // self.group_size
        chosen = np.empty((layers, 2, views, groups, self.keep), np.int64)
        for group in range(groups):
            key = [STREAM, self.seed, self.step, self.first_group + group, crop_group]
            # the layer comes first, so that a layer's draw does not depend on how many follow
            noise = np.random.default_rng(key).random((layers, 2, views, self.group_size))
            samples = np.sort(np.argsort(noise, axis=-1)[..., : self.keep], axis=-1)
            chosen[:, :, :, group] = samples + group * self.group_size
        chosen += np.arange(views)[:, None, None] * batch
        return chosen.reshape(layers, 2, -1)
