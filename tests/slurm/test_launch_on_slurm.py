"""`eosin launch` on a real two-node Slurm: what is promised of jobs that are hit by something."""

import json
import os
import shutil
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from slurm.two_nodes import EOSIN, Cluster, wait_for

from eosin.launch import slurm as slurm_commands

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TINY = [
    "batch_size=4", "group_size=2", "threads=1", "log_every=1", "checkpoints.every=10",
    "model={width: 32, depth: 2, heads: 2, patch_px: 8, image_px: 32, drop_path: 0.5}",
    "objective.head={prototypes: 32, hidden: 16, bottleneck: 8}",
    "augment={global_px: 32, local_px: 16, n_local: 2}", "device=cpu",
]  # fmt: skip
START_S, END_S = 300, 400
"""Processes start slowly where two cores have much else to do."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    (folder / "tiles").mkdir()
    for i in range(12):
        image = cv2.resize(rng.integers(0, 255, (6, 6, 3), np.uint8), (48, 48))
        cv2.imwrite(str(folder / "tiles" / f"{i}.png"), image)
    cluster.run(*EOSIN, "shard", f"images={folder}/tiles", f"out={folder}/shards", "workers=1")
    return folder / "shards"


def steps_logged(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line)["step"] for line in lines]


def last_logged(run: Path) -> str:
    """The last step that was logged, as a checkpoint of it is called."""
    return f"step_{steps_logged(run)[-1]:08d}"


def newest(run: Path) -> str:
    return max((path.name for path in run.glob("checkpoints/step_*")), default="")


class Training:
    """A training on both nodes that is under way."""

    def __init__(self, cluster: Cluster, shards: Path, folder: Path, steps: int) -> None:
        self.cluster, self.run, self.steps = cluster, folder / "run", steps
        wait_for(lambda: cluster.idle_nodes() == 2, 60, "idle nodes")
        self.folder, (self.job,) = cluster.launch(
            folder, "nodes=2", "cpus=1", "signal_s=30", "--",
            "pretrain", f"shards={shards}", f"out={self.run}", f"steps={steps}", *TINY,
        )  # fmt: skip

    def wait_for_checkpoint(self, after: str = "") -> str:
        """The name of the next one; a job that was queued again is started meanwhile."""

        def written() -> bool:
            self.cluster.hurry()
            return newest(self.run) > after

        wait_for(written, START_S, "a checkpoint", self.log)
        return newest(self.run)

    def wait_until_ended(self, starts: int) -> None:
        """Every process of the present start is gone, and the job waits for the next."""
        wait_for(
            lambda: self.cluster.states().get(self.job, "").startswith("PENDING"),
            60, f"the end of start {starts}", self.log,
        )  # fmt: skip
        assert self.cluster.restarts(self.job) == starts

    def log(self) -> str:
        logs = (p.read_text() for p in sorted((self.folder / "jobs").glob("*_log.out")))
        return "\n".join([str(self.cluster.states()), *logs])


def test_a_chain_runs_the_code_that_was_submitted(
    cluster: Cluster, shards: Path, tmp_path: Path
) -> None:
    code = tmp_path / "code"
    for package in ("configs", "launch", "data_curation", "pretrain", "eval"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, code / "eosin" / package, ignore=ignored)
    run = tmp_path / "run"
    cluster.env["PYTHONPATH"] = str(code)
    try:
        folder, jobs = cluster.launch(
            tmp_path, "nodes=2", "cpus=1", "--",
            "pretrain", f"shards={shards}", f"out={run}", "steps=4", *TINY,
            "--", "export", f"run={run}", f"out={tmp_path}/encoder",
        )  # fmt: skip
    finally:
        del cluster.env["PYTHONPATH"]
    for broken in code.rglob("*.py"):
        broken.write_text("raise SystemExit(9)\n")
    assert oct(folder.stat().st_mode & 0o777) == "0o700"
    cluster.wait_until_gone(jobs, END_S)
    assert cluster.status(folder).splitlines() == [
        f"{jobs[0]}  pretrain: done",
        f"{jobs[1]}  export: done",
    ]
    assert steps_logged(run) == [1, 2, 3, 4]
    assert (tmp_path / "encoder" / "SHA256SUMS").is_file()
    recorded = json.loads((run / "environment.json").read_text())["git_commit"]
    assert recorded == (folder / "code" / "eosin" / "COMMIT").read_text().strip()
    said = cluster.run(*EOSIN, "launch", "logs", str(folder), "stage=pretrain", "rank=1")
    assert "eosin: pretrain is done (rank 1, start 0)" in said


def test_a_training_comes_back_from_all_that_hits_it_and_ends_as_if_nothing_had(
    cluster: Cluster, shards: Path, tmp_path: Path
) -> None:
    training = Training(cluster, shards, tmp_path, steps=800)
    job = training.job

    # the end of its time: Slurm's signal makes a checkpoint off the beat of ten steps, or on it
    before = training.wait_for_checkpoint()
    cluster.run("scancel", "--signal=USR2", job)
    training.wait_until_ended(1)
    saved = [newest(training.run)]
    assert saved[-1] >= before and last_logged(training.run) == saved[-1]

    # a partition of higher priority takes both nodes
    training.wait_for_checkpoint(after=saved[-1])
    cluster.run("srun", "--partition=urgent", "--nodes=2", "true")
    training.wait_until_ended(2)
    saved.append(newest(training.run))
    assert last_logged(training.run) == saved[-1]

    # one rank is killed: the other one ends too
    training.wait_for_checkpoint(after=saved[-1])
    found = cluster.processes(job, "n2").items()
    os.kill(next(p for p, line in found if "eosin.launch.cli pretrain" in line), signal.SIGKILL)
    training.wait_until_ended(3)
    assert not cluster.processes(job, "n1")
    saved.append(newest(training.run))

    # a node loses power: the other one ends, and both come back when there are two again
    training.wait_for_checkpoint(after=saved[-1])
    cluster.kill_node(job, "n2")
    wait_for(lambda: not cluster.processes(job, "n1"), 60, "the end on n1", training.log)
    cluster.start_node("n2")
    cluster.wait_until_gone([job], END_S)

    assert f"{job}  pretrain: done · restart 4" in cluster.status(training.folder)
    assert steps_logged(training.run) == list(range(1, training.steps + 1))
    assert (training.run / "done.json").is_file()
    records = [
        json.loads(path.read_text()) for path in sorted(training.folder.glob("restarts/*.json"))
    ]
    assert [r["crash"] for r in records[:3]] == [False, False, True], records


def test_a_cancelled_launch_stays_away(cluster: Cluster, shards: Path, tmp_path: Path) -> None:
    training = Training(cluster, shards, tmp_path, steps=2000)
    training.wait_for_checkpoint()
    again = cluster.run(
        *EOSIN, "launch", "nodes=2", "cpus=1", "--", "pretrain", f"shards={shards}",
        f"out={training.run}", "steps=2000", *TINY, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert "has the same 'pretrain' in the queue" in again
    cluster.run(*EOSIN, "launch", "cancel", str(training.folder))
    wait_for(lambda: cluster.idle_nodes() == 2, 60, "idle nodes", training.log)
    wait_for(lambda: cluster.state(training.job) == "CANCELLED", 30, "CANCELLED")
    assert f"{training.job}  pretrain: cancelled" in cluster.status(training.folder)


def write_slide(path: Path, seed: int, side: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = np.full((side, side, 3), 240, np.uint8)
    middle = pixels[side // 4 : -side // 4, side // 4 : -side // 4]
    middle[...] = rng.normal((200, 120, 180), 20, middle.shape).clip(0, 255)
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(
            pixels, photometric="rgb", tile=(64, 64), metadata=None,
            resolution=(1e4, 1e4), resolutionunit="CENTIMETER",
        )  # fmt: skip


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four slides, of which one is no slide."""
    folder = tmp_path_factory.mktemp("slides")
    for index in range(3):
        write_slide(folder / f"good{index}.tiff", index, 256 + 64 * index)
    (folder / "bad.tiff").write_bytes(b"not a slide" * 1000)
    return folder


