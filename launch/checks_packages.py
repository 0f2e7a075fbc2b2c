"""Packages: versions against what eosin asks for, whether they import, and optional ones."""

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from packaging.requirements import Requirement

from eosin.configs.errors import printable
from eosin.launch.checks import Finding
from eosin.launch.snapshot import read_commit

AREA = "packages"

_MODULES = {
    "opencv-python-headless": "cv2",
    "openslide-bin": "openslide_bin",
    "openslide-python": "openslide",
    "pillow": "PIL",
    "scikit-learn": "sklearn",
}
"""Where the name of the module is not the package's."""
_OPTIONAL = {
    "xformers": "packed attention on NVIDIA GPUs; without it torch's own is used",
    "wandb": "wandb=offline and wandb=online",
    "tensorboard": "to look at TensorBoard files",
}
_HUB = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT")


@dataclass(frozen=True, kw_only=True)
class Package:
    """One dependency."""

    asked: Requirement
    version: str = ""
    """Empty where it is not installed."""
    failure: str = ""
    """What its import raised."""


@dataclass(frozen=True, kw_only=True)
class Packages:
    """What is installed."""

    eosin: str
    """Version, and commit where it runs from a checkout."""
    python: str
    needed: tuple[Package, ...]
    optional: dict[str, str]
    """Version by name; empty where it is not installed."""
    hub: dict[str, str]
    """The variables of Hugging Face's hub that are set."""


def check(folder: Path) -> list[Finding]:
    """Imports every dependency."""
    return judge(look())


def look() -> Packages:
    """The facts."""
    asked = [Requirement(line) for line in importlib.metadata.requires("eosin") or []]
    commit = read_commit()
    return Packages(
        eosin=_version("eosin") + (f" at {commit[:10]}" if commit else ""),
        python=platform.python_version(),
        needed=tuple(_package(r) for r in asked if r.marker is None or r.marker.evaluate()),
        optional={name: _version(name) for name in _OPTIONAL},
        hub={name: printable(os.environ[name]) for name in _HUB if name in os.environ},
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _package(asked: Requirement) -> Package:
    version, failure = _version(asked.name), ""
    if version:
        try:
            if asked.name in ("torchvision", "timm"):
                from eosin.data_curation.torchvision_import import import_timm

                import_timm()
            import_module(_MODULES.get(asked.name, asked.name.replace("-", "_")))
        except Exception as error:  # anything, from a package of any quality
            failure = printable(f"{type(error).__name__}: {error}")
    return Package(asked=asked, version=version, failure=failure)


def judge(packages: Packages) -> list[Finding]:
    """The rows: one for all that is as it should be, and one for each that is not."""
    sound = [p for p in packages.needed if not _trouble(p)]
    rows = [
        Finding(AREA, "eosin", f"{packages.eosin}, Python {packages.python}"),
        *([_sound(sound)] if sound else []),
        *(_unsound(package) for package in packages.needed if _trouble(package)),
    ]
    for name, version in packages.optional.items():
        rows.append(Finding(AREA, name, version or f"not installed (optional: {_OPTIONAL[name]})"))
    rows.append(_hub(packages.hub))
    return rows


def _sound(packages: Sequence[Package]) -> Finding:
    versions = ", ".join(f"{p.asked.name} {p.version}" for p in packages)
    return Finding(AREA, "needed", versions)


def _trouble(package: Package) -> str:
    if not package.version:
        return "not installed"
    if not package.asked.specifier.contains(package.version, prereleases=True):
        return f"{package.version}, where {package.asked.specifier} is needed"
    return package.failure and f"{package.version} does not import: {package.failure}"


def _unsound(package: Package) -> Finding:
    broken = package.version and package.failure
    advice = "pip install --force-reinstall" if broken else "pip install --upgrade"
    return Finding(
        AREA, package.asked.name, _trouble(package), "", "mend",
        f"{advice} '{package.asked.name}{package.asked.specifier}'",
    )  # fmt: skip


def _hub(variables: dict[str, str]) -> Finding:
    found = ", ".join(f"{name}={value}" for name, value in variables.items()) or "nothing set"
    offline = any(
        variables.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )
    choice = "hf-hub: encoders from the cache alone" if offline else "hf-hub: encoders downloaded"
    return Finding(AREA, "HF hub", found, choice)
