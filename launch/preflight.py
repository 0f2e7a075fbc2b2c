"""Before step 1: is every node fast and right? Bad ones are named, and kept out if asked.

On each rank: a matrix product (rate, and whether it is right), an exchange with the same rank of
the node beside it, first on one side and then on the other, and a shard read. A slow link spoils
an exchange for both its ends, so a node's link is as good as the better of its two sides. All
ranks come to the same verdict.
"""

import json
import os
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from eosin.configs.errors import EosinError, InterruptedRunError
from eosin.launch.artefacts import write_text
from eosin.launch.process import World
from eosin.launch.supervisor import EXCLUDE_VARIABLE, node_name

_REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class PreflightConfig:
    """What each node has to show before step 1."""

    enabled: bool = True
    """Only where there are several processes."""
    slow: float = 0.6
    """A node below this share of the median node is slow, by any of the three figures."""
    exclude: bool = False
    """Whether a job of `eosin launch` gets other nodes in place of slow and broken ones; else slow
    ones are named, and a broken one ends the run."""
    matmul: int = 4096
    """Side of the matrices; on CPUs an eighth of it."""
    exchange_mb: int = 64
    """Sent to the next node, and reduced over all ranks; on CPUs an eighth of it."""

    def __post_init__(self) -> None:
        if not 0 <= self.slow < 1:
            raise ValueError(f"slow must be at least 0 and below 1, not {self.slow}")
        for name in ("matmul", "exchange_mb"):
            if getattr(self, name) < 8:
                raise ValueError(f"{name} must be at least 8, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one rank measured. NaN where there was nothing to measure."""

    node: str
    matmul_tflops: float = float("nan")
    link_gb_s: float = float("nan")
    """The better of both sides, a direction."""
    read_mb_s: float = float("nan")
    broken: str = ""
    """What went wrong; empty where nothing did."""


FIGURES = {"matmul_tflops": "TFLOP/s", "link_gb_s": "GB/s to other nodes", "read_mb_s": "MB/s read"}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """All nodes, judged."""

    nodes: list[Finding]
    """The slowest rank of each node."""
    all_reduce_gb_s: float
    """Bus bandwidth over all ranks; NaN for one process."""
    slow: dict[str, str]
    """Why, by node."""
    broken: dict[str, str]

    @property
    def text(self) -> str:
        """One line."""
        parts = []
        for figure, unit in FIGURES.items():
            values = [v for f in self.nodes if (v := getattr(f, figure)) == v]
            if values:
                parts.append(f"{statistics.median(values):.3g} {unit}")
        if self.all_reduce_gb_s == self.all_reduce_gb_s:
            parts.append(f"all-reduce {self.all_reduce_gb_s:.3g} GB/s")
        bad = [f"{node}: {why}" for node, why in (self.broken | self.slow).items()]
        found = "; ".join(bad) if bad else "all alike"
        count = f"{len(self.nodes)} node{'s' if len(self.nodes) > 1 else ''}"
        return f"preflight of {count} (median: {', '.join(parts)}): {found}"


def preflight(
    world: World,
    device: torch.device,
    read_shard: Callable[[], int] | None,
    config: PreflightConfig,
) -> Verdict:
    """Measures every node, with all ranks, and says which are not like the others.

    Args:
        world: the processes; on one alone, its node is measured and has nothing to be held against.
        device: of this rank.
        read_shard: reads something of a shard that was not read yet; returns its bytes.
        config: sizes and limits.

    Raises:
        InterruptedRunError: `exclude` is set and a node is bad: `eosin launch` gets others.
        EosinError: a node is broken, and `exclude` is not set, or not possible here.
    """
    nodes = world.gather(node_name())
    finding = _measure(world, nodes, device, read_shard, config)
    reduced = _all_reduce(world, device, config)
    findings = [Finding(**json.loads(text)) for text in world.gather(json.dumps(asdict(finding)))]
    verdict = judge(findings, reduced, config.slow)
    world.tell(verdict.text)
    bad = list(verdict.broken | verdict.slow)
    file = os.environ.get(EXCLUDE_VARIABLE)
    possible = bool(file) and len(bad) < len(verdict.nodes)
    if bad and config.exclude and possible:
        if world.leads:
            before = Path(str(file)).read_text().split() if Path(str(file)).is_file() else []
            write_text(Path(str(file)), "".join(f"{name}\n" for name in [*before, *bad]))
        world.barrier()
        raise InterruptedRunError(f"{verdict.text}; the job goes on without them")
    if verdict.broken:
        raise EosinError(f"{verdict.text}; exclude={','.join(verdict.broken)}")
    return verdict


def judge(findings: list[Finding], all_reduce_gb_s: float, slow: float) -> Verdict:
    """Holds each node, by its slowest rank, against the median node."""
    by_node: dict[str, list[Finding]] = {}
    for finding in findings:
        by_node.setdefault(finding.node, []).append(finding)
    nodes = [
        Finding(
            node=node,
            broken=next((f.broken for f in ranks if f.broken), ""),
            **{figure: min(getattr(f, figure) for f in ranks) for figure in FIGURES},
        )
        for node, ranks in by_node.items()
    ]
    reasons: dict[str, list[str]] = {}
    for figure, unit in FIGURES.items():
        known = [f for f in nodes if getattr(f, figure) == getattr(f, figure) and not f.broken]
        if len(known) < 2:
            continue
        middle = statistics.median(getattr(f, figure) for f in known)
        for finding in known:
            value = getattr(finding, figure)
            if value < slow * middle:
                told = f"{value:.3g} {unit} where the median is {middle:.3g}"
                reasons.setdefault(finding.node, []).append(told)
    return Verdict(
        nodes=nodes,
        all_reduce_gb_s=all_reduce_gb_s,
        slow={node: ", ".join(why) for node, why in reasons.items()},
        broken={f.node: f.broken for f in nodes if f.broken},
    )


def _measure(
    world: World,
    nodes: list[str],
    device: torch.device,
    read_shard: Callable[[], int] | None,
    config: PreflightConfig,
) -> Finding:
    """This rank's figures. What fails here is a finding; what fails in an exchange ends the run."""
    broken, tflops, read = "", float("nan"), float("nan")
    try:
        tflops = _matmul(device, config.matmul if device.type == "cuda" else config.matmul // 8)
        if read_shard is not None:
            started = time.perf_counter()
            size = read_shard()
            read = size / (time.perf_counter() - started) / 1e6
    except (RuntimeError, OSError, EosinError) as error:
        broken = str(error).splitlines()[0] if str(error) else type(error).__name__
    return Finding(
        node=nodes[world.rank],
        matmul_tflops=tflops,
        link_gb_s=_link(world, nodes, device, config),
        read_mb_s=read,
        broken=broken,
    )


def _matmul(device: torch.device, side: int) -> float:
    """TFLOP/s of a product of small whole numbers, which any precision gets exactly right.

    Raises:
        EosinError: it came out wrong: the device is not to be trusted.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randint(-3, 4, (side, side), generator=generator).div(3).trunc() for _ in range(2)
    )  # 0 in five of seven, so that sums stay below 256
    expected = int((a.sum(0).double() * b.sum(1).double()).sum())
    left, right = a.to(device, dtype), b.to(device, dtype)
    times = []
    for _ in range(_REPEATS):
        started = _now(device)
        product = left @ right
        times.append(_now(device) - started)
    if int(product.double().sum()) != expected:
        raise EosinError(f"a matrix product on {device} of {socket.gethostname()} is wrong")
    return 2 * side**3 / statistics.median(times) / 1e12


def _link(world: World, nodes: list[str], device: torch.device, config: PreflightConfig) -> float:
    """GB/s, a direction, with the same local rank of the node beside; NaN on one node alone."""
    count = world.size // world.local_size
    if world.group is None or count < 2 or len(set(nodes)) < 2:
        return float("nan")
    node, best = world.rank // world.local_size, float("nan")
    mine = _message(device, config)
    theirs = torch.empty_like(mine)
    for side in (0, 1):
        other = node + 1 if node % 2 == side else node - 1
        if side == 1 and count % 2 == 0:  # the ring closes: the last and the first
            other %= count
        paired = 0 <= other < count
        seconds = float("inf")
        for _ in range(_REPEATS):
            world.barrier()
            if not paired:
                continue
            peer = other * world.local_size + world.local_rank
            started = _now(device)
            exchange = [
                dist.P2POp(dist.isend, mine, peer, world.group),
                dist.P2POp(dist.irecv, theirs, peer, world.group),
            ]
            for work in dist.batch_isend_irecv(exchange):
                work.wait()
            seconds = min(seconds, _now(device) - started)
        if paired:
            rate = mine.nbytes / seconds / 1e9
            best = rate if best != best else max(best, rate)
    return best


def _all_reduce(world: World, device: torch.device, config: PreflightConfig) -> float:
    """Bus bandwidth in GB/s over all ranks."""
    if world.group is None:
        return float("nan")
    message, times = _message(device, config), []
    for _ in range(_REPEATS):
        world.barrier()
        started = _now(device)
        dist.all_reduce(message, group=world.group)
        times.append(_now(device) - started)
    return 2 * (world.size - 1) / world.size * message.nbytes / min(times) / 1e9


def _message(device: torch.device, config: PreflightConfig) -> torch.Tensor:
    size = config.exchange_mb * 2**20 // (1 if device.type == "cuda" else 8)
    return torch.zeros(size // 4, device=device)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
