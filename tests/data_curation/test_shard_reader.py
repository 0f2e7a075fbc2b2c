"""Records decoded at a fraction of their size, into place, and never for what they are not."""

import copy
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from eosin.configs.errors import EosinError
from eosin.data_curation import shard_reader
from eosin.data_curation.codec import ImageError, decode_image, reduce_pixels
from eosin.data_curation.manifest import INDEX, REFERENCE
from eosin.data_curation.read_ahead import ReadAhead
from eosin.data_curation.records import file_identity
from eosin.data_curation.shard_index import write_index
from eosin.data_curation.shard_reader import Payload, RecordError, ShardReader, open_index
from eosin.data_curation.shards import ShardConfig, shard
from eosin.data_curation.slide import Slide
from eosin.launch.artefacts import mark_done

SIZES = ((64, 64), (61, 47), (17, 90), (7, 9), (1, 1))


def picture(height: int, width: int) -> NDArray[np.uint8]:
    """A smooth picture: its averages survive JPEG."""
    noise = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 3)


def encode(pixels: NDArray[np.uint8], suffix: str) -> bytes:
    if suffix == "jpg":
        return simplejpeg.encode_jpeg(pixels, 95, "RGB", "444")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def box_means(pixels: NDArray[np.uint8], factor: int) -> NDArray[np.float64]:
    """The mean of each box, with a loop."""
    height, width = (-(-side // factor) for side in pixels.shape[:2])
    means = np.empty((height, width, 3))
    for y in range(height):
        for x in range(width):
            box = pixels[y * factor : (y + 1) * factor, x * factor : (x + 1) * factor]
            means[y, x] = box.reshape(-1, 3).mean(axis=0)
    return means


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_a_scaled_tile_is_the_mean_of_its_boxes(suffix: str, factor: int) -> None:
    for height, width in SIZES:
        data = encode(picture(height, width), suffix)
        expected = box_means(decode_image(data, suffix), factor)
        found = decode_image(data, suffix, factor)
        assert found.shape == expected.shape and found.dtype == np.uint8
        whole = (height // factor, width // factor)  # boxes that the edge does not cut
        away = np.abs(found - expected)[: whole[0], : whole[1]]
        # PNG: rounding. JPEG: scaled in the frequencies, and the coefficients cut are not zero.
        assert away.size == 0 or (away.max() <= 0.51 if suffix == "png" else away.mean() < 1.5)
        assert suffix == "jpg" or np.abs(found - expected).max() <= 0.7


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("factor", [1, 4])
def test_a_tile_is_decoded_into_place(suffix: str, factor: int) -> None:
    data = encode(picture(61, 47), suffix)
    alone = decode_image(data, suffix, factor)
    height, width = alone.shape[:2]
    for shape in ((height, width, 3), (height + 3, width, 3), (height + 2, width + 5, 3)):
        batch = np.full((3, *shape), 77, np.uint8)
        found = decode_image(data, suffix, factor, batch[1])
        assert np.shares_memory(found, batch) and np.array_equal(found, alone)
        assert np.array_equal(batch[1, :height, :width], alone)
        batch[1, :height, :width] = 77
        assert (batch == 77).all()  # nothing else was touched
    with pytest.raises(ImageError, match=rf"{width}×{height} pixels where {width - 1}×{height}"):
        decode_image(data, suffix, factor, np.empty((height, width - 1, 3), np.uint8))
    for wrong in (0, 3, 16):
        with pytest.raises(ValueError, match=rf"factor must be one of \(1, 2, 4, 8\), not {wrong}"):
            decode_image(data, suffix, wrong)


def test_what_is_no_image_is_not_decoded() -> None:
    for suffix in ("pkl", "", "slide"):
        with pytest.raises(ImageError, match=f"'{suffix}' is no kind of tile image"):
            decode_image(b"cos\nsystem\n(S'true'\ntR.", suffix)
    assert reduce_pixels(picture(8, 8), 1).shape == (8, 8, 3)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number, (height, width) in enumerate(SIZES * 2):
        suffix = "jpg" if number < len(SIZES) else "png"
        path = tmp_path / "images" / f"{number:02d}.{suffix}"
        path.write_bytes(encode(picture(height, width), suffix))
    out = tmp_path / "shards"
    shard(ShardConfig(images=tmp_path / "images", out=out, records_per_shard=4, workers=1))
    return out


def test_records_are_decoded_as_their_files(shards: Path) -> None:
    with ShardReader(shards) as reader:
        paths = reader.index.table()["path"].to_pylist()
        for row, path in enumerate(paths):
            data = (shards.parent / "images" / path).read_bytes()
            payload = reader.payload(row)
            assert payload.data == data == reader.read(row) and payload.pixels is None
            for factor in (1, 8):
                expected = decode_image(data, path[-3:], factor)
                assert np.array_equal(reader.image(row, factor), expected)
                out = np.zeros((64, 90, 3), np.uint8)
                reader.decode(payload, factor, out)
                assert np.array_equal(out[: expected.shape[0], : expected.shape[1]], expected)
        tall = (reader.index.hw(range(10)) == (64, 64)).all(1).nonzero()[0]
        assert sorted(paths[row] for row in tall) == ["00.jpg", "05.png"]


def rewrite(shards: Path, row: int, **cells: object) -> None:
    """Changes cells of a row of the index, which stays an index of these shards."""
    table = open_index(shards)
    for name, value in cells.items():
        column = table[name].to_pylist()
        column[row] = value
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(name), pa.array(column, table[name].type))
    names = table["shard"].unique().to_pylist()
    groups = [table.filter(pc.equal(table["shard"], name)) for name in names]
    write_index(groups, shards / "index.parquet")


@pytest.mark.parametrize(
    ("cells", "what"),
    [
        ({"offset": -1}, "the shard ends within the record"),
        ({"offset": 1 << 62}, "the shard ends within the record"),
        ({"size": 1 << 62}, "the shard ends within the record"),
        ({"size": -5}, "the shard ends within the record"),
        ({"size": 3}, "checksum mismatch"),
        ({"checksum": "0" * 32}, "checksum mismatch"),
        ({"checksum": "no hash"}, "checksum mismatch"),
        ({"suffix": "pkl"}, "'pkl' is no kind of tile image"),
        ({"suffix": "slide"}, "'slide' is no kind of tile image"),
        ({"height_px": 10**9}, "pixels where the index says"),
        ({"width_px": -1}, "pixels where the index says"),
        ({"width_px": 50}, "pixels where the index says"),
    ],
)
def test_a_row_that_lies_is_one_damaged_record(
    shards: Path, cells: dict[str, object], what: str
) -> None:
    rewrite(shards, 2, **cells)
    key = open_index(shards)["key"][2].as_py()
    with ShardReader(shards) as reader:
        with pytest.raises(RecordError, match=f"000000.tar, record '{key}': .*{what}"):
            reader.image(2)
        assert all(reader.image(row).size for row in range(10) if row != 2)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What is waited, in seconds, in no time."""
    waited: list[float] = []
    monkeypatch.setattr(shard_reader.time, "sleep", waited.append)
    return waited


def test_what_cannot_be_read_for_a_moment_is_no_damage(
    shards: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, failures, descriptors = shard_reader.read_record, list[int](), list[int]()

    def flaky(descriptor: int, offset: int, size: int) -> bytes:
        descriptors.append(descriptor)
        if failures:
            raise OSError(failures[0], os.strerror(failures.pop(0)))
        return plain(descriptor, offset, size)

    monkeypatch.setattr(shard_reader, "read_record", flaky)
    with ShardReader(shards) as reader:
        expected, opened = reader.read(1), list[str]()
        plain_open = type(reader.index.store).open
        monkeypatch.setattr(
            type(reader.index.store),
            "open",
            lambda self, name: (opened.append(name), plain_open(self, name))[1],
        )
        failures[:] = [errno.ESTALE, errno.EIO]
        assert reader.read(1) == expected and waits == [0.5, 2.0]
        assert opened == ["000000.tar"] * 2  # a descriptor that has failed is not used again
        failures[:] = [errno.ESTALE] * 3
        with pytest.raises(
            EosinError, match=r"000000.tar cannot be read \(3 attempts\): Stale"
        ) as e:
            reader.read(1)
        assert not isinstance(e.value, RecordError)
        failures[:] = [errno.EIO] * 3  # a bad sector
        with pytest.raises(RecordError, match=r"000000.tar, record '\d+': Input/output"):
            reader.read(1)
        assert reader.read(1) == expected
        reader.close()
        (shards / "000000.tar").rename(shards / "away.tar")
        with pytest.raises(EosinError, match=r"000000.tar cannot be read .*: No such file") as e:
            reader.read(1)
        assert not isinstance(e.value, RecordError)


def test_the_bound_of_the_index_goes_along_to_other_processes(shards: Path) -> None:
    with ShardReader(shards, index_cache_mb=1e-6) as reader:
        there = copy.deepcopy(reader)  # by its arguments, as it is sent
        assert there.index is not reader.index and there.index.cache_mb == 1e-6
        for row in (0, 9, 5):
            assert there.read(row) == reader.read(row)
            assert len(reader.index._blocks) == 1  # another shard's rows have gone


def test_short_reads_are_read_on(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ShardReader(shards) as reader:
        expected = [reader.read(row) for row in range(10)]
        plain = os.pread
        monkeypatch.setattr(os, "pread", lambda number, n, at: plain(number, min(n, 100), at))
        assert [reader.read(row) for row in range(10)] == expected
        with (shards / "000000.tar").open("rb") as tar:
            end = (shards / "000000.tar").stat().st_size
            assert len(shard_reader.read_record(tar.fileno(), end - 250, 1000)) == 250


def write_pointing(folder: Path, slides: list[Path]) -> Path:
    """Shards of records that point into `slides`, two shards of some tiles of each."""
    rows = [
        {"source_path": str(slide), "source_identity": file_identity(slide), "key": f"{n}_{x}_{y}"}
        | {"source_mpp_x": 0.5, "source_mpp_y": 0.5, "size_px": 64, "requested_mpp": 0.5}
        | {"level0_x": 160.0 + x, "level0_y": 160.0 + y, "width_px": 64, "height_px": 64}
        | {"suffix": "slide", "offset": 0, "size": 0, "checksum": "", "group": "g", "mpp": 0.5}
        for n, slide in enumerate(slides)
        for x, y in ((0, 0), (64, 0), (32, 96), (120, 64))
    ]
    schema = pa.schema([*INDEX, *REFERENCE])
    described, parts = {}, []
    for name, some in (("000000.slides", rows[::2]), ("000001.slides", rows[1::2])):
        described[name] = {"count": len(some), "bytes": 0, "xxh3_128": "0" * 32}
        parts.append(pa.Table.from_pylist([{**row, "shard": name} for row in some], schema))
    folder.mkdir()
    write_index(parts, folder / "index.parquet")
    digests = dict.fromkeys(("index_xxh3_128", "failed_xxh3_128"), "0" * 32)
    mark_done(folder / "shards.json", "", shards=described, failed=0, with_metadata=0, **digests)
    return folder


def test_records_that_point_into_slides_are_read_from_them_in_any_thread(
    tmp_path: Path, write_slide: Callable[..., Path], tissue_pixels: NDArray[np.uint8]
) -> None:
    slides = [
        write_slide(tmp_path / f"{n}.tiff", [np.roll(tissue_pixels, 20 * n, 0)], mpp=(0.5, 0.5))
        for n in range(3)
    ]
    shards = write_pointing(tmp_path / "shards", slides)
    with ShardReader(shards, max_open=2) as reader:
        rows = reader.index.table().to_pylist()
        order = np.random.default_rng(0).permutation(len(rows)).tolist()
        with ReadAhead(reader, 3, 20 * 3 * 64 * 64) as ahead:
            ahead.want(order)
            for row in order:
                payload = ahead.take(row)
                assert isinstance(payload, Payload)
                with Slide(Path(rows[row]["source_path"]), mpp=(0.5, 0.5)) as slide:
                    place = (rows[row]["level0_x"], rows[row]["level0_y"])
                    expected = slide.read_tile(*place, 64, rows[row]["requested_mpp"])
                assert np.array_equal(reader.decode(payload), expected)
                small = reader.decode(payload, 4)
                assert np.abs(small - box_means(expected, 4)).max() <= 0.7
                if row % 3 == 0:
                    assert np.array_equal(reader.image(row), expected)
        with pytest.raises(RecordError, match="it points into a slide and has no bytes"):
            reader.read(0)
        reader.close()
        slide_path = Path(rows[3]["source_path"])
        os.utime(slide_path, ns=(1, 1))
        with pytest.raises(RecordError, match=rf"record '{rows[3]['key']}': .* changed since"):
            reader.image(3)


def test_a_slide_that_is_away_is_waited_for_and_ends_the_run(
    tmp_path: Path,
    write_slide: Callable[..., Path],
    tissue_pixels: NDArray[np.uint8],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slide, away = write_slide(tmp_path / "0.tiff", [tissue_pixels], mpp=(0.5, 0.5)), tmp_path / "x"
    with ShardReader(write_pointing(tmp_path / "shards", [slide])) as reader:
        expected = reader.image(0)
        reader.close()
        slide.rename(away)
        waits: list[float] = []
        monkeypatch.setattr(shard_reader.time, "sleep", waits.append)
        with pytest.raises(EosinError, match=r"0.tiff cannot be read \(3 attempts\): ") as e:
            reader.image(0)
        assert not isinstance(e.value, RecordError) and waits == [0.5, 2.0]
        monkeypatch.setattr(shard_reader.time, "sleep", lambda _: away.rename(slide))
        assert np.array_equal(reader.image(0), expected)
        reader.close()
        slide.unlink()
        slide.mkdir()  # there, but no slide: that is damage
        with pytest.raises(RecordError, match=r"record '0_0_0': .*0.tiff is missing"):
            reader.image(0)
