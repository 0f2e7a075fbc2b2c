"""Shards: what is in them, that stock readers agree, and that nothing changes their bytes."""

import csv
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
import xxhash
from PIL import Image

from eosin.configs.errors import ConfigError, InputError, TooManyFailedError
from eosin.configs.load import load_config
from eosin.data_curation.manifest import FAILED, INDEX, read_table, write_table
from eosin.data_curation.records import Records
from eosin.data_curation.shard_marker import index_digest
from eosin.data_curation.shard_reader import RecordError, ShardReader, open_index
from eosin.data_curation.shards import ShardConfig, deal, plan, shard
from eosin.data_curation.verify import find_problems
from eosin.launch.artefacts import file_digest, stamp_of
from eosin.launch.cli import main

WEBDATASET = """
import sys, webdataset, xxhash
for sample in webdataset.WebDataset(sys.argv[1:], shardshuffle=False):
    print(sample["__key__"], xxhash.xxh3_64_hexdigest(sample.get("jpg") or sample.get("png")))
"""


def make_images(folder: Path, n: int, side_px: int = 16) -> Path:
    """`n` different small JPEGs and PNGs in two folders."""
    for number in range(n):
        rng = np.random.default_rng(number)
        rgb = rng.integers(0, 256, (side_px, side_px, 3), np.uint8)
        path = folder / f"site.{number % 2}" / f"TCGA-{number}.DX1"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number % 5:
            path.with_name(f"{path.name}.jpg").write_bytes(simplejpeg.encode_jpeg(rgb))
        else:
            Image.fromarray(rgb).save(path.with_name(f"{path.name}.png"))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, by its path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images", 23)


@pytest.fixture
def shards(tmp_path: Path, images: Path) -> Path:
    shard(ShardConfig(images=images, out=tmp_path / "shards", records_per_shard=8, workers=1))
    return tmp_path / "shards"


def test_stock_webdataset_finds_every_tile_once_with_its_bytes(shards: Path, images: Path) -> None:
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    assert len(urls) == 3
    # In a process of its own: webdataset leaves its files to the garbage collector.
    command = [sys.executable, "-W", "ignore", "-c", WEBDATASET, *urls]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert len(set(listed[::2])) == len(listed[::2]) == 23
    digests = [xxhash.xxh3_64_hexdigest(path.read_bytes()) for path in images.rglob("*.*g")]
    assert sorted(listed[1::2]) == sorted(digests)


def test_the_index_agrees_with_tarfile(shards: Path) -> None:
    index = open_index(shards)
    assert index.schema.names[: len(INDEX.names)] == INDEX.names
    listed = []
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
                assert not member.pax_headers
                listed.append((path.name, member.name, member.offset_data, member.size))
    rows = index.select(["shard", "key", "suffix", "offset", "size"]).to_pylist()
    assert listed == [
        (r["shard"], f"{r['key']}.{r['suffix']}", r["offset"], r["size"]) for r in rows
    ]


def test_the_reader_gives_what_the_files_hold(shards: Path, images: Path) -> None:
    with ShardReader(shards, max_open=1) as reader:
        assert len(reader) == 23 and reader.digest == index_digest(shards)
        index = reader.index.table()
        for row, path in enumerate(index["path"].to_pylist()):
            assert reader.read(row) == (images / path).read_bytes()
        row = index["suffix"].to_pylist().index("png")
        original = Image.open(images / index["path"][row].as_py())
        assert np.array_equal(reader.image(row), np.asarray(original))


def test_the_reader_travels_to_another_process(shards: Path) -> None:
    reader = ShardReader(shards)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(ShardReader.read, (reader, 22)) == reader.read(22)


def test_the_reader_names_a_damaged_record(shards: Path) -> None:
    row = open_index(shards).slice(5, 1).to_pylist()[0]
    with (shards / row["shard"]).open("rb+") as file:
        file.seek(row["offset"] + 30)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    reader = ShardReader(shards)
    assert reader.read(4)
    with pytest.raises(RecordError, match=f"{row['shard']}, record '{row['key']}': checksum"):
        reader.read(5)


def test_a_missing_or_cut_shard_is_refused_at_once(shards: Path) -> None:
    tar = shards / "000001.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[:-512])
    with pytest.raises(InputError, match=rf"000001.tar has {len(data) - 512} bytes where"):
        ShardReader(shards)
    tar.unlink()
    with pytest.raises(InputError, match=r"000001.tar is missing"):
        ShardReader(shards)
    (shards / "shards.json").unlink()
    with pytest.raises(InputError, match="holds no finished shards"):
        ShardReader(shards)


