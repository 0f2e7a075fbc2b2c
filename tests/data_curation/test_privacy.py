"""Names: what a scanner or a table wrote of a person is in nothing that leaves the house."""

import csv
import hashlib
import hmac
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import openslide
import pyarrow.parquet as pq
import pytest
import simplejpeg
import tifffile
from PIL import Image, PngImagePlugin

from eosin.configs.errors import InputError
from eosin.configs.load import load_config
from eosin.data_curation.deny_list import LeakError
from eosin.data_curation.image_metadata import without_metadata
from eosin.data_curation.pseudonyms import Pseudonyms
from eosin.data_curation.shards import ShardConfig, shard
from eosin.data_curation.slide import Slide
from eosin.data_curation.synthetic import SyntheticConfig, write_slide
from eosin.launch.cli import main

NAME = "DOE-JANE-1950"
KEY = "0123456789abcdef" * 4


def smooth(side_px: int, seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    rough = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)
    return np.asarray(Image.fromarray(rough).resize((side_px, side_px), Image.Resampling.BICUBIC))


def talkative_jpeg(
    pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], **options: object
) -> bytes:
    exif = Image.Exif()
    exif[0x010E] = NAME  # ImageDescription
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(
        buffer, "JPEG", exif=exif, comment=NAME.encode(), icc_profile=NAME.encode() * 9, **options
    )
    return buffer.getvalue() + NAME.encode()


def talkative_png(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("Patient", NAME)
    info.add_itxt("Patient", NAME, zip=False)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=info, icc_profile=NAME.encode() * 9)
    return buffer.getvalue()


def files_that_name(folder: Path, words: list[str]) -> set[str]:
    """Files below `folder` with any of the words in their bytes, their tables or their names."""
    found = set()
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        text = path.read_bytes() + str(path.relative_to(folder)).encode()
        if path.suffix == ".parquet":
            text += str(pq.read_table(path).to_pylist()).encode()
        if any(word.encode() in text for word in words):
            found.add(str(path.relative_to(folder)))
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"quality": 30, "optimize": True}, {"restart_marker_blocks": 2}],
)
def test_jpegs_lose_what_they_tell_and_no_pixel(options: dict[str, object]) -> None:
    data = talkative_jpeg(smooth(96, 0), **options)
    plain = without_metadata(data, "jpg")
    assert NAME.encode() in data and NAME.encode() not in plain
    assert np.array_equal(simplejpeg.decode_jpeg(plain, strict=True), simplejpeg.decode_jpeg(data))
    assert without_metadata(plain, "jpg") == plain
    with Image.open(io.BytesIO(plain)) as image:
        assert not image.getexif() and not {"comment", "icc_profile", "exif"} & image.info.keys()


def test_files_that_tell_nothing_keep_their_bytes() -> None:
    pixels = smooth(64, 1)
    for subsampling in ("444", "420", "gray"):
        colours = "RGB" if subsampling != "gray" else "GRAY"
        source = pixels if colours == "RGB" else np.ascontiguousarray(pixels[..., :1])
        data = simplejpeg.encode_jpeg(source, 85, colours, subsampling)
        assert without_metadata(data, "jpg") == data
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    assert without_metadata(buffer.getvalue(), "png") == buffer.getvalue()
    adobe = simplejpeg.encode_jpeg(pixels, 85, "RGB", "444")
    app14 = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x01"
    with_adobe = adobe[:2] + app14 + adobe[20:]  # in the place of JFIF: it says YCbCr
    assert without_metadata(with_adobe, "jpg") == with_adobe


def test_pngs_lose_what_they_tell_and_no_pixel() -> None:
    data = talkative_png(smooth(64, 2))
    hidden = struct.pack(">I", len(NAME)) + b"prVt" + NAME.encode()
    hidden += struct.pack(">I", zlib.crc32(b"prVt" + NAME.encode()))
    data = data[:33] + hidden + data[33:] + NAME.encode()  # a private chunk; after the end
    plain = without_metadata(data, "png")
    assert NAME.encode() not in plain
    before, after = (np.asarray(Image.open(io.BytesIO(file))) for file in (data, plain))
    assert np.array_equal(before, after)


