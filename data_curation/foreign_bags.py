"""Files of features that other programs wrote, one a slide, each in its own frame of coordinates.

==========  ==========================================================================
layout      what a file holds
==========  ==========================================================================
trident     ``features`` [N, D], ``coords`` [N, 2] in level-0 pixels with patch_size,
            patch_size_level0, overlap (in pixels of the tile) as attributes; ours too
clam        the same two without patch_size_level0; also with patch_level, downsample
stamp       ``feats`` [N, D], ``coords`` [N, 2] in micrometres, sizes at the root
atlaspatch  ``coords`` [N, 5], ``features/ENCODER`` [N, D], sizes at the root
slide2vec   ``ID.npz`` or ``.pt`` with ``ID.meta.json``, and the tiles' own ``.npz``
==========  ==========================================================================

Here they are told apart and read; `import_bags` decides whether what they say can be. Legend: N
tiles, D features.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import h5py
import numpy as np
import numpy.typing as npt

from eosin.configs.errors import InputError
from eosin.data_curation.weight_files import read_tensor

ForeignLayout: TypeAlias = Literal["trident", "clam", "stamp", "atlaspatch", "slide2vec"]
SUFFIXES = (".h5", ".hdf5", ".npz", ".pt")


@dataclass(frozen=True, kw_only=True)
class ForeignBag:
    """What a file says of one slide; None where it says nothing."""

    path: Path
    layout: ForeignLayout
    features: npt.NDArray[np.floating]
    """[N, D]"""
    coords: npt.NDArray[np.float64]
    """[N, 2], level-0 pixels or micrometres."""
    unit: Literal["px", "um"]
    size_px: float | None = None
    """Side of a tile in its own pixels."""
    footprint_px: float | None = None
    """Side of a tile in level-0 pixels."""
    overlap_px: float | None = None
    """Of neighbours, in pixels of the tile."""
    mpp: float | None = None
    """Of the tile."""
    level0_mpp: float | None = None
    encoder: str | None = None
    encoder_digest: str | None = None
    transform_digest: str | None = None
    pooling: str | None = None
    section: npt.NDArray[np.int32] | None = None
    """Piece of tissue, [N]."""


def read_foreign(path: Path, encoder: str = "") -> ForeignBag:
    """One slide's file.

    Args:
        path: of the file.
        encoder: which features of an AtlasPatch file; needed where it holds several.

    Raises:
        InputError: it is damaged, in no known layout, or its parts do not belong together.
    """
    found = _read(path, encoder)
    shape, n = found.features.shape, len(found.coords)
    pieces = n if found.section is None else len(found.section)
    if len(shape) != 2 or shape[0] != n or pieces != n or not n:
        raise InputError(
            f"{path}: features of shape {list(shape)} and {n} corners do not belong together"
        )
    return found


def _read(path: Path, encoder: str) -> ForeignBag:
    if path.suffix in (".npz", ".pt"):
        return _slide2vec(path)
    with _opened(path) as file:
        if isinstance(file.get("feats"), h5py.Dataset):
            return _stamp(path, file)
        if isinstance(file.get("features"), h5py.Group):
            return _atlaspatch(path, file, encoder)
        if isinstance(file.get("features"), h5py.Dataset):
            return _trident(path, file)
        raise InputError(
            f"{path}: neither 'features' nor 'feats' is in it, but {', '.join(file) or 'nothing'}"
        )


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError) as error:
        raise InputError(f"{path} cannot be read as HDF5: {error}; fetch or write it again") from (
            error
        )


def _trident(path: Path, file: h5py.File) -> ForeignBag:
    said = {**_attributes(file), **_attributes(file["features"])}
    coords = _corners(path, _dataset(path, file, "coords"))
    said |= _attributes(file["coords"])
    footprint, size = _number(said, "patch_size_level0"), _number(said, "patch_size")
    layout: ForeignLayout = "trident"
    if footprint is None:
        layout = "clam"
        footprint = _clam_footprint(said, size)
    section = None
    if "contour_index" in file:
        section = _dataset(path, file, "contour_index").astype(np.int32).reshape(-1) + 1
    return ForeignBag(
        path=path,
        layout=layout,
        features=_dataset(path, file, "features"),
        coords=coords,
        unit="px",
        size_px=size,
        footprint_px=footprint,
        overlap_px=_number(said, "overlap"),
        mpp=_number(said, "mpp"),
        level0_mpp=_number(said, "level0_mpp"),
        encoder=_text(said, "encoder"),
        encoder_digest=_text(said, "encoder_digest"),
        transform_digest=_text(said, "transform_digest"),
        pooling=_text(said, "pooling"),
        section=section,
    )


def _clam_footprint(said: Mapping[str, Any], size: float | None) -> float | None:
    """CLAM's patch_size is in pixels of patch_level, whose downsample it notes."""
    downsample = said.get("downsample")
    if size is None or downsample is None:
        return None
    return size * float(np.asarray(downsample, np.float64).reshape(-1)[0])


