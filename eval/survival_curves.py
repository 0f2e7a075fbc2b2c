"""Kaplan-Meier curves of patients whose risk is above and below the median of their fold."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eosin.launch.pictures import EOSIN, HAEMATOXYLIN, PAGE_PX, drawing, shortened

Floats = npt.NDArray[np.float64]


def kaplan_meier(times: Floats, events: npt.NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Times of events, rising, and the share that lives beyond each (Kaplan and Meier 1958).

    Args:
        times: [P].
        events: [P].
    """
    at = np.unique(times[events])
    alive = (times >= at[:, None]).sum(axis=1)
    died = ((times == at[:, None]) & events).sum(axis=1)
    return at, np.cumprod(1 - died / alive)


def draw_curves(
    path: Path,
    times: Floats,
    events: npt.NDArray[np.bool_],
    folds: npt.NDArray[np.int64],
    risks: Mapping[tuple[str, str], Floats],
) -> None:
    """A panel an encoder and head.

    Args:
        path: of the picture.
        times: [P].
        events: [P].
        folds: whose heads spoke of each patient, [P]: medians are of a fold, as risks have no
            common scale.
        risks: by encoder and head, [P].
    """
    columns = min(3, len(risks))
    rows = -(-len(risks) // columns)
    with drawing(path, PAGE_PX, 620 * rows) as figure:
        panels: Any = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for panel in panels.flat[len(risks) :]:
            panel.set_visible(False)
        for panel, ((encoder, head), own) in zip(panels.flat, risks.items(), strict=False):
            high = np.zeros(len(own), np.bool_)
            for fold in np.unique(folds).tolist():
                inside = folds == fold
                high[inside] = own[inside] > np.median(own[inside])
            for side, colour, name in ((~high, HAEMATOXYLIN, "low"), (high, EOSIN, "high")):
                at, share = kaplan_meier(times[side], events[side])
                end = float(times[side].max(initial=0.0))
                x = np.concatenate([[0.0], at, [end]])
                y = np.concatenate([[1.0], share, share[-1:] if len(share) else [1.0]])
                panel.step(x, y, where="post", color=colour, label=f"{name} risk, {side.sum()}")
            panel.set_ylim(0, 1.02)
            panel.set_title(shortened(f"{encoder}, {head}", 40), loc="left")
            panel.legend(loc="upper right", frameon=False, fontsize=8)
        for panel in panels[-1]:
            panel.set_xlabel("time")
        for panel in panels[:, 0]:
            panel.set_ylabel("alive")
