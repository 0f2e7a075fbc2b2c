from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from eosin.data_curation.grid import Grid, make_grid
from eosin.data_curation.manifest import make_tile_id

EXTENTS = st.integers(1, 200_000)
MPPS = st.floats(0.05, 10.0)


def grid_of(
    extent: tuple[int, int], scan: tuple[float, float], mpp: float, size_px: int, step_px: int
) -> Grid:
    return make_grid((3, 5, *extent), scan, mpp=mpp, size_px=size_px, step_px=step_px)


@settings(max_examples=200, deadline=None)
@given(
    width=EXTENTS,
    height=EXTENTS,
    scan=MPPS,
    coarser=st.floats(1.0, 20.0),
    size_px=st.integers(16, 1024),
    overlap=st.floats(0.2, 1.0),
)
def test_cells_lie_inside_the_slide_and_none_more_would_fit(
    width: int, height: int, scan: float, coarser: float, size_px: int, overlap: float
) -> None:
    step_px = max(1, round(size_px * overlap))
    scan_mpp = (scan, scan * 1.01)
    grid = grid_of((width, height), scan_mpp, scan * 1.01 * coarser, size_px, step_px)
    for axis, (extent, count) in enumerate(((width, grid.columns), (height, grid.rows))):
        cell, step = grid.cell_px[axis], grid.step_px[axis]
        assert count * step + cell > extent - 1e-3
        if count:
            assert (count - 1) * step + cell <= extent + 1e-3


@settings(max_examples=100, deadline=None)
@given(columns=st.integers(1, 400), scan=MPPS, size_px=st.sampled_from([224, 256, 512]))
def test_a_corner_is_computed_from_its_index_without_drift(
    columns: int, scan: float, size_px: int
) -> None:
    mpp = scan * 1.7
    extent = int(size_px * 1.7 * columns) + 2
    grid = grid_of((extent, extent), (scan, scan), mpp, size_px, size_px)
    last = grid.columns - 1
    exact = 3 + last * Fraction(size_px) * Fraction(mpp) / Fraction(scan)
    assert abs(float(exact) - grid.corners_px()[0, last, 0]) < 1e-6


def test_a_slide_that_its_cells_fill_exactly_loses_none_to_rounding() -> None:
    for scan in (0.1, 0.2428, 0.25, 0.3, 0.4991):
        grid = grid_of((256 * 7, 256 * 9), (scan, scan), scan, 256, 256)
        assert (grid.columns, grid.rows) == (7, 9)


def test_the_real_svs_has_88_cells_and_the_coarse_tiff_420() -> None:
    svs = make_grid((0, 0, 2220, 2967), (0.499, 0.499), mpp=0.5, size_px=256, step_px=256)
    tiff = make_grid((0, 0, 5477, 5154), (4.0, 4.0), mpp=4.0, size_px=256, step_px=256)
    assert (len(svs), len(tiff)) == (88, 420)


def test_tile_ids_of_a_grid_are_unique_and_fit_a_shard_key() -> None:
    grid = grid_of((3000, 2000), (0.2503, 0.2503), 0.5, 64, 16)
    corners = grid.corners_px().reshape(-1, 2)
    ids = {make_tile_id("a-slide_1", float(x), float(y), 0.5) for x, y in corners}
    assert len(ids) == len(grid)
    assert not any("." in tile_id for tile_id in ids)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), columns=st.integers(1, 6), rows=st.integers(1, 6))
def test_fractions_equal_counting_where_cells_end_on_mask_pixels(
    seed: int, columns: int, rows: int
) -> None:
    mask = np.random.default_rng(seed).random((rows * 8 + 3, columns * 8 + 5)) < 0.4
    grid = grid_of((mask.shape[1] * 16, mask.shape[0] * 16), (0.5, 0.5), 0.5, 128, 128)
    counted = [
        [mask[r * 8 : r * 8 + 8, c * 8 : c * 8 + 8].mean() for c in range(columns)]
        for r in range(rows)
    ]
    np.testing.assert_allclose(grid.fractions(mask, (16.0, 16.0)), counted, atol=1e-12)


def test_fractions_count_mask_pixels_that_a_cell_cuts_in_part() -> None:
    mask = np.zeros((4, 4), np.bool_)
    mask[0, 1] = True  # level-0 x 10..20, y 0..10
    grid = make_grid((0, 0, 40, 40), (1.0, 1.0), mpp=1.0, size_px=15, step_px=15)
    expected = [[5 * 10 / 225, 5 * 10 / 225], [0, 0]]
    np.testing.assert_allclose(grid.fractions(mask, (10.0, 10.0)), expected, atol=1e-12)


def test_a_slide_smaller_than_a_tile_has_no_cells() -> None:
    grid = grid_of((100, 5000), (0.5, 0.5), 0.5, 256, 256)
    assert len(grid) == 0
    assert grid.corners_px().shape == (grid.rows, 0, 2)
