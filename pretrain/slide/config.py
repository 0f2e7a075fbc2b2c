"""The config of one training of a slide encoder."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from eosin.launch.process import World
from eosin.pretrain.order import MixtureConfig
from eosin.pretrain.schedules import Schedule
from eosin.pretrain.slide.encoder import SlideModelConfig
from eosin.pretrain.slide.hiding import HidingConfig
from eosin.pretrain.slide.objective import SlideObjectiveConfig
from eosin.pretrain.slide.sources import BagsConfig
from eosin.pretrain.slide.steps import SlidePlan
from eosin.pretrain.slide.views import ViewsConfig
from eosin.pretrain.trainer_config import TrainerConfig


@dataclass(frozen=True, kw_only=True)
class SlideConfig(TrainerConfig):
    """One training of a slide encoder; `--config slide/…` gives a published system's recipe."""

    bags: BagsConfig
    """What is learnt from."""
    model: SlideModelConfig = field(default_factory=SlideModelConfig)
    """The encoder."""
    objective: SlideObjectiveConfig
    """The terms of the loss."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    """What a step sees of a sample."""
    hiding: HidingConfig = field(default_factory=HidingConfig)
    """What of the global views the student does not see; of effect where a term asks for it
    (`regress`, or `distil` with ibot)."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    """How often samples of each kind come up, by a column of `bags.table`."""
    momentum: Schedule = field(default_factory=lambda: Schedule(peak=0.996, end=1.0, start=0.996))
    """Of the moving average, which is what is exported; 0 throughout: the student itself."""
    workers: int = 0
    """Processes that make batches; 0 makes them in the trainer's own process."""
    prefetch: int = 2
    """Batches that each worker holds ready."""

    def __post_init__(self) -> None:
        """Refuses values that contradict each other."""
        super().__post_init__()
        o, distil = self.objective, self.objective.distil
        if self.workers < 0 or self.prefetch < 1:
            raise ValueError(f"workers={self.workers} ≥ 0 and prefetch={self.prefetch} ≥ 1")
        if self.views.n_global < 2:
            if o.contrast is not None:
                raise ValueError("views.n_global=1: a contrast of views needs two")
            if distil is not None and distil.dino > 0 and not self.views.n_local:
                raise ValueError("views.n_global=1, n_local=0: dino needs two views of a sample")
        if self.start.train_blocks:
            raise ValueError("start.train_blocks: a slide encoder is trained whole; leave it at 0")
        if self.parallel in ("fsdp", "hybrid"):
            raise ValueError(
                f"parallel={self.parallel}: a slide encoder is small and replicated; use auto"
            )
        if distil is not None and distil.ibot > 0 and self.hiding.share == 0:
            raise ValueError("hiding.share=0 hides nothing, and objective.distil.ibot asks for it")

    @property
    def off(self) -> frozenset[str]:
        """See `TrainerConfig`."""
        o, names = self.objective, set[str]()
        if o.distil is None or o.distil.dino == 0:
            names |= {"dino_global", "dino_local"}
        if o.distil is None or o.distil.ibot == 0:
            names.add("ibot")
        if o.distil is None or o.distil.spread.weight == 0:
            names.add("spread")
        if self.views.n_local == 0:
            names.add("dino_local")
        terms = ("regress", "contrast", "align", "labels")
        return frozenset(names | {name for name in terms if getattr(o, name) is None})

    @property
    def unit(self) -> str:
        """See `TrainerConfig`."""
        return "slides" if self.bags.unit == "slide" else "cases"

    @property
    def data(self) -> str:
        """See `TrainerConfig`."""
        return "bags"

    @property
    def source(self) -> str:
        """See `TrainerConfig`."""
        return ", ".join(map(str, self.bags.stores))

    def plan_of(self, world: World, skips: Sequence[tuple[int, int]] = ()) -> SlidePlan:
        """What one rank's share of the batches depends on.

        Args:
            world: of the rank.
            skips: data that is passed over, as in `checkpoint.TrainState`.

        Raises:
            ConfigError: the batch does not divide among the ranks.
        """
        self.check_ranks(world)
        plan = SlidePlan(
            views=self.views,
            hiding=self.hiding if self.objective.hides else None,
            batch_size=self.batch_size,
            seed=self.seed,
            group_size=self.group,
            mixture=self.mixture,
        )
        return replace(plan, rank=world.rank, world=world.size, skips=tuple(skips))
