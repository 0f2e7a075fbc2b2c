"""Drawn views as one tensor of numbers: all that a device has to be told about a batch.

Packed where the tiles are decoded, in a worker, so that one transfer takes it to the device. What
a view leaves out has its neutral value, so that the device does the same with every view.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eosin.pretrain import colour
from eosin.pretrain.views import Views, scaled_box

BLUR_RADIUS_PX = 4
"""Of the 9 taps of `colour.blur`."""

WEIGHT_STEPS = 2.0**11
"""Steps of a weight from 0 to 1; 16-bit floats hold every one of them."""


class Drawn(NamedTuple):
    """The columns of packed parameters; each float32 [B, columns]."""

    box: Tensor
    """x, y, width, height in the pixels of the decoded tile."""
    order: Tensor
    """Whether columns and rows are reversed and then swapped, 0 or 1 each."""
    stain: Tensor
    """Whether the template is applied."""
    template_mean: Tensor
    template_std: Tensor
    hed_factor: Tensor
    """Neutral 1."""
    hed_shift: Tensor
    """Neutral 0."""
    colour: Tensor
    """3 × 3, row by row; neutral the identity."""
    pivot: Tensor
    """How much of the mean luma is added; neutral 0."""
    taps: Tensor
    """Of the blur, from the middle outwards; neutral (1, 0, 0, 0, 0)."""
    solarize: Tensor

    @staticmethod
    def unpack(packed: Tensor) -> "Drawn":
        """The columns of `packed` float32 [..., `PARAMETERS`], without a copy."""
        return Drawn(*packed.split(_WIDTHS, dim=-1))


_WIDTHS = (4, 3, 1, 3, 3, 3, 3, 9, 1, BLUR_RADIUS_PX + 1, 1)

PARAMETERS = sum(_WIDTHS)
"""Numbers that describe a view to the device."""


def pack_views(views: Views, factor: NDArray[np.int32], decoded_hw: NDArray[np.int32]) -> Tensor:
    """Everything about the views that the device has to know, as one tensor for one transfer.

    Args:
        views: of B tiles, V each, drawn for the tiles' own sizes.
        factor: int [B], by which each tile was decoded smaller than it is.
        decoded_hw: int [B, 2], height and width of each tile as decoded.

    Returns:
        float32 [V, B, `PARAMETERS`], on the CPU.
    """
    shape = (*views.flip.shape, -1)  # [B, V, columns]
    turns = views.quarter_turns.astype(np.int64)
    order = (views.flip ^ np.isin(turns, (1, 2)), np.isin(turns, (2, 3)), turns % 2 == 1)
    hed = views.hed[..., None]
    linear, pivot = _colour_maps(views)
    columns = (
        np.stack(scaled_box(views, factor, decoded_hw), -1),
        np.stack(order, -1),
        views.stain,
        views.stain_mean,
        views.stain_std,
        np.where(hed, views.hed_factor, 1.0),
        np.where(hed, views.hed_shift, 0.0),
        linear,
        pivot,
        _blur_taps(views.blur_sigma_px),
        views.solarize,
    )
    packed = np.concatenate([part.reshape(shape).astype(np.float32) for part in columns], axis=-1)
    return torch.from_numpy(np.ascontiguousarray(packed.transpose(1, 0, 2)))


def _colour_maps(views: Views) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`colour.jitter_matrix` of all views: float64 [B, V, 3, 3] and the share of luma [B, V]."""
    grey, plain, turned = (
        colour.jitter_matrix(np.zeros(3), grey=grey, hue_turns=turns)[:, :3]
        for grey, turns in ((True, 0.0), (False, 0.0), (False, 0.25))
    )
    angle = 2 * np.pi * views.hue_turns.astype(np.float64)
    chroma = np.multiply.outer(np.cos(angle), plain - grey)
    chroma += np.multiply.outer(np.sin(angle), turned - grey)
    jitter, wanted = views.jitter, views.jitter | views.grey
    coloured = np.where(views.grey, 0.0, np.where(jitter, views.saturation, 1.0))
    brightness = np.where(jitter, views.brightness, 1.0)
    contrast = np.where(jitter, views.contrast, 1.0)
    linear = grey + coloured[..., None, None] * np.where(
        jitter[..., None, None], chroma, plain - grey
    )
    linear *= (brightness * contrast)[..., None, None]
    linear = np.where(wanted[..., None, None], linear, np.eye(3))
    return linear, (1 - contrast) * brightness


def _blur_taps(sigma_px: NDArray[np.float32]) -> NDArray[np.float64]:
    """Gaussian taps from the middle out, multiples of 1 / `WEIGHT_STEPS`: float64 [B, V, 5]."""
    distance = np.arange(BLUR_RADIUS_PX + 1)
    sigma = np.maximum(sigma_px, 1e-3)[..., None].astype(np.float64)  # of which all is the middle
    taps = np.exp(-(distance**2) / (2 * sigma**2))
    taps /= taps[..., :1] + 2 * taps[..., 1:].sum(-1, keepdims=True)
    taps = np.round(taps * WEIGHT_STEPS) / WEIGHT_STEPS
    taps[..., 0] = 1 - 2 * taps[..., 1:].sum(-1)
    return taps
