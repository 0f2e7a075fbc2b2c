"""Features of a slide as HDF5, in the keys that slide-level code in circulation reads.

``features`` [N, D] and ``coords`` [N, 2] (level-0 pixels, top left) are what TRIDENT and CLAM
write, and what MOOZY, TITAN, GigaPath, CARE, MADELEINE, PRISM and CHIEF are run on; the attributes
of both stand on ``coords``. The bytes depend on the values alone.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

STAMP_VERSION = "2.3.0"
"""Whose layout `write_stamp` has."""
ON_ROOT = (
    "patch_size", "patch_size_level0", "level0_magnification", "target_magnification", "overlap",
    "level0_width", "level0_height", "mpp", "level0_mpp",
)  # fmt: skip
ON_FEATURES = ("name", "encoder", "encoder_digest", "transform_digest", "pooling")


def write_h5(
    path: Path,
    features: npt.NDArray[np.floating],
    patch_tokens: npt.NDArray[np.floating] | None,
    coords: npt.NDArray[np.int64],
    attributes: Mapping[str, Any],
    contour_index: npt.NDArray[np.int32] | None = None,
) -> None:
    """Writes one slide.

    Args:
        path: of the file.
        features: [N, D].
        patch_tokens: [N, rows, columns, D]; None: no such key.
        coords: [N, 2].
        attributes: of tiles and encoder; those that are None are left out, as nobody reads them
            alike.
        contour_index: piece of tissue of each tile, [N], from 0, as EXAONE-Path reads it; None: no
            such key.
    """
    known = {name: value for name, value in attributes.items() if value is not None}
    with h5py.File(path, "w", libver="v108", track_order=False) as file:
        arrays: dict[str, npt.NDArray[Any]] = {"features": features, "coords": coords}
        if patch_tokens is not None:
            arrays["patch_tokens"] = patch_tokens
        if contour_index is not None:
            arrays["contour_index"] = contour_index
        made = {
            name: file.create_dataset(name, data=values, track_times=False)
            for name, values in arrays.items()
        }
        for name, value in known.items():
            made["coords"].attrs[name] = value
            if name in ON_FEATURES:
                made["features"].attrs[name] = value


def write_stamp(
    path: Path,
    features: npt.NDArray[np.floating],
    corners_um: npt.NDArray[np.float64],
    attributes: Mapping[str, Any],
) -> None:
    """Writes one slide as STAMP reads it: ``feats`` and ``coords`` in micrometres.

    Args:
        path: of the file.
        features: [N, D].
        corners_um: top left corners, x and y, [N, 2].
        attributes: as for `write_h5`.
    """
    size_px, mpp = int(attributes["patch_size"]), float(attributes["mpp"])
    with h5py.File(path, "w", libver="v108", track_order=False) as file:
        file.create_dataset("feats", data=features, track_times=False)
        file.create_dataset("coords", data=corners_um, track_times=False)
        for name, value in {
            "unit": "um",
            "tile_size_um": size_px * mpp,
            "tile_size_px": size_px,
            "extractor": str(attributes["encoder"]),
            "feat_type": "tile",
            "stamp_version": STAMP_VERSION,
            "code_hash": str(attributes["encoder_digest"]),
        }.items():
            file.attrs[name] = value


def write_atlaspatch(
    path: Path,
    features: npt.NDArray[np.floating],
    coords: npt.NDArray[np.int64],
    attributes: Mapping[str, Any],
) -> None:
    """Writes one slide as AtlasPatch keeps it: ``coords`` [N, 5] and ``features/ENCODER``.

    The columns of ``coords`` are x, y, width, height and pyramid level of what is read; a tile can
    always be read from level 0, so that is what they say. Attributes stand at the root, and those
    that it reads as whole numbers are rounded.

    Args:
        path: of the file.
        features: [N, D].
        coords: [N, 2].
        attributes: as for `write_h5`.
    """
    level0_px = int(attributes["patch_size_level0"])
    read = np.broadcast_to(np.array([level0_px, level0_px, 0]), (len(coords), 3))
    name = re.sub(r"[^a-z0-9_.-]+", "_", str(attributes["encoder"]).lower()).strip("_")
    with h5py.File(path, "w", libver="v108", track_order=False) as file:
        rows = np.concatenate([coords, read], axis=1).astype(np.int32)
        file.create_dataset("coords", data=rows, track_times=False)
        made = file.create_dataset(
            f"features/{name}", data=features.astype(np.float32), track_times=False
        )
        made.attrs["embedding_dim"] = features.shape[1]
        for key in ("encoder_digest", "transform_digest", "pooling"):
            made.attrs[key] = str(attributes[key])
        file.attrs["num_patches"] = len(coords)
        for key, value in attributes.items():
            if key in ON_ROOT and value is not None:
                file.attrs[key] = max(1, round(value)) if "magnification" in key else value
