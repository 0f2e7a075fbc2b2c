"""Training slide encoders: every term, resumed, over ranks, from another run; what it costs."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ranks import ranks_of
from slide_bags import write_slides
from torch import Tensor

from eosin.configs.errors import ConfigError, InputError
from eosin.configs.load import load_config, to_yaml
from eosin.launch.process import World
from eosin.pretrain.checkpoint import list_checkpoints, read_tensors
from eosin.pretrain.rates import Rates
from eosin.pretrain.slide.config import SlideConfig
from eosin.pretrain.slide.data import open_data
from eosin.pretrain.slide.setup import SlideTraining, set_up
from eosin.pretrain.slide.steps import SlideSteps
from eosin.pretrain.slide.train import plan, pretrain_slides, take_gradients

CPU = torch.device("cpu")
TINY = [
    "batch_size=8", "group_size=2", "threads=1", "log_every=1", "checkpoints.every=3", "steps=6",
    "model={width: 16, depth: 2, heads: 2, registers: 1, layer_scale: 0.1, drop_path: 0.5}",
    "views={global_tiles: 6, local_tiles: 3, n_local: 1}", "device=cpu",
    "optim.lr={peak: 1e-3, end: 1e-6, warmup: 0.2}", "optim.clip_norm=0.5",
]  # fmt: skip
DISTIL = "objective.distil={head: {prototypes: 40, hidden: 16, bottleneck: 8}}"
N = 16


@pytest.fixture(scope="module")
def bags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bags")
    kinds = ["halves", "patches"] * (N // 2)
    common = {
        "groups": [f"p{at // 2:02d}" for at in range(N)],
        "stains": ["H&E", "ER"] * (N // 2),
        "side": 10,
    }
    write_slides(folder / "a", kinds, **common)  # type: ignore[arg-type]
    write_slides(folder / "b", kinds, **common, encoder="other", dim=8)  # type: ignore[arg-type]
    write_slides(folder / "c", kinds, **{**common, "seed": 1})  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    rows = [
        {"key": f"s{at:03d}", "modality": name, "vector": rng.standard_normal(dim).tolist()}
        for at in range(N)
        for name, dim in (("rna", 6), ("report", 4))
        if (name, at % 4) != ("report", 1) and at != 5
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "paired.parquet")
    lines = ["slide,kind,organ,os_time,os_event"]
    for at, kind in enumerate(kinds):
        organ = ("", "lung", "skin")[at % 3]
        lines.append(f"s{at:03d},{kind},{organ},{1 + at % 7},{int(at % 3 > 0)}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


def objectives(bags: Path) -> dict[str, list[str]]:
    return {
        "distil": [DISTIL],
        "centre": [DISTIL, "objective.distil.targets=centre", "objective.distil.patch_head="
                   "{prototypes: 24, hidden: 16, bottleneck: 8}", "model.position=rope"],
        "regress": [f"bags.stores=[{bags}/a, {bags}/b]", "objective.regress={}",
                    "hiding={kind: sources, share: 1}", "model.pool=mean"],
        "contrast": ["bags.unit=group", "objective.contrast={width: 8, hidden: 16}",
                     "views={kind: tokens, n_tokens: 30, apart: [slide], n_local: 0}",
                     "model.pool=attention"],
        "align": [f"objective.align={{table: {bags}/paired.parquet, width: 8, hidden: 16, "
                  "pairs: all, loss: sigmoid}",
                  "views={kind: whole, n_global: 1, n_local: 0, n_tokens: 60}",
                  "model={pool: latents, latents: 3, position: none}"],
        "labels": ["bags.unit=group", "views={kind: whole, n_global: 1, n_local: 0, dropped: 0.1}",
                   f"objective.labels={{table: {bags}/groups.csv, classes: [kind, organ], "
                   "survival: [os], intervals: 2}", "model={case: transformer, case_depth: 1}"],
    }  # fmt: skip


def config_of(bags: Path, out: Path, name: str, *more: str) -> SlideConfig:
    if name == "labels":
        lines = (bags / "labels.csv").read_text().splitlines()
        rows = [line.split(",", 1) for line in (lines[1::4] + lines[2::4])]
        text = [f"group,{lines[0].split(',', 1)[1]}"]
        text += [f"p{at:02d},{row[1]}" for at, row in enumerate(rows)]
        (bags / "groups.csv").write_text("\n".join(text) + "\n")
        more = ("batch_size=4", *more)
    if name == "contrast":
        more = ("batch_size=4", *more)
    return load_config(
        SlideConfig,
        overrides=[f"bags.stores=[{bags}/a]", f"out={out}", *TINY, *objectives(bags)[name], *more],
    )


def trained(config: SlideConfig, world: World | None = None) -> tuple[SlideTraining, SlideSteps]:
    data = open_data(config)
    t = set_up(config, data, CPU, torch.float32)
    return t, SlideSteps(data.sources, config.plan_of(world or World()), data.paired, data.labels)


def tensors_of(out: Path) -> dict[str, Tensor]:
    return read_tensors(list_checkpoints(out / "checkpoints")[0])


NAMES = ["distil", "centre", "regress", "contrast", "align", "labels"]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_is_ended_goes_on_as_if_it_had_not_been(
    bags: Path, tmp_path: Path, name: str
) -> None:
    whole = config_of(bags, tmp_path / "whole", name)
    pretrain_slides(whole)
    lines = [json.loads(x) for x in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 7))
    terms = [
        k
        for k in ("dino_global", "ibot", "regress", "contrast", "align", "labels")
        if k in lines[0]
    ]
    wanted = {"distil": ["dino_global", "ibot"], "centre": ["dino_global", "ibot"]}
    assert terms == wanted.get(name, [name])
    assert all(np.isfinite(line["loss"]) and line["loss"] != 0 for line in lines)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "step_00000006")
    (tmp_path / "part" / "done.json").unlink()
    pretrain_slides(config_of(bags, tmp_path / "part", name))
    for key, tensor in tensors_of(tmp_path / "part").items():
        assert torch.equal(tensor, tensors_of(tmp_path / "whole")[key]), key
    one, other = (
        (tmp_path / run / "encoder" / "slide_encoder.safetensors").read_bytes()
        for run in ("whole", "part")
    )
    assert one == other


@pytest.mark.parametrize("name", NAMES)
def test_every_part_that_is_trained_has_a_gradient(bags: Path, tmp_path: Path, name: str) -> None:
    config = config_of(bags, tmp_path, name, "model.drop_path=0")
    t, steps = trained(config)
    for step in range(2):
        batch = steps[step]
        assert not isinstance(batch, Exception), batch
        losses, _ = take_gradients(t, batch, Rates.at(config, step))
    assert losses.total.isfinite()
    none = [n for n, p in t.model.student.named_parameters() if p.requires_grad and p.grad is None]
    assert none == []


def test_missing_vectors_cost_nothing(bags: Path, tmp_path: Path) -> None:
    config = config_of(bags, tmp_path, "align")
    t, steps = trained(config)
    assert len(steps.sources.samples) == N - 1  # s005 has no vector, and nothing else is learnt
    seen: dict[str, int] = {}
    for name, part in zip(
        t.model.student.alignment.names, t.model.student.alignment.modalities, strict=True
    ):
        part.register_forward_pre_hook(
            lambda _, x, name=name: seen.__setitem__(name, seen.get(name, 0) + len(x[0]))
        )
    batch = steps[0]
    assert not isinstance(batch, Exception)
    take_gradients(t, batch, Rates.at(config, 0))
    keys = [steps.sources.samples[row].key for row in batch.rows.tolist()]
    reports = sum(int(key[1:]) % 4 != 1 for key in keys)
    assert seen == {"report": reports, "rna": len(keys)} and reports < len(keys)


def test_terms_written_out(bags: Path, tmp_path: Path) -> None:
    """Regression and labels against loops; the tile trainer's terms are tested with it."""
    config = config_of(bags, tmp_path, "regress", "model.drop_path=0", "hiding.share=0.5")
    t, steps = trained(config)
    batch = steps[0]
    assert not isinstance(batch, Exception)
    with torch.no_grad():
        student = t.model.student
        hidden = torch.from_numpy(batch.hidden)
        tokens = student.backbone(batch.stream, hidden).tokens
        view = np.repeat(batch.owner, batch.stream.lengths)
        n_views, total = batch.n_global * len(batch.rows), 0.0
        for of_view in range(n_views):
            found = []
            for source, places in enumerate(batch.stream.places):
                for at, row in enumerate(places.tolist()):
                    if view[row] == of_view and hidden[row]:
                        adapter = student.backbone.adapters[source]
                        x = (
                            batch.stream.features[source][at].float() - adapter.mean
                        ) / adapter.spread
                        said = student.predictors[source](tokens[row])
                        cosine = (x @ said) / (x.norm() * said.norm())
                        found.append(1 - cosine.item())
            total += float(np.mean(found)) / n_views if found else 0.0
    losses, _ = take_gradients(t, batch, Rates.at(config, 0))
    assert losses.regress.item() == pytest.approx(total, rel=1e-4)


