"""The forward and backward pass of one step, whole or in parts."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from eosin.pretrain.batch import Batch, Inputs
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.distill import Losses, StepRates
from eosin.pretrain.drop_path import DropPath
from eosin.pretrain.gram import gram_active
from eosin.pretrain.positions import Jitter
from eosin.pretrain.rates import Rates
from eosin.pretrain.setup import Training
from eosin.pretrain.targets import Outputs, Taught, join_outputs


def take_gradients(
    t: Training, batch: Batch, rates: Rates, inputs: Inputs
) -> tuple[Losses, Outputs]:
    """Leaves the gradients of a step in the student; its losses and outputs.

    With ``accumulate`` parts the teacher first makes the targets of all of them together; the
    student then goes through one part after the other. What is added up is the gradient of the
    whole batch, as if it had been taken at once.

    Args:
        t: the training.
        batch: this rank's share of the step.
        rates: of the step.
        inputs: takes a batch to the device.
    """
    config, parts = t.config, batch.split(t.config.accumulate)
    groups = len(batch.rows) // config.group // len(parts)  # of a part
    first = t.world.rank * groups * len(parts)
    if len(parts) == 1:
        losses, outputs = forward(config, t.layout.step, batch, rates, inputs, t.dtype, first)
        losses.total.backward()
        return losses, outputs
    crops = [inputs(part.images) for part in parts]
    with torch.autocast(t.device.type, t.dtype, enabled=t.dtype != torch.float32):
        seen = [(cut[0], part.masks) for cut, part in zip(crops, parts, strict=True)]
        taught = t.model.teach(seen, rates.temperature)
    done = []
    for number, part in enumerate(parts):
        t.layout.accumulate(more=number + 1 < len(parts))
        place = first + number * groups
        losses, outputs = _losses(
            config, t.layout.step, crops[number], part, rates, t.dtype, place, taught[number]
        )
        (losses.total / len(parts)).backward()
        done.append((Losses(*(term.detach() for term in losses)), outputs))
    mean = Losses(*(torch.stack(terms).mean() for terms in zip(*(d[0] for d in done), strict=True)))
    return mean, join_outputs([outputs for _, outputs in done])


def forward(
    config: PretrainConfig,
    step: nn.Module,
    batch: Batch,
    rates: Rates,
    inputs: Inputs,
    dtype: torch.dtype,
    first_group: int = 0,
) -> tuple[Losses, Outputs]:
    """Crops on the device, and both networks' forward for one batch.

    Args:
        config: of the training.
        step: the model, or what a layout made of it.
        batch: of one rank.
        rates: of the step.
        inputs: takes a batch to the device.
        dtype: of the products.
        first_group: number of the first group of samples in the batch, over all ranks.
    """
    return _losses(config, step, inputs(batch.images), batch, rates, dtype, first_group, None)


def _losses(
    config: PretrainConfig,
    step: nn.Module,
    crops: tuple[Tensor, Tensor],
    batch: Batch,
    rates: Rates,
    dtype: torch.dtype,
    first_group: int,
    taught: Sequence[Taught] | None,
) -> tuple[Losses, Outputs]:
    drop = None
    if config.model.drop_path > 0:
        drop = DropPath(config.model.drop_path, config.seed, batch.step, config.group, first_group)
    jitter = Jitter(config.seed, batch.step)
    gram = gram_active(batch.step, config.objective.gram)
    with torch.autocast(crops[0].device.type, dtype, enabled=dtype != torch.float32):
        step_rates = StepRates(rates.temperature, rates.spread, gram)
        out: tuple[Losses, Outputs] = step(*crops, batch.masks, step_rates, drop, jitter, taught)
    return out
