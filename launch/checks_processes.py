"""Gloo and NCCL: the networks there are, and an all-reduce of two real processes of this machine.

The two processes meet as those of a training do, by the variables that torchrun sets; each runs
``python -m eosin.launch.checks_processes DEVICE``.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from eosin.configs.errors import printable
from eosin.launch.checks import Finding
from eosin.launch.process import join_world

AREA = "processes"

_RANKS = 2
_LIMIT_S = 90
_MIB = 16
_PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "TORCH_DISTRIBUTED_", "UCX_", "FI_")
_LOCAL = ("lo", "docker", "veth", "br-", "virbr", "ifb", "dummy")


@dataclass(frozen=True, kw_only=True)
class Reduced:
    """How an all-reduce of `_RANKS` processes went."""

    gb_s: float = 0.0
    """Bytes of the tensor over the time of one all-reduce."""
    failure: str = ""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """What processes can talk through."""

    links: tuple[str, ...]
    """Network interfaces that are up and lead elsewhere, with their speed where it is known."""
    infiniband: tuple[str, ...]
    """Ports of InfiniBand or RoCE, with their state."""
    variables: tuple[str, ...]
    """``NAME=value`` of what steers the libraries."""
    resolves: bool
    """Whether this machine's own name has an address."""
    gpus: int
    nccl: str
    """Version; empty in a CPU build."""
    gloo_reduced: Reduced
    nccl_reduced: Reduced | None
    """None without a GPU for each process."""


def check(folder: Path) -> list[Finding]:
    """Looks at the networks, and lets processes meet."""
    return judge(look())


def look() -> Processes:
    """The facts."""
    gpus = torch.cuda.device_count()
    version = torch.cuda.nccl.version() if torch.version.cuda and dist.is_nccl_available() else ()
    try:
        socket.getaddrinfo(socket.gethostname(), None)
        resolves = True
    except OSError:
        resolves = False
    return Processes(
        links=links(Path("/sys/class/net")),
        infiniband=infiniband(Path("/sys/class/infiniband")),
        variables=tuple(
            printable(f"{name}={value}")
            for name, value in sorted(os.environ.items())
            if name.startswith(_PREFIXES)
        ),
        resolves=resolves,
        gpus=gpus,
        nccl=".".join(map(str, version)),
        gloo_reduced=_reduce("cpu"),
        nccl_reduced=_reduce("cuda") if gpus >= _RANKS else None,
    )


def links(folder: Path) -> tuple[str, ...]:
    """The interfaces under ``/sys/class/net`` that are up and lead elsewhere."""
    found = []
    for link in sorted(folder.glob("*")):
        if link.name.startswith(_LOCAL) or _line(link / "operstate") not in ("up", "unknown"):
            continue
        speed = _line(link / "speed")
        known = speed.isdigit() and int(speed) > 0
        found.append(f"{link.name} {int(speed) / 1000:g} Gb/s" if known else link.name)
    return tuple(found)


def infiniband(folder: Path) -> tuple[str, ...]:
    """The ports under ``/sys/class/infiniband``: name, state, rate."""
    return tuple(
        f"{port.parents[1].name}:{port.name} {_line(port / 'state').partition(': ')[2]} "
        f"{_line(port / 'rate')}".strip()
        for port in sorted(folder.glob("*/ports/*"))
    )


def _line(file: Path) -> str:
    try:
        return printable(file.read_text().strip())
    except OSError:
        return ""