def test_images_go_into_shards_without_names(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(6):
        pixels = smooth(48, number)
        data = talkative_jpeg(pixels) if number % 2 else talkative_png(pixels)
        suffix = "jpg" if number % 2 else "png"
        (tmp_path / "images" / f"{NAME}_{number}.{suffix}").write_bytes(data)
    with (tmp_path / "images.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "group", "organ"])
        writer.writerows([[p, NAME, "lung"] for p in sorted((tmp_path / "images").iterdir())])
        writer.writerow([tmp_path / "images" / f"{NAME}_gone.jpg", NAME, "lung"])
    (tmp_path / "key").write_text(KEY)
    out = tmp_path / "shards"
    words = [f"images={tmp_path / 'images.csv'}", f"out={out}", "workers=1", "max_failed=0.5"]
    shard(load_config(ShardConfig, [], [*words, f"pseudonyms={tmp_path / 'key'}"]))
    assert files_that_name(out, [NAME]) == set()
    index = pq.read_table(out / "index.parquet")
    expected = hmac.new(KEY.encode(), NAME.encode(), hashlib.sha256).hexdigest()[:24]
    assert set(index["group"].to_pylist()) == {f"anon-{expected}"}
    assert "path" not in index.column_names and index["organ"].to_pylist() == ["lung"] * 6
    shard(load_config(ShardConfig, [], [*words, "keep_metadata=true"]))
    named = files_that_name(out, [NAME])
    assert {"000000.tar", "index.parquet"} <= named  # asked for, and so they are there
    (tmp_path / "deny.yaml").write_text(f"groups: [{NAME}]\npseudonyms: key\n")
    denied = [*words, f"pseudonyms={tmp_path / 'key'}", f"deny={tmp_path / 'deny.yaml'}"]
    with pytest.raises(LeakError, match="7 tiles are denied"):
        shard(load_config(ShardConfig, [], denied))
    (tmp_path / "deny.yaml").write_text(f"groups: [{NAME}]\n")
    with pytest.raises(InputError, match="the tables hold pseudonyms"):
        shard(load_config(ShardConfig, [], denied))


def test_a_curated_set_names_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A slide whose file, description and table name a person; the tables' links stay at home."""
    config = SyntheticConfig(n_slides=1, size_px=1024, artefact_share=0)
    plain = write_slide(tmp_path / "plain", 0, config)
    (tmp_path / "slides").mkdir()
    path = tmp_path / "slides" / f"{NAME}.tiff"
    with Slide(plain) as slide:
        levels = [slide.read_tile(0, 0, 1024 // factor, 0.5 * factor) for factor in (1, 4)]
    with tifffile.TiffWriter(path) as writer:
        for number, pixels in enumerate(levels):
            writer.write(
                pixels,
                photometric="rgb",
                tile=(256, 256),
                subfiletype=int(number > 0),
                description=f"Patient {NAME}",
                software=NAME,
                metadata=None,
                resolution=(20000, 20000),
                resolutionunit="CENTIMETER",
            )
    assert NAME in str(dict(openslide.OpenSlide(path).properties))
    (tmp_path / "slides.csv").write_text(f"path,group\n{path},{NAME}\n")
    (tmp_path / "key").write_text(KEY)
    out = tmp_path / "set"
    words = [f"slides={tmp_path / 'slides.csv'}", f"out={out}", "tile.mpp=0.5", "tile.size_px=128"]
    words += [f"tile.pseudonyms={tmp_path / 'key'}", "tile.workers=1", "shard.workers=1"]
    words += ["embed.encoder=builtin:stain-texture", "without_duplicates=true"]
    assert main(["curate", *words]) == 0
    said = capsys.readouterr()
    assert NAME not in said.out + said.err
    assert files_that_name(out, [NAME]) == {"slides.parquet"}  # the link to the files
    index = pq.read_table(out / "shards" / "index.parquet")
    assert {name[:5] for name in index["slide_id"].to_pylist()} == {"anon-"}
    assert index["group"].to_pylist() == [Pseudonyms(tmp_path / "key").of(NAME)] * len(index)


def test_label_and_macro_images_are_never_read(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = real_data / "slides" / "CMU-1-Small-Region.svs"
    assert {"label", "macro"} <= set(openslide.OpenSlide(path).associated_images)

    def refuse(self: openslide.OpenSlide) -> None:
        raise AssertionError("an associated image was asked for")

    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(refuse))
    with Slide(path) as slide:
        slide.overview(8.0)
        slide.read_tile(0, 0, 256, 0.499)
    package = Path(__file__).parents[2]
    code = [
        p
        for part in ("data_curation", "pretrain", "eval", "launch")
        for p in (package / part).glob("*.py")
    ]
    assert len(code) > 100
    assert not [p for p in code if "associated_images" in p.read_text()]


def test_keys_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="openssl rand"):
        Pseudonyms(tmp_path / "none")
    (tmp_path / "short").write_text("secret\n")
    with pytest.raises(InputError, match="6 bytes"):
        Pseudonyms(tmp_path / "short")
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(os.urandom(32).replace(b" ", b"x"))
    other.write_text(KEY)
    names = [f"P{number}" for number in range(200)]
    assert len({Pseudonyms(one).of(name) for name in names}) == 200
    assert Pseudonyms(one).of("P1") != Pseudonyms(other).of("P1")
    assert Pseudonyms(other).of(Pseudonyms(other).of("P1")) == Pseudonyms(other).of("P1")
