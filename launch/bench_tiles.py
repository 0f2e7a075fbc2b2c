"""The tiles of `eosin bench data`: made-up H&E, drawn as for `eosin demo`, or shards that exist."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eosin.data_curation.codec import encode_tile
from eosin.data_curation.shards import ShardConfig, shard
from eosin.data_curation.synthetic_layout import TRUTH_DOWNSAMPLE, draw_layout
from eosin.data_curation.synthetic_section import draw_look, render

SECTION_PX = 1024
MPP = 0.5
REGION_UM = 380.0
MIN_TISSUE = 0.5
"""Share of a tile that must be tissue: glass compresses to nothing and decodes in no time."""
JPEG_QUALITY = 90
SHARDS = 4


def made_up_tiles(n_tiles: int, tile_px: int, seed: int) -> Iterator[NDArray[np.uint8]]:
    """Tiles uint8 [tile_px, tile_px, 3] of as many made-up sections as it takes.

    Args:
        n_tiles: number.
        tile_px: side, at most `SECTION_PX`.
        seed: of the sections.
    """
    left, index, across = n_tiles, 0, SECTION_PX // tile_px
    while left:
        layout_rng, look_rng, render_rng = np.random.default_rng([seed, index]).spawn(3)
        layout = draw_layout(
            layout_rng,
            cells=SECTION_PX // TRUTH_DOWNSAMPLE,
            cell_um=TRUTH_DOWNSAMPLE * MPP,
            region_um=REGION_UM,
            artefact_share=0,
        )
        section = render(render_rng, layout, draw_look(look_rng), MPP)
        for place in range(across**2):
            y, x = (tile_px * i for i in divmod(place, across))
            cells = [
                slice(a // TRUTH_DOWNSAMPLE, -(-(a + tile_px) // TRUTH_DOWNSAMPLE)) for a in (y, x)
            ]
            if left and layout.tissue[cells[0], cells[1]].mean() > MIN_TISSUE:
                yield section[y : y + tile_px, x : x + tile_px]
                left -= 1
        index += 1


def made_up_shards(folder: Path, n_tiles: int, tile_px: int, seed: int) -> Path:
    """Shards of `made_up_tiles` as `eosin shard` writes them, below `folder`.

    Raises:
        EosinError: they could not be written.
    """
    images = folder / "tiles"
    images.mkdir()
    for i, tile in enumerate(made_up_tiles(n_tiles, tile_px, seed)):
        (images / f"{i:06d}.jpg").write_bytes(encode_tile(tile, JPEG_QUALITY).data)
    out, records = folder / "shards", -(-n_tiles // SHARDS)
    shard(ShardConfig(images=images, out=out, workers=1, records_per_shard=records))
    return out
