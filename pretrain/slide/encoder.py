"""The slide encoder: tile features of any sources to tokens, to a slide's vector, to a case's.

Blocks are the tile encoder's, on one packed stream. Legend: T tiles of all sequences, Q sequences,
P tokens before the tiles of each, R = T + Q · P rows, W width, D_s features of a source.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eosin.pretrain.attention import AttentionFn, sdpa_attention
from eosin.pretrain.block import Block, BlockRows, LayerScale
from eosin.pretrain.distance_attention import Places
from eosin.pretrain.drop_path import DropPath
from eosin.pretrain.recompute import Recompute
from eosin.pretrain.slide.attention import (
    PositionName,
    is_turned,
    kernel_of,
    ragged,
    tile_turns,
)
from eosin.pretrain.slide.batch import Stream
from eosin.pretrain.slide.pooling import CaseName, CasePool, Pool, PoolName


@dataclass(frozen=True, kw_only=True)
class SlideModelConfig:
    """Shape of the slide encoder."""

    width: int = 768
    """W: channels of a token."""
    depth: int = 6
    """Blocks; 0: the pooling stands on the adapters (AB-MIL)."""
    heads: int = 12
    """Of the blocks and of the pooling; divides width."""
    mlp_ratio: float = 4.0
    ffn: Literal["gelu", "swiglu"] = "gelu"
    registers: int = 4
    """Register tokens a slide."""
    layer_scale: float = 1.0
    """Initial LayerScale, of the blocks and of a case transformer's; slide encoders are shallow and
    trained for few steps, and 1e-5 as in tile encoders keeps them where they start."""
    drop_path: float = 0.0
    """Share of samples that skip each residual branch in training."""
    adapter: Literal["linear", "gelu", "mlp"] = "gelu"
    """From a source's features to tokens: a linear layer, one with GELU behind it, or two."""
    standardise: bool = True
    """Features are brought to mean 0 and spread 1 a channel, by figures of the training bags."""
    position: PositionName = "alibi"
    """How a tile knows its place."""
    sections: bool = False
    """alibi: tiles attend within their piece of tissue alone."""
    rope_base: float = 100.0
    """rope, fragments: periods reach from 2π to 2π · base tiles."""
    pool: PoolName = "cls"
    """What the slide's vector is."""
    latents: int = 64
    """latents: how many."""
    case: CaseName = "mean"
    """How the slides of a case become one vector."""
    case_depth: int = 3
    """transformer: blocks."""

    def __post_init__(self) -> None:
        low = {"width": 1, "depth": 0, "heads": 1, "registers": 0, "latents": 1, "case_depth": 1}
        for name, least in low.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}")
        if self.position in ("rope", "fragments") and (self.width // self.heads) % 4:
            raise ValueError(
                f"position={self.position} needs heads of a multiple of 4 channels, not "
                f"{self.width // self.heads}"
            )
        if self.depth == 0 and self.pool == "cls":
            raise ValueError("depth=0 has no class token that knows anything; take another pool")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path={self.drop_path} must lie in [0, 1)")
        if self.rope_base <= 1:
            raise ValueError(f"rope_base={self.rope_base} must be above 1")

    @property
    def prefix(self) -> int:
        """P: tokens before the tiles of a slide."""
        if not self.depth:
            return 0
        return self.registers + (self.pool == "cls")

    @property
    def hidden(self) -> int:
        """Hidden channels of the feed-forward."""
        hidden = int(self.width * self.mlp_ratio)
        return hidden if self.ffn == "gelu" else -(-int(hidden * 2 / 3) // 8) * 8


class SourceShape(NamedTuple):
    """What an encoder is told of a source."""

    name: str
    dim: int


class SlideSaid(NamedTuple):
    """What the encoder says of a stream."""

    vector: Tensor
    """Of each sequence, fp32 [Q, W]."""
    tokens: Tensor
    """Contextual, of each tile, [T, W]."""
    latents: Tensor | None
    """[Q, K, W], with ``pool=latents``."""
    weights: Tensor | None
    """How much of the vector is of each tile, fp32 [T]; with ``attention`` and ``mean``."""


class Adapter(nn.Module):
    """Features of one source to tokens."""

    mean: Tensor
    spread: Tensor

    def __init__(self, dim: int, width: int, kind: Literal["linear", "gelu", "mlp"]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.empty(dim))
        self.register_buffer("spread", torch.empty(dim))
        layers: list[nn.Module] = [nn.Linear(dim, width)]
        layers += [nn.GELU()] if kind != "linear" else []
        layers += [nn.Linear(width, width)] if kind == "mlp" else []
        self.layers = nn.Sequential(*layers)

    def standardised(self, features: Tensor) -> Tensor:  # [T, D] → fp32 [T, D]
        """Features about 0, with a spread of 1, as far as the training bags tell."""
        return (features.float() - self.mean) / self.spread

    def forward(self, features: Tensor) -> Tensor:  # [T, D] → fp32 [T, W]
        """Tokens."""
        out: Tensor = self.layers(self.standardised(features))
        return out.float()


class SlideEncoder(nn.Module):
    """See the module. Weights are undefined until `initialise` is called or a state is loaded.

    Args:
        config: shape.
        sources: of the tile features, in the order of the stores.
        attention: kernel where no distance matters.
    """

    def __init__(
        self,
        config: SlideModelConfig,
        sources: Sequence[SourceShape],
        attention: AttentionFn = sdpa_attention,
    ) -> None:
        super().__init__()
        self.config, self.sources = config, tuple(sources)
        width = config.width
        self.adapters = nn.ModuleList(Adapter(s.dim, width, config.adapter) for s in sources)
        if len(sources) > 1:
            self.source_token = nn.Parameter(torch.empty(len(sources), width))
        if config.prefix:
            self.prefix_tokens = nn.Parameter(torch.empty(config.prefix, width))
        self.mask_token = nn.Parameter(torch.empty(1, width))
        self.blocks = nn.ModuleList(
            Block(
                width,
                config.heads,
                config.hidden,
                config.ffn,
                kernel_of(config.position, number, attention),
                1e-6,
            )
            for number in range(config.depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pool = Pool(config.pool, width, config.heads, config.latents)
        self.case = CasePool(config.case, width, config.heads, config.case_depth, attention)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Truncated normal 0.02, biases and mask token zero; features pass as they are."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, LayerScale):
                module.gamma.fill_(self.config.layer_scale)
            elif isinstance(module, Adapter):
                module.mean.zero_()
                module.spread.fill_(1.0)
        for name in ("prefix_tokens", "source_token", "pool.inner.latents", "case.token"):
            parameter = dict(self.named_parameters()).get(name)
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02, generator=generator)
        self.mask_token.zero_()

    @torch.no_grad()
    def standardise(
        self, source: int, mean: NDArray[np.float32], spread: NDArray[np.float32]
    ) -> None:
        """Sets the figures by which a source's features are brought to one scale, [D_s] each."""
        adapter = self.adapters[source]
        assert isinstance(adapter, Adapter)
        adapter.mean.copy_(torch.from_numpy(mean))
        adapter.spread.copy_(torch.from_numpy(spread))

    def recompute(self, mode: Recompute) -> None:
        """Sets what the blocks keep for their backward; gradients do not depend on it."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.recompute = mode

    def forward(
        self,
        stream: Stream,
        hidden: Tensor | None = None,
        drop: DropPath | None = None,
        owner: NDArray[np.int64] | None = None,
        samples: tuple[int, int, int] = (0, 0, 0),
    ) -> SlideSaid:
        """Encodes sequences.

        Args:
            stream: of them, on the encoder's device; none is empty.
            hidden: tiles that the mask token stands for, bool [T].
            drop: the step's stochastic depth; None runs every branch in full.
            owner: view · samples + sample of each sequence; needed with `drop` alone.
            samples: how many, global views, all views; likewise.
        """
        x, layout = self._embed(stream, hidden)
        plan = layout.plan(self.config, drop, owner, samples)
        for number, block in enumerate(self.blocks):
            x = block(x, plan[number])
        x = self.norm(x)
        tiles = x.index_select(0, layout.tiles)
        prefix = x.index_select(0, layout.prefix).unflatten(0, (-1, self.config.prefix or 1))
        pooled = self.pool(prefix, tiles, layout.segment, stream.lengths)
        return SlideSaid(pooled.vector.float(), tiles, pooled.latents, pooled.weights)

    def _embed(self, stream: Stream, hidden: Tensor | None) -> tuple[Tensor, "Layout"]:
        """Rows of the stream with their prefixes, fp32 [R, W], and where they are."""
        tiles = self.mask_token.new_zeros(stream.tokens, self.config.width, dtype=torch.float32)
        for number, adapter in enumerate(self.adapters):
            tokens = adapter(stream.features[number])
            at = stream.places[number]
            if hidden is not None:
                tokens = torch.where(hidden[at][:, None], self.mask_token.float(), tokens)
            if len(self.sources) > 1:
                tokens = tokens + self.source_token[number].float()
            tiles = tiles.index_copy(0, at, tokens)
        layout = Layout(stream, self.config.prefix)
        x = tiles.new_zeros(layout.rows, self.config.width)
        x = x.index_copy(0, layout.tiles, tiles)
        if self.config.prefix:
            prefix = self.prefix_tokens.float().repeat(len(stream.lengths), 1)
            x = x.index_copy(0, layout.prefix, prefix)
        return x, layout


class Layout:
    """Where the tiles and the prefixes of a stream stand among its rows.

    Args:
        stream: of sequences.
        prefix: P.
    """

    def __init__(self, stream: Stream, prefix: int) -> None:
        self._stream, self._prefix = stream, prefix
        device = stream.position.device
        sizes = np.array(stream.lengths, np.int64)
        if sizes.min(initial=1) < 1:
            raise ValueError("a sequence without tokens cannot be encoded")
        self._lengths = sizes + prefix
        starts = np.cumsum(self._lengths) - self._lengths
        segment = np.repeat(np.arange(len(sizes)), sizes)
        tiles = np.arange(len(segment)) + prefix * (segment + 1)
        prefixes = (starts[:, None] + np.arange(prefix)).ravel()
        self.rows = int(self._lengths.sum())
        self.segment, self.tiles, self.prefix = (
            torch.from_numpy(part).to(device) for part in (segment, tiles, prefixes)
        )
        self._sequence = np.repeat(np.arange(len(sizes)), self._lengths)  # of each row

    def plan(
        self,
        config: SlideModelConfig,
        drop: DropPath | None,
        owner: NDArray[np.int64] | None,
        samples: tuple[int, int, int],
    ) -> list[BlockRows]:
        """What each block works on."""
        kept: NDArray[np.bool_] | None = None
        if drop is not None and config.depth:
            assert owner is not None
            kept = _kept(drop, config.depth, samples)[:, :, owner]  # [depth, 2, Q]
        whole = None if kept is not None else self._block_rows(config, None)
        plan = []
        for number in range(config.depth):
            rows = whole
            if rows is None:
                assert kept is not None and drop is not None
                rows = self._block_rows(config, kept[number, 0])
                adds = torch.from_numpy(np.flatnonzero(kept[number, 1][self._sequence]))
                rows = rows._replace(mlp_adds=adds.to(self.tiles.device), scale=drop.scale)
            if not is_turned(config.position, number):
                rows = rows._replace(rotations=None)
            plan.append(rows)
        return plan

    def _block_rows(self, config: SlideModelConfig, kept: NDArray[np.bool_] | None) -> BlockRows:
        """Rows of the sequences that attend; all of them where `kept` is None."""
        device, stream = self.tiles.device, self._stream
        position = stream.position.new_zeros(self.rows, 2).index_copy(
            0, self.tiles, stream.position
        )
        section = stream.section.new_zeros(self.rows).index_copy(0, self.tiles, stream.section)
        placed = torch.zeros(self.rows, dtype=torch.bool, device=device)
        placed[self.tiles] = True
        lengths, attend = self._lengths, None
        if kept is not None:
            attend = torch.from_numpy(np.flatnonzero(kept[self._sequence])).to(device)
            position, section, placed = (x[attend] for x in (position, section, placed))
            lengths = lengths[kept]
        ends = np.concatenate([[0], np.cumsum(lengths)])
        apart = config.sections or config.position == "fragments"
        places = Places(position, placed, tuple(ends.tolist()), section if apart else None)
        turns = None
        if config.position in ("rope", "fragments"):
            turns = tile_turns(position, config.width // config.heads, config.rope_base)
        packing = ragged(lengths.tolist(), places, device)
        return BlockRows(packing, turns, attend=attend, attention_adds=attend)


def _kept(drop: DropPath, depth: int, samples: tuple[int, int, int]) -> NDArray[np.bool_]:
    """Which views of which samples each branch is computed for, bool [depth, 2, views · B]."""
    batch, n_global, views = samples
    kept = np.zeros((depth, 2, views * batch), np.bool_)
    start = 0
    for number, count in enumerate((n_global, views - n_global)):
        if count:
            drawn = drop.draw(depth, number, count * batch, batch) + start
            np.put_along_axis(kept, drawn, True, axis=2)
        start += count * batch
    return kept
