"""Rows for k-means: of a feature store on disk, or of an array, shared out to the ranks."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eosin.launch.process import World


def share_of(n_total: int, world: World) -> range:
    """The rows of a rank: runs of about equal length, in the order of the ranks."""
    return range(n_total * world.rank // world.size, n_total * (world.rank + 1) // world.size)


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What is done to a row before distances are measured: shifted, then perhaps scaled to 1."""

    centre: NDArray[np.float32]
    """[D], subtracted: the smaller the rows, the fewer distances are too close to call."""
    unit: bool
    """Whether rows are scaled to unit length before the shift (cosine in place of L2)."""

    def place(self, rows: NDArray[np.floating], device: torch.device) -> Tensor:
        """Rows as they are clustered, float32 [n, D] on the device."""
        moved = torch.from_numpy(np.ascontiguousarray(rows, np.float32)).to(device)
        if self.unit:
            norms = moved.double().square().sum(1).sqrt_().clamp_min_(1e-12)
            moved = (moved.double() / norms[:, None]).float()
        return moved - torch.from_numpy(self.centre).to(device)


class ArrayPoints:
    """A run of rows of an array or memory map; see `kmeans.Points`.

    Args:
        array: float16 or float32 [N of all ranks, D].
        mine: the rows of this process.
        frame: what is done to them.
        device: where they are used.
        largest: largest magnitude of a placed value, of all ranks; see `largest_of`.
        chunk_rows: rows that are read from `array` at once; what it gives does not depend on it.
    """

    def __init__(
        self,
        array: NDArray[np.floating],
        mine: range,
        frame: Frame,
        device: torch.device,
        largest: float,
        chunk_rows: int = 65_536,
    ) -> None:
        self.n_rows, self.n_total, self.dim = len(mine), len(array), array.shape[1]
        self.device, self.largest = device, largest
        self._array, self._mine, self._frame, self._chunk_rows = array, mine, frame, chunk_rows

    def block(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of this process, float32 [n, D]."""
        first = self._mine.start
        parts = [
            self._frame.place(
                self._array[first + a : first + min(a + self._chunk_rows, stop)], self.device
            )
            for a in range(start, stop, self._chunk_rows)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def make_frame(array: NDArray[np.floating], unit: bool, seed: int) -> Frame:
    """A frame whose centre is the mean of some rows: any centre serves, and all ranks find this.

    Raises:
        ValueError: a value is not finite; its row is named.
    """
    some = np.sort(np.random.Generator(np.random.Philox(key=seed)).integers(0, len(array), 4096))
    rows = np.asarray(array[some], np.float64)
    bad = np.flatnonzero(~np.isfinite(rows).all(1))
    if len(bad):
        raise ValueError(f"row {some[bad[0]]} of the features is not finite")
    if unit:
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return Frame(centre=rows.mean(0).astype(np.float32), unit=unit)


def largest_of(
    array: NDArray[np.floating], mine: range, frame: Frame, world: World, chunk_rows: int = 65_536
) -> float:
    """The largest magnitude of a placed value, of all ranks.

    Raises:
        ValueError: a value is not finite; its row is named.
    """
    largest = 0.0
    for start in range(mine.start, mine.stop, chunk_rows):
        rows = frame.place(array[start : min(start + chunk_rows, mine.stop)], torch.device("cpu"))
        highest = rows.abs().amax(1)
        bad = torch.nonzero(~torch.isfinite(highest)).ravel()
        if len(bad):
            raise ValueError(f"row {start + int(bad[0])} of the features is not finite")
        largest = max(largest, float(highest.max()))
    return max(float.fromhex(text) for text in world.gather(largest.hex()))


def sample_rows(n_total: int, n_sample: int, seed: int) -> NDArray[np.int64]:
    """`n_sample` different rows of `n_total` in rising order, a function of the arguments alone."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    if n_total <= 4 * n_sample:
        return np.sort(generator.permutation(n_total)[:n_sample])
    found = np.zeros(0, np.int64)
    while len(found) < n_sample:  # in memory of the sample's size, not of the table's
        drawn = generator.integers(0, n_total, n_sample + n_sample // 8 + 16)
        merged = np.concatenate([found, drawn])
        _, first = np.unique(merged, return_index=True)
        found = merged[np.sort(first)]
    return np.sort(found[:n_sample])
