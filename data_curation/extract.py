"""The verb `extract`: slides to one file of features each, as others' slide-level code reads them.

Tiles and features are those of `eosin tile` and `eosin embed`, in ``tiles/`` and ``store/`` of the
folder: resumable, the same for any number of processes. Then each slide is written in the layouts
that are asked for. A file is made anew when its tiles, its encoder or its layout changed; a killed
command goes on, and ends with the same bytes. Legend: N tiles of a slide, D features.
"""

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eosin.configs.errors import InputError
from eosin.data_curation.bag_packing import pack_store, tiles_of
from eosin.data_curation.embed_config import EmbedConfig, EmbedOptions
from eosin.data_curation.embed_tiles import WAIT_S, embed_among
from eosin.data_curation.embed_tiles import plan as plan_embed
from eosin.data_curation.encoder import load_encoder
from eosin.data_curation.features import FeatureStore, open_features
from eosin.data_curation.h5_bags import write_atlaspatch, write_h5, write_stamp
from eosin.data_curation.manifest import SLIDES, TILES, read_table
from eosin.data_curation.npz_bags import write_slide2vec
from eosin.data_curation.tiles import TileConfig, TileOptions, tile
from eosin.data_curation.tiles import plan as plan_tiles
from eosin.launch.artefacts import is_done, mark_done, replacing, stamp_of
from eosin.launch.process import choose_device, join_world
from eosin.launch.progress import Meter

FORMAT = 2
"""Raised when the same features would be written otherwise."""

