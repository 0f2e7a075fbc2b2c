"""Features of a slide as slide2vec lays them out: ``.npz`` with a JSON file beside each.

``tile_embeddings/ID.npz`` holds the features and ``ID.meta.json`` what they are; the tiles are in
``tiles/ID.coordinates.npz`` and ``ID.coordinates.meta.json`` as hs2p names them, in both of its
spellings (``coordinates``, and ``x`` and ``y``). slide2vec's own ``.pt`` is a pickle, and is not
written. Legend: N tiles, D features.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eosin.launch.artefacts import replacing, write_json

DTYPES = {"float16": "fp16", "float32": "fp32"}


def write_slide2vec(
    folder: Path,
    slide_id: str,
    features: npt.NDArray[np.floating],
    coords: npt.NDArray[np.int64],
    tissue: npt.NDArray[np.float32],
    attributes: Mapping[str, Any],
) -> None:
    """Writes one slide; the features last, so that they are never there without their tiles.

    Args:
        folder: in which its two folders are.
        slide_id: of the slide.
        features: [N, D].
        coords: top left corners in level-0 pixels, [N, 2].
        tissue: fraction of each tile, [N]; NaN where it was not measured.
        attributes: of tiles and encoder, as `h5_bags.write_h5` takes them.
    """
    tiles, embeddings = folder / "tiles", folder / "tile_embeddings"
    for made in (tiles, embeddings):
        made.mkdir(parents=True, exist_ok=True)
    size_px, mpp = int(attributes["patch_size"]), float(attributes["mpp"])
    geometry = {
        "sample_id": slide_id,
        "requested_tile_size_px": size_px,
        "requested_spacing_um": mpp,
        "tile_size_lv0": int(attributes["patch_size_level0"]),
        "read_level": 0,
        "read_tile_size_px": int(attributes["patch_size_level0"]),
        "read_spacing_um": float(attributes["level0_mpp"]),
        "base_spacing_um": float(attributes["level0_mpp"]),
    }
    index = np.arange(len(coords), dtype=np.int32)
    with replacing(tiles / f"{slide_id}.coordinates.npz") as partial, partial.open("wb") as file:
        np.savez(
            file, tile_index=index, coordinates=coords, x=coords[:, 0], y=coords[:, 1],
            tissue_fractions=tissue,
        )  # fmt: skip
    write_json(tiles / f"{slide_id}.coordinates.meta.json", {**geometry, "n_tiles": len(coords)})
    described = {
        **geometry,
        "artifact_type": "tile_embeddings",
        "format": "npz",
        "encoder_level": "tile",
        "encoder_name": str(attributes["encoder"]),
        "encoder_digest": str(attributes["encoder_digest"]),
        "transform_digest": str(attributes["transform_digest"]),
        "feature_dim": features.shape[1],
        "feature_dtype": DTYPES[features.dtype.name],
        "num_tiles": len(features),
        "coordinates_npz_path": f"tiles/{slide_id}.coordinates.npz",
        "coordinates_meta_path": f"tiles/{slide_id}.coordinates.meta.json",
    }
    write_json(embeddings / f"{slide_id}.meta.json", described)
    with replacing(embeddings / f"{slide_id}.npz") as partial, partial.open("wb") as file:
        np.savez(file, features=features, tile_index=index)
