"""What happens when a step gives a NaN or Inf: nothing, and it is written down.

The verdict on a step is a tensor on the device, which the optimiser and the moving averages obey
there (`optim.step_unless_bad`, `ema.follow`); the host looks at the verdicts every so many steps.
"""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from eosin.configs.errors import EosinError
from eosin.launch.artefacts import write_text
from eosin.launch.process import World
from eosin.pretrain.collectives import mean_over_ranks, sum_over_ranks


class _Judged(NamedTuple):
    """One step that the host has not looked at yet."""

    step: int
    rows: Tensor  # int64 [B], on the host
    figures: Tensor  # fp32 [terms + modules + 1], on the device; the last is the verdict


@dataclass(frozen=True)
class Look:
    """What the host saw of the steps since the last look."""

    bad_steps: tuple[int, ...] = ()
    """Numbers of the steps that were left out."""
    step: int = -1
    """The newest step; -1 where there was none since the last look."""
    values: dict[str, float] = field(default_factory=dict)
    """Loss terms and gradient norms of the newest step, by name; empty where it was bad."""


class StepGuard:
    """Keeps steps with a NaN or Inf from touching weights, moments and teacher.

    Call `judge` in every step, between clipping and the optimiser's step, and `look` at every log
    step, before every checkpoint and at the end. The limit counts across looks, and, by the rows of
    the file, across a resume.

    Args:
        path: where the rows of bad batches are written down, one JSON object a line. Lines of
            steps from `first_step` on are dropped: those steps come again.
        limit: bad steps in a row after which training stops.
        count: bad steps before this call.
        first_step: the step that training begins or goes on with.
        terms: names of the loss terms, in the order of `judge`.
        modules: names of the modules whose gradients are clipped, in the order of `judge`.
        world: the ranks: all of them leave out what is bad on one, figures are means over them, and
            rank 0 writes down the rows of all.
    """

    def __init__(
        self,
        path: Path,
        *,
        limit: int,
        count: int,
        first_step: int,
        terms: Sequence[str],
        modules: Sequence[str],
        world: World | None = None,
    ) -> None:
        if limit < 1:
            raise ValueError(f"limit={limit} must be at least 1")
        self.path, self.limit, self.count = path, limit, count
        self.terms = tuple(terms)
        self.names = (*self.terms, *(f"grad_norm_{name}" for name in modules))
        self._world = world or World()
        self._over_ranks = sum_over_ranks(self._world.group)
        self._mean_over_ranks = mean_over_ranks(self._world.group)
        self._judged: list[_Judged] = []
        self._good: dict[str, float] = {}  # the figures of the newest good step
        self._in_a_row = _forget_from(path, first_step, writes=self._world.leads)
        self._first_bad = ""  # what is known of the first step of the row of bad ones

    @torch.no_grad()
    def judge(self, step: int, rows: Tensor, terms: Tensor, norms: Tensor) -> Tensor:
        """The verdict on a step; does not wait for the device.

        Args:
            step: its number.
            rows: of the index that the batch is made of, int64 [B], on the host.
            terms: the loss terms, the optimised sum among them, [terms].
            norms: of the gradients before clipping, [modules].

        Returns:
            1 where anything is NaN or Inf, else 0; fp32 [].
        """
        figures = torch.cat([terms.detach().float(), norms.float()])
        if len(figures) != len(self.names):
            raise ValueError(f"{len(figures)} figures for the {len(self.names)} {self.names}")
        # exactly 1, which is what the fused kernels compare with
        bad = (self._over_ranks((~figures.isfinite()).any().float()) > 0).float()
        self._judged.append(_Judged(step, rows, torch.cat([figures, bad[None]])))
        return bad

    def look(self) -> Look:
        """Counts and writes down the bad steps since the last look; waits for the device once.

        Every rank comes here after the same steps.

        Raises:
            EosinError: the limit of bad steps in a row was reached.
        """
        judged, self._judged = self._judged, []
        if not judged:
            return Look()
        bad_steps: list[int] = []
        figures: list[list[float]] = self._mean_over_ranks(
            torch.stack([j.figures for j in judged])
        ).tolist()
        for (step, rows, _), (*values, verdict) in zip(judged, figures, strict=True):
            named = dict(zip(self.names, values, strict=True))
            if not verdict:
                self._in_a_row, self._good = 0, named
                continue
            bad_steps.append(step)
            self._count_bad(step, rows, named)
        newest = judged[-1].step
        was_bad = bool(bad_steps) and bad_steps[-1] == newest
        return Look(tuple(bad_steps), newest, {} if was_bad else self._good)

    def _count_bad(self, step: int, rows: Tensor, named: dict[str, float]) -> None:
        broken = [name for name, value in named.items() if not math.isfinite(value)]
        if self._in_a_row == 0 or not self._first_bad:
            self._first_bad = f"at step {step} {self._diagnosis(broken)}"
        self.count += 1
        self._in_a_row += 1
        of_ranks = [json.loads(text) for text in self._world.gather(json.dumps(rows.tolist()))]
        if self._world.leads:
            with self.path.open("a") as file:
                line = {
                    "step": step,
                    "rows": list(itertools.chain(*of_ranks)),
                    "not_finite": broken,
                }
                file.write(json.dumps(line) + "\n")
        if self._in_a_row >= self.limit:
            raise EosinError(
                f"{self._in_a_row} steps in a row gave a NaN or Inf, up to step {step}; "
                f"{self._first_bad}. The weights are those before them. Give a lower optim.lr and "
                f"another out=; the rows are in {self.path}"
            )

    def _diagnosis(self, broken: Sequence[str]) -> str:
        """Which figure was not finite first, and what it was when it last was."""
        # the sum holds every term, so it says the least
        terms = [name for name in self.terms if name in broken]
        terms = [name for name in terms if name not in ("total", "loss")] or terms
        if terms:
            said = f"the loss term {', '.join(terms)} was not finite"
            first = terms[0]
        elif broken:
            said = f"the losses were finite and {', '.join(broken)} was not"
            first = broken[0]
        else:
            return "every figure was finite here, so another rank's was not"
        known = f", {self._good[first]:.4g} in the good step before" if first in self._good else ""
        norms = {n: v for n, v in self._good.items() if n not in self.terms and n != first}
        last = ", ".join(f"{name} {value:.4g}" for name, value in norms.items())
        return said + known + (f" ({last})" if last else "")


def _forget_from(path: Path, first_step: int, *, writes: bool) -> int:
    """Drops the lines of steps from `first_step` on; returns the bad steps right before it."""
    if not path.is_file():
        return 0
    kept: dict[int, str] = {}
    for line in path.read_text().splitlines():
        step = _step_of(line)
        if step is not None and step < first_step:
            kept[step] = line
    if writes:
        write_text(path, "".join(line + "\n" for line in kept.values()))
    in_a_row = 0
    while first_step - 1 - in_a_row in kept:
        in_a_row += 1
    return in_a_row


def _step_of(line: str) -> int | None:
    """The step of a line; None for one that a killed writer left unfinished."""
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError):
        return None