def _reduce(device: str) -> Reduced:
    """Starts the ranks and waits for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    try:
        for rank in range(_RANKS):
            meeting = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": _RANKS,
                "LOCAL_WORLD_SIZE": _RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
            environment = {**os.environ, **{name: str(v) for name, v in meeting.items()}}
            environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-P", "-m", "eosin.launch.checks_processes", device],
                    env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                )
            )  # fmt: skip
        ends = time.monotonic() + _LIMIT_S
        said = [rank.communicate(timeout=max(ends - time.monotonic(), 1)) for rank in ranks]
    except subprocess.TimeoutExpired:
        return Reduced(failure=f"not done within {_LIMIT_S} s")
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    for process, (_, complaint) in zip(ranks, said, strict=True):
        if process.returncode != 0:
            last = complaint.strip().splitlines() or [f"exit code {process.returncode}"]
            return Reduced(failure=printable(last[-1]))
    return Reduced(gb_s=float(said[0][0].split()[-1]))


def _rank(device_name: str) -> None:
    """One of the ranks: prints GB/s, or raises what is wrong."""
    signal.alarm(_LIMIT_S + 5)  # it ends also where nobody is left to end it
    device = torch.device("cpu")
    if device_name == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    with join_world(device, _LIMIT_S) as world:
        x = torch.full((_MIB << 18,), float(world.rank + 1), device=device)
        seconds = []
        for _ in range(3):
            y = x.clone()
            world.barrier()
            start = time.perf_counter()
            dist.all_reduce(y, group=world.group)
            total = float(y[-1])  # waits for the device
            seconds.append(time.perf_counter() - start)
            if total != sum(range(1, world.size + 1)):
                raise RuntimeError(f"1 + … + {world.size} came out as {total}")
        world.barrier()
    print((_MIB << 20) / 1e9 / min(seconds), flush=True)


def judge(processes: Processes) -> list[Finding]:
    """The rows."""
    rows = [_network(processes), _reduced("gloo", processes.gloo_reduced)]
    if processes.nccl:
        rows.append(_nccl(processes))
    if processes.variables:
        rows.append(Finding(AREA, "variables", ", ".join(processes.variables)))
    return rows


def _network(processes: Processes) -> Finding:
    found = ", ".join((*processes.infiniband, *processes.links)) or "no interface is up"
    choice = ""
    if processes.gpus:
        choice = "NCCL over InfiniBand" if processes.infiniband else "NCCL over sockets"
    asleep = [port for port in processes.infiniband if "ACTIVE" not in port]
    if asleep:
        return Finding(
            AREA, "network", found, choice, "note",
            f"{', '.join(asleep)}: not active; ask whoever keeps the node, or leave the port out "
            "by NCCL_IB_HCA",
        )  # fmt: skip
    if not processes.resolves:
        return Finding(
            AREA, "network", f"{found}; this machine's name has no address", choice, "note",
            "add the name to /etc/hosts: gloo looks it up, unless GLOO_SOCKET_IFNAME names an "
            "interface",
        )  # fmt: skip
    named = {v.partition("=")[2] for v in processes.variables if "SOCKET_IFNAME=" in v}
    known = {link.split()[0] for link in processes.links} | {"lo"}
    for names in named:
        prefixes = names.lstrip("^=").split(",")
        if not names.startswith("^") and not any(
            link.startswith(prefix) for link in known for prefix in prefixes
        ):
            return Finding(
                AREA, "network", found, choice, "note",
                f"SOCKET_IFNAME={names} names no interface of this machine: unset it, or correct "
                "it",
            )  # fmt: skip
    return Finding(AREA, "network", found, choice)


def _reduced(name: str, reduced: Reduced) -> Finding:
    if reduced.failure:
        return Finding(
            AREA, name, f"{_RANKS} processes fail: {reduced.failure}", "", "mend",
            f"one process works; for several, see {name.upper()}_SOCKET_IFNAME, firewalls and "
            "/etc/hosts",
        )  # fmt: skip
    return Finding(
        AREA, name, f"{_RANKS} processes all-reduce {_MIB} MiB at {reduced.gb_s:.2f} GB/s"
    )


def _nccl(processes: Processes) -> Finding:
    if processes.nccl_reduced is None:
        return Finding(AREA, "NCCL", f"{processes.nccl}; not tried: {processes.gpus} GPU")
    row = _reduced("NCCL", processes.nccl_reduced)
    return Finding(
        AREA, "NCCL", f"{processes.nccl}; {row.found}", row.choice, row.verdict, row.advice
    )


if __name__ == "__main__":
    _rank(sys.argv[1])
