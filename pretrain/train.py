"""The trainer: shards to a run folder, one visible loop.

Every draw is a function of (seed, step), so a run that was killed goes on from its newest
checkpoint and ends with the same weights, bit for bit on a CPU.
"""

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from eosin.configs.errors import ConfigError, EosinError
from eosin.data_curation.shard_reader import ShardReader
from eosin.launch.artefacts import is_done, mark_done, stamp_of
from eosin.launch.curves import loss_curves
from eosin.launch.process import choose_device, choose_precision, usable_cores
from eosin.launch.progress import Meter
from eosin.launch.run_dir import Metrics, check_unchanged, record_run
from eosin.pretrain.attention import choose_attention, sdpa_attention
from eosin.pretrain.checkpoint import TrainState, list_checkpoints, load_newest, save_checkpoint
from eosin.pretrain.config import MAY_CHANGE, PretrainConfig
from eosin.pretrain.diagnostics import measure_health
from eosin.pretrain.distill import Distiller, Losses, Network, Outputs
from eosin.pretrain.drop_path import DropPath
from eosin.pretrain.export import CHECKSUMS, EncoderCard, write_encoder
from eosin.pretrain.loader import Batch, batches, normalise
from eosin.pretrain.masking import draw_masks
from eosin.pretrain.optim import build_optimizer, clip_gradients, set_rates


def plan(config: PretrainConfig) -> str:
    """What `pretrain` would do, for ``--dry-run``."""
    reader = ShardReader(config.shards)
    with torch.device("meta"):
        network = Network(config.model, config.objective, sdpa_attention)
    backbone = sum(p.numel() for p in network.backbone.parameters())
    total = sum(p.numel() for p in network.parameters())
    seen = config.steps * config.batch_size
    return (
        f"{config.steps} steps of {config.batch_size} tiles from {len(reader)} records: "
        f"{seen} tiles, {seen / len(reader):.1f} epochs\n"
        f"encoder {backbone / 1e6:.1f} M parameters, with heads {total / 1e6:.1f} M; weights, "
        f"teacher, gradients and moments {total * 4 * 5 / 2**30:.2f} GiB\n"
        f"checkpoints of {total * 4 * 4 / 2**30:.2f} GiB every {config.checkpoint_every} steps, "
        f"{config.keep_checkpoints} kept, in {config.out}"
    )


def pretrain(config: PretrainConfig) -> None:
    """Trains, or goes on training, and exports the teacher.

    Raises:
        ConfigError: the folder holds a run with another config, or the shards are too few.
        EosinError: too many bad steps in a row, or no whole checkpoint to resume from.
    """
    if list_checkpoints(config.out / "checkpoints"):
        check_unchanged(config.out, config, MAY_CHANGE)
    reader = ShardReader(config.shards)
    stamp = stamp_of(index=reader.digest, steps=config.steps)
    encoder = config.out / "encoder"
    if is_done(config.out / "done.json", stamp) and (encoder / CHECKSUMS).is_file():
        print(f"{config.out} is finished; nothing to do")
        return
    torch.set_num_threads(config.threads or usable_cores())
    device = choose_device(config.device)
    dtype = choose_precision(config.precision, device)
    attention = choose_attention(config.attention, device, dtype)
    model = Distiller(config.model, config.objective, attention, config.seed).to(device)
    optimizer = build_optimizer(model.student, config.model.depth, config.optim)
    state = resume(config, model, optimizer, reader)
    record_run(config.out, config)
    print(
        f"{device.type}, {dtype}, {attention.__name__}, {len(reader)} records, "
        f"step {state.step} of {config.steps}"
    )
    train(config, model, optimizer, state, device, dtype)
    loss_curves(config.out / "metrics.jsonl", config.out / "curves.png")
    card = EncoderCard(
        steps=config.steps,
        tiles_seen=config.steps * config.batch_size,
        index_digest=reader.digest,
        mpp=state.mpp,
        mean=config.mean,
        std=config.std,
    )
    write_encoder(encoder, config.model, model.teacher.backbone.state_dict(), card)
    mark_done(config.out / "done.json", stamp, steps=config.steps)


