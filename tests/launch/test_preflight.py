"""Preflight: a slow and a broken node are named on every rank, and kept out when asked."""

import os
import socket
import subprocess
import sys
from pathlib import Path

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
def reader(what):
    def read():
        bad = os.environ["SLURMD_NODENAME"] == "n2"
        if bad and what == "broken":
            raise OSError("stale file handle")
        time.sleep(1.0 if bad and what == "slow" else 0.001)
        return 1_000_000
    return read
with join_world(torch.device("cpu"), 120) as world:
    for what in ("slow", "broken"):
        for exclude in (False, True):
            os.environ["EOSIN_EXCLUDE_FILE"] = f"{sys.argv[1]}/{what}_{exclude}"
            config = PreflightConfig(matmul=512, exchange_mb=8, slow=0.02, exclude=exclude)
            try:
                verdict = preflight(world, torch.device("cpu"), reader(what), config)
                measured = all(f.link_gb_s > 0 < f.matmul_tflops for f in verdict.nodes)
                print("fine", list(verdict.slow), verdict.all_reduce_gb_s > 0, measured)
            except EosinError as error:
                print(error.exit_code, error)
"""


def test_three_nodes_come_to_one_verdict(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path)], stdout=subprocess.PIPE, text=True,
            env=os.environ | {
                "RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "SLURMD_NODENAME": f"n{rank}",
            },
        )
        for rank in range(3)
    ]  # fmt: skip
    for child in children:
        said = child.communicate(timeout=120)[0].splitlines()
        named, kept_out, ended, kept_out_too = (
            line for line in said if not line.startswith("preflight")
        )
        assert named == "fine ['n2'] True True"
        assert kept_out.startswith("75 preflight of 3 nodes") and "n2: 1 MB/s" in kept_out
        assert ended.startswith("1 ") and ended.endswith("n2: stale file handle; exclude=n2")
        assert kept_out_too.startswith("75 ") and "n2: stale file handle" in kept_out_too
    files = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert files == {"slow_True": "n2\n", "broken_True": "n2\n"}
