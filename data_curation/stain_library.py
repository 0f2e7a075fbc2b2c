"""`eosin stain library`: the staining conditions of a set of slides, each by a slide that shows it.

Slides are grouped by how they are stained (the columns of `SlideStains`), and the slide nearest to
the middle of each group stands for it. A library is a JSON file of figures, without pixels.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eosin.configs.errors import InputError
from eosin.data_curation.manifest import SLIDES, read_table
from eosin.data_curation.slide_stains import SlideStains
from eosin.launch.artefacts import read_json, write_json

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class StainCondition(SlideStains):
    """How a slide, or a group of slides, is stained."""

    name: str = ""
    slide_id: str = ""
    """The slide that shows it."""
    slides: int = 1
    """How many are stained like that."""

    def has(self, method: str) -> bool:
        """Whether it has the figures of a method."""
        return all(value is not None for value in self.figures(method).values())

    def figures(self, method: str) -> dict[str, list[float] | None]:
        """What a method needs."""
        if method == "reinhard":
            return {"lab_mean": self.lab_mean, "lab_std": self.lab_std}
        vectors = self.vahadane_vectors if method == "vahadane" else self.macenko_vectors
        return {"glass": self.glass, "vectors": vectors, "strength": self.macenko_strength}

    def vectors(self, method: str) -> list[float]:
        """The unit densities of both stains in R, G, B, six numbers."""
        found = self.vahadane_vectors if method == "vahadane" else self.macenko_vectors
        assert found is not None
        return found

    def check(self, method: str) -> None:
        """Raises InputError where the figures of a method are missing."""
        if not self.has(method):
            hint = "; tile with vahadane=true" if method == "vahadane" else ""
            raise InputError(f"condition '{self.name}' has no figures of {method}{hint}")


@dataclass(frozen=True, kw_only=True)
class StainLibraryConfig:
    """Slides to staining conditions."""

    tiles: Path
    """A folder that `eosin tile` or `eosin curate` wrote."""
    out: Path
    """The library, a JSON file."""
    conditions: int = 8
    """At most so many; fewer where there are fewer slides."""
    seed: int = 0
    """Of the grouping."""

    def __post_init__(self) -> None:
        if self.conditions < 1:
            raise ValueError(f"conditions must be at least 1, not {self.conditions}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, not {self.seed}")


def make_library(config: StainLibraryConfig) -> None:
    """Groups the slides and writes the library; the largest group comes first.

    Raises:
        InputError: no slides, or none whose stains were measured.
    """
    from sklearn.cluster import KMeans  # takes a second, and all who read a library import this

    slides = list(slide_conditions(config.tiles).values())
    if not slides:
        raise InputError(f"no slide of {config.tiles} has enough stain to be measured")
    points = np.array([_point(slide) for slide in slides])
    points = (points - points.mean(0)) / np.maximum(points.std(0), 1e-6)
    count = min(config.conditions, len(np.unique(points, axis=0)))
    grouped = KMeans(n_clusters=count, n_init=4, random_state=config.seed).fit(points)
    sizes = np.bincount(grouped.labels_, minlength=count)
    found: list[dict[str, Any]] = []
    for group in np.argsort(-sizes, kind="stable"):
        inside = np.flatnonzero(grouped.labels_ == group)
        distance = np.linalg.norm(points[inside] - grouped.cluster_centers_[group], axis=1)
        shown = asdict(slides[int(inside[np.argmin(distance)])])
        shown |= {"name": f"condition_{len(found) + 1}", "slides": int(sizes[group])}
        found.append(shown)
    write_json(config.out, {"format": FORMAT, "conditions": found})
    shares = ", ".join(f"{c['name']} {c['slides']} (as {c['slide_id']})" for c in found)
    print(f"stain library: {count} conditions of {len(slides)} slides → {config.out}\n{shares}")


def slide_conditions(tiles: Path) -> dict[str, StainCondition]:
    """How each slide of a curated folder is stained, by slide_id; those that were measured.

    Raises:
        InputError: there is no slides.parquet, or it is of an older eosin.
    """
    names = [field.name for field in fields(SlideStains)]
    rows = read_table(tiles / "slides.parquet", SLIDES).select(["slide_id", *names]).to_pylist()
    return {
        row["slide_id"]: StainCondition(name=row["slide_id"], **row)
        for row in rows
        if row["macenko_vectors"] is not None
    }


def read_condition(library: Path, name: str) -> StainCondition:
    """A condition of a library.

    Raises:
        InputError: there is no library, it is damaged, or it has no such condition.
    """
    found = read_library(library)
    if name not in found:
        raise InputError(f"{library} has no condition '{name}'; there are: {', '.join(found)}")
    return found[name]


def read_library(library: Path) -> dict[str, StainCondition]:
    """The conditions of a library by name, the most frequent first.

    Raises:
        InputError: there is no library, or it is damaged.
    """
    if not library.is_file():
        raise InputError(f"{library} does not exist; 'eosin stain library' writes one")
    try:
        content: Any = read_json(library)
        rows = content["conditions"]
        found = {row["name"]: StainCondition(**_checked(row)) for row in rows}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{library} is no library of stains: {error!r}") from error
    if content.get("format") != FORMAT:
        raise InputError(f"{library} has format {content.get('format')}; this eosin reads {FORMAT}")
    return found


_LENGTHS = {
    "glass": 3, "macenko_vectors": 6, "macenko_strength": 2, "lab_mean": 3, "lab_std": 3,
    "vahadane_vectors": 6,
}  # fmt: skip


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its figures as finite floats of the right number."""
    for name, length in _LENGTHS.items():
        values = row.get(name)
        if values is None:
            continue
        row[name] = [float(value) for value in values]
        if len(row[name]) != length or not np.isfinite(row[name]).all():
            raise ValueError(f"{name} of '{row['name']}' should be {length} finite numbers")
    return row


def _point(slide: StainCondition) -> NDArray[np.float64]:
    """What slides are grouped by: colours and strengths of both stains, and how they vary."""
    parts = (slide.macenko_vectors, slide.macenko_strength, slide.lab_mean, slide.lab_std)
    return np.concatenate([np.asarray(part, np.float64) for part in parts])
