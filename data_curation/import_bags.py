"""The verb `bags`: files of features that anyone wrote, to bags that are one slide's tiles each.

What a file says of itself must hold together: as many corners as features, a scale, a lattice on
which its tiles can lie, a place of its own for each, one encoder and transform for all files. What
does not is refused by name, for an embedding of the wrong places looks like any other. Legend: N
tiles of a slide, D features.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eosin.configs.errors import InputError
from eosin.data_curation.bag_lattice import Lattice, find_lattice
from eosin.data_curation.bag_store import SlideBag, write_bags
from eosin.data_curation.features import has_features
from eosin.data_curation.foreign_bags import SUFFIXES, ForeignBag, read_foreign
from eosin.data_curation.images import read_text_table
from eosin.data_curation.manifest import make_id, make_tile_id
from eosin.launch.artefacts import stamp_of
from eosin.launch.progress import Meter

FORMAT = 1
"""Raised when the same files would be imported otherwise."""
ROUNDED_PX = 0.5
"""By which a footprint in whole pixels may miss the exact one."""
SCALES_AGREE = 0.02
"""Relative difference of a tile's scale by its sizes and as it is said."""


@dataclass(frozen=True, kw_only=True)
class BagsConfig:
    """Others' files of features, or ours, to a store of bags."""

    files: Path
    """A folder of files of TRIDENT, CLAM, STAMP, AtlasPatch or slide2vec, one a slide (also in
    folders in it), or one such file; `eosin extract` writes any of them."""
    out: Path
    """Folder of the bags: a feature store that `eosin eval bags` takes."""
    table: Path | None = None
    """CSV with slide (the file's name without its ending), and what else is known: group
    (patient), stain, mpp (of level 0). Slides that it does not name are left out."""
    encoder: str = ""
    """Which features of files that hold several; a name for those of files that name none."""
    mpp: float | None = None
    """µm/px of the tiles, where the files do not say it (TRIDENT names a magnification alone)."""
    size_px: int | None = None
    """Side of a tile in its own pixels, where the files do not say it (CLAM)."""
    footprint_px: float | None = None
    """Side of a tile in level-0 pixels, likewise."""
    overlap_px: float | None = None
    """Of neighbouring tiles in their own pixels, likewise; 0 where nothing says otherwise."""
    sparse: bool = False
    """Tiles may lie several footprints apart everywhere (a sample of a slide's tiles)."""
    leave_out_zeros: bool = False
    """Leave out rows of zeros, which some programs write where there is no tile."""

    def __post_init__(self) -> None:
        """Refuses sizes that are none."""
        for name in ("mpp", "size_px", "footprint_px"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}={value} must be greater than 0")


@dataclass(frozen=True)
class _Known:
    """What the table says of a slide."""

    group: str
    stain: str | None
    level0_mpp: float | None


def plan(config: BagsConfig) -> str:
    """Which files would be read."""
    files = list_files(config)
    size = sum(path.stat().st_size for path in files.values())
    such = next(iter(files.values()))
    return f"{len(files)} slides, {size / 1e9:.2f} GB of files, such as {such} → {config.out}"


def make_bags(config: BagsConfig) -> None:
    """Reads every file, checks it, and writes the store; nothing where that is done.

    Raises:
        InputError: no files, or one that says what cannot be.
    """
    files = list_files(config)
    known = _read_table(config.table)
    stamp = stamp_of(
        format=FORMAT,
        files=[[n, p.stat().st_size, p.stat().st_mtime_ns] for n, p in files.items()],
        table={name: vars(value) for name, value in known.items()},
        options={k: str(v) for k, v in vars(config).items() if k not in ("files", "out", "table")},
    )
    if has_features(config.out, stamp):
        print(f"{len(files)} slides are there already → {config.out}")
        return
    first = read_foreign(next(iter(files.values())), config.encoder)
    meta = {
        "encoder": config.encoder or first.encoder or "",
        "encoder_digest": first.encoder_digest,
        "transform_digest": first.transform_digest,
        "pooling": first.pooling or "unknown",
        "layout": first.layout,
    }
    with Meter("bags", len(files), "slides") as meter:
        bags = _checked(config, files, known, first, meter)
        store = write_bags(config.out, bags, first.features.shape[1], stamp, meta)
    sizes = np.diff(store.offsets)
    print(
        f"{len(sizes)} bags of {sizes.min()} to {sizes.max()} tiles, {store.dim} features of "
        f"{meta['encoder'] or 'an unnamed encoder'} → {config.out}"
    )


