"""Thresholds on measured figures, and a cap that does not depend on what else there is."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from eosin.configs.errors import ConfigError, EosinError
from eosin.configs.load import load_config
from eosin.data_curation import selection as selection_module
from eosin.data_curation.manifest import SELECTION, TILES, make_tile_id, read_table, write_table
from eosin.data_curation.selection import SelectConfig, select, write_selection


def make_tiles(rows: list[dict[str, Any]]) -> pa.Table:
    """Tiles that pass everything, but for what each row says."""
    full = []
    for number, row in enumerate(rows):
        slide = row.get("slide_id", "s0")
        good = {
            "tile_id": make_tile_id(slide, number, 0, 0.5),
            "slide_id": slide,
            "group": slide,
            "column": number,
            "row": 0,
            "level0_x": float(number),
            "level0_y": 0.0,
            "size_px": 256,
            "requested_mpp": 0.5,
            "effective_mpp_x": 0.5,
            "effective_mpp_y": 0.5,
            "tissue_fraction": 1.0,
            "white_fraction": 0.1,
            "dark_fraction": 0.0,
            "pen_fraction": 0.0,
            "fold_fraction": 0.0,
            "entropy": 6.0,
            "sharpness": 3.0,
            "stain": None,
            "status": "ok",
            "reason": "",
        }
        full.append(good | row)
    return pa.Table.from_pylist(full, TILES)


def test_each_tile_is_dropped_by_the_first_rule_that_it_breaks() -> None:
    tiles = make_tiles(
        [
            {},
            {"tissue_fraction": 0.5},
            {"tissue_fraction": 0.49, "sharpness": 0.0},
            {"white_fraction": 0.95},
            {"dark_fraction": 0.4},
            {"pen_fraction": 0.2, "sharpness": 0.1},
            {"fold_fraction": 0.7},
            {"sharpness": 1.0},
            {"entropy": 1.5},
            {"status": "empty", "tissue_fraction": 0.0, "sharpness": None},
            {"status": "unreadable", "reason": "damaged"},
        ]
    )
    selection = select(tiles, SelectConfig(max_fold=0.5, min_entropy=2))
    assert selection.table["tile_id"].to_pylist() == tiles["tile_id"].to_pylist()[:2]
    assert selection.dropped == {
        "empty": 1,
        "unreadable": 1,
        "min_tissue": 1,
        "max_white": 1,
        "max_dark": 1,
        "max_pen": 1,
        "max_fold": 1,
        "min_sharpness": 1,
        "min_entropy": 1,
        "max_tiles_per_slide": 0,
    }
    assert sum(selection.dropped.values()) + selection.table.num_rows == selection.n_tiles


def test_a_figure_that_was_not_measured_is_not_judged() -> None:
    names = ("white_fraction", "dark_fraction", "pen_fraction", "fold_fraction", "sharpness",
             "entropy")  # fmt: skip
    tiles = make_tiles([dict.fromkeys(names)])
    assert select(tiles, SelectConfig()).table.num_rows == 1


def chosen(tiles: pa.Table, **options: Any) -> set[str]:
    return set(select(tiles, SelectConfig(**options)).table["tile_id"].to_pylist())


def test_the_cap_is_seeded_nested_and_blind_to_other_tiles() -> None:
    tiles = make_tiles([{"slide_id": f"s{n % 3}"} for n in range(90)])
    ten = chosen(tiles, max_tiles_per_slide=10, seed=4)
    assert len(ten) == 30
    assert all(sum(tile.startswith(f"s{n}_") for tile in ten) == 10 for n in range(3))
    assert ten < chosen(tiles, max_tiles_per_slide=20, seed=4)
    assert ten != chosen(tiles, max_tiles_per_slide=10, seed=5)
    shuffled = tiles.take(np.random.default_rng(0).permutation(90))
    assert chosen(shuffled, max_tiles_per_slide=10, seed=4) == ten
    alone = tiles.filter(np.array(tiles["slide_id"].to_pylist()) == "s1")
    assert chosen(alone, max_tiles_per_slide=10, seed=4) < ten
    assert chosen(tiles, max_tiles_per_slide=1000) == set(tiles["tile_id"].to_pylist())


def test_the_cap_draws_evenly_over_a_slide() -> None:
    tiles = make_tiles([{}] * 400)
    columns = [int(tile.split("_")[1]) for tile in chosen(tiles, max_tiles_per_slide=200)]
    assert abs(np.mean(columns) - 199.5) < 4 * (400 / 12**0.5) / 200**0.5


def test_a_filter_that_takes_a_slide_apart_raises_an_alarm() -> None:
    blurred = [{"slide_id": "bad", "sharpness": 0.5 if n < 6 else 3.0} for n in range(10)]
    lost = [{"slide_id": "lost", "tissue_fraction": 0.1}] * 3
    alarms = select(make_tiles([{"slide_id": "good"}, *blurred, *lost]), SelectConfig()).alarms
    assert len(alarms) == 2
    assert "bad lost over 50% of the tiles to min_sharpness" in alarms[0]
    assert "lost kept no tile at all" in alarms[1]


def test_selecting_again_writes_only_when_something_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiles, out = tmp_path / "tiles.parquet", tmp_path / "selection.parquet"
    write_table(make_tiles([{}, {"sharpness": 1.0}, {"sharpness": 2.0}]), tiles, TILES)
    write_selection(tiles, out, SelectConfig())
    first, time_ns = out.read_bytes(), out.stat().st_mtime_ns
    assert "select: 2 of 3 cells; dropped: min_sharpness 1" in capsys.readouterr().out
    write_selection(tiles, out, SelectConfig())
    assert out.stat().st_mtime_ns == time_ns
    write_selection(tiles, out, SelectConfig(min_sharpness=2.5))
    assert read_table(out, SELECTION).num_rows == 1
    write_selection(tiles, out, SelectConfig())
    assert out.read_bytes() == first


def test_a_selection_killed_before_its_marker_leaves_no_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles, out = tmp_path / "tiles.parquet", tmp_path / "selection.parquet"
    write_table(make_tiles([{}, {"sharpness": 2.0}]), tiles, TILES)
    write_selection(tiles, out, SelectConfig())

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(selection_module, "mark_done", killed)
        with pytest.raises(KeyboardInterrupt):
            write_selection(tiles, out, SelectConfig(min_sharpness=2.5))
    assert read_table(out, SELECTION).num_rows == 1
    write_selection(tiles, out, SelectConfig())
    assert read_table(out, SELECTION).num_rows == 2


def test_a_selection_of_nothing_ends_in_one_line_with_the_reasons(tmp_path: Path) -> None:
    write_table(make_tiles([{"pen_fraction": 0.9}]), tmp_path / "tiles.parquet", TILES)
    with pytest.raises(EosinError, match="passes the thresholds; dropped: max_pen 1"):
        write_selection(tmp_path / "tiles.parquet", tmp_path / "s.parquet", SelectConfig())


def test_bad_thresholds_are_refused() -> None:
    with pytest.raises(ConfigError, match="min_tissue must be 0 to 1, not 50"):
        load_config(SelectConfig, (), ["min_tissue=50"])
