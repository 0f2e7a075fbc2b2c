"""Preflight: a slow and a broken node are named on every rank, and kept out when asked."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from eosin.launch.preflight import Finding, judge

NAN = float("nan")


def finding(node: str, tflops: float = 1.0, link: float = 1.0, read: float = 1.0) -> Finding:
    return Finding(node=node, matmul_tflops=tflops, link_gb_s=link, read_mb_s=read)


def test_a_node_is_judged_by_its_slowest_rank_against_the_median_node() -> None:
    even = [finding(f"n{i}") for i in range(4) for _ in range(2)]
    assert judge(even, NAN, 0.6).slow == {}
    verdict = judge([*even, finding("n4", tflops=1.1), finding("n4", tflops=0.5)], NAN, 0.6)
    assert list(verdict.slow) == ["n4"]
    assert "0.5 TFLOP/s where the median is 1" in verdict.slow["n4"]
    assert judge([*even, finding("n4", tflops=0.65)], NAN, 0.6).slow == {}


def test_what_was_not_measured_is_not_held_against_anyone() -> None:
    verdict = judge([finding("n0", link=NAN), finding("n1", link=NAN)], NAN, 0.6)
    assert verdict.slow == {} and "other nodes" not in verdict.text


def test_a_broken_node_is_named_and_does_not_move_the_median() -> None:
    broken = Finding(node="n9", broken="no such file")
    verdict = judge([finding("n0"), finding("n1"), broken], NAN, 0.6)
    assert verdict.broken == {"n9": "no such file"} and verdict.slow == {}
    assert "n9: no such file" in verdict.text


RANK = """
import os, sys, time, torch
from eosin.configs.errors import EosinError
from eosin.launch.preflight import PreflightConfig, preflight
from eosin.launch.process import join_world
torch.set_num_threads(1)
what, exclude = sys.argv[1], sys.argv[2] == "exclude"
def read():
    bad = os.environ["SLURMD_NODENAME"] == "n2"
    if bad and what == "broken":
        raise OSError("stale file handle")
    time.sleep(0.5 if bad and what == "slow" else 0.01)
    return 1_000_000
config = PreflightConfig(matmul=512, exchange_mb=8, slow=0.1, exclude=exclude)
with join_world(torch.device("cpu"), 60) as world:
    try:
        verdict = preflight(world, torch.device("cpu"), read, config)
        print("fine", list(verdict.slow), verdict.all_reduce_gb_s > 0,
              all(f.link_gb_s > 0 for f in verdict.nodes))
    except EosinError as error:
        print(error.exit_code, error)
"""


def run_ranks(what: str, exclude: str, file: Path) -> list[str]:
    """What each of three processes says, each taking itself for a node of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, what, exclude], stdout=subprocess.PIPE, text=True,
            env=os.environ | {
                "RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "SLURMD_NODENAME": f"n{rank}", "EOSIN_EXCLUDE_FILE": str(file),
            },
        )
        for rank in range(3)
    ]  # fmt: skip
    return [child.communicate(timeout=120)[0].strip().splitlines()[-1] for child in children]


@pytest.mark.parametrize("what", ["slow", "broken"])
def test_a_bad_node_is_excluded_where_asked(what: str, tmp_path: Path) -> None:
    said = run_ranks(what, "exclude", tmp_path / "excluded.txt")
    assert all(line.startswith("75 preflight of 3 nodes") and "n2: " in line for line in said)
    assert (tmp_path / "excluded.txt").read_text() == "n2\n"


def test_a_slow_node_is_only_named_and_a_broken_one_ends_the_run_where_not_asked(
    tmp_path: Path,
) -> None:
    assert run_ranks("slow", "no", tmp_path / "file") == ["fine ['n2'] True True"] * 3
    said = run_ranks("broken", "no", tmp_path / "file")
    assert all(line.startswith("1 ") and "exclude=n2" in line for line in said), said
    assert not (tmp_path / "file").exists()
