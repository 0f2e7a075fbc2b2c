"""Figures of a run by step: ``metrics.jsonl``, and when asked wandb and TensorBoard files.

``metrics.jsonl`` has one JSON object a line, ascending in ``step``; on resume, lines at and beyond
the step that training goes on from are dropped, so there is neither a gap nor a repeat. TensorBoard
is told to forget the same steps, and wandb goes on with the same run.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeAlias

from eosin.configs.errors import ConfigError
from eosin.configs.load import as_plain
from eosin.launch.artefacts import stamp_of, write_bytes
from eosin.launch.process import World

WandbMode: TypeAlias = Literal["disabled", "offline", "online"]


class _Record(Protocol):
    """A place where figures are kept."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Makes the figures of a step safe against a kill of this process."""

    def close(self, failed: bool) -> None:
        """Nothing more comes."""


class Metrics:
    """Keeps the figures of a run; on all ranks but the first it does nothing. A context manager.

    Args:
        folder: the run folder.
        first_step: the first step that will be written; what is there of it and later is dropped.
        config: what wandb shows as the run's config.
        wandb: ``disabled``, ``offline`` (files under the run folder) or ``online``.
        tensorboard: whether event files are written to ``tensorboard/`` of the run folder.
        world: the ranks.

    Raises:
        ConfigError: wandb or TensorBoard was asked for and is not installed.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        config: Any,
        *,
        wandb: WandbMode = "disabled",
        tensorboard: bool = False,
        world: World | None = None,
    ) -> None:
        self._records: list[_Record] = []
        if world is not None and not world.leads:
            return
        try:
            if tensorboard:
                self._records.append(_TensorBoard(folder / "tensorboard", first_step))
            if wandb != "disabled":
                self._records.append(_Wandb(folder, wandb, config))
            self._records.append(JsonLines(folder / "metrics.jsonl", first_step))
        except BaseException:
            self._close(failed=True)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._close(failed=kind is not None)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Hands the figures of a step to every place."""
        for record in self._records:
            record.write(step, values)

    def _close(self, failed: bool) -> None:
        for record in self._records:
            record.close(failed)


class JsonLines:
    """A file of one JSON object a line, ascending in ``step``.

    Args:
        path: the file; what it holds before `first_step` is kept.
        first_step: lines of it and of later steps are dropped, and half a line of a killed writer.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        if path.is_file():
            write_bytes(path, b"".join(line + b"\n" for line in _kept(path, first_step)))
        self._path = path

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Appends one line and hands it to the operating system."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self, failed: bool) -> None:
        """There is nothing open."""


def read_lines(path: Path, first_step: float = math.inf) -> list[dict[str, Any]]:
    """The objects of such a file before `first_step`; none where there is no file."""
    return [json.loads(line) for line in _kept(path, first_step)] if path.is_file() else []


def dump_lines(records: Iterable[dict[str, Any]]) -> str:
    """The objects as such a file."""
    return "".join(json.dumps(record) + "\n" for record in records)


def _kept(path: Path, first_step: float) -> list[bytes]:
    return [line for line in path.read_bytes().splitlines() if _step_of(line) < first_step]


def _step_of(line: bytes) -> float:
    """The step of a line; infinity for one that a killed writer left unfinished."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class _TensorBoard:
    """Event files, one for each process that went on with the run.

    Their writer has a thread and a buffer: each step is flushed, or a kill would leave a gap.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "tensorboard=true, but TensorBoard is not installed; "
                "pip install 'eosin[tensorboard]'"
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class _Wandb:
    """A run of wandb, told from others by its folder: the same again when it is resumed."""

    def __init__(self, folder: Path, mode: Literal["offline", "online"], config: Any) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"wandb={mode}, but wandb is not installed; pip install 'eosin[wandb]'"
            ) from error
        try:
            self._run = wandb.init(
                project="eosin",
                name=folder.name,
                id=stamp_of(run=str(folder.resolve())),
                resume="allow",
                mode=mode,
                dir=str(folder),
                config=as_plain(config),
            )
        except wandb.errors.Error as error:
            raise ConfigError(f"wandb={mode}: {str(error).splitlines()[0]}") from error

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)
