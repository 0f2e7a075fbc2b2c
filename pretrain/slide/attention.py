"""How the blocks of a slide encoder attend, and how they know where a tile is.

Legend: T tokens, Q sequences, C channels a head.
"""

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from eosin.pretrain.attention import AttentionFn, Packing
from eosin.pretrain.distance_attention import Places, alibi_slopes, distance_attention

PositionName: TypeAlias = Literal["none", "alibi", "rope", "fragments"]
"""``none``: a bag. ``alibi``: Euclidean distance (TITAN, MOOZY). ``rope``: rotary, of both axes.
``fragments``: every second block rotary and within one piece of tissue, the others without a place
and over the whole slide (F-RoPE, EXAONE Path 2.5)."""


def alibi_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """Attention that falls with distance; [T, H, C] each."""
    assert packing.places is not None
    slopes = alibi_slopes(q.shape[1]).to(q.device)
    return distance_attention(q, k, v, slopes, packing.places)


def section_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """Attention within one piece of tissue, whatever the distance; [T, H, C] each."""
    assert packing.places is not None
    flat = q.new_zeros(q.shape[1], dtype=torch.float32)
    return distance_attention(q, k, v, flat, packing.places)


def kernel_of(position: PositionName, block: int, kernel: AttentionFn) -> AttentionFn:
    """What block number `block` attends by.

    Args:
        position: of the encoder.
        block: from 0.
        kernel: where no distance and no section matters.
    """
    if position == "alibi":
        return alibi_attention
    if position == "fragments" and block % 2:
        return section_attention
    return kernel


def is_turned(position: PositionName, block: int) -> bool:
    """Whether queries and keys of a block are rotated by their places."""
    return position == "rope" or (position == "fragments" and block % 2 == 1)


def tile_turns(position: Tensor, channels: int, base: float) -> Tensor:
    """Cosines and sines of tokens at places on a slide, fp32 [T, C].

    Half of the pairs of channels turn with the first axis, half with the second, by angles of
    base^(-4 i / C) a tile (Su et al. 2021, arXiv 2104.09864, for each axis): attention between
    tiles depends on differences of places, whatever the size of the slide. Tokens without a place
    are at 0, the middle of the view.

    Args:
        position: in tiles, [T, 2].
        channels: C, a multiple of 4.
        base: of the periods.
    """
    quarter = channels // 4
    steps = torch.arange(quarter, device=position.device, dtype=torch.float32)
    rates = torch.exp(-math.log(base) * steps / quarter)
    angles = (position.float()[:, :, None] * rates).flatten(1)  # [T, C / 2]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def ragged(lengths: list[int], places: Places | None, device: torch.device) -> Packing:
    """Sequences of any lengths as a packing: neighbours of one length are a group.

    Args:
        lengths: none of them 0.
        places: of the tokens.
        device: of the tokens.
    """
    groups: list[tuple[int, int]] = []
    for length in lengths:
        if groups and groups[-1][1] == length:
            groups[-1] = (groups[-1][0] + 1, length)
        else:
            groups.append((1, length))
    starts = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return Packing(tuple(groups), starts, places)
