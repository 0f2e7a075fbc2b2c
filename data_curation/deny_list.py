"""What must not be trained on: patients, slides and images of evaluation sets, and their likes.

A YAML file names them. `eosin sample deny=…` leaves such tiles out; `eosin shard deny=…` refuses to
build while one is left, so that a set that leaks does not come to be, whatever made the selection.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml
from numpy.typing import NDArray

from eosin.configs.errors import EosinError, InputError
from eosin.configs.load import load_config
from eosin.data_curation.features import FeatureStore
from eosin.data_curation.manifest import LEAKS, write_table
from eosin.data_curation.pseudonyms import PREFIX, Pseudonyms
from eosin.data_curation.tile_print import open_prints
from eosin.launch.artefacts import file_digest, stamp_of
from eosin.launch.progress import Meter

if TYPE_CHECKING:
    from eosin.data_curation.duplicate_search import Pairs

LEAKS_NAME = "leaks.parquet"
_ROWS = 100_000  # prints of the training set that are compared at once
_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class DenyList:
    """The file's keys; paths are relative to it."""

    groups: list[str] = field(default_factory=list)
    """Patients, as the tables' ``group`` names them."""
    slides: list[str] = field(default_factory=list)
    """Slides by ``slide_id``."""
    quickhashes: list[str] = field(default_factory=list)
    """Slides by OpenSlide's hash of their content (``openslide.quickhash-1``), whatever their
    files are called."""
    prints: list[str] = field(default_factory=list)
    """Feature stores of evaluation images, by `eosin embed encoder=builtin:tile-print`: tiles that
    show the same tissue are denied."""
    pseudonyms: str = ""
    """Key file that the tables' names were hashed with (`pseudonyms=…` of `eosin tile` or `shard`),
    where groups and slides stand here by their own names."""
    similarity: float = 0.45
    """Of prints, see `dedupe.DedupeOptions`."""
    turns: bool = False
    """Whether turned and flipped copies count too; slower."""

    def __post_init__(self) -> None:
        if not any((self.groups, self.slides, self.quickhashes, self.prints)):
            raise ValueError("names nothing: give groups, slides, quickhashes or prints")
        if not 0 < self.similarity <= 1:
            raise ValueError(f"similarity must be above 0 and at most 1, not {self.similarity}")


class LeakError(EosinError):
    """A set for training holds what its deny list forbids."""


def read_deny(path: Path) -> DenyList:
    """Reads a deny list.

    Raises:
        ConfigError: it is not such a file.
        InputError: a name is none as YAML reads it: 007 is 7 by then.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a YAML file with groups, slides or prints")
    deny = load_config(DenyList, [path])
    for key, names in yaml.safe_load(path.read_text("utf-8")).items():
        for name in names if isinstance(names, list) else []:
            if not isinstance(name, str):
                raise InputError(f"{path}: {key}: YAML reads {name!r} as no text; put it in quotes")
    return deny


class Gate:
    """A deny list with everything that tiles are held against.

    Args:
        path: the YAML file.
        prints: feature store of prints of the tiles; needed where the list has prints.

    Raises:
        ConfigError: it is not such a file.
        InputError: a store is missing, or holds no prints.
    """

    def __init__(self, path: Path, prints: Path | None) -> None:
        self.path, self._prints = path, prints
        self.deny = read_deny(path)
        key = self.deny.pseudonyms
        self._hidden = Pseudonyms(path.parent / key) if key else None
        if self.deny.prints and prints is None:
            raise InputError(
                f"{path} names images: give the prints of the tiles too (prints=…, by eosin embed "
                "encoder=builtin:tile-print)"
            )
        self._store = open_prints(prints) if self.deny.prints and prints else None
        self._images = [open_prints(path.parent / name) for name in self.deny.prints]

    def stamp(self) -> str:
        """Of the list and of all prints."""
        stores = [*self._images, *([self._store] if self._store else [])]
        return stamp_of(
            deny=file_digest(self.path),
            pseudonyms=self._hidden.stamp() if self._hidden else None,
            prints=[store.meta["stamp"] for store in stores],
        )

    def leaks(self, tiles: pa.Table, slides: pa.Table | None) -> pa.Table:
        """The tiles that the list forbids, in the form of `manifest.LEAKS`.

        Args:
            tiles: with ``tile_id``, ``group`` and ``slide_id`` (null where there is none).
            slides: under `manifest.SLIDES`; None where the tiles are of no slides.

        Raises:
            InputError: a tile has no print, and the list has prints; or a slide has no hash, and
                the list has hashes.
        """
        deny, n = self.deny, tiles.num_rows
        reason, denied = np.full(n, "", object), np.full(n, "", object)
        similarity = np.full(n, np.nan, np.float32)
        ids = _text(tiles["slide_id"])
        groups = _text(tiles["group"])
        listed = [
            ("patient", groups, self._names(deny.groups, groups)),
            ("slide", ids, self._names(deny.slides, ids)),
        ]
        if deny.quickhashes:
            listed.append(("slide hash", _hashes(ids, slides, self.path), deny.quickhashes))
        for why, values, names in listed:
            hit = _among(values, names) & (reason == "")
            reason[hit], denied[hit] = why, values.filter(pa.array(hit)).to_numpy(False)
        if self._store is not None:
            images, found = self._like_images(tiles["tile_id"].combine_chunks(), self._store)
            hit = ~np.isnan(found) & (reason == "")
            reason[hit], denied[hit], similarity[hit] = "image", images[hit], found[hit]
        rows = pa.array(np.flatnonzero(reason != ""))
        return pa.table(
            {
                "tile_id": tiles["tile_id"].take(rows),
                "group": tiles["group"].take(rows),
                "reason": pa.array(reason, pa.string()).take(rows),
                "denied": pa.array(denied, pa.string()).take(rows),
                "similarity": pa.array(similarity, from_pandas=True).take(rows),
            }
        )

    def _names(self, names: list[str], values: pa.Array) -> list[str]:
        """What the list's names are called in the tables."""
        if self._hidden is not None:
            return [*names, *map(self._hidden.of, names)]
        plain = [name for name in names if not name.startswith(PREFIX)]
        if plain and pc.any(pc.starts_with(values, PREFIX)).as_py():
            raise InputError(
                f"{self.path} names '{plain[0]}', but the tables hold pseudonyms: name their key "
                "file in it (pseudonyms: key.txt), or nobody knows whether it leaks"
            )
        return names

    def _like_images(
        self, ids: pa.Array, store: FeatureStore
    ) -> tuple[NDArray[np.object_], NDArray[np.float32]]:
        """For each tile the image that it is most like, and how much; NaN where like none."""
        place = pc.index_in(ids, store.rows["tile_id"].combine_chunks())
        if place.null_count:
            raise InputError(
                f"{self._prints} has no print of '{ids.filter(place.is_null())[0].as_py()}' "
                f"({place.null_count} tiles in all), and without it nobody knows whether it leaks: "
                "make the prints of all tiles"
            )
        from eosin.data_curation.duplicate_search import Spectra, find_pairs  # here: it needs torch

        rows = place.to_numpy()
        images, found = np.full(len(rows), "", object), np.full(len(rows), np.nan, np.float32)
        with Meter("guard", len(rows) * len(self._images), "tiles") as meter:
            for others in self._images:
                names = others.rows["tile_id"].to_numpy()
                some = [_some(store.features), _some(others.features)]
                spectra = Spectra(np.concatenate(some), turns=self.deny.turns)
                for start in range(0, len(rows), _ROWS):
                    pairs = find_pairs(
                        store.features[rows[start : start + _ROWS]],
                        others.features,
                        spectra,
                        self.deny.similarity,
                        seen=meter.advance,
                    )
                    best = _best(pairs)
                    better = ~(found[start + best.first] >= best.similarity)
                    at = start + best.first[better]
                    found[at], images[at] = best.similarity[better], names[best.second[better]]
        return images, found


