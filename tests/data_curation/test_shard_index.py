"""The index agrees with its table, reads no more than it must, and refuses what is not its own."""

import copy
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from numpy.typing import NDArray

from eosin.configs.errors import InputError
from eosin.data_curation import shard_index, strata
from eosin.data_curation.index_file import IndexFile
from eosin.data_curation.manifest import INDEX, write_table
from eosin.data_curation.shard_index import ShardIndex, write_index
from eosin.data_curation.shard_store import open_store

COUNTS = (5, 0, 7, 1, 12)
ORGANS = ("lung", "skin", None, "breast")


class Places(NamedTuple):
    stratum: NDArray[np.int64]
    shard: NDArray[np.int64]
    rank: NDArray[np.int64]


def part(
    number: int, n: int, mpp: float | list[Any] | None = 0.5, **columns: list[Any]
) -> pa.Table:
    """Rows of a shard, each cell another."""
    rng = np.random.default_rng(number)
    values: dict[str, Any] = {
        "shard": [f"{number:06d}.tar"] * n,
        "key": [f"tile_{number}_{i}" for i in range(n)],
        "suffix": ["jpg" if i % 3 else "png" for i in range(n)],
        "offset": [512 + 1024 * i for i in range(n)],
        "size": [100 + i for i in range(n)],
        "checksum": [rng.bytes(16).hex() for _ in range(n)],
        "width_px": [200 + i for i in range(n)],
        "height_px": [100 + number for _ in range(n)],
        "group": ["g"] * n,
        "slide_id": [None] * n,
        "mpp": mpp if isinstance(mpp, list) else [mpp] * n,
        "cluster": [None] * n,
        "stain": ["H&E"] * n,
        **columns,
    }
    table = pa.table(
        {name: pa.array(values.pop(name), INDEX.field(name).type) for name in INDEX.names}
    )
    for name, cells in values.items():
        table = table.append_column(name, pa.array(cells))
    return table


def write_folder(folder: Path, parts: list[pa.Table]) -> Path:
    """A folder with the marker of `parts`, sparse tars, and no index yet."""
    folder.mkdir()
    shards = {}
    for number, rows in enumerate(parts):
        with (folder / f"{number:06d}.tar").open("wb") as tar:
            tar.truncate(20480)
        shards[f"{number:06d}.tar"] = {
            "count": rows.num_rows,
            "bytes": 20480,
            "xxh3_128": f"{number:032x}",
        }
    marker = {"schema_version": 1, "stamp": "", "failed": 0, "with_metadata": 0, "shards": shards}
    marker |= {"index_xxh3_128": "0" * 32, "failed_xxh3_128": "0" * 32}
    (folder / "shards.json").write_text(json.dumps(marker))
    return folder


