"""Curves of a training run, from its ``metrics.jsonl``: one small panel a quantity.

Where the run was probed, panels of ``probes.jsonl`` come first, with the best step marked.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eosin.configs.errors import InputError
from eosin.launch.pictures import EOSIN, HAEMATOXYLIN, PAGE_PX, STONE, drawing

TITLES = {
    "loss": "loss",
    "dino_global": "DINO, global crops",
    "dino_local": "DINO, local crops",
    "ibot": "iBOT, masked patches",
    "jepa": "patch regression",
    "regress": "hidden tokens, regressed",
    "contrast": "contrast of views",
    "align": "alignment with paired vectors",
    "labels": "labels of slides",
    "spread": "spread of features",
    "gram": "Gram anchoring",
    "rankme": "RankMe (effective rank)",
    "feature_std": "feature spread (healthy: 1)",
    "teacher_entropy": "teacher entropy (nats)",
    "prototypes_used": "prototypes used in the batch",
    "prototypes_used_lately": "prototypes used lately",
    "agreement": "student and teacher agree",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "weight_decay": "weight decay",
    "momentum": "teacher momentum",
    "temperature": "teacher temperature",
    "tiles_per_s": "tiles per second",
    "slides_per_s": "slides per second",
    "cases_per_s": "cases per second",
    "mfu": "MFU (share of the GPU's peak)",
    "data_wait": "time spent waiting for data",
    "memory_gib": "peak memory (GiB)",
}
"""Panels in reading order; a quantity not listed comes behind these under its own name."""
PROBE_TITLES = {
    "knn": "probe: kNN on val",
    "fewshot": "probe: few-shot on val",
    "rankme": "probe: RankMe",
    "feature_std": "probe: feature spread",
}
"""Panels of a run's probes; the first is what the best is chosen by."""
COLUMNS = 4
PANEL_HEIGHT_PX = 340
SMOOTHING = 0.03
"""Width of the running mean, as a fraction of the points drawn."""


@dataclass(frozen=True)
class Series:
    """One quantity over the steps at which it was recorded."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


def read_metrics(path: Path) -> dict[str, Series]:
    """Every number in a ``metrics.jsonl``, by name, sorted by step.

    A line that is not a JSON object with an integer ``step`` is passed over: a killed writer leaves
    half a line. Where a resumed run wrote a step again, the later record counts.

    Raises:
        InputError: the file is missing or no line of it can be read.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; 'eosin pretrain' writes it")
    recorded: dict[str, dict[int, float]] = {}
    for line in path.read_bytes().splitlines():
        record = _record(line)
        step = record.pop("step", None)
        if not isinstance(step, int):
            continue
        for name, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                recorded.setdefault(name, {})[step] = float(value)
    if not recorded:
        raise InputError(f"{path} holds no line with a step and a number; is it a run's metrics?")
    return {name: _series(points) for name, points in recorded.items()}


@dataclass(frozen=True)
class _Panel:
    title: str
    series: Series
    best: bool = False
    """Whether the highest point is marked."""


def loss_curves(metrics: Path, path: Path) -> None:
    """Draws each quantity in `metrics` and the probes beside it over the steps to `path` (PNG).

    Grey is every record, dark the centred running mean.

    Raises:
        InputError: see `read_metrics`.
    """
    series = read_metrics(metrics)
    names = [name for name in TITLES if name in series]
    names += sorted(series.keys() - TITLES.keys())
    shown = _probe_panels(metrics.with_name("probes.jsonl"))
    shown += [_Panel(TITLES.get(name, name.replace("_", " ")), series[name]) for name in names]
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    with drawing(path, PAGE_PX * columns // COLUMNS, PANEL_HEIGHT_PX * rows) as figure:
        figure.set_layout_engine("constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for panel, what in zip(panels, shown, strict=False):
            _draw(panel, what)
        for panel in panels[len(shown) :]:
            panel.set_axis_off()
        for panel in panels[max(len(shown) - columns, 0) : len(shown)]:
            panel.set_xlabel("step")


def _probe_panels(path: Path) -> list[_Panel]:
    """Of the probes in `path`; none where there are none."""
    try:
        series = read_metrics(path)
    except InputError:
        return []
    return [
        _Panel(title, series[name], best=name in ("knn", "fewshot"))
        for name, title in PROBE_TITLES.items()
        if name in series
    ]


def running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Centred mean over `width` (odd) points, fewer at the ends; not-finite points are left out."""
    finite = np.isfinite(values)
    position = np.arange(len(values))
    first = np.maximum(position - width // 2, 0)
    past = np.minimum(position + width // 2 + 1, len(values))
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    seen = count[past] - count[first]
    return np.where(seen > 0, (total[past] - total[first]) / np.maximum(seen, 1), np.nan)


def _record(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return value if isinstance(value, dict) else {}


def _series(points: dict[int, float]) -> Series:
    steps = sorted(points)
    return Series(np.array(steps, np.int64), np.array([points[step] for step in steps], np.float64))


def _draw(panel: Any, what: _Panel) -> None:
    series = what.series
    few = len(series.steps) <= 40
    panel.plot(series.steps, series.values, color=STONE, lw=0.8, marker="o" if few else "", ms=2)
    width = 2 * int(SMOOTHING * len(series.steps) / 2) + 1
    mean = running_mean(series.values, width)
    panel.plot(series.steps, mean, color=HAEMATOXYLIN, lw=1.4)
    panel.set_title(what.title)
    if what.best:
        _mark_best(panel, series)
    known = series.values[np.isfinite(series.values)]
    if known.size and np.ptp(known) == 0:  # else the mean's rounding would fill the panel
        around = 0.5 * abs(known[0]) or 1.0
        panel.set_ylim(known[0] - around, known[0] + around)
    panel.grid(axis="y")
    panel.margins(x=0.02, y=0.12)
    panel.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useOffset=False)
    panel.yaxis.get_offset_text().set_fontsize(7)
    panel.locator_params(axis="x", nbins=4, integer=True)
    panel.locator_params(axis="y", nbins=4)


def _mark_best(panel: Any, series: Series) -> None:
    best = int(np.nanargmax(series.values))
    step, value = int(series.steps[best]), float(series.values[best])
    panel.plot([step], [value], color=EOSIN, marker="o", ms=5, lw=0)
    right = step > series.steps[-1] / 2
    panel.annotate(
        f"{value:.3f} at {step}", (step, value), (-7 if right else 7, 0), color=EOSIN, fontsize=8,
        textcoords="offset points", ha="right" if right else "left", va="center",
    )  # fmt: skip
