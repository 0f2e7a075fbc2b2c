"""Bags of any sizes in one batch without padding, and what is done with them by bag.

The tiles of all bags stand behind one another; a bag is a run of rows. Softmax and weighted sums
are taken over runs, so a bag's result depends on no other bag, and on no row that is none. Legend:
B bags, T tiles of all of them, W channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Packed(NamedTuple):
    """A batch of bags."""

    features: Tensor
    """[T, D]"""
    offsets: Tensor
    """Where each bag begins, and the end: int64 [B + 1]; no bag is empty."""
    cells: Tensor
    """Column and row of each tile on its slide's grid, int64 [T, 2], from 0."""

    @property
    def n_bags(self) -> int:
        """B."""
        return len(self.offsets) - 1

    @property
    def sizes(self) -> Tensor:
        """Tiles of each bag, int64 [B]."""
        return self.offsets.diff()

    @property
    def bag(self) -> Tensor:
        """The bag of each tile, int64 [T]."""
        numbers = torch.arange(self.n_bags, device=self.offsets.device)
        return numbers.repeat_interleave(self.sizes, output_size=len(self.features))

    def split(self) -> list["Packed"]:
        """Each bag alone."""
        sizes = self.sizes.tolist()
        return [
            Packed(features, self.offsets.new_tensor([0, len(features)]), cells)
            for features, cells in zip(
                self.features.split(sizes), self.cells.split(sizes), strict=True
            )
        ]

    def take(self, rows: Tensor) -> "Packed":
        """Some tiles, by their sorted rows; every bag keeps at least one.

        Raises:
            ValueError: a bag is left empty.
        """
        offsets = torch.searchsorted(rows, self.offsets)
        if bool((offsets.diff() < 1).any()):
            raise ValueError("a bag is left without tiles")
        return Packed(self.features[rows], offsets, self.cells[rows])


def pack(bags: Sequence[tuple[Tensor, Tensor]]) -> Packed:
    """Bags as (features [N, D], cells [N, 2]) in one batch.

    Raises:
        ValueError: a bag without tiles.
    """
    sizes = [len(features) for features, _ in bags]
    if not sizes or min(sizes) < 1:
        raise ValueError("a bag needs at least one tile")
    device = bags[0][0].device
    offsets = torch.tensor([0, *sizes]).cumsum(0).to(device)
    return Packed(torch.cat([f for f, _ in bags]), offsets, torch.cat([c for _, c in bags]))


def bag_max(values: Tensor, packed: Packed) -> Tensor:
    """The largest of each channel in each bag: [T, W] → [B, W]."""
    return torch.segment_reduce(values, "max", offsets=packed.offsets, axis=0)


def bag_sum(values: Tensor, packed: Packed, weights: Tensor | None = None) -> Tensor:
    """Sums over bags, weighted or not: [T, W] (and [T]) → [B, W]."""
    rows = torch.arange(len(values), device=values.device)
    return F.embedding_bag(
        rows, values, packed.offsets[:-1], mode="sum", per_sample_weights=weights
    )


def bag_mean(values: Tensor, packed: Packed) -> Tensor:
    """Means over bags: [T, W] → [B, W]."""
    return bag_sum(values, packed) / packed.sizes[:, None]


def bag_softmax(scores: Tensor, packed: Packed) -> Tensor:
    """The softmax within each bag: [T] or [T, H] → the same."""
    bag = packed.bag
    flat = scores if scores.dim() == 2 else scores[:, None]
    top = bag_max(flat.detach(), packed)  # [B, H]
    raised = (flat - top[bag]).exp()
    total = raised.new_zeros(top.shape).index_add(0, bag, raised)
    found = raised / total[bag]
    return found if scores.dim() == 2 else found[:, 0]


def top_rows(scores: Tensor, packed: Packed, count: int, largest: bool = True) -> Tensor:
    """The rows of the `count` extreme scores of each bag, bag after bag, [≤ B · count].

    A bag of fewer tiles gives all of them.

    Args:
        scores: [T].
        packed: the bags.
        count: of rows a bag.
        largest: or the smallest.
    """
    order, place = sorted_rows(-scores if largest else scores, packed)
    return order[place < count]


def sorted_rows(keys: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    """Rows by bag, then by key, smallest first; and the place of each in its bag, from 0.

    Args:
        keys: [T].
        packed: the bags.
    """
    order = keys.detach().argsort(stable=True)
    order = order[packed.bag[order].argsort(stable=True)]
    place = torch.arange(len(order), device=keys.device) - packed.offsets[packed.bag[order]]
    return order, place
