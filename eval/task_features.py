"""The features of a task's tiles, from the cache where they are there: plain, and under conditions.

One store an encoder and condition lies in ``features/`` of the evaluation's folder; its key is the
encoder's digest (weights, preprocessing, pooling, condition) and the tiles' bytes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from eosin.data_curation.embed import TileImage, embed_images
from eosin.data_curation.encoder import NetworkEncoder
from eosin.data_curation.encoder_interface import Encoder
from eosin.data_curation.features import features_stamp, has_features
from eosin.data_curation.manifest import FEATURE_ROWS
from eosin.data_curation.normalised_encoder import NormalisedEncoder
from eosin.data_curation.stain_library import read_library
from eosin.data_curation.stain_normaliser import StainNormaliser
from eosin.eval.conditions import ConditionedEncoder, choose_conditions
from eosin.eval.config import EvalConfig
from eosin.eval.table_rows import TableRow
from eosin.eval.tasks import Task
from eosin.launch.artefacts import stamp_of
from eosin.launch.process import World, choose_device

STAIN_PREFIX = "stain "
"""Of the names of stain conditions, which tells them from transforms."""


def cache_of(config: EvalConfig, row: TableRow) -> Path:
    """The folder of a row's features."""
    return config.out / "features" / row.record.name


def is_cached(config: EvalConfig, task: Task, row: TableRow) -> bool:
    """Whether the row's plain features are there."""
    return has_features(cache_of(config, row), features_stamp(row.encoder.digest, task.data_digest))


def embed_task(
    config: EvalConfig, task: Task, row: TableRow, world: World | None = None
) -> npt.NDArray[np.float32]:
    """Features [N, D] of all tiles; ranks share what is not in the cache."""
    store = embed_images(
        row.encoder,
        task.images,
        _feature_rows(task.tile_ids, task.groups),
        task.data_digest,
        cache_of(config, row),
        batch_size=config.batch_size,
        world=world,
    )
    return store.features.astype(np.float32)


def embed_files(
    encoder: Encoder,
    images: Sequence[TileImage],
    tile_ids: list[str],
    groups: list[str],
    data_digest: str,
    folder: Path,
    batch_size: int,
) -> npt.NDArray[np.float32]:
    """Features [N, D] of tiles of any task, cached in `folder`."""
    rows = _feature_rows(tile_ids, groups)
    store = embed_images(encoder, images, rows, data_digest, folder, batch_size=batch_size)
    return store.features.astype(np.float32)


def embed_under_conditions(
    config: EvalConfig, task: Task, row: TableRow, world: World | None = None
) -> dict[str, npt.NDArray[np.float32]]:
    """Features of the test tiles under each condition; {} for rows that are no network to score."""
    if row.record.kind != "encoder":
        return {}
    test = np.flatnonzero(task.splits == "test").tolist()
    features = {}
    for name, encoder in condition_encoders(config, row.encoder).items():
        store = embed_images(
            encoder,
            [task.images[i] for i in test],
            _feature_rows([task.tile_ids[i] for i in test], [task.groups[i] for i in test]),
            stamp_of(data=task.data_digest, only="test", rows=test),
            cache_of(config, row) / name.replace(" ", "-"),
            batch_size=config.batch_size,
            world=world,
        )
        features[name] = store.features.astype(np.float32)
    return features


def condition_encoders(config: EvalConfig, encoder: Encoder) -> dict[str, Encoder]:
    """The encoder behind each condition that the config asks for."""
    found: dict[str, Encoder] = {
        name: ConditionedEncoder(encoder, name)
        for name in choose_conditions(config.conditions.transforms)
    }
    if config.conditions.stains is None or not isinstance(encoder, NetworkEncoder):
        return found
    device = choose_device(config.device)
    for name, target in read_library(config.conditions.stains).items():
        normaliser = StainNormaliser(target, config.conditions.method)
        found[STAIN_PREFIX + name] = NormalisedEncoder(encoder, normaliser, device)
    return found


def _feature_rows(tile_ids: list[str], groups: list[str]) -> pa.Table:
    n = len(tile_ids)
    known = {"tile_id": tile_ids, "group": groups}
    return pa.table(
        {f.name: pa.array(known.get(f.name, [None] * n), f.type) for f in FEATURE_ROWS},
        schema=FEATURE_ROWS,
    )