def _stamp(path: Path, file: h5py.File) -> ForeignBag:
    said = _attributes(file)
    if _text(said, "unit") not in (None, "um"):
        raise InputError(f"{path}: its unit is '{said['unit']}' and not um: extract it again")
    size, side_um = _number(said, "tile_size_px"), _number(said, "tile_size_um")
    mpp = side_um / size if size and side_um else None
    return ForeignBag(
        path=path,
        layout="stamp",
        features=_dataset(path, file, "feats"),
        coords=_corners(path, _dataset(path, file, "coords")),
        unit="um",
        size_px=size,
        overlap_px=0.0,
        mpp=mpp,
        encoder=_text(said, "extractor"),
        encoder_digest=_text(said, "code_hash"),
    )


def _atlaspatch(path: Path, file: h5py.File, encoder: str) -> ForeignBag:
    there = sorted(file["features"])
    if encoder and encoder not in there:
        raise InputError(f"{path} has no features of '{encoder}', but of {', '.join(there)}")
    if not encoder and len(there) != 1:
        raise InputError(f"{path} has features of {', '.join(there)}: say which with encoder=")
    name = encoder or there[0]
    said = {**_attributes(file), **_attributes(file["features"][name])}
    return ForeignBag(
        path=path,
        layout="atlaspatch",
        features=_dataset(path, file, f"features/{name}"),
        coords=_corners(path, _dataset(path, file, "coords")),
        unit="px",
        size_px=_number(said, "patch_size"),
        footprint_px=_number(said, "patch_size_level0"),
        overlap_px=_number(said, "overlap"),
        mpp=_number(said, "mpp"),
        level0_mpp=_number(said, "level0_mpp"),
        encoder=name,
        encoder_digest=_text(said, "encoder_digest"),
        transform_digest=_text(said, "transform_digest"),
        pooling=_text(said, "pooling"),
    )


def _slide2vec(path: Path) -> ForeignBag:
    said = _json(path.with_name(f"{path.stem}.meta.json"))
    if path.suffix == ".pt":
        features = read_tensor(path).numpy()
    else:
        features = _npz(path, ("features",))["features"]
    listed = _text(said, "coordinates_npz_path")
    if listed is None:
        raise InputError(f"{path}: its meta.json names no coordinates_npz_path")
    beside = path.parent.parent / "tiles" / Path(listed).name  # where a folder has moved
    found = next((p for p in (Path(listed), beside) if p.is_file()), None)
    if found is None:
        raise InputError(f"{path}: neither {listed} nor {beside} is there: where are its tiles?")
    tiles = _npz(found, ())
    if "coordinates" in tiles:
        coords = tiles["coordinates"]
    elif {"x", "y"} <= tiles.keys():
        coords = np.column_stack([tiles["x"], tiles["y"]])
    else:
        raise InputError(f"{found} holds {', '.join(tiles)}, and neither coordinates nor x and y")
    geometry = found.with_name(found.name.removesuffix(".npz") + ".meta.json")
    more = _json(geometry) if geometry.is_file() else {}
    overlap, size = _number(more, "overlap"), _number(said, "requested_tile_size_px")
    return ForeignBag(
        path=path,
        layout="slide2vec",
        features=features,
        coords=_corners(found, coords),
        unit="px",
        size_px=size,
        footprint_px=_number(said, "tile_size_lv0"),
        overlap_px=None if overlap is None or size is None else overlap * size,
        mpp=_number(said, "requested_spacing_um"),
        level0_mpp=_number(more, "base_spacing_um"),
        encoder=_text(said, "encoder_name"),
        encoder_digest=_text(said, "encoder_digest"),
        transform_digest=_text(said, "transform_digest"),
    )


def _corners(path: Path, values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The first two columns, x and y, [N, 2]."""
    if values.ndim != 2 or values.shape[1] < 2 or values.dtype.kind not in "iuf":
        raise InputError(f"{path}: corners of shape {list(values.shape)} are not x and y of tiles")
    return values[:, :2].astype(np.float64)


def _dataset(path: Path, file: h5py.File, name: str) -> npt.NDArray[Any]:
    found = file.get(name)
    if not isinstance(found, h5py.Dataset):
        raise InputError(f"{path} has no '{name}', but {', '.join(file)}")
    values: npt.NDArray[Any] = found[()]
    return values


def _npz(path: Path, wanted: tuple[str, ...]) -> dict[str, npt.NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read: {error}; fetch or write it again") from error
    missing = [name for name in wanted if name not in found]
    if missing:
        raise InputError(f"{path} has no '{missing[0]}', but {', '.join(found)}")
    return found


def _json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} is missing, which says what the features beside it are") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, Mapping):
        raise InputError(f"{path} holds a {type(found).__name__}, not an object of names")
    return found


def _attributes(item: h5py.HLObject) -> dict[str, Any]:
    return dict(item.attrs)


def _number(said: Mapping[str, Any], name: str) -> float | None:
    """A number; None for none, and for TRIDENT's word "None"."""
    value = said.get(name)
    if value is None or _text(said, name) == "None":
        return None
    try:
        found = float(np.asarray(value).reshape(-1)[0])
    except (ValueError, TypeError, IndexError):
        return None
    return found if np.isfinite(found) else None


def _text(said: Mapping[str, Any], name: str) -> str | None:
    value = said.get(name)
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    return None if value is None or str(value) in ("", "None") else str(value)