def test_labels_written_out(bags: Path, tmp_path: Path) -> None:
    config = config_of(bags, tmp_path, "labels", "views.dropped=0", "model.drop_path=0",
                       "objective.labels.survival=[]")  # fmt: skip
    t, steps = trained(config)
    batch = steps[0]
    assert not isinstance(batch, Exception) and batch.targets is not None
    losses, _ = take_gradients(t, batch, Rates.at(config, 0))
    with torch.no_grad():
        said = t.model.student.backbone(batch.stream)
        vectors = t.model.student.backbone.case(
            said.vector, torch.from_numpy(batch.owner), len(batch.rows)
        )
        tasks = []
        for at, (task, head) in enumerate(
            zip(steps.labels.tasks, t.model.student.tasks, strict=True)
        ):
            of = []
            for sample in range(len(batch.rows)):
                target = int(batch.targets[sample, at])
                if target < 0:
                    continue
                log_p = head(vectors[sample]).log_softmax(dim=0)
                weights = torch.from_numpy(task.weights)
                smooth = 0.03 / task.outputs
                of.append(-(
                    (1 - 0.03) * weights[target] * log_p[target] + smooth * (weights * log_p).sum()
                ).item())  # fmt: skip
            if of:
                tasks.append(np.mean(of))
    assert len(tasks) == 2
    assert losses.labels.item() == pytest.approx(float(np.mean(tasks)), rel=1e-4)


