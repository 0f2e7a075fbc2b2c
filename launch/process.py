"""What this process is and may use: its rank among how many, device, precision, threads."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from eosin.configs.errors import ConfigError, InterruptedRunError
from eosin.launch.device_names import DeviceName, PrecisionName

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun and `eosin launch` tell each process."""


@dataclass(frozen=True)
class World:
    """The processes that share a training, as one of them sees it. One alone has no group."""

    rank: int = 0
    """Of this process, 0 … size - 1."""
    size: int = 1
    """Processes in all."""
    local_rank: int = 0
    """Of this process on its node."""
    local_size: int = 1
    """Processes on this node; the same on each."""
    group: dist.ProcessGroup | None = None
    """For tensors on the devices: NCCL on GPUs, gloo on CPUs. None for one process alone."""
    host: dist.ProcessGroup | None = None
    """For what stays on the hosts: gloo. None for one process alone."""
    store: Store | None = None
    """Shared key-value store, kept by rank 0. None for one process alone."""

    @property
    def leads(self) -> bool:
        """Whether this is the rank that prints, and writes what is written once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.host is not None:
            dist.barrier(group=self.host)

    def tell(self, text: str, end: str = "\n") -> None:
        """Prints, on rank 0."""
        if self.leads:
            print(text, end=end, flush=True)

    def total(self, number: int) -> int:
        """The sum of a number over all ranks, on every rank."""
        if self.host is None:
            return number
        summed = torch.tensor([number], dtype=torch.int64)
        dist.all_reduce(summed, group=self.host)
        return int(summed)

    def agreed(self, answer: bool) -> bool:
        """Rank 0's answer, on every rank: one that hangs on clocks, files or last bits."""
        return bool(self.total(int(self.leads and answer)))

    def all_hosts(self) -> list[str]:
        """The host name of each rank, on every rank."""
        return [str(name) for name in self.gather(socket.gethostname())]

    def gather(self, text: str) -> list[str]:
        """A short text of each rank, in rank order, on every rank."""
        if self.host is None:
            return [text]
        raw = text.encode()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(raw)]), group=self.host)
        longest = max(int(size) for size in sizes)
        mine = torch.zeros(longest, dtype=torch.uint8)
        mine[: len(raw)] = torch.frombuffer(bytearray(raw or b" "), dtype=torch.uint8)[: len(raw)]
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(parts, mine, group=self.host)
        return [
            part[: int(size)].numpy().tobytes().decode()
            for part, size in zip(parts, sizes, strict=True)
        ]


def is_distributed() -> bool:
    """Whether this process was started as one of several (by torchrun or `eosin launch`)."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def join_world(device: torch.device, timeout_s: float) -> Iterator[World]:
    """Joins the processes that torchrun or `eosin launch` started; alone where it is one.

    Args:
        device: of this process.
        timeout_s: seconds after which a collective, or the wait for a rank to join, is given up; 0:
            a day.

    Raises:
        ConfigError: some of `RANK_VARIABLES` are missing.
        InterruptedRunError: not all ranks came; those that are missing are named. A node that
            starts late is no fault of the run.
    """
    if not is_distributed():
        yield World()
        return
    missing = [name for name in RANK_VARIABLES if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set: start "
            "the processes with torchrun or 'eosin launch'"
        )
    rank, size, local_rank = (int(os.environ[n]) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    timeout = timedelta(seconds=timeout_s) if timeout_s > 0 else timedelta(days=1)
    store = _meet(rank, size, timeout)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    with _left_in_good_order():
        group = dist.group.WORLD
        host = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(group, dist.ProcessGroup) and isinstance(host, dist.ProcessGroup)
        yield World(
            rank=rank,
            size=size,
            local_rank=local_rank,
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            group=group,
            host=host,
            store=store,
        )


@contextmanager
def _left_in_good_order() -> Iterator[None]:
    """Ends the process groups; not after an error, when that may wait for a rank that is gone."""
    yield
    dist.destroy_process_group()


def _meet(rank: int, size: int, timeout: timedelta) -> Store:
    """The store at MASTER_ADDR, once every rank has said there that it came.

    Raises:
        InterruptedRunError: one that did not come in time, by its number.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # under torchrun the agent keeps the store, and several runs of one agent share it
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    prefix = f"eosin/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        store: Store = TCPStore(
            address, port, size, is_master=rank == 0 and not agent, timeout=timeout,
            wait_for_workers=False,
        )  # fmt: skip
    except (dist.DistNetworkError, dist.DistStoreError, RuntimeError) as error:
        raise InterruptedRunError(
            f"rank {rank} cannot reach rank 0 at {address}:{port} within "
            f"{timeout.total_seconds():.0f} s ({str(error).splitlines()[0]})"
        ) from error
    store = PrefixStore(prefix, store)
    store.set(f"came/{rank}", socket.gethostname())
    try:
        store.wait([f"came/{other}" for other in range(size)], timeout)
    except dist.DistStoreError as error:
        absent = [other for other in range(size) if not store.check([f"came/{other}"])]
        raise InterruptedRunError(
            f"of {size} ranks {', '.join(map(str, absent))} did not come within "
            f"{timeout.total_seconds():.0f} s: see their logs, or their nodes"
        ) from error
    return store


def choose_device(name: DeviceName) -> torch.device:
    """The device called `name`; ``auto`` is a GPU where there is one, that of the local rank.

    Raises:
        ConfigError: CUDA was asked for where there is none, or for more ranks than GPUs.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no GPU here; use device=auto or device=cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU of its own: torch sees "
            f"{torch.cuda.device_count()}; start one process a GPU"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def device_name(device: torch.device) -> str:
    """What a GPU's driver calls it; ``cpu`` for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU's memory; None for a CPU, which has what the machine has."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


def choose_precision(name: PrecisionName, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; ``auto`` is bf16 where the hardware has it.

    On CPUs ``auto`` is fp32: bf16 without AMX is several times slower there.

    Raises:
        ConfigError: bf16 was asked for on a GPU that lacks it.
    """
    if name == "fp32":
        return torch.float32
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        if name == "bf16":
            raise ConfigError("precision=bf16, but this GPU lacks it; use precision=fp32")
        return torch.float32
    return torch.bfloat16 if name == "bf16" else torch.float32


def usable_cores() -> int:
    """Cores this process may run on (a Slurm or container limit counts)."""
    return len(os.sched_getaffinity(0))
