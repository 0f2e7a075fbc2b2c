"""The batch of each step, a pure function of (seed, step), for one rank of many.

There is no loader state but the step: a resumed run asks for another first step. What stands at a
place of the order, and what is drawn for it, depends on no rank, worker, batch or read-ahead.
"""

import itertools
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from eosin.configs.errors import ConfigError, EosinError
from eosin.data_curation.read_ahead import ReadAhead
from eosin.data_curation.shard_reader import RecordError, ShardReader
from eosin.launch.artefacts import stamp_of
from eosin.pretrain.augment import AugmentConfig, Resolution
from eosin.pretrain.batch import Batch, Crops, Tiles
from eosin.pretrain.masking import MaskConfig, draw_masks
from eosin.pretrain.order import MixtureConfig, Order, locate
from eosin.pretrain.packed_views import pack_views
from eosin.pretrain.render import render_view
from eosin.pretrain.spike import passed_over
from eosin.pretrain.views import Views, augment_at, decode_factor, draw_views


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """All that the batches of a training depend on, but for the shards themselves."""

    augment: AugmentConfig
    """The crops."""
    batch_size: int
    """Tiles a step, over all ranks; epochs follow one another within a batch without a gap."""
    seed: int
    """Of order, crops and masks."""
    masks: MaskConfig = field(default_factory=MaskConfig)
    """The masked patches of the global crops."""
    patch_px: int = 16
    """Side of a patch."""
    group_size: int = 0
    """Tiles that share a draw of masks; 0: all of a step. A group never spans two ranks, so with
    several ranks it must be set, and the draws do not depend on how many they are."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    """Shares of the strata."""
    window_shards: int = 64
    """Shards that are shuffled together."""
    skips: tuple[tuple[int, int], ...] = ()
    """Data that is passed over: from a step on, so many more steps of it (`spike`)."""
    rank: int = 0
    """Of the process that takes the batches."""
    world: int = 1
    """Ranks, each of which takes its part of every step."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank={self.rank} must lie in [0, {self.world})")
        if self.batch_size < 1 or self.batch_size % (self.world * self.group):
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of the {self.world} ranks times "
                f"group_size={self.group}, for a group never spans two ranks"
            )

    @property
    def group(self) -> int:
        """Tiles in a group."""
        return self.group_size or self.batch_size

    @property
    def local_batch(self) -> int:
        """Tiles of a step that this rank takes."""
        return self.batch_size // self.world

    def augment_of(self, step: int) -> AugmentConfig:
        """The crops of a step, whose sizes may differ from step to step."""
        return augment_at(self.augment, self.seed, step)

    def masks_of(self, step: int) -> NDArray[np.bool_]:
        """The masked patches of this rank's global crops: bool [V · b, N], view-major."""
        augment = self.augment_of(step)
        side = augment.global_px // self.patch_px
        groups = self.local_batch // self.group
        return draw_masks(
            self.masks,
            seed=self.seed,
            step=step,
            groups=range(self.rank * groups, (self.rank + 1) * groups),
            group_size=self.group,
            views=augment.n_global,
            grid=(side, side),
        )

    def places_of(self, step: int, n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Epoch and position of each tile of this rank's part of a step, both int64 [b]."""
        epochs, positions = locate(step + passed_over(self.skips, step), self.batch_size, n)
        part = slice(self.rank * self.local_batch, (self.rank + 1) * self.local_batch)
        return epochs[part], positions[part]


class Steps(Dataset[Batch | Exception]):
    """``steps[step]`` is the batch of a step; it is cheap to send to another process.

    What is expected to go wrong is returned instead of raised: torch would wrap it in the
    traceback of a worker.

    Args:
        reader: of the shards.
        plan: what the batches depend on.
        max_damaged: share of the records that may be damaged.
        read_threads: threads that read ahead of the batch; 0 reads when it is needed.
        read_ahead_mb: bytes that they hold at most, in MB.
        last_step: nothing is read ahead for it and those after it.

    Raises:
        ConfigError: there are fewer tiles than a batch takes, a tile is too small for a zoom, or
            the mixture does not fit the index.
        InputError: the index has no such column as the mixture names.
    """

    def __init__(
        self,
        reader: ShardReader,
        plan: BatchPlan,
        *,
        max_damaged: float = 0.0,
        read_threads: int = 0,
        read_ahead_mb: int = 256,
        last_step: int | None = None,
    ) -> None:
        self.reader, self.plan, self.last_step = reader, plan, last_step
        strata = reader.index.strata(plan.mixture.column)
        self.order = Order(strata, plan.mixture, plan.seed, plan.window_shards)
        if self.order.n < plan.batch_size:
            raise ConfigError(
                f"{reader.shards} holds {self.order.n} tiles, fewer than one batch of "
                f"{plan.batch_size}: make shards of more tiles, or lower batch_size"
            )
        _check_zoom(reader, plan.augment)
        depended_on = [strata.digest] if plan.mixture.column else []
        if plan.augment.mpp is not None:
            depended_on.append(reader.index.strata("mpp").digest)
        self.digest = stamp_of(of=[reader.digest, *depended_on]) if depended_on else reader.digest
        """Names the shards, and the columns of the index that order and crops depend on."""
        self.allowed = math.floor(max_damaged * self.order.n)
        """Records that may be damaged."""
        self._ahead_of = (read_threads, read_ahead_mb * 1_000_000)
        self._ahead: ReadAhead | None = None
        self._wanted: dict[int, NDArray[np.int64]] = {}
        self._scratch = np.empty((0, 0, 3), np.uint8)

    def __getitem__(self, step: int) -> Batch | Exception:
        try:
            return self._make(step)
        except (EosinError, OSError) as error:
            self._end_ahead()
            return error

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_ahead": None, "_wanted": {}}

    def close(self) -> None:
        """Ends the threads that read ahead, and closes the shards."""
        self._end_ahead()
        self.reader.close()

    def _end_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = None
        self._wanted.clear()

    def check_budget(self, damaged: Mapping[int, str]) -> None:
        """Raises `EosinError` where more records are damaged than are allowed."""
        if len(damaged) > self.allowed:
            raise EosinError(
                f"{next(iter(damaged.values()))}; that makes {len(damaged)} damaged of "
                f"{self.order.n} records, where loader.max_damaged allows {self.allowed}: see "
                f"'eosin shard verify {self.reader.shards}'"
            )

    def largest_batch_bytes(self) -> int:
        """Bytes of pixels in a batch, at most."""
        augment, size = self.plan.augment, self.plan.local_batch
        if augment.render == "device":
            return 3 * size * math.prod(self.reader.index.largest_hw())
        sizes = [(augment.global_px, augment.local_px)]
        sizes += [(r.global_px, r.local_px) for r in augment.resolutions]
        pixels = (augment.n_global * big**2 + augment.n_local * small**2 for big, small in sizes)
        return 3 * size * max(pixels)

    def rows_of(self, step: int) -> NDArray[np.int64]:
        """The rows of the index that stand at this rank's places of a step: int64 [b]."""
        epochs, positions = self.plan.places_of(step, self.order.n)
        rows = np.empty(len(epochs), np.int64)
        for epoch in np.unique(epochs).tolist():  # seldom more than two
            inside = epochs == epoch
            rows[inside] = self.rows_at(epoch, positions[inside])
        return rows

    def rows_at(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of the index at positions of one epoch, both int64 [b]."""
        places = self.order.at(epoch, positions)
        return self.reader.index.rows_at(self.plan.mixture.column, places)

    def read_bytes(self, step: int) -> int:
        """Reads the records of this rank's part of a step, and forgets them; the bytes it got."""
        read = 0
        for row in self.rows_of(step).tolist():
            with suppress(RecordError):  # a damaged one is met again, and counted then
                read += len(self.reader.payload(row))
        return read

    def _make(self, step: int) -> Batch:
        plan = self.plan
        augment = plan.augment_of(step)
        epochs, positions = plan.places_of(step, self.order.n)
        work = _Work(augment, plan.seed, self.reader, epochs, positions, self._begin(step))
        images = (self._tiles if augment.render == "device" else self._crops)(work)
        return Batch(step, images, plan.masks_of(step), torch.from_numpy(work.rows), work.damaged)

    def _begin(self, step: int) -> NDArray[np.int64]:
        """The rows of a step, being read; so are those of the next step that comes here."""
        rows = self._wanted.pop(step, None)
        if self._ahead is None or rows is None:  # the first step, or not the one that was expected
            self._end_ahead()
            self._ahead = ReadAhead(self.reader, *self._ahead_of)
            rows = self.rows_of(step)
            self._ahead.want(rows)
        worker = get_worker_info()
        following = step + (worker.num_workers if worker else 1)
        if self.last_step is None or following < self.last_step:
            self._wanted[following] = self.rows_of(following)
            self._ahead.want(self._wanted[following])
        return rows

    def _crops(self, work: "_Work") -> Crops:
        augment, size = work.augment, len(work.rows)
        big, small = augment.global_px, augment.local_px
        crops = Crops(
            _shared(augment.n_global, size, big, big, 3),
            _shared(augment.n_local, size, small, small, 3),
        )
        views = [view for group in crops for view in group.numpy()]  # each [B, px, px, 3]
        for sample in range(size):
            height, width = work.decoded_hw[sample].tolist()
            if self._scratch.shape[:2] != (height, width):
                self._scratch = np.empty((height, width, 3), np.uint8)
            tile = self._decode(work, sample, self._scratch)
            factor = int(work.factor[sample])
            drawn = work.views.of_tile(sample, augment.sizes_px)
            for view, target in zip(drawn, views, strict=True):
                render_view(tile, view, factor, out=target[sample])
        return crops

    def _tiles(self, work: "_Work") -> Tiles:
        augment = work.augment
        height, width = work.decoded_hw.max(0).tolist()
        pixels = _shared(len(work.rows), height, width, 3)
        for sample in range(len(work.rows)):
            whole = pixels.numpy()[sample]
            fits = bool((work.decoded_hw[sample] == whole.shape[:2]).all())
            tile = self._decode(work, sample, whole if fits else None)
            if not np.may_share_memory(tile, whole):
                h, w = tile.shape[:2]
                if h > pixels.shape[1] or w > pixels.shape[2]:  # it stands in for a damaged one
                    pixels = _grown(pixels, max(h, pixels.shape[1]), max(w, pixels.shape[2]))
                pixels[sample].zero_()
                pixels.numpy()[sample, :h, :w] = tile
        parameters = pack_views(work.views, work.factor, work.decoded_hw)
        sizes = (augment.n_global, augment.global_px), (augment.n_local, augment.local_px)
        return Tiles(pixels, parameters, sizes)

    def _decode(
        self, work: "_Work", sample: int, out: NDArray[np.uint8] | None
    ) -> NDArray[np.uint8]:
        """The tile of a sample, or one that stands in for it; notes the damaged ones.

        Whole tiles are looked for from half an epoch further on, for the neighbours in the order
        are mostly in this very batch. The tile lies in `out` where that has its shape.
        """
        assert self._ahead is not None
        row, epoch = int(work.rows[sample]), int(work.epochs[sample])
        n, position = self.order.n, int(work.positions[sample])
        payload = self._ahead.take(row)
        for further in itertools.count(n // 2):
            shape = (*work.decoded_hw[sample].tolist(), 3)
            fits = out is not None and out.shape == shape
            try:
                if isinstance(payload, RecordError):
                    raise payload
                return self.reader.decode(payload, int(work.factor[sample]), out if fits else None)
            except RecordError as error:
                work.damaged[row] = str(error)
            self.check_budget(work.damaged)
            if further - n // 2 > self.allowed:  # in a mixture few records may come over and over
                raise EosinError(f"{work.damaged[row]}; none that was tried instead is whole")
            row = int(self.rows_at(epoch, np.array([(position + further) % n]))[0])
            work.put(sample, row)
            try:
                payload = self.reader.payload(row)
            except RecordError as error:
                payload = error
        raise AssertionError("the loop has no end")


class _Work:
    """The tiles of one batch while they are made: which rows, and what is drawn for each."""

    def __init__(
        self,
        augment: AugmentConfig,
        seed: int,
        reader: ShardReader,
        epochs: NDArray[np.int64],
        positions: NDArray[np.int64],
        rows: NDArray[np.int64],
    ) -> None:
        self.augment, self.seed, self.reader = augment, seed, reader
        self.epochs, self.positions, self.rows = epochs, positions, rows
        self.damaged: dict[int, str] = {}
        self.views, self.factor, self.decoded_hw = self._draw(slice(None))

    def put(self, sample: int, row: int) -> None:
        """Another tile at a place. Its crops are of the same draws, for the size that it has."""
        self.rows[sample] = row
        views, factor, decoded_hw = self._draw(slice(sample, sample + 1))
        self.factor[sample], self.decoded_hw[sample] = factor[0], decoded_hw[0]
        for name in Views._fields:
            getattr(self.views, name)[sample] = getattr(views, name)[0]

    def _draw(self, part: slice) -> tuple[Views, NDArray[np.int32], NDArray[np.int32]]:
        index, rows = self.reader.index, self.rows[part]
        hw, mpp = index.hw(rows), index.mpp(rows)
        views = draw_views(
            self.augment, self.seed, self.epochs[part], self.positions[part], hw, mpp
        )
        factor = decode_factor(self.augment, views)
        return views, factor, -(-hw // factor[:, None])


def _check_zoom(reader: ShardReader, augment: AugmentConfig) -> None:
    """Refuses a zoom at once that some tile cannot hold, not at the step that meets the tile."""
    if augment.global_zoom is None and augment.local_zoom is None:
        return
    kinds = np.array(reader.index.tile_kinds(), np.float64)  # [K, 3]
    zeros = np.zeros(len(kinds), np.int64)
    own = Resolution(global_px=augment.global_px, local_px=augment.local_px, share=1)
    for sizes in augment.resolutions or [own]:
        one = replace(augment, global_px=sizes.global_px, local_px=sizes.local_px, resolutions=[])
        draw_views(one, 0, zeros, zeros, kinds[:, :2].astype(np.int64), kinds[:, 2])


def _shared(*shape: int) -> Tensor:
    """An empty uint8 tensor; in a worker, one that crosses to the trainer without a copy."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape), device="cpu")
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def _grown(pixels: Tensor, height: int, width: int) -> Tensor:
    """A copy with more room for each tile."""
    grown = _shared(len(pixels), height, width, 3).zero_()
    grown[:, : pixels.shape[1], : pixels.shape[2]] = pixels
    return grown
