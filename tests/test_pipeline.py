"""The whole chain on synthetic slides, at toy size: every stage, once, and again for nothing."""

from pathlib import Path

import pytest

from eosin.eval.results import load_results
from eosin.launch.cli import main


def test_the_demo_goes_from_slides_to_a_report_and_reuses_what_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    command = [
        "demo", f"out={out}", "n_slides=10", "n_val=2", "n_test=4", "slide_px=2048", "steps=3",
    ]  # fmt: skip
    assert main(command) == 0, capsys.readouterr().err
    first = capsys.readouterr().out
    assert str(out / "report.html") in first
    results = load_results(out / "results.json")
    assert {record.kind for record in results.encoders} == {"encoder", "random", "floor"}
    assert results.task.groups["test"] == 4
    page = (out / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and page.count("data:image") >= 6
    assert (out / "encoder" / "model.safetensors").is_file()
    before = {p: p.stat().st_mtime_ns for p in (out / "run").rglob("*") if p.is_file()}
    kept = (out / "results.json").read_bytes()
    assert main(command) == 0
    second = capsys.readouterr().out
    assert "nothing to do" in second
    assert {p: p.stat().st_mtime_ns for p in (out / "run").rglob("*") if p.is_file()} == before
    assert (out / "results.json").read_bytes() == kept
