"""The feature store: resumed, keyed, checked."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from PIL import Image

from eosin.configs.errors import InputError
from eosin.data_curation.embed import FileTile, embed_images, read_image
from eosin.data_curation.encoder import load_encoder
from eosin.data_curation.features import features_stamp, open_features, write_features
from eosin.data_curation.manifest import FEATURE_ROWS

N, DIM = 10, 3
VALUES = np.random.default_rng(0).normal(size=(N, DIM)).astype(np.float32)
STAMP = features_stamp("encoder", "data")


def rows(n: int = N) -> pa.Table:
    columns = {field.name: pa.nulls(n, field.type) for field in FEATURE_ROWS}
    ids = pa.array([f"tile{i}" for i in range(n)])
    return pa.table({**columns, "tile_id": ids, "group": ids}, schema=FEATURE_ROWS)


def fill(
    folder: Path,
    compute: Callable[[int, int], npt.NDArray[np.float32]] = lambda a, b: VALUES[a:b],
    stamp: str = STAMP,
) -> npt.NDArray[np.float16]:
    return write_features(
        folder, rows=rows(), dim=DIM, stamp=stamp, compute=compute, chunk_rows=4, meta={}
    ).features


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_store_holds_the_features_in_half_precision_and_numpy_maps_it(tmp_path: Path) -> None:
    fill(tmp_path)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    assert isinstance(mapped, np.memmap) and mapped.dtype == np.float16
    np.testing.assert_array_equal(mapped, VALUES.astype(np.float16))
    assert open_features(tmp_path).rows["tile_id"].to_pylist() == [f"tile{i}" for i in range(N)]
    assert set(content(tmp_path)) == {"features.npy", "rows.parquet", "meta.json"}


def test_after_an_error_only_the_missing_chunks_are_computed(tmp_path: Path) -> None:
    fill(tmp_path / "whole")

    def broken(start: int, stop: int) -> npt.NDArray[np.float32]:
        if start == 8:
            raise InputError("unreadable")
        return VALUES[start:stop]

    with pytest.raises(InputError):
        fill(tmp_path / "resumed", broken)
    with pytest.raises(InputError, match="no finished features"):
        open_features(tmp_path / "resumed")
    asked: list[tuple[int, int]] = []

    def count(start: int, stop: int) -> npt.NDArray[np.float32]:
        asked.append((start, stop))
        return VALUES[start:stop]

    fill(tmp_path / "resumed", count)
    assert asked == [(8, 10)]
    assert content(tmp_path / "resumed") == content(tmp_path / "whole")
    fill(tmp_path / "resumed", count)
    assert asked == [(8, 10)]


@pytest.mark.parametrize("left", ["renamed", "unnamed progress", "cut short"])
def test_every_state_that_a_kill_can_leave_is_mended(tmp_path: Path, left: str) -> None:
    fill(tmp_path / "whole")
    fill(tmp_path / "killed")
    (tmp_path / "killed" / "meta.json").unlink()
    progress = tmp_path / "killed" / ".progress.json"
    if left != "unnamed progress":
        progress.write_text(f'{{"stamp": "{STAMP}", "rows": {N}}}')
    if left == "cut short":
        features = tmp_path / "killed" / "features.npy"
        partial = tmp_path / "killed" / ".features.npy.partial"
        partial.write_bytes(features.read_bytes()[:-2])
        features.unlink()
    fill(tmp_path / "killed")
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_features_of_another_encoder_are_replaced(tmp_path: Path) -> None:
    fill(tmp_path)
    other = fill(tmp_path, lambda a, b: -VALUES[a:b], features_stamp("other encoder", "data"))
    np.testing.assert_array_equal(other, -VALUES.astype(np.float16))


def test_progress_of_another_encoder_counts_no_row_of_this_one(tmp_path: Path) -> None:
    fill(tmp_path / "whole")
    folder = tmp_path / "killed"

    def broken(start: int, stop: int) -> npt.NDArray[np.float32]:
        if start == 4:
            raise InputError("killed")
        return VALUES[start:stop]

    def other(start: int, stop: int) -> npt.NDArray[np.float32]:
        raise InputError("killed")

    with pytest.raises(InputError, match="killed"):
        fill(folder, broken)
    with pytest.raises(InputError, match="killed"):
        fill(folder, other, features_stamp("other encoder", "data"))
    partial = folder / ".features.npy.partial"  # the chunk is there, its progress was not written
    partial.write_bytes(partial.read_bytes() + bytes(4 * 2 * DIM))
    fill(folder)
    assert content(folder) == content(tmp_path / "whole")


@pytest.mark.parametrize("value", [1e6, np.nan, np.inf])
def test_what_does_not_fit_half_precision_is_an_error_that_names_the_row(
    tmp_path: Path, value: float
) -> None:
    values = VALUES.copy()
    values[5, 1] = value
    with pytest.raises(InputError, match="row 5 do not fit float16"):
        fill(tmp_path, lambda a, b: values[a:b])


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    fill(tmp_path)
    np.save(tmp_path / "features.npy", np.zeros((N + 1, DIM), np.float16))
    with pytest.raises(InputError, match="do not belong together"):
        open_features(tmp_path)
    (tmp_path / "features.npy").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read"):
        open_features(tmp_path)


def save_tiles(folder: Path, n: int = N) -> list[Path]:
    folder.mkdir()
    generator = np.random.default_rng(1)
    paths = [folder / f"{i}.png" for i in range(n)]
    for path in paths:
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return paths


def test_embedding_files_equals_embedding_their_pixels(
    tmp_path: Path, write_encoder_folder: Callable[..., Path]
) -> None:
    paths = save_tiles(tmp_path / "tiles")
    folder = write_encoder_folder(tmp_path / "tiny")
    encoder = load_encoder(str(folder), torch.device("cpu"))
    store = embed_images(
        encoder, [FileTile(p) for p in paths], rows(), "data", tmp_path / "out", batch_size=4
    )
    expected = encoder.embed([np.asarray(Image.open(path)) for path in paths])
    np.testing.assert_allclose(store.features, expected, rtol=1e-3, atol=1e-3)
    assert store.meta["encoder_digest"] == encoder.digest
    for path in paths:  # a second call takes what is there
        path.unlink()
    again = embed_images(
        encoder, [FileTile(p) for p in paths], rows(), "data", tmp_path / "out", batch_size=4
    )
    np.testing.assert_array_equal(again.features, store.features)


KILLED = """
import os, signal, sys
from pathlib import Path
import pyarrow.parquet as pq
import torch
from eosin.data_curation import embed
from eosin.data_curation.encoder import load_encoder

