"""What counts as a repetition: the config of the verb `dedupe`, apart from what needs torch."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class DedupeOptions:
    """What counts as a repetition."""

    similarity: float = 0.45
    """Correlation of two prints from which their tiles show the same tissue. Copies that were
    compressed, rescanned or moved by up to an eighth of a tile have 0.6 and more, others at most
    about 0.3."""
    turns: bool = False
    """Whether turned and flipped copies count too; slower."""
    neighbours: int = 8
    """Clusters next to a tile's own in which its copies are looked for."""
    slides: bool = True
    """Whether slides are looked at as a whole too: of one that was scanned twice, the scan with
    fewer tiles is left out."""
    workers: int = 0
    """Processes that look at slides; 0 is one per core."""

    def __post_init__(self) -> None:
        if not 0 < self.similarity <= 1:
            raise ValueError(f"similarity must be above 0 and at most 1, not {self.similarity}")
        for name in ("neighbours", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class DedupeConfig(DedupeOptions):
    """Prints to a table of duplicates."""

    prints: Path
    """A feature store of `eosin embed encoder=builtin:tile-print`."""
    out: Path
    """The table, e.g. curated/duplicates.parquet."""
    tiles: Path | None = None
    """The folder that `eosin tile` wrote: of copies the sharpest then stays, and slides can be
    looked at as a whole."""
    clusters: Path | None = None
    """Folder of `eosin cluster` of these tiles (by any encoder): copies are looked for near by."""
