"""The cluster of the tests in this folder: started once, ended with the session."""

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from slurm.two_nodes import PROGRAMS, Cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons want to be root here")
    if not all(map(shutil.which, PROGRAMS)) and "CI" in os.environ and shutil.which("apt-get"):
        for command in (["update"], ["install", "-y", "slurm-wlm", "munge"]):
            env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
            subprocess.run(["apt-get", "-qq", *command], check=False, env=env)
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here (apt-get install slurm-wlm munge)")
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        made.start()
        yield made
    finally:
        made.stop()
