"""status.json: when it is written, what a poller sees, and what it never sees."""

import json
import socket
import threading
from datetime import datetime
from pathlib import Path

import pytest

from eosin.configs.errors import InputError
from eosin.launch.process import World
from eosin.launch.status import INTERVAL_S, Status, read_status

T0 = 1_700_000_000.0  # 2023-11-14T22:13:20 UTC


class Clock:
    now = T0

    def __call__(self) -> float:
        return self.now


def content(folder: Path) -> dict[str, object]:
    value: dict[str, object] = json.loads((folder / "status.json").read_text())
    return value


def test_it_is_written_at_each_change_of_state_and_else_every_few_seconds(tmp_path: Path) -> None:
    clock = Clock()
    status = Status(tmp_path, World(), clock)
    assert content(tmp_path)["state"] == "starting"
    assert content(tmp_path)["hosts"] == [socket.gethostname()]
    status.update(state="training", steps=100)
    status.update(step=1, loss=2.5)
    assert content(tmp_path)["state"] == "training" and content(tmp_path)["step"] == 0
    clock.now += INTERVAL_S
    status.update(step=2, loss=2.0)
    assert content(tmp_path)["step"] == 2 and content(tmp_path)["loss"] == 2.0
    status.update(step=3)
    status.update(state="checkpointing")
    assert content(tmp_path)["step"] == 3
    status.update(state="finished", reason="all steps are done")
    assert content(tmp_path)["reason"] == "all steps are done"


def test_times_follow_from_what_is_said(tmp_path: Path) -> None:
    clock = Clock()
    status = Status(tmp_path, World(), clock)
    clock.now += 10
    status.update(state="training", seconds_left=3600.0, checkpoint_step=40)
    clock.now += 20
    status.update(step=41, checkpoint_step=40, seconds_left=float("nan"))
    shown = read_status(tmp_path)
    assert shown is not None
    assert shown.started == "2023-11-14T22:13:20+00:00"
    assert shown.checkpoint_time == "2023-11-14T22:13:30+00:00"
    assert shown.updated == "2023-11-14T22:13:50+00:00"
    assert shown.eta is None and shown.seconds_left is None
    clock.now += 20
    status.update(seconds_left=50.0)
    assert datetime.fromisoformat(str(content(tmp_path)["eta"])).timestamp() == clock.now + 50


def test_what_is_no_number_in_json_is_null(tmp_path: Path) -> None:
    status = Status(tmp_path, World(), Clock())
    status.update(state="failed", loss=float("nan"), mfu=float("inf"))
    text = (tmp_path / "status.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert content(tmp_path)["loss"] is None


def test_an_unknown_field_or_state_is_refused(tmp_path: Path) -> None:
    status = Status(tmp_path, World(), Clock())
    with pytest.raises(TypeError, match="lost"):
        status.update(lost=1.0)
    with pytest.raises(ValueError, match="no state 'pausing'"):
        status.update(state="pausing")


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    Status(tmp_path, World(rank=1, size=2), Clock()).update(state="training")
    assert not list(tmp_path.iterdir()) and read_status(tmp_path) is None


def test_a_folder_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").write_text("a file, so that nothing can be put below it")
    status = Status(tmp_path / "run", World(), Clock())
    status.update(state="training")
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    for text in ("[1]", "{", '"x"'):
        (tmp_path / "status.json").write_text(text)
        with pytest.raises(InputError, match=r"status\.json is not a status"):
            read_status(tmp_path)


def _write_many(folder: Path) -> None:
    status = Status(folder, World())
    for step in range(60):
        status.update(state=("training", "checkpointing")[step % 2], step=step, alarms=["x" * 500])


def test_a_poller_never_reads_half_a_file(tmp_path: Path) -> None:
    writer = threading.Thread(target=_write_many, args=(tmp_path,))
    writer.start()
    seen = set()
    while writer.is_alive():
        if (shown := read_status(tmp_path)) is not None:
            seen.add(shown.step)
    writer.join()
    assert len(seen) > 3
    last = read_status(tmp_path)
    assert last is not None and last.step == 59
