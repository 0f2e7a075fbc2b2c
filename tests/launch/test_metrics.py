"""Figures by step, without gap or repeat, wherever they are kept."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from eosin.configs.errors import ConfigError
from eosin.launch.metrics import Metrics
from eosin.launch.process import World


@dataclass(frozen=True, kw_only=True)
class Config:
    lr: float = 0.1


def test_lines_from_the_resumed_step_on_are_dropped_and_a_broken_one_too(tmp_path: Path) -> None:
    with Metrics(tmp_path, 0, Config()) as metrics:
        for step in range(5):
            metrics.write(step, {"loss": step / 2})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    with Metrics(tmp_path, 3, Config()) as metrics:
        metrics.write(3, {"loss": 9.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert lines[-1]["loss"] == 9.0


def test_other_ranks_keep_nothing(tmp_path: Path) -> None:
    with Metrics(tmp_path, 0, Config(), tensorboard=True, world=World(rank=1, size=2)) as metrics:
        metrics.write(0, {"loss": 1.0})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_what_is_not_installed_is_named_with_what_to_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    wanted = {"tensorboard": True} if name == "tensorboard" else {"wandb": "offline"}
    with pytest.raises(ConfigError, match=rf"{name}=.* pip install 'eosin\[{name}\]'"):
        Metrics(tmp_path, 0, Config(), **wanted)


def scalars(folder: Path) -> list[tuple[int, float]]:
    """What TensorBoard itself reads."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    return [(event.step, event.value) for event in read.Scalars("loss")]


WRITER = """
import os, signal, sys
from pathlib import Path
from eosin.launch.metrics import Metrics
folder, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
metrics = Metrics(folder, first, None, tensorboard=True)
for step in range(first, last + 1):
    metrics.write(step, {"loss": 100 * first + step})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_tensorboard_shows_every_step_once_when_a_writer_was_killed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    command = [sys.executable, "-c", WRITER, str(tmp_path), "1", "6"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    (first,) = (tmp_path / "tensorboard").iterdir()
    first.write_bytes(first.read_bytes()[:-7])  # half of step 6's record
    time.sleep(1.1)  # event files are read in the order of their names, which count seconds
    with Metrics(tmp_path, 4, None, tensorboard=True) as metrics:
        for step in (4, 5, 6):
            metrics.write(step, {"loss": 400 + step})
    expected = [(1, 101), (2, 102), (3, 103), (4, 404), (5, 405), (6, 406)]
    assert scalars(tmp_path / "tensorboard") == expected
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == expected


@pytest.mark.slow
def test_wandb_goes_on_with_the_same_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    script = "import sys; from pathlib import Path; from eosin.launch.metrics import Metrics\n"
    script += "from tests_config import Config\n"
    (tmp_path / "tests_config.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Config:\n    lr: float = 0.1\n"
    )
    script += "first = int(sys.argv[1])\n"
    script += "with Metrics(Path('run'), first, Config(), wandb='offline') as metrics:\n"
    script += "    metrics.write(first, {'loss': 1.0}); print('ID', metrics._records[0]._run.id)\n"
    (tmp_path / "run").mkdir()
    ids = []
    for first in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", script, first], cwd=tmp_path, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        ids += [line for line in done.stdout.splitlines() if line.startswith("ID")]
    assert len(ids) == 2 and ids[0] == ids[1]
    folders = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len({folder.name.rpartition("-")[2] for folder in folders}) == 1
