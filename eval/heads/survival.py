"""Losses of survival: discrete hazards, and Cox's partial likelihood with Efron's ties.

A patient is known to have lived until a time, and either had the event then or was lost to sight.
Risk is high where death is early: hazards and log risks both rise with it. Legend: B patients, K
intervals of time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from eosin.pretrain.hazards import cut_times as cut_times
from eosin.pretrain.hazards import hazard_loss as hazard_loss
from eosin.pretrain.hazards import interval_of as interval_of


def risk_of_hazards(outputs: Tensor) -> Tensor:
    """Risk of hazards' logits [B, K]: minus the expected number of intervals survived, [B]."""
    return -F.logsigmoid(-outputs).cumsum(dim=1).exp().sum(dim=1)


def cox_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Negative log partial likelihood with Efron's correction for ties, mean over events.

    Efron 1977: of d events at a time, the l-th (from 0) is held against the risk set less l / d of
    the tied events' own risks. It takes one sort and cumulative sums: O(B log B).

    Args:
        outputs: log risks, [B, 1].
        targets: time and event (1 or 0), float [B, 2].

    Returns:
        A scalar; 0 where there is no event. It means nothing for one patient alone: a batch is
        the risk set.
    """
    risk = outputs[:, 0].double()
    time, event = targets[:, 0], targets[:, 1] > 0
    order = torch.argsort(time, descending=True, stable=True)
    risk, time, event = risk[order], time[order], event[order]
    shift = risk.detach().max()
    raised = (risk - shift).exp()
    _, group = torch.unique_consecutive(time, return_inverse=True)  # equal times together
    n_groups = int(group[-1]) + 1
    none = raised.new_zeros(n_groups)
    at_risk = none.index_add(0, group, raised).cumsum(dim=0)  # all who live until the time
    tied = none.index_add(0, group, raised * event)
    deaths = none.index_add(0, group, event.to(raised.dtype))
    of_event = group[event]
    if not len(of_event):
        return outputs.sum() * 0.0
    first = torch.searchsorted(of_event, of_event)  # the events of a time stand together
    place = torch.arange(len(of_event), device=risk.device) - first
    share = place / deaths[of_event]
    log_sums = (at_risk[of_event] - share * tied[of_event]).log() + shift
    return ((log_sums - risk[event]).mean()).to(outputs.dtype)
