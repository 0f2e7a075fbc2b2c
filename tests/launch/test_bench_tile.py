"""`eosin bench tile`: it compares the same tiles on both sides, and writes what it found."""

import json
import tarfile
from pathlib import Path

import pytest

from eosin.data_curation.synthetic import SyntheticConfig, write_slide
from eosin.launch.bench_tile import _places, _plain_loop
from eosin.launch.cli import main


def test_the_rows_are_rates_of_both_sides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_slide(tmp_path, 0, SyntheticConfig(n_slides=1, size_px=1024, artefact_share=0))
    words = [f"slide={path}", "repeats=1", "tiles=4", "--json", str(tmp_path / "tile.json")]
    assert main(["bench", "tile", *words]) == 0
    rows = json.loads((tmp_path / "tile.json").read_text())
    assert len(rows) == 7
    said = capsys.readouterr().out
    for row in rows:
        assert row["unit"] == "tiles/s" and row["ours"] > 0 and row["baseline"] > 0
        assert row["ratio"] == pytest.approx(row["ours"] / row["baseline"])
        assert row["name"] in said


def test_places_lie_inside_and_are_spread() -> None:
    places = _places((1000, 700), 256, 30, 100)
    assert places == [(30 + 256 * c, 30 + 256 * r) for r in range(2) for c in range(3)]
    assert len(_places((5000, 5000), 256, 0, 40)) == 40
    with pytest.raises(ValueError, match="no tile of 256 px"):
        _places((200, 900), 256, 0, 4)


def test_the_usual_loop_writes_the_tiles_with_tissue(tmp_path: Path) -> None:
    path = write_slide(tmp_path, 0, SyntheticConfig(n_slides=1, size_px=1024, artefact_share=0))
    count = _plain_loop(path, tmp_path / "plain.tar", 256)
    with tarfile.open(tmp_path / "plain.tar") as tar:
        assert len(tar.getnames()) == count
    assert 6 <= count <= 14  # of 16, whose corners are glass
