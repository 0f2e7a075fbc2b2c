"""Memory that a step frees stays with the process."""

import resource
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, sys, torch
from eosin.launch.host_memory import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit("no such malloc")

def step():
    kept = [torch.ones(3_000_000) for _ in range(8)]  # 12 MB each: larger ones are always mapped
    kept += [torch.ones(12_000_000)]

for _ in range(4):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 5)
"""


def faults_a_step(mode: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS, mode], capture_output=True, text=True, check=False
    )
    if "no such malloc" in done.stderr:
        pytest.skip("this system's malloc has no such option")
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_steps_page_in_no_memory_that_they_had_before() -> None:
    page = resource.getpagesize()
    assert faults_a_step("give back") > 40e6 / page
    assert faults_a_step("keep") < 1e6 / page
