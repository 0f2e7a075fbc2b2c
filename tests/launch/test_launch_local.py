"""`eosin launch` without Slurm: two processes under torch's agent, one of them killed."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import pytest

from eosin.data_curation.shards import ShardConfig, shard

TINY = [
    "batch_size=4", "group_size=2", "threads=1", "log_every=1", "checkpoints.every=10",
    "model={width: 32, depth: 2, heads: 2, patch_px: 8, image_px: 32, drop_path: 0.5}",
    "objective.head={prototypes: 32, hidden: 16, bottleneck: 8}",
    "augment={global_px: 32, local_px: 16, n_local: 2}", "device=cpu", "steps=300",
]  # fmt: skip


def ranks_below(parent: int) -> list[int]:
    """The processes that the agent started."""
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            stat = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            if int(stat[1]) == parent and b"pretrain" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return sorted(found)


@pytest.mark.slow
def test_a_killed_rank_ends_all_and_all_are_started_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "tiles").mkdir()
    for i in range(12):
        image = cv2.resize(rng.integers(0, 255, (6, 6, 3), np.uint8), (48, 48))
        cv2.imwrite(str(tmp_path / "tiles" / f"{i}.png"), image)
    shard(ShardConfig(images=tmp_path / "tiles", out=tmp_path / "shards", workers=1))
    run = tmp_path / "run"
    launched = subprocess.Popen(
        [
            sys.executable, "-m", "eosin.launch.cli", "launch", "where=local", "tasks=2", "--",
            "pretrain", f"shards={tmp_path}/shards", f"out={run}", *TINY,
            "--", "export", f"run={run}", f"out={tmp_path}/encoder",
        ],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not list(run.glob("checkpoints/step_*")):
            assert launched.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        first = ranks_below(launched.pid)
        assert len(first) == 2
        os.kill(first[1], signal.SIGKILL)
        said = launched.communicate(timeout=240)[0]
    finally:
        launched.kill()
    assert launched.returncode == 0, said
    assert "eosin: pretrain was killed (SIGKILL); start 2" in said
    assert json.loads((run / "environment.json").read_text())
    logged = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert logged == list(range(1, 301))
    assert (tmp_path / "encoder" / "SHA256SUMS").is_file()
