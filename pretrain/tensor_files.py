"""Tensors on disk: safetensors files, each with a part of the tensors or a box of each.

The files are those of `torch.distributed.checkpoint`'s own safetensors layout (its
`HuggingFaceStorageReader` reads them): the place of a box in its tensor stands in the header. They
are not written through its `HuggingFaceStorageWriter`, which builds the whole file in memory and
holds the interpreter's lock while it does (3 s for 0.5 GB: the training stands still), keeps one
box where a rank has two of a name, and makes an empty tensor of anything else without a word. Here
the bytes are streamed, with their checksum. Which box goes where, at whatever number of ranks and
in whatever layout, is for the planners of `torch.distributed.checkpoint`.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eosin.configs.errors import EosinError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By the names that safetensors gives them."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}

LARGEST_HEADER = 100_000_000
"""Bytes; what safetensors itself allows."""

_AT_ONCE = 16 << 20
"""Bytes that are hashed and written in one go, without the interpreter's lock."""


@dataclass(frozen=True)
class Box:
    """Where a part of a tensor lies in it."""

    offsets: tuple[int, ...]
    """Of its first element, one per dimension."""
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements in it; 1 in a tensor without dimensions."""
        return math.prod(self.sizes)


@dataclass(frozen=True)
class Shape:
    """What a whole tensor is."""

    dtype: str
    """A key of `DTYPES`."""
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements in it; 1 in a tensor without dimensions."""
        return math.prod(self.sizes)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    """The whole tensors by name, whether this process holds all of them or shards.

    Raises:
        EosinError: a dtype that is not in `DTYPES`.
    """
    odd = [name for name, tensor in tensors.items() if tensor.dtype not in NAMES]
    if odd:
        raise EosinError(f"{odd[0]} is {tensors[odd[0]].dtype}, of which no checkpoint is made")
    return {name: Shape(NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}


def held_boxes(tensors: Mapping[str, Tensor]) -> dict[str, Box]:
    """What this process holds of each tensor; a shard may be empty.

    Raises:
        EosinError: a tensor of which one process holds several boxes.
    """
    # here: torch.distributed.checkpoint takes seconds to import
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors))
    boxes: dict[str, Box] = {}
    for item in planner.create_local_plan().items:
        name, data = item.index.fqn, item.tensor_data
        if data is None or name in boxes:
            raise EosinError(f"{name} is not one tensor, or one shard of one, on each rank")
        boxes[name] = Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes))
    return boxes


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, as a plain one that shares its memory."""
    to_local = getattr(tensor.detach(), "to_local", None)
    return tensor.detach() if to_local is None else to_local()


def write_boxes(path: Path, boxes: Mapping[str, Box], parts: Mapping[str, Tensor]) -> str:
    """Writes a safetensors file and syncs it.

    Args:
        path: the file.
        boxes: where each part lies in its tensor.
        parts: the parts, on any device.

    Returns:
        The XXH3-128 (hex) of the bytes as they were in memory.
    """
    # largest elements first: each part then begins where its dtype may
    order = sorted(boxes, key=lambda name: (-parts[name].element_size(), name))
    places = {name: {"saved_offsets": boxes[name].offsets} for name in order}
    header: dict[str, Any] = {
        "__metadata__": {
            "format": "pt",
            "DCP_VERSION": "1.0",
            "DCP_SHARDING_INFO": json.dumps(places),
        }
    }
    end = 0
    for name in order:
        begin, end = end, end + parts[name].nbytes
        header[name] = {
            "dtype": NAMES[parts[name].dtype],
            "shape": boxes[name].sizes,
            "data_offsets": [begin, end],
        }
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    digest = xxhash.xxh3_128()
    with path.open("wb") as file:
        for block in _blocks(len(head).to_bytes(8, "little") + head, map(parts.get, order)):
            digest.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _blocks(head: bytes, parts: Iterable[Tensor | None]) -> Iterable[memoryview]:
    yield memoryview(head)
    for part in parts:
        if part is not None and part.numel():
            flat = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            content = flat.numpy().data
            for start in range(0, len(content), _AT_ONCE):
                yield content[start : start + _AT_ONCE]


def forget(path: Path) -> None:
    """Lets the system forget its copy of a synced file in memory: reading it then asks the disk."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_boxes(path: Path) -> dict[str, tuple[str, Box]]:
    """Dtype and box of each part in a file that `write_boxes` wrote.

    Raises:
        ValueError: the header is none of ours.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > LARGEST_HEADER:
            raise ValueError(f"a header of {size} bytes")
        header = json.loads(file.read(size))
    places = json.loads(header.pop("__metadata__")["DCP_SHARDING_INFO"])
    return {
        name: (entry["dtype"], Box(tuple(places[name]["saved_offsets"]), tuple(entry["shape"])))
        for name, entry in header.items()
    }


Parts = Mapping[str, Mapping[str, Box]]
"""What each file holds of which tensor: file name → tensor name → box."""


def uncovered(shapes: Mapping[str, Shape], parts: Parts) -> str | None:
    """Name of a tensor that the files do not hold whole; None where there is none."""
    elements = dict.fromkeys(shapes, 0)
    for boxes in parts.values():
        for name, box in boxes.items():
            elements[name] = elements.get(name, 0) + box.numel
    wrong = [name for name, n in elements.items() if name not in shapes or n != shapes[name].numel]
    return min(wrong, default=None)


def fill(
    tensors: Mapping[str, Tensor], folder: Path, shapes: Mapping[str, Shape], parts: Parts
) -> None:
    """Fills tensors in place from the files of a folder, each process its own shards.

    Args:
        tensors: names that are in `shapes`, of those shapes and dtypes; plain or sharded.
        folder: where the files of `parts` lie.
        shapes: of the whole tensors.
        parts: what each file holds.
    """
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    held = {name: t.detach() for name, t in tensors.items() if local_part(t).numel()}
    chunks: dict[str, list[ChunkStorageMetadata]] = {name: [] for name in held}
    files: dict[MetadataIndex, str] = {}
    for file, boxes in parts.items():
        for name, box in boxes.items():
            if name in chunks:
                chunk = ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
                chunks[name].append(chunk)
                files[MetadataIndex(name, chunk.offsets)] = file
    stored: dict[str, Any] = {
        name: TensorStorageMetadata(
            TensorProperties(dtype=DTYPES[shapes[name].dtype]),
            torch.Size(shapes[name].sizes),
            chunks[name],
        )
        for name in held
    }
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(held, Metadata(stored))
    plan = planner.create_local_plan()
    by_file: dict[str, list[Any]] = {}
    for item in plan.items:
        by_file.setdefault(files[item.storage_index], []).append(item)
    for file, items in by_file.items():
        with safe_open(folder / file, framework="pt") as opened:
            for item in items:
                part = opened.get_tensor(item.storage_index.fqn)  # mapped: read where it is copied
                for dim, (start, size) in enumerate(
                    zip(item.storage_offsets, item.lengths, strict=True)
                ):
                    part = part.narrow(dim, start, size)
                planner.resolve_tensor(item).copy_(part)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> None:
    """Writes whole tensors as one safetensors file.

    Raises:
        EosinError: the file cannot be written, e.g. because the disk is full.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, path, metadata=metadata or None)
    except SafetensorError as error:
        raise EosinError(f"cannot write {path}: {error}; what was finished is kept") from error
