"""What is said and written about a training while it runs: by rank 0, of all ranks."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Self

from eosin.launch.metrics import Metrics
from eosin.launch.progress import StepMeter
from eosin.launch.status import Status
from eosin.pretrain.checkpoint import TrainState
from eosin.pretrain.diagnostics import Measured
from eosin.pretrain.rate import Rate
from eosin.pretrain.rates import Rates, step_values
from eosin.pretrain.spike import SpikeWatch
from eosin.pretrain.step_guard import Look
from eosin.pretrain.trained import B, Trained

DAMAGED_LINES = 20
"""Damaged records that are named; the count of all is in metrics.jsonl."""


class Journal:
    """Metrics, progress, status and warnings of one training; a context manager.

    Args:
        t: the training.
        state: that it goes on from.
        status: of the run.
    """

    def __init__(self, t: Trained, state: TrainState, status: Status) -> None:
        self._t, self._status = t, status
        self._damaged, self._damaged_before = 0, state.damaged
        self._rate = Rate(t.flops_of, t.device, t.dtype, t.world, unit=t.config.unit)
        self._spikes = SpikeWatch(t.config.spike, state.step)
        self._open = ExitStack()
        self._metrics = Metrics(
            t.config.out,
            state.step + 1,
            t.config,
            wandb=t.config.wandb,
            tensorboard=t.config.tensorboard,
            world=t.world,
        )
        self._meter = StepMeter("pretrain", t.config.steps, state.step, shown=t.world.leads)
        status.update(state="training", step=state.step, steps=t.config.steps)

    def __enter__(self) -> Self:
        self._open.enter_context(self._metrics)
        self._open.enter_context(self._meter)
        # the teacher's forward is the last that a rank does before it meets the others
        hook = self._t.model.teacher.register_forward_hook(lambda *_: self._rate.stop())
        self._open.callback(hook.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._open.__exit__(*error)  # type: ignore[arg-type]

    def waiting(self, stream: Iterable[B]) -> Iterator[B]:
        """The batches, each counted and its damage told."""
        for batch in self._rate.waiting(stream):
            for reason in batch.damaged.values():
                self._damaged += 1
                if self._damaged <= DAMAGED_LINES:
                    print(f"warning at step {batch.step}: {reason}; another stands in for it")
            self._rate.start()
            yield batch

    def log(self, done: int, look: Look, bad_steps: int, health: Measured, rates: Rates) -> None:
        """Writes a line of figures, after so many steps; every rank comes here at the same ones.

        Raises:
            LossSpikeError: the loss rose and stays up.
        """
        config, lap = self._t.config, self._rate.lap()
        damaged = self.damaged()
        if not look.values:
            return
        self._spikes.see(done, look.values["total"])
        if not self._t.world.leads:
            return
        found = health.read()
        warmed_up = done > config.optim.lr.warmup * config.steps
        alarms = found.alarms() if warmed_up else []
        for warning in (*alarms, *lap.news):
            print(f"warning at step {done}: {warning}")
        loss = look.values["total"]
        values = {"loss": loss, **step_values(config, look.values, rates)}
        values |= {"damaged": float(damaged)} if damaged else {}
        self._metrics.write(done, values | found.values() | lap.values())
        self._meter.figures = {"loss": loss, **lap.values()}
        self._status.update(
            state="training",
            step=done,
            loss=loss,
            **{f"{lap.unit}_per_s": lap.samples_per_s},
            mfu=lap.mfu,
            data_wait=lap.data_wait,
            memory_gib=lap.memory_gib,
            seconds_left=self._meter.seconds_left(),
            bad_steps=bad_steps,
            damaged=damaged,
            alarms=[*alarms, *lap.slow],
        )

    def damaged(self) -> int:
        """Damaged records that the run met so far; every rank comes here."""
        return self._damaged_before + self._t.world.total(self._damaged)

    def saved(self, done: int) -> None:
        """A checkpoint of so many steps is being written."""
        self._status.update(step=done, checkpoint_step=done)

    def advance(self) -> None:
        """One more step is done."""
        self._meter.advance()
