"""The verb `demo`: synthetic slides, then the whole chain, to a report.

Each stage is the one that a user's own slides go through, with its own marker, so a second call
reuses what is done and a killed one goes on.
"""

import csv
import io
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image

from eosin.configs.load import load_config
from eosin.data_curation.curate import CurateConfig, curate
from eosin.data_curation.encoder import NetworkEncoder, load_encoder
from eosin.data_curation.shard_reader import ShardReader
from eosin.data_curation.shards import ShardOptions
from eosin.data_curation.slide import Slide
from eosin.data_curation.synthetic import SyntheticConfig, write_slides
from eosin.data_curation.synthetic_task import SyntheticTaskConfig, write_task
from eosin.data_curation.tiles import TileOptions
from eosin.eval.config import EvalConfig
from eosin.eval.figures import feature_map, overlay_sheet, tile_sheet
from eosin.eval.report import Picture, Section, write_report
from eosin.eval.results import load_results
from eosin.eval.run import evaluate
from eosin.eval.tasks import TaskConfig
from eosin.launch.artefacts import write_text
from eosin.launch.process import World
from eosin.launch.progress import format_seconds
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.export import ExportConfig, export
from eosin.pretrain.preview import preview
from eosin.pretrain.resume import refuse_changes
from eosin.pretrain.train import pretrain

TILE_MPP = 1.0
TILE_PX = 128
SHOWN_SLIDES = 8


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole chain on slides that eosin draws itself; minutes on two cores."""

    out: Path = Path("runs/demo")
    """Folder of everything the demo makes."""
    n_slides: int = 64
    """Synthetic slides, each a patient of its own."""
    n_test: int = 24
    """The last of them, which training never sees."""
    n_val: int = 12
    """Those before, on which the probes choose their hyper-parameters."""
    slide_px: int = 2048
    """Side of a slide at 0.5 µm/px."""
    recipe: str = "pretrain/demo"
    """Config of the training."""
    steps: int = 0
    """Optimiser steps; 0: the recipe's."""
    seed: int = 0
    """Of slides, training and probes."""

    def __post_init__(self) -> None:
        """Refuses a split that leaves nothing to train on."""
        if self.n_test < 1 or self.n_val < 1 or self.n_slides - self.n_test - self.n_val < 1:
            raise ValueError(
                f"n_slides={self.n_slides} must leave train slides beside n_test={self.n_test} "
                f"and n_val={self.n_val}"
            )
        _ = self.drawing, self.training  # so that their own refusals come before any work

    @property
    def drawing(self) -> SyntheticConfig:
        """The slides."""
        return SyntheticConfig(n_slides=self.n_slides, size_px=self.slide_px, seed=self.seed)

    @property
    def training(self) -> PretrainConfig:
        """The recipe with this demo's shards, folder and seed."""
        overrides = [
            f"shards={self.out / 'curated' / 'shards'}",
            f"out={self.out / 'run'}",
            f"seed={self.seed}",
            *([f"steps={self.steps}"] if self.steps else []),
        ]
        return load_config(PretrainConfig, [self.recipe], overrides)


def plan(config: DemoConfig) -> str:
    """What `demo` would do, for ``--dry-run``."""
    recipe = config.training
    return (
        f"{config.n_slides} synthetic slides ({config.n_test} for the test), tiles of {TILE_PX} px "
        f"at {TILE_MPP} µm/px, {recipe.steps} steps of {recipe.batch_size} tiles, probes against "
        f"three floors; about 6 minutes on two cores, 1 GB in {config.out}"
    )


def demo(config: DemoConfig) -> None:
    """Runs every stage that is not done yet and writes the report."""
    started = time.monotonic()
    out = config.out
    recipe = config.training
    refuse_changes(recipe, World())  # before its slides are drawn over
    slides = write_slides(out / "slides", config.drawing, workers=0)
    splits = assign_splits(slides, config)
    seen = [path for path in slides if splits[path] != "test"]
    unseen = [path for path in slides if splits[path] == "test"]

    curate(
        CurateConfig(
            slides=slide_table(out / "seen_slides.csv", seen), out=out / "curated",
            tile=TileOptions(mpp=TILE_MPP, size_px=TILE_PX),
            shard=ShardOptions(records_per_shard=512, seed=config.seed),
        )
    )  # fmt: skip
    task = SyntheticTaskConfig(mpp=TILE_MPP, size_px=TILE_PX, seed=config.seed)
    labels = write_task(out / "task", splits, task)

    pretrain(recipe)
    export(ExportConfig(run=recipe.out, out=out / "encoder"))
    evaluate(
        EvalConfig(
            encoder=str(out / "encoder"), task=TaskConfig(tiles=labels, name="synthetic"), out=out,
            seed=config.seed,
        ),
        with_report=False,
    )  # fmt: skip
    write_report(
        out / "report.html",
        load_results(out / "results.json"),
        pq.read_table(out / "predictions.parquet"),
        sections(config, recipe, seen, unseen, labels),
        title="eosin demo: from slides to a probed encoder",
        command="eosin demo",
    )
    print(f"demo: {format_seconds(time.monotonic() - started)}; open {out / 'report.html'}")


