"""How slides are stained: estimates against what the slides were drawn with."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from eosin.data_curation.slide_stains import StainSample, evenly
from eosin.data_curation.stain_vectors import (
    HAEMATOXYLIN_EOSIN,
    concentrations,
    macenko,
    vahadane,
)
from eosin.data_curation.synthetic import SyntheticConfig, write_slides
from eosin.data_curation.tiles import TileConfig, tile
from eosin.launch.artefacts import read_json


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def mixed(vectors: np.ndarray, n: int = 20_000) -> np.ndarray:
    """Densities of pixels of two stains: some of one, some of the other, some of both."""
    rng = np.random.default_rng(0)
    amounts = rng.gamma(2, 0.4, (n, 2)) * (rng.random((n, 2)) < 0.6)
    return amounts @ vectors + rng.normal(0, 0.01, (n, 3))


VECTORS = unit(np.array([[0.6, 0.72, 0.35], [0.15, 0.9, 0.3]]))


def test_macenko_and_vahadane_find_the_vectors_that_pixels_were_mixed_from() -> None:
    density = mixed(VECTORS)
    found = macenko(density)
    assert found is not None
    assert (found * VECTORS).sum(1).min() > 0.995
    learnt = vahadane(density[:4000], unit(HAEMATOXYLIN_EOSIN))
    assert learnt is not None
    assert (learnt * VECTORS).sum(1).min() > 0.97
    assert np.array_equal(learnt, vahadane(density[:4000], unit(HAEMATOXYLIN_EOSIN)))


def test_the_order_of_stains_does_not_hang_on_that_of_pixels() -> None:
    density = mixed(VECTORS)
    found, turned = macenko(density), macenko(density[::-1])
    assert found is not None and turned is not None
    np.testing.assert_allclose(found, turned, atol=1e-9)
    assert found[0, 0] > found[1, 0]


def test_nothing_is_estimated_from_glass() -> None:
    assert macenko(np.full((5000, 3), 0.01)) is None
    sample = StainSample((240.0, 240.0, 240.0))
    assert sample.estimate(with_vahadane=True).macenko_vectors is None
    sample.add(np.full((64, 64, 3), 240, np.uint8))
    assert sample.estimate(with_vahadane=False).lab_mean is None


def test_concentrations_are_those_that_were_mixed() -> None:
    amounts = np.random.default_rng(0).uniform(0, 2, (100, 2))
    np.testing.assert_allclose(concentrations(amounts @ VECTORS, VECTORS), amounts, atol=1e-9)


@pytest.mark.parametrize(("count", "most"), [(0, 5), (1, 5), (3, 5), (5, 5), (1000, 64)])
def test_evenly(count: int, most: int) -> None:
    found = evenly(count, most)
    assert len(found) == min(count, most) == len(set(found.tolist()))
    assert not count or (found[0] == 0 and found[-1] == (count - 1 if len(found) > 1 else 0))


def test_slides_have_the_stains_that_they_were_drawn_with(tmp_path: Path) -> None:
    drawn = SyntheticConfig(n_slides=4, size_px=1024, seed=9, artefact_share=0.0)
    slides = write_slides(tmp_path / "slides", drawn, workers=1)
    out = tmp_path / "tiles"
    tile(TileConfig(slides=tmp_path / "slides", out=out, size_px=128, vahadane=True, workers=1))
    rows = pq.read_table(out / "slides.parquet").to_pylist()
    for path, row in zip(slides, rows, strict=True):
        truth = np.array(read_json(path.with_suffix(".truth.json"))["stains"])
        for name in ("macenko_vectors", "vahadane_vectors"):
            found = np.array(row[name]).reshape(2, 3)
            assert (found * unit(truth)).sum(1).min() > 0.95, name
        assert all(strength > 0.3 for strength in row["macenko_strength"])
        assert 20 < row["lab_mean"][0] < 90 and min(row["lab_std"]) > 1
        assert all(200 < grey < 256 for grey in row["glass"])
        assert row["n_sections"] == 1 and row["pen_area_mm2"] == 0
    tiles = pq.read_table(out / "tiles.parquet").to_pylist()
    ok = [r for r in tiles if r["status"] == "ok"]
    assert all(r["section"] == 1 for r in ok)
    assert all(r["entropy"] > 3 for r in ok if r["tissue_fraction"] > 0.9)
    assert all(r["entropy"] is None for r in tiles if r["status"] != "ok")
