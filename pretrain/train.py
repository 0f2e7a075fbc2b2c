"""The trainer of tile encoders: shards to a run folder, by the loop of every training (`loop`).

Every draw is a function of (seed, step), so a run that was killed goes on from its newest
checkpoint and ends with the same weights, bit for bit on a CPU; on another number of ranks, the
same to rounding.
"""

from collections.abc import Generator

import torch

from eosin.data_curation.shard_reader import ShardReader
from eosin.launch.artefacts import is_done, mark_done, stamp_of
from eosin.launch.process import World, choose_precision
from eosin.launch.signals import StopRequests
from eosin.pretrain.batch import Batch, Inputs
from eosin.pretrain.checkpoint import TrainState
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.distill import Losses
from eosin.pretrain.dry_run import mixture_lines
from eosin.pretrain.dry_run import plan as plan
from eosin.pretrain.export import CHECKSUMS, card_at, write_encoder
from eosin.pretrain.gradients import take_gradients
from eosin.pretrain.gram import gram_refresh_due
from eosin.pretrain.live_probe import StartProbe
from eosin.pretrain.loader import batches, open_shards
from eosin.pretrain.local_part import whole_state
from eosin.pretrain.loop import Course, Probe, run_course, running
from eosin.pretrain.rates import Rates
from eosin.pretrain.resume import refuse_changes
from eosin.pretrain.setup import set_up
from eosin.pretrain.steps import Steps
from eosin.pretrain.targets import Outputs


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
    with running(config) as (device, world, stops):
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
    mpp = reader.index.single_mpp() if config.augment.mpp is None else config.augment.mpp
    inputs = Inputs(device, config.mean, config.std)

    def take(batch: Batch, rates: Rates) -> tuple[Losses, Outputs]:
        if gram_refresh_due(batch.step, config.objective.gram):
            t.model.refresh_gram_teacher()
        return take_gradients(t, batch, rates, inputs)

    def stream(state: TrainState) -> Generator[Batch]:
        plan = config.plan_of(world, state.skips)
        pin = device.type == "cuda"
        return batches(
            reader, plan, config.loader, first_step=state.step, last_step=config.steps, pin=pin
        )

    def probe(state: TrainState) -> Probe | None:
        if start_probe is None:
            return None
        first = state.step + 1 if state.step or not config.start.given else 0
        score = start_probe(config, world, device, t.dtype, first)
        if not state.step and config.start.given:
            score(t.whole_teacher, card_at(config, state))  # what it starts from
        return lambda state: score(t.whole_teacher, card_at(config, state))

    def tell() -> None:
        if config.augment.render == "device" and device.type == "cpu":
            world.tell("warning: without a GPU augment.render=device takes ten times as long")
        world.tell(mixture_lines(data.order, config.mixture.column), end="")

    course = Course(
        stream=stream,
        take=take,
        terms=Losses._fields,
        probe=probe,
        read=data.read_bytes,
        tell=tell,
        records=len(reader),
        digest=data.digest,
        mpp=mpp,
    )
    state, status = run_course(t, course, stops)
    teacher = whole_state(t.model.teacher.backbone)
    if world.leads:
        from eosin.launch.curves import loss_curves  # here: drawing takes seconds to import

        loss_curves(out / "metrics.jsonl", out / "curves.png")
        write_encoder(encoder, config.model, teacher, card_at(config, state))
        mark_done(out / "done.json", stamp, steps=config.steps)
    status.update(state="finished")
    world.barrier()
