"""Tasks: what is read, what is carved, what is refused."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from eosin.configs.errors import InputError
from eosin.eval.tasks import Task, TaskConfig, load_task


def save_tile(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((4, 4, 3), value % 256, np.uint8)
    pixels[0, 0] = (value // 256, value % 7, value % 11)
    Image.fromarray(pixels).save(path)


def table(
    folder: Path, rows: Sequence[tuple[str, ...]], columns: str = "label,group,split"
) -> Path:
    """A table of tiles that exist: one row a tuple of the columns behind the path."""
    lines = [f"path,{columns}"]
    for i, row in enumerate(rows):
        save_tile(folder / f"tiles/{i:03}.png", i)
        lines.append(",".join((f"tiles/{i:03}.png", *row)))
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder / "labels.csv"


def load(path: Path, seed: int = 0) -> Task:
    return load_task(TaskConfig(tiles=path), seed)


GOOD = [
    (label, f"{patient:02}", split)
    for patient, split in enumerate(["train", "train", "val", "test", "test"])
    for label in ("tumour", "stroma", "tumour")
]


def test_a_table_is_read_as_it_stands_with_codes_kept_as_text(tmp_path: Path) -> None:
    task = load(table(tmp_path, GOOD))
    assert task.classes == ["stroma", "tumour"]
    assert task.groups[:3] == ["00", "00", "00"]
    assert [task.classes[i] for i in task.labels] == [row[0] for row in GOOD]
    assert task.splits.tolist() == [row[2] for row in GOOD]
    assert task.record().tiles == {"train": 6, "val": 3, "test": 6}
    assert task.record().groups == {"train": 2, "val": 1, "test": 2}
    assert task.name == f"{tmp_path.name}/labels"
    assert not task.notes


def test_parquet_gives_the_same_task_as_csv_and_row_order_does_not_matter(tmp_path: Path) -> None:
    csv = table(tmp_path, GOOD)
    task = load(csv)
    columns = {"path": task.tile_ids, "label": [r[0] for r in GOOD]}
    columns |= {"group": [r[1] for r in GOOD], "split": [r[2] for r in GOOD]}
    shuffled = pa.table(columns).take(np.random.default_rng(0).permutation(len(GOOD)))
    pq.write_table(shuffled, tmp_path / "labels.parquet")
    other = load(tmp_path / "labels.parquet")
    assert other.digest == task.digest and other.tile_ids == task.tile_ids
    header, *lines = csv.read_text().splitlines()
    csv.write_text("\n".join([header, *reversed(lines)]) + "\n")
    assert load(csv).digest == task.digest


def test_the_digest_follows_labels_and_bytes_and_the_data_digest_bytes_alone(
    tmp_path: Path,
) -> None:
    csv = table(tmp_path, GOOD)
    task = load(csv)
    csv.write_text(csv.read_text().replace("stroma", "fat"))
    relabelled = load(csv)
    assert relabelled.digest != task.digest and relabelled.data_digest == task.data_digest
    save_tile(tmp_path / "tiles/000.png", 99)
    assert load(csv).data_digest != task.data_digest


def test_a_folder_per_class_is_a_task_whose_tiles_are_their_own_groups(tmp_path: Path) -> None:
    for i in range(30):
        save_tile(tmp_path / "set" / "ab"[i % 2] / f"deep/{i}.PNG", i)
    save_tile(tmp_path / "set" / "stray.png", 0)
    save_tile(tmp_path / "set" / "a" / ".hidden.png", 0)
    task = load(tmp_path / "set")
    assert (task.name, task.classes, len(task.images)) == ("set", ["a", "b"], 30)
    assert task.record().groups == task.record().tiles
    assert "each tile is its own" in task.notes[0] and "no splits are given" in task.notes[1]
    for split in ("train", "val", "test"):  # stratified: half and half
        counts = np.bincount(task.labels[task.splits == split])
        assert abs(int(counts[0]) - int(counts[1])) <= 2
    assert task.record().tiles["test"] in (7, 8)


@pytest.mark.parametrize("seed", range(4))
def test_carved_splits_never_share_a_group_and_depend_on_the_seed_alone(
    tmp_path: Path, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    rows = [(f"c{generator.integers(3)}", f"p{generator.integers(15)}") for _ in range(120)]
    csv = table(tmp_path, rows, "label,group")
    task = load(csv, seed)
    groups = {split: set(task.groups_of(split)) for split in ("train", "val", "test")}
    assert not groups["train"] & groups["val"]
    assert not (groups["train"] | groups["val"]) & groups["test"]
    assert all(groups.values())
    np.testing.assert_array_equal(load(csv, seed).splits, task.splits)
    assert any((load(csv, s).splits != task.splits).any() for s in range(10, 13))


def test_a_missing_val_is_carved_from_train_alone(tmp_path: Path) -> None:
    rows = [
        (label, f"p{patient}", "test" if patient > 7 else "train")
        for patient in range(10)
        for label in ("a", "b")
    ]
    task = load(table(tmp_path, rows))
    given = np.array([row[2] for row in rows])
    np.testing.assert_array_equal(task.splits == "test", given == "test")
    assert task.record().groups == {"train": 6, "val": 2, "test": 2}
    assert "no val split" in task.notes[0]


def test_a_fold_is_chosen_that_keeps_every_class_on_both_sides(tmp_path: Path) -> None:
    """Class b lives in two groups only: most folds would lose it from train or from test."""
    rows = [("a", f"p{patient}") for patient in range(12) for _ in range(3)]
    rows += [("b", "p0")] * 3 + [("b", "p5")] * 3 + [("b", "p9")] * 3
    for seed in range(5):
        task = load(table(tmp_path, rows, "label,group"), seed)
        for split in ("train", "test"):
            assert set(task.labels[task.splits == split]) == {0, 1}


def test_a_test_tile_that_is_also_in_train_is_noted(tmp_path: Path) -> None:
    csv = table(tmp_path, GOOD)
    save_tile(tmp_path / "tiles/014.png", 0)  # the bytes of tiles/000.png, which is in train
    (note,) = load(csv).notes
    assert "1 test tiles are byte for byte also in train or val, such as tiles/014.png" in note


def replaced(rows: Sequence[tuple[str, ...]], old: str, new: str) -> list[tuple[str, ...]]:
    return [tuple(new if value == old else value for value in row) for row in rows]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (replaced(GOOD, "stroma", "tumour"), "only one class, 'tumour'"),
        (replaced(GOOD, "val", "valid"), "unknown split 'valid'; there are: train, val, test"),
        (replaced(GOOD, "test", "val"), "no tile has the split 'test'"),
        (replaced(GOOD, "train", "val"), "no tile has the split 'train'"),
        (replaced(GOOD, "04", "00"), "group '00' is in train and in test"),
        ([*GOOD, ("fat", "09", "train")], "class 'fat' is absent from test"),
        ([*GOOD, ("fat", "09", "test")], "class 'fat' is absent from train"),
        (replaced(GOOD, "01", ""), "column 'group' is empty in 3 rows, first in row 4"),
        ([], "has no rows"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_scored_honestly_is_refused_in_one_line(
    tmp_path: Path, rows: list[tuple[str, ...]], message: str
) -> None:
    with pytest.raises(InputError) as error:
        load(table(tmp_path, rows))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_missing_or_named_twice_are_counted_and_named(tmp_path: Path) -> None:
    csv = table(tmp_path, GOOD)
    for i in range(1, 6):
        (tmp_path / f"tiles/{i:03}.png").unlink()
    with pytest.raises(InputError, match=r"5 of 15 tiles do not exist .*001.*002.*003.png, …\)"):
        load(csv)
    csv.write_text(csv.read_text() + "tiles/000.png,tumour,00,train\n")
    with pytest.raises(InputError, match=r"names .* more than once"):
        load(csv)


def test_folders_and_files_that_are_no_task_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save_tile(tmp_path / "one" / "a" / "0.png", 0)
    for split in ("train", "test"):
        save_tile(tmp_path / "by_split" / split / "0.png", 0)
    (tmp_path / "noise.csv").write_bytes(bytes(range(128, 256)))
    (tmp_path / "columns.csv").write_text("file,label\na.png,a\n")
    (tmp_path / "noise.parquet").write_text("not parquet")
    twice = pa.Table.from_arrays([pa.array(["a"])] * 3, ["path", "label", "label"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    cases = {
        "nowhere": "does not exist",
        "empty": "one sub-folder of images a class",
        "one": "only one class",
        "by_split": "a folder a split, not a class",
        "noise.csv": "not a CSV table",
        "columns.csv": "no column 'path'",
        "noise.parquet": "not a readable Parquet table",
        "twice.parquet": "the column 'label' more than once",
    }
    for name, message in cases.items():
        with pytest.raises(InputError, match=message):
            load(tmp_path / name)


def test_one_group_alone_cannot_be_carved(tmp_path: Path) -> None:
    rows = [(label, "p0") for label in ("a", "b", "a", "b")]
    with pytest.raises(InputError, match="one group alone"):
        load(table(tmp_path, rows, "label,group"))


def test_the_real_tables_load_as_their_notes_describe(real_data: Path) -> None:
    task = load(real_data / "breast_idc" / "labels.csv")
    assert (len(task.images), len(task.classes)) == (2035, 2)
    assert sum(task.record().groups.values()) == 45 and task.record().groups["test"] == 11
