"""The verb `eval aligned`: the same places under several scanners and stainings, as PLISM has them.

A slide is a scanner and a staining; all slides show the same places. For every pair of slides: the
mean cosine of a place's two tiles, and how often a place's tile is among the k nearest of its other
tile, among all tiles of both slides but itself (plismbench's top-k accuracy, both directions).
Pairs differ by scanner, by staining, or by both, and each kind is summed up by its median and
quartiles over pairs. ``mean`` is plismbench's headline: the mean of four medians, cosine over all
pairs and top-10 of each kind (owkin/plism-benchmark b4f32b7). A tile that is equal to another keeps
its place in the ranking by its row, and the tile itself is left out by its row, not by its rank, as
copies would shift that.
"""

import csv
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from eosin.configs.errors import InputError
from eosin.data_curation.embed import FileTile
from eosin.eval.config import EvalConfig
from eosin.eval.listing import read_table, refuse_duplicates, refuse_missing
from eosin.eval.probe import normalise
from eosin.eval.table_rows import load_rows
from eosin.eval.task_features import embed_files
from eosin.eval.tasks import TaskConfig
from eosin.launch.artefacts import SCHEMA_VERSION, stamp_of, write_json, write_text
from eosin.launch.device_names import DeviceName
from eosin.launch.process import choose_device
from eosin.launch.progress import Meter

KS = (1, 3, 5, 10)
KINDS = ("scanner", "staining", "both")
"""What the slides of a pair differ in."""
AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True)
class AlignedConfig:
    """How alike an encoder finds the same places."""

    encoder: str
    """As for `eosin eval`."""
    tiles: Path
    """A table with path, place, scanner and staining; every slide has every place once."""
    out: Path
    """Folder for aligned.json, pairs.csv and the cached features."""
    extra_encoders: list[str] = field(default_factory=list)
    seed: int = 0
    device: DeviceName = "auto"
    batch_size: int = 64


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two slides."""

    first: str
    second: str
    kind: str
    cosine: float
    top: dict[int, float]
    """k → share of tiles whose match is among the k nearest."""


def evaluate_aligned(config: AlignedConfig) -> None:
    """Embeds, compares all pairs, and writes the figures.

    Raises:
        InputError: the encoder or the table cannot be used.
    """
    tile_ids, places, slides = _read(config.tiles)
    images = [FileTile(config.tiles.parent / tile_id) for tile_id in tile_ids]
    with ThreadPoolExecutor(8) as pool:
        checksums = list(pool.map(lambda image: image.checksum(), images))
    digest = stamp_of(tiles=tile_ids, checksums=checksums)
    rows = load_rows(
        EvalConfig(
            encoder=config.encoder, task=TaskConfig(tiles=config.tiles), out=config.out,
            extra_encoders=config.extra_encoders, seed=config.seed, device=config.device,
        )
    )  # fmt: skip
    device = choose_device(config.device)
    found: dict[str, dict[str, object]] = {}
    lines: list[list[object]] = []
    table = Table(title=f"the same places, {len(set(slides))} slides: medians over pairs")
    for head in ("encoder", "cosine", *(f"top-10, other {kind}" for kind in KINDS), "mean"):
        table.add_column(head, justify="left" if head == "encoder" else "right")
    for row in rows:
        name = row.record.name
        features = embed_files(
            row.encoder, images, tile_ids, places, digest, config.out / "features" / name,
            config.batch_size,
        )  # fmt: skip
        pairs = list(compare_pairs(features, places, slides, device, name))
        figures = sum_up(pairs)
        found[name] = {"label": row.record.label, "digest": row.encoder.digest, **figures}
        lines += [
            [row.record.label, p.first, p.second, p.kind, p.cosine, *(p.top[k] for k in KS)]
            for p in pairs
        ]
        table.add_row(row.record.label, *_cells(figures))
    write_json(
        config.out / "aligned.json",
        {"schema_version": SCHEMA_VERSION, "digest": digest, "encoders": found},
    )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    tops = [f"top_{k}" for k in KS]
    writer.writerow(["encoder", "first", "second", "differ_in", "cosine", *tops])
    writer.writerows(lines)
    write_text(config.out / "pairs.csv", text.getvalue())
    Console().print(table)


def compare_pairs(
    features: npt.NDArray[np.float32],
    places: list[str],
    slides: list[tuple[str, str]],
    device: torch.device,
    label: str = "",
) -> Iterator[Pair]:
    """Every pair of slides.

    Args:
        features: [N, D].
        places: of each tile.
        slides: scanner and staining of each tile; every slide has every place once.
        device: where to compute.
        label: of the progress.
    """
    by_slide: dict[tuple[str, str], list[int]] = {}
    for row in sorted(range(len(places)), key=lambda i: places[i]):
        by_slide.setdefault(slides[row], []).append(row)
    unit = torch.from_numpy(normalise(features)).to(device)
    pairs = list(combinations(sorted(by_slide), 2))
    with Meter(f"pairs of {label}", len(pairs), "pairs") as meter:
        for a, b in pairs:
            first, second = unit[by_slide[a]], unit[by_slide[b]]
            kind = "both" if a[0] != b[0] and a[1] != b[1] else KINDS[int(a[0] == b[0])]
            yield Pair(
                first=" ".join(a),
                second=" ".join(b),
                kind=kind,
                cosine=float((first * second).sum(dim=1).double().mean()),
                top=_top(first, second),
            )
            meter.advance(1)


def _top(first: Tensor, second: Tensor) -> dict[int, float]:
    """Of matched tiles [N, D] of two slides, how often the match is among the k nearest."""
    n = len(first)
    both = torch.cat([first, second])  # [2 N, D]
    hits = dict.fromkeys(KS, 0)
    for start in range(0, 2 * n, AT_ONCE):
        near = both[start : start + AT_ONCE] @ both.T
        own = torch.arange(start, start + len(near), device=near.device)
        match = (own + n) % (2 * n)
        there = near.gather(1, match[:, None])
        near.scatter_(1, own[:, None], -torch.inf)
        ahead = near > there
        before = torch.arange(2 * n, device=near.device) < match[:, None]
        rank = (ahead | ((near == there) & before)).sum(dim=1)  # of the match, 0 and up
        for k in KS:
            hits[k] += int((rank < k).sum())
    return {k: count / (2 * n) for k, count in hits.items()}


def sum_up(pairs: list[Pair]) -> dict[str, object]:
    """Medians and quartiles by kind, and the mean of plismbench's four medians."""
    figures: dict[str, object] = {"cosine": _quartiles([p.cosine for p in pairs])}
    headline = [float(np.median([p.cosine for p in pairs]))]
    for kind in KINDS:
        of_kind = [p for p in pairs if p.kind == kind]
        figures[kind] = {
            "pairs": len(of_kind),
            "cosine": _quartiles([p.cosine for p in of_kind]),
            **{f"top_{k}": _quartiles([p.top[k] for p in of_kind]) for k in KS},
        }
        if of_kind:
            headline.append(float(np.median([p.top[10] for p in of_kind])))
    figures["mean"] = float(np.mean(headline)) if len(headline) == 4 else None
    return figures


