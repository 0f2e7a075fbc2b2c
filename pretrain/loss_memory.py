"""Peak memory and time of the masked-patch loss stage, beside the textbook's.

The stage is one forward and backward from tokens after the bottleneck: weight-normed prototypes,
Sinkhorn targets, cross-entropy, gradients of the student's tokens, directions and gains. Each
version runs in a process of its own, as ``python -m eosin.pretrain.loss_memory textbook K M Db``;
the figure is the peak of that process minus what it held with its inputs made.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from eosin.pretrain.prototype_kernels import choose_kernels
from eosin.pretrain.prototype_loss import prototype_cross_entropy, sinkhorn_scaling

Version: TypeAlias = Literal["streamed", "textbook"]
TEACHER_TEMPERATURE = 0.05
STUDENT_TEMPERATURE = 0.1


@dataclass(frozen=True)
class StageCost:
    """What one forward and backward of the stage takes."""

    peak_bytes: int
    """Peak minus inputs: resident memory on the CPU, allocated memory on CUDA."""
    seconds: float
    """Wall time of that one pass, the first in its process."""
    loss: float
    """The loss itself, by which versions are seen to compute the same."""


@dataclass(frozen=True)
class LossMemory:
    """Both versions on the same inputs."""

    ours: StageCost
    textbook: StageCost

    @property
    def share(self) -> float:
        """Our peak over the textbook's."""
        return self.ours.peak_bytes / self.textbook.peak_bytes


def compare_loss_memory(
    prototypes: int = 131_072, rows: int = 2_000, bottleneck: int = 256, device: str = "cpu"
) -> LossMemory:
    """Measures both versions, each in its own process.

    Args:
        prototypes: K.
        rows: M masked tokens.
        bottleneck: Db.
        device: ``cpu`` or ``cuda``.

    Raises:
        subprocess.CalledProcessError: a measuring process failed; it has said why on stderr.
    """
    costs = {}
    for version in get_args(Version):
        command = [sys.executable, "-m", "eosin.pretrain.loss_memory", version]
        command += [str(prototypes), str(rows), str(bottleneck), device]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        costs[version] = StageCost(**json.loads(done.stdout))
    return LossMemory(costs["streamed"], costs["textbook"])


def textbook_targets(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Sinkhorn-Knopp as SwAV and DINOv2 write it: in place, on a copy exp(logits / τ), [M, K]."""
    q = torch.exp(logits / temperature).T  # [K, M]
    (K, M), q = q.shape, q / q.sum()
    for _ in range(iterations):
        q /= q.sum(dim=1, keepdim=True)
        q /= K
        q /= q.sum(dim=0, keepdim=True)
        q /= M
    q *= M
    return q.T


def textbook_stage(
    student_x: Tensor, student_weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor
) -> Tensor:
    """Mean cross-entropy from full logits in fp32, by `log_softmax` and autograd; scalar."""
    with torch.no_grad():
        targets = textbook_targets(teacher_x @ teacher_weight.T, TEACHER_TEMPERATURE)
    log_p = F.log_softmax(student_x @ student_weight.T / STUDENT_TEMPERATURE, dim=-1)
    return -(targets * log_p).sum(dim=-1).mean()


def streamed_stage(
    student_x: Tensor, student_weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor
) -> Tensor:
    """The same by `prototype_cross_entropy`; scalar."""
    kernels = choose_kernels("auto", student_x.device, _operand_dtype(student_x.device))
    scaling = sinkhorn_scaling(teacher_x, teacher_weight, TEACHER_TEMPERATURE, kernels)
    rows = len(student_x)
    return prototype_cross_entropy(
        student_x[None], student_weight, teacher_x[None], teacher_weight, scaling,
        torch.ones(1, 1, device=student_x.device),
        torch.full((rows,), 1 / rows, device=student_x.device),
        kernels=kernels, student_temperature=STUDENT_TEMPERATURE,
    ).sum()  # fmt: skip


def measure(
    version: Version, prototypes: int, rows: int, bottleneck: int, device: str
) -> StageCost:
    """One pass of one version in this process."""
    stage: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    stage = {"streamed": streamed_stage, "textbook": textbook_stage}[version]
    where = torch.device(device)
    generator = torch.Generator().manual_seed(0)

    def directions(n: int) -> Tensor:
        x = torch.randn(n, bottleneck, generator=generator)
        return F.normalize(x, dim=-1, out=x).to(where)

    student_x, teacher_x = directions(rows).requires_grad_(), directions(rows)
    student_v, teacher_v = directions(prototypes).requires_grad_(), directions(prototypes)
    gain = torch.ones(prototypes, 1, device=where, requires_grad=True)
    held = _held_bytes(where)
    start = time.perf_counter()
    with torch.no_grad():
        teacher_weight = _weight_norm(teacher_v, torch.ones_like(gain))
    loss = stage(student_x, _weight_norm(student_v, gain), teacher_x, teacher_weight)
    loss.backward()
    value = float(loss.detach())  # waits for the device
    seconds = time.perf_counter() - start
    return StageCost(_peak_bytes(where) - held, seconds, value)


def _weight_norm(v: Tensor, gain: Tensor) -> Tensor:
    weight: Tensor = v * (gain / torch.linalg.vector_norm(v, dim=1, keepdim=True))
    return weight


def _operand_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _held_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # not getrusage: its high-water mark begins with that of the process that started this one
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def main(arguments: list[str]) -> None:
    """Measures one version and prints its cost as one line of JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("version", choices=get_args(Version))
    for name in ("prototypes", "rows", "bottleneck"):
        parser.add_argument(name, type=int)
    parser.add_argument("device")
    args = parser.parse_args(arguments)
    print(json.dumps(asdict(measure(**vars(args)))))


if __name__ == "__main__":
    main(sys.argv[1:])
