"""How a slide is stained, in a dozen numbers: what normalisation and a library of stains need.

Raw pixels go into the shards. Normalising them there would bake one choice in; these columns of
slides.parquet let it be made later, on the device (`eosin.data_curation.stain_normaliser`).
"""

from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from eosin.data_curation.glass import optical_density
from eosin.data_curation.stain_vectors import FAINTEST, concentrations, macenko, vahadane

MOST_TILES = 64
"""Tiles of a slide that are looked at."""
LEAST_TISSUE = 0.5
"""Tissue fraction from which a tile is."""
STRONGEST = 99.0
"""Percentile of a stain's amounts that says how strong it is (Macenko et al. 2009)."""
_PIXELS = 1024
"""Of each tile."""


@dataclass(frozen=True, kw_only=True)
class SlideStains:
    """The stain columns of slides.parquet; all None where too little is stained."""

    glass: list[float] | None = None
    """Grey values of bare glass in R, G, B; densities are relative to it."""
    macenko_vectors: list[float] | None = None
    """Macenko: unit densities of haematoxylin and eosin in R, G, B, 6 numbers."""
    macenko_strength: list[float] | None = None
    """99th percentile of the amounts of both."""
    lab_mean: list[float] | None = None
    """Reinhard: mean of stained pixels in CIELAB (L 0 to 100)."""
    lab_std: list[float] | None = None
    """And their standard deviation."""
    vahadane_vectors: list[float] | None = None
    """Vahadane: as `macenko_vectors`; None unless asked for."""


@dataclass
class StainSample:
    """Pixels of a slide, gathered while its tiles are read."""

    glass: tuple[float, float, float]
    _pixels: list[NDArray[np.uint8]] = field(default_factory=list)

    def add(self, rgb: NDArray[np.uint8]) -> None:
        """Takes pixels of a tile, RGB uint8 [h, w, 3], evenly."""
        height, width = rgb.shape[:2]
        step = max(1, int(np.sqrt(height * width / _PIXELS)))
        self._pixels.append(rgb[step // 2 :: step, step // 2 :: step].reshape(-1, 3))

    def estimate(self, with_vahadane: bool) -> SlideStains:
        """The figures over all pixels so far; `with_vahadane` adds a second or so."""
        if not self._pixels:
            return SlideStains()
        pixels = np.concatenate(self._pixels)
        density = optical_density(pixels[None], self.glass)[0]
        vectors = macenko(density)
        if vectors is None:
            return SlideStains()
        stained = density.mean(1) > FAINTEST
        amounts = np.percentile(concentrations(density[stained], vectors), STRONGEST, axis=0)
        floats = np.asarray(pixels[stained][None], np.float32) / np.float32(255)
        lab = np.asarray(cv2.cvtColor(floats, cv2.COLOR_RGB2LAB), np.float64)[0]
        learnt = vahadane(density, vectors) if with_vahadane else None
        return SlideStains(
            glass=[round(v, 2) for v in self.glass],
            macenko_vectors=_rounded(vectors),
            macenko_strength=_rounded(amounts),
            lab_mean=_rounded(lab.mean(0)),
            lab_std=_rounded(lab.std(0)),
            vahadane_vectors=None if learnt is None else _rounded(learnt),
        )


def evenly(count: int, most: int) -> NDArray[np.int64]:
    """At most `most` of the numbers below `count`, evenly spread, ascending."""
    return np.unique(np.linspace(0, max(0, count - 1), min(count, most)).round().astype(np.int64))


def _rounded(values: NDArray[np.float64]) -> list[float]:
    """To what a record keeps: the last digits of a sum depend on the machine."""
    found: list[Any] = np.round(values, 6).ravel().tolist()
    return found