def organ_parts() -> list[pa.Table]:
    rng = np.random.default_rng(7)
    chosen = [[ORGANS[k] for k in rng.integers(0, len(ORGANS), n)] for n in COUNTS]
    return [
        part(s, n, organ=pa.array(cells, pa.string()))
        for s, (n, cells) in enumerate(zip(COUNTS, chosen, strict=True))
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    parts = organ_parts()
    folder = write_folder(tmp_path / "shards", parts)
    write_index(iter(parts), folder / "index.parquet")
    return folder


def test_every_row_is_located_as_the_table_says(folder: Path) -> None:
    # A cache that holds hardly a shard gives the same as one that holds all.
    for cache_mb in (1e-4, 100):
        index = ShardIndex(open_store(folder), cache_mb)
        rows = pa.concat_tables(organ_parts()).to_pylist()
        assert len(index) == len(rows) == sum(COUNTS) and index.counts.tolist() == list(COUNTS)
        for row in np.random.default_rng(0).permutation(len(rows)).tolist():
            place, said = index.locate(row), rows[row]
            assert index.names[place.shard] == said["shard"]
            assert index.row(place.shard, place.local) == row
            assert (place.offset, place.size) == (said["offset"], said["size"])
            assert place.checksum.hex() == said["checksum"] and place.suffix == said["suffix"]
            assert (place.height_px, place.width_px) == (said["height_px"], said["width_px"])
            assert index.key(row) == said["key"] and place.reference is None
        asked = [20, 0, 20, 11]
        assert index.hw(asked).tolist() == [
            [rows[r]["height_px"], rows[r]["width_px"]] for r in asked
        ]
        assert index.table().to_pylist() == rows
    for row in (-1, sum(COUNTS)):
        with pytest.raises(IndexError, match=f"row {row} of an index of 25"):
            index.locate(row)


def test_equal_rows_give_equal_bytes_and_a_row_group_a_shard(folder: Path, tmp_path: Path) -> None:
    write_index(iter(organ_parts()), tmp_path / "again.parquet")
    assert (tmp_path / "again.parquet").read_bytes() == (folder / "index.parquet").read_bytes()
    metadata = pq.read_metadata(folder / "index.parquet")
    assert [metadata.row_group(g).num_rows for g in range(5)] == list(COUNTS)
    write_index(iter(()), tmp_path / "none.parquet")
    assert pq.read_table(tmp_path / "none.parquet").schema.equals(INDEX)


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "index.parquet"
    with pytest.raises(ValueError, match="only some shards have organ"):
        write_index([part(0, 1), part(1, 1, organ=["lung"])], path)
    with pytest.raises(ValueError, match="columns organ are missing"):
        write_index([part(0, 1, organ=["lung"]), part(1, 1)], path)
    with pytest.raises(ValueError, match="'size' must not be null"):
        write_index([part(0, 2, size=[1, None])], path)
    assert not list(tmp_path.iterdir())


def test_strata_and_their_rows_agree_with_a_loop(folder: Path) -> None:
    index = ShardIndex(open_store(folder))
    table = pa.concat_tables(organ_parts())
    for column in ("organ", "suffix", "width_px"):
        values = ["" if v is None else str(v) for v in table[column].to_pylist()]
        shards = [int(name[:6]) for name in table["shard"].to_pylist()]
        strata = index.strata(column)
        assert list(strata.names) == sorted(set(values))
        places, rows = [], []
        for k, name in enumerate(strata.names):
            for s in range(len(COUNTS)):
                found = [r for r, v in enumerate(values) if v == name and shards[r] == s]
                assert strata.counts[k, s] == len(found)
                places += [(k, s, rank) for rank in range(len(found))]
                rows += found
        asked = Places(*np.array(places).T.reshape(3, 5, -1))
        assert index.rows_at(column, asked).tolist() == np.reshape(rows, (5, -1)).tolist()
        # Another process needs not count again to know the strata's numbers.
        there = copy.copy(index)
        assert there.rows_at(column, asked).tolist() == index.rows_at(column, asked).tolist()
    every = index.strata("")
    assert every.names == ("",) and every.counts.tolist() == [list(COUNTS)]
    asked = Places(np.zeros(2, int), np.array([2, 4]), np.array([6, 0]))
    assert index.rows_at("", asked).tolist() == [11, 13]
    with pytest.raises(InputError, match=r"no column 'organs'; there are: shard, key, .*organ"):
        index.strata("organs")


def digest_of(folder: Path, column: str) -> str:
    """The digest of the strata, record by record."""
    numbers, names = [], []
    for value in ShardIndex(open_store(folder)).table()[column].to_pylist():
        names += [value or ""] if (value or "") not in names else []
        numbers.append(names.index(value or ""))
    cells = np.array(numbers, "<i4").tobytes()
    return xxhash.xxh3_128_hexdigest(cells + json.dumps([column, names]).encode())


def test_strata_are_counted_once_and_know_which_record_has_which_value(folder: Path) -> None:
    index = ShardIndex(open_store(folder))
    found = index.strata("organ")
    assert index.strata("organ") is found and index.strata("") is index.strata("")
    assert found.digest == digest_of(folder, "organ") and index.strata("").digest == ""
    assert index.strata("suffix").digest == digest_of(folder, "suffix") != found.digest
    # Two records of a shard change places: the counts do not tell.
    parts = organ_parts()
    cells = parts[4]["organ"].to_pylist()
    other = next(n for n, cell in enumerate(cells) if cell != cells[0])
    cells[0], cells[other] = cells[other], cells[0]
    parts[4] = part(4, 12, organ=pa.array(cells, pa.string()))
    write_index(parts, folder / "index.parquet")
    changed = ShardIndex(open_store(folder)).strata("organ")
    assert changed.names == found.names and (changed.counts == found.counts).all()
    assert changed.digest == digest_of(folder, "organ") != found.digest
    # A process that knows the values of before finds another: refused, not taken for the first.
    parts[4] = part(4, 12, organ=pa.array(["liver"] * 12, pa.string()))
    write_index(parts, folder / "index.parquet")
    there, one = copy.copy(index), np.ones(1, int)
    assert there.rows_at("organ", Places(0 * one, 2 * one, 0 * one)).size
    with pytest.raises(InputError, match=r"damaged \(organ 'liver' was not there at the start\)"):
        there.rows_at("organ", Places(0 * one, 4 * one, 0 * one))


def test_more_values_than_memory_holds_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strata, "MAX_CELLS", 5 * 6)
    index = ShardIndex(open_store(folder))
    assert len(index.strata("organ").names) == 4
    with pytest.raises(InputError, match=r"column 'key' has 12 values or more in 5 shards.*group"):
        index.strata("key")


def test_cells_that_unfold_to_far_too_much_are_refused_by_every_way(tmp_path: Path) -> None:
    parts = [part(0, 2, note=["", ""]), part(1, 3, note=["x" * 1_000_000, "", ""])]
    folder = write_folder(tmp_path / "shards", parts)
    write_index(parts, folder / "index.parquet")
    index = ShardIndex(open_store(folder))
    for way in (index.table, lambda: index.strata("note")):
        with pytest.raises(InputError, match=r"is damaged \(\d+ bytes for 3 rows\)"):
            way()
    assert index.locate(4).size == 102  # the rest is still read


