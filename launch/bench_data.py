"""`eosin bench data`: tiles a second of one core, whole and by stage, against what others do.

The baselines are DINOv2's crops by Pillow and torchvision, the bare JPEG decoder, and stock
webdataset; see `bench_pipelines`. Both sides get the same tiles, each row in one process:

- ``crops``: from shards to batches of uint8 crops, against encoded tiles in memory to floats
- ``crops stain``: the same, with our turns, stain jitter and stain template besides
- ``decode``: what a worker does where the device renders (read, check, draw, decode, collate), but
  for the masks, against the bare decoder
- ``decode pillow``: our decoder against Pillow's
- ``read``: records in the order of training, checked, against webdataset streaming the same tars
- ``loader``, ``loader device``: the trainer's whole loader, against webdataset with the crops of
  the baseline, and with its own Pillow decoder alone
- ``crops device``: decoded tiles to normalised crops on the device
- ``stage …``: see `bench_stages`
"""

import itertools
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image

from eosin.configs.errors import InputError
from eosin.launch.bench import Row, in_turn, median_by_part, more_is_better, report
from eosin.launch.bench_pipelines import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PillowCrops,
    stream_batches,
    stream_records,
    stream_tiles,
)
from eosin.launch.bench_stages import STAGES, OurStages, PillowStages, Stages
from eosin.launch.bench_step import SIZES, BenchStepConfig, step_shape
from eosin.launch.bench_tiles import SECTION_PX, made_up_shards
from eosin.launch.device_names import DeviceName
from eosin.launch.peak import PEAK_TFLOPS
from eosin.launch.process import choose_device
from eosin.launch.stopwatch import seconds_now, wait_for
from eosin.pretrain.augment import AugmentConfig
from eosin.pretrain.batch import Batch, Inputs
from eosin.pretrain.flops import executed_flops
from eosin.pretrain.heads import HeadConfig
from eosin.pretrain.loader import LoaderConfig, batches, open_shards
from eosin.pretrain.masking import MaskConfig
from eosin.pretrain.network import ObjectiveConfig
from eosin.pretrain.stain import StainTemplateConfig
from eosin.pretrain.steps import BatchPlan, Steps
from eosin.pretrain.vit import VitConfig

Side: TypeAlias = Callable[[], int]
"""Does some work, and says for how many tiles."""

UNIT = "tiles/s"
MODEL_BATCH = 64
BASELINE_BATCH = 16
WITH_CROPS = {"crops", "crops stain", "loader"}
"""Kinds of rows that name the crops."""
FOREVER = 1 << 40
"""Steps; more than any clock lets through."""
LEAST = 1e-7
"""Seconds of a stage for a tile: a difference of two times may come out below zero."""


def dinov2_colours() -> AugmentConfig:
    """DINOv2's crops, and our stain jitter for the rows that name it."""
    return AugmentConfig(
        turn=0.0,
        brightness=0.4,
        contrast=0.4,
        saturation=0.2,
        hue=0.1,
        blur_sigma_px=(0.1, 2.0),
    )


