"""Bags of our own tiles and features: what `eosin extract` adds to a store of features."""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from eosin.configs.errors import InputError
from eosin.data_curation.bag_store import SlideBag, write_bags
from eosin.data_curation.features import FeatureStore, has_features
from eosin.launch.artefacts import stamp_of

FORMAT = 1
"""Raised when the same features would be packed otherwise."""


def pack_store(
    folder: Path, store: FeatureStore, slides: Mapping[str, Mapping[str, Any]], cells: pa.Table
) -> None:
    """Writes the bags of a store, where they are not there.

    Args:
        folder: of the bags.
        store: whose rows lie slide by slide.
        slides: rows of ``slides.parquet`` by slide_id.
        cells: ``tiles.parquet``, which the features are of.

    Raises:
        InputError: the features are patch tokens, or lie otherwise.
    """
    if store.meta.get("token_grid") is not None:
        raise InputError("bags hold one vector a tile, and these features are grids: leave @tokens")
    stamp = stamp_of(format=FORMAT, store=store.meta["stamp"])
    if has_features(folder, stamp):
        return
    names = ("encoder", "encoder_digest", "transform_digest", "pooling")
    meta = {name: store.meta.get(name) for name in names}
    dim = int(store.features.shape[1])
    write_bags(folder, _bags(store, slides, cells), dim, stamp, {**meta, "layout": "eosin"})
    assert store.offsets is not None
    print(f"{len(store.offsets) - 1} bags → {folder}")


def tiles_of(rows: pa.Table, cells: pa.Table) -> pa.Table:
    """The cells of one slide that features were made of, in the features' order.

    Args:
        rows: of a store of features, of that slide.
        cells: of ``tiles.parquet``, likewise.
    """
    place = {name: at for at, name in enumerate(cells["tile_id"].to_pylist())}
    return cells.take([place[name] for name in rows["tile_id"].to_pylist()])


def _bags(
    store: FeatureStore, slides: Mapping[str, Mapping[str, Any]], cells: pa.Table
) -> Iterator[SlideBag]:
    if store.offsets is None:
        raise InputError("these features do not lie slide by slide: they are no bags")
    for start, stop in itertools.pairwise(store.offsets.tolist()):
        rows = store.rows.slice(start, stop - start)
        slide_id = rows["slide_id"][0].as_py()
        own = tiles_of(rows, cells.filter(pc.equal(cells["slide_id"], slide_id)))
        level0_mpp = float(slides[slide_id]["mpp_x"])
        size_px, mpp = own["size_px"][0].as_py(), own["requested_mpp"][0].as_py()
        yield SlideBag(
            slide_id=slide_id,
            group=rows["group"][0].as_py(),
            stain=rows["stain"][0].as_py(),
            features=np.asarray(store.features[start:stop]),
            corner_px=np.column_stack([rows["level0_x"], rows["level0_y"]]),
            cells=np.column_stack([own["column"], own["row"]]).astype(np.int32),
            origin=np.ones(stop - start, np.int32),
            section=own["section"].fill_null(0).to_numpy().astype(np.int32),
            tile_ids=rows["tile_id"].to_pylist(),
            mpp=float(mpp),
            size_px=int(size_px),
            footprint_px=float(size_px * mpp / level0_mpp),
            level0_mpp=level0_mpp,
        )
