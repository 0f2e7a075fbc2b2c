"""A finished checkpoint: a folder of safetensors files, and what stands beside them in JSON.

``manifest.json``, written last, names each file with its checksum and each tensor with its shape,
and has a checksum of its own. Nothing is unpickled. There is no random state in it: every draw of
the trainer is a function of (seed, step).
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eosin.configs.errors import EosinError
from eosin.launch.artefacts import file_digest, read_json, stamp_of, write_json
from eosin.pretrain.tensor_files import DTYPES, Box, Parts, Shape, fill, read_boxes, uncovered

MANIFEST = "manifest.json"

FORMAT = 2
"""The `schema_version` of a checkpoint. In 1 each was two files, of one process."""


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
    config: Mapping[str, Any] = field(default_factory=dict)
    """Of the run, as plain values, so that a difference can be shown."""
    damaged: int = 0
    """Damaged records that were met so far, by all ranks."""
    skips: tuple[tuple[int, int], ...] = ()
    """Data that is passed over: from this step on, so many more steps of it."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds."""

    state: TrainState
    files: Mapping[str, str]
    """The checksum (XXH3-128) of each file of tensors."""
    shapes: Mapping[str, Shape]
    """Of each whole tensor."""
    layout: Mapping[str, Any]
    """How it was written, for people: number of ranks, torch."""


class DamagedCheckpointError(EosinError):
    """A checkpoint that is not what was written; the message says in what."""


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder is named by."""
    return int(path.name.removeprefix("step_"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, the newest first."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(found, key=step_of, reverse=True)


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Writes the manifest into a checkpoint's folder."""
    body = {
        "schema_version": FORMAT,
        "state": dataclasses.asdict(manifest.state),
        "files": dict(manifest.files),
        "tensors": {name: [s.dtype, *s.sizes] for name, s in manifest.shapes.items()},
        "layout": dict(manifest.layout),
    }
    plain = json.loads(json.dumps(body))  # as it will be read: tuples are lists
    write_json(path / MANIFEST, {**plain, "digest": stamp_of(**plain)})


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        DamagedCheckpointError: it is missing, of another version, damaged, or of another step.
    """
    try:
        body = read_json(path / MANIFEST)
        if body["schema_version"] != FORMAT:
            raise DamagedCheckpointError(
                f"written by another version of eosin (schema_version {body['schema_version']}; "
                f"this one reads {FORMAT}): go on with that version, or give another out"
            )
        if body.pop("digest") != stamp_of(**body):
            raise DamagedCheckpointError(f"{MANIFEST} is damaged (its checksum differs)")
        skips = tuple((int(step), int(count)) for step, count in body["state"].pop("skips"))
        manifest = Manifest(
            state=TrainState(**body["state"], skips=skips),
            files=body["files"],
            shapes={name: Shape(s[0], tuple(s[1:])) for name, s in body["tensors"].items()},
            layout=body["layout"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{MANIFEST} is unreadable ({error})") from error
    if manifest.state.step != step_of(path):
        raise DamagedCheckpointError(f"{MANIFEST} is that of step {manifest.state.step}")
    if any(Path(name).name != name for name in manifest.files):
        raise DamagedCheckpointError(f"{MANIFEST} names files elsewhere")
    if not {shape.dtype for shape in manifest.shapes.values()} <= set(DTYPES):
        raise DamagedCheckpointError(f"{MANIFEST} names unknown dtypes")
    return manifest


def verified_parts(
    path: Path, manifest: Manifest, names: Iterable[str]
) -> dict[str, dict[str, Box]]:
    """What some files of a checkpoint hold, each read in full and found to be as written.

    Raises:
        DamagedCheckpointError: one is missing, or its checksum differs.
    """
    parts: dict[str, dict[str, Box]] = {}
    for name in names:
        try:
            if file_digest(path / name) != manifest.files[name]:
                raise DamagedCheckpointError(f"{name} is damaged (its checksum differs)")
            boxes = read_boxes(path / name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedCheckpointError(f"{name} is unreadable ({error})") from error
        parts[name] = {tensor: box for tensor, (_, box) in boxes.items()}
    return parts


def check_covered(manifest: Manifest, parts: Parts) -> None:
    """Checks that the files together hold every tensor whole.

    Raises:
        DamagedCheckpointError: one is not.
    """
    name = uncovered(manifest.shapes, parts)
    if name is not None:
        raise DamagedCheckpointError(f"{name} is not whole in it")


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None when every file has its checksum.

    Files that the manifest does not name are never read, and are no damage.
    """
    try:
        manifest = read_manifest(path)
        check_covered(manifest, verified_parts(path, manifest, manifest.files))
    except DamagedCheckpointError as error:
        return str(error)
    return None


def read_state(path: Path) -> TrainState:
    """The state in a checkpoint.

    Raises:
        DamagedCheckpointError: the manifest is damaged.
    """
    return read_manifest(path).state


def first_whole(paths: Iterable[Path], prefix: str) -> tuple[TrainState, dict[str, Tensor]] | None:
    """State and tensors of the first checkpoint that is whole; says which were passed over.

    Args:
        paths: in the order in which they are tried.
        prefix: see `read_tensors`.

    Returns:
        None where none is whole.
    """
    for path in paths:
        try:
            return read_state(path), read_tensors(path, prefix)
        except DamagedCheckpointError as error:
            print(f"passed over a damaged checkpoint: {path.name}: {error}")
    return None


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Whole tensors of a checkpoint, in one process, however many ranks wrote it.

    Args:
        path: folder of the checkpoint.
        prefix: those whose names begin with it are read, and it is left out of their names.

    Raises:
        DamagedCheckpointError: a file is damaged.
    """
    manifest = read_manifest(path)
    parts = verified_parts(path, manifest, manifest.files)
    check_covered(manifest, parts)
    tensors = {
        name: torch.empty(shape.sizes, dtype=DTYPES[shape.dtype])
        for name, shape in manifest.shapes.items()
        if name.startswith(prefix)
    }
    fill(tensors, path, manifest.shapes, parts)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def clean_up(folder: Path) -> None:
    """Removes what a killed run left half written or half removed."""
    for old in folder.glob(".step_*.old"):
        final = old.with_name(old.name[1:].removesuffix(".old"))
        if final.exists():
            shutil.rmtree(old)
        else:  # killed between two renames
            old.rename(final)
    for partial in folder.glob(".step_*.partial"):
        shutil.rmtree(partial)


def take_over(partial: Path, final: Path) -> None:
    """Gives a synced folder its name, in place of one that has it."""
    old = final.with_name(f".{final.name}.old")
    _sync_folder(partial)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    _sync_folder(final.parent)
    if old.exists():
        shutil.rmtree(old)


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint; its name goes first, so that a kill leaves nothing that looks whole."""
    leftover = path.with_name(f".{path.name}.partial")
    shutil.rmtree(leftover, ignore_errors=True)
    path.rename(leftover)
    shutil.rmtree(leftover)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
