"""The verb `pretrain`: the trainer, with probes beside it where they are asked for."""

from dataclasses import dataclass, field, fields

import torch

from eosin.configs.load import to_yaml
from eosin.eval.watch import ProbeConfig, TrainerProbe, load_tiles
from eosin.eval.watch_exports import ExportProbe
from eosin.launch.artefacts import write_text
from eosin.launch.process import World
from eosin.pretrain import train
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.live_probe import LiveProbe


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(PretrainConfig):
    """One training; `--config pretrain/…` gives a recipe, `--config size/…` a network."""

    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """Scores of the encoder while it is trained; of no effect on what is learned."""

    def __post_init__(self) -> None:
        """Refuses probes of steps that have no checkpoint."""
        super().__post_init__()
        if self.probe.every % self.checkpoints.every:
            raise ValueError(
                f"probe.every={self.probe.every} must be a multiple of "
                f"checkpoints.every={self.checkpoints.every}: the best is kept as a checkpoint"
            )

    @property
    def training(self) -> PretrainConfig:
        """The training alone, which is what its folder records and a resume compares."""
        return PretrainConfig(**{f.name: getattr(self, f.name) for f in fields(PretrainConfig)})


def plan(config: TrainingConfig) -> str:
    """What `pretrain` would do, for ``--dry-run``."""
    probe, lines = config.probe, [train.plan(config.training)]
    every = probe.every or config.checkpoints.every
    if probe.where == "job":
        lines.append(f"an export for 'eosin watch' every {every} steps")
    elif probe.tiles is not None:
        tiles = load_tiles(probe)
        lines.append(
            f"a probe every {every} steps, on at most {len(tiles)} labelled tiles (val: "
            f"{int(tiles.is_val.sum())}), in at most {probe.max_share:.0%} of the time"
        )
    return "\n".join(lines)


def pretrain(config: TrainingConfig) -> None:
    """Trains, with probes where they are asked for. See `eosin.pretrain.train.pretrain`."""

    def start_probe(
        training: PretrainConfig,
        world: World,
        device: torch.device,
        dtype: torch.dtype,
        first_step: int,
    ) -> LiveProbe:
        probe = config.probe
        if world.leads:
            write_text(training.out / "probe.yaml", to_yaml(probe))
        if probe.where == "job":
            return ExportProbe(probe, training, world)
        return TrainerProbe(probe, training, world, device, dtype, first_step)

    train.pretrain(config.training, start_probe if config.probe.is_on else None)