LayoutName: TypeAlias = Literal["h5", "stamp", "atlaspatch", "slide2vec", "parquet", "zarr", "bags"]
FILES = {
    "h5": "h5/{}.h5",
    "stamp": "stamp/{}.h5",
    "atlaspatch": "atlaspatch/patches/{}.h5",
    "slide2vec": "slide2vec/tile_embeddings/{}.npz",
    "parquet": "parquet/{}.parquet",
    "zarr": "zarr/{}.zarr",
}
"""Of a slide, by layout."""
BAGS = "bags"
"""Folder of the layout that has no files of slides."""
NumberName: TypeAlias = Literal["float32", "float16"]


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Slides, or tiles of them, to features per slide."""

    encoder: str
    """As for `eosin embed`: a run or encoder folder, timm:NAME, published:NAME, …; with ``@cls``,
    ``@mean``, ``@clsmean``, ``@cls4`` (class tokens of the last four blocks) or ``@tokens`` (class
    token, and patch tokens under a key of their own)."""
    out: Path
    """Folder; each layout has a folder of its own in it, such as ``h5/SLIDE.h5``."""
    slides: Path | None = None
    """A folder of slides, one slide, or a CSV table of slides (see `eosin tile --help`)."""
    tiles: Path | None = None
    """Instead of `slides`: a folder that `eosin tile` or `eosin curate` wrote."""
    layouts: list[LayoutName] = field(default_factory=lambda: ["h5"])
    """h5: what TRIDENT and CLAM write; stamp: STAMP's, in micrometres; atlaspatch, slide2vec: as
    those write (``patches/SLIDE.h5``; ``tile_embeddings/SLIDE.npz`` and ``tiles/``); parquet: a row
    a tile; zarr: chunked arrays (needs zarr); bags: one store of all slides in blocks, as
    `eosin bags` makes it."""
    dtype: NumberName = "float32"
    """Of features in the files, which hold the float16 of the store either way: most code expects
    float32."""
    tile: TileOptions = field(default_factory=TileOptions)
    """How slides are cut, e.g. tile.mpp=0.5 tile.size_px=256."""
    embed: EmbedOptions = field(default_factory=EmbedOptions)
    """How tiles are embedded, e.g. embed.batch_size=256; `encoder` says by what."""

    def __post_init__(self) -> None:
        """Refuses no slides, or slides twice."""
        if (self.slides is None) == (self.tiles is None):
            raise ValueError("give slides, or tiles of a folder that 'eosin tile' wrote")
        if self.embed.encoder not in ("", self.encoder):
            raise ValueError(f"embed.encoder={self.embed.encoder} is not encoder={self.encoder}")
        if not self.layouts:
            raise ValueError(f"layouts=[]: name some of {', '.join(FILES)}, bags")


@dataclass(frozen=True)
class SlideFeatures:
    """What is written of a slide."""

    slide_id: str
    tile_ids: list[str]
    features: npt.NDArray[np.floating]
    """[N, D]"""
    patch_tokens: npt.NDArray[np.floating] | None
    """[N, rows, columns, D]"""
    coords: npt.NDArray[np.int64]
    """Top left corners in level-0 pixels, x and y, [N, 2], rounded."""
    corners_um: npt.NDArray[np.float64]
    """Likewise, exact, in micrometres."""
    tissue: npt.NDArray[np.float32]
    """Fraction of each tile, [N]; NaN where it was not measured."""
    section: npt.NDArray[np.int32]
    """Piece of tissue that each tile is of, [N], from 1; 0: none."""
    attributes: dict[str, Any]
    """Of the tiles and the encoder; None is left out."""


def plan(config: ExtractConfig) -> str:
    """What `extract` would do: the tiling, or, where that is done, the features and their time."""
    layouts = f"then a file a slide in {', '.join(config.layouts)} → {config.out}"
    if config.slides is not None and not (config.out / "tiles" / "tiles.parquet").is_file():
        tiling = TileConfig(slides=config.slides, out=config.out / "tiles", **config.tile.__dict__)
        return f"{plan_tiles(tiling)}\nthen features by {config.encoder}, {layouts}"
    options = {**config.embed.__dict__, "encoder": config.encoder}
    tiles = config.tiles or config.out / "tiles"
    return f"{plan_embed(EmbedConfig(tiles=tiles, out=config.out / 'store', **options))}\n{layouts}"


def extract(config: ExtractConfig) -> None:
    """Tiles, embeds and writes what is not done yet; as one process, or several that share it.

    Raises:
        InputError: no such slides or encoder, or a layout that needs a library.
        TooManyFailedError: see `eosin tile` and `eosin embed`.
    """
    tiles = config.tiles or config.out / "tiles"
    device = choose_device(config.embed.device)
    with join_world(device, timeout_s=WAIT_S) as world:
        if world.leads and config.slides is not None:
            load_encoder(config.encoder, device)  # a name that is none is said before the tiling
            tile(TileConfig(slides=config.slides, out=tiles, **config.tile.__dict__))
        world.barrier()
        options = {**config.embed.__dict__, "encoder": config.encoder}
        embed_among(EmbedConfig(tiles=tiles, out=config.out / "store", **options), device, world)
        if world.leads:
            _write_all(config, tiles, open_features(config.out / "store"))
        world.barrier()


def _write_all(config: ExtractConfig, tiles: Path, store: FeatureStore) -> None:
    slides = {
        row["slide_id"]: row for row in read_table(tiles / "slides.parquet", SLIDES).to_pylist()
    }
    cells = read_table(tiles / "tiles.parquet", TILES)
    if store.offsets is None:
        raise InputError(f"{config.out / 'store'} does not lie slide by slide; remove it")
    written = 0
    if "bags" in config.layouts:
        pack_store(config.out / BAGS, store, slides, cells)
    layouts = [layout for layout in config.layouts if layout != "bags"]
    if not layouts:
        return
    with Meter("write", len(store.offsets) - 1, "slides") as meter:
        for found in _slides(config, store, slides, cells):
            for layout in layouts:
                written += _write(config, layout, found, str(store.meta["stamp"]))
            meter.advance(1, found.slide_id)
    print(
        f"{len(store.offsets) - 1} slides in {', '.join(layouts)} ({written} files written "
        f"now) → {config.out}"
    )


def _slides(
    config: ExtractConfig, store: FeatureStore, slides: dict[str, dict[str, Any]], cells: pa.Table
) -> Iterator[SlideFeatures]:
    assert store.offsets is not None
    grid = store.meta.get("token_grid")
    for start, stop in itertools.pairwise(store.offsets.tolist()):
        rows = store.rows.slice(start, stop - start)
        slide_id = rows["slide_id"][0].as_py()
        slide = slides[slide_id]
        own = cells.filter(pc.equal(cells["slide_id"], slide_id))
        size_px, mpp = own["size_px"][0].as_py(), own["requested_mpp"][0].as_py()
        features = np.asarray(store.features[start:stop]).astype(config.dtype)
        patches = None
        if grid is not None:
            dim = features.shape[1] // (1 + grid[0] * grid[1])
            patches = features[:, dim:].reshape(-1, *grid, dim)
            features = np.ascontiguousarray(features[:, :dim])
        kept = tiles_of(rows, own)
        corners = np.stack([rows["level0_x"].to_numpy(), rows["level0_y"].to_numpy()], axis=1)
        level0_px = round(size_px * mpp / slide["mpp_x"])
        yield SlideFeatures(
            slide_id=slide_id,
            tile_ids=rows["tile_id"].to_pylist(),
            features=features,
            patch_tokens=patches,
            coords=np.round(corners).astype(np.int64),
            corners_um=corners * np.array([slide["mpp_x"], slide["mpp_y"]]),
            tissue=kept["tissue_fraction"].to_numpy().astype(np.float32),
            section=kept["section"].fill_null(0).to_numpy().astype(np.int32),
            attributes={
                "name": slide_id,
                "patch_size": size_px,
                "patch_size_level0": level0_px,
                "patch_level": 0,
                "downsample": [level0_px / size_px, level0_px / size_px],
                "level0_magnification": _magnification(slide["mpp_x"]),
                "target_magnification": _magnification(mpp),
                "overlap": _overlap_px(own, size_px, level0_px),
                "level0_width": slide["width_px"],
                "level0_height": slide["height_px"],
                "mpp": mpp,
                "level0_mpp": slide["mpp_x"],
                "encoder": store.meta["encoder"],
                "encoder_digest": store.meta["encoder_digest"],
                "transform_digest": store.meta["transform_digest"],
                "pooling": store.meta["pooling"],
            },
        )


def _overlap_px(own: pa.Table, size_px: int, level0_px: int) -> int:
    """Of neighbouring cells of a slide, in pixels of the tile."""
    columns, x = own["column"].to_numpy(), own["level0_x"].to_numpy()
    first, last = int(columns.argmin()), int(columns.argmax())
    if columns[first] == columns[last]:
        columns, x = own["row"].to_numpy(), own["level0_y"].to_numpy()
        first, last = int(columns.argmin()), int(columns.argmax())
    if columns[first] == columns[last]:
        return 0  # one cell alone
    step = (x[last] - x[first]) / (columns[last] - columns[first])
    return round(size_px * (1 - float(step) / level0_px))


def _magnification(mpp: float) -> int | float:
    """What 10 / mpp is called: 40 at 0.25 µm/px; a whole number where it is within 3 % of one."""
    exact = 10 / mpp
    whole = max(1, round(exact))
    return whole if abs(exact - whole) <= 0.03 * whole else round(exact, 2)


def _write(config: ExtractConfig, layout: str, found: SlideFeatures, store: str) -> int:
    """Writes a slide in one layout, where it is not there; how many files were written."""
    path = config.out / FILES[layout].format(found.slide_id)
    marker = config.out / layout / ".done" / f"{found.slide_id}.json"
    stamp = stamp_of(format=FORMAT, store=store, dtype=config.dtype, coords=found.coords.tolist(),
                     attributes={k: str(v) for k, v in found.attributes.items()})  # fmt: skip
    if path.exists() and is_done(marker, stamp):
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    marker.parent.mkdir(exist_ok=True)
    if layout == "h5":
        with replacing(path) as partial:
            write_h5(
                partial, found.features, found.patch_tokens, found.coords, found.attributes,
                found.section - 1 if found.section.all() else None,
            )  # fmt: skip
    elif layout == "stamp":
        with replacing(path) as partial:
            write_stamp(partial, found.features, found.corners_um, found.attributes)
    elif layout == "atlaspatch":
        with replacing(path) as partial:
            write_atlaspatch(partial, found.features, found.coords, found.attributes)
    elif layout == "slide2vec":
        write_slide2vec(
            config.out / layout, found.slide_id, found.features, found.coords, found.tissue,
            found.attributes,
        )  # fmt: skip
    elif layout == "parquet":
        with replacing(path) as partial:
            pq.write_table(_table(found), partial, compression="zstd")
    else:
        _write_zarr(path, found)
    mark_done(marker, stamp, tiles=len(found.tile_ids))
    return 1


def _table(found: SlideFeatures) -> pa.Table:
    def lists(values: npt.NDArray[np.floating]) -> pa.Array:
        flat = pa.array(values.reshape(-1))
        return pa.FixedSizeListArray.from_arrays(flat, values[0].size)

    columns: dict[str, Any] = {
        "tile_id": found.tile_ids,
        "x": found.coords[:, 0],
        "y": found.coords[:, 1],
        "features": lists(found.features),
    }
    if found.patch_tokens is not None:
        columns["patch_tokens"] = lists(found.patch_tokens)
    known = {k: str(v) for k, v in found.attributes.items() if v is not None}
    return pa.table(columns).replace_schema_metadata(known)


def _write_zarr(path: Path, found: SlideFeatures) -> None:
    try:
        import zarr
    except ImportError as error:
        raise InputError("layouts=[zarr] needs zarr: pip install 'eosin[zarr]'") from error
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    group = zarr.open_group(str(partial), mode="w")
    arrays: dict[str, npt.NDArray[Any]] = {"features": found.features, "coords": found.coords}
    if found.patch_tokens is not None:
        arrays["patch_tokens"] = found.patch_tokens
    for name, values in arrays.items():
        group.create_array(name, data=values, chunks=(min(len(values), 4096), *values.shape[1:]))
    known = {k: v for k, v in found.attributes.items() if v is not None}
    group.attrs.update({**known, "tile_ids": found.tile_ids})
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)
