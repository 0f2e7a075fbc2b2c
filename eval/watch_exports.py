"""Live probes in a job of their own: the trainer exports, `eosin watch` scores what appears.

An export is scored once, told by its checksums: one that a resumed training makes again with other
weights replaces its line. Of those that are scored, the best is kept.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from eosin.configs.errors import ConfigError, EosinError, InputError
from eosin.data_curation.embed import embed_in_memory
from eosin.data_curation.encoder import load_encoder
from eosin.eval.probe_tiles import ProbeTiles
from eosin.eval.watch import (
    Budget,
    Due,
    ProbeConfig,
    agreed,
    load_tiles,
    probe_line,
    score_features,
    set_digest,
)
from eosin.launch.artefacts import file_digest, write_text
from eosin.launch.curves import loss_curves
from eosin.launch.device_names import DeviceName
from eosin.launch.metrics import dump_lines, read_lines
from eosin.launch.process import World, choose_device
from eosin.launch.status import read_status
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.export import CHECKSUMS, write_encoder
from eosin.pretrain.model_card import EncoderCard
from eosin.pretrain.vit import Vit

FOLDER = "exports"


class ExportProbe:
    """Exports the teacher for an `eosin watch` to score, within the share of time. See `LiveProbe`.

    Args:
        config: of the probes.
        training: what is scored.
        world: its ranks.
        clock: seconds.
    """

    def __init__(
        self,
        config: ProbeConfig,
        training: PretrainConfig,
        world: World,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._training, self._world, self._due = training, world, Due(config, training)
        self._budget = Budget(config.max_share, clock)
        self._seconds = 0.0  # that the last export took

    def __call__(self, teacher: Vit, card: EncoderCard) -> None:
        """Exports it where a probe is due and there is time for it."""
        if not self._due(card.steps):
            return
        began = self._budget.now()
        if agreed(int(self._budget.left() >= self._seconds), self._world):
            state = {
                name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                for name, tensor in teacher.state_dict().items()
            }
            if self._world.leads:
                folder = self._training.out / FOLDER / f"step_{card.steps:08d}"
                cpu = {name: tensor.detach().cpu() for name, tensor in state.items()}
                write_encoder(folder, self._training.model, cpu, card)
            self._seconds = self._budget.spend(began)
        elif self._world.leads:
            print(
                f"no export for a probe at step {card.steps}: it takes {self._seconds:.1f} s, for "
                "which there is no time yet within probe.max_share"
            )


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Scores every export of a run as it appears, until the run is done."""

    run: Path
    """Run folder of a training with probe.where=job; it need not exist yet."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """The labelled tiles; `every`, `where` and `max_share` are the trainer's affair."""
    device: DeviceName = "auto"
    """A GPU where there is one."""
    poll_s: float = 10.0
    """Seconds between two looks."""

    def __post_init__(self) -> None:
        """Refuses to look all the time."""
        if self.poll_s <= 0:
            raise ValueError(f"poll_s={self.poll_s} must be above 0")


def plan(config: WatchConfig) -> str:
    """What `watch` would do, for ``--dry-run``."""
    tiles = load_tiles(config.probe)
    waiting = [path.name for path in _exports(config.run)]
    return (
        f"{len(tiles)} labelled tiles, {int(tiles.is_val.sum())} of them scored (val); exports "
        f"waiting in {config.run / FOLDER}: {', '.join(waiting) or 'none'}"
    )


def watch(config: WatchConfig, sleep: Callable[[float], None] = time.sleep) -> None:
    """Scores exports until the run is done, then draws the curves anew.

    Raises:
        ConfigError: the run was scored on other tiles before.
        EosinError: the run failed.
        InputError: the tiles cannot be scored on honestly.
    """
    tiles, device = load_tiles(config.probe), choose_device(config.device)
    _check_set(config, tiles)
    while True:
        # first whether it is done, so that an export that came before that is not missed
        is_done, status = (config.run / "done.json").is_file(), read_status(config.run)
        found = [path for path in _exports(config.run) if not _is_scored(config.run, path)]
        for folder in found:
            _score(config, folder, tiles, device)
        if found:
            _remove_all_but_the_best(config.run)
        elif is_done:
            break
        elif status is not None and status.state == "failed":
            raise EosinError(f"{config.run} failed ({status.reason}); what was exported is scored")
        else:
            sleep(config.poll_s)
    metrics = config.run / "metrics.jsonl"
    if metrics.is_file():
        loss_curves(metrics, config.run / "curves.png")


def _exports(run: Path) -> list[Path]:
    """Whole exports, by step; a name that begins with a dot is one in the making."""
    return sorted(path.parent for path in run.glob(f"{FOLDER}/step_*/{CHECKSUMS}"))


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _is_scored(run: Path, folder: Path) -> bool:
    try:
        checksums = file_digest(folder / CHECKSUMS)
    except FileNotFoundError:  # the trainer is putting another in its place
        return True
    known = {(line["step"], line.get("export")) for line in read_lines(run / "probes.jsonl")}
    return (_step(folder), checksums) in known


def _score(config: WatchConfig, folder: Path, tiles: ProbeTiles, device: torch.device) -> None:
    began, probe = time.monotonic(), config.probe
    try:
        checksums = file_digest(folder / CHECKSUMS)
        encoder = load_encoder(f"{folder}@{probe.pooling}", device)
        features = embed_in_memory(encoder, tiles.images, batch_size=probe.batch_size)
        if file_digest(folder / CHECKSUMS) != checksums:
            return  # replaced meanwhile: the next look finds it
    except (FileNotFoundError, InputError):
        if (folder / CHECKSUMS).is_file():
            raise
        return
    scores = score_features(features, tiles, probe.seed)
    step, path = _step(folder), config.run / "probes.jsonl"
    seconds = time.monotonic() - began
    line: dict[str, Any] = {"step": step, "export": checksums}
    line |= probe_line(scores, len(tiles), set_digest(tiles, probe), seconds, None)
    print(
        f"step {step}: kNN {scores.knn:.3f}, few-shot {scores.fewshot:.3f}, RankMe "
        f"{scores.rankme:.1f} in {seconds:.1f} s"
    )
    others = [other for other in read_lines(path) if other["step"] != step]
    write_text(path, dump_lines(sorted([*others, line], key=lambda entry: int(entry["step"]))))


def _remove_all_but_the_best(run: Path) -> None:
    lines = read_lines(run / "probes.jsonl")
    best = max(lines, key=lambda line: float(line["score"]), default={"step": None})
    for folder in _exports(run):
        if best["step"] is not None and _step(folder) != best["step"] and _is_scored(run, folder):
            shutil.rmtree(folder, ignore_errors=True)


def _check_set(config: WatchConfig, tiles: ProbeTiles) -> None:
    digest, path = set_digest(tiles, config.probe), config.run / "probes.jsonl"
    if any(line.get("set", digest) != digest for line in read_lines(path)):
        raise ConfigError(
            f"{path} holds scores on other tiles, pooling or seed than probe.tiles="
            f"{config.probe.tiles}: they cannot be compared; give the same, or move the file away"
        )
