"""A student and its teacher, with the figures that tell whether they are well."""

import torch
from torch import Tensor

from eosin.pretrain.collectives import Collective
from eosin.pretrain.diagnostics import Measured, PrototypeUse, Window, measure_health
from eosin.pretrain.parallel import Pair
from eosin.pretrain.prototype_kernels import LossKernels
from eosin.pretrain.prototype_loss import TargetFigures, strongest_prototype, target_figures
from eosin.pretrain.targets import Outputs


class WatchedPair(Pair):
    """See the module."""

    use: PrototypeUse
    """Where the objective has prototypes."""
    kernels: LossKernels
    _max_over_ranks: Collective

    @torch.no_grad()
    def record_use(
        self, step: int, outputs: Outputs, bad: Tensor | None = None
    ) -> TargetFigures | None:
        """Marks the prototypes that the teacher used in a step, on any rank; their figures."""
        targets = outputs.cls
        if targets is None:
            return None
        found = target_figures(*targets.logits, targets.scaling, self.kernels)
        self.use.record(step, found.strongest, bad)
        self.use.last_step.copy_(self._max_over_ranks(self.use.last_step))
        return found

    def health(
        self,
        step: int,
        outputs: Outputs,
        found: TargetFigures | None,
        window_steps: int,
        recorded: int,
    ) -> Measured:
        """Health figures of this rank's part of a step, and of the prototypes used before it.

        Args:
            step: its number.
            outputs: of it.
            found: by `record_use`.
            window_steps: over which prototypes are counted.
            recorded: those of them that `record_use` saw.
        """
        if found is None or outputs.student is None or outputs.cls is None:
            none = outputs.features.new_empty(0)
            return measure_health(outputs.features, none, none.long(), none.long(), 0)
        window = Window(self.use.used_since(step + 1 - window_steps), recorded)
        return measure_health(
            outputs.features,
            found.entropy,
            found.strongest,
            strongest_prototype(*outputs.student, self.kernels),
            len(outputs.cls.logits.prototypes),
            window,
        )
