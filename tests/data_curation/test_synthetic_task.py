"""Labelled tiles from synthetic slides: what the class map says, group by slide, and repeatable."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eosin.configs.errors import InputError
from eosin.data_curation import synthetic_task as task_module
from eosin.data_curation.slide import Slide
from eosin.data_curation.synthetic import (
    CLASSES,
    SyntheticConfig,
    class_of_region,
    read_truth,
    write_slides,
)
from eosin.data_curation.synthetic_task import SyntheticTaskConfig, write_task


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("slides")
    return write_slides(folder, SyntheticConfig(n_slides=2, size_px=1024, region_um=150), workers=1)


def test_tiles_are_of_their_class_unspoilt_and_equal_the_slides_pixels(
    slides: list[Path], tmp_path: Path
) -> None:
    config = SyntheticTaskConfig(mpp=0.5, size_px=128, tiles_per_class=3)
    labels = write_task(
        tmp_path / "task", {slides[0]: "train", slides[1]: "test"}, config, workers=1
    )
    with labels.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 8
    by_name = {path.stem: path for path in slides}
    for row in rows:
        assert row["split"] == ("train" if row["group"] == slides[0].stem else "test")
        x, y = (float(part) for part in Path(row["path"]).stem.split("_")[-3:-1])
        truth = read_truth(by_name[row["group"]])
        winner, share = class_of_region(truth, x, y, 128, 128)
        assert CLASSES[winner] == row["label"] and share >= 0.8
        cells = np.s_[int(y) // 16 : int(y) // 16 + 8, int(x) // 16 : int(x) // 16 + 8]
        assert not (truth.pen | truth.blur | truth.fold)[cells].any()
    with Slide(by_name[row["group"]]) as slide, Image.open(labels.parent / row["path"]) as tile:
        assert np.array_equal(np.asarray(tile), slide.read_tile(x, y, 128, 0.5))
    counts = {(r["group"], r["label"]): 0 for r in rows}
    for r in rows:
        counts[r["group"], r["label"]] += 1
    assert max(counts.values()) <= 3


def test_a_second_call_keeps_the_tiles_and_another_choice_remakes_them(
    slides: list[Path], tmp_path: Path
) -> None:
    config = SyntheticTaskConfig(mpp=0.5, size_px=128, tiles_per_class=1)
    splits = {slides[0]: "train", slides[1]: "test"}
    labels = write_task(tmp_path, splits, config, workers=1)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.png")}
    write_task(tmp_path, splits, config, workers=1)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.png")} == before
    kept = labels.read_bytes()
    write_task(tmp_path, splits, SyntheticTaskConfig(mpp=0.5, size_px=128), workers=1)
    assert labels.read_bytes() != kept


def test_a_task_that_lost_its_table_or_was_killed_is_made_again(
    slides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SyntheticTaskConfig(mpp=0.5, size_px=128, tiles_per_class=1)
    labels = write_task(tmp_path / "task", {slides[0]: "train"}, config, workers=1)
    whole = {p: p.read_bytes() for p in labels.parent.rglob("*") if p.is_file()}
    labels.unlink()
    (labels.parent / "stale.png").touch()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(task_module, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            write_task(labels.parent, {slides[0]: "train"}, config, workers=1)
    write_task(labels.parent, {slides[0]: "train"}, config, workers=1)
    assert {p: p.read_bytes() for p in labels.parent.rglob("*") if p.is_file()} == whole


def test_a_folder_of_something_else_is_not_emptied(slides: list[Path], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("ten years")
    with pytest.raises(InputError, match=r"holds files but no task\.json"):
        write_task(tmp_path, {slides[0]: "train"}, SyntheticTaskConfig(), workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
