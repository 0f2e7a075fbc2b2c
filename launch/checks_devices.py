"""GPUs, their driver, and whether this torch can use them."""

import ctypes
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from eosin.configs.errors import printable
from eosin.launch.checks import Finding, Verdict
from eosin.launch.process import choose_device, choose_precision

AREA = "devices"

_QUERY = "name,driver_version,mig.mode.current"
_QUERY_S = 15
_BF16 = (8, 0)
_BUSY_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU, as torch sees it."""

    name: str
    memory_gib: float
    free_gib: float
    capability: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Devices:
    """What the driver says, and what torch makes of it."""

    driver: str = ""
    """Version of the driver; empty where there is none."""
    driver_cuda: tuple[int, int] | None = None
    """Newest CUDA that the driver serves."""
    driver_gpus: tuple[str, ...] = ()
    """Names by nvidia-smi."""
    mig: bool = False
    """Whether a GPU is cut into slices."""
    torch: str
    torch_cuda: tuple[int, int] | None = None
    """CUDA that torch is built for; None for a CPU build."""
    architectures: tuple[str, ...] = ()
    """What torch is compiled for: ``sm_90``; ``compute_90`` is compiled on the GPU."""
    gpus: tuple[Gpu, ...] = ()
    visible: str | None = None
    """CUDA_VISIBLE_DEVICES."""
    chosen: str = "cpu in fp32"
    """Device and precision that training would take."""


def check(folder: Path) -> list[Finding]:
    """Looks at the devices."""
    return judge(look())


def look() -> Devices:
    """The facts."""
    rows = [[cell.strip() for cell in row.split(",")] for row in _nvidia_smi()]
    device = choose_device("auto")
    dtype = str(choose_precision("auto", device)).removeprefix("torch.")
    precision = {"bfloat16": "bf16", "float32": "fp32"}[dtype]
    return Devices(
        driver=rows[0][1] if rows else "",
        driver_cuda=_driver_cuda(),
        driver_gpus=tuple(row[0] for row in rows),
        mig=any(row[2] == "Enabled" for row in rows),
        torch=torch.__version__,
        torch_cuda=version_pair(torch.version.cuda) if torch.version.cuda else None,
        architectures=tuple(torch.cuda.get_arch_list()),
        gpus=tuple(map(_gpu, range(torch.cuda.device_count()))),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        chosen=f"{device.type} in {precision}",
    )


def version_pair(version: str) -> tuple[int, int]:
    """(12, 8) of ``12.8``."""
    major, minor, *_ = (*version.split("."), "0")
    return int(major), int(minor)


def _nvidia_smi() -> list[str]:
    """A row a GPU, or none."""
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [printable(row) for row in done.stdout.splitlines() if row.count(",") == 2]


def _driver_cuda() -> tuple[int, int] | None:
    """From the driver's library itself, which needs no working GPU."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return Gpu(
        name=properties.name,
        memory_gib=total / 2**30,
        free_gib=free / 2**30,
        capability=(properties.major, properties.minor),
    )


def judge(devices: Devices) -> list[Finding]:
    """The rows."""
    rows = [_build(devices), *(_card(devices, i) for i in range(len(devices.gpus)))]
    if devices.mig:
        rows.append(
            Finding(
                AREA, "MIG", "a GPU is cut into slices", "one slice a process", "note",
                "train with one process on one slice: NCCL does not join slices of one GPU",
            )
        )  # fmt: skip
    return rows


def _build(devices: Devices) -> Finding:
    """Whether torch and the driver meet."""
    found = f"torch {devices.torch}"
    if devices.driver:
        found += f", driver {devices.driver}"
    if devices.driver_cuda:
        found += f" for CUDA {_dotted(devices.driver_cuda)}"

    def row(verdict: Verdict, advice: str) -> Finding:
        return Finding(AREA, "torch", found, devices.chosen, verdict, advice)

    if devices.gpus:
        return Finding(AREA, "torch", found, devices.chosen)
    if devices.visible is not None and devices.visible.strip() in ("", "-1"):
        found += f", CUDA_VISIBLE_DEVICES='{devices.visible}'"
        return row("note", "unset CUDA_VISIBLE_DEVICES: it hides every GPU")
    if not devices.driver_gpus and devices.driver_cuda is None:
        found += ", no GPU"
        return row("note", "enough for curation, evaluation and small models; train on a GPU")
    found += f", {len(devices.driver_gpus)} GPUs that torch does not see"
    if devices.torch_cuda is None:
        return row("mend", "this torch is built for CPUs: install it without constraints-cpu.txt")
    if devices.driver_cuda is not None and devices.driver_cuda[0] < devices.torch_cuda[0]:
        return row(
            "mend",
            f"the driver is older than CUDA {_dotted(devices.torch_cuda)} of this torch: update "
            f"it, or install torch built for CUDA {_dotted(devices.driver_cuda)}",
        )
    return row("mend", "run python -c 'import torch; torch.zeros(1).cuda()': it says why not")


def _card(devices: Devices, index: int) -> Finding:
    gpu = devices.gpus[index]
    name, found = (
        f"cuda:{index}",
        f"{gpu.name}, {gpu.memory_gib:.1f} GiB, {gpu.free_gib:.1f} free, compute "
        f"{_dotted(gpu.capability)}",
    )
    if not is_compiled_for(gpu.capability, devices.architectures):
        return Finding(
            AREA, name, found, "", "mend",
            f"this torch has no code for it ({', '.join(devices.architectures)}): install a build "
            "that has",
        )  # fmt: skip
    if gpu.free_gib < _BUSY_SHARE * gpu.memory_gib:
        return Finding(
            AREA, name, found, "", "note", "others hold its memory: nvidia-smi names them"
        )
    if gpu.capability < _BF16:
        return Finding(
            AREA, name, found, "fp32", "note",
            "it lacks bf16, so training is in fp32: take one of compute capability 8.0 or above",
        )  # fmt: skip
    return Finding(AREA, name, found, "bf16")


def is_compiled_for(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """Whether code of these architectures runs on a GPU: its generation's, or compiled on it."""
    for name in architectures:
        kind, _, digits = name.partition("_")
        number = int("".join(c for c in digits if c.isdigit()))
        major, minor = divmod(number, 10)
        if kind == "sm" and major == capability[0] and minor <= capability[1]:
            return True
        if kind == "compute" and (major, minor) <= capability:
            return True
    return False


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
