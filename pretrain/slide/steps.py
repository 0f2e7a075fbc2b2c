"""The batch of each step of a slide encoder, a pure function of (seed, step), for one rank of many.

The order is the tile trainer's (`order`), over slides or patients; views and what is hidden of them
are drawn from (seed, epoch, position) and (seed, step, group).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from eosin.configs.errors import ConfigError, EosinError
from eosin.launch.artefacts import stamp_of
from eosin.pretrain.order import MixtureConfig, Order, locate
from eosin.pretrain.slide.batch import SlideBatch, Stream, Vectors
from eosin.pretrain.slide.hiding import HidingConfig, draw_hidden
from eosin.pretrain.slide.labels import Labels
from eosin.pretrain.slide.paired import Paired
from eosin.pretrain.slide.sources import Sources
from eosin.pretrain.slide.views import View, ViewsConfig, draw_views
from eosin.pretrain.spike import passed_over


@dataclass(frozen=True, kw_only=True)
class SlidePlan:
    """All that the batches depend on, but for the bags themselves."""

    views: ViewsConfig
    hiding: HidingConfig | None
    """None: nothing is hidden."""
    batch_size: int
    seed: int
    group_size: int
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    skips: tuple[tuple[int, int], ...] = ()
    rank: int = 0
    world: int = 1

    @property
    def local_batch(self) -> int:
        """Samples of a step that this rank takes."""
        return self.batch_size // self.world


class SlideSteps(Dataset[SlideBatch | Exception]):
    """``steps[step]`` is the batch of a step.

    Args:
        sources: of the bags.
        plan: what the batches depend on.
        paired: vectors that belong to the samples.
        labels: of the samples.

    Raises:
        ConfigError: there are fewer samples than a batch takes, or the mixture does not fit.
    """

    def __init__(
        self,
        sources: Sources,
        plan: SlidePlan,
        paired: Paired | None = None,
        labels: Labels | None = None,
    ) -> None:
        self.sources, self.plan, self.paired, self.labels = sources, plan, paired, labels
        strata, self._members = sources.strata(plan.mixture.column)
        self.order = Order(strata, plan.mixture, plan.seed, 0)
        if self.order.n < plan.batch_size:
            raise ConfigError(
                f"there are {self.order.n} samples, fewer than one batch of {plan.batch_size}: "
                "give more bags, or lower batch_size"
            )
        parts = [sources.digest, strata.digest]
        parts += [of.digest for of in (paired, labels) if of is not None]
        self.digest = stamp_of(of=parts)
        """Names all that the batches are made of."""

    def __getitem__(self, step: int) -> SlideBatch | Exception:
        try:
            return self._make(step)
        except (EosinError, OSError) as error:
            return error

    def close(self) -> None:
        """Nothing is held open but mapped files."""

    def check_budget(self, damaged: Mapping[int, str]) -> None:
        """Bags were checked when they were made; none turns out to be damaged here."""

    def largest_batch_bytes(self) -> int:
        """Bytes of features in a batch, as far as the views bound them."""
        views, sources = self.plan.views, self.sources.sources
        whole = max(int(np.diff(source.store.offsets).max()) for source in sources)
        tokens = {
            "window": views.n_global * views.global_tiles**2 + views.n_local * views.local_tiles**2,
            "tokens": views.n_global * views.n_tokens,
            "whole": views.n_global * min(views.n_tokens or whole, whole),
        }[views.kind]
        return 2 * self.plan.local_batch * tokens * sum(source.dim for source in sources)

    def rows_of(self, step: int) -> NDArray[np.int64]:
        """The samples that stand at this rank's places of a step: int64 [b]."""
        return np.array([row for row, _, _ in self._places(step)], np.int64)

    def read_bytes(self, step: int) -> int:
        """Reads this rank's part of a step, and forgets it; the bytes it got."""
        batch = self[step]
        if isinstance(batch, Exception):
            raise batch
        return sum(x.nbytes for x in batch.stream.features)

    def _places(self, step: int) -> list[tuple[int, int, int]]:
        """Sample, epoch and position of each place."""
        plan = self.plan
        moved = step + passed_over(plan.skips, step)
        epochs, positions = locate(moved, plan.batch_size, self.order.n)
        part = slice(plan.rank * plan.local_batch, (plan.rank + 1) * plan.local_batch)
        found = []
        for epoch, position in zip(epochs[part].tolist(), positions[part].tolist(), strict=True):
            place = self.order.at(epoch, [position])
            row = int(self._members[int(place.stratum[0])][int(place.rank[0])])
            found.append((row, epoch, position))
        return found

    def _make(self, step: int) -> SlideBatch:
        plan, places = self.plan, self._places(step)
        samples = [self.sources.samples[row] for row, _, _ in places]
        drawn = [
            draw_views(self.sources, sample, plan.views, plan.seed, epoch, position)
            for sample, (_, epoch, position) in zip(samples, places, strict=True)
        ]
        size = len(samples)
        views: list[View] = []
        owner: list[int] = []
        for view in range(plan.views.n_views):
            for sample in range(size):
                views += drawn[sample][view]
                owner += [view * size + sample] * len(drawn[sample][view])
        hidden = np.zeros(sum(map(len, views)), np.bool_)
        if plan.hiding is not None:
            self._hide(hidden, views, owner, step)
        rows = np.array([row for row, _, _ in places], np.int64)
        return SlideBatch(
            step=step,
            stream=Stream.pack(views),
            owner=np.array(owner, np.int64),
            n_global=plan.views.n_global,
            hidden=hidden,
            rows=torch.from_numpy(rows),
            groups=torch.tensor([sample.group for sample in samples]),
            paired=self._paired(rows),
            targets=self._tasks(rows, events=False),
            events=self._tasks(rows, events=True),
        )

    def _hide(
        self, hidden: NDArray[np.bool_], views: Sequence[View], owner: Sequence[int], step: int
    ) -> None:
        plan = self.plan
        assert plan.hiding is not None
        starts = np.cumsum([0, *map(len, views)])
        groups = plan.local_batch // plan.group_size
        for group in range(groups):
            low = group * plan.group_size
            ours = [
                at
                for at, number in enumerate(owner)
                if number < plan.views.n_global * plan.local_batch
                and low <= number % plan.local_batch < low + plan.group_size
            ]
            masks = draw_hidden(
                plan.hiding, [views[at] for at in ours], seed=plan.seed, step=step,
                group=plan.rank * groups + group,
            )  # fmt: skip
            for at, mask in zip(ours, masks, strict=True):
                hidden[starts[at] : starts[at + 1]] = mask

    def _paired(self, rows: NDArray[np.int64]) -> dict[str, Vectors]:
        if self.paired is None:
            return {}
        found = {}
        for of in self.paired.modalities:
            at = of.row[rows]
            known = np.flatnonzero(at >= 0)
            vectors = torch.from_numpy(of.vectors[at[known]])
            found[of.name] = Vectors(torch.from_numpy(known), vectors)
        return found

    def _tasks(self, rows: NDArray[np.int64], events: bool) -> torch.Tensor | None:
        if self.labels is None:
            return None
        none = np.zeros(len(rows), np.int64)
        columns = [
            (none if task.event is None else task.event[rows]) if events else task.target[rows]
            for task in self.labels.tasks
        ]
        return torch.from_numpy(np.stack(columns, axis=1))
