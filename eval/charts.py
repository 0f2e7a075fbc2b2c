"""Charts of an evaluation beside its scores: curves, reliability, feature maps, conditions.

One look for all (`pictures`); a chart holds what it is given and chooses nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eosin.eval.figures import KIND_COLOURS
from eosin.eval.metrics import CALIBRATION_BINS, calibration_bins
from eosin.eval.results import ConditionScore, EncoderRecord, Score
from eosin.launch.pictures import HAEMATOXYLIN, INK, MUTED, PAGE_PX, STONE, drawing, shortened

HUES = (
    "#3d3a8f", "#c8557f", "#3a8f6b", "#c98a2b", "#5aa2c8", "#8a5a2b", "#7a7a2b", "#a05ac8",
    "#2b6a6a", "#d0684a", "#6a6674", "#b0a02b",
)  # fmt: skip
"""Of classes and groups; they come round again after twelve."""


@dataclass(frozen=True)
class Curve:
    """One encoder's scores along an axis."""

    encoder: EncoderRecord
    places: list[float]
    scores: list[Score]


def score_curves(curves: Sequence[Curve], axis: str, chance: float, path: Path) -> None:
    """Draws balanced accuracy along a logarithmic axis, with 95 % intervals as bands."""
    with drawing(path, 1240, 720) as figure:
        figure.set_layout_engine("constrained")
        axes = figure.subplots()
        axes.axhline(chance, color=MUTED, lw=0.8, ls=(0, (3, 3)))
        dashes = ["-", "--", ":", "-."]
        seen: dict[str, int] = {}
        for curve in curves:
            colour, kind = KIND_COLOURS[curve.encoder.kind], curve.encoder.kind
            dash = dashes[seen.setdefault(kind, 0) % len(dashes)]
            seen[kind] += 1
            values = [score.value for score in curve.scores]
            label = shortened(curve.encoder.label, 40)
            axes.plot(curve.places, values, dash, color=colour, marker="o", ms=4, label=label)
            low, high = ([getattr(s, end) for s in curve.scores] for end in ("low", "high"))
            axes.fill_between(curve.places, low, high, color=colour, alpha=0.12, lw=0)
        places = sorted({place for curve in curves for place in curve.places})
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.minorticks_off()
        axes.set(xlabel=axis, ylabel="balanced accuracy", ylim=(0, 1))
        axes.grid(axis="y")
        axes.legend(frameon=False, fontsize=8, loc="lower right", handlelength=3.5)


def reliability(
    probabilities: npt.NDArray[np.float64],
    labels: npt.NDArray[np.int64],
    path: Path,
) -> None:
    """Draws how often tiles are right by how sure the probe is, and how many are how sure."""
    bins, confidence, right = calibration_bins(probabilities, labels)
    counts = np.bincount(bins, minlength=CALIBRATION_BINS)
    there = np.flatnonzero(counts)
    sure, correct = (
        np.bincount(bins, values, CALIBRATION_BINS)[there] / counts[there]
        for values in (confidence, right)
    )
    with drawing(path, 900, 900) as figure:
        figure.set_layout_engine("constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        above.plot([0, 1], [0, 1], color=MUTED, lw=0.8, ls=(0, (3, 3)))
        above.plot(sure, correct, color=HAEMATOXYLIN, marker="o", ms=5, lw=1.4)
        above.set(ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
        above.grid()
        edges = np.arange(CALIBRATION_BINS) / CALIBRATION_BINS
        below.bar(edges, counts, 0.9 / CALIBRATION_BINS, align="edge", color=STONE)
        below.set(xlabel="probability of the class that was named", ylabel="tiles")


def feature_map_2d(
    points: npt.NDArray[np.float64],
    panels: Mapping[str, Sequence[str]],
    path: Path,
    explained: tuple[float, float],
) -> None:
    """Draws tiles as points of two principal components, a panel for each way to colour them.

    Args:
        points: [N, 2].
        panels: title → the name by which each point is coloured, such as its class.
        path: where the PNG goes.
        explained: shares of the variance of both components.
    """
    with drawing(path, PAGE_PX, 1000) as figure:
        figure.set_layout_engine("constrained")
        row = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, names) in zip(row, panels.items(), strict=True):
            _scatter(axes, points, names)
            axes.set_title(title)
            axes.set_xlabel(f"component 1, {100 * explained[0]:.0f} % of the variance")
            axes.set_ylabel(f"component 2, {100 * explained[1]:.0f} %")
            axes.set_xticks([])
            axes.set_yticks([])


def _scatter(axes: Any, points: npt.NDArray[np.float64], names: Sequence[str]) -> None:
    found, which = np.unique(np.asarray(names), return_inverse=True)
    colours = np.array(HUES)[which % len(HUES)]
    size = float(np.clip(6000 / max(len(points), 1), 3, 22))
    axes.scatter(points[:, 0], points[:, 1], s=size, c=colours, alpha=0.65, lw=0)
    if len(found) <= len(HUES):
        for index, name in enumerate(found):
            axes.scatter([], [], s=22, c=HUES[index], label=shortened(str(name), 24))
        axes.legend(frameon=False, fontsize=8, loc="best")


def condition_changes(
    scores: Sequence[ConditionScore], labels: Mapping[str, str], path: Path
) -> None:
    """Draws how balanced accuracy changes under each condition, a panel an encoder and protocol."""
    panels = list(dict.fromkeys((score.encoder, score.protocol) for score in scores))
    names = list(dict.fromkeys(score.condition for score in scores))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with drawing(path, PAGE_PX, rows * (46 * len(names) + 170)) as figure:
        figure.set_layout_engine("constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True, sharex=True).ravel()
        for axes, (encoder, protocol) in zip(grid, panels, strict=False):
            axes.axvline(0, color=MUTED, lw=0.8)
            for score in scores:
                if (score.encoder, score.protocol) != (encoder, protocol):
                    continue
                line = names.index(score.condition)
                span = [score.change_low, score.change_high]
                axes.plot(span, [line, line], color=HAEMATOXYLIN, lw=2.2, solid_capstyle="butt")
                axes.plot(score.change, line, "o", ms=5.5, color=HAEMATOXYLIN, mec="white")
            axes.set_title(shortened(f"{labels[encoder]} · {protocol}", 56), fontsize=8.5)
            axes.set_xlabel("change of balanced accuracy from plain tiles")
            axes.set_yticks(range(len(names)), names)
            axes.tick_params(axis="y", length=0, labelcolor=INK)
            axes.grid(axis="x")
        grid[0].set_ylim(len(names) - 0.4, -0.6)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
