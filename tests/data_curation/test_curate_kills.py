"""Fifty kills anywhere in a whole `eosin curate`, all its stages on: the same bytes as without."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eosin.data_curation.costs import COSTS_NAME
from eosin.data_curation.synthetic import SyntheticConfig, write_slides

KILLS = 50
STAGES = [
    "tile.mpp=1.0", "tile.size_px=128", "tile.workers=2", "embed.encoder=builtin:stain-texture",
    "cluster.levels=[12,4]", "sample.total=160", "shard.records_per_shard=40", "shard.workers=2",
    "without_duplicates=true", "split.part=train",
]  # fmt: skip


def start(slides: Path, out: Path) -> subprocess.Popen[bytes]:
    """`eosin curate` as the leader of a group of processes."""
    command = [sys.executable, "-m", "eosin.launch.cli", "curate"]
    return subprocess.Popen(
        [*command, f"slides={slides}", f"out={out}", *STAGES],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != COSTS_NAME
    }


@pytest.mark.slow
def test_fifty_kills_leave_the_bytes_of_a_run_without(tmp_path: Path) -> None:
    slides, out = tmp_path / "slides", tmp_path / "out"
    write_slides(slides, SyntheticConfig(n_slides=4, size_px=1024, seed=5), workers=2)
    started = time.monotonic()
    whole = start(slides, out)
    _, said = whole.communicate()
    assert whole.returncode == 0, said.decode()
    whole_s = time.monotonic() - started
    expected = contents(out)
    assert {"tiles.parquet", "selection.parquet", "features/features.npy"} <= expected.keys()
    assert any(name.startswith("clusters/") for name in expected)
    assert {"duplicates.parquet", "prints/features.npy"} <= expected.keys()
    chance, kills, finished = random.Random(0), 0, 0
    shutil.rmtree(out)
    while kills < KILLS or not finished:
        process = start(slides, out)
        try:
            # Half of them soon: a command that goes on has less to do, and start is a moment too.
            process.wait(chance.uniform(0, whole_s) * chance.choice((0.5, 1.0)))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        _, said = process.communicate()
        assert process.returncode == 0, said.decode()
        assert contents(out) == expected
        finished += 1
        shutil.rmtree(out)
    if out.exists():  # after the last kill
        process = start(slides, out)
        _, said = process.communicate()
        assert process.returncode == 0, said.decode()
        assert contents(out) == expected
