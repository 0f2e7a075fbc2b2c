"""What a pathologist said of clusters: the page of `eosin review` saves it, `eosin sample` obeys.

JSON: ``{"schema_version": 1, "clusters_stamp": …, "level": 1, "clusters": {"17": {"name": …,
"merged_into": …, "weight": …, "rejected": …}}}``. A cluster that is not in it keeps its defaults.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eosin.configs.errors import InputError
from eosin.launch.artefacts import SCHEMA_VERSION, read_json, write_json

_KEYS = {"name", "merged_into", "weight", "rejected"}
_MAX_NAME = 200


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was said of one cluster."""

    name: str = ""
    """What it shows; empty: not named."""
    merged_into: int | None = None
    """The cluster that it counts as; that one is not itself merged into another."""
    weight: float = 1.0
    """Its share of a balanced sample relative to the others; positive."""
    rejected: bool = False
    """Its tiles are not for training."""


@dataclass(frozen=True, kw_only=True)
class Review:
    """Verdicts on the clusters of one level."""

    clusters_stamp: str
    """Stamp of the clusters that were looked at; numbers mean nothing for any others."""
    level: int
    """1 is the finest."""
    verdicts: dict[int, Verdict]

    def of(self, cluster: int) -> Verdict:
        """The verdict on a cluster, merged ones resolved: what holds for its tiles."""
        own = self.verdicts.get(cluster, Verdict())
        return own if own.merged_into is None else self.verdicts.get(own.merged_into, Verdict())

    def stratum(self, cluster: int) -> int:
        """The cluster that `cluster` counts as."""
        merged = self.verdicts.get(cluster, Verdict()).merged_into
        return cluster if merged is None else merged


def write_review(path: Path, review: Review) -> None:
    """Writes a review as `read_review` reads it."""
    clusters = {
        str(number): {
            "name": verdict.name,
            "merged_into": verdict.merged_into,
            "weight": verdict.weight,
            "rejected": verdict.rejected,
        }
        for number, verdict in sorted(review.verdicts.items())
    }
    value = {
        "schema_version": SCHEMA_VERSION,
        "clusters_stamp": review.clusters_stamp,
        "level": review.level,
        "clusters": clusters,
    }
    write_json(path, value)


def read_review(path: Path) -> Review:
    """Reads and checks a review.

    Raises:
        InputError: the file is missing, no review, of a newer version, or contradicts itself.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; save it from the page that eosin review makes")
    try:
        value = read_json(path)
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("clusters"), dict):
        raise InputError(f"{path} is not a review of clusters: it has no object 'clusters'")
    if value.get("schema_version") != SCHEMA_VERSION:
        raise InputError(f"{path}: schema_version {value.get('schema_version')} is not known here")
    level, stamp = value.get("level"), value.get("clusters_stamp")
    if type(level) is not int or level < 1 or not isinstance(stamp, str):
        raise InputError(f"{path}: 'level' must be 1 or more, and 'clusters_stamp' a text")
    verdicts = {}
    for key, entry in value["clusters"].items():
        if not key.isdecimal():
            raise InputError(f"{path}: '{key}' is not the number of a cluster")
        verdicts[int(key)] = _read_verdict(entry, f"{path}: cluster {key}")
    for number, verdict in verdicts.items():
        target = verdict.merged_into
        if target is None:
            continue
        if target == number or verdicts.get(target, Verdict()).merged_into is not None:
            raise InputError(
                f"{path}: cluster {number} is merged into {target}, which is merged itself"
            )
    return Review(clusters_stamp=stamp, level=level, verdicts=verdicts)


def _read_verdict(entry: Any, where: str) -> Verdict:
    if not isinstance(entry, dict) or set(entry) - _KEYS:
        raise InputError(f"{where}: an object with {', '.join(sorted(_KEYS))} is expected")
    name, merged = entry.get("name", ""), entry.get("merged_into")
    weight, rejected = entry.get("weight", 1.0), entry.get("rejected", False)
    if not isinstance(name, str) or len(name) > _MAX_NAME:
        raise InputError(f"{where}: 'name' must be a text of at most {_MAX_NAME} characters")
    if merged is not None and (type(merged) is not int or merged < 0):
        raise InputError(f"{where}: 'merged_into' must be the number of a cluster or null")
    if type(weight) not in (int, float) or not (math.isfinite(weight) and weight > 0):
        raise InputError(f"{where}: 'weight' must be a positive number, not {weight!r}")
    if type(rejected) is not bool:
        raise InputError(f"{where}: 'rejected' must be true or false, not {rejected!r}")
    return Verdict(name=name, merged_into=merged, weight=float(weight), rejected=rejected)
