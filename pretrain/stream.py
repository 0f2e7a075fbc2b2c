"""Which rows of the packed stream each block computes, drawn on the host and uploaded at once.

Pure functions of shapes and of the step's draws, in numpy: no block waits for the device.
Legend: T tokens of the stream, P prefix tokens, R wanted rows, D width, C channels a head.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eosin.pretrain.attention import Packing
from eosin.pretrain.block import BlockRows
from eosin.pretrain.drop_path import DropPath
from eosin.pretrain.positions import spread_over

ALIGNED = 64  # elements; where kernels are free to read whole cache lines
Number = TypeVar("Number", np.int64, np.float32)


def cls_rows(packing: Packing) -> NDArray[np.int64]:
    """Rows of the CLS tokens of all sequences, in stream order, int64 [sequences]."""
    return packing.boundaries[:-1]


def patch_rows(
    packing: Packing, group: int, prefix: int, patches: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Rows of given patch tokens of one crop group, int64, shaped as `patches`.

    Args:
        packing: of the stream.
        group: index of the crop group.
        prefix: P.
        patches: indices into the group's [B · N] patches: sequence · N + patch, such as
            ``np.flatnonzero(masks)`` gives.
    """
    start = sum(count * length for count, length in packing.groups[:group])
    length = packing.groups[group][1]
    sequence, patch = np.divmod(patches, length - prefix)
    return start + sequence * length + prefix + patch


def plan_blocks(
    packing: Packing,
    depth: int,
    device: torch.device,
    *,
    drop: DropPath | None = None,
    batch: int = 0,
    wanted: Tensor | None = None,
    turns: Sequence[NDArray[np.float32]] = (),
) -> list[BlockRows]:
    """The rows of every block.

    Args:
        packing: of the stream.
        depth: blocks.
        device: where the network is.
        drop: the step's stochastic depth.
        batch: samples behind the views of a crop group; needed with `drop` alone.
        wanted: rows that leave the last block, int64 [R] on the CPU; None for all.
        turns: per crop group, `positions.turns` of one sequence, fp32 [tokens a sequence, C];
            none without rotary positions.

    Raises:
        ValueError: `wanted` is not on the CPU, not int64, or holds a row that there is not.
    """
    kept = [] if drop is None else _kept_starts(drop, packing, depth, batch)
    groups = packing.groups
    if kept:
        groups = tuple((k.shape[-1], length) for k, (_, length) in zip(kept, groups, strict=True))
    host = {"starts": Packing(groups).boundaries} | {f"kept{i}": k for i, k in enumerate(kept)}
    if wanted is not None:
        last = [_rows_of(k[-1], length) for k, (_, length) in zip(kept, groups, strict=False)]
        branches = np.concatenate(last, axis=-1) if last else None  # [2, kept rows]
        host |= _last_rows(_checked(wanted, packing.tokens), packing.tokens, branches)
    here = dict(zip(host, _upload(list(host.values()), device), strict=True))
    of_block = Packing(groups, here["starts"].to(torch.int32))
    rotations = spread_over(groups, _upload(list(turns), device)) if turns else None  # [rows, C]
    common = BlockRows(of_block, rotations, scale=1.0 if drop is None else drop.scale)
    plan = [common] * depth
    if kept:
        parts = [
            (here[f"kept{i}"][..., None] + torch.arange(length, device=device)).flatten(2)
            for i, (_, length) in enumerate(groups)
        ]
        rows = torch.cat(parts, dim=-1)  # [depth, 2, kept rows]
        plan = [
            common._replace(attend=attends, attention_adds=attends, mlp_adds=adds)
            for attends, adds in (branch.unbind() for branch in rows.unbind())
        ]
    if wanted is not None:
        plan[-1] = plan[-1]._replace(
            leave=here["leave"],
            project=here["project"],
            attention_adds=here.get("attention_adds"),
            mlp_adds=here.get("mlp_adds"),
        )
    return plan


def _kept_starts(
    drop: DropPath, packing: Packing, depth: int, batch: int
) -> list[NDArray[np.int64]]:
    """Per crop group, the first rows of the sequences that are kept, [depth, 2, kept]."""
    starts, start = [], 0
    for index, (count, length) in enumerate(packing.groups):
        starts.append(start + drop.draw(depth, index, count, batch) * length)
        start += count * length
    return starts


def _rows_of(starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """All rows of the sequences that start there, [2, kept] → [2, kept · length]."""
    return (starts[..., None] + np.arange(length)).reshape(len(starts), -1)


def _last_rows(
    wanted: NDArray[np.int64], tokens: int, branches: NDArray[np.int64] | None
) -> dict[str, NDArray[np.int64]]:
    """What the last block adds to the wanted rows, and from which rows of what it computed."""
    if branches is None:
        return {"leave": wanted, "project": wanted}
    place = np.full(tokens, -1)
    place[branches[0]] = np.arange(branches.shape[1])
    found = place[wanted]  # where each wanted row stands among those that attend, or -1
    attention_adds = np.flatnonzero(found >= 0)
    in_mlp = np.zeros(tokens, bool)
    in_mlp[branches[1]] = True
    return {
        "leave": wanted,
        "project": found[attention_adds],
        "attention_adds": attention_adds,
        "mlp_adds": np.flatnonzero(in_mlp[wanted]),
    }


def _checked(wanted: Tensor, tokens: int) -> NDArray[np.int64]:
    if wanted.device.type != "cpu" or wanted.dtype != torch.int64:
        raise ValueError(f"wanted is {wanted.dtype} on {wanted.device}; it must be int64 on cpu")
    rows: NDArray[np.int64] = wanted.numpy()
    if len(rows) and not 0 <= rows.min() <= rows.max() < tokens:
        raise ValueError(f"wanted holds rows {rows.min()} … {rows.max()}; there are {tokens}")
    return rows


def _upload(arrays: Sequence[NDArray[Number]], device: torch.device) -> list[Tensor]:
    """The arrays on the device, by one copy that the host does not wait for."""
    sizes: list[int] = [-(-array.size // ALIGNED) * ALIGNED for array in arrays]
    starts: list[int] = np.cumsum([0, *sizes]).tolist()
    staged = torch.from_numpy(np.empty(starts[-1], arrays[0].dtype))
    if device.type == "cuda":
        staged = staged.pin_memory()
    for start, array in zip(starts, arrays, strict=False):
        staged[start : start + array.size] = torch.from_numpy(array.ravel())
    moved = staged.to(device, non_blocking=True)
    return [
        moved[start : start + array.size].view(array.shape)
        for start, array in zip(starts, arrays, strict=False)
    ]
