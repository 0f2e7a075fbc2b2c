"""`eosin plan`: what a training will take on a target machine, before anything runs.

Memory and traffic are those of a step taken without values (`pretrain.step_plan`); time, cost and
energy follow from them and from the rates that the config states.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from eosin.launch.artefacts import write_text
from eosin.launch.cards import Card, card_called
from eosin.launch.process import World
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.flops import StepShape, executed_flops, nominal_flops
from eosin.pretrain.frozen_teacher import read_shape
from eosin.pretrain.network import Network
from eosin.pretrain.step_plan import (
    ACTIVATIONS,
    BACKWARD,
    FIGURES,
    INPUTS,
    LOSSES,
    OPTIMISER,
    SPREAD,
    TARGETS,
    TEACHER_FORWARD,
    StepPlan,
    plan_step,
)
from eosin.pretrain.traffic_meter import ALL_GATHER, ALL_REDUCE, Collective

GIB = 2**30
HEADROOM = 0.92
"""Of a GPU's memory that a step may take: the rest is for CUDA, NCCL, and gaps between tensors."""
SAMPLED_STEPS = 16
"""Steps, spread over the run, of which the operations are averaged."""
WITH_BATCH = (ACTIVATIONS, BACKWARD, INPUTS, LOSSES, TARGETS, TEACHER_FORWARD)
"""Parts of memory that grow with the batch."""
CORE_TILES = {"worker": 310.0, "device": 1300.0}
"""Tiles/s that a core decodes and crops, or decodes alone: `eosin bench data`, JPEG of 25 kB."""
REMEDIES = (
    ("recompute=selective",),
    ("parallel=fsdp", "recompute=selective"),
    ("parallel=fsdp", "recompute=full"),
)
"""Tried in turn where a step does not fit; those that change the arithmetic least come first."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig(PretrainConfig):
    """A training, given as to `eosin pretrain`, and the machine that it is planned for."""

    shards: str = "shards"
    """Not read: see `tiles`."""
    out: Path = Path("runs/planned")
    """Not written."""
    gpus: int = 8
    """In all; one rank each."""
    gpu: str = "H100"
    """As in `launch.cards`, e.g. H100, A100, L40S; cpu for a process on this machine."""
    gpus_per_node: int = 8
    """The last node may have fewer."""
    gpu_gib: float = 0
    """Memory of one; 0: as its maker says."""
    mfu: float = 0.4
    """Share of the peak rate that the operations of the networks and losses reach."""
    link_gbs: float = 0
    """GB/s that a GPU sends to others of its node, while it receives as much; 0: the card's."""
    network_gbs: float = 50
    """GB/s that a GPU sends to other nodes (50: a port of 400 Gb/s each)."""
    latency_us: float = 30
    """Of a collective, beside its bytes, on top of the time that the bytes take."""
    price: float = 2.5
    """Of an hour of one GPU, in any currency."""
    watts: float = 0
    """Drawn for one GPU; 0: its board's power, and half of it again for its share of host and
    cooling."""
    tiles: int = 0
    """In the shards; 0: as many as the run sees, each once."""
    tile_kb: float = 25
    """Bytes of an encoded tile in thousands: 25 for a JPEG of 256 px, some 100 for one of 512."""
    shard_records: int = 2048
    """Tiles in a shard."""
    core_tiles: float = 0
    """Tiles/s that a CPU core of the target decodes and crops; 0: see `CORE_TILES`."""
    json: Path | None = None
    """Where the figures are written, too; ``--json FILE`` is the same."""

    def __post_init__(self) -> None:
        """Refuses what is no machine."""
        super().__post_init__()
        for name in ("gpus", "gpus_per_node", "shard_records"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("mfu", "network_gbs", "tile_kb"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        if self.mfu > 1:
            raise ValueError(f"mfu={self.mfu} is a share, at most 1")
        for name in ("gpu_gib", "link_gbs", "latency_us", "price", "watts", "tiles", "core_tiles"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")

    @property
    def card(self) -> Card:
        """What one GPU is, with what the config says of it.

        Raises:
            ConfigError: nobody knows such a GPU.
        """
        known = card_called(self.gpu)
        return replace(
            known,
            memory_gib=self.gpu_gib or known.memory_gib,
            link_gbs=self.link_gbs or known.link_gbs,
            watts=self.watts or 1.5 * known.watts,
        )


@dataclass(frozen=True)
class Flow:
    """The collectives of one part of a step, on one GPU."""

    part: str
    kind: str
    calls: int
    payload_gb: float
    """Of the whole tensors."""
    sent_gb: float
    """By each GPU, with the ring algorithm."""
    seconds: float
    """At the stated rates, one after the other."""
    is_hidden: bool
    """Whether the products of the step go on meanwhile."""


@dataclass(frozen=True)
class Plan:
    """The figures, as they stand in the JSON; of one GPU where not said otherwise."""

    gpus: int
    gpu: str
    layout: str
    batch_of_gpu: int
    encoder_parameters: int
    head_parameters: int
    gflops_of_tile: float
    """Executed, that which counts for an MFU."""
    hardware_gflops_of_tile: float
    """With what the losses compute again."""
    nominal_gflops_of_tile: float
    """With nothing left out."""
    memory_gib: dict[str, float]
    """At the peak, by part."""
    peak_gib: float
    between_steps_gib: float
    fits: bool
    remedies: dict[str, float]
    """Changes that make it fit, and the peak that they give."""
    traffic: list[Flow]
    compute_s: float
    """Of a step, at the stated MFU."""
    hidden_traffic_s: float
    waited_traffic_s: float
    step_s: float
    tiles_per_s: float
    """Of all GPUs."""
    days: float
    gpu_hours: float
    cost: float
    kwh: float
    tiles_seen: int
    tiles: int
    epochs: float
    shards: int
    shards_tb: float
    read_mb_per_s_of_node: float
    cores_of_node: float
    checkpoint_gb: float
    checkpoints_tb: float
    """Of all that are kept."""


def plan(config: PlanConfig) -> None:
    """Prints the plan, and writes it where asked.

    Raises:
        ConfigError: the config cannot be trained on such a machine.
    """
    figures = make_plan(config)
    print("\n".join(report(config, figures)))
    if config.json is not None:
        write_text(config.json, json.dumps(asdict(figures), indent=1) + "\n")


def make_plan(config: PlanConfig) -> Plan:
    """All figures.

    Raises:
        ConfigError: the config cannot be trained on such a machine.
    """
    card = config.card
    step = _step(config)
    peak, limit = step.peak.total / GIB, HEADROOM * card.memory_gib
    flops = _flops(config)
    local = config.batch_size // config.gpus
    rate = config.mfu * card.tflops * 1e12
    flows = list(_flows(config, card, step.collectives))
    compute_s = local * flops["model"] / rate
    hidden = sum(flow.seconds for flow in flows if flow.is_hidden)
    waited = sum(flow.seconds for flow in flows if not flow.is_hidden)
    step_s = max(compute_s, hidden) + waited
    hours = config.gpus * config.steps * step_s / 3600
    tiles_per_s = config.batch_size / step_s
    seen = config.steps * config.batch_size
    tiles = config.tiles or seen
    nodes = -(-config.gpus // config.gpus_per_node)
    with torch.device("meta"):
        network = Network(config.model, config.objective)
    encoder = sum(p.numel() for p in network.backbone.parameters())
    return Plan(
        gpus=config.gpus,
        gpu=card.name,
        layout=step.parallel,
        batch_of_gpu=local,
        encoder_parameters=encoder,
        head_parameters=sum(p.numel() for p in network.parameters()) - encoder,
        gflops_of_tile=flops["model"] / 1e9,
        hardware_gflops_of_tile=flops["hardware"] / 1e9,
        nominal_gflops_of_tile=flops["nominal"] / 1e9,
        memory_gib={name: size / GIB for name, size in step.peak.labels.items()},
        peak_gib=peak,
        between_steps_gib=sum(step.state.values()) / GIB,
        fits=peak <= limit,
        remedies={} if peak <= limit else _remedies(config, step, limit),
        traffic=flows,
        compute_s=compute_s,
        hidden_traffic_s=hidden,
        waited_traffic_s=waited,
        step_s=step_s,
        tiles_per_s=tiles_per_s,
        days=config.steps * step_s / 86400,
        gpu_hours=hours,
        cost=hours * config.price,
        kwh=hours * card.watts / 1000,
        tiles_seen=seen,
        tiles=tiles,
        epochs=seen / tiles,
        shards=-(-tiles // config.shard_records),
        shards_tb=tiles * config.tile_kb / 1e9,
        read_mb_per_s_of_node=tiles_per_s / nodes * config.tile_kb / 1e3,
        cores_of_node=tiles_per_s
        / nodes
        / (config.core_tiles or CORE_TILES[config.augment.render]),
        checkpoint_gb=step.state_bytes / 1e9,
        checkpoints_tb=config.checkpoints.keep * step.state_bytes / 1e12,
    )


def _step(config: PlanConfig) -> StepPlan:
    card, on_cpu = config.card, config.card.is_cpu
    sixteen_bit = config.precision == "bf16" or (config.precision == "auto" and not on_cpu)
    return plan_step(
        config,
        "cpu" if on_cpu else "cuda",
        torch.bfloat16 if sixteen_bit else torch.float32,
        ranks=config.gpus,
        on_node=config.gpus_per_node,
        memory_bytes=None if on_cpu else int(card.memory_gib * GIB),
    )


def _remedies(config: PlanConfig, step: StepPlan, limit: float) -> dict[str, float]:
    """The first change that fits, and a smaller batch that does as things are."""
    found = {}
    for change in REMEDIES:
        keys = dict(pair.split("=") for pair in change)
        if config.gpus == 1 and "parallel" in keys:
            continue
        peak = _step(replace(config, **keys)).peak.total / GIB  # type: ignore[arg-type]
        if peak <= limit:
            found[" ".join(change)] = peak
            break
    labels = step.peak.labels
    growing = sum(labels.get(name, 0) for name in WITH_BATCH) / GIB
    fixed, local = step.peak.total / GIB - growing, config.batch_size // config.gpus
    group = config.group
    smaller = int(local * (limit - fixed) / growing) // group * group if growing else 0
    if smaller >= group:
        peak = fixed + growing * smaller / local
        found[f"batch_size={smaller * config.gpus} ({smaller} a GPU, by proportion)"] = peak
    return found


def _flops(config: PlanConfig) -> dict[str, float]:
    """Operations of a tile, mean over the run: its steps have other crops and masks."""
    batches = config.plan_of(World(size=config.gpus))
    steps = np.linspace(0, config.steps - 1, min(SAMPLED_STEPS, config.steps)).astype(int)
    sums = {"model": 0.0, "hardware": 0.0, "nominal": 0.0}
    teachers = [read_shape(run) for run in config.teacher.runs]
    for step in steps.tolist():
        sizes = batches.augment_of(step)
        shape = StepShape(
            batch=batches.local_batch,
            global_px=sizes.global_px,
            local_px=sizes.local_px,
            n_global=sizes.n_global,
            n_local=sizes.n_local,
            masked=int(batches.masks_of(step).sum()),
            group_size=config.group,
        )
        lean = executed_flops(config.model, config.objective, shape, teachers)
        sums["model"] += lean.model
        sums["hardware"] += lean.hardware
        sums["nominal"] += nominal_flops(config.model, config.objective, shape).hardware
    return {name: total / len(steps) / batches.local_batch for name, total in sums.items()}


def _flows(config: PlanConfig, card: Card, collectives: list[Collective]) -> Iterator[Flow]:
    """The collectives of every step by part and kind, in the order in which they first come."""
    together: dict[tuple[str, str], list[Collective]] = {}
    for collective in (one for one in collectives if one.part != FIGURES):
        together.setdefault((_named(collective), collective.kind), []).append(collective)
    for (part, kind), of in together.items():
        seconds = 0.0
        for one in of:
            near = one.on_node(config.gpus_per_node)
            rate = card.link_gbs
            if near < len(one.members):  # each GPU on the node has a port, and all carry a part
                rate = min(rate, near * config.network_gbs)
            seconds += one.sent / (rate * 1e9) + config.latency_us / 1e6
        payload, sent = sum(one.payload for one in of) / 1e9, sum(one.sent for one in of) / 1e9
        hidden = part not in (SPREAD, OPTIMISER)
        yield Flow(part, kind, len(of), payload, sent, seconds, hidden)


def _named(collective: Collective) -> str:
    """What a collective is for."""
    if collective.part == BACKWARD and collective.dimensions > 1:
        return SPREAD  # its gradient
    if collective.part in (TARGETS, SPREAD, OPTIMISER):
        return collective.part
    if collective.kind == ALL_GATHER:
        return "weights"
    return "gradients" if collective.kind == ALL_REDUCE else "gradients, scattered"


def report(config: PlanConfig, p: Plan) -> Iterator[str]:
    """The plan in words, line by line."""
    card = config.card
    yield (
        f"{config.steps:,} steps of {config.batch_size:,} tiles on {p.gpus} x {p.gpu} "
        f"({p.batch_of_gpu} tiles a GPU, {p.layout})"
    )
    yield (
        f"\nnetwork     encoder {p.encoder_parameters / 1e6:,.1f} M parameters, heads "
        f"{p.head_parameters / 1e6:,.1f} M, together "
        f"{(p.encoder_parameters + p.head_parameters) / 1e6:,.1f} M"
    )
    yield (
        f"work        {p.gflops_of_tile:,.1f} GFLOP a tile executed "
        f"({p.hardware_gflops_of_tile:,.1f} with what the losses compute again; "
        f"{p.nominal_gflops_of_tile:,.1f} with nothing left out)"
    )
    yield "\nmemory of a GPU at the peak, GiB (eager; blocks that are compiled keep less)"
    for name, size in sorted(p.memory_gib.items(), key=lambda item: -item[1]):
        if size >= 0.0005:
            yield f"  {name:<26}{size:>9.2f}"
    yield f"  {'together':<26}{p.peak_gib:>9.2f}   of {card.memory_gib:g}; {_verdict(p, card)}"
    for change, peak in p.remedies.items():
        yield f"  {'with ' + change}: {peak:.2f}"
    if p.traffic:
        yield "\ntraffic of a GPU a step       calls   tensors GB     sent GB          ms"
        for flow in p.traffic:
            yield (
                f"  {flow.part + ', ' + flow.kind:<27}{flow.calls:>6}{flow.payload_gb:>13.4f}"
                f"{flow.sent_gb:>12.4f}{1000 * flow.seconds:>12.2f}"
                + ("" if flow.is_hidden else "  waited for")
            )
    yield (
        f"\nstep        {1000 * p.step_s:,.0f} ms: {1000 * p.compute_s:,.0f} of products at an "
        f"MFU of {config.mfu:.0%} ({card.tflops:g} TFLOP/s at most), "
        f"{1000 * p.hidden_traffic_s:,.0f} of traffic beside them, "
        f"{1000 * p.waited_traffic_s:,.1f} waited for"
    )
    yield f"rate        {p.tiles_per_s:,.0f} tiles/s, {p.tiles_per_s / p.gpus:,.0f} a GPU"
    yield (
        f"time        {p.days:,.2f} days, {p.gpu_hours:,.0f} GPU-hours, {p.cost:,.0f} at "
        f"{config.price:g} an hour, {p.kwh:,.0f} kWh at {card.watts:g} W a GPU"
    )
    yield (
        f"\ntiles       {p.tiles_seen:,} seen, {p.epochs:.2f} times {p.tiles:,} in "
        f"{p.shards:,} shards: {p.shards_tb:,.3f} TB at {config.tile_kb:g} kB"
    )
    yield (
        f"of a node   {p.read_mb_per_s_of_node:,.0f} MB/s read, {math.ceil(p.cores_of_node)} CPU "
        f"cores for the data path (augment.render={config.augment.render})"
    )
    yield (
        f"checkpoint  {p.checkpoint_gb:,.2f} GB, {p.checkpoints_tb:,.3f} TB for the "
        f"{config.checkpoints.keep} that are kept"
    )


def _verdict(p: Plan, card: Card) -> str:
    share = p.peak_gib / card.memory_gib
    if p.fits:
        return f"fits, {share:.0%}"
    hint = "" if p.remedies else "; smaller crops, a smaller network or more GPUs are what is left"
    return f"does NOT fit: {share:.0%}, and {HEADROOM:.0%} is what can be used{hint}"
