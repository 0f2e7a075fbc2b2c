"""`eosin doctor` from end to end, and how its findings are shown."""

import io
import json
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from eosin.launch import checks_disk
from eosin.launch import doctor as doctor_module
from eosin.launch.checks import Check, Finding
from eosin.launch.cli import main
from eosin.launch.doctor import CHECKS, plain_lines, show, summary

QUICK = tuple(check for check in CHECKS if check.area in ("machine", "disk", "Slurm"))
ROWS = [
    Finding("machine", "cores", "2 of 2", choice="2 workers"),
    Finding("machine", "memory", "1 GiB", verdict="mend", advice="ask for more"),
    Finding("disk", "free", "9 GB on ext4, /müller", verdict="note", advice="make room"),
]


def test_rows_are_shown_by_area_with_what_to_do() -> None:
    text = "\n".join(plain_lines(ROWS))
    assert text.splitlines() == [
        "machine",
        "  ok    cores   2 of 2",
        "                eosin takes: 2 workers",
        "  mend  memory  1 GiB",
        "                → ask for more",
        "disk",
        "  note  free    9 GB on ext4, /müller",
        "                → make room",
    ]
    assert summary(ROWS) == "1 ok, 1 to note, 1 to mend"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_without_utf_8_gets_the_rows_too(encoding: str) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    show(ROWS, stream)
    stream.flush()
    assert b"cores" in raw.getvalue() and b"make room" in raw.getvalue()


def test_a_terminal_gets_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(stream, "isatty", lambda: True)
    show(ROWS, stream)
    stream.seek(0)
    text = stream.read()
    assert "cores" in text and "→ ask for more" in text and text.count("machine") == 1


def test_the_command_prints_and_writes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor_module, "CHECKS", QUICK)
    file = tmp_path / "doctor.json"
    assert main(["doctor", f"folder={tmp_path}", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    rows = [Finding(**row) for row in json.loads(file.read_text())["findings"]]
    assert [row.area for row in rows] == sorted(
        (row.area for row in rows), key=[check.area for check in QUICK].index
    )
    assert {row.area for row in rows} == {"machine", "disk", "Slurm"}
    assert str(tmp_path) in text and "to mend; looked for" in text
    assert "\n".join(plain_lines(rows)) in text


def test_something_to_mend_is_exit_code_1_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Check("devices", "no_such_module")
    monkeypatch.setattr(doctor_module, "CHECKS", (*QUICK[:1], broken))
    assert main(["doctor", f"folder={tmp_path}"]) == 1
    said = capsys.readouterr()
    assert "no_such_module" in said.out and "cores" in said.out
    assert said.err.strip() == "eosin: to be mended: devices, this check"


def test_a_full_disk_is_said(small_disk: Callable[[float], Path]) -> None:
    folder = small_disk(1)
    with (folder / "filler").open("wb", buffering=0) as filler, suppress(OSError):
        while filler.write(b"x" * 4096):
            pass
    room, writing = checks_disk.check(folder)
    assert room.verdict == "mend" and "tmpfs" in room.found
    assert writing.verdict == "mend" and "it is full" in writing.found
    assert [path.name for path in folder.iterdir()] == ["filler"]


@pytest.mark.slow
def test_this_machine_has_nothing_to_mend(
    tmp_path: Path, run_eosin: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    file = tmp_path / "doctor.json"
    done = run_eosin(
        "doctor", f"folder={tmp_path}", "limit_s=300", "--json", str(file), deadline_s=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    rows = [Finding(**row) for row in json.loads(file.read_text())["findings"]]
    assert {row.area for row in rows} == {check.area for check in CHECKS}
    names = {(row.area, row.name): row for row in rows}
    assert not [row for row in rows if row.name == "this check"]
    assert "right to" in names["kernels", "attention sdpa"].found
    assert "all-reduce" in names["processes", "gloo"].found
    assert "read back" in names["images", "slides"].found
