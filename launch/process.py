"""What this process may use: device, precision, threads."""

import os
from typing import Literal, TypeAlias

import torch

from eosin.configs.errors import ConfigError

DeviceName: TypeAlias = Literal["auto", "cpu", "cuda"]
PrecisionName: TypeAlias = Literal["auto", "fp32", "bf16"]


def choose_device(name: DeviceName) -> torch.device:
    """The device called `name`; ``auto`` is the first GPU where there is one.

    Raises:
        ConfigError: CUDA was asked for where there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no GPU here; use device=auto or device=cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", 0)


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