@pytest.mark.parametrize("footer", [True, False])
def test_the_kinds_of_tiles_are_those_of_a_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, footer: bool
) -> None:
    if not footer:  # an index of before
        monkeypatch.setattr(shard_index, "_BOUNDED", ["shard", "mpp"])
    alike = {"width_px": [256] * 4, "height_px": [224] * 4}
    odd = {"width_px": [300, 20, 0, 10**9], "height_px": [200, 90, 5, 10**9]}
    parts = [
        part(0, 4, None, **alike),
        part(1, 0),
        part(2, 4, 0.25, **odd),
        part(3, 4, 0.5, **alike),
        part(4, 4, [0.5, None, 0.5, math.nan], **alike),
    ]
    folder = write_folder(tmp_path / "shards", parts)
    write_index(parts, folder / "index.parquet")
    index, read = ShardIndex(open_store(folder)), list[int]()
    plain = IndexFile.read
    monkeypatch.setattr(
        IndexFile, "read", lambda self, s, c: (read.append(s), plain(self, s, c))[1]
    )
    expected = {
        (*(size), None if math.isnan(mpp) else mpp)
        for size, mpp in zip(index.hw(range(16)).tolist(), index.mpp(range(16)), strict=True)
    }
    assert (1, 1, 0.25) in expected and len(expected) == 5
    read.clear()
    found = index.tile_kinds()
    assert {(h, w, None if math.isnan(m) else m) for h, w, m in found} == expected
    assert len(found) == 5 and index.tile_kinds() == found
    assert read == ([2, 4] if footer else [0, 2, 3, 4])
    assert ShardIndex(open_store(folder)).largest_hw() == (224, 300)
    assert read == ([2, 4, 2] if footer else [0, 2, 3, 4, 0, 2, 3, 4])


@pytest.mark.parametrize(
    ("scales", "single"),
    [((0.5, 0.5), 0.5), ((0.5, 0.25), None), ((None, None), None), ((0.5, None), None)],
)
def test_the_one_scale_is_known_without_reading_rows(
    tmp_path: Path, scales: tuple[float | None, float | None], single: float | None
) -> None:
    parts = [part(0, 3, scales[0]), part(1, 0), part(2, 2, scales[1])]
    folder = write_folder(tmp_path / "shards", parts)
    write_index(parts, folder / "index.parquet")
    index = ShardIndex(open_store(folder))
    assert index.single_mpp() == single
    found = index.mpp([0, 4, 1])
    expected = np.array([scales[0], scales[1], scales[0]], float)
    assert np.array_equal(found, expected, equal_nan=True)


def test_an_index_of_other_shards_or_layout_is_refused(folder: Path) -> None:
    path, parts = folder / "index.parquet", organ_parts()
    write_table(pa.concat_tables(parts), path, INDEX)
    with pytest.raises(InputError, match="1 row groups for 5 shards: an older layout"):
        ShardIndex(open_store(folder))
    write_index([*parts[:4], part(4, 12, shard=["000003.tar"] * 12, organ=["lung"] * 12)], path)
    with pytest.raises(
        InputError, match=r"row group 4 has 12 rows of 000003.tar, not 12 of 000004"
    ):
        ShardIndex(open_store(folder))
    write_index([parts[0].slice(1), *parts[1:]], path)
    with pytest.raises(InputError, match=r"row group 0 has 4 rows of 000000.tar, not 5"):
        ShardIndex(open_store(folder))
    path.unlink()
    with pytest.raises(InputError, match=r"index.parquet does not exist"):
        ShardIndex(open_store(folder))


def test_a_damaged_page_is_named_and_other_shards_are_still_read(folder: Path) -> None:
    path = folder / "index.parquet"
    metadata = pq.read_metadata(path)
    place = metadata.schema.names.index("offset")
    start = metadata.row_group(2).column(place).data_page_offset
    length = metadata.row_group(2).column(place).total_compressed_size
    data = bytearray(path.read_bytes())
    data[start + length - 2] ^= 1
    path.write_bytes(data)
    index = ShardIndex(open_store(folder))
    assert index.locate(3).offset == 512 + 3 * 1024
    with pytest.raises(InputError, match=r"index.parquet is damaged .*; remove it and run"):
        index.locate(5)
    assert index.locate(24).offset == 512 + 11 * 1024


def test_cells_that_cannot_be_are_no_danger(tmp_path: Path) -> None:
    checksum = ["zz" * 16, "é" * 16, "", "00" * 40]
    sizes = {"height_px": [-1, 10**9, 0, 5], "width_px": [5, 10**9, 5, 5]}
    rows = part(0, 4, checksum=checksum, suffix=["pkl", "", "jpg", "jpg"], **sizes)
    folder = write_folder(tmp_path / "shards", [rows])
    write_index([rows], folder / "index.parquet")
    index = ShardIndex(open_store(folder))
    assert index.hw(range(4)).tolist() == [[1, 1], [1, 1], [1, 1], [5, 5]]
    assert all(index.locate(row).checksum == bytes(16) for row in range(4))
    assert [index.locate(row).suffix for row in range(4)] == ["pkl", "", "jpg", "jpg"]
