"""The trainer: shards to a run folder, one visible loop.

Every draw is a function of (seed, step), so a run that was killed goes on from its newest
checkpoint and ends with the same weights, bit for bit on a CPU.
"""

from dataclasses import replace
from typing import NamedTuple

import torch

from eosin.configs.errors import ConfigError
from eosin.data_curation.shard_reader import ShardReader
from eosin.launch.artefacts import is_done, mark_done, stamp_of
from eosin.launch.metrics import Metrics
from eosin.launch.process import World, choose_device, choose_precision, usable_cores
from eosin.launch.progress import StepMeter
from eosin.launch.run_dir import check_unchanged, record_run
from eosin.launch.status import Status
from eosin.pretrain.attention import choose_attention
from eosin.pretrain.backbone_weights import load_backbone
from eosin.pretrain.batch import Batch, Inputs
from eosin.pretrain.checkpoint import TrainState, list_checkpoints, load_newest, save_checkpoint
from eosin.pretrain.config import MAY_CHANGE, PretrainConfig
from eosin.pretrain.distill import Distiller, Losses, Outputs, StepRates
from eosin.pretrain.drop_path import DropPath
from eosin.pretrain.export import CHECKSUMS, EncoderCard, write_encoder
from eosin.pretrain.gram import gram_active, gram_refresh_due
from eosin.pretrain.live_probe import LiveProbe, StartProbe
from eosin.pretrain.loader import batches, open_shards
from eosin.pretrain.network import Network
from eosin.pretrain.optim import build_optimizer, clip_gradients, set_rates, step_unless_bad
from eosin.pretrain.order import Order
from eosin.pretrain.positions import Jitter
from eosin.pretrain.prototype_kernels import choose_kernels
from eosin.pretrain.rate import Rate
from eosin.pretrain.step_guard import StepGuard
from eosin.pretrain.steps import Steps

DAMAGED_LINES = 20
"""Damaged records that are named; the count of all is in metrics.jsonl."""

MIXTURE_LINES = 20
"""Of a mixture's strata that are shown."""


def plan(config: PretrainConfig) -> str:
    """What `pretrain` would do, for ``--dry-run``."""
    reader = open_shards(config.shards, config.loader)
    if config.preview:
        return f"the first tiles and crops, drawn into {config.out / 'preview.png'}; no training"
    order = Steps(reader, config.batch_plan).order
    with torch.device("meta"):
        network = Network(config.model, config.objective)
    backbone = sum(p.numel() for p in network.backbone.parameters())
    total = sum(p.numel() for p in network.parameters())
    seen = config.steps * config.batch_size
    return (
        f"{config.steps} steps of {config.batch_size} tiles from {order.n} records: "
        f"{seen} tiles, {seen / order.n:.1f} epochs\n"
        f"{mixture_lines(order, config.mixture.column)}"
        f"encoder {backbone / 1e6:.1f} M parameters, with heads {total / 1e6:.1f} M; weights, "
        f"teacher, gradients and moments {total * 4 * 5 / 2**30:.2f} GiB\n"
        f"checkpoints of {total * 4 * 4 / 2**30:.2f} GiB every {config.checkpoint_every} steps, "
        f"{config.keep_checkpoints} kept, in {config.out}"
    )


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


def pretrain(config: PretrainConfig, start_probe: StartProbe | None = None) -> None:
    """Trains, or goes on training, and exports the teacher.

    Args:
        config: of the training.
        start_probe: makes what scores the teacher while it is trained.

    Raises:
        ConfigError: the folder holds a run with another config, or the shards are too few.
        EosinError: too many bad steps in a row, or no whole checkpoint to resume from.
    """
    reader = open_shards(config.shards, config.loader)
    if config.preview:
        from eosin.pretrain.preview import preview  # here: drawing takes seconds to import

        preview(reader, config.batch_plan, config.out / "preview.png")
        print(f"first tiles and crops → {config.out / 'preview.png'}")
        return
    if list_checkpoints(config.out / "checkpoints"):
        check_unchanged(config.out, config, MAY_CHANGE)
    data = Steps(reader, config.batch_plan)
    stamp = stamp_of(index=data.digest, steps=config.steps)
    encoder = config.out / "encoder"
    if is_done(config.out / "done.json", stamp) and (encoder / CHECKSUMS).is_file():
        print(f"{config.out} is finished; nothing to do")
        return
    torch.set_num_threads(config.threads or usable_cores())
    device = choose_device(config.device)
    dtype = choose_precision(config.precision, device)
    model, choices = build_model(config, device, dtype)
    optimizer = build_optimizer(model.student, config.model.depth, config.optim)
    state = resume(config, model, optimizer, data)
    record_run(config.out, config)
    print(f"{choices}, {len(reader)} records, step {state.step} of {config.steps}")
    if config.augment.render == "device" and device.type == "cpu":
        print("warning: without a GPU augment.render=device takes ten times as long as =worker")
    print(mixture_lines(data.order, config.mixture.column), end="")
    world, status = World(), Status(config.out, World())
    status.update(state="training", step=state.step, steps=config.steps)
    probe = None
    if start_probe is not None:
        probe = start_probe(config, world, device, dtype, state.step + 1)
    train(config, reader, model, optimizer, state, device, dtype, world, status, probe)
    from eosin.launch.curves import loss_curves  # here: drawing takes seconds to import

    loss_curves(config.out / "metrics.jsonl", config.out / "curves.png")
    card = card_at(config, config.steps, state)
    write_encoder(encoder, config.model, model.teacher.backbone.state_dict(), card)
    mark_done(config.out / "done.json", stamp, steps=config.steps)
    status.update(state="finished", step=config.steps, reason="all steps are done")


