"""What an encoder's patch tokens say of a picture: principal components as colours, CLS attention.

Legend: B tiles, h × w patches of a tile, D features, H heads, P prefix tokens, N all tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eosin.configs.errors import InputError
from eosin.data_curation.encoder import NetworkEncoder
from eosin.data_curation.torchvision_import import import_timm

RGB = npt.NDArray[np.uint8]
FITTED = 100_000
"""Tokens that components are fitted on at most, evenly over those given."""
TAILS = (2.0, 98.0)
"""Percentiles of a component that become 0 and 255."""


@dataclass(frozen=True)
class TokenColours:
    """The first three principal components of tokens, as red, green and blue."""

    mean: npt.NDArray[np.float64]
    """[D]"""
    directions: npt.NDArray[np.float64]
    """[D, 3], each turned so that its component's skew is positive: the same picture whatever the
    sign."""
    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    """[3]: what becomes 0 and 255."""

    @classmethod
    def fit(cls, tokens: npt.NDArray[np.float32]) -> "TokenColours":
        """Components of tokens [..., D]."""
        flat = tokens.reshape(-1, tokens.shape[-1])
        rows = np.linspace(0, len(flat) - 1, min(FITTED, len(flat))).astype(int)
        some = flat[rows].astype(np.float64)
        mean = some.mean(axis=0)
        _, vectors = np.linalg.eigh((some - mean).T @ (some - mean))
        directions = vectors[:, ::-1][:, :3]
        components = (some - mean) @ directions
        directions = directions * np.where((components**3).sum(axis=0) < 0, -1.0, 1.0)
        low, high = np.percentile((some - mean) @ directions, TAILS, axis=0)
        return cls(mean, directions, low, high)

    def __call__(self, tokens: npt.NDArray[np.float32]) -> RGB:
        """Colours [..., 3] of tokens [..., D], uint8."""
        components = (tokens - self.mean) @ self.directions
        scaled = (components - self.low) / np.maximum(self.high - self.low, 1e-12)
        colours: RGB = (scaled.clip(0, 1) * 255).round().astype(np.uint8)
        return colours


def class_attention(encoder: NetworkEncoder, tiles: Sequence[RGB]) -> npt.NDArray[np.float32]:
    """What the class token attends to in the last block, mean over heads, [B, h, w].

    Rows are shares of the attention that patches get; what goes to class and registers is left out.

    Raises:
        InputError: the network has no attention that can be looked into.
    """
    model: Any = encoder.network
    blocks = getattr(model, "blocks", None)
    attention = getattr(blocks[-1], "attn", None) if blocks is not None else None
    if attention is None or not hasattr(attention, "qkv"):
        raise InputError(f"encoder {encoder.name} has no attention with queries, keys and values")
    kept: dict[str, Any] = {}

    def keep(_: Any, given: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        kept["x"], kept["rope"] = given[0], named.get("rope")

    handle = attention.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.inference_mode():
            encoder.embed(list(tiles))
            weights = _weights(attention, kept["x"], kept["rope"])
    finally:
        handle.remove()
    prefix = model.num_prefix_tokens
    patches = weights[:, :, 0, prefix:].mean(dim=1)  # [B, h · w]
    rows = encoder.input_px // model.patch_embed.patch_size[0] if encoder.input_px else 0
    found: npt.NDArray[np.float32] = patches.unflatten(1, (rows, -1)).float().cpu().numpy()
    return found


def _weights(attention: Any, x: Tensor, rope: Tensor | None) -> Tensor:
    """Softmax of queries with keys, [B, H, N, N], as timm's attention computes it."""
    qkv = attention.qkv(x)
    if getattr(attention, "q_bias", None) is not None:
        zero = torch.zeros_like(attention.v_bias)
        qkv = qkv + torch.cat([attention.q_bias, zero, attention.v_bias])
    q, k, _ = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attention.q_norm(q), attention.k_norm(k)
    if rope is not None:
        turn = import_timm().layers.apply_rot_embed_cat
        half = bool(getattr(attention, "rotate_half", False))
        prefix = q.shape[2] - rope.shape[-2]
        q, k = (
            torch.cat([t[:, :, :prefix], turn(t[:, :, prefix:], rope, half=half)], dim=2)
            for t in (q, k)
        )
    weights: Tensor = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return weights