@dataclass(frozen=True, kw_only=True)
class BenchDataConfig:
    """What is fed, and how it is timed."""

    augment: AugmentConfig = field(default_factory=dinov2_colours)
    """Of both sides. `turn`, `hed` and `stain` are of ours alone, in ``crops stain`` and by stage:
    the baseline has none. Each row sets `render` for itself."""
    shards: Path | None = None
    """Folder of shards to read; null: made-up H&E tiles, in shards of their own."""
    tile_px: int = 256
    """Side of the made-up tiles."""
    n_tiles: int = 128
    """Made-up tiles, or tiles of `shards` that are held in memory."""
    batch_size: int = 64
    """Tiles in a batch of ours. The baseline works tile by tile, whatever its batch: of it, no more
    than 16 are done at a time, so that the turns stay short."""
    seed: int = 0
    """Of tiles, order and crops."""
    threads: int = 1
    """CPU threads of either side. With 1 the time is the processor's, which others cannot spoil;
    with more it is the wall's."""
    device: DeviceName = "auto"
    """Where batches are transferred to."""
    repeats: int = 5
    """Times that either side is timed, in turn; medians are shown."""
    seconds: float = 0.5
    """Least time of one of them."""
    warmup: int = 1
    """Batches of either side before anything is timed."""
    model: VitConfig = field(
        default_factory=lambda: VitConfig(width=384, depth=12, heads=6, patch_px=14, drop_path=0.1)
    )
    """The encoder that the cores would feed."""
    objective: ObjectiveConfig = field(
        default_factory=lambda: ObjectiveConfig(head=HeadConfig(prototypes=65_536))
    )
    """Its losses and heads."""
    gpu: str = "H100"
    """What it would be trained on."""
    mfu: float = 0.4
    """Share of the GPU's peak that the training reaches."""
    tiles_per_s: float = 0.0
    """What the training takes; 0: what `model`, `objective`, `gpu` and `mfu` come to."""
    json: Path | None = None
    """Where the rows are written, too; ``--json FILE`` is the same."""

    def __post_init__(self) -> None:
        """Refuses what has no baseline, or would time nothing."""
        for name in ("n_tiles", "batch_size", "repeats", "warmup", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 1 <= self.tile_px <= SECTION_PX:
            raise ValueError(f"tile_px={self.tile_px} must lie in 1 to {SECTION_PX}")
        if self.n_tiles < self.batch_size:
            raise ValueError(f"n_tiles={self.n_tiles} is less than batch_size={self.batch_size}")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative")
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds={self.seconds} must be above 0")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu={self.mfu} must lie in (0, 1]")
        if not 0 <= self.tiles_per_s < math.inf:
            raise ValueError(f"tiles_per_s={self.tiles_per_s} must not be negative")
        if self.gpu not in PEAK_TFLOPS:
            raise ValueError(f"gpu={self.gpu} is not one of: {', '.join(PEAK_TFLOPS)}")
        for name, without in (("global_zoom", None), ("local_zoom", None), ("resolutions", [])):
            if getattr(self.augment, name) != without:
                raise ValueError(f"augment.{name}: the baseline has none; leave it out")
        _ = self.step  # so that its own refusals come before any work

    @property
    def views(self) -> str:
        """The crops, for the rows: ``2x224+8x98``."""
        views = self.augment
        local = f"+{views.n_local}x{views.local_px}" if views.n_local else ""
        return f"{views.n_global}x{views.global_px}{local}"

    @property
    def step(self) -> BenchStepConfig:
        """The training step whose operations are counted."""
        return BenchStepConfig(
            model=replace(self.model, image_px=self.augment.global_px),
            objective=self.objective,
            augment=self.augment,
            batch_size=MODEL_BATCH,
        )

    @property
    def unstained(self) -> AugmentConfig:
        """What the baseline does, too."""
        return replace(
            self.augment, render="worker", turn=0.0, hed=0.0, stain=StainTemplateConfig()
        )


def plan(config: BenchDataConfig) -> str:
    """What `bench_data` would do, for ``--dry-run``."""
    tiles = f"{config.n_tiles} made-up tiles of {config.tile_px} px"
    if config.shards is not None:
        tiles = f"the tiles of {config.shards}"
    return (
        f"data {config.views} of {tiles}: each side of each row {config.warmup} batches of "
        f"{config.batch_size} tiles, then {config.repeats} times at least {config.seconds:g} s, "
        f"in turn; {_model_name(config)} takes {model_rate(config):,.0f} tiles/s"
    )


def bench_data(config: BenchDataConfig) -> None:
    """Times every row, and reports; says how many cores feed one GPU.

    Raises:
        ConfigError: something cannot run on this machine.
        InputError: the shards cannot be used, or hold too few tiles, or others than JPEGs.
    """
    torch.set_num_threads(config.threads)
    cv2.setNumThreads(config.threads)
    device = choose_device(config.device)
    with ExitStack() as stack:
        folder = config.shards
        if folder is None:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folder = made_up_shards(scratch, config.n_tiles, config.tile_px, config.seed)
        stack.enter_context(torch.random.fork_rng(devices=[]))  # the baseline draws from it
        torch.default_generator.manual_seed(config.seed)
        rows = compare(config, Held(config, folder), device)
    clock = "processor time" if config.threads == 1 else f"wall time of {config.threads} threads"
    title = (
        f"batches of {config.batch_size}, {device.type}, medians of {config.repeats} x "
        f"{config.seconds:g} s in turn, {clock}"
    )
    report(title, list(rows.values()), config.json)
    print(cores_line(config, rows))


