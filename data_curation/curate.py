"""``eosin curate``: slides to shards in one command that goes on where it was stopped.

Each stage knows by its stamp what it has done, so there is no state here: another threshold selects
and shards again and reads no slide that it need not; another mpp tiles again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from eosin.configs.errors import EosinError, TooManyFailedError
from eosin.data_curation.costs import charged, cost_lines, read_costs
from eosin.data_curation.manifest import INDEX, SLIDES, TILES, open_table, read_table
from eosin.data_curation.selection import SelectConfig, write_selection
from eosin.data_curation.shard_marker import INDEX_NAME, MARKER_NAME
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
    errors: list[EosinError] = []
    for stage in _stages(config):
        try:
            with charged(config.out, stage.name, stage.marker, stage.count):
                stage.run()
        except TooManyFailedError as error:
            errors.append(error)
        except EosinError as error:
            errors.append(error)
            break
    print("\n".join(cost_lines(read_costs(config.out))))
    if len(errors) > 1:
        raise EosinError("; then: ".join(map(str, errors))) from errors[-1]
    if errors:
        raise errors[0]


@dataclass(frozen=True, kw_only=True)
class _Stage:
    name: str
    run: Callable[[], None]
    marker: Path
    """Written last, and only where there was something to do."""
    count: Callable[[], int]
    """Tiles that the finished stage worked on."""


def _stages(config: CurateConfig) -> Iterator[_Stage]:
    """What is done, in this order."""
    tiles = config.out / "tiles.parquet"
    yield _Stage(
        name="tile",
        run=lambda: tile(config.tile_config),
        marker=config.out / "tiles.json",
        count=lambda: sum(read_table(config.out / "slides.parquet", SLIDES)["n_ok"].to_pylist()),
    )
    yield _Stage(
        name="select",
        run=lambda: write_selection(tiles, config.selection, config.select),
        marker=config.selection.with_suffix(".json"),
        count=lambda: open_table(tiles, TILES).metadata.num_rows,
    )
    yield _Stage(
        name="shard",
        run=lambda: shard(config.shard_config),
        marker=config.shard_config.out / MARKER_NAME,
        count=lambda: open_table(config.shard_config.out / INDEX_NAME, INDEX).metadata.num_rows,
    )


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