def refuse_leaks(leaks: pa.Table, path: Path, report: Path) -> None:
    """Writes the leaks to `report` and ends with an error that names some; does nothing without.

    Args:
        leaks: see `Gate.leaks`.
        path: of the deny list.
        report: where they are written down.

    Raises:
        LeakError: there are leaks.
    """
    if not leaks.num_rows:
        report.unlink(missing_ok=True)
        return
    write_table(leaks, report, LEAKS)
    named = [
        f"'{row['tile_id']}' ({row['reason']} {row['denied']}"
        + (f", similarity {row['similarity']:.2f})" if row["similarity"] is not None else ")")
        for row in leaks.slice(0, _NAMED).to_pylist()
    ]
    more = f" and {leaks.num_rows - _NAMED} more" if leaks.num_rows > _NAMED else ""
    raise LeakError(
        f"{leaks.num_rows} tiles are denied by {path}: {', '.join(named)}{more}; {report} "
        "names them all. Nothing was built: draw again with 'eosin sample deny=…'"
    )


def _text(column: pa.ChunkedArray) -> pa.Array:
    text = column.combine_chunks()
    return pc.fill_null(text, "")


def _among(values: pa.Array, names: Sequence[str]) -> NDArray[np.bool_]:
    wanted = pa.array([name for name in names if name], pa.string())
    found: NDArray[np.bool_] = pc.is_in(values, value_set=wanted).to_numpy(False)
    return found


def _hashes(ids: pa.Array, slides: pa.Table | None, path: Path) -> pa.Array:
    """The hash of each tile's slide; empty where it is of no slide."""
    if slides is None:
        raise InputError(f"{path} names hashes of slides, but these tiles are of no slides")
    place = pc.index_in(ids, slides["slide_id"].combine_chunks())
    used = slides.take(pc.unique(place.drop_null()))
    without = used.filter(pc.is_null(used["quickhash"]))
    if without.num_rows:
        raise InputError(
            f"{path} names hashes of slides, but OpenSlide has none of "
            f"{without['path'][0].as_py()} ({without.num_rows} slides in all): deny them by group "
            "or slide_id, or leave them out"
        )
    return pc.fill_null(slides["quickhash"].combine_chunks().take(place), "")


def _some(prints: NDArray[np.float16]) -> NDArray[np.float16]:
    """Prints enough to fit `Spectra` to."""
    return prints[np.unique(np.linspace(0, len(prints) - 1, 25_000).astype(np.int64))]


def _best(pairs: "Pairs") -> "Pairs":
    """Of each first item the pair with the highest similarity."""
    order = np.lexsort((pairs.second, -pairs.similarity, pairs.first))
    first = pairs.first[order]
    keep = order[np.diff(first, prepend=-1) != 0]
    return replace(
        pairs,
        first=pairs.first[keep],
        second=pairs.second[keep],
        similarity=pairs.similarity[keep],
    )
