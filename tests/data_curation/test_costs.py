"""The costs of a curation: measured in all processes, charged once, kept through a kill."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from eosin.configs.errors import InputError
from eosin.data_curation.costs import COSTS_NAME, StageCost, charged, cost_lines, read_costs
from eosin.data_curation.worker_pool import run_jobs
from eosin.launch.artefacts import mark_done


def burn(seconds: float) -> float:
    """Keeps one core busy for so much of its own processor time."""
    while time.process_time() < seconds:
        pass
    return seconds


def test_the_time_of_workers_is_counted_whatever_their_number(tmp_path: Path) -> None:
    marker, job = tmp_path / "stage.json", range(30_000_000)
    started = time.process_time()
    sum(job)
    alone_s = time.process_time() - started
    with charged(tmp_path, "stage", marker, lambda: 7):
        for _ in run_jobs(sum, [job, job], workers=2):
            pass
        mark_done(marker, "a")
    cost = read_costs(tmp_path)["stage"]
    assert cost.items == 7 and cost.stamp == "a"
    assert 1.2 * alone_s < cost.core_s < 4 * alone_s + 10  # both, and the start of two processes
    assert cost.core_h_per_million == pytest.approx(cost.core_s / 7 * 1e6 / 3600)


def test_a_stage_with_nothing_to_do_is_charged_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "stage.json"
    with charged(tmp_path, "stage", marker, lambda: 1):
        mark_done(marker, "a")
    before = (tmp_path / COSTS_NAME).read_bytes()
    with charged(tmp_path, "stage", marker, lambda: pytest.fail("asked for nothing")):
        burn(time.process_time() + 0.05)
    assert (tmp_path / COSTS_NAME).read_bytes() == before


def test_a_stage_that_failed_and_went_on_is_charged_for_both_parts(tmp_path: Path) -> None:
    marker = tmp_path / "stage.json"
    with pytest.raises(ZeroDivisionError), charged(tmp_path, "stage", marker, lambda: 1):
        burn(time.process_time() + 0.3)
        _ = 1 / 0
    assert read_costs(tmp_path)["stage"].items == 0
    assert cost_lines(read_costs(tmp_path)) == []
    with charged(tmp_path, "stage", marker, lambda: 3):
        burn(time.process_time() + 0.3)
        mark_done(marker, "a")
    assert 0.6 <= read_costs(tmp_path)["stage"].core_s < 2
    with charged(tmp_path, "stage", marker, lambda: 3):
        mark_done(marker, "b")  # done anew, with other inputs
    assert read_costs(tmp_path)["stage"].core_s < 0.3


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    (tmp_path / COSTS_NAME).write_text('{"stages": {"tile": {"core_s": 1}}}')
    with pytest.raises(InputError, match=COSTS_NAME):
        read_costs(tmp_path)


def test_lines_give_core_hours_a_million(tmp_path: Path) -> None:
    costs = {"tile": StageCost(core_s=36.0, wall_s=20.0, items=10_000, stamp="a")}
    head, line = cost_lines(costs)
    assert " ".join(line.split()) == "tile 36.0 core-s for 10,000 tiles 1.00 core-h a million"
    assert head.startswith("curate")


def test_children_that_are_not_ours_do_not_hold_it_up(tmp_path: Path) -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    try:
        started = time.monotonic()
        with charged(tmp_path, "stage", tmp_path / "stage.json", lambda: 1):
            pass
        assert time.monotonic() - started < 5
    finally:
        sleeper.kill()
        sleeper.wait()
