"""`eosin bench slides`: a step of slide self-distillation, against one as it is published.

The other side pads: every window is its whole grid, background cells are tokens that nobody attends
to, the distance bias is a dense matrix made anew in every block, and the heads run on every token.
Weights, views and losses are the same, made-up features as well; both sides forward and backward.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eosin.launch.bench import Row, in_turn, less_is_better, more_is_better, report
from eosin.launch.device_names import DeviceName, PrecisionName
from eosin.launch.process import choose_device, choose_precision
from eosin.pretrain.attention import Packing, choose_attention
from eosin.pretrain.block import Block
from eosin.pretrain.distance_attention import alibi_slopes
from eosin.pretrain.distill import StepRates
from eosin.pretrain.heads import HeadConfig
from eosin.pretrain.network import ObjectiveConfig
from eosin.pretrain.prototype_kernels import choose_kernels
from eosin.pretrain.slide.asked import Asked, asked_of
from eosin.pretrain.slide.batch import SlideBatch, Stream
from eosin.pretrain.slide.encoder import SlideModelConfig, SourceShape
from eosin.pretrain.slide.hiding import HidingConfig, draw_hidden
from eosin.pretrain.slide.learner import SlideLearner
from eosin.pretrain.slide.objective import SlideObjectiveConfig
from eosin.pretrain.slide.train import on_device
from eosin.pretrain.slide.views import View
from eosin.pretrain.spread import SpreadConfig

PUBLISHED = 9.4
"""Slides/s of MOOZY's stage 1 on one GPU of a model not said, by its 436 GPU hours."""


@dataclass(frozen=True, kw_only=True)
class BenchSlidesConfig:
    """A step of the shape of MOOZY's stage 1."""

    batch_size: int = 2
    dim: int = 384
    """Features of a tile."""
    global_tiles: int = 20
    local_tiles: int = 12
    n_local: int = 4
    tissue: float = 0.6
    """Share of a window's cells that hold a tile."""
    width: int = 768
    depth: int = 6
    heads: int = 12
    prototypes: int = 8192
    steps_per_repeat: int = 1
    repeats: int = 3
    """Runs of each side, in turn; figures are medians."""
    threads: int = 1
    device: DeviceName = "auto"
    precision: PrecisionName = "auto"
    json: Path | None = None
    """Where the rows are written, too; ``--json FILE`` is the same."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "steps_per_repeat", "repeats", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 < self.tissue <= 1:
            raise ValueError(f"tissue={self.tissue} must lie in (0, 1]")


@dataclass
class Side:
    """One way of taking the step."""

    learner: SlideLearner
    batch: SlideBatch
    asked: Asked
    device: torch.device
    dtype: torch.dtype

    def step(self) -> Tensor:
        """Forward and backward; the loss."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            losses, _ = self.learner(self.batch, self.asked, StepRates(0.07))
        losses.total.backward()
        self.learner.zero_grad()
        found: Tensor = losses.total.detach()
        return found


def bench_slides(config: BenchSlidesConfig) -> None:
    """Times the sides in turn and reports them."""
    torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    dtype = choose_precision(config.precision, device)
    ours, padded = sides(config, device, dtype)
    losses = [side.step().item() for side in (ours, padded)]  # also warms up
    runs = in_turn(lambda: _timed(ours, config), lambda: _timed(padded, config), config.repeats)
    rates = [config.batch_size / statistics.median(seconds for seconds, _ in side) for side in runs]
    rows: list[Row] = [more_is_better("slides step", "slides/s", *rates)]
    if device.type == "cuda":
        peaks = [max(gib for _, gib in side) for side in runs]
        rows.append(less_is_better("slides memory", "GiB", *peaks))
    views = f"2 × {config.global_tiles}² + {config.n_local} × {config.local_tiles}² tiles"
    title = (
        f"self-distillation of {views}, {config.tissue:.0%} tissue, {config.depth} × "
        f"{config.width}, batch {config.batch_size}, {device.type}, {dtype}, medians of "
        f"{config.repeats} in turn"
    )
    report(title, rows, config.json)
    print(
        f"losses {losses[0]:.5f} and {losses[1]:.5f}; MOOZY's own stage 1, by its card: "
        f"{PUBLISHED} slides/s a GPU"
    )


def sides(config: BenchSlidesConfig, device: torch.device, dtype: torch.dtype) -> tuple[Side, Side]:
    """Ours, and the padded one; the same weights and views."""
    batch, whole, there = _batches(config)
    found = []
    for own, padded in ((batch, False), (whole, True)):
        learner = _learner(config, device, dtype)
        asked = asked_of(own, device)
        if padded:
            asked = _everything(own, asked, device)
            _make_dense(learner, there.to(device), config.heads)
        found.append(Side(learner, on_device(own, device), asked, device, dtype))
    return found[0], found[1]