def list_files(config: BagsConfig) -> dict[str, Path]:
    """The file of each slide, by slide_id, in their order.

    Raises:
        InputError: none, or two of one slide, or a table that names others.
    """
    root = config.files
    if not root.exists():
        raise InputError(f"files={root} does not exist")
    found = [root] if root.is_file() else sorted(p for p in root.rglob("*") if _is_bag(p))
    if not found:
        raise InputError(f"{root} holds no files that end in {', '.join(SUFFIXES)}")
    files: dict[str, Path] = {}
    for path in found:
        slide_id = make_id(path.stem)
        if slide_id in files:
            raise InputError(
                f"{files[slide_id]} and {path} are of one slide, {slide_id}: give the folder of "
                "one encoder and size alone"
            )
        files[slide_id] = path
    if config.table is None:
        return dict(sorted(files.items()))
    named = _read_table(config.table)
    lost = sorted(named.keys() - files.keys())
    if lost:
        raise InputError(f"{config.table} names {len(lost)} slides without a file: {lost[0]}, …")
    return {name: path for name, path in sorted(files.items()) if name in named}


def _is_bag(path: Path) -> bool:
    inside = path.name.startswith(".") or path.name.endswith(".coordinates.npz")
    return path.is_file() and path.suffix in SUFFIXES and not inside


def _read_table(path: Path | None) -> dict[str, _Known]:
    if path is None:
        return {}
    table = read_text_table(path, ("slide",))
    found: dict[str, _Known] = {}
    for row in table.to_pylist():
        slide_id = make_id(row["slide"])
        if slide_id in found:
            raise InputError(f"{path}: slide '{row['slide']}' stands in it twice")
        level0 = row.get("mpp")
        try:
            level0_mpp = float(level0) if level0 else None
        except ValueError:
            raise InputError(f"{path}: mpp of {row['slide']} is '{level0}', no number") from None
        found[slide_id] = _Known(row.get("group") or slide_id, row.get("stain") or None, level0_mpp)
    return found


def _checked(
    config: BagsConfig,
    files: dict[str, Path],
    known: dict[str, _Known],
    first: ForeignBag,
    meter: Meter,
) -> Iterator[SlideBag]:
    for slide_id, path in files.items():
        found = read_foreign(path, config.encoder)
        _refuse_others(first, found)
        yield to_bag(found, slide_id, known.get(slide_id), config)
        meter.advance(1, slide_id)


def _refuse_others(first: ForeignBag, found: ForeignBag) -> None:
    """Refuses features of another encoder, transform or kind than those of the first file."""
    for name in ("layout", "encoder", "encoder_digest", "transform_digest", "pooling"):
        ours, theirs = getattr(first, name), getattr(found, name)
        if ours != theirs:
            raise InputError(
                f"{found.path}: its {name.replace('_', ' ')} is {theirs}, and {ours} in "
                f"{first.path}: bags hold the features of one encoder"
            )
    dims = found.features.shape[1:], first.features.shape[1:]
    if dims[0] != dims[1]:
        raise InputError(f"{found.path}: {dims[0]} features a tile, and {dims[1]} in {first.path}")


def to_bag(found: ForeignBag, slide_id: str, known: _Known | None, config: BagsConfig) -> SlideBag:
    """A file's slide, after all checks.

    Raises:
        InputError: what it says cannot be, or says too little.
    """
    found = _without_zeros(found, config.leave_out_zeros)
    size = config.size_px or found.size_px
    if size is None:
        raise InputError(f"{found.path} says no patch_size: give size_px=, the tile's side")
    mpp, footprint, level0_mpp = _scales(found, known, config, size)
    corners = found.coords / level0_mpp if found.unit == "um" else found.coords
    lattice, footprint = _lattice(found, corners, footprint, size * mpp / level0_mpp, size, config)
    places = corners.tolist()
    section = found.section if found.section is not None else lattice.origin
    tile_ids = [make_tile_id(slide_id, x, y, mpp) for x, y in places]
    return SlideBag(
        slide_id=slide_id,
        group=slide_id if known is None else known.group,
        stain=None if known is None else known.stain,
        features=found.features,
        corner_px=corners,
        cells=lattice.cells,
        origin=lattice.origin,
        section=section.astype(np.int32),
        tile_ids=tile_ids,
        mpp=mpp,
        size_px=round(size),
        footprint_px=footprint,
        level0_mpp=level0_mpp,
    )


