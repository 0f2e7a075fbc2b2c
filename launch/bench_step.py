"""`eosin bench step`: a whole training step against the plain one, in turn, and where it goes."""

import itertools
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from eosin.configs.errors import EosinError
from eosin.launch.bench import (
    Row,
    in_turn,
    less_is_better,
    median_by_part,
    more_is_better,
    report,
)
from eosin.launch.bench_sides import PARTS, FastStep, PlainStep, Side
from eosin.launch.bench_tiles import made_up_shards
from eosin.launch.device_names import DeviceName, PrecisionName
from eosin.launch.host_memory import keep_freed_memory
from eosin.launch.peak import known_peak
from eosin.launch.process import World, choose_device, choose_precision, usable_cores
from eosin.launch.stopwatch import (
    NoWatch,
    TimeByPart,
    memory_by_part,
    seconds_now,
    state_bytes,
    wait_for,
)
from eosin.pretrain.attention import AttentionName
from eosin.pretrain.augment import AugmentConfig
from eosin.pretrain.batch import Batch, Crops
from eosin.pretrain.config import CompileName, PretrainConfig
from eosin.pretrain.flops import StepShape, executed_flops, nominal_flops
from eosin.pretrain.heads import HeadConfig
from eosin.pretrain.loader import LoaderConfig, batches, open_shards
from eosin.pretrain.loss_memory import compare_loss_memory
from eosin.pretrain.masking import MaskConfig
from eosin.pretrain.network import ObjectiveConfig
from eosin.pretrain.optim import OptimConfig
from eosin.pretrain.parallel import ParallelName
from eosin.pretrain.plain_step import check_plain
from eosin.pretrain.prototype_kernels import LossKernelName
from eosin.pretrain.rate import Rate, flops_counter
from eosin.pretrain.recompute import Recompute
from eosin.pretrain.vit import VitConfig

TOTAL_STEPS = 100_000
FIRST_STEP = 50_000  # every schedule is past its warm-up
HELD_BATCHES = 4
SETTLING = 2
"""Steps of a side before those that are timed: the other side's have taken memory and caches."""
WHOLE = "whole"
SIZES = {192: "T", 384: "S", 768: "B", 1024: "L", 1280: "H", 1536: "g"}
MIB = 2**20
MADE_UP = "made-up"
LEAST_TILES, TILE_PX = 512, 256
"""Of shards that are drawn for it."""


