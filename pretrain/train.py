"""The trainer: shards to a run folder, one visible loop.

Every draw is a function of (seed, step), so a run that was killed goes on from its newest
checkpoint and ends with the same weights, bit for bit on a CPU; on another number of ranks, the
same to rounding.
"""

from contextlib import closing, suppress
from dataclasses import replace

import torch

from eosin.configs.errors import EosinError, InterruptedRunError
from eosin.data_curation.shard_reader import ShardReader
from eosin.launch.artefacts import is_done, mark_done, stamp_of
from eosin.launch.host_memory import keep_freed_memory
from eosin.launch.preflight import preflight
from eosin.launch.process import (
    World,
    choose_device,
    choose_precision,
    device_name,
    join_world,
    usable_cores,
)
from eosin.launch.run_dir import record_run
from eosin.launch.signals import StopRequests
from eosin.launch.status import Status
from eosin.launch.watchdog import Watchdog
from eosin.pretrain.batch import Inputs
from eosin.pretrain.checkpoint import TrainState
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.distill import Losses
from eosin.pretrain.dry_run import mixture_lines
from eosin.pretrain.dry_run import plan as plan
from eosin.pretrain.endings import telling_why
from eosin.pretrain.export import CHECKSUMS, card_at, write_encoder
from eosin.pretrain.gradients import take_gradients
from eosin.pretrain.gram import gram_refresh_due
from eosin.pretrain.journal import Journal
from eosin.pretrain.live_probe import LiveProbe, StartProbe
from eosin.pretrain.loader import batches, open_shards
from eosin.pretrain.local_part import whole_state
from eosin.pretrain.optim import (
    clip_gradients,
    forget_gradients,
    hand_gradients,
    set_rates,
    step_unless_bad,
)
from eosin.pretrain.rates import Rates
from eosin.pretrain.resume import refuse_changes, resume, roll_back
from eosin.pretrain.run_checkpoints import Checkpoints
from eosin.pretrain.setup import Training, set_up
from eosin.pretrain.spike import LossSpikeError
from eosin.pretrain.step_guard import StepGuard
from eosin.pretrain.steps import Steps

JOIN = 2
"""Times `timeout_s` after which a collective gives up: the watchdog, with more to say, is first."""


def pretrain(config: PretrainConfig, start_probe: StartProbe | None = None) -> None:
    """Trains, or goes on training, and exports the teacher.

    Args:
        config: of the training.
        start_probe: makes what scores the teacher while it is trained.

    Raises:
        ConfigError: the folder holds a run with another config, or the shards are too few.
        EosinError: too many bad steps in a row, or no whole checkpoint to resume from.
        InterruptedRunError: a signal, or a rank that was lost; the same command goes on.
    """
    reader = open_shards(config.shards, config.loader)
    if config.preview:
        from eosin.pretrain.preview import preview  # here: drawing takes seconds to import

        preview(reader, config.batch_plan, config.out / "preview.png")
        print(f"first tiles and crops → {config.out / 'preview.png'}")
        return
    torch.set_num_threads(config.threads or usable_cores())
    device = choose_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    with (
        StopRequests() as stops,
        join_world(device, JOIN * config.timeout_s) as world,
        telling_why(config, world),
    ):
        run(config, reader, device, world, stops, start_probe)


