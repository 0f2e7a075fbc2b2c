"""The verb `eval` as a whole, on tiles that differ in colour and texture."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from ranks import ranks_of
from sklearn.metrics import balanced_accuracy_score

from eosin.configs.errors import InputError
from eosin.configs.load import load_config, to_yaml
from eosin.data_curation.embed_config import NormaliseConfig
from eosin.eval.config import EvalConfig
from eosin.eval.results import load_results
from eosin.eval.run import evaluate, plan
from eosin.eval.tasks import TaskConfig
from eosin.launch.cli import main

Writer = Callable[..., Path]


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """12 patients with 6 tiles each: stripes across or along, on a colour of the patient's own."""
    generator = np.random.default_rng(0)
    lines = ["path,label,group,split"]
    for patient in range(12):
        split = ["train", "train", "val", "test"][patient % 4]
        base = generator.integers(120, 200, 3)
        for i in range(6):
            stripes = 40 * (np.arange(32) // 4 % 2)[:, None, None]
            if i % 2:
                stripes = stripes.transpose(1, 0, 2)
            pixels = np.clip(base + stripes + generator.normal(0, 8, (32, 32, 3)), 0, 255)
            path = f"tiles/{patient}_{i}.png"
            (tmp_path / "tiles").mkdir(exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / path)
            lines.append(f"{path},{['across', 'along'][i % 2]},p{patient},{split}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "labels.csv"


@pytest.fixture
def config(tmp_path: Path, labels: Path, write_encoder_folder: Writer) -> EvalConfig:
    encoder = write_encoder_folder(tmp_path / "tiny")
    return EvalConfig(
        encoder=str(encoder),
        task=TaskConfig(tiles=labels),
        out=tmp_path / "out",
        device="cpu",
        batch_size=16,
    )


def changed(config: EvalConfig, **changes: object) -> EvalConfig:
    return EvalConfig(**{**vars(config), **changes})


ARTEFACTS = ("results.json", "predictions.parquet", "report.html")


def test_the_encoder_its_twin_and_two_floors_are_scored_by_every_protocol(
    config: EvalConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(config)
    results = load_results(config.out / "results.json")
    assert [(e.name, e.kind) for e in results.encoders] == [
        ("tiny-cls", "encoder"),
        ("tiny-random-cls", "random"),
        ("mean-colour", "floor"),
        ("colour-histogram", "floor"),
    ]
    assert {s.metric for s in results.scores} >= {"balanced_accuracy", "auroc", "ece"}
    assert len(results.differences) == 3 * len(results.scores) // 4
    assert set(results.protocols) == {s.protocol for s in results.scores}
    predictions = pq.read_table(config.out / "predictions.parquet").to_pylist()
    assert len(predictions) == 4 * 3 * 18
    assert {row["group"] for row in predictions} == {"p3", "p7", "p11"}
    for encoder in results.encoders:
        for protocol in ("linear/sklearn-l2@2", "knn/uni20@1"):
            rows = [
                (row["label"], row["prediction"])
                for row in predictions
                if (row["encoder"], row["protocol"]) == (encoder.name, protocol)
            ]
            expected = balanced_accuracy_score(*zip(*rows, strict=True))
            assert results.score(encoder.name, protocol).value == pytest.approx(expected)
    assert results.score("mean-colour", "knn/uni20@1").value < 0.8  # colour says nothing here
    assert set(json.loads((config.out / "timings.json").read_text())) == {
        encoder.name for encoder in results.encoders
    }
    shown = capsys.readouterr()
    assert "tiny (cls)" in shown.out and "better by more than the interval" in shown.out
    assert "test has 3 groups, fewer than 20" in " ".join(shown.err.split())


def test_two_runs_give_the_same_bytes_and_a_rerun_takes_the_cached_features(
    tmp_path: Path, config: EvalConfig
) -> None:
    evaluate(config)
    first = {name: (config.out / name).read_bytes() for name in ARTEFACTS}
    caches = sorted((config.out / "features").glob("*/features.npy"))
    times = [path.stat().st_mtime_ns for path in caches]
    assert len(caches) == 4
    evaluate(config)
    assert [path.stat().st_mtime_ns for path in caches] == times
    assert {name: (config.out / name).read_bytes() for name in ARTEFACTS} == first
    elsewhere = changed(config, out=tmp_path / "elsewhere")
    evaluate(elsewhere)
    assert {name: (elsewhere.out / name).read_bytes() for name in ARTEFACTS} == first


def test_poisoned_test_labels_change_no_choice_and_no_prediction(
    tmp_path: Path, config: EvalConfig, labels: Path
) -> None:
    patterns = ["linear/[sdu]*", "knn/*", "fewshot/thunder*", "prototypes/*", "ratio/*", "retr*"]
    config = changed(config, protocols=patterns)
    evaluate(config)
    honest = load_results(config.out / "results.json")
    header, *lines = labels.read_text().splitlines()
    swap = {"across": "along", "along": "across"}
    poisoned = []
    for line in lines:
        path, label, group, split = line.split(",")
        poisoned.append(",".join((path, swap[label] if split == "test" else label, group, split)))
    labels.write_text("\n".join([header, *poisoned]) + "\n")
    other = changed(config, out=tmp_path / "poisoned")
    evaluate(other)
    worse = load_results(other.out / "results.json")
    assert [s.chosen for s in worse.scores] == [s.chosen for s in honest.scores]
    assert {key for s in honest.scores for key in s.chosen} >= {"C", "k", "shots"}
    columns = [pq.read_table(c.out / "predictions.parquet")["prediction"] for c in (config, other)]
    assert columns[0].equals(columns[1])
    assert worse.scores != honest.scores


def test_more_encoders_stand_in_the_same_table(
    tmp_path: Path, config: EvalConfig, write_encoder_folder: Writer
) -> None:
    other = write_encoder_folder(tmp_path / "run7" / "encoder", embed_dim=16)
    wanted = changed(
        config,
        extra_encoders=[str(tmp_path / "run7"), f"{config.encoder}@clsmean"],
        protocols=["knn/uni20@1"],
    )
    evaluate(wanted)
    results = load_results(config.out / "results.json")
    assert [e.name for e in results.encoders][4:] == ["run7-cls", "tiny-clsmean"]
    assert {d.baseline for d in results.differences} >= {"run7-cls", "tiny-clsmean"}
    assert other.is_dir()
    with pytest.raises(InputError, match="two encoders are called 'tiny-cls'"):
        evaluate(changed(config, extra_encoders=[config.encoder]))


def test_an_encoder_stands_beside_itself_with_normalised_stains(
    tmp_path: Path, config: EvalConfig
) -> None:
    library = tmp_path / "stains.json"
    figures = {
        "name": "pink", "slide_id": "s", "slides": 1, "glass": [240, 240, 240],
        "macenko_vectors": [0.6, 0.7, 0.4, 0.1, 0.9, 0.4], "macenko_strength": [1.2, 1.5],
        "lab_mean": [60, 30, -20], "lab_std": [10, 8, 6], "vahadane_vectors": None,
    }  # fmt: skip
    library.write_text(json.dumps({"format": 1, "conditions": [figures]}))
    moved = NormaliseConfig(library=library, condition="pink", method="reinhard")
    evaluate(changed(config, normalise=moved, protocols=["knn/uni20@1"]))
    results = load_results(config.out / "results.json")
    names = [e.name for e in results.encoders]
    assert names[2] == "tiny-reinhard-cls"
    assert results.encoders[2].label == "tiny (cls), reinhard to pink"
    assert results.encoders[2].digest != results.encoders[0].digest
    assert "tiny-reinhard-cls" in {d.baseline for d in results.differences}


def test_an_unreadable_tile_is_named_and_a_mended_one_lets_the_run_go_on(
    config: EvalConfig, labels: Path
) -> None:
    tile = labels.parent / "tiles" / "5_3.png"
    whole = tile.read_bytes()
    tile.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"5_3\.png cannot be used as a tile"):
        evaluate(config)
    tile.write_bytes(whole)
    evaluate(config)


def test_the_plan_says_what_would_be_embedded_and_what_is_cached(config: EvalConfig) -> None:
    before = plan(config)
    assert "72 tiles" in before and "test: 18 tiles of 3 groups" in before
    assert before.count("to embed") == 4
    assert not config.out.exists()
    evaluate(config)
    assert plan(config).count("features are cached") == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("protocols=[knn]", "knn/uni20@1"),
        ("n_bootstrap=10", "n_bootstrap=10"),
        ("batch_size=0", "batch_size=0"),
        ("seed=-1", "seed=-1"),
        ("device=tpu", "device"),
        ("encoder=builtin:mean-colour", "a floor of every table"),
        ("encoder=nowhere", "nowhere"),
        ("task.tiles=nowhere.csv", "nowhere.csv does not exist"),
        ("task.tile=x", "Did you mean"),
    ],
)
def test_bad_usage_ends_in_one_line_and_exit_code_2(
    config: EvalConfig, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    given = [f"encoder={config.encoder}", f"task.tiles={config.task.tiles}", f"out={config.out}"]
    assert main(["eval", *given, override]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("eosin:")]
    assert message in line


def test_the_config_survives_yaml(tmp_path: Path, config: EvalConfig) -> None:
    (tmp_path / "eval.yaml").write_text(to_yaml(config))
    assert load_config(EvalConfig, [tmp_path / "eval.yaml"]) == config


def test_on_real_tiles_colour_tells_tumour_above_chance(
    tmp_path: Path, config: EvalConfig, real_data: Path
) -> None:
    source = real_data / "breast_idc"
    header, *lines = (source / "labels.csv").read_text().splitlines()
    rows = [header, *(f"{source}/{line}" for line in lines[::6])]
    (tmp_path / "subset.csv").write_text("\n".join(rows) + "\n")
    evaluate(changed(config, task=TaskConfig(tiles=tmp_path / "subset.csv", name="IDC")))
    results = load_results(config.out / "results.json")
    assert results.task.name == "IDC"
    histogram = results.score("colour-histogram", "linear/sklearn-l2@2")
    assert 0.55 < histogram.value < 1 and histogram.low < histogram.value < histogram.high


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one(config: EvalConfig, tmp_path: Path) -> None:
    evaluate(config)
    arguments = ["-m", "eosin.launch.cli", "eval", f"encoder={config.encoder}", "device=cpu"]
    arguments += [f"task.tiles={config.task.tiles}", "batch_size=2", f"out={tmp_path / 'two'}"]
    # what a run with other batches left when it was killed is not taken for this one's
    left = tmp_path / "two" / "features" / "mean-colour"
    stamp = json.loads((config.out / "features/mean-colour/meta.json").read_text())["stamp"]
    (left / f".parts-{stamp}-8").mkdir(parents=True)
    np.save(left / f".parts-{stamp}-8" / "0.npy", np.zeros((8, 3), np.float16))
    with ranks_of(2, arguments, tmp_path / "log") as two:
        for rank in two:
            assert rank.ends() == 0, rank.said()
    alone = changed(config, out=tmp_path / "alone", batch_size=2)
    evaluate(alone)
    found = sorted(p.relative_to(alone.out) for p in (alone.out / "features").rglob("*.npy"))
    assert len(found) == 4
    for path in (*found, *map(Path, ARTEFACTS)):
        assert (tmp_path / "two" / path).read_bytes() == (alone.out / path).read_bytes(), path
    assert not list((tmp_path / "two").rglob(".parts*"))


def test_the_same_regions_are_scored_at_several_resolutions(
    config: EvalConfig, tmp_path: Path, write_encoder_folder: Writer
) -> None:
    dynamic = write_encoder_folder(tmp_path / "dynamic", dynamic_img_size=True)
    wanted = changed(config, encoder=str(dynamic), sizes_px=[48, 64], protocols=["knn/uni20@1"])
    evaluate(wanted)
    results = load_results(config.out / "results.json")
    names = [e.name for e in results.encoders if e.kind == "encoder"]
    assert names == ["dynamic-cls", "dynamic-cls-48px", "dynamic-cls-64px"]
    assert len({e.digest for e in results.encoders}) == len(results.encoders)
    assert [e.label for e in results.encoders][2] == "dynamic (cls), 48 px"


def test_checkpoints_of_a_run_stand_in_the_table_and_are_drawn_over_training(
    config: EvalConfig, tmp_path: Path, write_encoder_folder: Writer
) -> None:
    for step in (100, 200):
        write_encoder_folder(tmp_path / "run" / "exports" / f"step_{step:06d}", depth=step // 100)
    wanted = changed(config, checkpoints=tmp_path / "run", protocols=["knn/uni20@1"])
    evaluate(wanted)
    results = load_results(config.out / "results.json")
    assert [(e.label, e.step) for e in results.encoders if e.step is not None] == [
        ("run, step 100", 100), ("run, step 200", 200)
    ]  # fmt: skip
    assert "Over training" in (config.out / "report.html").read_text()
    with pytest.raises(InputError, match=r"holds no exports/step_"):
        evaluate(changed(config, checkpoints=tmp_path))
