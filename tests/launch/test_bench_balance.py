"""The comparison of a balanced with a uniform draw: its recalls, its pool, and the whole of it."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eosin.data_curation.synthetic import CLASSES, class_of_region, read_truth
from eosin.launch.bench_balance import (
    BenchBalanceConfig,
    bench_balance,
    compare,
    thinned_pool,
)


def test_recalls_are_those_of_a_loop_and_differences_are_paired() -> None:
    rng = np.random.default_rng(0)
    n = 400
    group = rng.integers(0, 12, n)
    label = rng.integers(0, 3, n)
    parts = []
    for name, right in (("balanced_0-cls", 0.8), ("balanced_1-cls", 0.6), ("uniform_0-cls", 0.5)):
        guess = np.where(rng.random(n) < right, label, (label + 1) % 3)
        parts.append(
            pa.table({
                "encoder": [name] * n,
                "group": [f"slide{g}" for g in group],
                "label": label,
                "prediction": guess,
            })
        )  # fmt: skip
    figures = {f.name: f for f in compare(pa.concat_tables(parts), 2, seed=0)}

    def recall(tables: list[pa.Table], truth: int) -> float:
        rows = [row for table in tables for row in table.to_pylist() if row["label"] == truth]
        return sum(row["prediction"] == truth for row in rows) / len(rows)

    ours, baseline = parts[:2], parts[2:]
    assert figures["rare balanced"].value == pytest.approx(recall(ours, 2))
    assert figures["rare uniform"].value == pytest.approx(recall(baseline, 2))
    mean = np.mean([recall(ours, t) - recall(baseline, t) for t in range(3)])
    assert figures["all difference"].value == pytest.approx(mean)
    for figure in figures.values():
        assert figure.low < figure.value < figure.high
    same = pa.concat_tables([parts[2].set_column(0, "encoder", [["balanced_0"] * n]), parts[2]])
    paired = {f.name: f for f in compare(same, 2, seed=0)}["rare difference"]
    assert (paired.value, paired.low, paired.high) == (0, 0, 0)


def test_the_pool_holds_the_class_at_its_share_and_no_mixed_tile(tmp_path: Path) -> None:
    config = BenchBalanceConfig(out=tmp_path, n_slides=2, slide_px=2048, share=0.05, rare="stroma")
    tiles = pq.read_table(thinned_pool(config) / "tiles.parquet").to_pylist()
    n_rare = 0
    for row in tiles:
        truth = read_truth(tmp_path / "slides" / f"{row['slide_id']}.tiff")
        winner, share = class_of_region(truth, row["level0_x"], row["level0_y"], 256, 256)
        x, y = int(row["level0_x"]) // 16, int(row["level0_y"]) // 16
        if row["rare"]:
            n_rare += 1
            assert CLASSES[winner] == "stroma" and share >= 0.8
        else:
            assert CLASSES.index("stroma") not in truth.class_map[y : y + 16, x : x + 16]
    assert n_rare == round(0.05 / 0.95 * (len(tiles) - n_rare)) > 0


def test_a_class_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rare=bone: the classes are glands"):
        BenchBalanceConfig(rare="bone")


@pytest.mark.slow
def test_the_whole_comparison_runs_and_a_second_call_tells_the_same(tmp_path: Path) -> None:
    file = tmp_path / "balance.json"
    config = BenchBalanceConfig(
        out=tmp_path / "out", n_slides=5, slide_px=2048, n_labelled=15, budget=80, clusters=12,
        seeds=1, steps=6, share=0.05, json=file,
    )  # fmt: skip
    bench_balance(config)
    first = file.read_bytes()
    names = [figure["name"] for figure in json.loads(first)["figures"]]
    assert names[:3] == ["rare balanced", "rare uniform", "rare difference"]
    bench_balance(config)
    assert file.read_bytes() == first
