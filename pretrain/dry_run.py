"""What a training would do, said before it does it."""

import torch

from eosin.launch.process import choose_device, choose_precision
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.loader import open_shards
from eosin.pretrain.network import Network
from eosin.pretrain.order import Order
from eosin.pretrain.steps import Steps

MIXTURE_LINES = 20
"""Of a mixture's strata that are shown."""


def plan(config: PretrainConfig) -> str:
    """What `pretrain` would do, for ``--dry-run``."""
    reader = open_shards(config.shards, config.loader)
    if config.preview:
        return f"the first tiles and crops, drawn into {config.out / 'preview.png'}; no training"
    order = Steps(reader, config.batch_plan).order
    from eosin.pretrain.step_plan import plan_step  # here: a training does not need it

    device = choose_device(config.device)
    dtype = choose_precision(config.precision, device)
    step = plan_step(config, "cuda" if device.type == "cuda" else "cpu", dtype)
    with torch.device("meta"):
        network = Network(config.model, config.objective)
    backbone = sum(p.numel() for p in network.backbone.parameters())
    total = sum(p.numel() for p in network.parameters())
    seen = config.steps * config.batch_size
    return (
        f"{config.steps} steps of {config.batch_size} tiles from {order.n} records: "
        f"{seen} tiles, {seen / order.n:.1f} epochs\n"
        f"{mixture_lines(order, config.mixture.column)}"
        f"encoder {backbone / 1e6:.1f} M parameters, with heads {total / 1e6:.1f} M; one process "
        f"takes {step.peak.total / 2**30:.2f} GiB at its peak ('eosin plan' tells of more)\n"
        f"{_source(config)}"
        f"checkpoints of {step.state_bytes / 2**30:.2f} GiB every {config.checkpoints.every} "
        f"steps, {config.checkpoints.keep} kept, in {config.out}"
    )


def _source(config: PretrainConfig) -> str:
    """From what it starts and of whom it learns, where that is not the usual."""
    start, lines = config.start, []
    if start.given:
        lines.append(f"from {start.weights or start.run}, frozen for {start.frozen_steps} steps")
    if config.teacher.runs:
        lines.append(f"learns from the frozen {', '.join(map(str, config.teacher.runs))}")
    return "".join(f"{line}\n" for line in lines)


def mixture_lines(order: Order, column: str) -> str:
    """How often an epoch shows the tiles of each stratum; nothing where there is no mixture."""
    rows = order.describe() if column else []
    if len(rows) == 1:
        return f"warning: all records have {column}={rows[0].name!r}: the mixture changes nothing\n"
    lines = [
        f"{column}={row.name!r}: {row.records} records, {row.tiles / order.n:.1%} of the "
        f"tiles, each {row.times_seen:.2f} times an epoch\n"
        for row in sorted(rows, key=lambda row: -row.tiles)
    ]
    if len(lines) > MIXTURE_LINES:
        lines[MIXTURE_LINES - 1 : -1] = [f"… and {len(lines) - MIXTURE_LINES} more; shown least:\n"]
    return "".join(lines)
