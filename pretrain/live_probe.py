"""What the trainer asks of those who score its encoder while it trains.

The parts that score lie above the trainer (`eosin.eval.watch`), so they are handed to it.
"""

from typing import Protocol

import torch

from eosin.launch.process import World
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.model_card import EncoderCard
from eosin.pretrain.vit import Vit


class LiveProbe(Protocol):
    """Scores the teacher, or exports it for others to score."""

    def __call__(self, teacher: Vit, card: EncoderCard) -> None:
        """Called between two steps, before the checkpoint of `card.steps` is written.

        Every rank comes at the same steps, since all may be needed; whether anything is to be done
        at this one is the probe's own affair.

        Args:
            teacher: the moving average's backbone on this rank's device, in evaluation mode.
            card: what an export of it would say about itself.
        """


class StartProbe(Protocol):
    """Makes the probe of a run."""

    def __call__(
        self,
        training: PretrainConfig,
        world: World,
        device: torch.device,
        dtype: torch.dtype,
        first_step: int,
    ) -> LiveProbe:
        """Called on every rank, before the first step.

        Args:
            training: what will be scored.
            world: the ranks.
            device: of this rank.
            dtype: of its products of matrices.
            first_step: the first step that the probe may be called with; what was recorded of it
                and later, by a process that did not get its checkpoint written, is forgotten.
        """