def test_bytes_do_not_depend_on_the_number_of_workers(
    tmp_path: Path, images: Path, shards: Path
) -> None:
    shard(ShardConfig(images=images, out=tmp_path / "two", records_per_shard=8, workers=2))
    assert contents(tmp_path / "two") == contents(shards)


def test_a_second_run_writes_nothing(
    shards: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in shards.rglob("*")}
    shard(ShardConfig(images=images, out=shards, records_per_shard=8, workers=1))
    assert {path: path.stat().st_mtime_ns for path in shards.rglob("*")} == before
    assert "23 tiles in 3 shards (0 made now" in capsys.readouterr().out


def test_a_lost_shard_alone_is_remade(shards: Path, images: Path) -> None:
    before = contents(shards)
    kept = (shards / "000000.tar").stat().st_mtime_ns
    (shards / "000002.tar").unlink()
    shard(ShardConfig(images=images, out=shards, records_per_shard=8, workers=1))
    assert contents(shards) == before
    assert (shards / "000000.tar").stat().st_mtime_ns == kept


@pytest.mark.parametrize("name", ["index.parquet", "failed.parquet", "shards.json"])
def test_a_lost_table_is_remade_from_the_parts(shards: Path, images: Path, name: str) -> None:
    before = contents(shards)
    kept = (shards / "000000.tar").stat().st_mtime_ns
    (shards / name).unlink()
    shard(ShardConfig(images=images, out=shards, records_per_shard=8, workers=1))
    assert contents(shards) == before
    assert (shards / "000000.tar").stat().st_mtime_ns == kept


def test_an_index_of_the_old_layout_is_rewritten_and_no_shard(shards: Path, images: Path) -> None:
    before = contents(shards)
    kept = {path: path.stat().st_mtime_ns for path in shards.glob("*.tar")}
    digest = index_digest(shards)
    # As it was written before there was a row group a shard: one table, and a stamp without layout.
    path = shards / "index.parquet"
    write_table(read_table(path, INDEX), path, INDEX)
    sidecars = [json.loads(sidecar.read_text()) for sidecar in sorted(shards.glob("0*.json"))]
    marker = json.loads((shards / "shards.json").read_text())
    marker["stamp"] = stamp_of(shards=[sidecar["stamp"] for sidecar in sidecars])
    marker["index_xxh3_128"] = file_digest(path)
    (shards / "shards.json").write_text(json.dumps(marker))
    with pytest.raises(InputError, match=r"1 row groups for 3 shards.*run the same 'eosin shard'"):
        ShardReader(shards)
    shard(ShardConfig(images=images, out=shards, records_per_shard=8, workers=1))
    assert contents(shards) == before and index_digest(shards) == digest
    assert {path: path.stat().st_mtime_ns for path in shards.glob("*.tar")} == kept
    groups = pq.ParquetFile(shards / "index.parquet").metadata
    assert [groups.row_group(n).num_rows for n in range(groups.num_row_groups)] == [8, 8, 7]


def test_fewer_shards_leave_none_of_the_old_ones(
    tmp_path: Path, shards: Path, images: Path
) -> None:
    (shards / ".000009.tar.partial").write_bytes(b"left by a kill")
    shard(ShardConfig(images=images, out=shards, records_per_shard=12, workers=1))
    shard(ShardConfig(images=images, out=tmp_path / "new", records_per_shard=12, workers=1))
    assert contents(shards) == contents(tmp_path / "new")


KILLED = """
import sys
from pathlib import Path
from eosin.data_curation.shards import ShardConfig, shard
if __name__ == "__main__":
    images, out, workers = sys.argv[1:]
    shard(ShardConfig(images=Path(images), out=Path(out), records_per_shard=50,
                      workers=int(workers)))
"""


def kill_after(n_sidecars: int, images: Path, out: Path, workers: int, script: Path) -> int:
    """Runs `shard` in a process that is killed when that many shards are done; how many were."""
    script.write_text(KILLED)
    process = subprocess.Popen([sys.executable, str(script), str(images), str(out), str(workers)])
    while process.poll() is None and len(list(out.glob("0*.json"))) < n_sidecars:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return len(list(out.glob("0*.json")))