class Held:
    """The tiles of the comparison: in shards, and the same in memory.

    Args:
        config: of the bench.
        folder: shards.

    Raises:
        InputError: fewer than `n_tiles` tiles, or one that is no JPEG.
    """

    def __init__(self, config: BenchDataConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.reader = open_shards(str(folder), LoaderConfig())
        if len(self.reader) < config.n_tiles:
            raise InputError(
                f"{folder} holds {len(self.reader)} tiles, fewer than n_tiles={config.n_tiles}"
            )
        rows = list(itertools.islice(self.training_order(), config.n_tiles))
        self.payloads = [self.reader.payload(row) for row in rows]
        if any(payload.place.suffix != "jpg" for payload in self.payloads):
            raise InputError(f"{folder} holds other tiles than JPEGs, which the bare decoder needs")
        self.encoded: list[bytes] = [payload.data for payload in self.payloads]
        self.side_px = round(float(np.median(self.reader.index.hw(np.array(rows)))))

    def batch_plan(self, augment: AugmentConfig, masks: MaskConfig | None = None) -> BatchPlan:
        """Batches with these crops and masks, by default those of training."""
        config = self.config
        return BatchPlan(
            augment=augment,
            masks=masks or MaskConfig(),
            batch_size=config.batch_size,
            seed=config.seed,
            patch_px=config.model.patch_px,
        )

    def training_order(self) -> Iterator[int]:
        """Rows of the index in the order of training, without an end."""
        steps = Steps(self.reader, self.batch_plan(self.config.unstained))
        for step in itertools.count():
            yield from steps.rows_of(step).tolist()

    @property
    def baseline_batch(self) -> int:
        """Tiles that the baseline does at a time."""
        return min(self.config.batch_size, BASELINE_BATCH)

    def encoded_batches(self) -> Iterator[list[bytes]]:
        """Batches of encoded tiles, again and again."""
        tiles = itertools.cycle(self.encoded)
        while True:
            yield list(itertools.islice(tiles, self.baseline_batch))


def compare(config: BenchDataConfig, held: Held, device: torch.device) -> dict[str, Row]:
    """Every row, by the part of its name before the sizes."""
    tile, views = f"{held.side_px}px", config.views
    rows: dict[str, Row] = {}
    for kind, (ours, baseline) in whole_sides(config, held).items():
        name = f"{kind} {tile}" + (f" {views}" if kind in WITH_CROPS else "")
        rows[kind] = more_is_better(name, UNIT, *_rates(config, ours, baseline))
    rows["crops device"] = device_row(config, held, device)
    pixels = [held.reader.decode(payload) for payload in held.payloads[: config.batch_size]]
    pictures = [Image.fromarray(tile) for tile in pixels[: held.baseline_batch]]
    sides = (
        OurStages(pixels, config.augment, config.seed, device),
        PillowStages(pictures, config.augment, device),
    )
    for stage, (a, b) in stage_seconds(config, *sides).items():
        rows[stage] = more_is_better(f"stage {stage} {tile} {views}", UNIT, 1 / a, 1 / b)
    return rows


def whole_sides(config: BenchDataConfig, held: Held) -> dict[str, tuple[Side, Side]]:
    """Ours and the baseline of each row but those by stage and on the device."""
    pillow, encoded = PillowCrops(config.augment), held.encoded_batches()
    size, fewer = config.batch_size, held.baseline_batch
    on_device = replace(config.augment, render="device")

    def made(plan: BatchPlan) -> Side:
        steps = Steps(held.reader, plan)
        return over((_whole(steps[step]) for step in itertools.count()), size)

    def loaded(plan: BatchPlan) -> Side:
        return over(
            batches(held.reader, plan, LoaderConfig(), first_step=0, last_step=FOREVER), size
        )

    def over(source: Iterator[object], tiles: int) -> Side:
        def take() -> int:
            next(source)
            return tiles

        return take

    unstained = held.batch_plan(config.unstained)
    pillow_crops = over(map(pillow.batch, encoded), fewer)
    sides = {"crops": (made(unstained), pillow_crops)}
    if config.augment.hed or config.augment.stain.probability:
        stained = held.batch_plan(replace(config.augment, render="worker"))
        sides["crops stain"] = made(stained), pillow_crops
    tiles = itertools.chain.from_iterable(encoded)
    payloads, order = itertools.cycle(held.payloads), held.training_order()
    return sides | {
        "decode": (
            made(held.batch_plan(on_device, MaskConfig(share=0.0))),
            over(map(_decode_bare, tiles), 1),
        ),
        "decode pillow": (
            over(map(held.reader.decode, payloads), 1),
            over(map(pillow.decode, tiles), 1),
        ),
        "read": (over(map(held.reader.read, order), 1), over(stream_records(held.folder), 1)),
        "loader": (
            loaded(unstained),
            over(stream_batches(held.folder, pillow, fewer), fewer),
        ),
        "loader device": (
            loaded(held.batch_plan(on_device)),
            over(stream_tiles(held.folder), 1),
        ),
    }


def device_row(config: BenchDataConfig, held: Held, device: torch.device) -> Row:
    """Decoded tiles to crops on the device, against the baseline's on one core."""
    pillow, inputs = PillowCrops(config.augment), Inputs(device, IMAGENET_MEAN, IMAGENET_STD)
    batch = _whole(Steps(held.reader, held.batch_plan(replace(config.augment, render="device")))[0])
    if device.type == "cuda":
        batch = batch.pin_memory()
    pictures = [pillow.decode(data) for data in held.encoded[: held.baseline_batch]]

    def ours() -> int:
        inputs(batch.images)
        wait_for(device)
        return config.batch_size

    def baseline() -> int:
        pillow.collate([pillow.views(picture) for picture in pictures])
        return len(pictures)

    rates = _rates(config, ours, baseline, on_gpu=device.type == "cuda")
    return more_is_better(f"crops device {held.side_px}px {config.views}", UNIT, *rates)


def stage_seconds(
    config: BenchDataConfig, ours: Stages, baseline: Stages
) -> dict[str, tuple[float, float]]:
    """Seconds a tile of each stage, ours and the baseline's."""

    def timer(side: Stages) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            spent, rounds, begin = dict.fromkeys(STAGES, 0.0), 0, seconds_now(False)
            while seconds_now(False) < begin + config.seconds or not rounds:
                rounds += 1
                for stage, seconds in side.seconds().items():
                    spent[stage] += seconds
            return {s: max(t / rounds, LEAST) for s, t in spent.items()}

        return run

    for side in (ours, baseline):
        for _ in range(config.warmup):
            side.seconds()
    a, b = (median_by_part(r) for r in in_turn(timer(ours), timer(baseline), config.repeats))
    return {stage: (a[stage], b[stage]) for stage in STAGES}


def model_rate(config: BenchDataConfig) -> float:
    """Tiles a second that the training takes."""
    if config.tiles_per_s:
        return config.tiles_per_s
    step = config.step
    flops = executed_flops(step.model, step.objective, step_shape(step, held_logits=0)).model
    return config.mfu * PEAK_TFLOPS[config.gpu] * 1e12 * MODEL_BATCH / flops


def cores_line(config: BenchDataConfig, rows: dict[str, Row]) -> str:
    """How many cores feed one GPU: with each of our two ways, and with the baseline's."""
    rate = model_rate(config)
    crops = rows.get("crops stain", rows["crops"])
    ways = {
        "crops in workers": crops.ours,
        "crops on the device": rows["loader device"].ours,
        "Pillow and torchvision": crops.baseline,
    }
    cores = [
        f"{math.ceil(config.threads * rate / way):,} with {name}" for name, way in ways.items()
    ]
    return f"{_model_name(config)} at {rate:,.0f} tiles/s takes these cores: {', '.join(cores)}"


def _model_name(config: BenchDataConfig) -> str:
    model = config.model
    return f"ViT-{SIZES.get(model.width, f'D{model.width}')}/{model.patch_px} on one {config.gpu}"


def _rates(
    config: BenchDataConfig, ours: Side, baseline: Side, *, on_gpu: bool = False
) -> tuple[float, float]:
    """Medians of the tiles a second of both sides; by the wall's clock where a GPU works."""

    def timer(side: Side) -> Callable[[], float]:
        def run() -> float:
            begin, tiles, spent = seconds_now(on_gpu), 0, 0.0
            while spent < config.seconds:
                tiles += side()
                spent = seconds_now(on_gpu) - begin
            return tiles / spent

        return run

    for side in (ours, baseline):
        for _ in range(config.warmup):
            side()
    a, b = in_turn(timer(ours), timer(baseline), config.repeats)
    return statistics.median(a), statistics.median(b)


def _whole(batch: Batch | Exception) -> Batch:
    if isinstance(batch, Exception):
        raise batch
    return batch


def _decode_bare(data: bytes) -> object:
    return simplejpeg.decode_jpeg(data, "RGB")
