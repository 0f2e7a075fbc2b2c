"""The config of the verb `eval`."""

from dataclasses import dataclass, field
from pathlib import Path

from eosin.data_curation.embed_config import NormaliseConfig, StainMethod
from eosin.eval.conditions import choose_conditions
from eosin.eval.protocols import choose
from eosin.eval.tasks import TaskConfig
from eosin.launch.device_names import DeviceName


@dataclass(frozen=True, kw_only=True)
class ConditionsConfig:
    """Under what other conditions test tiles are scored, by probes that are not fitted again."""

    transforms: list[str] = field(default_factory=list)
    """Names or patterns ('*' for all): rotate-90, rotate-180, mirror, blur-1, blur-2, jpeg-60,
    jpeg-30, scale-0.8, scale-1.25, bright-0.9, bright-1.1."""
    stains: Path | None = None
    """A library of `eosin stain library`: test tiles are rendered in each of its conditions."""
    method: StainMethod = "macenko"
    """By which they are rendered."""

    def __post_init__(self) -> None:
        choose_conditions(self.transforms)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Scores an encoder, the same network at random weights and two colour floors."""

    encoder: str
    """A run folder, an encoder folder, timm:NAME, published:NAME[:FOLDER], python:MODULE:FUNCTION;
    with @cls, @mean or @clsmean for the pooling."""
    task: TaskConfig
    out: Path
    """Folder for results.json, predictions.parquet, report.html and the cached features."""
    extra_encoders: list[str] = field(default_factory=list)
    """More encoders for the same table, named like `encoder`."""
    checkpoints: Path | None = None
    """A run folder whose exports (``exports/step_*``, as probe.where=job keeps them) stand in the
    table as well, and are drawn over training."""
    sizes_px: list[int] = field(default_factory=list)
    """The encoder once more at each of these input sizes: the same regions at several resolutions,
    for regions that hold more pixels than its own size; a row each."""
    normalise: NormaliseConfig = field(default_factory=NormaliseConfig)
    """With a library, the encoder stands in the table a second time, with tiles moved to one
    staining before it sees them."""
    conditions: ConditionsConfig = field(default_factory=ConditionsConfig)
    protocols: list[str] = field(default_factory=lambda: ["usual"])
    """Names, patterns such as 'knn/*' or '*' for all, and 'usual' for the three of every table."""
    seed: int = 0
    """Of carved splits, random weights, few-shot episodes and the bootstrap."""
    device: DeviceName = "auto"
    batch_size: int = 64
    """Tiles a forward pass."""
    n_bootstrap: int = 1000
    """Resamples of the test groups."""

    def __post_init__(self) -> None:
        choose(self.protocols)
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")
        if any(px < 1 for px in self.sizes_px):
            raise ValueError(f"sizes_px={self.sizes_px} must be at least 1")
        if self.n_bootstrap < 100:
            raise ValueError(f"n_bootstrap={self.n_bootstrap}: a 95 % interval needs at least 100")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative")
