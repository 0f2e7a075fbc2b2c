"""`eosin launch` without Slurm: chains, packing, restarts, the supervisor, runs on this machine."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eosin.configs.errors import ConfigError, InputError
from eosin.configs.load import load_config
from eosin.launch import slurm
from eosin.launch.chain import LaunchConfig, read_stages
from eosin.launch.cli import main
from eosin.launch.jobs import Job, describe, write_jobs
from eosin.launch.parts import pack
from eosin.launch.restarts import Limits, limit, progress_of, read_ending
from eosin.launch.snapshot import copy_code, read_commit
from eosin.launch.submit import LAUNCHES

LIMITS = Limits(restarts=5, stuck=1)
PARTS = Limits(restarts=5, stuck=2, retry_failures=True)


@given(st.dictionaries(st.text(min_size=1), st.integers(0, 1000)), st.integers(1, 12))
def test_packing_loses_nothing_and_keeps_the_bound_of_its_rule(
    sizes: dict[str, int], tasks: int
) -> None:
    packed = pack(sizes, tasks)
    assert sorted(name for part in packed for name in part) == sorted(sizes)
    assert len(packed) == min(tasks, len(sizes)) and all(packed)
    loads = [sum(max(1, sizes[name]) for name in part) for part in packed]
    assert loads == sorted(loads, reverse=True)
    if loads:  # no task is fuller than the emptiest before its last, smallest piece came
        last = min(max(1, sizes[name]) for name in packed[0])
        assert loads[0] - last <= loads[-1] or len(packed[0]) == 1


def test_packing_has_a_shorter_tail_than_counting() -> None:
    sizes = {
        f"{i:03d}": int(size)
        for i, size in enumerate(np.random.default_rng(0).lognormal(7, 1.5, 400))
    }
    best = sum(sizes.values()) / 16
    names = sorted(sizes)
    counted = max(sum(sizes[name] for name in names[i::16]) for i in range(16))
    packed = max(sum(sizes[name] for name in part) for part in pack(sizes, 16))
    assert packed <= 1.02 * max(best, max(sizes.values())) < counted


@pytest.mark.parametrize(
    ("code", "asked", "limits", "what", "crash"),
    [
        (0, False, LIMITS, "done", False),
        (1, False, LIMITS, "failed", False),
        (2, False, LIMITS, "failed", False),
        (75, True, LIMITS, "again", False),
        (75, False, LIMITS, "again", True),
        (-signal.SIGKILL, False, LIMITS, "again", True),
        (-signal.SIGTERM, True, LIMITS, "again", False),
        (128 + signal.SIGKILL, False, LIMITS, "again", True),
        (130, False, LIMITS, "failed", False),
        (1, False, PARTS, "again", True),
        (2, False, PARTS, "failed", False),
    ],
)
def test_exit_codes_say_what_is_started_again(
    code: int, asked: bool, limits: Limits, what: str, crash: bool
) -> None:
    ending = read_ending(code, asked, limits)
    assert (ending.what, ending.crash) == (what, crash)


def test_crashes_without_progress_and_too_many_restarts_are_the_end() -> None:
    killed = read_ending(-9, False, LIMITS)
    assert limit(killed, 3, 0, LIMITS).what == "again"
    stuck = limit(killed, 3, 1, LIMITS)
    assert stuck.what == "failed"
    assert "was killed (SIGKILL), 2 times without a newer checkpoint" in stuck.reason
    preempted = read_ending(75, True, LIMITS)
    assert limit(preempted, 4, 3, LIMITS).what == "again"
    assert "after 5 restarts; raise max_restarts" in limit(preempted, 5, 0, LIMITS).reason


def test_progress_is_the_newest_checkpoint_of_out(tmp_path: Path) -> None:
    assert progress_of(["pretrain", f"out={tmp_path}"]) == ""
    for name in ("step_00000020", "step_00000100", ".step_00000200.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert progress_of(["pretrain", "out=elsewhere", f"out={tmp_path}"]) == "step_00000100"
    assert progress_of(["tile"]) == ""


def stages_of(command: str, *overrides: str) -> list[tuple[object, ...]]:
    config = load_config(LaunchConfig, (), [*overrides, f"command=[{', '.join(command.split())}]"])
    return [
        (s.name, s.resources.nodes, s.resources.gpus, s.processes, s.resources.hours)
        for s in read_stages(config)
    ]


CHAIN = (
    "tile slides=a out=b -- pretrain shards=a out=b -- export run=b out=c "
    "-- eval encoder=c task.tiles=t out=d -- eval encoder=c task.tiles=u out=e"
)


def test_each_verb_gets_the_resources_that_it_can_use() -> None:
    stages = "stages={eval-2: {gpus: 0, hours: 1}, tile: {hours: 2}}"
    assert stages_of(CHAIN, "nodes=4", "gpus=8", stages) == [
        ("tile", 1, 1, 1, 2.0),
        ("pretrain", 4, 8, 8, 24.0),
        ("export", 1, 1, 1, 24.0),
        ("eval", 1, 1, 1, 24.0),
        ("eval-2", 1, 0, 1, 1.0),
    ]
    assert stages_of("pretrain shards=a out=b", "tasks=3") == [("pretrain", 1, 0, 3, 24.0)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "after '--' comes a verb"),
        (["--", "launch", "--", "tile"], "after '--' comes a verb"),
        (["--", "fly"], "no verb 'fly'"),
        (["--", "tile", "slides=a", "out=b", "mp=1"], "Did you mean: 'mpp'"),
        (["--", "tile", "slides=a", "out=b", "--dry-run"], "goes before the '--'"),
        (["--", "tile", "slides=a", "out=b", "--"], "after '--' comes a verb"),
        (["stages={tile: {nodes: 2}}", "--", "tile", "slides=a", "out=b"], "one process on one"),
        (["stages={eval: {gpus: 1}}", "--", "tile", "slides=a", "out=b"], "no such stage"),
        (["stages={export: {array: 2}}", "--", "export", "run=a", "out=b"], "slide by slide"),
        (["nodes=0", "--", "tile", "slides=a", "out=b"], "nodes must be at least 1"),
        (["name=../x", "--", "tile", "slides=a", "out=b"], "name may hold"),
    ],
)
def test_what_is_wrong_is_known_before_anything_waits(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not LAUNCHES.exists()


def test_a_verb_without_a_tail_refuses_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tile", "slides=a", "out=b", "--", "x"]) == 2
    assert "takes nothing after '--'" in capsys.readouterr().err


def test_the_shown_scripts_have_what_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slurm, "has_slurm", lambda: False)
    arguments = [
        "launch", "--dry-run", "where=slurm", "nodes=4", "gpus=8", "cpus=12", "mem=0",
        "account=lab", "partition=gpu", "qos=high", "constraint=h100", "exclude=n7", "hours=12",
        "container=eosin.sif", "setup=[module load cuda]", "sbatch={reservation: winter}",
        "--", "pretrain", "shards=a", "out=b", "--", "export", "run=b", "out=c",
    ]  # fmt: skip
    assert main(arguments) == 0
    first, second = capsys.readouterr().out.split("# export (1 job)")
    for words in (
        "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12", "--mem=0",
        "--account=lab", "--partition=gpu", "--qos=high", "--constraint=h100", "--exclude=n7",
        "--time=720", "--signal=USR2@300", "--requeue", "--reservation=winter",
    ):  # fmt: skip
        assert f"#SBATCH {words}\n" in first
    assert "module load cuda\nexport PYTHONPATH=" in first and "dependency" not in first
    assert "#SBATCH --dependency=afterok:JOB_1\n" in second and "--nodes=1\n" in second
    assert list(tmp_path.iterdir()) == []


def test_an_array_in_a_chain_waits_and_its_last_job_does_not_follow_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slurm, "has_slurm", lambda: False)
    for name in "abc":
        (tmp_path / f"{name}.svs").write_bytes(b"x")
    tile = ["tile", "slides=.", "out=tiles"]
    stages = "stages={tile-2: {array: 2}}"
    assert main(["launch", "--dry-run", "where=slurm", stages, "--", *tile, "--", *tile]) == 0
    first, array, last = capsys.readouterr().out.split("# tile")[1:]
    assert "dependency" not in first and "--array" not in first
    assert "--array=0-1%2\n" in array and "--dependency=afterok:JOB_1\n" in array
    assert "--dependency=afterok:JOB_1,afterany:JOB_2\n" in last and "--array" not in last
    assert "kill-on-invalid-dep=yes" in last


SUPERVISE = """
import sys
from eosin.launch.restarts import Limits
from eosin.launch.supervisor import Task
Task(arguments=["verb", *sys.argv[2:]], folder=sys.argv[1], limits=Limits(restarts=9, stuck=1),
     container=[sys.executable, sys.argv[1] + "/verb.py"])()
