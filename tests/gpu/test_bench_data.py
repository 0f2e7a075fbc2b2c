"""On a GPU: the bench of the data path renders and transfers there."""

import json
from pathlib import Path

import pytest
import torch

from eosin.configs.load import load_config
from eosin.launch.bench_data import BenchDataConfig, bench_data

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),  # of webdataset
]


def test_the_device_renders_faster_than_a_core(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "data.json"
    settings = ["device=cuda", "repeats=2", "seconds=0.1", "warmup=3", f"json={file}"]
    bench_data(load_config(BenchDataConfig, [], settings))
    rows = {row["name"]: row for row in json.loads(file.read_text())}
    rendered = rows["crops device 256px 2x224+8x98"]
    assert rendered["ratio"] > 10  # a GPU against a core
    transfer = rows["stage transfer 256px 2x224+8x98"]
    assert transfer["ours"] > 0 and transfer["ratio"] > 1  # bytes, where the baseline has floats
    assert ", cuda, " in capsys.readouterr().out
