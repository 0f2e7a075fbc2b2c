"""What a step takes from the data path: views packed one behind the other, without padding.

Legend: B samples, V global views, L local ones, Q sequences (slides of views), T tokens of all, T_s
those of a source, D_s its features, P tokens before the tiles of a sequence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eosin.pretrain.slide.views import View
from eosin.pretrain.upload import upload


class Stream(NamedTuple):
    """Sequences of tokens."""

    features: tuple[Tensor, ...]
    """Of each source, [T_s, D_s], in the order of the stream."""
    places: tuple[Tensor, ...]
    """Of each source, where its tokens stand among the T, int64 [T_s], rising."""
    position: Tensor
    """In tiles, fp32 [T, 2]."""
    section: Tensor
    """int64 [T]."""
    lengths: tuple[int, ...]
    """Of the sequences, [Q]; one without a token has a length of 0."""

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.position)

    def first(self, sequences: int) -> "Stream":
        """The first sequences alone."""
        lengths = self.lengths[:sequences]
        tokens = sum(lengths)
        kept = [int(torch.searchsorted(at, tokens)) for at in self.places]
        return Stream(
            tuple(x[:n] for x, n in zip(self.features, kept, strict=True)),
            tuple(x[:n] for x, n in zip(self.places, kept, strict=True)),
            self.position[:tokens],
            self.section[:tokens],
            lengths,
        )

    def to(self, device: torch.device) -> "Stream":
        """On a device; the host does not wait."""
        features, places, position, section, lengths = self
        return Stream(
            tuple(upload(x, device) for x in features),
            tuple(upload(x, device) for x in places),
            upload(position, device),
            upload(section, device),
            lengths,
        )

    @staticmethod
    def pack(views: Sequence[View]) -> "Stream":
        """Views one behind the other."""
        sources = range(len(views[0].features))
        source = np.concatenate([view.source for view in views])
        return Stream(
            tuple(
                torch.from_numpy(np.concatenate([view.features[s] for view in views]))
                for s in sources
            ),
            tuple(torch.from_numpy(np.flatnonzero(source == s)) for s in sources),
            torch.from_numpy(np.concatenate([view.position for view in views])),
            torch.from_numpy(np.concatenate([view.section for view in views])),
            tuple(len(view) for view in views),
        )


class Vectors(NamedTuple):
    """What is known of one modality in a batch."""

    rows: Tensor
    """Samples that have it, int64 [m]."""
    vectors: Tensor
    """fp32 [m, Dm]."""


@dataclass(frozen=True)
class SlideBatch:
    """B samples for one step: the same whichever process made it."""

    step: int
    stream: Stream
    """Of all views: those of the first view of all samples, then those of the second, …"""
    owner: npt.NDArray[np.int64]
    """view · B + sample of each sequence, rising, [Q]."""
    n_global: int
    hidden: npt.NDArray[np.bool_]
    """Tokens of the global views that the student does not see, [T]."""
    rows: Tensor
    """int64 [B], numbers of the samples."""
    groups: Tensor
    """int64 [B], numbers of their groups."""
    paired: Mapping[str, Vectors] = field(default_factory=dict)
    targets: Tensor | None = None
    """Class or interval of each task, int64 [B, tasks]; -1: not known."""
    events: Tensor | None = None
    """Whether the event came, for tasks that are times, int64 [B, tasks]."""
    damaged: Mapping[int, str] = field(default_factory=dict)

    @property
    def views(self) -> int:
        """V + L."""
        return int(self.owner[-1]) // len(self.rows) + 1

    @property
    def global_sequences(self) -> int:
        """Those of the global views, which come first."""
        return int(np.searchsorted(self.owner, self.n_global * len(self.rows)))

    def pin_memory(self) -> Self:
        """The features in page-locked memory, from which a copy to the GPU needs no wait."""
        pinned = tuple(x.pin_memory() for x in self.stream.features)
        return replace(self, stream=self.stream._replace(features=pinned))