def resume(
    config: PretrainConfig, model: Distiller, optimizer: torch.optim.Optimizer, reader: ShardReader
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
        scales = set(reader.index["mpp"].to_pylist())
        return TrainState(0, 0, reader.digest, scales.pop() if len(scales) == 1 else None)
    if state.index_digest != reader.digest:
        raise ConfigError(
            f"{config.out} was trained on other shards (digest {state.index_digest}) than "
            f"{config.shards} holds ({reader.digest}); give it those, or another out="
        )
    return state


def train(
    config: PretrainConfig,
    model: Distiller,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """The loop, from ``state.step`` to ``config.steps``."""
    stream = batches(
        config.shards,
        config.augment,
        config.loader,
        batch_size=config.batch_size,
        seed=config.seed,
        first_step=state.step,
        last_step=config.steps,
    )
    guard = StepGuard(config.out / "bad_steps.jsonl", config.max_bad_steps, state.bad_steps)
    clock = Clock()
    tiles, done_tiles = config.steps * config.batch_size, state.step * config.batch_size
    with (
        Metrics(config.out, state.step + 1, config.wandb, config) as metrics,
        Meter("pretrain", tiles, "tiles", done_tiles) as meter,
    ):
        for batch in clock.waiting(stream):
            for reason in batch.damaged.values():
                print(f"warning at step {batch.step}: {reason}; another record stands in for it")
            rates = Rates.at(config, batch.step)
            losses, outputs = forward(config, model, batch, rates, device, dtype)
            optimizer.zero_grad()
            losses.total.backward()
            norms = clip_gradients(model.student.children(), config.optim.clip_norm)
            allowed = guard.allows(batch, losses.total, norms)
            if allowed:
                set_rates(optimizer, rates.lr, rates.weight_decay, freeze_last=rates.freeze_last)
                optimizer.step()
                model.update_teacher(rates.momentum)

            done = batch.step + 1
            if allowed and (done % config.log_every == 0 or done == config.steps):
                health = measure_health(outputs)
                warmed_up = done > config.optim.lr.warmup * config.steps
                if warmed_up and (alarm := health.alarm(config.batch_size)):
                    print(f"warning at step {done}: {alarm}")
                values = step_values(model.student, losses, rates, norms)
                metrics.write(done, values | health.values() | clock.lap(config.batch_size))
                meter.note = f"loss {values['loss']:.3f}"
            meter.advance(config.batch_size, meter.note)
            if done % config.checkpoint_every == 0 or done == config.steps:
                now = replace(state, step=done, bad_steps=guard.count)
                save_checkpoint(
                    config.out / "checkpoints", model, optimizer, now, config.keep_checkpoints
                )


class Rates(NamedTuple):
    """What the schedules give for one step."""

    lr: float
    weight_decay: float
    momentum: float
    temperature: float
    freeze_last: bool

    @classmethod
    def at(cls, config: PretrainConfig, step: int) -> "Rates":
        """The rates of `step`, a pure function of it."""
        optim, total = config.optim, config.steps
        reference = optim.lr_reference_batch or config.batch_size
        return cls(
            lr=optim.lr.at(step, total) * (config.batch_size / reference) ** 0.5,
            weight_decay=optim.weight_decay.at(step, total),
            momentum=config.momentum.at(step, total),
            temperature=config.temperature.at(step, total),
            freeze_last=step < optim.freeze_last_layer * total,
        )


def forward(
    config: PretrainConfig,
    model: Distiller,
    batch: Batch,
    rates: Rates,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Losses, Outputs]:
    """Masks, normalisation and both networks' forward for one batch."""
    groups = range(config.batch_size // config.group)
    masks = draw_masks(
        config.masks,
        seed=config.seed,
        step=batch.step,
        groups=groups,
        group_size=config.group,
        views=config.augment.n_global,
        grid=(config.model.grid, config.model.grid),
    )
    drop = None
    if config.model.drop_path > 0:
        drop = DropPath(config.model.drop_path, config.seed, batch.step, config.group)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        crops = [
            normalise(c.to(device, non_blocking=True), config.mean, config.std, torch.float32)
            for c in (batch.global_crops, batch.local_crops)
        ]
        out: tuple[Losses, Outputs] = model(*crops, masks, rates.temperature, drop)
    return out


def step_values(
    student: nn.Module, losses: Losses, rates: Rates, norms: Tensor
) -> dict[str, float]:
    """The scalars of one step for metrics.jsonl; waits for the device."""
    terms = {name: float(value.detach()) for name, value in losses._asdict().items()}
    names = [f"grad_norm_{name}" for name, _ in student.named_children()]
    return {
        "loss": terms.pop("total"),
        **terms,
        "lr": rates.lr,
        "weight_decay": rates.weight_decay,
        "momentum": rates.momentum,
        "temperature": rates.temperature,
        **dict(zip(names, norms.tolist(), strict=True)),
    }


class StepGuard:
    """Keeps steps with a NaN or Inf from touching weights, moments and teacher.

    Args:
        path: where the rows of such batches are written down, one JSON object a line.
        limit: bad steps in a row after which training stops.
        count: bad steps before this call.
    """

    def __init__(self, path: Path, limit: int, count: int) -> None:
        self.path, self.limit, self.count = path, limit, count
        self._in_a_row = 0

    def allows(self, batch: Batch, loss: Tensor, norms: Tensor) -> bool:
        """Whether the step may be taken.

        Raises:
            EosinError: the limit of bad steps in a row is reached.
        """
        if bool(torch.isfinite(loss) & torch.isfinite(norms).all()):
            self._in_a_row = 0
            return True
        self.count += 1
        self._in_a_row += 1
        with self.path.open("a") as file:
            file.write(json.dumps({"step": batch.step, "rows": batch.rows.tolist()}) + "\n")
        if self._in_a_row >= self.limit:
            raise EosinError(
                f"{self._in_a_row} steps in a row gave a NaN or Inf, up to step {batch.step}; the "
                f"weights are those before them. Give a lower optim.lr and another out=; the rows "
                f"are in {self.path}"
            )
        return False


class Clock:
    """Tiles a second, and the share of time spent waiting for data, between two laps."""

    def __init__(self) -> None:
        self._lap, self._waited, self._steps = time.monotonic(), 0.0, 0

    def waiting(self, stream: Iterable[Batch]) -> Iterator[Batch]:
        """The stream, with the time that each batch takes to come counted as waiting."""
        iterator = iter(stream)
        while True:
            started = time.monotonic()
            batch = next(iterator, None)
            self._waited += time.monotonic() - started
            if batch is None:
                return
            self._steps += 1
            yield batch

    def lap(self, batch_size: int) -> dict[str, float]:
        """Figures since the last lap; starts a new one."""
        now = time.monotonic()
        seconds = max(now - self._lap, 1e-9)
        figures = {
            "tiles_per_s": self._steps * batch_size / seconds,
            "data_wait": self._waited / seconds,
        }
        self._lap, self._waited, self._steps = now, 0.0, 0
        return figures
