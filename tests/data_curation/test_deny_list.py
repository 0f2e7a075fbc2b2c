"""What is denied is not drawn; and a set that holds it does not build, whoever made it."""

import csv
import shutil
from pathlib import Path

import numpy as np
import openslide
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curated_tables import write_tables
from PIL import Image

from eosin.configs.errors import ConfigError, InputError
from eosin.configs.load import load_config
from eosin.data_curation.deny_list import LEAKS_NAME, LeakError, read_deny
from eosin.data_curation.manifest import (
    DUPLICATES,
    LEAKS,
    SELECTION,
    SLIDES,
    TILES,
    read_table,
    write_table,
)
from eosin.data_curation.patient_split import SplitOptions, in_part
from eosin.data_curation.sample import SampleConfig, sample
from eosin.data_curation.shards import ShardConfig, shard
from eosin.data_curation.slide import Slide
from eosin.data_curation.synthetic import SyntheticConfig, write_slide
from eosin.data_curation.tiles import TileConfig, tile
from eosin.launch.cli import main


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three synthetic slides of two patients, tiled, with prints; and three evaluation images."""
    folder = tmp_path_factory.mktemp("set")
    config = SyntheticConfig(n_slides=3, size_px=1024, artefact_share=0)
    paths = [write_slide(folder / "slides", index, config) for index in range(3)]
    with (folder / "slides.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "group"])
        writer.writerows([(path, f"patient-{min(i, 1)}") for i, path in enumerate(paths)])
    words = [f"slides={folder / 'slides.csv'}", f"out={folder}", "mpp=0.5", "size_px=128"]
    tile(load_config(TileConfig, [], [*words, "workers=1"]))
    print_of = ["encoder=builtin:tile-print"]
    assert main(["embed", f"tiles={folder}", f"out={folder / 'prints'}", *print_of]) == 0
    (folder / "evaluation").mkdir()
    with Slide(paths[0]) as slide:
        tiles = read_table(folder / "tiles.parquet", TILES).to_pylist()
        known = next(t for t in tiles if t["tissue_fraction"] == 1)
        leaked = slide.read_tile(known["level0_x"] + 11, known["level0_y"] + 7, 128, 0.5)
    Image.fromarray(leaked).save(folder / "evaluation" / "leaked.jpg", quality=80)
    for number in range(2):
        noise = np.random.default_rng(number).integers(0, 255, (128, 128, 3), np.uint8)
        Image.fromarray(noise).save(folder / "evaluation" / f"clean_{number}.png")
    words = [f"images={folder / 'evaluation'}", f"out={folder / 'evaluation_prints'}"]
    assert main(["embed", *words, *print_of]) == 0
    (folder / "known.txt").write_text(known["tile_id"])
    return folder


def build(curated: Path, out: Path, deny: str, *, drawn: bool) -> pa.Table:
    """Denies by `deny`, draws with or without it, and shards with it; the index of the shards."""
    (curated / "deny.yaml").write_text(deny)
    given = [f"deny={curated / 'deny.yaml'}", f"prints={curated / 'prints'}"]
    selection = out / "selection.parquet"
    words = [f"tiles={curated}", f"out={selection}", *(given if drawn else [])]
    sample(load_config(SampleConfig, [], words))
    words = [f"tiles={curated}", f"selection={selection}", f"out={out / 'shards'}", *given]
    shard(load_config(ShardConfig, [], [*words, "workers=1"]))
    return pq.read_table(out / "shards" / "index.parquet")


def test_each_kind_of_denial_and_the_gate_behind_it(curated: Path, tmp_path: Path) -> None:
    first = curated / "slides" / "synthetic_0000.tiff"
    quickhash = openslide.OpenSlide(first).properties["openslide.quickhash-1"]
    of_slide = {"synthetic_0000"}
    cases = {
        "groups: [patient-0, nobody]": ("patient patient-0", of_slide),
        "slides: [synthetic_0000]": ("slide synthetic_0000", of_slide),
        f"quickhashes: ['{quickhash}']": (f"slide hash {quickhash}", of_slide),
        "prints: [evaluation_prints]": ("image leaked", None),
    }
    known = (curated / "known.txt").read_text()
    for number, (deny, (named, slides)) in enumerate(cases.items()):
        out = tmp_path / str(number)
        with pytest.raises(LeakError, match=named) as caught:
            build(curated, out, deny, drawn=False)
        assert "Nothing was built" in str(caught.value)
        assert not list((out / "shards").glob("*.tar"))
        leaks = read_table(out / "shards" / LEAKS_NAME, LEAKS)
        drawn = read_table(out / "selection.parquet", SELECTION)
        index = build(curated, out, deny, drawn=True)
        assert index.num_rows == drawn.num_rows - leaks.num_rows > 0
        assert not (out / "shards" / LEAKS_NAME).exists()
        if slides is None:
            assert known in leaks["tile_id"].to_pylist()
            assert known not in index["key"].to_pylist()
            # The neighbours of an evaluation image that lie up to an eighth apart, and no others.
            assert leaks.num_rows <= 4 and min(leaks["similarity"].to_pylist()) >= 0.45
        else:
            assert set(index["slide_id"].to_pylist()) == {"synthetic_0001", "synthetic_0002"}
            assert leaks["similarity"].null_count == leaks.num_rows


def test_finished_shards_that_turn_out_to_leak_are_no_longer_finished(
    curated: Path, tmp_path: Path
) -> None:
    build(curated, tmp_path, "groups: [nobody]", drawn=False)
    assert (tmp_path / "shards" / "shards.json").is_file()
    with pytest.raises(LeakError):
        build(curated, tmp_path, "groups: [patient-1]", drawn=False)
    assert not (tmp_path / "shards" / "shards.json").exists()


def test_curate_draws_without_and_checks(curated: Path, tmp_path: Path) -> None:
    deny = curated / "whole.yaml"
    deny.write_text("prints: [evaluation_prints]\nslides: [synthetic_0002]\n")
    words = [f"slides={curated / 'slides.csv'}", f"out={tmp_path}", f"deny={deny}"]
    words += ["tile.mpp=0.5", "tile.size_px=128", "tile.workers=1", "shard.workers=1"]
    assert main(["curate", *words]) == 0
    index = pq.read_table(tmp_path / "shards" / "index.parquet")
    assert set(index["slide_id"].to_pylist()) == {"synthetic_0000", "synthetic_0001"}
    assert (curated / "known.txt").read_text() not in index["key"].to_pylist()


def test_what_cannot_be_checked_does_not_build(curated: Path, tmp_path: Path) -> None:
    deny = tmp_path / "deny.yaml"
    shards = [f"tiles={curated}", f"out={tmp_path / 'shards'}", f"deny={deny}", "workers=1"]
    deny.write_text(f"prints: [{curated / 'evaluation_prints'}]\n")
    with pytest.raises(InputError, match="give the prints of the tiles too"):
        shard(load_config(ShardConfig, [], shards))
    other = [*shards, f"prints={curated / 'evaluation_prints'}"]  # of other tiles
    with pytest.raises(InputError, match="has no print of 'synthetic_0000"):
        shard(load_config(ShardConfig, [], other))
    for text, said in (
        ("groups: [007]\n", "reads 7 as no text"),
        ("groups: [2024-01-01]\n", "as no text"),
        ("{}\n", "names nothing"),
        ("patients: [a]\n", "patients"),
    ):
        deny.write_text(text)
        with pytest.raises((InputError, ConfigError), match=said):
            read_deny(deny)
    slides = read_table(curated / "slides.parquet", SLIDES)
    assert slides["quickhash"].null_count == 0
    shutil.copy(curated / "tiles.parquet", tmp_path / "tiles.parquet")
    place = slides.column_names.index("quickhash")
    without = slides.set_column(place, "quickhash", pa.nulls(len(slides), pa.string()))
    write_table(without, tmp_path / "slides.parquet", SLIDES)
    deny.write_text("quickhashes: [abc]\n")
    shards = [f"tiles={tmp_path}", f"out={tmp_path / 'shards'}", f"deny={deny}", "workers=1"]
    with pytest.raises(InputError, match="OpenSlide has none of"):
        shard(load_config(ShardConfig, [], shards))


def test_patients_are_held_out_whole_and_with_who_shares_their_tiles(tmp_path: Path) -> None:
    names = [f"p{number:03d}" for number in range(400)]
    options = {
        part: SplitOptions(part=part, held_out=0.2, seed=1) for part in ("train", "held_out")
    }
    train, held = (in_part(names, options[part], None) for part in ("train", "held_out"))
    assert np.array_equal(train, ~held) and 50 < held.sum() < 110
    more = in_part([*names, "p999"], options["held_out"], None)
    assert np.array_equal(more[:-1], held)  # another patient moves nobody
    ids = write_tables(tmp_path, {f"{name}-a": 2 for name in names})
    one, other = (int(np.flatnonzero(side)[0]) for side in (train, held))
    shared = pa.table(
        {
            "tile_id": [ids[2 * one]],
            "kept_tile_id": [ids[2 * other]],
            "kind": ["near"],
            "similarity": pa.array([0.9], pa.float32()),
            "group": [names[one]],
            "kept_group": [names[other]],
        }
    )
    write_table(shared, tmp_path / "duplicates.parquet", DUPLICATES)
    taken = {}
    for part in ("train", "held_out"):
        words = [f"tiles={tmp_path}", f"out={tmp_path / part}.parquet", f"split.part={part}"]
        words += ["split.held_out=0.2", "split.seed=1"]
        words += [f"duplicates={tmp_path / 'duplicates.parquet'}"]
        sample(load_config(SampleConfig, [], words))
        chosen = read_table(tmp_path / f"{part}.parquet", SELECTION)["tile_id"].to_pylist()
        taken[part] = {name.split("-")[0] for name in chosen}
    assert not taken["train"] & taken["held_out"]
    assert taken["train"] | taken["held_out"] == set(names)
    both = {names[one], names[other]}  # one side each by their own names
    assert any(both <= side for side in taken.values())
