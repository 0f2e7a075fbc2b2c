"""The slide encoder folder: three lines, its golden bag, what it refuses; the verb over it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from slide_bags import write_slides

from eosin.configs.errors import InputError
from eosin.configs.load import load_config
from eosin.data_curation.bag_store import BagStore
from eosin.data_curation.features import open_features
from eosin.launch.cli import main
from eosin.pretrain.slide.config import SlideConfig
from eosin.pretrain.slide.extract import ExtractSlidesConfig, extract_slides
from eosin.pretrain.slide.opening import digest_of_group, open_slide_encoder
from eosin.pretrain.slide.train import pretrain_slides


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stores, and an encoder of both with latents, turned by places."""
    folder = tmp_path_factory.mktemp("slides")
    kinds, groups = ["halves", "patches"] * 3, ["p0", "p0", "p1", "p2", "p2", "p3"]
    write_slides(folder / "a", kinds, groups=groups, side=8)
    write_slides(folder / "b", kinds, groups=groups, side=8, encoder="other", dim=8)
    config = load_config(
        SlideConfig,
        overrides=[
            f"out={folder}/run", f"bags.stores=[{folder}/a, {folder}/b]", "steps=2", "device=cpu",
            "batch_size=4", "threads=1", "objective.regress={}", "views.global_tiles=5",
            "model={width: 16, depth: 1, heads: 2, registers: 1, pool: latents, latents: 3, "
            "position: rope, case: transformer, case_depth: 1}",
        ],
    )  # fmt: skip
    pretrain_slides(config)
    return folder


def test_three_lines_give_vector_tokens_and_latents(folder: Path) -> None:
    encoder = open_slide_encoder(folder / "run/encoder")
    stores = [BagStore(folder / "a"), BagStore(folder / "b")]
    said = encoder.encode_slide(stores, "s001")
    sizes = [len(store.read("s001")) for store in stores]
    assert said.vector.shape == (16,) and said.latents is not None and said.latents.shape == (3, 16)
    assert said.tokens.shape == (sum(sizes), 16)
    np.testing.assert_allclose(said.vector, said.latents.mean(axis=0), atol=1e-5)
    swapped = encoder.encode_slide(stores[::-1], "s001")  # each store is known by what it holds
    np.testing.assert_allclose(swapped.vector, said.vector, atol=1e-5)
    np.testing.assert_allclose(swapped.tokens[: sizes[1]], said.tokens[sizes[0] :], atol=1e-5)
    tokens = stores[0].read("s001")
    one = encoder.encode_slide(stores[:1], "s001")
    arrays = encoder.encode([tokens.features], [tokens.centre_um + 1e5], [tokens.section])
    np.testing.assert_allclose(
        arrays.vector, one.vector, atol=1e-4
    )  # wherever it lies on the glass
    assert np.abs(one.vector - said.vector).max() > 1e-4


def test_the_golden_bag_gives_its_vector(folder: Path) -> None:
    encoder = open_slide_encoder(folder / "run/encoder")
    golden = load_file(folder / "run/encoder/golden/bag.safetensors")
    said = encoder.encode([golden["features"].numpy()], [golden["centre_um"].numpy()])
    torch.testing.assert_close(
        torch.from_numpy(said.vector), golden["vector"], atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        torch.from_numpy(said.tokens), golden["tokens"], atol=1e-5, rtol=1e-5
    )


def test_the_folder_says_what_it_learnt_from(folder: Path) -> None:
    config = json.loads((folder / "run/encoder/config.json").read_text())
    assert [s["encoder_digest"] for s in config["sources"]] == [
        "digest of made-up", "digest of other"
    ]  # fmt: skip
    digests = sorted(digest_of_group(f"p{at}") for at in range(4))
    assert config["training"]["group_digests"] == digests
    assert '"p1"' not in (folder / "run/encoder/config.json").read_text()
    assert "eosin extract slides" in (folder / "run/encoder/README.md").read_text()