def _quartiles(values: list[float]) -> list[float] | None:
    """25 %, median, 75 %; None of nothing."""
    return [float(q) for q in np.quantile(values, [0.25, 0.5, 0.75])] if values else None


def _cells(figures: dict[str, object]) -> list[str]:
    def median(value: object) -> str:
        return f"{value[1]:.3f}" if isinstance(value, list) else "–"

    kinds = [figures[kind] for kind in KINDS]
    tops = [median(k["top_10"]) if isinstance(k, dict) else "–" for k in kinds]
    mean = figures["mean"]
    return [median(figures["cosine"]), *tops, f"{mean:.3f}" if isinstance(mean, float) else "–"]


def _read(path: Path) -> tuple[list[str], list[str], list[tuple[str, str]]]:
    """Paths, places and slides of the tiles, sorted by path.

    Raises:
        InputError: a slide lacks a place or has one twice, or there is only one slide.
    """
    table = read_table(path, ("path", "place", "scanner", "staining")).sort_by("path")
    tile_ids, places, scanners, stainings = (table[n].to_pylist() for n in table.column_names)
    refuse_duplicates(tile_ids, path)
    refuse_missing([path.parent / tile_id for tile_id in tile_ids], path)
    slides = list(zip(scanners, stainings, strict=True))
    wanted = sorted(set(places))
    for slide in sorted(set(slides)):
        held = sorted(p for p, s in zip(places, slides, strict=True) if s == slide)
        if held != wanted:
            odd = next((p for p in wanted if held.count(p) != 1), wanted[0])
            raise InputError(
                f"{path}: slide {' '.join(slide)} has place '{odd}' {held.count(odd)} times; every "
                "slide needs every place once"
            )
    if len(set(slides)) < 2:
        raise InputError(f"{path}: only one slide; name two scanners or two stainings")
    return tile_ids, places, slides