@pytest.mark.parametrize(("n_sidecars", "workers"), [(0, 1), (2, 1), (2, 2)])
def test_a_killed_run_goes_on_to_the_same_bytes(
    tmp_path: Path, n_sidecars: int, workers: int
) -> None:
    images = make_images(tmp_path / "images", 600)
    config = ShardConfig(images=images, out=tmp_path / "a", records_per_shard=50, workers=1)
    shard(config)
    out = tmp_path / "b"
    done = kill_after(n_sidecars, images, out, workers, tmp_path / "killed.py")
    assert done >= n_sidecars and not (out / "shards.json").exists()
    shard(ShardConfig(images=images, out=out, records_per_shard=50, workers=1))
    assert contents(out) == contents(config.out)
    assert find_problems(out, workers=1)[0] == []


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 600)
    config = ShardConfig(images=images, out=tmp_path / "a", records_per_shard=50, workers=1)
    shard(config)
    for workers in (1, 2):
        out = tmp_path / f"b{workers}"
        for n_sidecars in range(1, 12):
            kill_after(n_sidecars, images, out, workers, tmp_path / "killed.py")
        shard(ShardConfig(images=images, out=out, records_per_shard=50, workers=1))
        assert contents(out) == contents(config.out)


def make_table(images: Path, path: Path, extra: list[str]) -> Path:
    files = sorted(images.rglob("*.*g"))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "group", "split", "age"])
        for number, image in enumerate(files):
            split = ("train", "val", "test")[number % 3]
            writer.writerow([image.relative_to(path.parent), f"p{number // 2:02d}", split, number])
        writer.writerows([[name, "p", "train", 0] for name in extra])
    return path


def test_a_table_with_a_split_keeps_the_test_tiles_out(tmp_path: Path, images: Path) -> None:
    table = make_table(images, tmp_path / "t.csv", [])
    arguments = ["shard", f"images={table}", f"out={tmp_path / 'out'}", "keep=[split!=test]"]
    assert main([*arguments, "workers=1"]) == 0
    index = open_index(tmp_path / "out")
    assert set(index["split"].to_pylist()) == {"train", "val"} and index.num_rows == 16
    assert index.schema.field("age").type == pa.int64()
    assert index["group"][0].as_py().startswith("p")


def test_another_filter_or_label_remakes_only_what_changed(tmp_path: Path, images: Path) -> None:
    table = make_table(images, tmp_path / "t.csv", [])
    config = ShardConfig(images=table, out=tmp_path / "out", records_per_shard=8, workers=1)
    shard(config)
    before = {p.name: p.stat().st_mtime_ns for p in config.out.glob("*.tar")}
    digest = index_digest(config.out)
    table.write_text(table.read_text().replace("p03,val", "p99,val"))
    shard(config)
    after = {p.name: p.stat().st_mtime_ns for p in config.out.glob("*.tar")}
    assert sum(after[name] != before[name] for name in before) == 1
    assert "p99" in open_index(config.out)["group"].to_pylist()
    assert index_digest(config.out) == digest