def test_others_bags_and_damage_are_refused(folder: Path, tmp_path: Path) -> None:
    encoder = open_slide_encoder(folder / "run/encoder")
    foreign = write_slides(tmp_path / "x", ["halves"], side=8, encoder="foreign")
    with pytest.raises(InputError, match=r"features of 'foreign' .*another tile encoder"):
        encoder.encode_slide([foreign], "s000")
    coarse = write_slides(tmp_path / "y", ["halves"], side=8, scale=2)
    with pytest.raises(InputError, match="of tiles of 224 µm: another tile encoder"):
        encoder.encode_slide([coarse], "s000")
    with pytest.raises(InputError, match=r"wants \[N, 16\] and \[N, 2\]"):
        encoder.encode([np.zeros((3, 5))], [np.zeros((3, 2))])
    with pytest.raises(InputError, match="not finite"):
        encoder.encode([np.full((3, 16), np.nan)], [np.zeros((3, 2))])
    with pytest.raises(InputError, match="no tile is given"):
        encoder.encode([np.zeros((0, 16))], [np.zeros((0, 2))])
    shutil.copytree(folder / "run/encoder", tmp_path / "damaged")
    with (tmp_path / "damaged/slide_encoder.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\x00\x01\x02\x03")
    with pytest.raises(InputError, match="is damaged"):
        open_slide_encoder(tmp_path / "damaged")
    with pytest.raises(InputError, match="is no slide encoder folder"):
        open_slide_encoder(tmp_path)


def test_vectors_tokens_and_latents_of_all_slides(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "vectors"
    command = [
        "extract", "slides", f"encoder={folder}/run/encoder", f"bags=[{folder}/a, {folder}/b]",
        f"out={out}", "tokens=true", "latents=true", "device=cpu",
    ]  # fmt: skip
    assert main(command) == 0
    encoder, stores = (
        open_slide_encoder(folder / "run/encoder"),
        [BagStore(folder / x) for x in "ab"],
    )
    vectors, latents, tokens = (
        open_features(out),
        open_features(out / "latents"),
        BagStore(out / "tokens"),
    )
    assert vectors.rows["slide_id"].to_pylist() == [f"s{at:03d}" for at in range(6)]
    assert vectors.rows["group"].to_pylist() == ["p0", "p0", "p1", "p2", "p2", "p3"]
    for at in range(6):
        said = encoder.encode_slide(stores, f"s{at:03d}")
        np.testing.assert_allclose(vectors.features[at], said.vector, rtol=1e-2, atol=1e-3)
        np.testing.assert_allclose(
            latents.features[3 * at : 3 * at + 3], said.latents, rtol=1e-2, atol=1e-3
        )
        own = tokens.read(f"s{at:03d}")
        assert own.tile_ids == stores[0].read(f"s{at:03d}").tile_ids  # row by row of the first
        np.testing.assert_allclose(own.features, said.tokens[: len(own)], rtol=1e-2, atol=1e-3)
    before = (out / "features.npy").stat().st_mtime_ns
    assert main(command) == 0
    assert (out / "features.npy").stat().st_mtime_ns == before


def test_cases_have_one_vector(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extract_slides(
        ExtractSlidesConfig(
            encoder=folder / "run/encoder", bags=[folder / "a"], out=tmp_path, unit="group"
        )
    )
    store, encoder = open_features(tmp_path), open_slide_encoder(folder / "run/encoder")
    assert "note: 4 of 4 groups are among those" in capsys.readouterr().out
    assert store.rows["slide_id"].to_pylist() == ["p0", "p1", "p2", "p3"]
    own = [encoder.encode_slide([BagStore(folder / "a")], s).vector for s in ("s000", "s001")]
    np.testing.assert_allclose(store.features[0], encoder.encode_case(own), rtol=1e-2, atol=1e-3)


def test_the_evaluation_takes_the_vectors(folder: Path, tmp_path: Path) -> None:
    write_slides(tmp_path / "bags", ["halves", "patches"] * 12, side=8)
    write_slides(tmp_path / "other", ["halves", "patches"] * 12, side=8, encoder="other", dim=8)
    assert main([
        "extract", "slides", f"encoder={folder}/run/encoder", f"out={tmp_path}/vectors",
        f"bags=[{tmp_path}/bags, {tmp_path}/other]", "device=cpu",
    ]) == 0  # fmt: skip
    lines = [f"s{at:03d},{kind}" for at, kind in enumerate(["halves", "patches"] * 12)]
    (tmp_path / "labels.csv").write_text("slide,label\n" + "\n".join(lines) + "\n")
    assert main([
        "eval", "bags", f"features=[{tmp_path}/vectors, {tmp_path}/bags]", "device=cpu",
        f"labels={tmp_path}/labels.csv", f"out={tmp_path}/eval", "folds=2", "inner_folds=2",
        "heads=[]", "pooled=[prototypes/*]", "n_bootstrap=50", "attention_slides=0",
    ]) == 0  # fmt: skip
    results = json.loads((tmp_path / "eval/results.json").read_text())
    assert len(results["encoders"]) == 2
