"""`eosin bench balance`: what a balanced draw is worth to a rare class, against a uniform one.

Synthetic slides are tiled, and one class thinned to a small share of the tiles. Both sides draw
the same number of tiles from that pool, without labels: ours evenly over clusters of the built-in
descriptor, the baseline evenly over tiles. The demo's recipe trains an encoder on each, with the
same seeds and steps. Few-shot probes then score them on slides of their own, where the class is as
frequent as others; the rare class's recall is told with an interval over slides.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eosin.configs.load import load_config
from eosin.data_curation.cluster import cluster
from eosin.data_curation.cluster_config import ClusterConfig
from eosin.data_curation.embed_config import EmbedConfig
from eosin.data_curation.embed_tiles import embed
from eosin.data_curation.manifest import PREDICTIONS, TILES, Status, read_table, write_table
from eosin.data_curation.sample import SampleConfig, sample
from eosin.data_curation.selection import SelectConfig, broken_rules
from eosin.data_curation.shards import ShardConfig, shard
from eosin.data_curation.synthetic import CLASSES, SyntheticConfig, read_truth, write_slides
from eosin.data_curation.synthetic_layout import TRUTH_DOWNSAMPLE
from eosin.data_curation.synthetic_task import SyntheticTaskConfig, write_task
from eosin.data_curation.tiles import TileConfig, tile
from eosin.eval import fewshot
from eosin.eval.config import EvalConfig
from eosin.eval.intervals import draw_groups, interval, tail_of
from eosin.eval.results import load_results
from eosin.eval.run import evaluate
from eosin.eval.tasks import TaskConfig
from eosin.launch.artefacts import file_digest, is_done, mark_done, replacing, stamp_of, write_text
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.export import ExportConfig, export
from eosin.pretrain.train import pretrain

SLIDE_MPP, TILE_MPP, TILE_PX = 0.5, 1.0, 128
ARMS = ("balanced", "uniform")
PURE = 0.8
"""Share of a tile that the rare class covers where it counts as one of it; tiles that hold less,
but some, are left out of the pool."""
DRAWS = 2000
"""Resamples of the test slides."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class BenchBalanceConfig:
    """Two training sets of one size, from a pool in which a class is rare."""

    out: Path = Path("runs/bench_balance")
    """Folder of slides, pool, shards, runs and scores; a second call reuses what is done."""
    rare: str = "nests"
    """The class that is thinned: solid tumour nests."""
    share: float = 0.01
    """Of the pool's tiles that are of it."""
    n_slides: int = 48
    """Slides of the pool."""
    slide_px: int = 4096
    """Their side, at 0.5 µm/px."""
    n_labelled: int = 36
    """Slides of the probes, drawn by another seed; every third one gives the shots."""
    budget: int = 1200
    """Tiles of each training set."""
    clusters: int = 100
    """Over which ours draws evenly."""
    seeds: int = 3
    """Trainings of each side."""
    steps: int = 0
    """Of a training; 0: the recipe's."""
    seed: int = 0
    """Of slides and draws, and the first of the trainings."""
    json: Path | None = None
    """Where the figures are written, too; ``--json FILE`` is the same."""

    def __post_init__(self) -> None:
        if self.rare not in CLASSES[1:]:
            raise ValueError(f"rare={self.rare}: the classes are {', '.join(CLASSES[1:])}")
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie between 0 and 1, not {self.share}")
        for name in ("n_slides", "budget", "clusters", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_labelled < 3:
            raise ValueError(f"n_labelled must be at least 3, not {self.n_labelled}")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A share with its 95 % interval over slides, as it stands in the JSON."""

    name: str
    value: float
    low: float
    high: float


def bench_balance(config: BenchBalanceConfig) -> None:
    """Draws, trains and scores whatever is not done yet, and tells the figures."""
    pool = thinned_pool(config)
    task = labelled_task(config)
    sets = {arm: draw_set(config, pool, arm) for arm in ARMS}
    encoders = [train(config, sets[arm], n) for n in range(config.seeds) for arm in ARMS]
    scores = config.out / "scores"
    evaluate(
        EvalConfig(
            encoder=encoders[0], extra_encoders=encoders[1:], out=scores, seed=config.seed,
            task=TaskConfig(tiles=task, name="synthetic"), protocols=[fewshot.PROTOCOL],
        ),
        with_report=False,
    )  # fmt: skip
    trained = [
        e.name for e in load_results(scores / "results.json").encoders if e.kind == "encoder"
    ]
    predictions = read_table(scores / "predictions.parquet", PREDICTIONS)
    predictions = predictions.filter(pc.is_in(predictions["encoder"], pa.array(trained)))
    figures = compare(predictions, sorted(CLASSES[1:]).index(config.rare), config.seed)
    tell(config, pool, sets, figures)


def thinned_pool(config: BenchBalanceConfig) -> Path:
    """The folder of the pool: tables of slides and tiles, the rare class thinned."""
    drawing = SyntheticConfig(n_slides=config.n_slides, size_px=config.slide_px, seed=config.seed)
    slides = config.out / "slides"
    write_slides(slides, drawing, workers=0)
    whole, pool = config.out / "whole", config.out / "pool"
    tile(TileConfig(slides=slides, out=whole, mpp=TILE_MPP, size_px=TILE_PX))
    stamp = stamp_of(
        tiles=file_digest(whole / "tiles.parquet"), rare=config.rare, share=config.share,
        seed=config.seed,
    )  # fmt: skip
    if is_done(pool / "pool.json", stamp):
        return pool
    tiles = read_table(whole / "tiles.parquet", TILES)
    kept = np.array(tiles["status"].to_pylist(), object) == str(Status.OK)
    for broken in broken_rules(tiles, SelectConfig()).values():
        kept &= ~broken
    share = rare_share(tiles, slides, config.rare)
    without, pure = kept & (share == 0), np.flatnonzero(kept & (share >= PURE))
    wanted = round(config.share / (1 - config.share) * int(without.sum()))
    chosen = np.random.default_rng(config.seed).permutation(pure)[:wanted]
    rows = np.sort(np.r_[np.flatnonzero(without), chosen])
    pool.mkdir(parents=True, exist_ok=True)
    table = tiles.take(pa.array(rows)).append_column("rare", pa.array(share[rows] > 0))
    write_table(table, pool / "tiles.parquet", TILES)
    with replacing(pool / "slides.parquet") as partial:
        partial.write_bytes((whole / "slides.parquet").read_bytes())
    mark_done(pool / "pool.json", stamp, tiles=len(rows), rare=len(chosen))
    return pool


def rare_share(tiles: pa.Table, slides: Path, rare: str) -> Floats:
    """Of each tile, the share that is of the class, [N]; tiles of one slide lie side by side."""
    shares, name, of_class = np.zeros(tiles.num_rows), "", np.zeros((0, 0), np.bool_)
    side = round(TILE_PX * TILE_MPP / SLIDE_MPP / TRUTH_DOWNSAMPLE)  # cells of the truth
    places = zip(*(tiles[c].to_pylist() for c in ("slide_id", "column", "row")), strict=True)
    for nth, (slide_id, column, row) in enumerate(places):
        if slide_id != name:
            name = slide_id
            of_class = read_truth(slides / f"{name}.tiff").class_map == CLASSES.index(rare)
        cells = of_class[side * row : side * (row + 1), side * column : side * (column + 1)]
        shares[nth] = cells.mean()
    return shares


def labelled_task(config: BenchBalanceConfig) -> Path:
    """The table of labelled tiles: a third of the slides for shots, two thirds for the test."""
    drawing = SyntheticConfig(n_slides=config.n_labelled, size_px=2048, seed=config.seed + 1)
    paths = write_slides(config.out / "labelled_slides", drawing, workers=0)
    splits = {path: "test" if nth % 3 else "train" for nth, path in enumerate(paths)}
    task = SyntheticTaskConfig(mpp=TILE_MPP, size_px=TILE_PX, tiles_per_class=10, seed=config.seed)
    return write_task(config.out / "task", splits, task)


def draw_set(config: BenchBalanceConfig, pool: Path, arm: str) -> Path:
    """The selection of an arm, and its shards; the folder of both."""
    out = config.out / arm
    if arm == "balanced":
        features = EmbedConfig(tiles=pool, out=pool / "features", encoder="builtin:stain-texture")
        embed(features)
        levels = [config.clusters]
        cluster(ClusterConfig(features=features.out, out=pool / "clusters", levels=levels))
    sample(
        SampleConfig(
            tiles=pool,
            out=out / "selection.parquet",
            clusters=pool / "clusters" if arm == "balanced" else None,
            tree=["level_1"] if arm == "balanced" else [],
            total=config.budget,
            seed=config.seed,
        )
    )
    selection, shards = out / "selection.parquet", out / "shards"
    shard(ShardConfig(tiles=pool, selection=selection, out=shards, records_per_shard=512))
    return out


def train(config: BenchBalanceConfig, arm: Path, nth: int) -> str:
    """An encoder of one arm and seed; its folder."""
    name = f"{arm.name}_{nth}"
    overrides = [f"shards={arm / 'shards'}", f"out={config.out / 'runs' / name}"]
    overrides += [f"seed={config.seed + nth}", *([f"steps={config.steps}"] if config.steps else [])]
    recipe = load_config(PretrainConfig, ["pretrain/demo"], overrides)
    pretrain(recipe)
    encoder = config.out / "encoders" / name
    export(ExportConfig(run=recipe.out, out=encoder))
    return str(encoder)


def compare(predictions: pa.Table, rare: int, seed: int) -> list[Figure]:
    """Recall of the rare class and mean recall of all, of each arm, and what ours has more.

    Predictions of an arm's trainings are pooled; the same resamples of test slides go to all, so
    that differences are paired.
    """
    columns = predictions.to_pydict()
    groups, group = np.unique(columns["group"], return_inverse=True)
    label, guess = np.array(columns["label"]), np.array(columns["prediction"])
    name = np.array([n.rpartition("_")[0] for n in columns["encoder"]])
    strata = np.zeros(len(groups), np.int64)
    draws = np.vstack([np.ones(len(groups)), draw_groups(strata, DRAWS, seed)])  # [1 + B, G]
    tail = tail_of(strata)
    figures, values = [], {}
    for what in ("rare", "all"):
        for arm in ARMS:
            recalls = []
            for truth in [rare] if what == "rare" else np.unique(label):
                of = (name == arm) & (label == truth)
                right, total = (
                    np.bincount(group[of & mask], minlength=len(groups))
                    for mask in (guess == label, label == label)
                )
                recalls.append((draws @ right) / np.maximum(draws @ total, 1))
            values[arm] = np.mean(recalls, axis=0)  # [1 + B]
            figures.append(_figure(f"{what} {arm}", values[arm], tail))
        more = values["balanced"] - values["uniform"]
        figures.append(_figure(f"{what} difference", more, tail))
    return figures


def _figure(name: str, values: Floats, tail: float) -> Figure:
    low, high = interval(values[1:], tail)
    return Figure(name=name, value=float(values[0]), low=low, high=high)


def tell(
    config: BenchBalanceConfig, pool: Path, sets: dict[str, Path], figures: list[Figure]
) -> None:
    """Prints what the sets hold and the figures, and writes them."""
    tiles = pq.read_table(pool / "tiles.parquet", columns=["tile_id", "rare"])
    lines = [f"pool: {tiles.num_rows} tiles, {pc.sum(tiles['rare']).as_py()} of {config.rare}"]
    rare = set(tiles.filter(tiles["rare"])["tile_id"].to_pylist())
    counts = {}
    for arm, path in sets.items():
        chosen = pq.read_table(path / "selection.parquet", columns=["tile_id"])["tile_id"]
        counts[arm] = len(rare.intersection(chosen.to_pylist()))
        lines.append(f"{arm}: {len(chosen)} tiles, {counts[arm]} of {config.rare}")
    for figure in figures:
        what, _, arm = figure.name.partition(" ")
        of = config.rare if what == "rare" else "all classes"
        span = f"[{figure.low:+.3f}, {figure.high:+.3f}]"
        lines.append(f"few-shot recall of {of}, {arm}: {figure.value:+.3f} {span}")
    print("\n".join(lines))
    if config.json is not None:
        found = {"rare_tiles": counts, "figures": [asdict(figure) for figure in figures]}
        write_text(config.json, json.dumps(found, indent=1) + "\n")