def test_a_table_naming_missing_tiles_is_refused_with_the_first_few(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = make_table(images, tmp_path / "t.csv", [f"gone{n}.jpg" for n in range(5)])
    assert main(["shard", f"images={table}", f"out={tmp_path / 'out'}", "workers=1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "5 of 28 tiles have no file" in line and "gone0.jpg" in line and "and 2 more" in line


def test_damaged_tiles_are_counted_named_and_tolerated_up_to_the_limit(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = sorted(images.rglob("*.jpg"))[3]
    victim.write_bytes(victim.read_bytes()[:200])
    config = ShardConfig(images=images, out=tmp_path / "out", records_per_shard=8, workers=1)
    for _ in range(2):  # the verdict does not change when nothing is left to do
        with pytest.raises(TooManyFailedError, match="1 of 23 tiles failed, more than max_failed="):
            shard(config)
    failed = read_table(config.out / "failed.parquet", FAILED).to_pylist()
    assert [row["source"] for row in failed] == [str(victim.relative_to(images))]
    assert failed[0]["status"] == "unreadable" and "JPEG" in failed[0]["reason"]
    assert open_index(config.out).num_rows == 22
    assert failed[0]["key"] in capsys.readouterr().err
    shard(ShardConfig(**{**config.__dict__, "max_failed": 0.05}))
    assert "22 tiles in 3 shards (0 made now" in capsys.readouterr().out


def test_a_shard_of_failures_alone_is_still_a_shard(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"text")
    config = ShardConfig(images=tmp_path, out=tmp_path / "out", workers=1, max_failed=1)
    shard(config)
    assert len(ShardReader(config.out)) == 0
    assert find_problems(config.out, workers=1) == ([], 1, 0)


def test_a_read_only_output_folder_ends_in_one_line(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("where the folder should be")
    assert main(["shard", f"images={images}", f"out={tmp_path / 'file' / 'out'}"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


FULL_DISK = """
import resource, sys
from eosin.launch.artefacts import file_digest, stamp_of
from eosin.launch.cli import main
if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_ends_in_one_line_and_the_next_run_goes_on(
    tmp_path: Path, images: Path
) -> None:
    out, script = tmp_path / "out", tmp_path / "full.py"
    script.write_text(FULL_DISK)
    arguments = ["shard", f"images={images}", f"out={out}", "workers=2", "records_per_shard=8"]
    command = [sys.executable, str(script), *arguments]
    (images / "big.jpg").write_bytes(
        simplejpeg.encode_jpeg(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8))
    )
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1
    assert [line for line in ended.stderr.splitlines() if line.startswith("eosin: ")]
    assert "Traceback" not in ended.stderr
    assert not list(out.glob(".*")) and not (out / "shards.json").exists()
    assert main(arguments) == 0
    assert find_problems(out, workers=1)[0] == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["out=o"], "give either images"),
        (["out=o", "images=a", "tiles=b"], "give either images"),
        (["out=o", "images=a", "selection=b"], "selection goes with tiles"),
        (["out=o", "images=a", "records_per_shard=0"], "records_per_shard must be 1 to"),
        (["out=o", "images=a", "keep=[split]"], "is not column=value"),
        (["images=a"], "required and not given: out"),
    ],
)
def test_bad_configs_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(ShardConfig, (), overrides)


def fake_records(n_slides: int, n_tiles: int) -> Records:
    keys = [f"s{s}_{t}" for s in range(n_slides) for t in range(n_tiles)]
    slides = [key.split("_")[0] for key in keys]
    return Records(labels=pa.table({"key": keys, "slide_id": slides}), source=pa.table({"k": keys}))


def test_dealing_is_a_balanced_partition_that_mixes_slides() -> None:
    records = fake_records(20, 37)
    dealt = deal(records, records_per_shard=100, mix_slides=5, seed=1)
    assert sorted(np.concatenate(dealt).tolist()) == list(range(740))
    assert {len(rows) for rows in dealt} <= {92, 93}
    for rows in dealt:
        assert (np.diff(rows) > 0).all()
        slides = set(records.labels["slide_id"].take(rows).to_pylist())
        assert 4 <= len(slides) <= 10
    whole = deal(records, records_per_shard=100, mix_slides=0, seed=1)
    assert all(len(set((rows // 37).tolist())) >= 17 for rows in whole)
    again = deal(records, records_per_shard=100, mix_slides=5, seed=2)
    assert any(not np.array_equal(a, b) for a, b in zip(dealt, again, strict=True))


def test_a_dry_run_says_how_much(shards: Path, images: Path) -> None:
    said = plan(ShardConfig(images=images, out=shards / "no", records_per_shard=8, workers=1))
    assert "23 tiles in 3 shards" in said and "3 to be made" in said
    assert not (shards / "no").exists()
    done = plan(ShardConfig(images=images, out=shards, records_per_shard=8, workers=1))
    assert "0 to be made" in done


def test_real_tiles_pass_through_unchanged(tmp_path: Path, real_data: Path) -> None:
    table = real_data / "lung3" / "labels.csv"
    shard(
        ShardConfig(
            images=table,
            out=tmp_path / "out",
            keep=["split=val", "label=lung_aca"],
            records_per_shard=100,
            workers=1,
        )
    )
    with table.open() as file:
        wanted = [
            row
            for row in csv.DictReader(file)
            if (row["split"], row["label"]) == ("val", "lung_aca")
        ]
    reader = ShardReader(tmp_path / "out")
    index = reader.index.table().to_pylist()
    assert {(r["path"], r["group"]) for r in index} == {(r["path"], r["group"]) for r in wanted}
    for row in range(0, len(reader), 20):
        assert reader.read(row) == (table.parent / index[row]["path"]).read_bytes()
        assert reader.image(row).shape == (224, 224, 3)