def card_at(config: PretrainConfig, step: int, state: TrainState) -> EncoderCard:
    """What an export of the teacher after `step` steps says about itself."""
    return EncoderCard(
        steps=step,
        tiles_seen=step * config.batch_size,
        index_digest=state.index_digest,
        mpp=state.mpp,
        mean=config.mean,
        std=config.std,
    )


def build_model(
    config: PretrainConfig, device: torch.device, dtype: torch.dtype
) -> tuple[Distiller, str]:
    """Student and teacher on the device, with the kernels that suit it; and what was chosen."""
    attention = choose_attention(config.attention, device, dtype)
    kernels = choose_kernels(config.loss_kernels, device, dtype)
    model = Distiller(config.model, config.objective, attention, kernels, config.group, config.seed)
    if config.objective.gram.frozen_from is not None and config.objective.gram.weight > 0:
        load_backbone(model.gram_teacher, config.objective.gram.frozen_from)
    model.to(device)
    model.student.backbone.recompute(config.recompute)
    compiled = config.compile == "blocks" or (config.compile == "auto" and device.type == "cuda")
    if compiled:
        model.compile()
    names = (device.type, str(dtype), attention.__name__, type(kernels).__name__)
    return model, ", ".join((*names, "compiled" if compiled else "eager"))


def resume(
    config: PretrainConfig, model: Distiller, optimizer: torch.optim.Optimizer, data: Steps
) -> TrainState:
    """Loads the newest whole checkpoint; the state of step 0 where there is none.

    Raises:
        ConfigError: the run was trained on other shards.
        EosinError: there are checkpoints, and none is whole.
    """
    state, passed_over = load_newest(config.out / "checkpoints", model, optimizer)
    for line in passed_over:
        print(f"passed over a damaged checkpoint: {line}")
    if state is None:
        mpp = data.reader.index.single_mpp() if config.augment.mpp is None else config.augment.mpp
        return TrainState(0, 0, data.digest, mpp)
    if state.index_digest != data.digest:
        raise ConfigError(
            f"{config.out} was trained on other shards, or other columns of their index (digest "
            f"{state.index_digest}), than {config.shards} holds ({data.digest}); give it those, "
            "or another out="
        )
    return state


