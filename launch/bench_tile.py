"""`eosin bench tile`: tiles of a slide, against the usual loop of OpenSlide and Pillow.

The usual loop reads a region, makes it RGB, brings it to the tile's size with Pillow's box filter
and, where tiles are written, saves JPEG of quality 90. The whole way has tissue and grid in it: to
shards on our side, to a tar of JPEGs on the other, with a tissue mask by HSV. All on one core.
"""

import io
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import openslide
from numpy.typing import NDArray
from PIL import Image

from eosin.data_curation.codec import encode_tile
from eosin.data_curation.coded_tiles import DecodedTiles
from eosin.data_curation.curate import CurateConfig, curate
from eosin.data_curation.shards import ShardOptions
from eosin.data_curation.slide import Slide
from eosin.data_curation.synthetic import SyntheticConfig, write_slide
from eosin.data_curation.tiles import TileOptions
from eosin.launch.bench import Row, in_turn, more_is_better, report

QUALITY = 90
_LEAST_SATURATION = 8  # of the mask on the other side, as CLAM's
_MASK_PX = 512
_SLACK = 1.001  # a level of factor 2.0002 serves for 2
_SMALL_SIDE_PX = 4096


@dataclass(frozen=True, kw_only=True)
class BenchTileConfig:
    """A slide in JPEG tiles, read tile by tile."""

    slide: Path | None = None
    """One of your own; without it a synthetic one of 4096 px is made."""
    mpp: float = 0
    """µm per level-0 pixel, where the slide's own metadata gives none."""
    size_px: int = 256
    """Side of a tile; where it is that of the slide's own tiles, those are handed on."""
    tiles: int = 200
    """Of each kind, spread over the slide."""
    repeats: int = 5
    """Runs of each side, in turn; figures are medians."""
    whole: bool = True
    """Whether the slide's whole way to shards is timed too."""
    json: Path | None = None
    """Where the rows are written, too; ``--json FILE`` is the same."""

    def __post_init__(self) -> None:
        for name in ("size_px", "tiles", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.mpp < 0:
            raise ValueError(f"mpp={self.mpp} must not be negative")


def bench_tile(config: BenchTileConfig) -> None:
    """Times the sides in turn and reports them."""
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder, _slide(config, Path(folder)) as (path, mpp):
        rows = list(_rows(config, path, mpp))
        if config.whole:
            rows.append(_whole_way(config, path, mpp, Path(folder)))
        title = f"{path.name}, tiles of {config.size_px} px, one core, medians of {config.repeats}"
    report(title, rows, config.json)


@contextmanager
def _slide(config: BenchTileConfig, folder: Path) -> Iterator[tuple[Path, tuple[float, float]]]:
    path = config.slide
    if path is None:
        made = SyntheticConfig(n_slides=1, size_px=_SMALL_SIDE_PX, artefact_share=0)
        path = write_slide(folder, 0, made)
    given = (config.mpp, config.mpp) if config.mpp else None
    with Slide(path, given) as slide:
        yield path, slide.mpp


def _rows(config: BenchTileConfig, path: Path, mpp: tuple[float, float]) -> Iterator[Row]:
    side = config.size_px
    own = max(mpp)
    with (
        Slide(path, mpp) as ours,
        Slide(path, mpp, DecodedTiles(max_mb=1), "scaled") as scaled,  # not all tiles, for good
        openslide.OpenSlide(path) as theirs,
    ):

        def plain(x: int, y: int, factor: int) -> Image.Image:
            level = theirs.get_best_level_for_downsample(factor * _SLACK)
            px = round(side * factor / theirs.level_downsamples[level])
            region: Image.Image = theirs.read_region((x, y), level, (px, px)).convert("RGB")
            return region if px == side else region.resize((side, side), Image.Resampling.BOX)

        def ours_jpeg(x: int, y: int) -> bytes:
            coded = ours.coded_tile(x, y, side, own)
            return coded or encode_tile(ours.read_tile(x, y, side, own), QUALITY).data

        def plain_jpeg(x: int, y: int) -> bytes:
            buffer = io.BytesIO()
            plain(x, y, 1).save(buffer, "JPEG", quality=QUALITY)
            return buffer.getvalue()

        kinds: list[
            tuple[str, int, int, Callable[[int, int], object], Callable[[int, int], object]]
        ]
        kinds = [
            (
                "tiles at the slide's scale, on its grid",
                0,
                1,
                lambda x, y: ours.read_tile(x, y, side, own),
                lambda x, y: np.asarray(plain(x, y, 1)),
            ),
            (
                "tiles at the slide's scale, off its grid",
                side // 3,
                1,
                lambda x, y: ours.read_tile(x, y, side, own),
                lambda x, y: np.asarray(plain(x, y, 1)),
            ),
            (
                "tiles at half the scale",
                0,
                2,
                lambda x, y: ours.read_tile(x, y, side, 2 * own),
                lambda x, y: np.asarray(plain(x, y, 2)),
            ),
            (
                "tiles at half the scale, decoding=scaled",
                0,
                2,
                lambda x, y: scaled.read_tile(x, y, side, 2 * own),
                lambda x, y: np.asarray(plain(x, y, 2)),
            ),
            ("JPEGs at the slide's scale, on its grid", 0, 1, ours_jpeg, plain_jpeg),
            (
                "JPEGs of tiles that are encoded again",
                side // 3,
                1,
                lambda x, y: encode_tile(ours.read_tile(x, y, side, own), QUALITY),
                plain_jpeg,
            ),
        ]
        for name, offset, factor, mine, usual in kinds:
            places = _places(theirs.dimensions, side * factor, offset, config.tiles)
            rates = [
                statistics.median(len(places) / seconds for seconds in runs)
                for runs in in_turn(
                    lambda f=mine, p=places: _seconds(f, p),  # type: ignore[misc]
                    lambda f=usual, p=places: _seconds(f, p),  # type: ignore[misc]
                    config.repeats,
                )
            ]
            yield more_is_better(f"tile {name}", "tiles/s", *rates)


def _places(
    size_px: tuple[int, int], step_px: int, offset_px: int, count: int
) -> list[tuple[int, int]]:
    """Corners of tiles that lie inside the slide, row by row, at most `count` spread over it."""
    columns, rows = ((side - offset_px) // step_px for side in size_px)
    every = [
        (offset_px + column * step_px, offset_px + row * step_px)
        for row in range(rows)
        for column in range(columns)
    ]
    if not every:
        raise ValueError(f"the slide of {size_px[0]}×{size_px[1]} px holds no tile of {step_px} px")
    chosen = np.unique(np.linspace(0, len(every) - 1, count).astype(int))
    return [every[place] for place in chosen]


def _seconds(read: Callable[[int, int], object], places: list[tuple[int, int]]) -> float:
    began = time.perf_counter()
    for x, y in places:
        read(x, y)
    return time.perf_counter() - began


def _whole_way(config: BenchTileConfig, path: Path, mpp: tuple[float, float], folder: Path) -> Row:
    """Tissue, grid, tiles and files; rates by the tiles that each side wrote."""
    table = folder / "slides.csv"
    table.write_text(f"path,mpp_x,mpp_y\n{path.resolve()},{mpp[0]},{mpp[1]}\n")

    def ours() -> float:
        out = folder / "set"
        shutil.rmtree(out, ignore_errors=True)
        began = time.perf_counter()
        curate(
            CurateConfig(
                slides=table,
                out=out,
                tile=TileOptions(mpp=max(mpp), size_px=config.size_px, workers=1),
                shard=ShardOptions(workers=1),
            )
        )
        seconds = time.perf_counter() - began
        with tarfile.open(out / "shards" / "000000.tar") as first:
            names = len(first.getnames())
        tars = sorted((out / "shards").glob("*.tar"))
        for tar in tars[1:]:
            with tarfile.open(tar) as opened:
                names += len(opened.getnames())
        return names / seconds

    def usual() -> float:
        began = time.perf_counter()
        written = _plain_loop(path, folder / "plain.tar", config.size_px)
        return written / (time.perf_counter() - began)

    rates = [statistics.median(runs) for runs in in_turn(ours, usual, config.repeats)]
    return more_is_better("tile a slide's whole way to tars", "tiles/s", *rates)


def _plain_loop(path: Path, out: Path, side: int) -> int:
    """Mask, grid, JPEGs of quality 90 in a tar; returns how many."""
    count = 0
    with openslide.OpenSlide(path) as slide, tarfile.open(out, "w") as tar:
        width, height = slide.dimensions
        mask = _plain_mask(slide)
        scale = mask.shape[1] / width
        for y in range(0, height - side + 1, side):
            for x in range(0, width - side + 1, side):
                left, top = int(x * scale), int(y * scale)
                right, bottom = max(left + 1, int((x + side) * scale)), int((y + side) * scale)
                if mask[top : max(top + 1, bottom), left:right].mean() < 0.5:
                    continue
                buffer = io.BytesIO()
                region = slide.read_region((x, y), 0, (side, side)).convert("RGB")
                region.save(buffer, "JPEG", quality=QUALITY)
                member = tarfile.TarInfo(f"{x}_{y}.jpg")
                member.size = buffer.tell()
                buffer.seek(0)
                tar.addfile(member, buffer)
                count += 1
    return count


def _plain_mask(slide: openslide.OpenSlide) -> NDArray[np.bool_]:
    thumbnail = np.asarray(slide.get_thumbnail((_MASK_PX, _MASK_PX)).convert("RGB"))
    saturation = cv2.medianBlur(cv2.cvtColor(thumbnail, cv2.COLOR_RGB2HSV)[..., 1], 7)
    return np.asarray(saturation > _LEAST_SATURATION)
