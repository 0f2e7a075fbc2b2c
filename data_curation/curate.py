"""``eosin curate``: slides to shards in one command that goes on where it was stopped.

Each stage knows by its stamp what it has done, so there is no state here: another threshold selects
and shards again and reads no slide that it need not; another mpp tiles again.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from eosin.configs.errors import EosinError, TooManyFailedError
from eosin.data_curation.selection import SelectConfig, write_selection
from eosin.data_curation.shards import ShardConfig, ShardOptions, shard
from eosin.data_curation.tiles import TileConfig, TileOptions, tile
from eosin.data_curation.tiles import pieces as list_pieces
from eosin.data_curation.tiles import plan as plan_tiles


@dataclass(frozen=True, kw_only=True)
class CurateConfig:
    """Slides to shards: tile, select, shard."""

    slides: Path
    """A folder of slides, one slide, or a CSV table of slides (see `eosin tile --help`)."""
    out: Path
    """Folder for the tables, overlays and ``shards/``."""
    tile: TileOptions = field(default_factory=TileOptions)
    """How slides are cut."""
    select: SelectConfig = field(default_factory=SelectConfig)
    """Which tiles are taken."""
    shard: ShardOptions = field(default_factory=ShardOptions)
    """How they are packed."""
    only: Path | None = None
    """File of slide_ids, one a line: these alone are tiled, and nothing more is done."""

    @property
    def tile_config(self) -> TileConfig:
        """The first stage's config."""
        return TileConfig(slides=self.slides, out=self.out, only=self.only, **self.tile.__dict__)

    @property
    def selection(self) -> Path:
        """The second stage's table."""
        return self.out / "selection.parquet"

    @property
    def shard_config(self) -> ShardConfig:
        """The third stage's config."""
        return ShardConfig(
            tiles=self.out,
            selection=self.selection,
            out=self.out / "shards",
            **self.shard.__dict__,
        )


def curate(config: CurateConfig) -> None:
    """Tiles, selects and shards what is not done yet.

    Failed slides or tiles beyond `max_failed` do not stop it: the good ones go on to the shards,
    and the error comes at the end.

    Raises:
        TooManyFailedError: more slides or tiles failed than `max_failed` allows.
        EosinError: a stage cannot be done at all.
    """
    if config.only is not None:
        tile(config.tile_config)
        return
    stages: tuple[Callable[[], None], ...] = (
        lambda: tile(config.tile_config),
        lambda: write_selection(config.out / "tiles.parquet", config.selection, config.select),
        lambda: shard(config.shard_config),
    )
    errors: list[EosinError] = []
    for stage in stages:
        try:
            stage()
        except TooManyFailedError as error:
            errors.append(error)
        except EosinError as error:
            errors.append(error)
            break
    if len(errors) > 1:
        raise EosinError("; then: ".join(map(str, errors))) from errors[-1]
    if errors:
        raise errors[0]


def pieces(config: CurateConfig) -> dict[str, int]:
    """The slides that are not tiled yet, with the size of their files in bytes."""
    return list_pieces(config.tile_config)


def plan(config: CurateConfig) -> str:
    """What `curate` would do: how much there is to tile; the rest follows from what is found."""
    return (
        f"{plan_tiles(config.tile_config)}\n"
        f"then: select into {config.selection} and shard into {config.shard_config.out} "
        "('eosin shard --dry-run' tells more once the tiles are there)"
    )
