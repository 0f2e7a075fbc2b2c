"""The loop of every training, and the run around it: resumed, watched, rolled back, saved.

What differs between trainings is handed in (`Course`): how batches come, what a step's losses are,
who scores the encoder meanwhile.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from eosin.configs.errors import EosinError, InterruptedRunError
from eosin.launch.host_memory import keep_freed_memory
from eosin.launch.preflight import preflight
from eosin.launch.process import World, choose_device, device_name, join_world, usable_cores
from eosin.launch.run_dir import record_run
from eosin.launch.signals import StopRequests
from eosin.launch.status import Status
from eosin.launch.watchdog import Watchdog
from eosin.pretrain.checkpoint import TrainState
from eosin.pretrain.endings import telling_why
from eosin.pretrain.journal import Journal
from eosin.pretrain.optim import (
    clip_gradients,
    forget_gradients,
    hand_gradients,
    set_rates,
    step_unless_bad,
)
from eosin.pretrain.rates import Rates
from eosin.pretrain.resume import resume, roll_back
from eosin.pretrain.run_checkpoints import Checkpoints
from eosin.pretrain.spike import LossSpikeError
from eosin.pretrain.step_guard import StepGuard
from eosin.pretrain.trained import Trained
from eosin.pretrain.trainer_config import TrainerConfig

JOIN = 2
"""Times `timeout_s` after which a collective gives up: the watchdog, with more to say, is first."""

Probe: TypeAlias = Callable[[TrainState], None]
"""Scores the encoder after the steps of a state, before their checkpoint is written."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """What one kind of training brings to the loop."""

    stream: Callable[[TrainState], Generator[Any]]
    """The batches of this rank, from a state on."""
    take: Callable[[Any, Rates], tuple[tuple[Tensor, ...], Any]]
    """A batch's losses, named by `terms`, and what `Learner` is given after the step; it leaves the
    gradients in the student."""
    terms: tuple[str, ...]
    """Of the loss, the sum of all first."""
    probe: Callable[[TrainState], Probe | None]
    """Makes what scores the encoder, from a state on; maybe none."""
    read: Callable[[int], int]
    """Reads this rank's share of a step and forgets it; the bytes it got."""
    tell: Callable[[], None]
    """Says what else there is to say before the first step."""
    records: int
    """In the data."""
    digest: str
    """Of the data."""
    mpp: float | None
    """Scale of it."""


@contextmanager
def running(config: TrainerConfig) -> Iterator[tuple[torch.device, World, StopRequests]]:
    """What a run stands in: its threads, its device, its ranks; why it ended is told.

    Raises:
        ConfigError: the device is not there, or the ranks cannot meet.
    """
    torch.set_num_threads(config.threads or usable_cores())
    device = choose_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    with (
        StopRequests() as stops,
        join_world(device, JOIN * config.timeout_s) as world,
        telling_why(config, world),
    ):
        yield device, world, stops


def run_course(t: Trained, course: Course, stops: StopRequests) -> tuple[TrainState, Status]:
    """Trains to the last step, from the newest checkpoint on.

    Raises:
        ConfigError: the folder holds a run with another config or other data.
        EosinError: too many bad steps in a row, or no whole checkpoint to resume from.
        InterruptedRunError: a signal, or a rank that was lost; the same command goes on.
    """
    config, world, out = t.config, t.world, t.config.out
    checkpoints = Checkpoints(out / "checkpoints", config.checkpoints, world)
    state = resume(t, checkpoints, course.digest, course.mpp)
    if world.leads:
        record_run(out, config, {"device": device_name(t.device), "ranks": world.size})
    status = Status(out, world)
    world.tell(f"{t.choices}, {course.records} records, step {state.step} of {config.steps}")
    if world.size > 1 and config.preflight.enabled:
        status.update(state="preflight")
        preflight(world, t.device, lambda: course.read(state.step), config.preflight)
    course.tell()
    while state.step < config.steps:
        try:
            state = train(t, course, checkpoints, state, stops, status)
        except LossSpikeError as spike:
            state = roll_back(t, checkpoints, spike)
        except EosinError:
            with suppress(EosinError):  # what is being written is worth having
                checkpoints.finish()
            raise
    checkpoints.finish()
    return state, status


def train(
    t: Trained,
    course: Course,
    checkpoints: Checkpoints,
    state: TrainState,
    stops: StopRequests,
    status: Status,
) -> TrainState:
    """The loop, from ``state.step`` to the last step."""
    config, world, student = t.config, t.world, t.model.student
    stream, probe = course.stream(state), course.probe(state)
    parts = dict(student.named_children())
    guard = StepGuard(
        config.out / "bad_steps.jsonl",
        limit=config.max_bad_steps,
        count=state.bad_steps,
        first_step=state.step,
        terms=course.terms,
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
            losses, outputs = course.take(batch, rates)
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
                    probe(state)
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