def _learner(config: BenchSlidesConfig, device: torch.device, dtype: torch.dtype) -> SlideLearner:
    head = HeadConfig(prototypes=config.prototypes, hidden=2048, bottleneck=256)
    objective = SlideObjectiveConfig(
        distil=ObjectiveConfig(targets="centre", head=head, spread=SpreadConfig(weight=0.0))
    )
    model = SlideModelConfig(width=config.width, depth=config.depth, heads=config.heads)
    learner = SlideLearner(
        model, objective, [SourceShape("made up", config.dim)], {}, (),
        choose_attention("auto", device, dtype), choose_kernels("auto", device, dtype),
        config.batch_size, 0,
    )  # fmt: skip
    return learner.to(device)


def _batches(config: BenchSlidesConfig) -> tuple[SlideBatch, SlideBatch, Tensor]:
    """The views' tiles alone; their whole grids, and which cells of those hold a tile."""
    rng = np.random.default_rng(0)
    views, grids, kept = [], [], []
    sizes = [config.global_tiles] * 2 + [config.local_tiles] * config.n_local
    for side in sizes:
        for _ in range(config.batch_size):
            cells = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2)
            tile = rng.random(len(cells)) < config.tissue
            tile[0] = True
            features = rng.standard_normal((len(cells), config.dim)).astype(np.float16)
            zeros = np.zeros(len(cells), np.int64)
            position = (cells - (side - 1) / 2).astype(np.float32)
            grids.append(View((features,), zeros, position, zeros))
            views.append(grids[-1].kept(np.flatnonzero(tile)))
            kept.append(tile)
    hidden = draw_hidden(HidingConfig(), views[: 2 * config.batch_size], seed=0, step=0, group=0)
    hidden += [np.zeros(len(view), np.bool_) for view in views[2 * config.batch_size :]]
    spread = []
    for mask, tile in zip(hidden, kept, strict=True):
        grid = np.zeros(len(tile), np.bool_)
        grid[np.flatnonzero(tile)[mask]] = True
        spread.append(grid)
    owner = np.arange(len(views))
    rows = torch.arange(config.batch_size)
    packed, whole = (
        SlideBatch(0, Stream.pack(of), owner, 2, np.concatenate(masks), rows, rows)
        for of, masks in ((views, hidden), (grids, spread))
    )
    return packed, whole, torch.from_numpy(np.concatenate(kept))


def _everything(batch: SlideBatch, asked: Asked, device: torch.device) -> Asked:
    """The heads on every token of the global views; those that are not hidden weigh nothing."""
    tokens = sum(batch.stream.lengths[: batch.global_sequences])
    rows = torch.arange(tokens, device=device)
    weights = torch.zeros(tokens, device=device)
    weights[asked.rows[0]] = asked.weights[0]
    return asked._replace(rows=(rows,), features=(rows,), weights=(weights,))


def _make_dense(learner: SlideLearner, there: Tensor, heads: int) -> None:
    """Attention over padded grids with a bias of all pairs, made in every block."""

    def attend(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        places, outputs, start, tile = packing.places, [], 0, 0
        assert places is not None
        for count, length in packing.groups:
            rows = slice(start, start + count * length)
            position = places.position[rows].unflatten(0, (count, length))
            placed = places.placed[rows].unflatten(0, (count, length))
            cells = int(placed[0].sum())
            background = torch.zeros_like(placed)
            background[placed] = ~there[tile : tile + count * cells]
            away = torch.cdist(position, position)
            away = torch.where(placed[:, :, None] & placed[:, None], away, 0.0)
            bias = -alibi_slopes(heads).to(q.device)[:, None, None] * away[:, None]
            bias = bias.masked_fill(background[:, None, None], -torch.inf)
            a, b, c = (x[rows].unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(a, b, c, attn_mask=bias.to(q.dtype))
            outputs.append(out.transpose(1, 2).flatten(0, 1))
            start, tile = start + count * length, tile + count * cells
        return torch.cat(outputs)

    networks: list[nn.Module] = [learner.student, learner.teacher]
    for network in networks:
        for block in network.modules():
            if isinstance(block, Block):
                block.attn.attention = attend


def _timed(side: Side, config: BenchSlidesConfig) -> tuple[float, float]:
    """Seconds of a step, and GiB at its peak on a GPU."""
    wait: Callable[[], object] = lambda: None  # noqa: E731
    if side.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        wait = torch.cuda.synchronize
    wait()
    began = time.perf_counter()
    for _ in range(config.steps_per_repeat):
        side.step()
    wait()
    seconds = (time.perf_counter() - began) / config.steps_per_repeat
    peak = torch.cuda.max_memory_allocated() / 2**30 if side.device.type == "cuda" else 0.0
    return seconds, peak
