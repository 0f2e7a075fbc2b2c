"""What every training is told, whether it is of tiles or of slides."""

from dataclasses import dataclass, field
from pathlib import Path

from eosin.configs.errors import ConfigError
from eosin.launch.device_names import DeviceName, PrecisionName
from eosin.launch.metrics import WandbMode
from eosin.launch.preflight import PreflightConfig
from eosin.launch.process import World
from eosin.pretrain.attention import AttentionName
from eosin.pretrain.optim import OptimConfig
from eosin.pretrain.parallel import ParallelName
from eosin.pretrain.prototype_kernels import LossKernelName
from eosin.pretrain.recompute import Recompute
from eosin.pretrain.retention import Retention
from eosin.pretrain.schedules import Schedule
from eosin.pretrain.spike import SpikeConfig
from eosin.pretrain.start import StartConfig

MAY_CHANGE = frozenset(
    {
        "out",
        "shards",
        "bags.stores",
        "bags.table",
        "loader",
        "workers",
        "prefetch",
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


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """The part of a training's config that does not depend on what is trained."""

    out: Path
    """Run folder; when it exists, the run goes on from its newest checkpoint."""
    steps: int = 125_000
    """Optimiser steps."""
    batch_size: int = 64
    """Samples a step: tiles, slides or patients."""
    group_size: int = 0
    """Samples that share the draws of masks and drop-path, and that a spread over groups is taken
    among; divides batch_size; 0: batch_size."""
    seed: int = 0
    """Of weights, order, crops or views, masks and drop-path."""
    start: StartConfig = field(default_factory=StartConfig)
    """From which weights; drawn ones by default."""
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
    device: DeviceName = "auto"
    """A GPU where there is one."""
    precision: PrecisionName = "auto"
    """bf16 where the hardware has it; weights, moments and losses stay fp32."""
    parallel: ParallelName = "auto"
    """How several processes share the training: ``ddp`` replicates, ``fsdp`` shards everything over
    all ranks, ``hybrid`` over those of a node; ``auto`` replicates what fits."""
    shard_ranks: int = 0
    """hybrid: ranks that share one copy; 0: those of a node."""
    attention: AttentionName = "auto"
    """The attention kernel."""
    loss_kernels: LossKernelName = "auto"
    """Of the cross-entropies over prototypes."""
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
    """Go on with a run whose config or data were others."""
    wandb: WandbMode = "disabled"
    """Also log to wandb; ``offline`` needs no account."""
    tensorboard: bool = False
    """Also write TensorBoard files, to ``tensorboard/`` of `out`."""

    def __post_init__(self) -> None:
        """Refuses values that contradict each other."""
        if self.seed >= 1 << 64:
            raise ValueError(f"seed={self.seed} must be below 2^64")
        for name in ("seed", "threads", "group_size", "shard_ranks", "timeout_s"):
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
        for name in ("steps", "log_every", "use_window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def group(self) -> int:
        """Samples that share a draw of masks and drop-path."""
        return self.group_size or self.batch_size

    @property
    def off(self) -> frozenset[str]:
        """Terms of the loss that the objective has not, by name."""
        raise NotImplementedError

    @property
    def unit(self) -> str:
        """What a sample is, in the plural."""
        raise NotImplementedError

    @property
    def data(self) -> str:
        """What the data is, in the plural."""
        raise NotImplementedError

    @property
    def source(self) -> str:
        """Where the data lies, for messages."""
        raise NotImplementedError

    def ways_to_less_memory(self, world: World) -> list[str]:
        """What to change when memory runs out; what alters nothing of what is learned comes first.

        Args:
            world: of the rank that ran out.
        """
        ways = []
        if self.recompute != "full":
            ways.append("recompute=selective" if self.recompute == "none" else "recompute=full")
        return ways

    def check_ranks(self, world: World, parts: int = 1) -> None:
        """Refuses ranks that a batch does not divide among.

        Args:
            world: the ranks.
            parts: that each takes its share in.

        Raises:
            ConfigError: it does not.
        """
        shares = world.size * parts * self.group
        if self.batch_size % shares:
            in_parts = f" times accumulate={parts}" if parts > 1 else ""
            raise ConfigError(
                f"batch_size={self.batch_size} must be a multiple of {shares}: {world.size} ranks"
                f"{in_parts} times group_size={self.group} (a group never spans two of them, so "
                "that the arithmetic does not depend on how many there are)"
            )