def test_a_second_stage_takes_the_encoder_and_draws_the_rest(bags: Path, tmp_path: Path) -> None:
    first = config_of(bags, tmp_path / "first", "distil")
    pretrain_slides(first)
    config = config_of(bags, tmp_path / "second", "labels", f"start.run={tmp_path / 'first'}")
    t, _ = trained(config)
    teacher = read_tensors(
        list_checkpoints(tmp_path / "first/checkpoints")[0], "model.teacher.backbone."
    )
    state = t.model.student.backbone.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in teacher.items())
    assert "case.token" in state and "case.token" not in teacher
    other = config_of(
        bags, tmp_path / "third", "labels", f"start.weights={tmp_path / 'first/encoder'}",
        "model.width=32",
    )  # fmt: skip
    with pytest.raises(InputError, match="here; give it the model="):
        trained(other)


def test_another_objective_or_other_bags_are_refused_on_resume(bags: Path, tmp_path: Path) -> None:
    pretrain_slides(config_of(bags, tmp_path, "distil", "steps=3"))
    with pytest.raises(ConfigError, match=r"objective\.distil\.ibot: 1\.0 → 0\.5"):
        pretrain_slides(config_of(bags, tmp_path, "distil", "objective.distil.ibot=0.5"))
    (tmp_path / "done.json").unlink()
    with pytest.raises(ConfigError, match="the index of the bags"):
        pretrain_slides(config_of(bags, tmp_path, "distil", "steps=3", f"bags.stores=[{bags}/c]"))


