"""``eosin curate``: slides to shards in one command that goes on where it was stopped.

Each stage knows by its stamp what it has done, so there is no state here: another threshold selects
and shards again and reads no slide that it need not; another mpp tiles again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from eosin.configs.errors import EosinError, TooManyFailedError
from eosin.data_curation.cluster_config import MARKER_NAME as CLUSTERS_MARKER
from eosin.data_curation.cluster_config import ClusterConfig, ClusterOptions
from eosin.data_curation.costs import charged, cost_lines, read_costs
from eosin.data_curation.dedupe_config import DedupeConfig, DedupeOptions
from eosin.data_curation.deny_list import read_deny
from eosin.data_curation.embed_config import META_NAME, EmbedConfig, EmbedOptions
from eosin.data_curation.manifest import (
    FEATURE_ROWS,
    INDEX,
    SLIDES,
    TILES,
    open_table,
    read_table,
)
from eosin.data_curation.patient_split import SplitOptions
from eosin.data_curation.sample import SampleConfig, sample
from eosin.data_curation.sampling import SampleOptions
from eosin.data_curation.selection import SelectConfig, write_selection
from eosin.data_curation.shard_marker import INDEX_NAME, MARKER_NAME
from eosin.data_curation.shards import ShardConfig, ShardOptions, shard
from eosin.data_curation.tiles import TileConfig, TileOptions, tile
from eosin.data_curation.tiles import pieces as list_pieces
from eosin.data_curation.tiles import plan as plan_tiles


@dataclass(frozen=True, kw_only=True)
class CurateConfig:
    """Slides to shards: tile, then, where an encoder is named, embed and cluster; select; shard.

    With ``embed.encoder``, ``without_duplicates``, ``deny`` or anything of ``sample`` or ``split``
    the selection is a balanced draw (`eosin sample`); else what passes the thresholds (`select`).
    """

    slides: Path
    """A folder of slides, one slide, or a CSV table of slides (see `eosin tile --help`)."""
    out: Path
    """Folder for the tables, overlays and ``shards/``."""
    tile: TileOptions = field(default_factory=TileOptions)
    """How slides are cut."""
    select: SelectConfig = field(default_factory=SelectConfig)
    """Which tiles may be taken."""
    embed: EmbedOptions = field(default_factory=EmbedOptions)
    """By what tiles become features, e.g. embed.encoder=builtin:stain-texture; none by default."""
    cluster: ClusterOptions = field(default_factory=ClusterOptions)
    """How features are clustered, where there are any."""
    without_duplicates: bool = False
    """Whether tiles that repeat another, and second scans of a slide, are found and left out."""
    dedupe: DedupeOptions = field(default_factory=DedupeOptions)
    """What counts as a repetition."""
    deny: Path | None = None
    """YAML file of patients, slides and images that must not be trained on
    (`deny_list.DenyList`): left out of the draw, and looked for again before sharding."""
    split: SplitOptions = field(default_factory=SplitOptions)
    """Patients to be held out."""
    sample: SampleOptions = field(default_factory=SampleOptions)
    """How tiles are drawn, e.g. 'sample.tree=[organ,level_1]' sample.total=100000."""
    review: Path | None = None
    """review.json of these clusters; see `eosin sample`."""
    shard: ShardOptions = field(default_factory=ShardOptions)
    """How they are packed."""
    only: Path | None = None
    """File of slide_ids, one a line: these alone are tiled, and nothing more is done."""

    @property
    def tile_config(self) -> TileConfig:
        """The first stage's config."""
        return TileConfig(slides=self.slides, out=self.out, only=self.only, **self.tile.__dict__)

    def __post_init__(self) -> None:
        if self.embed.encoder:
            return
        levels = [name for name in self.sample.tree if name.startswith("level_")]
        if levels or self.review is not None:
            what = f"sample.tree names {levels[0]}" if levels else "review is given"
            raise ValueError(
                f"{what}, but there are no clusters: name an encoder, e.g. "
                "embed.encoder=builtin:stain-texture"
            )

    @property
    def selection(self) -> Path:
        """The table of tiles for the shards."""
        return self.out / "selection.parquet"

    @property
    def draws(self) -> bool:
        """Whether the selection is a balanced draw."""
        return (
            bool(self.embed.encoder)
            or self.without_duplicates
            or self.deny is not None
            or self.split.part != "all"
            or self.sample != SampleOptions()
        )

    @property
    def needs_prints(self) -> bool:
        """Whether tiles are compared by their prints."""
        return self.without_duplicates or (
            self.deny is not None and bool(read_deny(self.deny).prints)
        )

    @property
    def clusters(self) -> Path | None:
        """Folder of the clusters, where there are any."""
        return self.out / "clusters" if self.embed.encoder else None

    @property
    def prints(self) -> Path | None:
        """Folder of the prints, where they are needed."""
        return self.out / "prints" if self.needs_prints else None

    @property
    def prints_config(self) -> EmbedConfig:
        """Of the prints."""
        options = self.embed.__dict__ | {"encoder": "builtin:tile-print"}
        return EmbedConfig(tiles=self.out, out=self.out / "prints", **options)

    @property
    def dedupe_config(self) -> DedupeConfig:
        """Of the duplicates."""
        return DedupeConfig(
            prints=self.out / "prints",
            out=self.out / "duplicates.parquet",
            tiles=self.out,
            clusters=self.clusters,
            **self.dedupe.__dict__,
        )

    @property
    def embed_config(self) -> EmbedConfig:
        """Of the features."""
        return EmbedConfig(tiles=self.out, out=self.out / "features", **self.embed.__dict__)

    @property
    def cluster_config(self) -> ClusterConfig:
        """Of the clusters."""
        return ClusterConfig(
            features=self.out / "features", out=self.out / "clusters", **self.cluster.__dict__
        )

    @property
    def sample_config(self) -> SampleConfig:
        """Of the draw."""
        return SampleConfig(
            tiles=self.out,
            out=self.selection,
            clusters=self.clusters,
            duplicates=self.dedupe_config.out if self.without_duplicates else None,
            deny=self.deny,
            prints=self.prints,
            split=self.split,
            review=self.review,
            select=self.select,
            **self.sample.__dict__,
        )

    @property
    def shard_config(self) -> ShardConfig:
        """Of the shards."""
        return ShardConfig(
            tiles=self.out,
            selection=self.selection,
            out=self.out / "shards",
            deny=self.deny,
            prints=self.prints,
            **self.shard.__dict__,
        )


