"""The verb `review`: clusters as a page that a pathologist reads, judges and saves.

The page is one HTML file that needs no network and no other file. What is saved from it is the
``review.json`` that `eosin sample review=…` obeys (`review_file`).
"""

import base64
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray

from eosin.configs.errors import ConfigError, InputError
from eosin.data_curation.cluster_config import MARKER_NAME, TABLE_NAME
from eosin.data_curation.cluster_sheets import KINDS, Sheet, choose, draw_sheet
from eosin.data_curation.manifest import CLUSTERS, SLIDES, TILES, open_table, read_table
from eosin.data_curation.review_file import read_review
from eosin.data_curation.slide_maps import SlideMap, draw_map
from eosin.data_curation.tile_sources import ImageSource, ShardSource, SlideTileSource, TileSource
from eosin.data_curation.worker_pool import count_workers
from eosin.launch.artefacts import SCHEMA_VERSION, read_json, write_text
from eosin.launch.progress import Meter

USUAL_COLUMNS = ("organ", "stain", "site", "scanner", "label")
_SHOWN_VALUES = 6  # of a column, for one cluster or in the balance
_MANY_DOTS = 400  # of a cluster on one slide


@dataclass(frozen=True, kw_only=True)
class ReviewPageConfig:
    """Clusters to a page."""

    clusters: Path
    """Folder of `eosin cluster`."""
    out: Path
    """The page, e.g. curated/review.html."""
    tiles: Path | None = None
    """The folder that `eosin tile` wrote, of whose tiles the clusters are."""
    images: Path | None = None
    """Instead of tiles: the folder or table of tile images that were embedded."""
    shards: str | None = None
    """Instead of both: shards that were embedded."""
    level: int = 1
    """Of the clusters that are judged; 1 is the finest."""
    shown: int = 5
    """Tiles of each kind: nearest to the centre of their finest cluster, median, farthest."""
    thumb_px: int = 128
    """Side of a tile on the page."""
    slides_shown: int = 2
    """Slides of each cluster on which its tiles are marked, those with the most."""
    map_px: int = 150
    """Longer side of such a slide on the page."""
    by: list[str] = field(default_factory=list)
    """Columns whose values are counted in each cluster; empty: those of organ, stain, site, scanner
    and label that there are."""
    selection: Path | None = None
    """A selection.parquet of `eosin sample`: the page shows the balance before and after it."""
    review: Path | None = None
    """A review of these clusters to go on from."""
    threads: int = 0
    """That read tiles; 0: one per core."""

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.tiles, self.images, self.shards)) != 1:
            raise ValueError("give one of tiles, images and shards: what the clusters are of")
        for name, low, high in (("level", 1, 99), ("shown", 1, 50), ("thumb_px", 32, 512)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be {low} to {high}, not {getattr(self, name)}")
        for name in ("slides_shown", "threads"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if not 64 <= self.map_px <= 1024:
            raise ValueError(f"map_px must be 64 to 1024, not {self.map_px}")


def review_page(config: ReviewPageConfig) -> None:
    """Writes the page.

    Raises:
        InputError: clusters are missing or of other tiles, or the review is of other clusters.
        ConfigError: there is no such level or column.
    """
    marker = config.clusters / MARKER_NAME
    if not marker.is_file():
        raise InputError(f"{config.clusters} holds no finished clusters; run 'eosin cluster'")
    stamp = str(read_json(marker)["stamp"])
    table = read_table(config.clusters / TABLE_NAME, CLUSTERS)
    name = f"level_{config.level}"
    if name not in table.column_names:
        levels = ", ".join(n for n in table.column_names if n.startswith("level_"))
        raise ConfigError(f"{config.clusters} has no {name}; there are: {levels}")
    source = _open_source(config)
    rows = _rows_of(table, source, config)
    label = table[name].combine_chunks().to_numpy().astype(np.int64)
    members = _members(label)
    cards = _cards(config, table, source, rows, members)
    page = (
        _environment()
        .from_string(_template())
        .render(
            n_tiles=table.num_rows,
            cards=cards,
            level=config.level,
            balance=_balance(config.selection) if config.selection else [],
            state=_script_json(_state(config, stamp, [card["number"] for card in cards])),
            columns=_columns(config, source),
            step_px=config.thumb_px + 2,
            thumb_px=config.thumb_px,
            kinds=KINDS,
            version=metadata.version("eosin"),
        )
    )
    write_text(config.out, page)
    failed = sum(len(card["failed"]) for card in cards)
    lost = f", {failed} tiles on it cannot be read" if failed else ""
    print(
        f"review: {len(cards)} clusters of {table.num_rows} tiles, {len(page) / 1e6:.1f} MB{lost} "
        f"→ {config.out}; open it in a browser, judge, save, then: eosin sample review=review.json"
    )


def _open_source(config: ReviewPageConfig) -> TileSource:
    if config.tiles is not None:
        return SlideTileSource(config.tiles, None, [])
    if config.images is not None:
        return ImageSource(config.images, [])
    assert config.shards is not None
    return ShardSource(config.shards)


def _rows_of(table: pa.Table, source: TileSource, config: ReviewPageConfig) -> NDArray[np.int64]:
    """The source's row of each clustered tile."""
    ids = table["tile_id"].combine_chunks()
    place = pc.index_in(ids, source.rows["tile_id"].combine_chunks())
    if place.null_count:
        lost = ids.filter(place.is_null())[0].as_py()
        given = config.tiles or config.images or config.shards
        raise InputError(f"{config.clusters} has '{lost}', which is not in {given}")
    return np.asarray(place.to_numpy(), np.int64)


def _members(label: NDArray[np.int64]) -> dict[int, NDArray[np.int64]]:
    """The rows of each cluster that has any, the largest first."""
    order = np.argsort(label, kind="stable")
    numbers, first = np.unique(label[order], return_index=True)
    bounds = [*first.tolist(), len(order)]
    found = {
        int(number): order[low:high]
        for number, (low, high) in zip(numbers, itertools.pairwise(bounds), strict=True)
    }
    return dict(sorted(found.items(), key=lambda entry: (-len(entry[1]), entry[0])))


def _columns(config: ReviewPageConfig, source: TileSource) -> list[str]:
    names = source.rows.column_names
    stray = [name for name in config.by if name not in names]
    if stray:
        raise ConfigError(f"by: no column '{stray[0]}'; there are: {', '.join(names)}")
    found = config.by or [name for name in USUAL_COLUMNS if name in names]
    return [name for name in found if source.rows[name].null_count < source.rows.num_rows]


def _cards(
    config: ReviewPageConfig,
    table: pa.Table,
    source: TileSource,
    rows: NDArray[np.int64],
    members: dict[int, NDArray[np.int64]],
) -> list[dict[str, Any]]:
    """What the page shows of each cluster."""
    distance = table["distance"].combine_chunks().to_numpy()
    columns = {name: source.rows[name].combine_chunks() for name in _columns(config, source)}
    maps = _Maps(config)
    ids = table["tile_id"].combine_chunks()
    cards = []
    with (
        ThreadPoolExecutor(count_workers(config.threads)) as pool,
        Meter("review", len(members), "clusters") as meter,
    ):
        for number, inside in members.items():
            chosen = [
                [int(inside[place]) for place in places]
                for places in choose(distance[inside], config.shown)
            ]
            sheet = draw_sheet(
                chosen,
                lambda row: source.read(int(rows[row])),
                config.shown,
                config.thumb_px,
                pool,
            )
            spots = pa.array(rows[inside])
            cards.append(
                {
                    "number": number,
                    "size": len(inside),
                    "share": len(inside) / table.num_rows,
                    "sheet": _data_url(sheet.jpeg),
                    "width": sheet.width_px,
                    "height": sheet.height_px,
                    "cells": list(_cells(sheet, ids, distance, config)),
                    "failed": sheet.failed,
                    "maps": maps.of(source.rows.take(spots)),
                    "counts": {
                        name: _counts(column.take(spots)) for name, column in columns.items()
                    },
                }
            )
            meter.advance(1)
    return cards


def _cells(
    sheet: Sheet, ids: pa.Array, distance: NDArray[np.float32], config: ReviewPageConfig
) -> Iterator[dict[str, Any]]:
    """Where each tile of a sheet lies, and what is said of it when it is pointed at."""
    step = config.thumb_px + 2
    for row, kind in enumerate(sheet.rows):
        for column, item in enumerate(kind):
            reason = sheet.failed.get(item)
            said = f"cannot be read: {reason}" if reason else f"distance {distance[item]:.3g}"
            yield {
                "left": column * step,
                "top": row * step,
                "title": f"{ids[item].as_py()} · {said}",
                "failed": reason is not None,
            }


def _counts(values: pa.Array) -> list[dict[str, Any]]:
    """The most frequent values and their shares; what is left is summed up."""
    text = pc.fill_null(values.cast(pa.string()), "unknown").to_pylist()
    found = Counter(text).most_common()
    shown = found if len(found) <= _SHOWN_VALUES else found[: _SHOWN_VALUES - 1]
    rest = len(text) - sum(count for _, count in shown)
    if rest:
        shown = [*shown, (f"{len(found) - len(shown)} others", rest)]
    return [{"value": v, "count": count, "share": count / len(text)} for v, count in shown]


class _Maps:
    """Pictures of slides, each drawn once."""

    def __init__(self, config: ReviewPageConfig) -> None:
        self._config = config
        self._drawn: dict[str, SlideMap | None] = {}
        self._slides, self._size_px = dict[str, dict[str, Any]](), 0
        if config.tiles is not None:
            slides = read_table(config.tiles / "slides.parquet", SLIDES).to_pylist()
            self._slides = {slide["slide_id"]: slide for slide in slides}
            sizes = open_table(config.tiles / "tiles.parquet", TILES).read(["size_px"])["size_px"]
            self._size_px = int(pc.max(sizes).as_py() or 0)

    def of(self, tiles: pa.Table) -> list[dict[str, Any]]:
        """The slides with the most of these tiles, and where on them the tiles lie."""
        if not self._slides or not self._config.slides_shown:
            return []
        most = Counter(tiles["slide_id"].to_pylist()).most_common(self._config.slides_shown)
        found = []
        for slide_id, count in most:
            drawn = self._map(slide_id)
            if drawn is None:
                continue
            here = tiles.filter(pc.equal(tiles["slide_id"], slide_id))
            corners = np.stack([here[n].to_numpy() for n in ("level0_x", "level0_y")], 1)
            corners = corners[np.unique(np.linspace(0, len(corners) - 1, _MANY_DOTS).astype(int))]
            side_um = self._size_px * here["mpp"][0].as_py()
            slide = self._slides[slide_id]
            found.append(
                {
                    "slide": slide_id,
                    "count": count,
                    "image": _data_url(drawn.jpeg),
                    "width": drawn.width_px,
                    "height": drawn.height_px,
                    "corners": [drawn.place(float(x), float(y)) for x, y in corners],
                    "tile_width": side_um / slide["mpp_x"] / drawn.step_x,
                    "tile_height": side_um / slide["mpp_y"] / drawn.step_y,
                }
            )
        return found

    def _map(self, slide_id: str) -> SlideMap | None:
        if slide_id not in self._drawn:
            slide = self._slides[slide_id]
            mpp = (slide["mpp_x"], slide["mpp_y"])
            self._drawn[slide_id] = draw_map(Path(slide["path"]), mpp, self._config.map_px)
        return self._drawn[slide_id]


def _balance(selection: Path) -> list[dict[str, Any]]:
    """Of selection.json, by column: the figures before and after, and the most frequent values."""
    path = selection.with_suffix(".json")
    if not path.is_file() or "balance" not in (done := read_json(path)):
        raise InputError(f"{path} is missing or tells no balance; run 'eosin sample'")
    found = []
    for name, entry in done["balance"].items():
        counts = entry.get("counts", {})
        totals = [max(1, sum(pair[when] for pair in counts.values())) for when in (0, 1)]
        shares = {v: (b / totals[0], a / totals[1]) for v, (b, a) in counts.items()}
        top = sorted(shares, key=lambda v: (-max(shares[v]), v))[: 2 * _SHOWN_VALUES]
        found.append(
            {
                "name": name,
                "before": entry["before"],
                "after": entry["after"],
                "values": [
                    {"value": v, "before": shares[v][0], "after": shares[v][1]} for v in top
                ],
                "largest": max((max(shares[v]) for v in top), default=1.0),
                "more": len(shares) - len(top),
            }
        )
    return found


def _state(config: ReviewPageConfig, stamp: str, numbers: list[int]) -> dict[str, Any]:
    """What the page's script knows."""
    verdicts = {}
    if config.review is not None:
        review = read_review(config.review)
        if review.clusters_stamp != stamp or review.level != config.level:
            raise InputError(f"{config.review} is a review of other clusters or another level")
        verdicts = {
            str(number): {
                "name": verdict.name,
                "merged_into": verdict.merged_into,
                "weight": verdict.weight,
                "rejected": verdict.rejected,
            }
            for number, verdict in review.verdicts.items()
        }
    return {
        "schema_version": SCHEMA_VERSION,
        "clusters_stamp": stamp,
        "level": config.level,
        "numbers": numbers,
        "clusters": verdicts,
    }


def _script_json(value: Any) -> str:
    """JSON that cannot end the element it stands in, whatever names are in it."""
    text = json.dumps(value, ensure_ascii=True, sort_keys=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _data_url(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def _environment() -> Environment:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["thousands"] = lambda number: f"{number:,}"
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    return environment


def _template() -> str:
    folder = resources.files("eosin.data_curation")
    return folder.joinpath("review_page.html.j2").read_text(encoding="utf-8")
