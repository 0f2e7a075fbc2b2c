"""A labelled task from synthetic slides: tiles of one class, cut where the class map says so."""

import csv
import io
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from eosin.configs.errors import InputError
from eosin.data_curation.manifest import make_tile_id
from eosin.data_curation.slide import Slide
from eosin.data_curation.synthetic import CLASSES, Truth, class_of_region, read_truth
from eosin.data_curation.synthetic_layout import TRUTH_DOWNSAMPLE
from eosin.data_curation.worker_pool import count_workers, run_jobs
from eosin.launch.artefacts import (
    file_digest,
    is_done,
    mark_done,
    replacing,
    stamp_of,
    write_json,
    write_text,
)
from eosin.launch.progress import Meter

FORMAT = 2
"""Version of the choice and naming; raise it when the same slides give another task."""

LABELS, MARKER = "labels.csv", "task.json"


@dataclass(frozen=True, kw_only=True)
class SyntheticTaskConfig:
    """Which tiles become labelled ones."""

    mpp: float = 1.0
    """Scale of the tiles, µm per pixel."""
    size_px: int = 128
    """Side of the tiles."""
    min_share: float = 0.8
    """Share of the tile that its class must cover."""
    tiles_per_class: int = 5
    """Tiles of one class from one slide, at most."""
    seed: int = 0
    """Of the choice where there are more."""


@dataclass(frozen=True)
class _Label:
    path: str
    label: str
    group: str
    split: str


def write_task(
    out: Path, slides: Mapping[Path, str], config: SyntheticTaskConfig, workers: int = 0
) -> Path:
    """Writes tiles as PNG, a folder a class, and ``labels.csv`` with path, label, group, split.

    Tiles under pen, out of focus or in a fold are left out: their label would be in doubt.

    Args:
        out: folder of the task.
        slides: each slide that `write_slides` wrote, with its split; a slide is a group.
        config: the choice.
        workers: processes; 0 is one per core.

    Returns:
        The path of ``labels.csv``.

    Raises:
        InputError: `out` holds something else than such a task.
    """
    stamp = stamp_of(
        format=FORMAT,
        config=asdict(config),
        slides=[[path.stem, split, file_digest(path)] for path, split in slides.items()],
    )
    marker = out / MARKER
    if is_done(marker, stamp) and (out / LABELS).is_file():
        return out / LABELS
    _claim(out)
    labels: list[_Label] = []
    with Meter("labelled tiles", len(slides), "slides") as meter:
        cut = partial(_cut_slide, out, config)
        for (path, _), found in run_jobs(cut, slides.items(), count_workers(workers)):
            labels += found
            meter.advance(note=path.name)
    text = io.StringIO()
    writer = csv.DictWriter(text, ["path", "label", "group", "split"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(label) for label in sorted(labels, key=lambda label: label.path))
    write_text(out / LABELS, text.getvalue())
    mark_done(marker, stamp, tiles=len(labels))
    return out / LABELS


def _claim(out: Path) -> None:
    """Empties `out`, if it is ours, but for a marker that says so and holds no stamp."""
    marker = out / MARKER
    if out.exists() and not marker.is_file() and any(out.iterdir()):
        raise InputError(
            f"{out} holds files but no {MARKER}, so it is not a task to be replaced; "
            "give another folder, or empty this one"
        )
    write_json(marker, {"stamp": None})
    for path in out.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path != marker:
            path.unlink()


def _cut_slide(out: Path, config: SyntheticTaskConfig, job: tuple[Path, str]) -> list[_Label]:
    """Writes one slide's labelled tiles."""
    path, split = job
    labels = []
    with Slide(path) as slide:
        for label, corners in _choose(slide, read_truth(path), config).items():
            (out / label).mkdir(exist_ok=True)
            for x, y in corners:
                name = f"{label}/{make_tile_id(path.stem, x, y, config.mpp)}.png"
                pixels = slide.read_tile(x, y, config.size_px, config.mpp)
                with replacing(out / name) as draft:
                    Image.fromarray(pixels).save(draft, format="PNG")
                labels.append(_Label(name, label, path.stem, split))
    return labels


def _choose(
    slide: Slide, truth: Truth, config: SyntheticTaskConfig
) -> dict[str, list[tuple[float, float]]]:
    """Level-0 corners of the tiles of each class, `tiles_per_class` at most."""
    spoilt = truth.pen | truth.blur | truth.fold
    side = config.size_px * config.mpp / slide.mpp[0]
    candidates: dict[int, list[tuple[float, float]]] = {}
    for row in range(int(slide.size_px[1] // side)):
        for column in range(int(slide.size_px[0] // side)):
            x, y = column * side, row * side
            winner, share = class_of_region(truth, x, y, side, side)
            rows, columns = (
                slice(int(start // TRUTH_DOWNSAMPLE), int(-(-(start + side) // TRUTH_DOWNSAMPLE)))
                for start in (y, x)
            )
            if winner and share >= config.min_share and not spoilt[rows, columns].any():
                candidates.setdefault(winner, []).append((x, y))
    chosen = {}
    for winner, corners in sorted(candidates.items()):
        rng = np.random.default_rng([config.seed, winner, len(corners)])
        kept = sorted(rng.permutation(len(corners))[: config.tiles_per_class])
        chosen[CLASSES[winner]] = [corners[i] for i in kept]
    return chosen