"""


@pytest.fixture
def supervise(tmp_path: Path) -> Callable[..., tuple[int, list[str]]]:
    """Runs a supervisor beside a scontrol that writes down what it is asked."""
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(
        f'#!/bin/sh\\nset -- "$@"\\ncase "$*" in\\n*show*) cat {tmp_path}/state;;\\n'
        f'*requeue*) echo "$*" >> {tmp_path}/asked; echo JobState=PENDING > {tmp_path}/state;;\\n'
        f'*) echo "$*" >> {tmp_path}/asked;;\\nesac\\n'.replace("\\n", "\n")
    )
    scontrol.chmod(0o755)

    def run(
        verb: str, restart: int = 0, state: str = "RUNNING", ranks: int = 1
    ) -> tuple[int, list[str]]:
        (tmp_path / "verb.py").write_text(f"import os, signal, sys, time\n{verb}\n")
        (tmp_path / "state").write_text(f"JobId=7 JobState={state} ExcNodeList=n3\n")
        (tmp_path / "asked").write_text("")
        env = os.environ | {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
            "SLURM_PROCID": "0", "SLURM_NTASKS": str(ranks), "SLURM_JOB_NUM_NODES": "1",
            "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_RESTART_COUNT": str(restart), "SLURMD_NODENAME": "n1",
        }  # fmt: skip
        command = [sys.executable, "-c", SUPERVISE, str(tmp_path), f"out={tmp_path}/run"]
        done = subprocess.run(command, env=env, check=False, timeout=60)
        return done.returncode, (tmp_path / "asked").read_text().splitlines()

    return run


def test_the_supervisor_queues_again_what_was_interrupted_and_fails_what_failed(
    supervise: Callable[..., tuple[int, list[str]]], tmp_path: Path
) -> None:
    assert supervise("pass") == (0, [])
    assert supervise("sys.exit(2)") == (2, ["update JobId=7 Requeue=0"])
    assert supervise("sys.exit(75)") == (75, ["requeue 7"])
    assert supervise("sys.exit(75)", state="COMPLETING") == (75, [])  # cancelled
    excluding = "open(os.environ['EOSIN_EXCLUDE_FILE'], 'w').write('n1'); sys.exit(75)"
    (tmp_path / "excluded").mkdir()
    code, asked = supervise(excluding, restart=1)
    assert (code, asked[0]) == (75, "requeue 7") and asked[1].startswith("update JobId=7 ExcNode")
    outcome = json.loads((tmp_path / "outcomes" / "7" / "0.json").read_text())
    assert outcome["reason"] == "found bad nodes (n1); the job is queued again"


def test_the_supervisor_passes_signals_on_once_and_sees_a_crash_loop(
    supervise: Callable[..., tuple[int, list[str]]], tmp_path: Path
) -> None:
    asked = (
        "got = []\n"
        "signal.signal(signal.SIGUSR2, lambda n, f: got.append(n))\n"
        "os.kill(os.getppid(), signal.SIGUSR2)\n"
        "time.sleep(0.5); time.sleep(0.5)\n"
        "sys.exit(75 if len(got) == 1 and os.getpgid(0) != os.getpgid(os.getppid()) else 1)"
    )
    for restart in range(2):  # asked to end: no crash, however often
        assert supervise(asked, restart) == (75, ["requeue 7"])
    crash = "os.kill(os.getpid(), signal.SIGKILL)"
    assert supervise(crash, 2) == (75, ["requeue 7"])
    assert supervise(crash, 3) == (1, ["update JobId=7 Requeue=0"])
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
    assert supervise(crash, 3) == (75, ["requeue 7"])


def test_a_rank_that_ended_before_its_own_signal_came_has_not_crashed(
    supervise: Callable[..., tuple[int, list[str]]], tmp_path: Path
) -> None:
    """Ranks agree to stop when the first of them is told to; the others hear of it later."""
    late = (
        "import subprocess\n"
        "subprocess.Popen(['sh', '-c', f'sleep 1.5; kill -TERM {os.getppid()}'])\n"
        "sys.exit(75)"
    )
    assert supervise(late, ranks=2) == (75, ["requeue 7"])
    assert supervise("sys.exit(75)", restart=1, ranks=2) == (75, ["requeue 7"])
    records = [json.loads((tmp_path / f"restarts/7_000{n}.json").read_text()) for n in (0, 1)]
    assert [record["crash"] for record in records] == [False, True]


def test_status_tells_jobs_apart_without_accounting(tmp_path: Path) -> None:
    def job(slurm_id: str, stage: str, tasks: list[str] | None = None) -> Job:
        tasks = tasks or [slurm_id]
        return Job(stage=stage, title="x", slurm_id=slurm_id, tasks=tasks, ranks=1, arguments=[])

    write_jobs(
        tmp_path, [job("1", "tile", ["1_0", "1_1", "1_2"]), job("2", "pretrain"), job("3", "eval")]
    )
    for task, what in (("1_0", "done"), ("1_1", "failed"), ("2", "done")):
        note = {"what": what, "reason": "failed (exit code 1)", "node": "n1", "restart": 0}
        (tmp_path / "outcomes" / task).mkdir(parents=True)
        (tmp_path / "outcomes" / task / "0.json").write_text(json.dumps(note))
    queued = {
        "1_2": slurm.Queued("1_2", "RUNNING", "None", "n2"),
        "3": slurm.Queued("3", "PENDING", "Dependency", ""),
    }
    assert describe(tmp_path, queued).splitlines() == [
        "1  tile (x): 1 done, 1 failed, 1 running",
        "    1_1: failed · failed (exit code 1) (on n1)",
        "2  pretrain: done",
        "3  eval: pending · Dependency",
    ]
    assert "3  eval: gone · never started" in describe(tmp_path, {})
    with pytest.raises(InputError, match="no folder of a launch"):
        describe(tmp_path / "nowhere", {})


def test_a_copy_of_the_code_runs_and_knows_its_commit(tmp_path: Path) -> None:
    commit = copy_code(tmp_path / "code")
    assert commit == (read_commit() or "unknown (not a checkout)")
    script = "import eosin.launch.snapshot as s; print(s.__file__, s.read_commit())"
    env = os.environ | {"PYTHONPATH": str(tmp_path / "code"), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", script]
    said = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert said.strip() == f"{tmp_path}/code/eosin/launch/snapshot.py {commit}"


def test_without_slurm_a_chain_runs_here_and_stops_at_a_failure(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tile failed \(exit code 2\)"):
        from eosin.launch.submit import launch

        command = [
            "tile",
            "slides=nowhere",
            f"out={tmp_path}/a",
            "--",
            "tile",
            "slides=nowhere",
            f"out={tmp_path}/b",
        ]
        launch(LaunchConfig(where="local", command=command))
    assert list(tmp_path.iterdir()) == []
