"""``eosin shard energon``: what Megatron-Energon reads beside the tars, made from the index.

Energon (https://github.com/NVIDIA/Megatron-Energon) opens WebDataset tars by ``NNNNNN.tar.idx``
beside each and a folder ``.nv-meta``. Its own ``energon prepare`` reads every tar for them; the
index holds the same facts, so no tar is read here. The format is that of Energon 7.4: `index_of`
says what an ``.idx`` holds; in ``.nv-meta`` there are ``.info.json`` and ``.info.yaml`` (records of
each shard), ``split.yaml`` (all shards are ``train``) and ``dataset.yaml`` (a record is an
``ImageSample``).
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import yaml
from numpy.typing import NDArray

from eosin.configs.errors import InputError
from eosin.data_curation.manifest import INDEX, read_table
from eosin.data_curation.shard_marker import PARTS_NAME, POINTING, read_marker
from eosin.data_curation.shard_store import LocalFolder
from eosin.launch.artefacts import replacing, write_json
from eosin.launch.progress import Meter

META_NAME = ".nv-meta"
"""Energon's folder."""
OFFSETS_NAME = re.compile(r"[0-9]{6}\.tar\.idx")
"""Energon's index of a tar."""

_BLOCK = 512  # of a tar; a USTAR header is one
_INFO_NAMES = (".info.json", ".info.yaml")  # of Energon from 7.0 on, and before
_LOOKUP_NAMES = ("index.sqlite", "index.uuid")  # of Energon's own making


@dataclass(frozen=True, kw_only=True)
class EnergonConfig:
    """Makes shards readable for Megatron-Energon, without reading them."""

    shards: Path
    """The folder that `eosin shard` wrote."""


def write_energon(config: EnergonConfig) -> None:
    """Writes each tar's ``.idx`` and the folder ``.nv-meta``; a ``dataset.yaml`` there is kept.

    What joins datasets or looks samples up by key in Energon needs its ``index.sqlite`` too, which
    ``energon prepare`` makes.

    Raises:
        InputError: the shards were not finished, one is missing, or their records are in slides.
    """
    described = read_marker(config.shards)["shards"]
    if any(name.endswith(POINTING) for name in described):
        raise InputError(f"{config.shards} points into slides: there are no tars for Energon")
    for name in _INFO_NAMES:
        (config.shards / META_NAME / name).unlink(missing_ok=True)
    LocalFolder(config.shards)  # every shard is there in its full size, before any is indexed
    suffixes: set[str] = set()
    with Meter("shard energon", len(described), "shards") as meter:
        for name in described:
            suffixes |= _index_shard(config.shards / name)
            meter.advance(1, name)
    counts = {name: facts["count"] for name, facts in described.items() if facts["count"]}
    meta = config.shards / META_NAME
    meta.mkdir(exist_ok=True)
    split = {"exclude": [], "split_parts": {"train": list(counts), "val": [], "test": []}}
    _write_yaml(meta / "split.yaml", split)
    if not (meta / "dataset.yaml").exists():
        _write_yaml(meta / "dataset.yaml", _dataset(sorted(suffixes)))
    _write_yaml(meta / _INFO_NAMES[1], {"shard_counts": counts})
    write_json(meta / _INFO_NAMES[0], {"shard_counts": counts})  # last: it makes a dataset of it
    print(
        f"shard energon: {sum(counts.values())} records in {len(counts)} shards → {meta}; "
        f"megatron.energon.get_train_dataset('{config.shards}', …) reads them"
    )


def index_of(offset: NDArray[np.int64], size: NDArray[np.int64]) -> bytes:
    """The ``.tar.idx`` of a tar: where each sample's header begins, and where the last one ends.

    Positions are unsigned 64-bit integers in little-endian order, n + 1 of them for n samples.

    Args:
        offset: [n] of each record's first byte behind its one header block, ascending.
        size: [n] bytes of each record.
    """
    end = offset[-1:] + (size[-1:] + _BLOCK - 1) // _BLOCK * _BLOCK if len(offset) else [0]
    return np.concatenate([offset - _BLOCK, end]).astype("<u8").tobytes()


def remove_energon(shards: Path) -> None:
    """Removes what would send Energon to the places of records in tars that are about to change."""
    stale = [path for path in shards.glob("*.tar.idx") if OFFSETS_NAME.fullmatch(path.name)]
    for path in (*stale, *(shards / META_NAME / name for name in (*_INFO_NAMES, *_LOOKUP_NAMES))):
        path.unlink(missing_ok=True)
    if stale:
        print(
            f"shard: the index for Energon was of the shards before and is removed; "
            f"'eosin shard energon {shards}' makes it anew",
            file=sys.stderr,
        )


def _index_shard(tar: Path) -> set[str]:
    """Writes the tar's ``.idx``; returns the suffixes of its records."""
    rows = read_table(tar.parent / PARTS_NAME / f"{tar.stem}.parquet", INDEX)
    content = index_of(rows["offset"].to_numpy(), rows["size"].to_numpy())
    with replacing(tar.with_name(f"{tar.name}.idx")) as partial:
        partial.write_bytes(content)
    return set(pc.unique(rows["suffix"]).to_pylist())


def _dataset(suffixes: list[str]) -> dict[str, object]:
    """Energon's description of a record: an image, whichever of the `suffixes` it has."""
    return {
        "sample_type": {"__module__": "megatron.energon", "__class__": "ImageSample"},
        "field_map": {"image": ",".join(suffixes)},
    }


def _write_yaml(path: Path, value: object) -> None:
    with replacing(path) as partial:
        partial.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
