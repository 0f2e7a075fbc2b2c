"""The config of one training: the tree of its parts' configs."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeAlias

from eosin.configs.errors import ConfigError
from eosin.launch.device_names import DeviceName, PrecisionName
from eosin.launch.metrics import WandbMode
from eosin.launch.preflight import PreflightConfig
from eosin.launch.process import World
from eosin.pretrain.attention import AttentionName
from eosin.pretrain.augment import AugmentConfig
from eosin.pretrain.frozen_teacher import TeacherConfig
from eosin.pretrain.loader import LoaderConfig
from eosin.pretrain.masking import MaskConfig
from eosin.pretrain.network import ObjectiveConfig
from eosin.pretrain.optim import OptimConfig
from eosin.pretrain.order import MixtureConfig
from eosin.pretrain.parallel import ParallelName
from eosin.pretrain.prototype_kernels import LossKernelName
from eosin.pretrain.recompute import Recompute
from eosin.pretrain.retention import Retention
from eosin.pretrain.schedules import Schedule
from eosin.pretrain.spike import SpikeConfig
from eosin.pretrain.start import StartConfig
from eosin.pretrain.steps import BatchPlan
from eosin.pretrain.vit import VitConfig

MAY_CHANGE = frozenset(
    {
        "out",
        "shards",
        "loader",
        "preview",
        "device",
        "threads",
        "attention",
        "loss_kernels",
        "compile",
        "recompute",
        "log_every",
        "checkpoints",
        "parallel",
        "shard_ranks",
        "accumulate",
        "timeout_s",
        "preflight",
        "accept_changes",
        "spike",
        "wandb",
        "tensorboard",
    }
)
"""Config keys that a resumed run may be given anew: none of them touches what is learned, but for
the rounding of another device, kernel or number of threads."""

SIZES = ("global_px", "local_px")
"""Of the crops."""

CompileName: TypeAlias = Literal["auto", "blocks", "none"]


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """One training; `--config pretrain/…` gives a recipe, `--config size/…` a network."""

    shards: str
    """Folder of shards with index.parquet, or its URL in an object store (``s3://…``)."""
    out: Path
    """Run folder; when it exists, the run goes on from its newest checkpoint."""
    preview: bool = False
    """Draw the first tiles with their crops into preview.png of `out`, and train nothing."""
    steps: int = 125_000
    """Optimiser steps."""
    batch_size: int = 64
    """Tiles a step."""
    group_size: int = 0
    """Tiles that share the draws of masks and drop-path, and that a spread over groups is taken
    among; divides batch_size; 0: batch_size."""
    seed: int = 0
    """Of weights, order, crops, masks and drop-path."""
    model: VitConfig = field(default_factory=VitConfig)
    """The encoder."""
    start: StartConfig = field(default_factory=StartConfig)
    """From which weights; drawn ones by default."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """Whom the student learns from: its own moving average by default."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The losses and heads."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """The crops."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    """How often tiles of each kind come up."""
    window_shards: int = 64
    """Shards that are shuffled together: more mix better, fewer read more in sequence. 0: all."""
    masks: MaskConfig = field(default_factory=MaskConfig)
    """The masked patches."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimiser."""
    spread_ramp: tuple[float, float] = (0.0, 0.0)
    """Shares of all steps between which the spread term's weight rises from 0 in a line."""
    momentum: Schedule = field(default_factory=lambda: Schedule(peak=0.992, end=1.0, start=0.992))
    """Of the teacher's moving average."""
    temperature: Schedule = field(
        default_factory=lambda: Schedule(
            peak=0.07, end=0.07, start=0.04, warmup=0.3, shape="constant"
        )
    )
    """Of the teacher."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Of the channels in 0 … 1, subtracted from every crop (ImageNet's by default)."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Of the channels, divided by."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """Worker processes, reading ahead, and the budget of damaged records."""
    device: DeviceName = "auto"
    """A GPU where there is one."""
    precision: PrecisionName = "auto"
    """bf16 where the hardware has it; weights, moments and losses stay fp32."""
    parallel: ParallelName = "auto"
    """How several processes share the training: ``ddp`` replicates, ``fsdp`` shards everything over
    all ranks, ``hybrid`` over those of a node; ``auto`` replicates what fits."""
    shard_ranks: int = 0
    """hybrid: ranks that share one copy; 0: those of a node."""
    accumulate: int = 1
    """Parts that each rank takes its share of a batch in, for less memory: the same gradient."""
    attention: AttentionName = "auto"
    """The attention kernel."""
    loss_kernels: LossKernelName = "auto"
    """Of the cross-entropies over prototypes."""
    compile: CompileName = "auto"
    """torch.compile of each block and head; ``auto`` does it on a GPU."""
    recompute: Recompute = "none"
    """What the blocks compute again in the backward instead of keeping it in memory."""
    threads: int = 0
    """CPU threads of this process; 0: one a core."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl; between them nothing waits for the device."""
    use_window: int = 100
    """Steps over which the prototypes in use are counted."""
    checkpoints: Retention = field(default_factory=Retention)
    """When they are written, and which are kept."""
    max_bad_steps: int = 10
    """Steps with a NaN or Inf in a row after which the run stops; such a step changes nothing, and
    is looked for every `log_every` steps."""
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    """What each node has to show before the first step, where there are several processes."""
    spike: SpikeConfig = field(default_factory=SpikeConfig)
    """What is a spike of the loss, for going back to the last good checkpoint and passing over the
    data that made it; off by default."""
    timeout_s: float = 600.0
    """Seconds without a finished step after which the run writes down where each rank stands, and
    ends; the first step may take three times as long. 0: never."""
    accept_changes: bool = False
    """Go on with a run whose config or shards were others."""
    wandb: WandbMode = "disabled"
    """Also log to wandb; ``offline`` needs no account."""
    tensorboard: bool = False
    """Also write TensorBoard files, to ``tensorboard/`` of `out`."""

    def __post_init__(self) -> None:
        """Refuses values that contradict each other."""
        if self.model.image_px != self.augment.global_px:
            raise ValueError(
                f"model.image_px={self.model.image_px} must equal "
                f"augment.global_px={self.augment.global_px}"
            )
        sizes = {f"augment.{name}": getattr(self.augment, name) for name in SIZES}
        for number, resolution in enumerate(self.augment.resolutions):
            for name in SIZES:
                sizes[f"augment.resolutions[{number}].{name}"] = getattr(resolution, name)
        for name, size_px in sizes.items():
            if size_px % self.model.patch_px:
                raise ValueError(
                    f"{name}={size_px} is not a multiple of model.patch_px={self.model.patch_px}"
                )
        if self.seed >= 1 << 64:
            raise ValueError(f"seed={self.seed} must be below 2^64")
        for name in ("seed", "threads", "group_size", "window_shards", "shard_ranks", "timeout_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.batch_size < 1 or self.batch_size % self.group:
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of group_size={self.group_size}"
            )
        low, high = self.spread_ramp
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"spread_ramp={self.spread_ramp} must be two ascending shares in [0, 1]"
            )
        for name in ("steps", "log_every", "use_window", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

        if self.accumulate > 1:
            self._check_accumulates()

    def _check_accumulates(self) -> None:
        """Refuses losses that are no mean over parts of the batch."""
        o = self.objective
        if self.batch_size % (self.accumulate * self.group):
            raise ValueError(
                f"accumulate={self.accumulate} parts of batch_size={self.batch_size} must be whole "
                f"groups of group_size={self.group}"
            )
        if o.spread.weight > 0 and o.spread.over == "batch":
            raise ValueError(
                f"accumulate={self.accumulate} with objective.spread.over=batch: neighbours are "
                "looked for in the whole batch, which is never there at once; use over=group"
            )
        if o.gram.weight > 0 and (o.gram.level, o.gram.tokens) != ("image", "all"):
            raise ValueError(
                f"accumulate={self.accumulate} needs objective.gram.level=image and tokens=all: "
                "others are no mean over the parts of a batch"
            )

    @property
    def group(self) -> int:
        """Samples that share a draw of masks and drop-path."""
        return self.group_size or self.batch_size

    def plan_of(self, world: World, skips: Sequence[tuple[int, int]] = ()) -> BatchPlan:
        """What one rank's share of the batches depends on.

        Args:
            world: of the rank.
            skips: data that is passed over, as in `checkpoint.TrainState`.

        Raises:
            ConfigError: the batch does not divide among the ranks.
        """
        shares = world.size * self.accumulate * self.group
        if self.batch_size % shares:
            raise ConfigError(
                f"batch_size={self.batch_size} must be a multiple of {shares}: {world.size} ranks "
                f"times accumulate={self.accumulate} times group_size={self.group} (a group never "
                "spans two of them, so that the arithmetic does not depend on how many there are)"
            )
        return replace(self.batch_plan, rank=world.rank, world=world.size, skips=tuple(skips))

    @property
    def batch_plan(self) -> BatchPlan:
        """What the batches depend on."""
        return BatchPlan(
            augment=self.augment,
            batch_size=self.batch_size,
            seed=self.seed,
            masks=self.masks,
            patch_px=self.model.patch_px,
            group_size=self.group_size,
            mixture=self.mixture,
            window_shards=self.window_shards,
        )