def test_arrays_pass_over_a_bad_slide_and_the_chain_goes_by_what_is_tolerated(
    cluster: Cluster, slides: Path, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    shutil.copy(slides / "good0.tiff", tmp_path / "one")
    launched = {}
    for name, tolerated in (("lenient", 0.5), ("strict", 0.0)):
        tile = ["tile", "mpp=1", "size_px=64", "workers=1"]
        launched[name] = cluster.launch(
            tmp_path, f"name={name}", "array=4", "cpus=1", "stages={tile-2: {array: 0}}", "--",
            *tile, f"slides={slides}", f"out={tmp_path}/{name}", f"max_failed={tolerated}",
            "--", *tile, f"slides={tmp_path}/one", f"out={tmp_path}/{name}_next",
        )  # fmt: skip
    for _, jobs in launched.values():
        assert len(jobs) == 4  # two arrays of at most two tasks; merging; the next verb
        cluster.wait_until_gone(jobs, 240)
    for name, (folder, jobs) in launched.items():
        lines = cluster.status(folder).splitlines()
        assert lines[:2] == [
            f"{jobs[0]}  tile (2 tasks): 2 done",
            f"{jobs[1]}  tile (2 tasks): 2 done",
        ]
        parts = "".join(path.read_text() for path in folder.glob("parts/tile/*.txt"))
        assert sorted(parts.split()) == ["bad", *(f"good{i}" for i in range(3))]
        ended, followed = lines[2:]
        if name == "lenient":
            assert "tile: done" in ended and "tile-2: done" in followed
        else:
            assert "tile: failed" in ended and "tile-2: gone · never started" in followed
        assert (tmp_path / name / "tiles.parquet").is_file()
        assert (tmp_path / f"{name}_next" / "tiles.parquet").is_file() == (name == "lenient")
        said = cluster.run(*EOSIN, "launch", "logs", str(folder), "stage=tile")
        assert "4 slides (3 ok, 1 unreadable)" in said


def test_the_scripts_that_are_shown_are_those_that_are_submitted(
    cluster: Cluster, slides: Path, tmp_path: Path
) -> None:
    asked = [
        "launch", "hours=0.5", "mem=100M", "setup=[export ANSWER=42]", "sbatch={begin: now+1hour}",
        "cpus=1", "--", "tile", f"slides={slides}", f"out={tmp_path}/tiles", "--",
        "shard", f"tiles={tmp_path}/tiles", f"out={tmp_path}/shards",
    ]  # fmt: skip
    shown = cluster.run(*EOSIN, *asked[:1], "--dry-run", *asked[1:], cwd=tmp_path)
    assert not (tmp_path / "launches").exists()
    folder, jobs = cluster.launch(tmp_path, *asked[1:])
    try:
        scripts = [(folder / "jobs" / f"{job}_submission.sh").read_text() for job in jobs]
        expected = shown.replace("JOB_1", jobs[0])
        for script in scripts:
            assert script.strip() in expected
        assert f"afterok:{jobs[0]}" in scripts[1] and "kill-on-invalid-dep=yes" in scripts[1]
        details = cluster.run("scontrol", "show", "job", jobs[0])
        assert "TimeLimit=00:30:00" in details and "MinMemoryNode=100M" in details
    finally:
        cluster.run(*EOSIN, "launch", "cancel", str(folder))


def test_a_job_that_failed_for_good_is_not_queued_again_and_bad_nodes_are_kept_out(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    wait_for(lambda: cluster.idle_nodes() == 2, 60, "idle nodes")
    said = cluster.run("sbatch", "--requeue", "-o", f"{tmp_path}/log", "--wrap", "sleep 100")
    job = said.split()[-1]
    try:
        wait_for(lambda: cluster.state(job) == "RUNNING", 30, "the job")
        slurm_commands.forbid_requeue(job)
        assert not slurm_commands.requeue(job)
        cluster.run("scontrol", "update", f"JobId={job}", "Requeue=1")
        assert not slurm_commands.exclude_nodes(job, ["n1"]), "Slurm does so of waiting jobs alone"
        assert slurm_commands.requeue(job)
        assert slurm_commands.exclude_nodes(job, ["n1"])
        wait_for(lambda: cluster.state(job) == "PENDING", 30, "the queue")

        def runs_again() -> bool:
            cluster.hurry()
            return cluster.state(job) == "RUNNING"

        wait_for(runs_again, 60, "the job")
        assert slurm_commands.queue()[job].nodes == "n2"
        assert slurm_commands.node_address("n[1-2]") == "127.0.0.1"
        assert slurm_commands.max_array_size() == 2
    finally:
        cluster.run("scancel", job)


def test_a_curation_over_nodes_gives_the_bytes_of_one_here(
    cluster: Cluster, slides: Path, tmp_path: Path
) -> None:
    """Slides on an array, features and clusters over two nodes, repetitions, a draw, shards."""
    for index in range(3):
        (tmp_path / "good").mkdir(exist_ok=True)
        shutil.copy2(slides / f"good{index}.tiff", tmp_path / "good")

    def verbs(out: str) -> list[str]:
        tiles = [
            "tile",
            f"slides={tmp_path}/good",
            f"out={out}",
            "mpp=1",
            "size_px=32",
            "workers=1",
        ]
        seen = ["embed", f"tiles={out}", "device=cpu", "threads=1"]
        return [
            *tiles, "--", *seen, f"out={out}/features", "encoder=builtin:stain-texture",
            "--", "cluster", f"features={out}/features", f"out={out}/clusters", "levels=[4,2]",
            "device=cpu", "--", *seen, f"out={out}/prints", "encoder=builtin:tile-print",
            "--", "dedupe", f"prints={out}/prints", f"tiles={out}",
            f"out={out}/duplicates.parquet",
            "--", "sample", f"tiles={out}", f"clusters={out}/clusters", "tree=[level_2,level_1]",
            "total=40", f"duplicates={out}/duplicates.parquet", f"out={out}/selection.parquet",
            "--", "shard", f"tiles={out}", f"selection={out}/selection.parquet",
            f"out={out}/shards", "workers=1",
        ]  # fmt: skip

    there, here = str(tmp_path / "there"), str(tmp_path / "here")
    two = "{nodes: 2}"
    folder, jobs = cluster.launch(
        tmp_path, "cpus=1",
        f"stages={{tile: {{array: 2}}, embed: {two}, cluster: {two}, embed-2: {two}}}",
        "--", *verbs(there),
    )  # fmt: skip
    argv = verbs(here)
    while argv:
        end = argv.index("--") if "--" in argv else len(argv)
        cluster.run(*EOSIN, *argv[:end])
        argv = argv[end + 1 :]
    cluster.wait_until_gone(jobs, END_S)
    assert all("done" in line for line in cluster.status(folder).splitlines())
    said = cluster.run(*EOSIN, "launch", "logs", str(folder), "stage=cluster", "rank=1")
    assert "eosin: cluster is done (rank 1, start 0)" in said
    for name in (
        "tiles.parquet", "features/features.npy", "clusters/clusters.parquet",
        "prints/features.npy", "duplicates.parquet", "selection.parquet", "shards/000000.tar",
    ):  # fmt: skip
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
