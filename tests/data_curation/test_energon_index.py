"""The index for Megatron-Energon: its bytes against the format, written down again here."""

import json
import struct
import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import yaml
from PIL import Image

from eosin.configs.errors import InputError
from eosin.data_curation.energon_index import EnergonConfig, write_energon
from eosin.data_curation.shards import ShardConfig, shard
from eosin.data_curation.verify import find_problems


def config_of(folder: Path, records_per_shard: int = 8) -> ShardConfig:
    return ShardConfig(
        images=folder / "images",
        out=folder / "shards",
        records_per_shard=records_per_shard,
        workers=1,
        max_failed=1,
    )


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """23 tiles, JPEG and PNG, in three shards."""
    (tmp_path / "images").mkdir()
    for number in range(23):
        rgb = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
        path = tmp_path / "images" / f"tile_{number}"
        if number % 5:
            path.with_suffix(".jpg").write_bytes(simplejpeg.encode_jpeg(rgb))
        else:
            Image.fromarray(rgb).save(path.with_suffix(".png"))
    shard(config_of(tmp_path))
    return tmp_path / "shards"


def read_positions(path: Path) -> list[int]:
    """Unsigned 64-bit little-endian integers."""
    data = path.read_bytes()
    return list(struct.unpack(f"<{len(data) // 8}Q", data))


def members_at(tar: Path, start: int, end: int) -> list[str]:
    """The members between two positions of a tar, as a reader finds them that starts there."""
    with tar.open("rb") as file:
        file.seek(start)
        piece = file.read(end - start)
    found = []
    while piece:
        header = tarfile.TarInfo.frombuf(piece[:512], "utf-8", "strict")
        found.append(header.name)
        piece = piece[512 + -(-header.size // 512) * 512 :]
    return found


def test_every_position_is_where_tarfile_finds_the_header(shards: Path) -> None:
    write_energon(EnergonConfig(shards=shards))
    assert find_problems(shards, workers=1)[0] == []  # nothing of it is a stranger
    tars = sorted(shards.glob("*.tar"))
    assert len(tars) == 3
    for tar in tars:
        with tarfile.open(tar, "r:") as archive:
            members = archive.getmembers()
            end = archive.offset  # where the blocks of zeros begin, as Energon's own writer says
        positions = read_positions(tar.with_name(f"{tar.name}.idx"))
        assert positions == [member.offset for member in members] + [end]
        found = [members_at(tar, start, stop) for start, stop in pairwise(positions)]
        assert found == [[member.name] for member in members]


def test_the_folder_says_how_many_of_what_are_where(shards: Path) -> None:
    write_energon(EnergonConfig(shards=shards))
    meta = shards / ".nv-meta"
    counts = {}
    for tar in sorted(shards.glob("*.tar")):
        with tarfile.open(tar) as archive:
            counts[tar.name] = len(archive.getnames())
    assert json.loads((meta / ".info.json").read_text())["shard_counts"] == counts
    assert yaml.safe_load((meta / ".info.yaml").read_text())["shard_counts"] == counts
    split = yaml.safe_load((meta / "split.yaml").read_text())
    assert split == {"exclude": [], "split_parts": {"train": list(counts), "val": [], "test": []}}
    dataset = yaml.safe_load((meta / "dataset.yaml").read_text())
    assert dataset["sample_type"] == {"__module__": "megatron.energon", "__class__": "ImageSample"}
    assert dataset["field_map"] == {"image": "jpg,png"}


def test_a_dataset_yaml_of_the_users_is_kept(shards: Path) -> None:
    write_energon(EnergonConfig(shards=shards))
    mine = shards / ".nv-meta" / "dataset.yaml"
    mine.write_text("sample_loader: mine.py:load\n")
    write_energon(EnergonConfig(shards=shards))
    assert mine.read_text() == "sample_loader: mine.py:load\n"


def test_a_shard_without_records_is_not_named(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"text")
    rgb = np.zeros((16, 16, 3), np.uint8)
    (tmp_path / "images" / "b.jpg").write_bytes(simplejpeg.encode_jpeg(rgb))
    shard(config_of(tmp_path, records_per_shard=1))
    write_energon(EnergonConfig(shards=tmp_path / "shards"))
    info = json.loads((tmp_path / "shards" / ".nv-meta" / ".info.json").read_text())
    (name,) = info["shard_counts"]
    positions = {path.name: read_positions(path) for path in (tmp_path / "shards").glob("*.idx")}
    assert sorted(positions.values(), key=len)[0] == [0]
    assert len(positions[f"{name}.idx"]) == 2


def test_shards_that_change_take_the_index_with_them(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_energon(EnergonConfig(shards=shards))
    shard(config_of(shards.parent))  # nothing to do: it stays
    assert len(list(shards.glob("*.tar.idx"))) == 3
    shard(config_of(shards.parent, records_per_shard=12))
    assert not list(shards.glob("*.tar.idx"))
    assert not (shards / ".nv-meta" / ".info.json").exists()
    assert f"eosin shard energon {shards}" in capsys.readouterr().err
    write_energon(EnergonConfig(shards=shards))
    assert len(list(shards.glob("*.tar.idx"))) == 2


def test_unfinished_or_missing_shards_are_refused(shards: Path) -> None:
    write_energon(EnergonConfig(shards=shards))
    for index in shards.glob("*.idx"):
        index.unlink()
    (shards / "000001.tar").unlink()
    with pytest.raises(InputError, match=r"000001\.tar is missing"):
        write_energon(EnergonConfig(shards=shards))
    assert not list(shards.glob("*.idx"))
    assert not (shards / ".nv-meta" / ".info.json").exists()
    (shards / "shards.json").unlink()
    with pytest.raises(InputError, match="holds no finished shards"):
        write_energon(EnergonConfig(shards=shards))
