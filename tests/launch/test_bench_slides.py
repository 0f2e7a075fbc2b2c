"""The bench of slides: both sides compute one loss, whatever the padding; rows are reported."""

import json
from pathlib import Path

import pytest
import torch

from eosin.launch.bench_slides import BenchSlidesConfig, bench_slides, sides

TINY = {"width": 16, "depth": 2, "heads": 2, "prototypes": 32, "dim": 6, "global_tiles": 6,
        "local_tiles": 4, "n_local": 1, "repeats": 1}  # fmt: skip


def test_both_sides_have_one_loss() -> None:
    config = BenchSlidesConfig(**TINY, batch_size=3)  # type: ignore[arg-type]
    ours, padded = sides(config, torch.device("cpu"), torch.float32)
    assert len(padded.batch.stream.position) > len(ours.batch.stream.position)
    assert ours.step().item() == pytest.approx(padded.step().item(), rel=1e-5)


def test_the_bench_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_slides(BenchSlidesConfig(**TINY, json=tmp_path / "rows.json", device="cpu"))  # type: ignore[arg-type]
    [row] = json.loads((tmp_path / "rows.json").read_text())
    assert row["name"] == "slides step" and row["ours"] > 0 and row["baseline"] > 0
    assert "9.4 slides/s" in capsys.readouterr().out
