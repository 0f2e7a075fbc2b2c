"""Checkpoints without pickle: tensors in safetensors, everything else in JSON.

A checkpoint is a folder, written under a temporary name, synced, and renamed; its
``manifest.json`` holds the checksum of each file. There is no random state in it: every draw of the
trainer is a function of (seed, step).
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eosin.configs.errors import EosinError
from eosin.launch.artefacts import (
    SCHEMA_VERSION,
    file_digest,
    read_json,
    replacing_folder,
    write_json,
)

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class TrainState:
    """Everything beside tensors that a run needs to go on."""

    step: int
    """Steps done: training goes on with the step of this number."""
    bad_steps: int
    """Steps skipped so far for a NaN or Inf."""
    index_digest: str
    """Of the shards that the run reads."""
    mpp: float | None
    """Scale of the tiles; None where it is unknown or mixed."""


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState, keep: int
) -> Path:
    """Writes ``folder/step_NNNNNNNN`` and removes all but the newest `keep` checkpoints."""
    final = folder / f"step_{state.step:08d}"
    tensors = {
        "model.safetensors": model.state_dict(),
        "optimizer.safetensors": _optimizer_tensors(optimizer),
    }
    with replacing_folder(final, MANIFEST) as partial:
        for name, content in tensors.items():
            save_tensors(partial / name, content)
        write_json(
            partial / MANIFEST,
            {
                "schema_version": SCHEMA_VERSION,
                "state": asdict(state),
                "files": {name: file_digest(partial / name) for name in tensors},
            },
        )
    # a damaged checkpoint of a later step may be there; the one just written is never pruned
    for old in [path for path in list_checkpoints(folder) if path != final][keep - 1 :]:
        shutil.rmtree(old)
    return final


def save_tensors(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> None:
    """Writes tensors as safetensors.

    Raises:
        EosinError: the file cannot be written, e.g. because the disk is full.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, path, metadata=metadata or None)
    except SafetensorError as error:
        raise EosinError(f"cannot write {path}: {error}; what was finished is kept") from error


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, the newest first."""
    return sorted(folder.glob("step_*"), reverse=True)


def load_newest(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[TrainState | None, list[str]]:
    """Loads the newest checkpoint that is whole, strictly.

    Returns:
        The state, None when there is no checkpoint at all; and a line for each damaged one that was
        passed over.

    Raises:
        EosinError: there are checkpoints, and none of them is whole.
    """
    passed_over: list[str] = []
    for path in list_checkpoints(folder):
        damage = find_damage(path)
        if damage is None:
            state = TrainState(**read_json(path / MANIFEST)["state"])
            model.load_state_dict(load_file(path / "model.safetensors"), strict=True)
            _load_optimizer(optimizer, load_file(path / "optimizer.safetensors"))
            return state, passed_over
        passed_over.append(f"{path.name}: {damage}")
    if passed_over:
        raise EosinError(f"no whole checkpoint in {folder} ({'; '.join(passed_over)})")
    return None, []


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder; None when every file has its checksum."""
    try:
        manifest: dict[str, Any] = read_json(path / MANIFEST)
        for name, digest in manifest["files"].items():
            if file_digest(path / name) != digest:
                return f"{name} is damaged (its checksum differs)"
    except (OSError, ValueError, KeyError) as error:
        return f"unreadable ({error})"
    return None


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's tensors by ``{parameter number}.{name}``; its step counts are tensors already."""
    state = optimizer.state_dict()["state"]
    return {
        f"{i}.{name}": tensor for i, moments in state.items() for name, tensor in moments.items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, name = key.split(".")
        state.setdefault(int(number), {})[name] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
