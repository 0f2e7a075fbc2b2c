"""`eosin shard verify` names whatever is damaged, cut, missing or extra."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
import webdataset.tariterators
from numpy.typing import NDArray

from eosin.configs.errors import ConfigError, InputError
from eosin.configs.load import load_config
from eosin.data_curation.manifest import INDEX, read_table, write_table
from eosin.data_curation.shard_reader import open_index
from eosin.data_curation.shards import ShardConfig, shard
from eosin.data_curation.tiles import TileConfig, tile
from eosin.data_curation.verify import VerifyConfig, find_problems
from eosin.launch.artefacts import file_digest
from eosin.launch.cli import main

TAR = "000001.tar"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(20):
        rgb = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
        (images / f"tile{number:02d}.jpg").write_bytes(simplejpeg.encode_jpeg(rgb))
    shard(ShardConfig(images=images, out=tmp_path / "shards", records_per_shard=7, workers=1))
    return tmp_path / "shards"


def rows_of(shards: Path, tar: str) -> list[dict[str, object]]:
    return [row for row in open_index(shards).to_pylist() if row["shard"] == tar]


def problems(shards: Path) -> dict[str, str]:
    """What is wrong, by file and record."""
    found, _, _ = find_problems(shards, workers=1)
    return {f"{p.file}:{p.record}" if p.record else p.file: p.what for p in found}


def test_sound_shards_pass_with_one_line(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["shard", "verify", str(shards), "workers=2"]) == 0
    assert capsys.readouterr().out == f"shard verify: {shards}: 3 shards, 20 records, all sound\n"


def test_a_flipped_byte_in_a_record_is_named(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = rows_of(shards, TAR)[2]
    data = bytearray((shards / TAR).read_bytes())
    data[int(str(row["offset"])) + 50] ^= 0x10
    (shards / TAR).write_bytes(data)
    assert problems(shards) == {
        TAR: "damaged: checksum mismatch",
        f"{TAR}:{row['key']}": "damaged: checksum mismatch",
    }
    capsys.readouterr()
    assert main(["shard", "verify", str(shards), "workers=1"]) == 1
    out, err = capsys.readouterr()
    assert f"{TAR}, record '{row['key']}': damaged" in out
    assert "2 problems in 000001.tar; remove" in err.splitlines()[-1]


def test_a_flipped_byte_in_padding_is_named(shards: Path) -> None:
    data = bytearray((shards / TAR).read_bytes())
    data[-1] = 1
    (shards / TAR).write_bytes(data)
    assert problems(shards) == {TAR: "damaged: checksum mismatch"}


def test_a_flipped_byte_in_a_header_loses_what_readers_lose(shards: Path) -> None:
    row = rows_of(shards, TAR)[3]
    data = bytearray((shards / TAR).read_bytes())
    data[int(str(row["offset"])) - 512] ^= 1
    (shards / TAR).write_bytes(data)
    found = problems(shards)
    assert found.pop(TAR) == "damaged: checksum mismatch"
    lost = [f"{TAR}:{later['key']}" for later in rows_of(shards, TAR)[3:]]
    assert list(found) == lost and set(found.values()) == {
        "missing: a reader of the tar does not find it"
    }


def test_a_tar_cut_exactly_at_a_header_is_named_though_readers_are_content(shards: Path) -> None:
    rows = rows_of(shards, TAR)
    data = (shards / TAR).read_bytes()
    cut = data[: int(str(rows[4]["offset"])) - 512]
    (shards / TAR).write_bytes(cut)
    seen = list(webdataset.tariterators.tar_file_iterator(io.BytesIO(cut)))
    assert len(seen) == 4  # without any error: this is why verify exists
    found = problems(shards)
    assert found.pop(TAR) == f"truncated: {len(cut)} of {len(data)} bytes"
    assert found == {
        f"{TAR}:{row['key']}": "missing: beyond the end of the shard" for row in rows[4:]
    }


@pytest.mark.parametrize("keep", [700, 100, 0])
def test_a_tar_cut_anywhere_is_named(shards: Path, keep: int) -> None:
    n_rows = len(rows_of(shards, TAR))
    data = (shards / TAR).read_bytes()
    (shards / TAR).write_bytes(data[:keep])
    found = problems(shards)
    assert found.pop(TAR) == f"truncated: {keep} of {len(data)} bytes"
    assert len(found) == n_rows


def test_a_member_added_behind_is_named(shards: Path) -> None:
    with tarfile.open(shards / TAR, "a:", format=tarfile.USTAR_FORMAT) as archive:
        member = tarfile.TarInfo("stowaway.jpg")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    found = problems(shards)
    assert found.pop(f"{TAR}:stowaway.jpg") == "extra: the index does not have it"
    assert list(found) == [TAR]


@pytest.mark.parametrize(
    "name", [TAR, "000001.json", "parts/000001.parquet", "index.parquet", "failed.parquet"]
)
def test_a_missing_file_is_named(shards: Path, name: str) -> None:
    (shards / name).unlink()
    assert problems(shards) == {name: "missing"}


def test_extra_files_are_named(shards: Path) -> None:
    for name in ("000009.tar", "000009.json", "parts/000009.parquet", "sub/x.txt"):
        (shards / name).parent.mkdir(exist_ok=True)
        (shards / name).write_bytes(b"")
    assert set(problems(shards)) == {
        "000009.tar",
        "000009.json",
        "parts/000009.parquet",
        "sub",
        "sub/x.txt",
    }


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_sidecar(path: Path) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, "count": value["count"] + 1}))


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (edit_sidecar, "not what shards.json says of it"),
        (lambda path: path.write_text("{"), "damaged"),
        (lambda path: path.write_text("[1]"), "damaged"),
        (lambda path: edit(path, bytes="many"), "damaged"),
        (lambda path: edit(path, failed=[{"key": 1}]), "damaged"),
        (lambda path: edit(path, part_xxh3_128=None), "damaged"),
    ],
)
def test_a_spoilt_sidecar_is_named(shards: Path, damage: Callable[[Path], None], what: str) -> None:
    damage(shards / "000001.json")
    assert problems(shards) == {"000001.json": what}


def test_an_index_that_lacks_a_row_is_named(shards: Path) -> None:
    index = open_index(shards)
    lost = index["key"][-1].as_py()
    write_table(index.slice(0, 19), shards / "index.parquet", INDEX)
    found = problems(shards)
    assert found.pop("index.parquet").startswith("not what was written")
    assert list(found.values()) == ["extra: the index does not have it"]
    assert lost in next(iter(found))


def test_an_index_with_wild_offsets_is_named(shards: Path) -> None:
    index = open_index(shards)
    offsets = pa.array([-5, 1 << 40, *index["offset"].to_pylist()[2:]], pa.int64())
    place = index.schema.get_field_index("offset")
    write_table(index.set_column(place, "offset", offsets), shards / "index.parquet", INDEX)
    found = list(problems(shards).values())
    assert found.count("missing: beyond the end of the shard") == 2


def test_a_damaged_page_of_the_index_is_named_and_the_other_shards_are_checked(
    shards: Path,
) -> None:
    path = shards / "index.parquet"
    group = pq.read_metadata(path).row_group(1)
    column = group.column(pq.read_schema(path).names.index("offset"))
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 2] ^= 1
    path.write_bytes(data)
    marker = json.loads((shards / "shards.json").read_text())
    edit(shards / "shards.json", index_xxh3_128=file_digest(path))
    assert marker["shards"].keys() == {"000000.tar", "000001.tar", "000002.tar"}
    row = read_parts(shards, "000002")[0]
    with (shards / "000002.tar").open("rb+") as tar:
        tar.seek(row["offset"] + 40)
        tar.write(b"????")
    found = problems(shards)
    assert found.pop("index.parquet").startswith("unreadable: the rows of 000001.tar: ")
    assert set(found) == {"000002.tar", f"000002.tar:{row['key']}"}


def read_parts(shards: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_table(shards / "parts" / f"{name}.parquet", INDEX).to_pylist()
    return rows


def test_shards_that_point_into_slides_are_checked_against_the_slides(
    tmp_path: Path, write_slide: Callable[..., Path], tissue_pixels: NDArray[np.uint8]
) -> None:
    for name in ("a", "b"):
        write_slide(tmp_path / "slides" / f"{name}.tiff", [tissue_pixels], mpp=(0.5, 0.5))
    tile(TileConfig(slides=tmp_path / "slides", out=tmp_path / "out", size_px=64, workers=1))
    shards = tmp_path / "shards"
    shard(
        ShardConfig(
            tiles=tmp_path / "out", out=shards, pixels="slides", records_per_shard=20, workers=1
        )
    )
    assert problems(shards) == {}
    (shards / "shards.json").rename(tmp_path / "marker")
    assert list(problems(shards)) == ["shards.json"]  # what is there is told by the sidecars
    (tmp_path / "marker").rename(shards / "shards.json")
    slide = tmp_path / "slides" / "a.tiff"
    os.utime(slide, ns=(1, 1))
    found = problems(shards)
    assert found and all(name.endswith(".slides") for name in found)
    assert all(f"{slide} changed since the index was made" in what for what in found.values())
    slide.unlink()
    assert all(f"{slide} is missing" in what for what in problems(shards).values())
    write_slide(slide, [tissue_pixels], mpp=(0.5, 0.5))
    index = read_table(shards / "index.parquet", INDEX)
    at = index.column_names.index("level0_x")
    moved = pa.array([x + 1 for x in index["level0_x"].to_pylist()])
    write_table(
        index.set_column(at, index.schema.field(at), moved), shards / "index.parquet", INDEX
    )
    found_now, _, _ = find_problems(shards, workers=1)
    assert ("000000.slides", "damaged: checksum mismatch") in {(p.file, p.what) for p in found_now}


def test_unfinished_shards_are_checked_against_their_sidecars(shards: Path) -> None:
    (shards / "shards.json").unlink()
    (shards / "000002.tar").write_bytes(b"short")
    found = problems(shards)
    assert "holds no finished shards" in found["shards.json"]
    assert found["000002.tar"].startswith("truncated: 5 of")


def test_a_marker_that_points_elsewhere_is_refused(shards: Path) -> None:
    marker = json.loads((shards / "shards.json").read_text())
    marker["shards"]["../../secret.tar"] = marker["shards"][TAR]
    (shards / "shards.json").write_text(json.dumps(marker))
    assert "not of the form" in problems(shards)["shards.json"]


@pytest.mark.parametrize(
    "values",
    [
        {"shards": [1]},
        {"shards": {TAR: {"count": 7}}},
        {"index_xxh3_128": None},
        {"schema_version": "one"},
        {"stamp": 3},
    ],
)
def test_a_damaged_marker_is_one_line_and_the_next_run_mends_it(
    shards: Path, values: dict[str, object]
) -> None:
    whole = (shards / "shards.json").read_bytes()
    edit(shards / "shards.json", **values)
    with pytest.raises(InputError, match=r"shards\.json is damaged"):
        open_index(shards)
    assert "is damaged" in problems(shards)["shards.json"]
    images = shards.parent / "images"
    shard(ShardConfig(images=images, out=shards, records_per_shard=7, workers=1))
    assert (shards / "shards.json").read_bytes() == whole


def test_a_damaged_sidecar_is_remade(shards: Path) -> None:
    whole = (shards / "000001.json").read_bytes()
    stamp = json.loads(whole)["stamp"]
    (shards / "000001.json").write_text(json.dumps({"schema_version": 1, "stamp": stamp}))
    images = shards.parent / "images"
    shard(ShardConfig(images=images, out=shards, records_per_shard=7, workers=1))
    assert (shards / "000001.json").read_bytes() == whole


def test_a_damaged_index_is_refused_in_one_line_before_it_is_parsed(shards: Path) -> None:
    path = shards / "index.parquet"
    path.write_bytes(b"PAR1" + bytes(100) + b"\x10\0\0\0PAR1")
    with pytest.raises(InputError, match=r"index\.parquet is damaged .*; remove it and run"):
        open_index(shards)
    with pytest.raises(InputError, match="not a readable Parquet file") as failure:
        read_table(path, INDEX)
    assert "\n" not in str(failure.value)
    found = [p.what for p in find_problems(shards, workers=1)[0] if p.file == path.name]
    assert "checksum mismatch" in found[0] and found[1].startswith("unreadable")


def test_a_folder_that_is_none_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shard", "verify", str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="workers must be 0 or more"):
        load_config(VerifyConfig, (), ["shards=a", "workers=-1"])
