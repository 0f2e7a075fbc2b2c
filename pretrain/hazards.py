"""Discrete hazards: time cut into intervals, and how likely the event is in each.

A patient is known to have lived until a time, and either had the event then or was lost to sight.
Legend: B patients, K intervals of time.
"""

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor


def cut_times(
    times: npt.NDArray[np.float64], events: npt.NDArray[np.bool_], n_intervals: int
) -> npt.NDArray[np.float64]:
    """Where time is cut: quantiles of the times of events, [K - 1], rising.

    Give it the patients that are trained on and no others.

    Args:
        times: [B].
        events: whether the event came then, [B].
        n_intervals: K.

    Raises:
        ValueError: fewer different times of events than intervals.
    """
    cuts: npt.NDArray[np.float64] = np.quantile(
        times[events], np.linspace(0, 1, n_intervals + 1)[1:-1]
    ) if events.any() else np.empty(0)  # fmt: skip
    if len(np.unique(cuts)) < n_intervals - 1:
        raise ValueError(
            f"{int(events.sum())} events at {len(np.unique(times[events]))} times are too few for "
            f"{n_intervals} intervals"
        )
    return cuts


def interval_of(
    times: npt.NDArray[np.float64], cuts: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """The interval of each time, [B], from 0; a cut belongs to the interval before it."""
    return np.searchsorted(cuts, times, side="left").astype(np.int64)


def hazard_loss(outputs: Tensor, targets: Tensor, weight_of_events: float = 0.0) -> Tensor:
    """Negative log-likelihood of discrete hazards (Zadeh and Schmid 2020, eq. 5), mean over B.

    With hazards h and survival S_k = Π_{j ≤ k} (1 - h_j): an event in interval y costs
    -log S_{y-1} - log h_y, a patient lost in it -log S_y.

    Args:
        outputs: logits of hazards, [B, K].
        targets: interval and event (1 or 0), int64 [B, 2].
        weight_of_events: what the events' terms count beyond those of all.
    """
    interval, event = targets[:, 0], targets[:, 1].to(outputs.dtype)
    stays = F.logsigmoid(-outputs)  # log (1 - h)
    before = torch.cat([stays.new_zeros(len(stays), 1), stays.cumsum(dim=1)], dim=1)  # [B, K + 1]
    rows = torch.arange(len(outputs), device=outputs.device)
    came = -before[rows, interval] - F.logsigmoid(outputs[rows, interval])
    lost = -before[rows, interval + 1]
    of_patient = event * came * (1 + weight_of_events) + (1 - event) * lost
    return of_patient.mean()