def run(
    config: PretrainConfig,
    reader: ShardReader,
    device: torch.device,
    world: World,
    stops: StopRequests,
    start_probe: StartProbe | None = None,
) -> None:
    """The run, on one rank: resumed, trained, exported."""
    out, encoder = config.out, config.out / "encoder"
    refuse_changes(config, world)
    data = Steps(reader, config.plan_of(world))
    stamp = stamp_of(index=data.digest, steps=config.steps)
    if is_done(out / "done.json", stamp) and (encoder / CHECKSUMS).is_file():
        world.tell(f"{out} is finished; nothing to do")
        return
    t = set_up(config, device, choose_precision(config.precision, device), world)
    checkpoints = Checkpoints(out / "checkpoints", config.checkpoints, world)
    state = resume(t, checkpoints, data)
    if world.leads:
        record_run(out, config, {"device": device_name(device), "ranks": world.size})
    status = Status(out, world)
    world.tell(f"{t.choices}, {len(reader)} records, step {state.step} of {config.steps}")
    if world.size > 1 and config.preflight.enabled:
        status.update(state="preflight")
        preflight(world, device, lambda: data.read_bytes(state.step), config.preflight)
    if config.augment.render == "device" and device.type == "cpu":
        world.tell("warning: without a GPU augment.render=device takes ten times as long")
    world.tell(mixture_lines(data.order, config.mixture.column), end="")
    while state.step < config.steps:
        try:
            probe = None
            if start_probe is not None:
                first = state.step + 1 if state.step or not config.start.given else 0
                probe = start_probe(config, world, device, t.dtype, first)
            state = train(t, reader, checkpoints, state, stops, status, probe)
        except LossSpikeError as spike:
            state = roll_back(t, checkpoints, spike)
        except EosinError:
            with suppress(EosinError):  # what is being written is worth having
                checkpoints.finish()
            raise
    checkpoints.finish()
    teacher = whole_state(t.model.teacher.backbone)
    if world.leads:
        from eosin.launch.curves import loss_curves  # here: drawing takes seconds to import

        loss_curves(out / "metrics.jsonl", out / "curves.png")
        write_encoder(encoder, config.model, teacher, card_at(config, state))
        mark_done(out / "done.json", stamp, steps=config.steps)
    status.update(state="finished")
    world.barrier()


def train(
    t: Training,
    reader: ShardReader,
    checkpoints: Checkpoints,
    state: TrainState,
    stops: StopRequests,
    status: Status,
    probe: LiveProbe | None = None,
) -> TrainState:
    """The loop, from ``state.step`` to the last step."""
    config, world, student = t.config, t.world, t.model.student
    stream = batches(
        reader,
        config.plan_of(world, state.skips),
        config.loader,
        first_step=state.step,
        last_step=config.steps,
        pin=t.device.type == "cuda",
    )
    if probe is not None and state.step == 0 and config.start.given:
        probe(t.whole_teacher, card_at(config, state))  # what it starts from
    parts, inputs = dict(student.named_children()), Inputs(t.device, config.mean, config.std)
    guard = StepGuard(
        config.out / "bad_steps.jsonl",
        limit=config.max_bad_steps,
        count=state.bad_steps,
        first_step=state.step,
        terms=Losses._fields,
        modules=list(parts),
        world=world,
    )
    with (
        closing(stream),
        Journal(t, state, status) as journal,
        Watchdog(config.out / "stacks", world, config.timeout_s) as watchdog,
    ):
        for batch in journal.waiting(stream):
            watchdog.beat(batch.step)
            rates = Rates.at(config, batch.step)
            if gram_refresh_due(batch.step, config.objective.gram):
                t.model.refresh_gram_teacher()
            losses, outputs = take_gradients(t, batch, rates, inputs)
            norms = clip_gradients(
                parts.values(), config.optim.clip_norm, config.optim.clip, t.layout.over_shards
            )
            bad = guard.judge(batch.step, batch.rows, torch.stack(losses), norms)
            set_rates(
                t.optimizer,
                rates.lr,
                rates.weight_decay,
                freeze_last=rates.freeze_last,
                backbone=rates.backbone,
            )
            hand_gradients(student)
            step_unless_bad(t.optimizer, bad)
            forget_gradients(student)
            t.model.update_teacher(outputs, rates.momentum, bad)
            del losses

            done = batch.step + 1
            stop, ends = stops.agreed(world), done == config.steps
            logs = ends or done % config.log_every == 0
            saves = ends or stop is not None or done % config.checkpoints.every == 0
            if logs or saves:
                look = guard.look()
            if logs:
                targets = t.model.record_use(batch.step, outputs, bad)
                recorded = min(config.use_window, done) // config.log_every or 1
                health = t.model.health(batch.step, outputs, targets, config.use_window, recorded)
                journal.log(done, look, guard.count, health, rates)
                checkpoints.poll()
            if saves:
                damaged = journal.damaged()
                state = replace(state, step=done, bad_steps=guard.count, damaged=damaged)
                if probe is not None:
                    probe(t.whole_teacher, card_at(config, state))
                checkpoints.save(t.tensors(), state, wait=stop is not None)
                journal.saved(done)
            if stop is not None:
                raise InterruptedRunError(
                    f"{stop} after step {done} of {config.steps}; its checkpoint is written, and "
                    "the same command goes on from it"
                )
            journal.advance()
    stops.end()
    return state
