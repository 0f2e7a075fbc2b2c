"""The run folder: resolved config, environment, metrics.

``metrics.jsonl`` has one JSON object a line, ascending in ``step``; on resume, lines at and beyond
the step that training goes on from are dropped, so there is neither a gap nor a repeat.
"""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import yaml

from eosin.configs.errors import ConfigError
from eosin.configs.load import as_plain, to_yaml
from eosin.launch.artefacts import stamp_of, write_bytes, write_json, write_text
from eosin.launch.snapshot import read_commit

WandbMode: TypeAlias = Literal["disabled", "offline", "online"]

RECORDED_PACKAGES = (
    "eosin",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "openslide-python",
    "opencv-python-headless",
    "simplejpeg",
    "pyarrow",
)


def record_run(folder: Path, config: Any) -> None:
    """Writes the resolved config and the environment into the run folder."""
    write_text(folder / "config.yaml", to_yaml(config))
    write_json(folder / "environment.json", describe_environment())


def check_unchanged(folder: Path, config: Any, may_change: frozenset[str]) -> None:
    """Refuses to resume a run whose config differs in a key outside `may_change`.

    Args:
        folder: the run folder; nothing is checked when it holds no config yet.
        config: the config of this call.
        may_change: top-level keys that do not touch what is learned.

    Raises:
        ConfigError: naming every key that differs, with both values.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        return
    before = _flatten(yaml.safe_load(path.read_text()))
    now = _flatten(as_plain(config))
    changed = [
        f"{key}: {before.get(key)} → {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key.split(".")[0] not in may_change
    ]
    if changed:
        raise ConfigError(
            f"{folder} holds a run with another config ({'; '.join(changed)}); "
            "give it the same values, or another out="
        )


def describe_environment() -> dict[str, Any]:
    """Versions of Python, of the packages that matter, and the git commit of the code."""
    versions = {}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": versions,
        "git_commit": read_commit(),
    }


class Metrics:
    """Appends to ``metrics.jsonl`` and, when asked, to wandb. Use as a context manager.

    Args:
        folder: the run folder.
        first_step: the step training goes on from.
        wandb: ``disabled``, ``offline`` (files under the run folder) or ``online``.
        config: what wandb shows as the run's config.
    """

    def __init__(self, folder: Path, first_step: int, wandb: WandbMode, config: Any) -> None:
        self.path = folder / "metrics.jsonl"
        if self.path.is_file():
            kept = [
                line for line in self.path.read_bytes().splitlines() if _step_of(line) < first_step
            ]
            write_bytes(self.path, b"".join(line + b"\n" for line in kept))
        self._file = self.path.open("a")
        self._wandb = _start_wandb(folder, wandb, config) if wandb != "disabled" else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one line and hands it to the operating system."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(values, step=step)


def _step_of(line: bytes) -> float:
    """The step of a metrics line; infinity for one that a killed writer left unfinished."""
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        return float("inf")


def _start_wandb(folder: Path, mode: Literal["offline", "online"], config: Any) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"wandb={mode}, but wandb is not installed; pip install 'eosin[wandb]'"
        ) from error
    identity = stamp_of(run=str(folder.resolve()))  # the same run again when it is resumed
    try:
        return wandb.init(
            project="eosin",
            name=folder.name,
            id=identity,
            resume="allow",
            mode=mode,
            dir=str(folder),
            config=as_plain(config),
        )
    except wandb.errors.Error as error:
        raise ConfigError(f"wandb={mode}: {str(error).splitlines()[0]}") from error


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat
