"""`eosin plan curate`: what a curation will take, by stage, before anything runs.

Time is work over rates. Give a pilot: a small set that `eosin curate` made of the same kind of
slides, whose ``costs.json`` and tables say what a slide holds and what a tile cost. Without one the
rates are those of a single slide on one machine (`DEFAULTS`), which is a guess for any other.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from eosin.configs.errors import InputError
from eosin.data_curation.costs import COSTS_NAME, read_costs
from eosin.data_curation.manifest import SLIDES, TILES, open_table, read_table
from eosin.data_curation.tile_print import DIM as PRINT_DIM
from eosin.launch.artefacts import write_text
from eosin.launch.cards import Card, card_called

ROW_BYTES = {"tiles": 21.0, "clusters": 24.0, "selection": 24.0}
"""Of a row in the Parquet tables: of tiles as `make scale` writes them, the others assumed."""
START_CANDIDATES = 2.0
"""The start, in units of one assignment of the fitted points to all k centres; assumed."""
SAMPLE_RATE = 1.0e6
"""Tiles/s that a core draws from, all strata and caps included (`make scale`)."""
PRINT_RATE, PAIR_RATE = 9.3e3, 6.2e7
"""Prints/s that a core makes ready to be compared, and pairs/s that it compares; measured on
`duplicate_search.find_pairs`, 10,000 and 20,000 prints all with all on one core."""
PAIRED_CLUSTERS = 6.5
"""Clusters with which a tile is compared where each has 8 neighbours: half its own, each pair of
neighbours once, of which some are mutual; so it is read about twice as often."""
DEFAULTS = {
    "tissue_mm2": 120.0,
    "tile_rate": 217.0,
    "read_rate": 273.0,
    "shard_rate": 452.0,
    "tile_kb": 39.0,
}
"""For keys that are 0 where there is no pilot. The area is assumed. The others were measured once,
on one core, by `eosin curate` with ``builtin:stain-texture`` (whose time is in read_rate) on eight
copies of an H&E slide in JPEG tiles, read at its own scale: 1,296 tiles of 256 px."""
_NOT_NEGATIVE = (
    "total",
    "encoder_gflops",
    "gpus",
    "price",
    "core_price",
    "slide_gb",
    "points_per_centroid",
)


@dataclass(frozen=True, kw_only=True)
class PlanCurateConfig:
    """A set to be curated, and the machines for it."""

    slides: int = 10_000
    """Slides in all."""
    like: Path | None = None
    """A pilot: folder of a finished `eosin curate` on slides of the same kind. What it measured
    (tiles a slide, cost and size of a tile) stands for the keys below that are 0."""
    tissue_mm2: float = 0
    """Tissue on a slide, mm²; 0: the pilot's, or 120 (assumed)."""
    mpp: float = 0.5
    """µm per tile pixel."""
    size_px: int = 256
    """Side of a tile, pixels."""
    total: int = 0
    """Tiles that are drawn for the shards; 0: all."""
    tile_rate: float = 0
    """Tiles/s that a core reads and measures; 0: the pilot's, or 217."""
    read_rate: float = 0
    """Tiles/s that a core reads again to embed them; 0: the pilot's, or 273."""
    shard_rate: float = 0
    """Tiles/s that a core reads, encodes and packs; 0: the pilot's, or 452."""
    tile_kb: float = 0
    """Bytes of an encoded tile in thousands; 0: the pilot's, or 39."""
    dim: int = 1024
    """Features of a tile, 2 bytes each."""
    encoder_gflops: float = 123
    """Of one tile through the encoder (ViT-L/16 at 224 px: 123; ViT-S: 9); 0: no encoder, as with
    ``builtin:stain-texture``, whose time is that of reading."""
    levels: list[int] = field(default_factory=lambda: [100_000, 10_000, 1_000, 100])
    """Clusters of each level, the finest first."""
    without_duplicates: bool = False
    """Whether repeated tiles are looked for, in clusters of the finest level and near them."""
    iterations: int = 25
    """Of Lloyd, a level."""
    points_per_centroid: int = 256
    """On which the finest level is fitted; all tiles are assigned once at the end. 0: all."""
    gpus: int = 8
    """For features and clusters."""
    gpu: str = "H100"
    """As in `launch.cards`."""
    mfu: float = 0.35
    """Share of the GPU's peak that the encoder and the products of k-means reach."""
    cores: int = 64
    """For everything else."""
    price: float = 2.5
    """Of an hour of one GPU, in any currency."""
    core_price: float = 0.03
    """Of an hour of one core."""
    disk_gbs: float = 1.0
    """GB/s that the storage reads, all jobs together."""
    slide_gb: float = 1.0
    """Of a slide's file; 0 leaves the storage out."""
    json: Path | None = None
    """Where the figures are written, too; ``--json FILE`` is the same."""

    def __post_init__(self) -> None:
        for name in ("slides", "size_px", "dim", "iterations", "cores"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("mpp", "disk_gbs", "mfu"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        if self.mfu > 1:
            raise ValueError(f"mfu={self.mfu} is a share, at most 1")
        for name in (*DEFAULTS, *_NOT_NEGATIVE):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not self.levels:
            raise ValueError("levels is empty: give the clusters of each level")
        if any(k < 1 for k in self.levels) or sorted(self.levels, reverse=True) != self.levels:
            raise ValueError(f"levels={self.levels} must fall from the finest to the coarsest")
        if self.encoder_gflops and not self.gpus:
            raise ValueError("gpus=0 goes with encoder_gflops=0 (builtin:stain-texture) alone")

    @property
    def card(self) -> Card:
        """What one GPU is; the CPU where there are none.

        Raises:
            ConfigError: nobody knows such a GPU.
        """
        return card_called(self.gpu if self.gpus else "cpu")


@dataclass(frozen=True)
class Stage:
    """One step of the curation."""

    name: str
    tiles: float
    """That it works on."""
    core_hours: float = 0.0
    gpu_hours: float = 0.0
    read_tb: float = 0.0
    written_tb: float = 0.0


@dataclass(frozen=True)
class CuratePlan:
    """The figures, as they stand in the JSON."""

    slides: int
    tiles: float
    """With tissue, on all slides."""
    drawn: float
    """That go into the shards."""
    stages: list[Stage]
    core_hours: float
    gpu_hours: float
    hours: float
    """From start to end, the stages one after the other on the stated machines."""
    cost: float
    cost_per_million: float
    """Of the tiles in the shards."""
    stored_tb: float


def plan_curation(config: PlanCurateConfig) -> None:
    """Prints the plan, and writes it where asked.

    Raises:
        ConfigError: nobody knows such a GPU.
        InputError: the pilot is not a finished curation.
    """
    resolved = resolve(config)
    figures = make_curate_plan(resolved)
    print("\n".join(report(resolved, figures)))
    if config.json is not None:
        write_text(config.json, json.dumps(asdict(figures), indent=1) + "\n")


def resolve(config: PlanCurateConfig) -> PlanCurateConfig:
    """`config` with every key that is 0 taken from the pilot, else from `DEFAULTS`.

    Raises:
        InputError: the pilot is not a finished curation.
    """
    known = dict(DEFAULTS)
    if config.like is not None:
        config, measured = _pilot(config, config.like)
        known |= measured
    missing: dict[str, Any] = {n: v for n, v in known.items() if not getattr(config, n)}
    return replace(config, **missing)


def _pilot(config: PlanCurateConfig, folder: Path) -> tuple[PlanCurateConfig, dict[str, float]]:
    """What the finished set in `folder` measured; its grid stands for the config's."""
    slides = read_table(folder / "slides.parquet", SLIDES)
    tiles = open_table(folder / "tiles.parquet", TILES).read(["status", "size_px", "requested_mpp"])
    read = tiles.filter(pc.equal(tiles["status"], "ok"))
    if not read.num_rows:
        raise InputError(f"{folder} holds no tile with tissue: not a pilot to plan by")
    size_px, mpp = read["size_px"][0].as_py(), read["requested_mpp"][0].as_py()
    tile_mm2 = (size_px * mpp / 1000) ** 2
    measured = {"tissue_mm2": read.num_rows * tile_mm2 / slides.num_rows}
    costs = read_costs(folder)
    if not costs:
        raise InputError(f"{folder} has no {COSTS_NAME}: run 'eosin curate' there to its end")
    for stage, name in (("tile", "tile_rate"), ("embed", "read_rate"), ("shard", "shard_rate")):
        if stage in costs and costs[stage].core_s > 0 and costs[stage].items:
            measured[name] = costs[stage].items / costs[stage].core_s
    shards = sorted((folder / "shards").glob("*.tar"))
    packed = costs["shard"].items if "shard" in costs else 0
    if shards and packed:
        measured["tile_kb"] = sum(tar.stat().st_size for tar in shards) / packed / 1e3
    return replace(config, size_px=size_px, mpp=mpp), measured


def make_curate_plan(config: PlanCurateConfig) -> CuratePlan:
    """All figures, of a config that `resolve` has seen."""
    tile_mm2 = (config.size_px * config.mpp / 1000) ** 2
    tiles = config.slides * config.tissue_mm2 / tile_mm2
    drawn = min(float(config.total or tiles), tiles)
    stages = list(_stages(config, tiles, drawn))
    hours = sum(_hours(stage, config) for stage in stages)
    core_hours, gpu_hours = (
        sum(getattr(stage, name) for stage in stages) for name in ("core_hours", "gpu_hours")
    )
    cost = core_hours * config.core_price + gpu_hours * config.price
    return CuratePlan(
        slides=config.slides,
        tiles=tiles,
        drawn=drawn,
        stages=stages,
        core_hours=core_hours,
        gpu_hours=gpu_hours,
        hours=hours,
        cost=cost,
        cost_per_million=cost / drawn * 1e6,
        stored_tb=sum(stage.written_tb for stage in stages),
    )


def _stages(config: PlanCurateConfig, tiles: float, drawn: float) -> Iterator[Stage]:
    slides_tb = config.slides * config.slide_gb / 1e3
    features_tb = tiles * config.dim * 2 / 1e12
    on_gpu = config.gpus > 0
    rate = config.card.tflops * 1e12 * (config.mfu if on_gpu else 1.0)

    def hours(flops: float) -> dict[str, float]:
        return {"gpu_hours" if on_gpu else "core_hours": flops / rate / 3600}

    yield Stage(
        "tile",
        tiles,
        core_hours=tiles / config.tile_rate / 3600,
        read_tb=slides_tb,
        written_tb=tiles * ROW_BYTES["tiles"] / 1e12,
    )
    yield Stage(
        "embed",
        tiles,
        core_hours=tiles / config.read_rate / 3600,
        gpu_hours=tiles * config.encoder_gflops * 1e9 / rate / 3600 if on_gpu else 0.0,
        read_tb=slides_tb,
        written_tb=features_tb,
    )
    yield Stage(
        "cluster",
        tiles,
        **hours(cluster_flops(config, tiles)),
        read_tb=features_tb,
        written_tb=tiles * ROW_BYTES["clusters"] / 1e12,
    )
    if config.without_duplicates:
        pairs = tiles * PAIRED_CLUSTERS * tiles / config.levels[0]
        prints = 2 * PAIRED_CLUSTERS * tiles
        yield Stage(
            "prints",
            tiles,
            core_hours=tiles / config.read_rate / 3600,
            read_tb=slides_tb,
            written_tb=tiles * PRINT_DIM * 2 / 1e12,
        )
        yield Stage(
            "dedupe",
            tiles,
            core_hours=(prints / PRINT_RATE + pairs / PAIR_RATE) / 3600,
            read_tb=prints * PRINT_DIM * 2 / 1e12,
        )
    yield Stage(
        "sample",
        tiles,
        core_hours=tiles / SAMPLE_RATE / 3600,
        written_tb=drawn * ROW_BYTES["selection"] / 1e12,
    )
    yield Stage(
        "shard",
        drawn,
        core_hours=drawn / config.shard_rate / 3600,
        read_tb=slides_tb * min(1.0, drawn / tiles),
        written_tb=drawn * config.tile_kb / 1e9,
    )


def cluster_flops(config: PlanCurateConfig, tiles: float) -> float:
    """Operations of k-means over all levels: 2 N k d for an assignment of N points."""
    total, points = 0.0, tiles
    for k in config.levels:
        fitted = (
            min(points, config.points_per_centroid * k) if config.points_per_centroid else points
        )
        passes = config.iterations + START_CANDIDATES
        total += 2.0 * k * config.dim * (passes * fitted + points)
        points = float(k)
    return total


def _hours(stage: Stage, config: PlanCurateConfig) -> float:
    """From start to end: what is slowest of cores, GPUs and storage holds the others up."""
    storage = (stage.read_tb + stage.written_tb) * 1e3 / config.disk_gbs / 3600
    return max(
        stage.core_hours / config.cores,
        stage.gpu_hours / config.gpus if config.gpus else 0.0,
        storage,
    )


def report(config: PlanCurateConfig, p: CuratePlan) -> Iterator[str]:
    """The plan in words, line by line."""
    machines = f"{config.cores} cores"
    if config.gpus:
        machines += f" and {config.gpus} x {config.card.name}"
    yield (
        f"{p.slides:,} slides with {config.tissue_mm2:,.0f} mm² of tissue: {p.tiles:,.0f} tiles of "
        f"{config.size_px} px at {config.mpp:g} µm/px, {p.drawn:,.0f} into shards; {machines}"
    )
    yield (
        f"\n{'stage':<9}{'tiles':>15}{'core-h':>11}{'GPU-h':>10}{'core-h/M':>10}{'GPU-h/M':>9}"
        f"{'read TB':>10}{'kept TB':>9}{'hours':>8}"
    )
    for stage in p.stages:
        millions = stage.tiles / 1e6
        yield (
            f"{stage.name:<9}{stage.tiles:>15,.0f}{stage.core_hours:>11,.2f}"
            f"{stage.gpu_hours:>10,.2f}{stage.core_hours / millions:>10.3f}"
            f"{stage.gpu_hours / millions:>9.4f}{stage.read_tb:>10,.3f}{stage.written_tb:>9,.3f}"
            f"{_hours(stage, config):>8,.2f}"
        )
    yield (
        f"\n{p.core_hours:,.0f} core-hours at {config.core_price:g} and {p.gpu_hours:,.0f} "
        f"GPU-hours at {config.price:g}: {p.cost:,.0f}, {p.cost_per_million:,.2f} a million tiles "
        f"in the shards; {p.hours / 24:,.1f} days with the stages in turn; {p.stored_tb:,.2f} TB"
    )
    source = f"the pilot {config.like}" if config.like else "one slide on one machine, a guess"
    yield (
        f"a core: {config.tile_rate:,.0f} tiles/s tiled, {config.read_rate:,.0f} read to embed, "
        f"{config.shard_rate:,.0f} packed, {config.tile_kb:.1f} kB each; by {source} and what was "
        "given"
    )
