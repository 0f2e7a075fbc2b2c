"""A real Slurm of two one-core nodes on this machine, in a folder, with its own munge and ports."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

CONF = """\
ClusterName=eosin
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ReturnToService=2
KillWait=10
SlurmdTimeout=15
MaxArraySize=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=1000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE PriorityTier=10
"""
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged", "mungekey")
QUEUED_AGAIN_S = 4.0
"""A job that was queued again is started after this long."""


class Cluster:
    """Starts and stops the daemons, and asks Slurm what the tests want to know."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self._waiting: dict[str, float] = {}
        """Jobs that were queued again and wait for their time, and since when."""
        self.env = os.environ | {"SLURM_CONF": str(self.conf), "OMP_NUM_THREADS": "1"}
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        ports = [s.getsockname()[1] for s in sockets]
        for s in sockets:
            s.close()
        for name in ("state", "spool-n1", "spool-n2"):
            (folder / name).mkdir()
        self.conf.write_text(CONF.format(host=socket.gethostname(), folder=folder, ports=ports))

    def start(self) -> None:
        self._munge()
        self.run("slurmctld", "-f", str(self.conf))
        for node in ("n1", "n2"):
            self.start_node(node)
        wait_for(lambda: self.idle_nodes() == 2, 60, "two idle nodes")

    def _munge(self) -> None:
        key, folder = self.folder / "munge.key", self.folder
        self.run("mungekey", "--create", f"--keyfile={key}")
        self.run(
            "munged", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log",
            f"--seed-file={folder}/munged.seed",
        )  # fmt: skip

    def run(self, *command: str, check: bool = True, cwd: Path | None = None) -> str:
        done = subprocess.run(
            command, env=self.env, cwd=cwd, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def start_node(self, node: str) -> None:
        self.run("slurmd", "-f", str(self.conf), "-N", node)

    def idle_nodes(self) -> int:
        shown = self.run("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D", check=False)
        return int(shown.strip()) if shown.strip().isdigit() else 0

    def launch(self, cwd: Path, *arguments: str) -> tuple[Path, list[str]]:
        """Launches; the folder, and the ids of the jobs."""
        said = self.run(*EOSIN, "launch", *arguments, cwd=cwd)
        rows = [line.split() for line in said.splitlines() if line.startswith("  ")]
        folder = next(line for line in said.splitlines() if line.startswith("folder: "))
        return cwd / folder.removeprefix("folder: "), [row[0] for row in rows]

    def status(self, folder: Path) -> str:
        return self.run(*EOSIN, "launch", "status", str(folder))

    def states(self) -> dict[str, str]:
        """Of all jobs that wait or run."""
        shown = self.run("squeue", "-h", "-r", "-o", "%i %T %r")
        return {line.split()[0]: line.partition(" ")[2] for line in shown.splitlines()}

    def state(self, job: str) -> str:
        return self._shown(job, "JobState")

    def restarts(self, job: str) -> int:
        return int(self._shown(job, "Restarts"))

    def _shown(self, job: str, key: str) -> str:
        shown = self.run("scontrol", "-o", "show", "job", job)
        return next(w for w in shown.split() if w.startswith(f"{key}=")).partition("=")[2]

    def hurry(self) -> None:
        """Starts jobs that were queued again soon: Slurm lets them wait for two minutes.

        Not at once: a node refuses what starts in the second in which it ended the start before
        ("Job credential revoked"), and Slurm then takes the job for failed.
        """
        now, waiting = time.monotonic(), self._waiting
        states = self.states()
        again = [job for job, state in states.items() if state.startswith("PENDING BeginTime")]
        self._waiting = {job: waiting.get(job, now) for job in again}
        for job, since in self._waiting.items():
            if now - since >= QUEUED_AGAIN_S:
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)

    def wait_until_gone(self, jobs: list[str], seconds: float) -> None:
        def gone() -> bool:
            self.hurry()
            return not any(job.partition("_")[0] in jobs for job in self.states())

        wait_for(gone, seconds, f"jobs {jobs} to end", lambda: str(self.states()))

    def processes(self, job: str, node: str) -> dict[int, str]:
        """Process ids of a job on a node, with their command lines."""
        found = {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            with suppress(OSError):
                env = (folder / "environ").read_bytes().split(b"\0")
                if f"SLURM_JOB_ID={job}".encode() in env and (
                    f"SLURMD_NODENAME={node}".encode() in env
                ):
                    line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    found[int(folder.name)] = line
        return found

    def kill_node(self, job: str, node: str) -> None:
        """Ends the node's daemon and all that the job has there, as a power cut would."""
        pids = list(self.processes(job, node))
        parents = {
            int(Path(f"/proc/{p}/stat").read_text().rsplit(")", 1)[1].split()[1]) for p in pids
        }
        steps = {p for p in parents if "slurmstepd" in Path(f"/proc/{p}/comm").read_text()}
        daemon = int((self.folder / f"slurmd-{node}.pid").read_text())
        for pid in [daemon, *steps, *pids]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        self.run("scancel", "-u", "root", check=False)
        with suppress(AssertionError):
            wait_for(lambda: not self.states(), 30, "jobs to end")
        for name in ("slurmd-n1", "slurmd-n2", "slurmctld", "munged"):
            with suppress(OSError, ValueError):
                os.kill(int((self.folder / f"{name}.pid").read_text()), signal.SIGTERM)


EOSIN = (sys.executable, "-m", "eosin.launch.cli")


def wait_for(
    condition: Callable[[], bool],
    seconds: float,
    what: str,
    describe: Callable[[], str] = lambda: "",
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what} {describe()}"
        time.sleep(0.5)