@dataclass(frozen=True, kw_only=True)
class BenchStepConfig:
    """A training step and how it is timed; the defaults suit a CPU, `bench/step_gpu` a GPU."""

    model: VitConfig = field(
        default_factory=lambda: VitConfig(width=192, depth=12, heads=3, patch_px=16)
    )
    """The encoder, with its drop_path."""
    objective: ObjectiveConfig = field(
        default_factory=lambda: ObjectiveConfig(head=HeadConfig(prototypes=8192))
    )
    """The losses and heads: DINO, iBOT and KoLeo with Sinkhorn targets."""
    augment: AugmentConfig = field(default_factory=lambda: AugmentConfig(local_px=96))
    """Number and sizes of the crops; the rest counts with `shards` alone."""
    masks: MaskConfig = field(default_factory=MaskConfig)
    """The masked patches."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimiser."""
    batch_size: int = 8
    """Tiles a step."""
    group_size: int = 0
    """Tiles that share the draws of masks and drop-path; divides batch_size; 0: batch_size."""
    seed: int = 0
    """Of weights, crops, masks and drop-path."""
    shards: str | None = None
    """Folder of shards to take tiles from, and to measure the wait for them; ``made-up`` draws some
    for it; null: random crops."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """Worker processes; counts with `shards` alone."""
    device: DeviceName = "auto"
    """A GPU where there is one."""
    precision: PrecisionName = "auto"
    """bf16 where the hardware has it, for both sides."""
    attention: AttentionName = "auto"
    """Our attention kernel."""
    loss_kernels: LossKernelName = "auto"
    """Of our cross-entropies over prototypes."""
    compile: CompileName = "auto"
    """torch.compile of our blocks and heads; ``auto`` does it on a GPU."""
    parallel: ParallelName = "auto"
    """Of our step; `eosin bench layouts` sets it."""
    recompute: Recompute = "none"
    """What our blocks compute again in the backward instead of keeping it in memory."""
    threads: int = 0
    """CPU threads; 0: one a core."""
    repeats: int = 5
    """Times that either side is timed, in turn; medians are shown."""
    steps_per_repeat: int = 0
    """Steps timed together, without a wait between them; 0: 2 on a CPU, 10 on a GPU."""
    warmup: int = 5
    """Steps of either side before anything is timed."""
    loss_prototypes: int = 131_072
    """K of the comparison of the losses' memory; 0 for none."""
    loss_rows: int = 2_000
    """M of the same."""
    json: Path | None = None
    """Where the rows are written, too; ``--json FILE`` is the same."""

    def __post_init__(self) -> None:
        """Refuses what cannot be trained, or has no baseline, or would time nothing."""
        check_plain(self.objective)
        for name in ("repeats", "warmup", "loss_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("steps_per_repeat", "loss_prototypes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        _ = self.training  # so that its own refusals come before any work

    @property
    def training(self) -> PretrainConfig:
        """The training that the step is one of."""
        shared = {
            name: getattr(self, name)
            for name in (
                "model", "objective", "augment", "masks", "optim", "batch_size", "group_size",
                "seed", "loader", "device", "precision", "attention", "loss_kernels", "compile",
                "recompute", "threads", "parallel",
            )
        }  # fmt: skip
        return PretrainConfig(shards=self.shards or "", out=Path(), steps=TOTAL_STEPS, **shared)

    @property
    def name(self) -> str:
        """What is compared, for the rows: ``T/16 2x224+8x96 K=8192``."""
        model, views = self.model, self.augment
        size = SIZES.get(model.width, f"D{model.width}")
        local = f"+{views.n_local}x{views.local_px}" if views.n_local else ""
        name = f"{size}/{model.patch_px} {views.n_global}x{views.global_px}{local}"
        name += f" K={self.objective.head.prototypes}"
        return name + (f" drop {model.drop_path:g}" if model.drop_path else "")


def plan(config: BenchStepConfig) -> str:
    """What `bench_step` would do, for ``--dry-run``."""
    shape = step_shape(config, held_logits=0)
    ours, full = (
        count(config.model, config.objective, shape).model / config.batch_size / 1e9
        for count in (executed_flops, nominal_flops)
    )
    steps = config.repeats * _steps_per_repeat(config, choose_device(config.device))
    return (
        f"step {config.name}: on either side {config.warmup} steps of warm-up, then {steps} timed "
        f"ones of {config.batch_size} tiles, in turn; {ours:.1f} GFLOP a tile for ours, "
        f"{full:.1f} for the plain step"
    )


def bench_step(config: BenchStepConfig) -> None:
    """Times both sides, and reports.

    Raises:
        ConfigError: something cannot run on this machine.
        EosinError: a process that measures the losses' memory failed.
    """
    torch.set_num_threads(config.threads or usable_cores())
    device = choose_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()  # as the trainer does
    dtype = choose_precision(config.precision, device)
    with tempfile.TemporaryDirectory() as folder:
        if config.shards == MADE_UP:
            tiles = max(LEAST_TILES, 2 * config.batch_size)
            shards = made_up_shards(Path(folder), tiles, TILE_PX, config.seed)
            config = replace(config, shards=str(shards))
        title, rows = compare(config, FastStep(config.training, device, dtype, Path(folder)))
    if config.loss_prototypes:
        rows.append(loss_memory_row(config, device))
    report(title, rows, config.json)


def compare(config: BenchStepConfig, fast: FastStep) -> tuple[str, list[Row]]:
    """How both sides were run, and every row of the step itself."""
    device, crops = fast.device, held_batches(config)
    plain = PlainStep(fast)
    peaks = [warm_up(config, side, crops, device) for side in (fast, plain)]

    steps = _steps_per_repeat(config, device)
    first = FIRST_STEP + config.warmup + 1

    def timer(side: Side) -> Callable[[], dict[str, float]]:
        starts = itertools.count(first, SETTLING + steps)

        def settle_and_time() -> dict[str, float]:
            batches = take_from(config, crops, next(starts), SETTLING + steps)
            for batch in batches[:SETTLING]:
                side.take(batch, NoWatch())
            return time_steps(side, batches[SETTLING:], device)

        return settle_and_time

    ours, baseline = in_turn(timer(fast), timer(plain), config.repeats)
    rows = step_rows(config, fast, ours, baseline)
    for part in PARTS:
        name = f"step memory {config.name} {part}"
        rows.append(less_is_better(name, "MiB", *(peak[part] / MIB for peak in peaks)))
    if config.shards is not None:
        rows.append(data_row(config, fast, rows[0].ours, config.repeats * steps))
    title = (
        f"{fast.choices}, {torch.get_num_threads()} threads, batch {config.batch_size}, medians of "
        f"{config.repeats} x {steps} steps in turn"
        + (", processor time" if device.type == "cpu" and torch.get_num_threads() == 1 else "")
    )
    return title, rows


def held_batches(config: BenchStepConfig) -> list[Batch]:
    """The crops that the sides are timed on: of the shards, or random."""
    if config.shards is not None:
        return list(_from_shards(config, HELD_BATCHES))
    views, generator = config.augment, torch.Generator().manual_seed(config.seed)

    def crops(number: int, side: int) -> torch.Tensor:
        shape = (number, config.batch_size, side, side, 3)
        return torch.randint(256, shape, dtype=torch.uint8, generator=generator)

    rows = torch.arange(config.batch_size)
    return [
        Batch(
            step,
            Crops(crops(views.n_global, views.global_px), crops(views.n_local, views.local_px)),
            config.training.batch_plan.masks_of(step), rows, damaged={},
        )
        for step in range(HELD_BATCHES)
    ]  # fmt: skip


def take_from(
    config: BenchStepConfig, crops: Sequence[Batch], first: int, steps: int
) -> list[Batch]:
    """The crops in a ring, as the batches of `steps` steps from `first` on, each with its masks."""
    masks_of = config.training.batch_plan.masks_of
    return [
        replace(crops[i % len(crops)], step=i, masks=masks_of(i))
        for i in range(first, first + steps)
    ]


def warm_up(
    config: BenchStepConfig, side: Side, crops: Sequence[Batch], device: torch.device
) -> dict[str, int]:
    """Takes some steps; then one of which it gives the peak bytes of each part, state included."""
    *first, last, watched_one = take_from(config, crops, FIRST_STEP, config.warmup + 1)
    for batch in first:
        side.take(batch, NoWatch())
    side.optimizer.zero_grad()
    state, watch = state_bytes(side.model, side.optimizer), memory_by_part(device)
    side.take(last, NoWatch())  # after which there are gradients, which the watch knows of
    side.take(watched_one, watch)
    wait_for(device)
    return {part: state + peak for part, peak in watch.peaks.items()}


def time_steps(side: Side, batches: Sequence[Batch], device: torch.device) -> dict[str, float]:
    """Seconds a step of each part, and of all under ``WHOLE``."""
    wait_for(device)
    watch = TimeByPart(device)
    is_cuda = device.type == "cuda"
    start = seconds_now(is_cuda)
    for batch in batches:
        side.take(batch, watch)
    wait_for(device)
    whole = seconds_now(is_cuda) - start
    return {n: t / len(batches) for n, t in ({WHOLE: whole} | watch.seconds()).items()}


def step_shape(config: BenchStepConfig, held_logits: int) -> StepShape:
    """The sizes that the operations are counted for; masked patches as some steps have on average.

    Args:
        config: of the step.
        held_logits: see `StepShape`.
    """
    views = config.augment
    masks_of = config.training.batch_plan.masks_of
    masked = [masks_of(FIRST_STEP + i).sum() for i in range(8)]
    return StepShape(
        batch=config.batch_size,
        global_px=views.global_px,
        local_px=views.local_px,
        n_global=views.n_global,
        n_local=views.n_local,
        masked=round(statistics.mean(int(m) for m in masked)),
        group_size=config.group_size,
        held_logits=held_logits,
    )


def step_rows(
    config: BenchStepConfig,
    fast: FastStep,
    ours: Sequence[dict[str, float]],
    baseline: Sequence[dict[str, float]],
) -> list[Row]:
    """Rate, executed operations, share of the peak, and time by part.

    Args:
        config: of the step.
        fast: our side.
        ours: `time_steps` of each repeat.
        baseline: likewise.
    """
    name, batch = config.name, config.batch_size
    a, b = median_by_part(ours), median_by_part(baseline)
    held_logits = fast.model.kernels.dense_elements if fast.device.type == "cpu" else 0
    shape = step_shape(config, held_logits)
    lean = executed_flops(config.model, config.objective, shape)
    full = nominal_flops(config.model, config.objective, shape)
    peak = peak_flops(fast.device, fast.dtype)
    done = lean.hardware / a[WHOLE], full.hardware / b[WHOLE]
    used = lean.model / a[WHOLE] / peak, full.model / b[WHOLE] / peak
    return [
        more_is_better(f"step {name}", "tiles/s", batch / a[WHOLE], batch / b[WHOLE]),
        more_is_better(f"step executed {name}", "TFLOP/s", done[0] / 1e12, done[1] / 1e12),
        more_is_better(f"step MFU {name}", "%", 100 * used[0], 100 * used[1]),
        *(
            less_is_better(f"step time {name} {part}", "ms", 1000 * a[part], 1000 * b[part])
            for part in PARTS
        ),
    ]


def data_row(config: BenchStepConfig, fast: FastStep, held_rate: float, steps: int) -> Row:
    """Our rate with the loader at work, against that on crops held in memory."""
    rate = Rate(flops_counter(config.training), fast.device, fast.dtype, World())
    stream = rate.waiting(_from_shards(config, steps + 1))
    first = next(stream)  # waits until the workers are there
    fast.take(first, NoWatch())
    wait_for(fast.device)
    rate.lap()
    for batch in stream:
        fast.take(batch, NoWatch())
    wait_for(fast.device)
    lap = rate.lap()
    name = f"step data {config.name} waiting {100 * lap.data_wait:.0f} %"
    return more_is_better(name, "tiles/s", lap.samples_per_s, held_rate)


def loss_memory_row(config: BenchStepConfig, device: torch.device) -> Row:
    """Peak memory of the losses over prototypes, each side in a process of its own."""
    head, rows = config.objective.head, config.loss_rows
    try:
        memory = compare_loss_memory(config.loss_prototypes, rows, head.bottleneck, device.type)
    except subprocess.CalledProcessError as error:
        raise EosinError(
            f"loss memory K={config.loss_prototypes} M={rows}: its process ended with "
            f"{error.returncode}; give smaller loss_prototypes or loss_rows, or loss_prototypes=0"
        ) from error
    peaks = memory.ours.peak_bytes / MIB, memory.textbook.peak_bytes / MIB
    return less_is_better(f"loss memory K={config.loss_prototypes} M={rows}", "MiB", *peaks)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second that an MFU is the share of.

    Of a known GPU in bf16 the data sheet's; elsewhere what a large product of matrices reaches.
    """
    if (known := known_peak(device, dtype)) is not None:
        return known
    side = 8192 if device.type == "cuda" else 1024
    a = torch.ones(side, side, device=device, dtype=dtype)
    seconds = []
    for _ in range(8):
        wait_for(device)
        start = seconds_now(device.type == "cuda")
        a @ a
        wait_for(device)
        seconds.append(seconds_now(device.type == "cuda") - start)
    return float(2 * side**3 / min(seconds))


def _steps_per_repeat(config: BenchStepConfig, device: torch.device) -> int:
    return config.steps_per_repeat or (10 if device.type == "cuda" else 2)


def _from_shards(config: BenchStepConfig, steps: int) -> Iterator[Batch]:
    assert config.shards is not None
    return batches(
        open_shards(config.shards, config.loader),
        config.training.batch_plan,
        config.loader,
        first_step=FIRST_STEP,
        last_step=FIRST_STEP + steps,
        pin=choose_device(config.device).type == "cuda",
    )
