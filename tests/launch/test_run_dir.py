"""Configs of a run; devices; artefacts; progress lines."""

import io
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from eosin.configs.errors import ConfigError, InputError
from eosin.launch.artefacts import (
    file_digest,
    is_done,
    mark_done,
    replacing,
    replacing_folder,
    stamp_of,
    write_bytes,
    write_text,
)
from eosin.launch.process import choose_device, choose_precision
from eosin.launch.progress import Meter, StepMeter, format_seconds
from eosin.launch.run_dir import changes_since, record_run


@dataclass(frozen=True, kw_only=True)
class Config:
    lr: float = 0.1
    threads: int = 1


def test_a_changed_config_is_told_with_the_difference(tmp_path: Path) -> None:
    record_run(tmp_path, Config())
    assert changes_since(tmp_path, Config(threads=4), frozenset({"threads"})) == []
    changed = Config(lr=0.2, threads=4)
    assert changes_since(tmp_path, changed, frozenset({"threads"})) == ["lr: 0.1 → 0.2"]
    assert "torch" in (tmp_path / "environment.json").read_text()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_marker_counts_only_with_its_stamp(tmp_path: Path) -> None:
    marker, stamp = tmp_path / "done.json", stamp_of(format=1, mpp=0.5)
    assert not is_done(marker, stamp)
    mark_done(marker, stamp, tiles=3)
    assert is_done(marker, stamp) and not is_done(marker, stamp_of(format=2, mpp=0.5))
    marker.write_bytes(b"\xff half")
    assert not is_done(marker, stamp)


def test_a_digest_is_of_the_content(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"x" * 3_000_000)
    write_bytes(tmp_path / "b", b"x" * 3_000_000)
    assert file_digest(tmp_path / "a") == file_digest(tmp_path / "b")
    write_bytes(tmp_path / "b", b"x" * 2_999_999 + b"y")
    assert file_digest(tmp_path / "a") != file_digest(tmp_path / "b")


def test_a_device_that_is_not_there_is_refused() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device=cuda"):
            choose_device("cuda")
        assert choose_device("auto").type == "cpu"
    assert choose_precision("auto", torch.device("cpu")) is torch.float32
    assert choose_precision("bf16", torch.device("cpu")) is torch.bfloat16


def test_progress_prints_plain_lines_with_rate_and_time_left() -> None:
    stream = io.StringIO()
    with Meter("tile", 10, "slides", done=4, stream=stream) as meter:
        for name in "abcdef":
            meter.advance(note=name)
    (line,) = stream.getvalue().splitlines()
    assert re.fullmatch(r"tile: 10/10 slides · [\d.]+ slides/s · 0s left · f", line)
    assert [format_seconds(s) for s in (5, 190, 7500)] == ["5s", "3m10s", "2h05m"]


def test_a_training_shows_its_figures_in_one_line_that_fits_a_terminal() -> None:
    stream = io.StringIO()
    with StepMeter("pretrain", 125_000, done=99_998, stream=stream) as meter:
        meter.advance()
        meter.figures = {
            "mfu": 0.4321, "tiles_per_s": 12_345.6, "loss": 10.12345, "data_wait": 0.021,
            "memory_gib": 61.23, "lr": 1e-3,
        }  # fmt: skip
        meter.advance()
    (line,) = stream.getvalue().splitlines()
    assert len(line) <= 120
    assert re.fullmatch(
        r"pretrain: step 100000/125000 · loss 10\.123 · 12346 tiles/s · MFU 43\.2% · "
        r"data wait 2% · 61\.2 GiB · \w+ left",
        line,
    )


def test_the_time_left_of_a_training_does_not_count_its_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("eosin.launch.progress.time.monotonic", lambda: now[0])
    with StepMeter("pretrain", 100, stream=io.StringIO()) as meter:
        for seconds in (60.0, 2.0, 2.0):  # a step that compiles, then two that do not
            now[0] += seconds
            meter.advance()
        assert meter.seconds_left() == pytest.approx(97 * 2)


def test_ranks_that_do_not_lead_print_nothing() -> None:
    stream = io.StringIO()
    with StepMeter("pretrain", 2, stream=stream, shown=False) as meter:
        meter.advance(2)
    assert stream.getvalue() == ""


def test_a_folder_is_replaced_only_by_its_own_kind(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    for content in ("one", "two"):
        with replacing_folder(folder, "MARK") as partial:
            (partial / "file").write_text(content)
            (partial / "MARK").write_text("")
    assert (folder / "file").read_text() == "two"
    with pytest.raises(RuntimeError), replacing_folder(folder, "MARK") as partial:
        (partial / "file").write_text("half")
        raise RuntimeError
    assert (folder / "file").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "slide.svs").write_text("x")
    for other in (tmp_path / "precious", tmp_path / "precious" / "slide.svs"):
        with pytest.raises(InputError, match="not replaced"), replacing_folder(other, "MARK"):
            pass
    assert (tmp_path / "precious" / "slide.svs").is_file()
