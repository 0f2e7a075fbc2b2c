"""Each named system's config: short, with its source, and trained end to end at toy size."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from slide_bags import write_slides

from eosin.configs.load import load_config
from eosin.launch.cli import main
from eosin.pretrain.slide.config import SlideConfig

FOLDER = Path(__file__).parents[2] / "configs/slide"
SYSTEMS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
N = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("systems")
    kinds = ["halves", "patches"] * (N // 2)
    common = {
        "groups": [f"p{at // 2}" for at in range(N)],
        "stains": ["H&E", "ER"] * (N // 2),
        "side": 12,
    }
    write_slides(folder / "a", kinds, **common)  # type: ignore[arg-type]
    write_slides(folder / "b", kinds, **common, encoder="b", dim=8, scale=2)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    keys = [f"s{at:03d}" for at in range(N)] + [f"p{at}" for at in range(N // 2)]
    rows = [
        {"key": key, "modality": modality, "vector": rng.standard_normal(5).tolist()}
        for key in keys
        for modality in ("rna", "report")
        if (key, modality) != ("s001", "rna")
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "vectors.parquet")
    lines = [f"s{at:03d},p{at // 2},{kind},{at + 1},{at % 2}" for at, kind in enumerate(kinds)]
    (folder / "slides.csv").write_text("slide,g,kind,os_time,os_event\n" + "\n".join(lines) + "\n")
    lines = [f"p{at},{('x', 'y')[at % 2]},{at + 1},1" for at in range(N // 2)]
    (folder / "groups.csv").write_text("group,kind,os_time,os_event\n" + "\n".join(lines) + "\n")
    return folder


def reduced(name: str, data: Path, out: Path) -> list[str]:
    """What makes a config small, and names its tables; nothing that it is about."""
    said = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    views, model, objective = said["views"], said["model"], said["objective"]
    many = name in ("mixed_magnification", "ticon", "cobra")
    stores = f"{data}/a, {data}/b" if many else f"{data}/a"
    overrides = [
        f"bags.stores=[{stores}]", f"out={out}", "steps=4", "batch_size=4", "group_size=2",
        "threads=1", "device=cpu", "log_every=1", "checkpoints.every=2",
        f"model={{width: 16, heads: 2, depth: {min(model['depth'], 2)}}}",
    ]  # fmt: skip
    if views["kind"] == "window":
        overrides += ["views.global_tiles=6"]
        overrides += ["views.local_tiles=3"] * ("local_tiles" in views)
        overrides += ["views.region_tiles=8"] * ("region_tiles" in views)
    else:
        overrides += ["views.n_tokens=40"]
    overrides += ["model.latents=4"] * (model["pool"] == "latents")
    if "distil" in objective:
        overrides += ["objective.distil.head={prototypes: 32, hidden: 16, bottleneck: 8}"]
    if "contrast" in objective:
        overrides += ["objective.contrast={width: 8, hidden: 16}"]
    if "align" in objective:
        overrides += [f"objective.align={{table: {data}/vectors.parquet, width: 8, hidden: 16}}"]
    if "labels" in objective:
        table = "groups" if said.get("bags", {}).get("unit") == "group" else "slides"
        overrides += [
            f"objective.labels={{table: {data}/{table}.csv, classes: [kind], survival: [os], "
            "intervals: 2}"
        ]
    return overrides


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_config_is_short_and_says_where_it_is_from(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text()
    assert len(text.splitlines()) < 60
    for word in ("Command:", "Data:", "Reached there", "Deviations:", "Not run by us"):
        assert word in text, word
    terms = yaml.safe_load(text)["objective"]
    given = [f"objective.{term}.table=t" for term in terms if term in ("align", "labels")]
    given += ["objective.labels.classes=[x]"] if "labels" in terms else []
    config = load_config(SlideConfig, [f"slide/{name}"], ["bags.stores=[b]", "out=o", *given])
    assert config.batch_size % config.group == 0


def test_moozys_shapes_are_its_own() -> None:
    config = load_config(SlideConfig, ["slide/moozy"], ["bags.stores=[b]", "out=o"])
    v = config.views
    tokens = v.n_global * v.global_tiles**2 + v.n_local * v.local_tiles**2
    assert tokens + (v.n_views) * config.model.prefix == 1376 + 6 * 5  # notes of its code: 405, 149
    assert config.steps * config.batch_size == pytest.approx(14.75e6, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_trains_end_to_end(name: str, data: Path, tmp_path: Path) -> None:
    command = ["pretrain", "slides", "--config", f"slide/{name}"]
    assert main([*command, *reduced(name, data, tmp_path / "run")]) == 0
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 4 and np.isfinite(losses).all()
    many = name in ("mixed_magnification", "ticon", "cobra")
    bags = f"{data}/a, {data}/b" if many else f"{data}/a"
    assert main([
        "extract", "slides", f"encoder={tmp_path}/run/encoder", f"bags=[{bags}]",
        f"out={tmp_path}/vectors", "tokens=true", "device=cpu",
    ]) == 0  # fmt: skip
    vectors = np.load(tmp_path / "vectors/features.npy").astype(float)
    assert vectors.shape == (N, 16) and np.isfinite(vectors).all()
    assert vectors.std(axis=0).max() > 0
