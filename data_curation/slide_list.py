"""Which slides a command is about: a folder, one slide, or a table; each gets its id here."""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eosin.configs.errors import InputError
from eosin.data_curation.images import refuse_repeated
from eosin.data_curation.manifest import INDEX, REFERENCE, SELECTION, SLIDES, TILES, make_id
from eosin.data_curation.slide import SLIDE_SUFFIXES

_DICOM_SERIES_TAG = b"\x20\x00\x0e\x00UI"  # (0020,000E) SeriesInstanceUID, explicit little endian
_DICOM_HEADER_BYTES = 1 << 16

_READ = {"path", "mpp", "mpp_x", "mpp_y", "group", "stain"}
_TABLES = (SLIDES, TILES, SELECTION, INDEX, REFERENCE)
_RESERVED = {name for schema in _TABLES for name in schema.names} | {"identity"}
"""Columns that the tables on the way to the index have already."""


@dataclass(frozen=True, kw_only=True)
class SlideSource:
    """A slide to be read, and what the user says of it."""

    slide_id: str
    path: Path
    """Absolute."""
    mpp: tuple[float, float] | None = None
    """µm per level-0 pixel (x, y) that replaces the file's own."""
    group: str = ""
    """Patient, or whatever must not cross a split; the slide itself by default."""
    stain: str | None = None
    labels: dict[str, str | None] = field(default_factory=dict)
    """The table's other columns (split, organ, …), in its order; None where a cell is empty."""


def list_slides(slides: Path) -> list[SlideSource]:
    """The slides that `slides` names, sorted by id.

    Args:
        slides: a folder (searched with its subfolders for the extensions of OpenSlide's formats; a
            DICOM series is one slide), a slide, or a CSV table with a column `path` (relative to
            the table) and, where wanted, `mpp` or `mpp_x` and `mpp_y`, `group`, `stain`; other
            columns become `labels`.

    Raises:
        InputError: nothing there, a bad table, or two slides of one id.
    """
    if slides.is_dir():
        found = _search(slides)
        if not found:
            known = " ".join(sorted(SLIDE_SUFFIXES))
            raise InputError(f"no slide in {slides} (looked for {known})")
    elif not slides.exists():
        raise InputError(f"{slides} does not exist; give a folder of slides, a slide or a table")
    elif slides.suffix.lower() == ".csv":
        found = _read_table(slides)
    else:
        found = [_source(slides.stem, slides)]
    return sorted(_without_collisions(found), key=lambda source: source.slide_id)


def slide_bytes(path: Path) -> int:
    """Size of a slide on disk; of a MIRAX or DICOM slide with the files beside it."""
    suffix = path.suffix.lower()
    beside: Iterable[Path] = ()
    if suffix == ".mrxs":
        beside = path.with_suffix("").glob("*")
    elif suffix == ".dcm":
        beside = (other for other in path.parent.glob("*") if other != path)
    return path.stat().st_size + sum(other.stat().st_size for other in beside)


def _source(
    name: str,
    path: Path,
    mpp: tuple[float, float] | None = None,
    group: str = "",
    stain: str | None = None,
    labels: dict[str, str | None] | None = None,
) -> SlideSource:
    slide_id = make_id(name)
    return SlideSource(
        slide_id=slide_id,
        path=path.absolute(),
        mpp=mpp,
        group=group or slide_id,
        stain=stain,
        labels=labels or {},
    )


def _search(folder: Path) -> list[SlideSource]:
    found: list[SlideSource] = []
    series: dict[tuple[Path, bytes], Path] = {}
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or path.suffix.lower() not in SLIDE_SUFFIXES or not path.is_file():
            continue
        if path.suffix.lower() == ".dcm":
            series.setdefault((path.parent, _dicom_series(path)), path)
        else:
            found.append(_source(path.stem, path))
    parents = [parent for parent, _ in series]
    for (parent, _), path in series.items():
        alone = parents.count(parent) == 1
        name = parent.absolute().name
        found.append(_source(name if alone else f"{name}_{path.stem}", path))
    return found


def _dicom_series(path: Path) -> bytes:
    """The SeriesInstanceUID, by which the files of one slide know each other."""
    with path.open("rb") as file:
        header = file.read(_DICOM_HEADER_BYTES)
    start = header.find(_DICOM_SERIES_TAG)
    if start < 0:
        return path.name.encode()
    start += len(_DICOM_SERIES_TAG)
    length = int.from_bytes(header[start : start + 2], "little")
    return header[start + 2 : start + 2 + length]


def _read_table(table: Path) -> list[SlideSource]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table} is not a CSV table in UTF-8: {error}") from error
    if "path" not in columns:
        raise InputError(f"{table} has no column 'path' (it has: {', '.join(columns) or 'none'})")
    if not rows:
        raise InputError(f"{table} has no rows")
    names = _label_names(columns, table)
    found = []
    missing = []
    for line, row in enumerate(rows, start=2):
        where = f"{table}, line {line}"
        path = table.parent / (row["path"] or "")
        if not path.is_file():
            missing.append(f"{row['path']} (line {line})")
            continue
        mpp = _table_mpp(row, where)
        labels = {name: row[name] or None for name in names}
        stain = row.get("stain") or None
        found.append(_source(path.stem, path, mpp, row.get("group") or "", stain, labels))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(f"{table} names slides that do not exist: {', '.join(missing[:3])}{more}")
    return found


def _label_names(columns: Sequence[str], table: Path) -> list[str]:
    """The columns that the user adds; one without a name (an exported row number) is left out."""
    named = [name for name in columns if name]
    refuse_repeated(named, table)
    others = [name for name in named if name not in _READ]
    reserved = sorted(_RESERVED & set(others))
    if reserved:
        raise InputError(f"{table}: the column name '{reserved[0]}' is reserved; rename it")
    return others


def _table_mpp(row: dict[str, str | None], where: str) -> tuple[float, float] | None:
    both = row.get("mpp")
    x, y = (_mpp_value(row.get(f"mpp_{axis}") or both, where) for axis in "xy")
    if (x is None) != (y is None):
        raise InputError(f"{where}: gives mpp_x or mpp_y alone; give both, or 'mpp'")
    return None if x is None or y is None else (x, y)


def _mpp_value(text: str | None, where: str) -> float | None:
    if not text or not text.strip():
        return None
    try:
        value = float(text)
    except ValueError as error:
        raise InputError(f"{where}: mpp '{text}' is not a number") from error
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{where}: mpp '{text}' is not a positive number")
    return value


def _without_collisions(found: Iterable[SlideSource]) -> list[SlideSource]:
    by_id: dict[str, SlideSource] = {}
    for source in found:
        other = by_id.setdefault(source.slide_id, source)
        if other is not source:
            raise InputError(
                f"two slides have the id '{source.slide_id}': {other.path} and {source.path}; "
                "rename one, or list the slides in a table"
            )
    return list(by_id.values())