def test_a_plan_says_what_would_be_done(bags: Path, tmp_path: Path) -> None:
    said = plan(config_of(bags, tmp_path, "align"))
    assert "15 samples of 8 groups" in said and "1 samples are left out" in said
    assert "paired vectors: report of 12, rna of 15 samples" in said
    assert "6 steps of 8 samples" in said
    assert not (tmp_path / "checkpoints").exists()


BAD = [
    (["objective.distil=null"], "nothing to learn"),
    (["views.n_global=1", "views.n_local=0"], "dino needs two views"),
    (["parallel=fsdp"], "small and replicated"),
    (["hiding.share=0"], r"hiding\.share=0 hides nothing"),
    (["objective.distil.jepa.weight=1"], "gram and jepa are of patches"),
    (["views.kind=whole"], "n_local=1 needs kind=window"),
    (["start.train_blocks=1"], "is trained whole"),
]


@pytest.mark.parametrize(("more", "message"), BAD, ids=lambda x: str(x)[:40])
def test_configs_that_contradict_themselves(
    bags: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(bags, tmp_path, "distil", *more)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("s000", "rna", [1.0]), ("s000", "rna", [2.0])], "'s000' has two vectors"),
        ([("s000", "rna", [1.0]), ("s001", "rna", [2.0, 3.0])], "give them one width"),
        ([("s000", "rna", [float("nan")])], "the vector 'rna' of 's000' is not finite"),
        ([("x", "rna", [1.0])], "none of its keys"),
    ],
)
def test_tables_of_vectors_that_cannot_be_used(
    bags: Path, tmp_path: Path, rows: list[tuple[str, str, list[float]]], message: str
) -> None:
    table = pa.Table.from_pylist([{"key": k, "modality": m, "vector": v} for k, m, v in rows])
    pq.write_table(table, tmp_path / "paired.parquet")
    config = config_of(bags, tmp_path, "align", f"objective.align.table={tmp_path}/paired.parquet")
    with pytest.raises(InputError, match=message):
        open_data(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide,kind\ns000,a\ns001,a\n", "has 1 classes"),
        ("slide,other\ns000,a\n", "no column 'kind'"),
        ("slide,kind\ns000,a\ns000,b\n", "named twice"),
        ("slide,kind,os_time,os_event\ns000,a,-1,1\ns001,b,2,1\n", "os_time=-1"),
        ("slide,kind,os_time,os_event\ns000,a,3,yes\ns001,b,2,1\n", "an event 1 or 0"),
    ],
)
def test_labels_that_cannot_be_used(bags: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "labels.csv").write_text(text)
    survival = "survival: [os], intervals: 2" if "os_time" in text else "survival: []"
    config = config_of(
        bags, tmp_path, "distil",
        f"objective.labels={{table: {tmp_path}/labels.csv, classes: [kind], {survival}}}",
    )  # fmt: skip
    with pytest.raises(InputError, match=message):
        open_data(config)