encoder = load_encoder("builtin:colour-histogram", torch.device("cpu"))
forward, batches = encoder.forward, []

def forward_until_killed(prepared):
    batches.append(prepared)
    if len(batches) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(prepared)

encoder.forward = forward_until_killed
root = Path(sys.argv[1])
paths = [root / "tiles" / f"{i}.png" for i in range(40)]
rows = pq.read_table(root / "rows.parquet")
images = [embed.FileTile(p) for p in paths]
embed.embed_images(encoder, images, rows, "data", root / "killed", batch_size=2)
"""


def test_embedding_killed_in_a_later_chunk_and_rerun_gives_the_same_bytes(tmp_path: Path) -> None:
    paths = save_tiles(tmp_path / "tiles", 40)
    pa.parquet.write_table(rows(40), tmp_path / "rows.parquet")
    arguments = [sys.executable, "-c", KILLED, str(tmp_path), "18"]
    killed = subprocess.run(arguments, env=os.environ, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    encoder = load_encoder("builtin:colour-histogram", torch.device("cpu"))
    for name in ("killed", "whole"):
        embed_images(
            encoder, [FileTile(p) for p in paths], rows(40), "data", tmp_path / name, batch_size=2
        )
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_images_of_every_kind_are_read_and_damaged_ones_named(tmp_path: Path) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    for suffix in ("png", "tif", "bmp"):
        Image.fromarray(pixels).save(tmp_path / f"tile.{suffix}")
        np.testing.assert_array_equal(read_image(tmp_path / f"tile.{suffix}"), pixels)
    Image.fromarray(pixels).save(tmp_path / "tile.jpg")
    np.testing.assert_array_equal(
        read_image(tmp_path / "tile.jpg"), np.asarray(Image.open(tmp_path / "tile.jpg"))
    )
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").shape == (9, 8, 3)
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "cut.tif").write_bytes((tmp_path / "tile.tif").read_bytes()[:-20])
    (tmp_path / "cut.png").write_bytes((tmp_path / "tile.png").read_bytes()[:-40])
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.tif", compression="tiff_ccitt")
    for name in ("text.png", "cut.tif", "cut.png", "bomb.tif"):
        with pytest.raises(InputError, match=name):
            read_image(tmp_path / name)
