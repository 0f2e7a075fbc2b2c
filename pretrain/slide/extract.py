"""The verb `extract slides`: bags to one vector a slide, or a case, by a slide encoder.

The vectors are a feature store with one row a slide, so `eosin eval bags` and everything else that
takes bags takes them as bags of one. Contextual tokens go to a store of bags of their own, row by
row those of the first store that was given; latents to a third: nothing is written over features.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from eosin.configs.errors import InputError
from eosin.data_curation.bag_store import BagStore, SlideBag, write_bags
from eosin.data_curation.features import has_features, write_features
from eosin.data_curation.manifest import FEATURE_ROWS
from eosin.launch.artefacts import file_digest, stamp_of
from eosin.launch.device_names import DeviceName
from eosin.launch.process import choose_device
from eosin.launch.progress import Meter
from eosin.pretrain.slide.opening import (
    WEIGHTS,
    SlideVectors,
    digest_of_group,
    open_slide_encoder,
)
from eosin.pretrain.slide.sources import Unit

FORMAT = 1
"""Raised when the same bags would be written otherwise."""
CHUNK = 16
"""Slides that are made safe at a time."""


@dataclass(frozen=True, kw_only=True)
class ExtractSlidesConfig:
    """Vectors of slides by a slide encoder."""

    encoder: Path
    """Slide encoder folder, of `eosin pretrain slides`."""
    bags: list[Path] = field(default_factory=list)
    """Stores of bags, one a source of the encoder; a slide is taken as those that know it have
    it."""
    out: Path
    """Folder of the vectors, a feature store; ``out/tokens`` and ``out/latents`` beside them."""
    unit: Unit = "slide"
    """A vector a slide; or a group (patient), by the encoder's pooling of cases."""
    tokens: bool = False
    """Write the contextual tokens of the first store's tiles, too."""
    latents: bool = False
    """Write the latents of an encoder that has them, too."""
    device: DeviceName = "auto"

    def __post_init__(self) -> None:
        if not self.bags:
            raise ValueError("bags=[]: name stores of 'eosin bags'")


def extract_slides(config: ExtractSlidesConfig) -> None:
    """Encodes every slide; goes on where an earlier call was ended.

    Raises:
        InputError: the encoder or a store cannot be used, or they do not belong together.
    """
    device = choose_device(config.device)
    encoder = open_slide_encoder(config.encoder, str(device))
    stores = [BagStore(folder) for folder in config.bags]
    encoder.match(stores)
    groups = {group for store in stores for group in store.groups}
    seen = sum(digest_of_group(group) in encoder.trained_on for group in groups)
    if seen:
        print(f"note: {seen} of {len(groups)} groups are among those that it was trained on")
    if config.latents and encoder.network.config.pool != "latents":
        raise InputError(f"latents=true, and {config.encoder} has none (pool is not latents)")
    stamp = stamp_of(
        format=FORMAT,
        encoder=file_digest(config.encoder / WEIGHTS),
        stores=[store.meta["stamp"] for store in stores],
        unit=config.unit,
    )
    slides = sorted({slide_id for store in stores for slide_id in store.slide_ids})

    def encode(slide_id: str) -> SlideVectors:
        return encoder.encode_slide([s for s in stores if slide_id in s], slide_id)

    members = _members(stores, slides, config.unit)
    keys = sorted(members)
    meta = {"encoder": config.encoder.name, "encoder_digest": stamp, "pooling": "slide"}
    with Meter("extract slides", len(keys), config.unit + "s") as meter:

        def vectors(start: int, stop: int) -> npt.NDArray[np.float32]:
            found = []
            for key in keys[start:stop]:
                own = [encode(slide_id).vector for slide_id in members[key]]
                found.append(own[0] if config.unit == "slide" else encoder.encode_case(own))
                meter.advance()
            return np.stack(found)

        write_features(
            config.out, rows=_rows(stores, members, keys), dim=encoder.width, stamp=stamp,
            compute=vectors, chunk_rows=CHUNK, meta=meta,
        )  # fmt: skip
    if config.tokens and not has_features(config.out / "tokens", stamp):
        bags = _token_bags(stores[0], encode)
        write_bags(config.out / "tokens", bags, encoder.width, stamp, meta)
    if config.latents:
        k = encoder.network.config.latents
        known = [slide_id for slide_id in slides for _ in range(k)]

        def latents(start: int, stop: int) -> npt.NDArray[np.float32]:
            of = [encode(slide_id).latents for slide_id in known[start:stop:k]]
            return np.concatenate([x for x in of if x is not None])

        write_features(
            config.out / "latents", rows=_latent_rows(stores, slides, k), dim=encoder.width,
            stamp=stamp, compute=latents, chunk_rows=CHUNK * k, meta=meta,
        )  # fmt: skip
    print(f"{len(keys)} vectors of {encoder.width} numbers → {config.out}")


def _members(stores: list[BagStore], slides: list[str], unit: Unit) -> dict[str, list[str]]:
    """The slides of each slide or group."""
    if unit == "slide":
        return {slide_id: [slide_id] for slide_id in slides}
    found: dict[str, list[str]] = {}
    for slide_id in slides:
        found.setdefault(_known(stores, slide_id)[0], []).append(slide_id)
    return found


def _known(stores: list[BagStore], slide_id: str) -> tuple[str, str | None]:
    """Group and stain of a slide."""
    for store in stores:
        if slide_id in store:
            return store.owner(slide_id)
    raise AssertionError(slide_id)


def _rows(stores: list[BagStore], members: dict[str, list[str]], keys: list[str]) -> pa.Table:
    said = [(key, *_known(stores, members[key][0])) for key in keys]
    return _table([(key, group, key, stain) for key, group, stain in said])


def _latent_rows(stores: list[BagStore], slides: list[str], k: int) -> pa.Table:
    rows = []
    for slide_id in slides:
        group, stain = _known(stores, slide_id)
        rows += [(f"{slide_id}_latent_{at}", group, slide_id, stain) for at in range(k)]
    return _table(rows)


def _table(rows: list[tuple[str, str, str, str | None]]) -> pa.Table:
    none: list[Any] = [None] * len(rows)
    columns = {
        "tile_id": [row[0] for row in rows],
        "group": [row[1] for row in rows],
        "slide_id": [row[2] for row in rows],
        "level0_x": [0.0] * len(rows),  # a slide is at its own corner
        "level0_y": [0.0] * len(rows),
        "mpp": none,
        "stain": [row[3] for row in rows],
    }
    return pa.table(columns).select(FEATURE_ROWS.names).cast(FEATURE_ROWS)


def _token_bags(store: BagStore, encode: Any) -> Iterator[SlideBag]:
    for slide_id in store.slide_ids:
        tokens = encode(slide_id).tokens[: len(store.centres(slide_id))]
        yield store.with_features(slide_id, tokens)
