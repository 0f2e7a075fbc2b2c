"""Which tiles are worth training on: thresholds on measured figures, and a cap per slide.

Tiling only measures. Thresholds are applied here, so that changing one reads no slide again.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from eosin.configs.errors import EosinError
from eosin.data_curation.manifest import SELECTION, TILES, Status, read_table, write_table
from eosin.data_curation.records import draw
from eosin.launch.artefacts import file_digest, is_done, mark_done, read_json, stamp_of

FORMAT = 2
"""Raised when the same tiles and config give another selection than before."""

_NAMED = 5  # slides named by an alarm


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Which tiles go into the shards. A figure that was not measured on a tile is not judged."""

    min_tissue: float = 0.5
    """Least fraction of the tile inside the tissue mask."""
    max_white: float = 0.9
    """Most glass-white pixels, as a fraction; fat is white too, so this is generous."""
    max_dark: float = 0.3
    """Most black pixels (folds, dust, ink), as a fraction."""
    max_pen: float = 0.1
    """Most of the tile under marker pen, as a fraction."""
    max_fold: float = 1.0
    """Most of the tile where tissue seems folded, as a fraction. Off: at a false alarm of 1 % the
    rule finds four in ten folds, and dense tissue is among what it takes for them."""
    min_sharpness: float = 1.8
    """Least sharpness (`measure_sharpness`): tissue in focus has 2 to 4, blurred by 1 µm (sigma)
    2.2 to 2.8, by 1.5 µm about 1.7. Compares among tiles of 1 µm/px or finer."""
    min_entropy: float = 0.0
    """Least entropy of the grey levels, in bits; tissue has 5 to 7.5, bare glass 2."""
    max_tiles_per_slide: int = 0
    """Tiles of one slide, drawn at random; 0 takes all."""
    seed: int = 0
    """Of that draw; a tile's ticket depends on the seed and its id alone."""
    alarm_share: float = 0.5
    """A slide that loses more than this share of its read tiles to one quality threshold is named:
    such a filter may have misread the slide, and not found bad tiles."""

    def __post_init__(self) -> None:
        for name in ("min_tissue", "max_white", "max_dark", "max_pen", "max_fold", "alarm_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be 0 to 1, not {getattr(self, name)}")
        if self.max_tiles_per_slide < 0:
            raise ValueError(f"max_tiles_per_slide must be 0 or more: {self.max_tiles_per_slide}")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed must be 0 to 2^64 - 1, not {self.seed}")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What was selected of a table of tiles, and why the rest was not."""

    table: pa.Table
    """As `manifest.SELECTION`, in the order of the tiles."""
    n_tiles: int
    """Rows that there were, empty and unreadable ones included."""
    dropped: dict[str, int]
    """Tiles by the first rule that they broke: a status, a threshold, the cap."""
    alarms: list[str]
    """A line for each slide that a quality threshold, or all of them, took apart."""


def select(tiles: pa.Table, config: SelectConfig) -> Selection:
    """Selects from a table as `manifest.TILES`: a pure function of the rows and the config."""
    status = np.array(tiles["status"].to_pylist(), object)
    readable = status == str(Status.OK)
    broken = broken_rules(tiles, config)
    dropped = {str(s): int((status == s).sum()) for s in sorted(set(status[~readable]))}
    kept = readable.copy()
    for rule, mask in broken.items():
        dropped[rule] = int((kept & mask).sum())
        kept &= ~mask
    slides = np.array(tiles["slide_id"].to_pylist(), object)
    names, code = np.unique(slides.astype(str), return_inverse=True)
    alarms = alarm_lines(list(names), code, readable, kept, broken, config.alarm_share)
    chosen = _cap(tiles, slides, np.flatnonzero(kept), config)
    dropped["max_tiles_per_slide"] = int(kept.sum()) - len(chosen)
    table = tiles.take(pa.array(chosen, pa.int64()))
    reason = "passed every threshold" + ("; drawn" if config.max_tiles_per_slide else "")
    selection = pa.table(
        {
            "tile_id": table["tile_id"],
            "stratum": table["slide_id"],
            "cluster": pa.nulls(len(chosen), pa.string()),
            "copies": pa.array(np.ones(len(chosen), np.int32)),
            "reason": pa.array([reason] * len(chosen), pa.string()),
        }
    )
    return Selection(table=selection, n_tiles=tiles.num_rows, dropped=dropped, alarms=alarms)


