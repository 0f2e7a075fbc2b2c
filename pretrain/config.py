"""The config of one training: the tree of its parts' configs."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from eosin.launch.process import World
from eosin.pretrain.augment import AugmentConfig
from eosin.pretrain.frozen_teacher import TeacherConfig
from eosin.pretrain.loader import LoaderConfig
from eosin.pretrain.masking import MaskConfig
from eosin.pretrain.network import ObjectiveConfig
from eosin.pretrain.order import MixtureConfig
from eosin.pretrain.steps import BatchPlan
from eosin.pretrain.trainer_config import TrainerConfig
from eosin.pretrain.vit import VitConfig

SIZES = ("global_px", "local_px")
"""Of the crops."""

CompileName: TypeAlias = Literal["auto", "blocks", "none"]


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainerConfig):
    """One training; `--config pretrain/…` gives a recipe, `--config size/…` a network."""

    shards: str
    """Folder of shards with index.parquet, or its URL in an object store (``s3://…``)."""
    preview: bool = False
    """Draw the first tiles with their crops into preview.png of `out`, and train nothing."""
    model: VitConfig = field(default_factory=VitConfig)
    """The encoder."""
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
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Of the channels in 0 … 1, subtracted from every crop (ImageNet's by default)."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Of the channels, divided by."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """Worker processes, reading ahead, and the budget of damaged records."""
    accumulate: int = 1
    """Parts that each rank takes its share of a batch in, for less memory: the same gradient."""
    compile: CompileName = "auto"
    """torch.compile of each block and head; ``auto`` does it on a GPU."""

    def __post_init__(self) -> None:
        """Refuses values that contradict each other."""
        super().__post_init__()
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
        for name, low in (("window_shards", 0), ("accumulate", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {low}")
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
    def off(self) -> frozenset[str]:
        """See `TrainerConfig`."""
        o = self.objective
        weights = {
            "dino_global": o.dino,
            "dino_local": o.dino,
            "ibot": o.ibot,
            "jepa": o.jepa.weight,
            "spread": o.spread.weight,
            "gram": o.gram.weight,
        }
        return frozenset(name for name, weight in weights.items() if weight == 0)

    @property
    def unit(self) -> str:
        """See `TrainerConfig`."""
        return "tiles"

    @property
    def data(self) -> str:
        """See `TrainerConfig`."""
        return "shards"

    @property
    def source(self) -> str:
        """See `TrainerConfig`."""
        return self.shards

    def ways_to_less_memory(self, world: World) -> list[str]:
        """See `TrainerConfig`."""
        ways = super().ways_to_less_memory(world)
        if self.accumulate < self.batch_size // world.size // self.group:
            ways.append(f"accumulate={self.accumulate * 2}")
        if world.size > 1 and self.parallel in ("auto", "ddp"):
            ways.append("parallel=fsdp")
        return ways

    def plan_of(self, world: World, skips: Sequence[tuple[int, int]] = ()) -> BatchPlan:
        """What one rank's share of the batches depends on.

        Args:
            world: of the rank.
            skips: data that is passed over, as in `checkpoint.TrainState`.

        Raises:
            ConfigError: the batch does not divide among the ranks.
        """
        self.check_ranks(world, self.accumulate)
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
