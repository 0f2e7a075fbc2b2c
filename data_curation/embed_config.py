"""How tiles become features: the config of the verb `embed`, apart from what needs torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from eosin.data_curation.records import check_rules
from eosin.launch.device_names import DeviceName, PrecisionName

META_NAME = "meta.json"
"""The marker of a finished store."""


StainMethod = Literal["macenko", "vahadane", "reinhard"]


@dataclass(frozen=True, kw_only=True)
class NormaliseConfig:
    """To which staining tiles are moved before an encoder sees them, on its device."""

    library: Path | None = None
    """A library of `eosin stain library`; without it, tiles stay as they are."""
    condition: str = "condition_1"
    """The one of the library that tiles are moved to; the first is the most frequent."""
    method: StainMethod = "macenko"
    """``macenko`` or ``vahadane``: by stain vectors and strengths; ``reinhard``: by mean and
    deviation in CIELAB."""


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """By what tiles become features."""

    encoder: str = ""
    """A folder of ours or timm's, a run folder, ``timm:NAME``, ``timm:hf-hub:ORG/NAME``,
    ``published:NAME`` (uni, uni2-h, virchow, virchow2, h-optimus-0, h-optimus-1, h0-mini,
    prov-gigapath, midnight-12k, phikon-v2, hibou-b, hibou-l, genbio-pathfm),
    ``published:NAME:FOLDER`` of a download, or ``builtin:stain-texture``, which needs no weights;
    ``@cls``, ``@mean``, ``@clsmean``, ``@native``, ``@cls4`` (class tokens of the last four blocks)
    or ``@tokens`` (class token and all patch tokens) behind it chooses the pooling."""
    batch_size: int = 64
    """Tiles a forward pass. Another one may change features in their last bits."""
    threads: int = 0
    """Threads of a process that read and prepare tiles; 0: one per core."""
    device: DeviceName = "auto"
    """``auto``: a GPU where there is one, that of the local rank."""
    precision: PrecisionName = "auto"
    """Of the network: ``auto`` is bf16 on GPUs that have it, fp32 elsewhere."""
    normalise: NormaliseConfig = field(default_factory=NormaliseConfig)
    """Whether tiles are moved to one staining first; from how their slide is stained, where they
    come from `tiles`, and from how they are themselves elsewhere."""
    max_failed: float = 0.01
    """Share of the tiles that may be unreadable before the command ends with an error (everything
    else is finished and kept)."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        if self.threads < 0:
            raise ValueError(f"threads must not be negative, not {self.threads}")
        if not 0 <= self.max_failed <= 1:
            raise ValueError(f"max_failed must be between 0 and 1, not {self.max_failed}")


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(EmbedOptions):
    """Tiles to features: of `tiles`, of `images` or of `shards`."""

    out: Path
    """Folder of the feature store."""
    tiles: Path | None = None
    """A folder that `eosin tile` or `eosin curate` wrote; pixels are read from the slides."""
    selection: Path | None = None
    """A selection.parquet of those tiles; without it, all tiles that could be read."""
    images: Path | None = None
    """A folder of tile images, or a CSV table with `path`, as for `eosin shard`."""
    shards: str | None = None
    """A folder of finished shards, or its URL."""
    pseudonyms: Path | None = None
    """Key file of `eosin shard images=… pseudonyms=…`: the same names for the same images."""
    keep: list[str] = field(default_factory=list)
    """Rules that a tile must satisfy, as for `eosin shard`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rules(self.keep)
        if not self.encoder:
            raise ValueError("encoder is missing, e.g. encoder=builtin:stain-texture")
        if sum(given is not None for given in (self.tiles, self.images, self.shards)) != 1:
            raise ValueError("give one of tiles, images and shards")
        if self.pseudonyms is not None and self.images is None:
            raise ValueError("pseudonyms goes with images; tiles and shards have theirs")
        if self.selection is not None and self.tiles is None:
            raise ValueError("selection goes with tiles")
        if self.keep and self.shards is not None:
            raise ValueError("keep goes with tiles or images; shards are taken whole")
