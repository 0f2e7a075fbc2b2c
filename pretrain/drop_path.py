"""Stochastic depth by batch subset: a residual branch is computed for a part of the sequences only.

The kept count is exact (DINOv2's `drop_add_residual_stochastic_depth`), so the saved FLOPs are
real. Subsets are drawn for fixed groups of samples, keyed by (seed, step, group): the same whatever
the batch is split over.
"""

from dataclasses import dataclass

import numpy as np
import torch
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

    def kept(self, layer: int, branch: int, crop_group: int, sequences: int, batch: int) -> Tensor:
        """Indices of the sequences that a branch computes, int64, ascending.

        Args:
            layer: index of the block.
            branch: 0 for attention, 1 for the feed-forward.
            crop_group: index of the crop group (globals, locals).
            sequences: sequences in the crop group, view-major: sequence = view · batch + sample.
            batch: samples on this process.
        """
        views = sequences // batch
        keep = max(int(self.group_size * (1 - self.rate)), 1)
        chosen = []
        for group in range(batch // self.group_size):
            key = [
                STREAM,
                self.seed,
                self.step,
                self.first_group + group,
                layer,
                branch,
                crop_group,
            ]
            rng = np.random.default_rng(key)
            samples = rng.permuted(np.tile(np.arange(self.group_size), (views, 1)), axis=1)[
                :, :keep
            ]  # [views, keep]
            chosen.append(
                np.arange(views)[:, None] * batch + group * self.group_size + np.sort(samples)
            )
        return torch.from_numpy(np.sort(np.concatenate(chosen, axis=None)))
