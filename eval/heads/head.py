"""What every head on bags is: one interface from packed bags to verdicts.

Legend: B bags, T tiles of all of them, D features, W channels, C outputs.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from eosin.eval.heads.packed import Packed

DROPOUT = 0.25


class Verdict(NamedTuple):
    """What a head says of a batch of bags."""

    outputs: Tensor
    """Logits, hazards or risk: [B, C]."""
    weights: Tensor
    """How much of the verdict rests on each tile, [T]; they sum to 1 over a bag."""
    embedding: Tensor
    """Of each bag, [B, W]."""
    tile_outputs: Tensor | None = None
    """What each tile says by itself, [T, C], where the verdict is made of that."""


Criterion: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(outputs [B, C], targets [B, …]) to a scalar."""


class Head(nn.Module):
    """Packed bags to a `Verdict`; at test always of whole bags.

    A head whose training is more than its verdict overrides `training_loss`, and `after_step` where
    something follows the weights.
    """

    def forward(self, packed: Packed) -> Verdict:
        """What it says of each bag."""
        raise NotImplementedError

    def training_loss(self, packed: Packed, targets: Tensor, criterion: Criterion) -> Tensor:
        """What is minimised.

        Args:
            packed: B bags.
            targets: of each, [B, …].
            criterion: of outputs and targets.
        """
        return criterion(self(packed).outputs, targets)

    def after_step(self) -> None:
        """What follows a step of the optimiser."""

    progress: float = 0.0
    """How much of the training is over, from 0 to 1: curricula go by it."""

    def reseed(self, key: int) -> None:
        """Makes all that is drawn from here on a function of `key`: dropout, masks, parts."""
        for number, module in enumerate(self.modules()):
            if isinstance(module, Drawing):
                module.restart(1000 * key + number)


class Drawing(nn.Module):
    """Something that draws, from a generator of its own that a seed starts; nothing global."""

    def __init__(self) -> None:
        super().__init__()
        self.seed = 0
        self._generators: dict[torch.device, torch.Generator] = {}

    def restart(self, seed: int) -> None:
        """What is drawn from here on is a function of `seed`."""
        self.seed, self._generators = seed, {}

    def generator(self, device: torch.device) -> torch.Generator:
        """The generator on a device."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
            self._generators[device].manual_seed(self.seed)
        return self._generators[device]

    def uniform(self, count: int, device: torch.device) -> Tensor:
        """Numbers in [0, 1), fp32 [count]."""
        return torch.rand(count, generator=self.generator(device), device=device)


class Dropout(Drawing):
    """Dropout whose draws are a function of the key, so that a model trains alike in any company.

    Args:
        share: of the channels that are dropped.
    """

    def __init__(self, share: float = DROPOUT) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:  # [T, W] → [T, W]
        """Zeroes channels and scales the others by 1 / (1 - share), in training."""
        if not self.training or self.share == 0:
            return x
        kept = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        kept.bernoulli_(1 - self.share, generator=self.generator(x.device))
        return x * kept / (1 - self.share)


def embedder(dim: int, width: int, dropout: float = DROPOUT) -> nn.Sequential:
    """One layer from features to the head's channels: linear, ReLU, dropout."""
    return nn.Sequential(nn.Linear(dim, width), nn.ReLU(inplace=True), Dropout(dropout))