def test_paired_vectors_are_retrieved(tmp_path: Path) -> None:
    """By patients with two slides each; four ranks have the same weights (below)."""
    groups = [f"p{at // 2:02d}" for at in range(24)]
    store = write_slides(tmp_path / "bags", ["halves"] * 24, groups=groups, side=6, apart=2.0)
    mixing = np.random.default_rng(0).standard_normal((16, 6))
    means = {s: store.read(s).features.astype(float).mean(axis=0) for s in store.slide_ids}
    rows = [
        {"key": key, "modality": "rna", "vector": (mean @ mixing).tolist()}
        for key, mean in means.items()
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "paired.parquet")
    config = load_config(
        SlideConfig,
        overrides=[
            f"bags.stores=[{tmp_path}/bags]", f"out={tmp_path}/run", *TINY, "steps=80",
            "batch_size=24", "group_size=24", "checkpoints.every=80", "log_every=80",
            "views={kind: whole, n_global: 1, n_local: 0}", "optim.lr.peak=3e-3",
            "model={pool: attention, depth: 0, position: none, drop_path: 0}",
            f"objective.align={{table: {tmp_path}/paired.parquet, width: 16, hidden: 32}}",
            "momentum={start: 0, peak: 0, end: 0}",
        ],
    )  # fmt: skip
    pretrain_slides(config)
    t, steps = trained(config)
    saved = tensors_of(tmp_path / "run")
    state = t.model.state_dict()
    t.model.load_state_dict({name: saved[f"model.{name}"] for name in state})
    batch = steps[0]
    assert not isinstance(batch, Exception)
    with torch.no_grad():
        student = t.model.student
        vectors = student.backbone(batch.stream).vector
        slides = torch.nn.functional.normalize(student.alignment.slide(vectors), dim=1)
        rna = student.alignment.project("rna", batch.paired["rna"].vectors)
    found = (slides @ rna.T).argmax(dim=1)
    assert (found == torch.arange(24)).float().mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["distil", "contrast", "align", "labels", "regress"])
def test_ranks_train_as_one(bags: Path, tmp_path: Path, name: str) -> None:
    """Key biases are left out: their true gradient is zero, so AdamW makes noise of them."""
    more = ["objective.distil.spread.over=batch"] if name == "distil" else []
    more += ["group_size=1", "checkpoints.asynchronous=false"]
    config = config_of(bags, tmp_path / "one", name, *more)
    pretrain_slides(config)
    one = tensors_of(tmp_path / "one")
    for count in (2, 4) if name == "align" else (2,):
        out = tmp_path / f"ranks{count}"
        (tmp_path / f"{count}.yaml").write_text(to_yaml(config_of(bags, out, name, *more)))
        arguments = [
            "-m", "eosin.launch.cli", "pretrain", "slides", "--config",
            str(tmp_path / f"{count}.yaml"), "preflight.enabled=false",
        ]  # fmt: skip
        with ranks_of(count, arguments, tmp_path / f"logs{count}") as ranks:
            assert [rank.ends() for rank in ranks] == [0] * count, ranks[0].said()
        many = tensors_of(out)
        for key, tensor in one.items():
            if key.startswith("model.") and "qkv.bias" not in key:
                torch.testing.assert_close(many[key], tensor, atol=2e-5, rtol=1e-4, msg=key)
        losses = [
            [json.loads(x)["loss"] for x in (run / "metrics.jsonl").read_text().splitlines()]
            for run in (tmp_path / "one", out)
        ]
        np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


@pytest.mark.slow
def test_a_killed_run_goes_on(bags: Path, tmp_path: Path) -> None:
    import subprocess
    import time

    def command(out: Path) -> list[str]:
        path = tmp_path / f"{out.name}.yaml"
        path.write_text(to_yaml(config_of(bags, out, "distil", "steps=60", "checkpoints.every=5")))
        return [
            sys.executable,
            "-m",
            "eosin.launch.cli",
            "pretrain",
            "slides",
            "--config",
            str(path),
        ]

    subprocess.run(command(tmp_path / "whole"), check=True)
    rng = np.random.default_rng(0)
    for _ in range(4):
        process = subprocess.Popen(command(tmp_path / "part"))
        started = time.monotonic()
        while time.monotonic() - started < 60 and not list_checkpoints(
            tmp_path / "part/checkpoints"
        ):
            time.sleep(0.05)
        time.sleep(float(rng.uniform(0, 1.5)))
        process.kill()
        process.wait()
    subprocess.run(command(tmp_path / "part"), check=True, env={**os.environ})
    one, other = (tensors_of(tmp_path / run) for run in ("whole", "part"))
    assert all(torch.equal(one[key], other[key]) for key in one)