def _lattice(
    found: ForeignBag,
    corners: npt.NDArray[np.float64],
    stated: float,
    exact: float,
    size: float,
    config: BagsConfig,
) -> tuple[Lattice, float]:
    """The lattice, and the footprint that it has.

    A footprint is often said in whole pixels where the grid had exact ones, whose corners were then
    rounded. Of the two, that counts which leaves fewer pieces with an origin of their own.
    """
    overlap = config.overlap_px if config.overlap_px is not None else found.overlap_px or 0.0
    if not 0 <= overlap < size:
        raise InputError(f"{found.path}: tiles of {size:g} px cannot overlap by {overlap:g} px")
    sides = [stated] + [exact] * (0 < abs(exact - stated) <= ROUNDED_PX)
    lattices, errors = list[tuple[Lattice, float]](), list[InputError]()
    for side in sides:
        step = side * (size - overlap) / size
        try:
            lattice = find_lattice(corners, side, step, str(found.path), config.sparse)
            lattices.append((lattice, side))
        except InputError as error:
            errors.append(error)
    if not lattices:
        raise errors[0]
    return min(lattices, key=lambda of: int(of[0].origin.max()))


def _scales(
    found: ForeignBag, known: _Known | None, config: BagsConfig, size: float
) -> tuple[float, float, float]:
    """µm/px of the tile, its side in level-0 pixels, µm/px of level 0: any two give the third."""
    level0 = found.level0_mpp or (known.level0_mpp if known is not None else None)
    footprint = config.footprint_px or found.footprint_px
    mpp = config.mpp or found.mpp
    if found.unit == "um":
        if mpp is None:
            raise InputError(f"{found.path} says no tile_size_um: give mpp=, and size_px=")
        level0 = level0 or mpp  # pixels of the tile's own scale, where level 0 is not known
        return mpp, size * mpp / level0, level0
    if mpp is None and level0 is not None and footprint is not None:
        mpp = footprint * level0 / size
    if mpp is None:
        raise InputError(
            f"{found.path} names no mpp (a magnification is no scale): give mpp=, the µm/px of its "
            "tiles, or table= with the mpp of level 0"
        )
    if footprint is None and level0 is not None:
        footprint = size * mpp / level0
    if footprint is None:
        raise InputError(
            f"{found.path} does not say how large a tile is on level 0: give footprint_px=, or "
            "table= with the mpp of level 0"
        )
    if level0 is None:
        level0 = mpp * size / footprint
    if abs(footprint * level0 / size / mpp - 1) > SCALES_AGREE:
        raise InputError(
            f"{found.path}: tiles of {size:g} px at {mpp:g} µm/px cover {size * mpp:g} µm, and "
            f"{footprint:g} level-0 px of {level0:g} µm are {footprint * level0:g} µm: one of them "
            "is of another level"
        )
    return mpp, footprint, level0


def _without_zeros(found: ForeignBag, leave_out: bool) -> ForeignBag:
    """Refuses features that are no numbers; rows of zeros as it is told."""
    features, n = found.features, len(found.coords)
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise InputError(f"{found.path}: {len(bad)} rows are not finite, first row {bad[0]}")
    zero = np.asarray(~features.any(axis=1))
    if not zero.any():
        return found
    if not leave_out:
        raise InputError(
            f"{found.path}: {int(zero.sum())} of {n} rows are zero, first row "
            f"{int(np.flatnonzero(zero)[0])}: no tile has such features; with leave_out_zeros=true "
            "they are taken for what was no tile"
        )
    if zero.all():
        raise InputError(f"{found.path}: every row is zero")
    changes: dict[str, Any] = {"features": features[~zero], "coords": found.coords[~zero]}
    if found.section is not None:
        changes["section"] = found.section[~zero]
    return ForeignBag(**{**vars(found), **changes})