def curate(config: CurateConfig) -> None:
    """Does every stage that is not done yet.

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
    tiles, features = config.out / "tiles.parquet", config.out / "features" / "rows.parquet"
    prints = config.out / "prints" / "rows.parquet"
    yield _Stage(
        name="tile",
        run=lambda: tile(config.tile_config),
        marker=config.out / "tiles.json",
        count=lambda: sum(read_table(config.out / "slides.parquet", SLIDES)["n_ok"].to_pylist()),
    )
    if config.embed.encoder:
        yield _Stage(
            name="embed",
            run=lambda: _embed(config.embed_config),
            marker=config.out / "features" / META_NAME,
            count=lambda: open_table(features, FEATURE_ROWS).metadata.num_rows,
        )
        yield _Stage(
            name="cluster",
            run=lambda: _cluster(config.cluster_config),
            marker=config.out / "clusters" / CLUSTERS_MARKER,
            count=lambda: open_table(features, FEATURE_ROWS).metadata.num_rows,
        )
    if config.needs_prints:
        yield _Stage(
            name="prints",
            run=lambda: _embed(config.prints_config),
            marker=config.out / "prints" / META_NAME,
            count=lambda: open_table(prints, FEATURE_ROWS).metadata.num_rows,
        )
    if config.without_duplicates:
        yield _Stage(
            name="dedupe",
            run=lambda: _dedupe(config.dedupe_config),
            marker=config.dedupe_config.out.with_suffix(".json"),
            count=lambda: open_table(prints, FEATURE_ROWS).metadata.num_rows,
        )
    yield _Stage(
        name="sample" if config.draws else "select",
        run=lambda: _select(config),
        marker=config.selection.with_suffix(".json"),
        count=lambda: open_table(tiles, TILES).metadata.num_rows,
    )
    yield _Stage(
        name="shard",
        run=lambda: shard(config.shard_config),
        marker=config.shard_config.out / MARKER_NAME,
        count=lambda: open_table(config.shard_config.out / INDEX_NAME, INDEX).metadata.num_rows,
    )


def _embed(config: EmbedConfig) -> None:
    from eosin.data_curation.embed_tiles import embed  # here: it needs torch, which takes seconds

    embed(config)


def _cluster(config: ClusterConfig) -> None:
    from eosin.data_curation.cluster import cluster

    cluster(config)


def _dedupe(config: DedupeConfig) -> None:
    from eosin.data_curation.dedupe import dedupe

    dedupe(config)


def _select(config: CurateConfig) -> None:
    if config.draws:
        sample(config.sample_config)
    else:
        write_selection(config.out / "tiles.parquet", config.selection, config.select)


def pieces(config: CurateConfig) -> dict[str, int]:
    """The slides that are not tiled yet, with the size of their files in bytes."""
    return list_pieces(config.tile_config)


def plan(config: CurateConfig) -> str:
    """What `curate` would do: how much there is to tile; the rest follows from what is found."""
    then = f"embed by {config.embed.encoder} and cluster, then " if config.embed.encoder else ""
    then += "make prints, " if config.needs_prints else ""
    then += "find duplicates, " if config.without_duplicates else ""
    return (
        f"{plan_tiles(config.tile_config)}\n"
        f"then: {then}select into {config.selection} and shard into {config.shard_config.out} "
        "('eosin shard --dry-run' tells more once the tiles are there)"
    )
