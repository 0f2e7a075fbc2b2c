"""`eosin plan curate`: its arithmetic by hand, and a pilot scaled up against the larger set."""

import json
from pathlib import Path

import pytest

from eosin.configs.errors import InputError
from eosin.data_curation.costs import COSTS_NAME, read_costs
from eosin.data_curation.curate import CurateConfig, curate
from eosin.data_curation.manifest import SELECTION, TILES, open_table, read_table
from eosin.data_curation.shards import ShardOptions
from eosin.data_curation.synthetic import SyntheticConfig, write_slides
from eosin.data_curation.tiles import TileOptions
from eosin.launch.cli import main
from eosin.launch.plan_curation import (
    CuratePlan,
    PlanCurateConfig,
    cluster_flops,
    make_curate_plan,
    resolve,
)


def figures_of(**keys: object) -> CuratePlan:
    return make_curate_plan(resolve(PlanCurateConfig(**keys)))  # type: ignore[arg-type]


def test_the_sums_are_those_of_a_pocket_calculator() -> None:
    plan = figures_of(
        slides=1000, tissue_mm2=100, mpp=0.5, size_px=200, total=1_000_000, tile_rate=250,
        read_rate=500, shard_rate=100, tile_kb=20, dim=512, encoder_gflops=100, gpus=4, gpu="A100",
        mfu=0.5, cores=10, price=2, core_price=0.1, slide_gb=1, disk_gbs=1, levels=[1000],
        iterations=20, points_per_centroid=0,
    )  # fmt: skip
    tiles = 1000 * 100 / 0.01  # a tile is 0.1 mm wide
    assert plan.tiles == pytest.approx(tiles) and plan.drawn == 1_000_000
    by_name = {stage.name: stage for stage in plan.stages}
    assert by_name["tile"].core_hours == pytest.approx(tiles / 250 / 3600)
    assert by_name["embed"].core_hours == pytest.approx(tiles / 500 / 3600)
    assert by_name["embed"].gpu_hours == pytest.approx(tiles * 100e9 / (156e12 * 3600))
    assert by_name["embed"].written_tb == pytest.approx(tiles * 1024 / 1e12)
    assert by_name["cluster"].gpu_hours == pytest.approx(
        2 * tiles * 1000 * 512 * (20 + 2 + 1) / (156e12 * 3600)
    )
    assert by_name["shard"].core_hours == pytest.approx(1_000_000 / 100 / 3600)
    assert by_name["shard"].written_tb == pytest.approx(0.02)
    hours = sum(stage.core_hours for stage in plan.stages)
    gpu_hours = sum(stage.gpu_hours for stage in plan.stages)
    assert plan.cost == pytest.approx(0.1 * hours + 2 * gpu_hours)
    assert plan.cost_per_million == pytest.approx(plan.cost)


def test_duplicates_are_looked_for_in_clusters_and_near_them() -> None:
    given = {"slides": 1000, "tissue_mm2": 100, "size_px": 200, "read_rate": 500, "levels": [1000]}
    with_them = figures_of(**given, without_duplicates=True)
    by_name = {stage.name: stage for stage in with_them.stages}
    tiles = 1e7
    assert by_name["prints"].core_hours == pytest.approx(tiles / 500 / 3600)
    pairs = tiles * 6.5 * 10_000  # half its own cluster's 10,000 tiles, and six more
    assert by_name["dedupe"].core_hours == pytest.approx((13 * tiles / 9300 + pairs / 6.2e7) / 3600)
    without = figures_of(**given)
    more = by_name["prints"].core_hours + by_name["dedupe"].core_hours
    assert with_them.core_hours == pytest.approx(without.core_hours + more)


def test_storage_holds_up_what_it_cannot_read_in_time() -> None:
    quick = figures_of(slides=1000, disk_gbs=100)
    slow = figures_of(slides=1000, disk_gbs=0.01)
    assert slow.hours > 3 * 1000 / 0.01 / 3600 * 0.99 and quick.hours < slow.hours / 10
    assert slow.core_hours == quick.core_hours


def test_a_sample_of_the_points_fits_the_centres_and_all_are_assigned_once() -> None:
    config = resolve(PlanCurateConfig(levels=[100, 10], points_per_centroid=5, iterations=3, dim=7))
    fine = 2 * 100 * 7 * (5 * 500 + 10_000)
    coarse = 2 * 10 * 7 * (5 * 50 + 100)
    assert cluster_flops(config, 10_000) == fine + coarse


@pytest.mark.slow
def test_a_pilot_foretells_the_larger_set(tmp_path: Path) -> None:
    slides = write_slides(
        tmp_path / "slides", SyntheticConfig(n_slides=6, size_px=1024, seed=3), workers=1
    )
    for name, some in (("pilot", slides[:3]), ("whole", slides)):
        table = tmp_path / f"{name}.csv"
        table.write_text("path\n" + "".join(f"{path}\n" for path in some))
        curate(
            CurateConfig(
                slides=table,
                out=tmp_path / name,
                tile=TileOptions(size_px=128, mpp=1.0, workers=1),
                shard=ShardOptions(workers=1),
            )
        )
    plan = figures_of(slides=6, like=tmp_path / "pilot", encoder_gflops=0, gpus=0)
    tiles = read_table(tmp_path / "whole" / "tiles.parquet", TILES)
    read = sum(status == "ok" for status in tiles["status"].to_pylist())
    assert plan.tiles == pytest.approx(read, rel=0.2)
    selected = open_table(tmp_path / "whole" / "selection.parquet", SELECTION).metadata.num_rows
    written = sum(tar.stat().st_size for tar in (tmp_path / "whole" / "shards").glob("*.tar"))
    config = resolve(PlanCurateConfig(slides=6, like=tmp_path / "pilot"))
    assert (config.size_px, config.mpp) == (128, 1.0)
    assert config.tile_kb * 1e3 * selected == pytest.approx(written, rel=0.2)
    pilot = read_costs(tmp_path / "pilot")["tile"]
    assert config.tile_rate == pytest.approx(pilot.items / pilot.core_s)
    (tmp_path / "pilot" / COSTS_NAME).unlink()
    with pytest.raises(InputError, match=COSTS_NAME):
        resolve(PlanCurateConfig(like=tmp_path / "pilot"))


def test_the_command_prints_and_writes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    assert main(["plan", "curate", "slides=2000", "total=1000000", "--json", str(file)]) == 0
    said = capsys.readouterr().out
    for stage in ("tile", "embed", "cluster", "sample", "shard"):
        assert f"\n{stage} " in said
    assert json.loads(file.read_text())["drawn"] == 1_000_000


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (["gpu=abacus"], "abacus"),
        (["levels=[10,100]"], "levels"),
        (["mfu=1.5"], "mfu"),
        (["gpus=0"], "encoder_gflops"),
        (["like=nowhere"], "nowhere"),
    ],
)
def test_nonsense_is_named(keys: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "curate", *keys]) == 2
    assert named in capsys.readouterr().err
