"""Tensors of a file or folder of weights, whoever wrote it, and what its config says beside them.

A ``.pth``, ``.pt`` or ``.bin`` file is a pickle. It is read by torch's own unpickler for weights
(``weights_only``), which knows tensors and plain containers and runs nothing.
"""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from eosin.configs.errors import InputError

SAFETENSORS = (".safetensors",)
UNPICKLED = (".pth", ".pt", ".bin", ".ckpt")
IN_FOLDER = (
    "model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "model.pth",
)  # fmt: skip
"""Names of weights in a folder, in the order in which they are tried."""
INDEX = "model.safetensors.index.json"
"""Where a large model of `transformers` says which file holds which tensor."""
INSIDE = ("teacher", "model_ema", "model", "state_dict", "student")
"""Under what training checkpoints keep a network, in the order in which one is taken."""
WRAPPERS = ("module.", "_orig_mod.", "backbone.")
"""Prefixes that training code puts before a network's own names."""


@dataclass(frozen=True)
class Weights:
    """What a source holds."""

    source: Path
    """The file, or the folder."""
    tensors: dict[str, Tensor]
    """By the names of whoever wrote them, without the prefixes of training code."""
    left_out: tuple[str, ...] = ()
    """Tensors beside the backbone's, such as the heads of a training."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The folder's ``config.json``; empty where there is none."""


def read_weights(source: Path) -> Weights:
    """Reads ``.safetensors``, ``.pth``, ``.pt``, ``.bin``, or a folder with one of them.

    Args:
        source: a file, the folder of a hub's download, an encoder folder, or a run of ours.

    Raises:
        InputError: there are no weights, or they cannot be read without running code.
    """
    if source.is_dir():
        return _read_folder(source)
    if not source.is_file():
        raise InputError(f"{source} does not exist; give a file of weights, or the folder of one")
    return _without_wrappers(source, _read_file(source), {})


def read_tensor(path: Path) -> Tensor:
    """A ``.pt`` file that holds one tensor, such as the features of a slide.

    Raises:
        InputError: it holds anything else, or cannot be read as tensors alone.
    """
    found = _unpickled(path)
    if not isinstance(found, Tensor):
        raise InputError(f"{path} holds a {type(found).__name__}, not one tensor")
    return found


def _read_folder(folder: Path) -> Weights:
    if not (folder / "config.json").is_file() and (folder / "encoder").is_dir():
        folder = folder / "encoder"  # a run of ours
    config = _read_mapping(folder / "config.json") if (folder / "config.json").is_file() else {}
    if (folder / INDEX).is_file():
        listed = _read_mapping(folder / INDEX).get("weight_map")
        if not isinstance(listed, Mapping) or not listed:
            raise InputError(f"{folder / INDEX} has no weight_map: fetch it again")
        parts = sorted({str(name) for name in listed.values()})
        for name in parts:
            if Path(name).name != name:
                raise InputError(f"{folder / INDEX} names {name}, which is not in its folder")
        tensors = {k: v for name in parts for k, v in _read_file(folder / name).items()}
        return _without_wrappers(folder, tensors, config)
    for name in IN_FOLDER:
        if (folder / name).is_file():
            return _without_wrappers(folder, _read_file(folder / name), config)
    raise InputError(f"{folder} holds no weights: none of {', '.join((*IN_FOLDER, INDEX))}")


def _read_mapping(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, Mapping):
        raise InputError(f"{path} holds a {type(found).__name__}, not an object of names")
    return found


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix in SAFETENSORS:
        try:
            return dict(load_file(path))
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} is damaged or no safetensors file: {error}") from error
    if path.suffix not in UNPICKLED:
        known = ", ".join((*SAFETENSORS, *UNPICKLED))
        raise InputError(f"{path}: weights are files that end in {known}")
    found = _unpickled(path)
    for name in INSIDE:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    if not isinstance(found, Mapping) or not found:
        raise InputError(f"{path} holds a {type(found).__name__}, not tensors by name")
    odd = [name for name, value in found.items() if not isinstance(value, Tensor)]
    if odd:
        raise InputError(f"{path}: '{odd[0]}' is no tensor; save the network's state_dict alone")
    return dict(found)


def _unpickled(path: Path) -> Any:
    """What a file of torch's holds, if that is tensors and containers of them alone."""
    try:
        mapped = zipfile.is_zipfile(path)  # torch's older files cannot be
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # what a hostile or damaged file makes it raise has no one type
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"{path} cannot be read as tensors alone ({reason}); save its state_dict as "
            "safetensors where you trust it"
        ) from error


def _without_wrappers(
    source: Path, tensors: dict[str, Tensor], config: Mapping[str, Any]
) -> Weights:
    left_out: list[str] = []
    while True:
        for prefix in WRAPPERS:
            inside = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            if inside:
                left_out += [name for name in tensors if not name.startswith(prefix)]
                tensors = inside
                break
        else:
            return Weights(source, tensors, tuple(sorted(left_out)), config)