def assign_splits(slides: list[Path], config: DemoConfig) -> dict[Path, str]:
    """train, val or test of each slide, by its number."""
    first_test = len(slides) - config.n_test
    first_val = first_test - config.n_val
    names = ["train"] * first_val + ["val"] * config.n_val + ["test"] * config.n_test
    return dict(zip(slides, names, strict=True))


def slide_table(path: Path, slides: list[Path]) -> Path:
    """Writes the table that `eosin curate` and `eosin tile` take; paths relative to it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "group"])
    for slide in slides:
        writer.writerow([slide.relative_to(path.parent).as_posix(), slide.stem])
    write_text(path, text.getvalue())
    return path


def sections(
    config: DemoConfig, recipe: PretrainConfig, seen: list[Path], unseen: list[Path], labels: Path
) -> list[Section]:
    """The report's pictures: slides, tiles, crops, curves, feature maps."""
    figures = config.out / "figures"
    shown = seen[:SHOWN_SLIDES]
    overlays = [config.out / "curated" / "slides" / s.stem / "overlay.png" for s in shown]
    overlay_sheet(overlays, [slide.stem for slide in shown], figures / "overlays.png")
    tiles, names = _labelled_tiles(labels)
    tile_sheet(tiles, names, figures / "tiles.png")
    with ShardReader(recipe.shards) as reader:
        preview(reader, recipe.batch_plan, figures / "crops.png", n=5)
    draw_feature_maps(config.out / "encoder", unseen[:3], figures / "features.png")
    return [
        Section(
            title="Slides and tissue",
            text="Black outlines are the tissue that was found, green ones pen; blue cells hold "
            "tissue and were read. Glass and dust stay out, pen and blur fall to thresholds.",
            pictures=(Picture(path=figures / "overlays.png", caption="Slides training saw"),),
        ),
        Section(
            title="Labelled tiles",
            text="The classes differ in how they are built, not in their mean colour; stain, "
            "thickness and scanner change from slide to slide.",
            pictures=(Picture(path=figures / "tiles.png", caption="Tiles of each class"),),
        ),
        Section(
            title="Crops as the network sees them",
            text="Two global crops and the local ones of the first tiles that training takes, and "
            "what was drawn for each.",
            pictures=(Picture(path=figures / "crops.png", caption="A tile and its views"),),
        ),
        Section(
            title="Training",
            text="Student and teacher on the shards; the test slides are not among them.",
            pictures=(Picture(path=recipe.out / "curves.png", caption="From metrics.jsonl"),),
        ),
        Section(
            title="What the encoder sees",
            text="Patch tokens of whole test slides, tile by tile; their first three principal "
            "components are red, green and blue. Regions of one tissue should share a colour; "
            "after a training this short, stain and glass still show through.",
            pictures=(
                Picture(path=figures / "features.png", caption="Slide above, features below"),
            ),
        ),
    ]


def draw_feature_maps(encoder: Path, slides: list[Path], path: Path) -> None:
    """Patch tokens of whole slides, tile beside tile, as colours."""
    network = load_encoder(str(encoder), torch.device("cpu"))
    assert isinstance(network, NetworkEncoder)
    images, maps = [], []
    for name in slides:
        with Slide(name) as slide:
            side = int(min(slide.size_px) * slide.mpp[0] / TILE_MPP)
            count = side // TILE_PX
            image = slide.read_tile(0, 0, count * TILE_PX, TILE_MPP)
        cut = image.reshape(count, TILE_PX, count, TILE_PX, 3).swapaxes(1, 2)
        tokens = network.patch_tokens(cut.reshape(-1, TILE_PX, TILE_PX, 3))  # [tiles, h, w, D]
        h, w = tokens.shape[1:3]
        grid = tokens.reshape(count, count, h, w, -1).swapaxes(1, 2)
        images.append(image)
        maps.append(grid.reshape(count * h, count * w, -1))
    feature_map(maps, images, path)


def _labelled_tiles(labels: Path, per_class: int = 12) -> tuple[list[NDArray[np.uint8]], list[str]]:
    """Some test tiles of each class, from as many slides as there are."""
    with labels.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    chosen: dict[str, dict[str, str]] = {}
    for row in rows:
        of_class = chosen.setdefault(row["label"], {})
        if row["group"] not in of_class and len(of_class) < per_class:
            of_class[row["group"]] = row["path"]
    tiles, names = [], []
    for label, paths in sorted(chosen.items()):
        for path in paths.values():
            with Image.open(labels.parent / path) as image:
                tiles.append(np.asarray(image.convert("RGB")))
            names.append(label)
    return tiles, names
