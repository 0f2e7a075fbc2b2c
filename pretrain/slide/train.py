"""The trainer of slide encoders: bags to a run folder, by the loop of every training (`loop`)."""

from collections.abc import Generator
from dataclasses import replace

import torch

from eosin.launch.artefacts import is_done, mark_done, stamp_of
from eosin.launch.process import World, choose_precision
from eosin.launch.signals import StopRequests
from eosin.pretrain.checkpoint import TrainState
from eosin.pretrain.distill import StepRates
from eosin.pretrain.drop_path import DropPath
from eosin.pretrain.dry_run import mixture_lines
from eosin.pretrain.loader import serve
from eosin.pretrain.local_part import whole_state
from eosin.pretrain.loop import Course, run_course, running
from eosin.pretrain.rates import Rates
from eosin.pretrain.resume import refuse_changes
from eosin.pretrain.slide.asked import asked_of
from eosin.pretrain.slide.batch import SlideBatch, Vectors
from eosin.pretrain.slide.config import SlideConfig
from eosin.pretrain.slide.data import SlideData, open_data
from eosin.pretrain.slide.export import write_slide_encoder
from eosin.pretrain.slide.learner import SlideLosses
from eosin.pretrain.slide.opening import SUMS
from eosin.pretrain.slide.setup import SlideTraining, set_up
from eosin.pretrain.slide.steps import SlideSteps
from eosin.pretrain.targets import Outputs
from eosin.pretrain.upload import upload


def pretrain_slides(config: SlideConfig) -> None:
    """Trains, or goes on training, and exports the moving average.

    Raises:
        ConfigError: the folder holds a run with another config, or the bags are too few.
        EosinError: too many bad steps in a row, or no whole checkpoint to resume from.
        InterruptedRunError: a signal, or a rank that was lost; the same command goes on.
    """
    data = open_data(config)
    with running(config) as (device, world, stops):
        run(config, data, device, world, stops)


def plan(config: SlideConfig) -> str:
    """What `pretrain slides` would do, for ``--dry-run``."""
    data = open_data(config)
    steps = SlideSteps(data.sources, config.plan_of(World()), data.paired, data.labels)
    batch = steps[0]
    if isinstance(batch, Exception):
        raise batch
    t = set_up(replace(config, parallel="auto"), data, torch.device("cpu"), torch.float32)
    student = t.model.student
    encoder, whole = (
        sum(p.numel() for p in of.parameters()) / 1e6 for of in (student.backbone, student)
    )
    flops_of, seen = t.flops_of, config.steps * config.batch_size
    assert flops_of is not None
    lengths = batch.stream.lengths
    return (
        f"{data.summary}\n{mixture_lines(steps.order, config.mixture.column)}"
        f"{config.steps} steps of {config.batch_size} samples from {steps.order.n}: {seen} "
        f"samples, {seen / steps.order.n:.1f} epochs\n"
        f"the first step: {len(lengths)} views of {min(lengths)} to {max(lengths)} tiles, "
        f"{sum(lengths):,} in all, {flops_of(batch) / 1e12:.3g} TFLOP\n"
        f"encoder {encoder:.2f} M parameters, with heads {whole:.2f} M\n"
        f"checkpoints every {config.checkpoints.every} steps in {config.out}"
    )


def run(
    config: SlideConfig,
    data: SlideData,
    device: torch.device,
    world: World,
    stops: StopRequests,
) -> None:
    """The run, on one rank: resumed, trained, exported."""
    out, encoder = config.out, config.out / "encoder"
    refuse_changes(config, world)

    def steps_of(state: TrainState | None) -> SlideSteps:
        plan = config.plan_of(world, () if state is None else state.skips)
        return SlideSteps(data.sources, plan, data.paired, data.labels)

    steps = steps_of(None)
    stamp = stamp_of(index=steps.digest, steps=config.steps)
    if is_done(out / "done.json", stamp) and (encoder / SUMS).is_file():
        world.tell(f"{out} is finished; nothing to do")
        return
    t = set_up(config, data, device, choose_precision(config.precision, device), world)

    def stream(state: TrainState) -> Generator[SlideBatch]:
        return serve(
            steps_of(state), range(state.step, config.steps), workers=config.workers,
            prefetch=config.prefetch, pin=device.type == "cuda",
        )  # fmt: skip

    def tell() -> None:
        world.tell(data.summary)
        world.tell(mixture_lines(steps.order, config.mixture.column), end="")

    mpp = {float(s.store.store.rows["mpp"][0].as_py() or 0) for s in data.sources.sources}
    course = Course(
        stream=stream,
        take=lambda batch, rates: take_gradients(t, batch, rates),
        terms=SlideLosses._fields,
        probe=lambda _: None,
        read=steps.read_bytes,
        tell=tell,
        records=len(data.sources.samples),
        digest=steps.digest,
        mpp=mpp.pop() if len(mpp) == 1 else None,
    )
    state, status = run_course(t, course, stops)
    tensors = whole_state(t.model.teacher.backbone)
    if world.leads:
        from eosin.launch.curves import loss_curves  # here: drawing takes seconds to import

        loss_curves(out / "metrics.jsonl", out / "curves.png")
        write_slide_encoder(encoder, config, data, tensors, state)
        mark_done(out / "done.json", stamp, steps=config.steps)
    status.update(state="finished")
    world.barrier()


def take_gradients(
    t: SlideTraining, batch: SlideBatch, rates: Rates
) -> tuple[SlideLosses, Outputs]:
    """Leaves the gradients of a step in the student; its losses and outputs.

    Args:
        t: the training.
        batch: this rank's share of the step, on the host.
        rates: of the step.
    """
    config = t.config
    asked = asked_of(batch, t.device)
    drop = None
    if config.model.drop_path > 0:
        first = t.world.rank * len(batch.rows) // config.group
        drop = DropPath(config.model.drop_path, config.seed, batch.step, config.group, first)
    there = on_device(batch, t.device)
    with torch.autocast(t.device.type, t.dtype, enabled=t.dtype != torch.float32):
        losses, outputs = t.layout.step(
            there, asked, StepRates(rates.temperature, rates.spread), drop
        )
    losses.total.backward()
    return losses, outputs


def on_device(batch: SlideBatch, device: torch.device) -> SlideBatch:
    """What the learner reads of a batch, on its device; the host does not wait."""
    return replace(
        batch,
        stream=batch.stream.to(device),
        groups=upload(batch.groups, device),
        paired={
            name: Vectors(*(upload(x, device) for x in vectors))
            for name, vectors in batch.paired.items()
        },
        targets=None if batch.targets is None else upload(batch.targets, device),
        events=None if batch.events is None else upload(batch.events, device),
    )