def write_selection(tiles_path: Path, selection_path: Path, config: SelectConfig) -> None:
    """Selects from a ``tiles.parquet``, unless it was done with the same tiles and config.

    Beside the table stands ``selection.json``, its marker, with the counts.

    Raises:
        InputError: there are no tiles to read.
        EosinError: no tile passes.
    """
    tiles = read_table(tiles_path, TILES)
    marker = selection_path.with_suffix(".json")
    stamp = stamp_of(format=FORMAT, config=config.__dict__, tiles=file_digest(tiles_path))
    if not (is_done(marker, stamp) and selection_path.is_file()):
        selection = select(tiles, config)
        marker.unlink(missing_ok=True)
        write_table(selection.table, selection_path, SELECTION)
        mark_done(
            marker,
            stamp,
            n_tiles=selection.n_tiles,
            n_selected=selection.table.num_rows,
            dropped=selection.dropped,
            alarms=selection.alarms,
        )
    done = read_json(marker)
    for line in done["alarms"]:
        print(f"select: {line}", file=sys.stderr)
    reasons = ", ".join(f"{rule} {count}" for rule, count in done["dropped"].items() if count)
    lost = f"; dropped: {reasons}" if reasons else ""
    print(f"select: {done['n_selected']} of {done['n_tiles']} cells{lost}")
    if not done["n_selected"]:
        raise EosinError(f"no tile of {tiles_path} passes the thresholds{lost}; relax select.*")


JUDGED = (
    "tissue_fraction",
    "white_fraction",
    "dark_fraction",
    "pen_fraction",
    "fold_fraction",
    "sharpness",
    "entropy",
)
"""The columns of tiles that `broken_rules` reads."""


def broken_rules(tiles: pa.Table, config: SelectConfig) -> dict[str, NDArray[np.bool_]]:
    """By threshold, which tiles break it, bool [N]; a null figure breaks none."""
    rules = {
        "min_tissue": pc.less(tiles["tissue_fraction"], config.min_tissue),
        "max_white": pc.greater(tiles["white_fraction"], config.max_white),
        "max_dark": pc.greater(tiles["dark_fraction"], config.max_dark),
        "max_pen": pc.greater(tiles["pen_fraction"], config.max_pen),
        "max_fold": pc.greater(tiles["fold_fraction"], config.max_fold),
        "min_sharpness": pc.less(tiles["sharpness"], config.min_sharpness),
        "min_entropy": pc.less(tiles["entropy"], config.min_entropy),
    }
    return {rule: pc.fill_null(mask, False).to_numpy() for rule, mask in rules.items()}


def alarm_lines(
    names: list[str],
    code: NDArray[np.integer],
    readable: NDArray[np.bool_],
    kept: NDArray[np.bool_],
    broken: dict[str, NDArray[np.bool_]],
    share: float,
) -> list[str]:
    """Lines on slides that lose much to one threshold of quality, or all their tiles to all.

    Args:
        names: of the slides.
        code: [N], each tile's slide, an index into `names`.
        readable: [N], tiles that were read.
        kept: [N], tiles that pass everything.
        broken: see `broken_rules`.
        share: see `SelectConfig.alarm_share`.
    """
    slides = np.array(names, np.str_)
    n_read = np.bincount(code, readable, len(names))
    n_kept = np.bincount(code, kept, len(names))
    alarms = []
    for rule, mask in broken.items():
        if rule == "min_tissue":
            continue
        lost = np.bincount(code, mask & readable, len(names)) / np.maximum(n_read, 1)
        alarms += _alarm(slides[lost > share], f"lost over {share:.0%} of the tiles to {rule}")
    return alarms + _alarm(slides[(n_read > 0) & (n_kept == 0)], "kept no tile at all")


def _alarm(names: NDArray[np.str_], what: str) -> list[str]:
    if not len(names):
        return []
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return [f"{', '.join(names[:_NAMED])}{more} {what}; look at the overlay"]


def _cap(
    tiles: pa.Table, slides: NDArray[np.object_], rows: NDArray[np.int64], config: SelectConfig
) -> NDArray[np.int64]:
    """At most `max_tiles_per_slide` of `rows` for each slide: those with the smallest tickets."""
    if not config.max_tiles_per_slide:
        return rows
    ids = tiles["tile_id"].to_pylist()
    tickets = np.array([draw(config.seed, ids[row]) for row in rows], np.uint64)
    _, code = np.unique(slides[rows].astype(str), return_inverse=True)
    order = np.lexsort((tickets, code))
    first = np.r_[0, np.flatnonzero(np.diff(code[order])) + 1]
    sizes = np.diff(np.r_[first, len(order)])
    place = np.arange(len(order)) - np.repeat(first, sizes)
    return np.sort(rows[order[place < config.max_tiles_per_slide]])
