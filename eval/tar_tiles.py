"""Labelled tiles in tars of a WebDataset.

A sample is what shares a name up to its first dot: an image (jpg, jpeg, png, tif, tiff) and its
label, in ``.cls`` or ``.txt`` as text, or in ``.json`` under ``label`` with, if known, ``group``
and ``split``. Tars may lie in one folder, or in folders train, val (or valid, validation) and test.
"""

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from eosin.configs.errors import InputError
from eosin.data_curation.embed import decode_bytes
from eosin.eval.listing import Listing

IMAGES = ("jpg", "jpeg", "png", "tif", "tiff")
SPLIT_FOLDERS = {
    "train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
}  # fmt: skip
LARGEST_LABEL = 1 << 20
"""Bytes of a member that holds no image."""


@dataclass(frozen=True)
class TarTile:
    """An image in a tar."""

    tar: Path
    member: str
    offset: int
    size: int

    def read(self) -> npt.NDArray[np.uint8]:
        """See `TileImage`."""
        return decode_bytes(self._bytes(), f"{self.tar}: {self.member}")

    def checksum(self) -> str:
        """Of the member's bytes."""
        return xxhash.xxh3_128_hexdigest(self._bytes())

    def _bytes(self) -> bytes:
        with self.tar.open("rb") as file:
            data = os.pread(file.fileno(), self.size, self.offset)
        if len(data) < self.size:
            raise InputError(f"{self.tar} ends within {self.member}: copy it again")
        return data


def has_tars(folder: Path) -> bool:
    """Whether a folder holds tars, itself or in folders of splits."""
    return any(True for _ in _tars(folder))


def list_tars(folder: Path) -> Listing:
    """All samples of the folder's tars.

    Raises:
        InputError: a tar is damaged, or a sample lacks its image or label, or its split.
    """
    tile_ids: list[str] = []
    images: list[TarTile] = []
    facts: list[dict[str, Any]] = []
    for tar, split in _tars(folder):
        for key, image, fact in _samples(tar):
            tile_ids.append(f"{tar.relative_to(folder)}/{key}")
            images.append(image)
            facts.append({"split": split, **fact} if split else fact)
    return Listing(
        tile_ids=tile_ids,
        images=list(images),
        labels=[str(fact["label"]) for fact in facts],
        groups=_column(facts, tile_ids, "group"),
        splits=_column(facts, tile_ids, "split"),
    )


def _tars(folder: Path) -> Iterator[tuple[Path, str]]:
    """The tars with the split of their folder; "" where it names none."""
    for path in sorted(folder.glob("*.tar")):
        yield path, ""
    for name, split in SPLIT_FOLDERS.items():
        for path in sorted((folder / name).glob("*.tar")):
            yield path, split


def _column(facts: list[dict[str, Any]], tile_ids: list[str], name: str) -> list[str] | None:
    values = [fact.get(name) for fact in facts]
    missing = [tile_id for tile_id, value in zip(tile_ids, values, strict=True) if value is None]
    if len(missing) == len(values):
        return None
    if missing:
        raise InputError(f"{missing[0]} has no {name}, though other samples have one")
    return [str(value) for value in values]


def _samples(tar: Path) -> Iterator[tuple[str, TarTile, dict[str, Any]]]:
    """Key, image and facts (label, and maybe group and split) of each sample."""
    found: dict[str, dict[str, Any]] = {}
    pictures: dict[str, TarTile] = {}
    try:
        with tarfile.open(tar) as archive:
            for member in archive:
                if not member.isfile():
                    continue
                head, slash, tail = member.name.rpartition("/")
                stem, _, suffix = tail.partition(".")
                key = head + slash + stem
                if suffix.lower() in IMAGES:
                    pictures[key] = TarTile(tar, member.name, member.offset_data, member.size)
                elif suffix in ("cls", "txt", "json") and member.size <= LARGEST_LABEL:
                    file = archive.extractfile(member)
                    text = file.read().decode() if file is not None else ""
                    facts = json.loads(text) if suffix == "json" else {"label": text.strip()}
                    found[key] = found.get(key, {}) | facts
    except (tarfile.TarError, UnicodeDecodeError, ValueError, OSError) as error:
        raise InputError(f"{tar} is no readable WebDataset tar: {error}") from error
    for key in sorted(pictures.keys() | found.keys()):
        if key not in pictures:
            raise InputError(f"{tar}: sample '{key}' has a label and no image")
        if not str(found.get(key, {}).get("label", "")):
            raise InputError(f"{tar}: sample '{key}' has no label in .cls, .txt or .json")
        yield key, pictures[key], found[key]
