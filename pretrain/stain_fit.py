"""``eosin stain``: the stain templates of a data set, fitted to a sample of its tiles."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eosin.configs.errors import InputError
from eosin.configs.load import to_yaml
from eosin.data_curation.shard_reader import RecordError, ShardReader
from eosin.launch.artefacts import write_text
from eosin.launch.progress import Meter
from eosin.pretrain.loader import LoaderConfig, open_shards
from eosin.pretrain.stain import StainTemplateConfig, fit_stain_template


@dataclass(frozen=True, kw_only=True)
class StainFitConfig:
    """Fits `augment.stain` to shards."""

    shards: str
    """The folder that `eosin shard` wrote, or its URL (with `loader.cache`)."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """How shards are opened."""
    n: int = 2000
    """Tiles that are measured, or all where there are fewer. A standard deviation is then known to
    1/sqrt(2 n), which is 1.6 %."""
    seed: int = 0
    """Of the draw of the tiles."""
    probability: float = 0.5
    """What is written as `augment.stain.probability`; the rest is measured."""
    out: Path | None = None
    """A YAML file to write, for `--config`; without it, the YAML goes to standard output."""

    def __post_init__(self) -> None:
        if self.n < 2:
            raise ValueError(f"n must be at least 2, not {self.n}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, not {self.seed}")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must lie in [0, 1], not {self.probability}")


@dataclass(frozen=True, kw_only=True)
class _Augment:
    stain: StainTemplateConfig


@dataclass(frozen=True, kw_only=True)
class _Fitted:
    """The result at its place in the config of a training."""

    augment: _Augment


def fit_stain(config: StainFitConfig) -> None:
    """Measures a sample and writes ``augment: {stain: …}``.

    Raises:
        InputError: the shards are not finished or not whole, fewer than two tiles of the sample
            are readable, or one stain does not vary within them.
        ConfigError: see `shard_store.open_store`.
    """
    with open_shards(config.shards, config.loader) as reader:
        rows = sample_rows(len(reader), config.n, config.seed)
        with Meter("stain", len(rows), "tiles") as meter:
            try:
                template = fit_stain_template(_tiles(reader, rows, meter), config.probability)
            except ValueError as error:
                raise InputError(
                    f"no templates can be fitted to {config.shards}: {error}"
                ) from error
    text = to_yaml(_Fitted(augment=_Augment(stain=template)))
    if config.out is None:
        print(text, end="")
        return
    write_text(config.out, text)
    print(f"stain templates of {len(rows)} tiles → {config.out}")


def sample_rows(total: int, n: int, seed: int) -> NDArray[np.int64]:
    """`n` different rows of `total` (all of them where there are fewer), in ascending order.

    One row is drawn from each of `n` stretches of almost equal length, so that shards, and the
    slides within them, are met in proportion to their size.
    """
    if n >= total:
        return np.arange(total, dtype=np.int64)
    edges = np.arange(n + 1, dtype=np.int64) * total // n
    draws = np.random.default_rng(seed).random(n)
    return edges[:-1] + np.floor(draws * np.diff(edges)).astype(np.int64)


def _tiles(
    reader: ShardReader, rows: NDArray[np.int64], meter: Meter
) -> Iterator[NDArray[np.uint8]]:
    """The tiles in `rows`; a damaged one is told of and passed over."""
    damaged = 0
    for row in rows.tolist():
        try:
            tile = reader.image(row)
        except RecordError:
            damaged += 1
        else:
            yield tile
        meter.advance(note=f"{damaged} damaged" if damaged else "")
