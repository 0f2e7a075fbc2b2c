"""The run folder: resolved config and environment."""

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from eosin.configs.load import as_plain, to_yaml
from eosin.launch.artefacts import write_json, write_text
from eosin.launch.snapshot import read_commit

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


def record_run(folder: Path, config: Any, hardware: Mapping[str, Any] | None = None) -> None:
    """Writes the resolved config and the environment into the run folder.

    Args:
        folder: of the run.
        config: of it.
        hardware: what it runs on, beside the versions.
    """
    write_text(folder / "config.yaml", to_yaml(config))
    write_json(folder / "environment.json", {**describe_environment(), **(hardware or {})})


def changes_since(folder: Path, config: Any, may_change: frozenset[str]) -> list[str]:
    """What differs from the config of the run in `folder`; nothing when it holds none yet.

    Args:
        folder: the run folder.
        config: the config of this call.
        may_change: top-level keys that do not touch what is learned.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        return []
    return changed_keys(yaml.safe_load(path.read_text()), as_plain(config), may_change)


def changed_keys(
    before: Mapping[str, Any], now: Mapping[str, Any], may_change: frozenset[str]
) -> list[str]:
    """Every key that differs, with both values, but for those that may change, with all below."""
    one, other = _flatten(before), _flatten(now)
    return [
        f"{key}: {one.get(key)} → {other.get(key)}"
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key) and not {key, key.split(".")[0]} & may_change
    ]


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


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat
