"""Which rows of the token stream the losses read: CLS tokens, and patches of the global crops.

Legend: C global crops, N patches a global crop, M masked patches.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eosin.pretrain.attention import Packing
from eosin.pretrain.stream import cls_rows, patch_rows
from eosin.pretrain.upload import upload

Patches: TypeAlias = Literal["none", "masked", "all"]


class CropRows(NamedTuple):
    """Where the losses read the token stream, all found on the host."""

    mask: Tensor  # bool [C, N], on the device
    masked: Tensor  # int64 [M], on the device: the masked patches among the C · N
    weights: Tensor  # fp32 [M], on the device: 1 / (masked patches of the crop) / C
    student: Tensor  # int64, on the CPU: rows of the student's stream, all CLS tokens first
    teachers: tuple[Tensor, ...]  # int64, on the CPU: likewise of each teacher's


def crop_rows(
    masks: NDArray[np.bool_],
    student: Packing,
    teachers: Sequence[Packing],
    prefixes: Sequence[int],
    patches: Patches,
    device: torch.device,
) -> CropRows:
    """The rows that the losses read.

    Args:
        masks: masked patches of the global crops, bool [C, N].
        student: its stream: the global crops, then the local ones.
        teachers: their streams: the global crops.
        prefixes: tokens before the patches of a sequence, of the student and of each teacher.
        patches: of the global crops, which ones a loss reads.
        device: of the networks.
    """
    masked = np.flatnonzero(masks)
    weights = (1 / np.maximum(masks.sum(axis=1), 1) / len(masks))[masked // masks.shape[1]]
    wanted = {"none": masked[:0], "masked": masked, "all": np.arange(masks.size)}[patches]
    arrays = masks, masked, weights.astype(np.float32)
    mask, rows, row_weights = (upload(torch.from_numpy(array), device) for array in arrays)
    streams = [
        torch.from_numpy(
            np.concatenate([cls_rows(packing), patch_rows(packing, 0, prefix, wanted)])
        )
        for packing, prefix in zip((student, *teachers), prefixes, strict=True)
    ]
    return CropRows(mask, rows, row_weights, streams[0], tuple(streams[1:]))