def train(
    config: PretrainConfig,
    reader: ShardReader,
    model: Distiller,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    device: torch.device,
    dtype: torch.dtype,
    world: World,
    status: Status,
    probe: LiveProbe | None,
) -> None:
    """The loop, from ``state.step`` to ``config.steps``."""
    stream = batches(
        reader,
        config.batch_plan,
        config.loader,
        first_step=state.step,
        last_step=config.steps,
        pin=device.type == "cuda",
    )
    parts = dict(model.student.named_children())
    guard = StepGuard(
        config.out / "bad_steps.jsonl",
        limit=config.max_bad_steps,
        count=state.bad_steps,
        first_step=state.step,
        terms=Losses._fields,
        modules=list(parts),
    )
    inputs, damaged = Inputs(device, config.mean, config.std), 0
    rate = Rate(config, device, dtype, world)
    with (
        Metrics(
            config.out,
            state.step + 1,
            config,
            wandb=config.wandb,
            tensorboard=config.tensorboard,
            world=world,
        ) as metrics,
        StepMeter("pretrain", config.steps, state.step, shown=world.leads) as meter,
    ):
        for batch in rate.waiting(stream):
            rate.start()
            for reason in batch.damaged.values():
                damaged += 1
                if damaged <= DAMAGED_LINES:
                    print(f"warning at step {batch.step}: {reason}; another stands in for it")
            rates = Rates.at(config, batch.step)
            if gram_refresh_due(batch.step, config.objective.gram):
                model.refresh_gram_teacher()
            losses, outputs = forward(config, model, batch, rates, inputs, dtype)
            rate.stop()
            losses.total.backward()
            norms = clip_gradients(parts.values(), config.optim.clip_norm, config.optim.clip)
            bad = guard.judge(batch.step, batch.rows, torch.stack(losses), norms)
            set_rates(optimizer, rates.lr, rates.weight_decay, freeze_last=rates.freeze_last)
            step_unless_bad(optimizer, bad)
            optimizer.zero_grad()
            model.update_teacher(outputs, rates.momentum, bad)
            targets = model.record_use(batch.step, outputs, bad)
            del losses

            done = batch.step + 1
            logs = done % config.log_every == 0 or done == config.steps
            saves = done % config.checkpoint_every == 0 or done == config.steps
            look = guard.look() if logs or saves else None
            if logs and look and look.values:
                health = model.health(batch.step, outputs, targets, config.use_window).read()
                alarms = []
                if done > config.optim.lr.warmup * config.steps:
                    alarms = health.alarms()
                lap = rate.lap()
                for alarm in (*alarms, *lap.news):
                    print(f"warning at step {done}: {alarm}")
                values = {"loss": look.values["total"], **step_values(config, look.values, rates)}
                values |= {"damaged": float(damaged)} if damaged else {}
                meter.figures = values | lap.values()
                metrics.write(done, values | health.values() | lap.values())
                status.update(
                    step=done,
                    loss=values["loss"],
                    alarms=[*alarms, *lap.slow],
                    bad_steps=guard.count,
                    damaged=damaged,
                    seconds_left=meter.seconds_left(),
                    **{"mfu": None} | lap.values(),
                )
            meter.advance()
            if saves:
                if probe is not None:
                    probe(model.teacher.backbone, card_at(config, done, state))
                now = replace(state, step=done, bad_steps=guard.count)
                status.update(state="checkpointing", step=done)
                save_checkpoint(
                    config.out / "checkpoints", model, optimizer, now, config.keep_checkpoints
                )
                status.update(state="training", checkpoint_step=done)


class Rates(NamedTuple):
    """What the schedules give for one step."""

    lr: float
    weight_decay: float
    momentum: float
    temperature: float
    spread: float
    freeze_last: bool

    @classmethod
    def at(cls, config: PretrainConfig, step: int) -> "Rates":
        """The rates of `step`, a pure function of it."""
        optim, total = config.optim, config.steps
        reference = optim.lr_reference_batch or config.batch_size
        scale = (config.batch_size / reference) ** 0.5  # of the peak, not of the end (DINOv2)
        lr = replace(optim.lr, start=optim.lr.start * scale, peak=optim.lr.peak * scale)
        return cls(
            lr=lr.at(step, total),
            weight_decay=optim.weight_decay.at(step, total),
            momentum=config.momentum.at(step, total),
            temperature=config.temperature.at(step, total),
            spread=_ramp(step / total, *config.spread_ramp),
            freeze_last=optim.last_layer_frozen(step, total),
        )


def _ramp(progress: float, low: float, high: float) -> float:
    """0 up to `low`, 1 from `high` on, a line between them."""
    return min(max((progress - low) / (high - low), 0.0), 1.0) if low < high else 1.0


def forward(
    config: PretrainConfig,
    model: Distiller,
    batch: Batch,
    rates: Rates,
    inputs: Inputs,
    dtype: torch.dtype,
) -> tuple[Losses, Outputs]:
    """Crops on the device, and both networks' forward for one batch."""
    drop = None
    if config.model.drop_path > 0:
        drop = DropPath(config.model.drop_path, config.seed, batch.step, config.group)
    jitter = Jitter(config.seed, batch.step)
    gram = gram_active(batch.step, config.objective.gram)
    crops = inputs(batch.images)
    with torch.autocast(inputs.device.type, dtype, enabled=dtype != torch.float32):
        step_rates = StepRates(rates.temperature, rates.spread, gram)
        out: tuple[Losses, Outputs] = model(*crops, batch.masks, step_rates, drop, jitter)
    return out


def step_values(
    config: PretrainConfig, figures: dict[str, float], rates: Rates
) -> dict[str, float]:
    """The scalars of one step for metrics.jsonl, without terms that the objective has not."""
    o = config.objective
    off = {
        "total": True,
        "dino_global": o.dino == 0,
        "dino_local": o.dino == 0,
        "ibot": o.ibot == 0,
        "jepa": o.jepa.weight == 0,
        "spread": o.spread.weight == 0,
        "gram": o.gram.weight == 0,
    }
    return {
        **{name: value for name, value in figures.items() if not off.get(name, False)},
        "lr": rates.lr,
        "weight_decay": rates.weight_decay,
        "momentum": rates.momentum,
        "temperature": rates.temperature,
    }
