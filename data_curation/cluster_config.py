"""How features are clustered: the config of the verb `cluster`, apart from what needs torch."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path

from eosin.launch.device_names import DeviceName

TABLE_NAME, MARKER_NAME = "clusters.parquet", "clusters.json"


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """How features are clustered."""

    levels: list[int] = field(default_factory=list)
    """Clusters of each level, the finest first, e.g. [10000,1000,100]; each further one clusters
    the centroids of the one before. Empty: one level with a cluster for 200 tiles."""
    iterations: int = 25
    """Of Lloyd, at most."""
    tolerance: float = 1e-4
    """An iteration that lowers the inertia by less than this share of it is the last."""
    points_per_centroid: int = 0
    """Tiles a cluster that centroids are fitted to; all tiles are assigned at the end. 0: all;
    256 serves for very large sets."""
    cosine: bool = False
    """Whether features are scaled to unit length first, so that only their direction counts."""
    resamples: int = 10
    """Resamplings of each level above the first (Vo et al. 2024)."""
    closest: int = 0
    """Centroids taken of each cluster at a resampling; 0: half of the mean cluster's."""
    within_slide: int = 0
    """Clusters inside each slide beside the others, fewer where a slide is small; 0: none."""
    seed: int = 0
    """Of all draws."""
    device: DeviceName = "auto"
    """``auto``: a GPU where there is one, that of the local rank."""

    def __post_init__(self) -> None:
        if any(k < 1 for k in self.levels):
            raise ValueError(f"levels={self.levels} must be at least 1 each")
        if any(below <= above for below, above in itertools.pairwise(self.levels)):
            raise ValueError(f"levels={self.levels} must fall from the finest to the coarsest")
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, not {self.iterations}")
        for name in ("tolerance", "points_per_centroid", "resamples", "closest", "within_slide"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed must be 0 to 2^63 - 1, not {self.seed}")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(ClusterOptions):
    """Features to clusters."""

    features: Path
    """A feature store, of `eosin embed`."""
    out: Path
    """Folder for clusters.parquet and the centroids."""
