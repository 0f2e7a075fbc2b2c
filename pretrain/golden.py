"""A drawn tile and what an encoder makes of it: whoever loads the weights can check each stage.

The tile is larger than the encoder's input and not square, so that resizing and cropping are part
of the check. Legend: D width, s side of the input.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from eosin.pretrain.vit import Vit, VitConfig

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def golden_tile(side_px: int) -> NDArray[np.uint8]:
    """A drawn tile for an input of `side_px`, uint8: smooth colours and disks, the same anywhere.

    It is 5 / 4 of the side high and 11 / 8 wide.
    """
    height, width = side_px * 5 // 4, side_px * 11 // 8
    y, x = np.mgrid[:height, :width] / side_px
    tile = np.stack([200 + 40 * x, 150 + 60 * y, 190 + 30 * (x - y)], axis=-1)
    rng = np.random.default_rng(0)
    for cx, cy, radius in rng.uniform((0, 0, 0.02), (1.4, 1.25, 0.06), (50, 3)):
        tile[(x - cx) ** 2 + (y - cy) ** 2 < radius**2] = (90, 60, 140)
    drawn: NDArray[np.uint8] = np.clip(tile, 0, 255).astype(np.uint8)
    return drawn


def prepare(
    tile: NDArray[np.uint8],
    side_px: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Tensor:
    """What an encoder of ours is given of a tile, [3, s, s]: timm's transform, in three lines.

    The shorter side is made s by bicubic convolution, the middle is cut out, and [0, 1] normalised.
    """
    height, width = tile.shape[:2]
    scale = side_px / min(height, width)
    size = tuple(side_px if v == min(height, width) else int(v * scale) for v in (width, height))
    resized = Image.fromarray(tile).resize((size[0], size[1]), Image.Resampling.BICUBIC)
    left, top = (round((v - side_px) / 2) for v in size)
    pixels = np.asarray(resized.crop((left, top, left + side_px, top + side_px)), np.float32)
    scaled = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    return (
        (scaled - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    ).contiguous()


@torch.no_grad()
def golden_record(
    model: VitConfig,
    state: dict[str, Tensor],
    tile: NDArray[np.uint8],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What our own network makes of the golden tile, and how far 16 bits are from that.

    Args:
        model: shape of the network, without additions.
        state: its tensors.
        tile: uint8 [H, W, 3].
        mean: of the input.
        std: likewise.

    Returns:
        ``input`` [3, s, s], ``cls`` and ``mean`` (of the patch tokens) [D], fp32; and by precision
        the cosine with the fp32 CLS token and the largest difference over its largest entry, where
        products are computed in that precision on this machine.
    """
    with torch.device("meta"):  # or weights would be drawn, from the global generator
        vit = Vit(replace(model, drop_path=0.0))
    vit.load_state_dict({k: v.float().cpu() for k, v in state.items()}, strict=True, assign=True)
    image = prepare(tile, model.image_px, mean, std)
    tokens = vit.eval()([image[None]])[0]
    cls = tokens.cls[0].clone()
    drift = {}
    for name, dtype in HALVES.items():
        with torch.autocast("cpu", dtype):
            half = vit([image[None]])[0].cls[0].float()
        drift[name] = {
            "cosine": round(float(torch.cosine_similarity(half, cls, dim=0)), 6),
            "largest": float(f"{float((half - cls).abs().max() / cls.abs().max()):.3g}"),
        }
    return {"input": image, "cls": cls, "mean": tokens.patches[0].mean(dim=0)}, drift
