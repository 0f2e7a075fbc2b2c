"""Tile images from folders and tables, and what is refused among them."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import simplejpeg
from PIL import Image

from eosin.configs.errors import ConfigError, InputError
from eosin.data_curation.codec import (
    EncodedTile,
    ImageError,
    decode_image,
    encode_tile,
    inspect_image,
)
from eosin.data_curation.images import image_records, read_images
from eosin.data_curation.records import MAX_KEY_CHARS, Failure, make_keys


def pixels(seed: int, height: int = 16, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def jpeg(seed: int) -> bytes:
    return bytes(simplejpeg.encode_jpeg(pixels(seed)))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_a_folder_gives_its_images_in_the_order_of_their_keys(tmp_path: Path) -> None:
    write(tmp_path / "b" / "2.JPEG", jpeg(0))
    write(tmp_path / "a" / "1.png", jpeg(1))
    write(tmp_path / "a" / "._1.png", b"left by a Mac")
    write(tmp_path / "notes.txt", b"no image")
    records = image_records(tmp_path)
    assert records.labels["key"].to_pylist() == ["a_1", "b_2"]
    assert records.labels["group"].to_pylist() == ["a_1", "b_2"]
    assert records.labels["mpp"].null_count == 2
    tiles = list(read_images(records.source))
    assert [t.suffix for t in tiles if isinstance(t, EncodedTile)] == ["jpg", "jpg"]
    assert [t.data for t in tiles if isinstance(t, EncodedTile)] == [jpeg(1), jpeg(0)]


def test_a_table_keeps_codes_as_text_and_types_numbers(tmp_path: Path) -> None:
    for name in ("x", "y"):
        write(tmp_path / f"{name}.jpg", jpeg(0))
    (tmp_path / "t.csv").write_text(
        "\ufeffpath,group,mpp,age,patient,note,site\nx.jpg,7,0.5,61,007,a,\ny.jpg,8,,62.5,012,,\n"
    )
    labels = image_records(tmp_path / "t.csv").labels
    rows = labels.to_pylist()
    assert [row["group"] for row in rows] == ["7", "8"]
    assert [row["mpp"] for row in rows] == [0.5, None]
    assert [row["age"] for row in rows] == [61.0, 62.5]
    assert [row["patient"] for row in rows] == ["007", "012"]
    assert [row["note"] for row in rows] == ["a", None]
    assert labels.schema.field("site").type == pa.string()


@pytest.mark.parametrize(
    ("rules", "left"),
    [
        (["split!=test"], ["a", "b"]),
        (["split=train"], ["a"]),
        (["split=train|val", "group!=g2"], ["a"]),
        (["split="], []),
    ],
)
def test_rules_keep_rows(tmp_path: Path, rules: list[str], left: list[str]) -> None:
    (tmp_path / "t.csv").write_text(
        "path,group,split\na.jpg,g1,train\nb.jpg,g2,val\nc.jpg,g3,test\n"
    )
    if left:
        assert image_records(tmp_path / "t.csv", rules).labels["key"].to_pylist() == left
    else:
        with pytest.raises(InputError, match="no tile of 3 satisfies split="):
            image_records(tmp_path / "t.csv", rules)


def test_rules_on_unknown_columns_name_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,split\na.jpg,train\n")
    with pytest.raises(ConfigError, match="'spilt=train' names no column; there are: path, split"):
        image_records(tmp_path / "t.csv", ["spilt=train"])
    with pytest.raises(ConfigError, match="is not column=value"):
        image_records(tmp_path / "t.csv", ["split"])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("file,group\na.jpg,1\n", "has no column 'path'; it has: file, group"),
        ("path,key\na.jpg,1\n", "'key' is reserved"),
        ("path\na.jpg\na.jpg\n", "names 'a.jpg' more than once"),
        ("path,mpp\na.jpg,fine\n", "column 'mpp' is not all numbers"),
        ("path,group\na.jpg,1\n,2\n", "line 3 has no 'path'"),
        ("path,group\na.jpg\n", "is not a CSV table"),
        ("path,site,site\na.jpg,1,2\n", "has the column 'site' more than once"),
        ("", "has no column 'path'"),
        ("path\n", "holds no tiles"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, table: str, message: str
) -> None:
    (tmp_path / "t.csv").write_text(table)
    with pytest.raises(InputError, match=message) as error:
        image_records(tmp_path / "t.csv")
    assert "\n" not in str(error.value)


def test_an_empty_folder_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no tiles"):
        image_records(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        image_records(tmp_path / "nowhere")


def test_keys_are_free_of_dots_short_and_unique() -> None:
    slide = "TCGA-22-1017-01Z-00-DX1.9562FE79-A261-4D2B-B394-F3E0E2FF7FDA"
    names = [f"{slide}/{n}.x" for n in range(3)] + ["a/b_c", "a_b/c", "é", "x" * 200, "x" * 201]
    keys = make_keys(names)
    assert len(set(keys)) == len(names)
    assert all(key.isascii() and "." not in key and "/" not in key for key in keys)
    assert max(map(len, keys)) <= MAX_KEY_CHARS
    assert make_keys(names[:3]) == keys[:3]


def test_damaged_and_foreign_images_are_failures_with_a_reason(tmp_path: Path) -> None:
    whole = jpeg(0)
    rgba = Image.fromarray(np.dstack([pixels(1), np.full((16, 16), 128, np.uint8)]))
    deep = Image.fromarray(np.zeros((4, 4), np.uint16))
    crc = bytearray(png(Image.fromarray(pixels(2))))
    crc[60] ^= 1
    bomb = bytearray(png(Image.fromarray(pixels(2))))
    bomb[16:24] = (1 << 20).to_bytes(4, "big") * 2
    cases = {
        "cut.jpg": (whole[:-40], "damaged JPEG"),
        "text.jpg": (b"not an image", "neither a JPEG nor a PNG"),
        "empty.png": (b"", "an empty file"),
        "half.png": (png(rgba), "transparent"),
        "deep.png": (png(deep), "8 bits"),
        "crc.png": (bytes(crc), "damaged PNG"),
        "bomb.png": (bytes(bomb), "1048576×1048576 pixels"),
    }
    for name, (data, _) in cases.items():
        write(tmp_path / name, data)
    write(tmp_path / "good.jpg", whole)
    records = image_records(tmp_path)
    results = dict(
        zip(records.labels["path"].to_pylist(), read_images(records.source), strict=True)
    )
    assert isinstance(results.pop("good.jpg"), EncodedTile)
    for name, result in results.items():
        assert isinstance(result, Failure) and cases[name][1] in result.reason, name


def test_a_missing_image_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path\nnowhere.jpg\n")
    (failure,) = read_images(image_records(tmp_path / "t.csv").source)
    assert failure == Failure(status="unreadable", reason="no such file or directory")  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_png_of_every_mode_decodes_as_pillow_does(mode: str) -> None:
    image = Image.fromarray(pixels(3)).convert(mode)
    tile = inspect_image(png(image))
    assert (tile.width_px, tile.height_px, tile.suffix) == (16, 16, "png")
    assert np.array_equal(decode_image(tile.data, "png"), np.asarray(image.convert("RGB")))


def test_grey_jpeg_decodes_to_three_equal_channels() -> None:
    data = simplejpeg.encode_jpeg(pixels(4)[..., :1].copy(), colorspace="GRAY")
    decoded = decode_image(inspect_image(data).data, "jpg")
    assert decoded.shape == (16, 16, 3)
    assert np.array_equal(decoded[..., 0], decoded[..., 2])


def test_metadata_is_noticed() -> None:
    buffer, plain = io.BytesIO(), Image.fromarray(pixels(5))
    plain.save(buffer, "JPEG", comment=b"Mrs Miller")
    assert inspect_image(buffer.getvalue()).has_metadata
    assert not inspect_image(jpeg(5)).has_metadata


def test_encoded_tiles_keep_full_chroma() -> None:
    tile = encode_tile(pixels(6, 24, 40), quality=90)
    assert (tile.width_px, tile.height_px) == (40, 24)
    assert simplejpeg.decode_jpeg_header(tile.data)[3] == "444"


def test_a_cmyk_jpeg_is_refused() -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels(7)).convert("CMYK").save(buffer, "JPEG")
    with pytest.raises(ImageError, match="printer's colours"):
        inspect_image(buffer.getvalue())
