"""Typed configs: dataclass defaults < YAML files < ``key.sub=value`` overrides, merged once.

Past `load_config` no OmegaConf object exists: only frozen dataclasses.
"""

import dataclasses
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import KeyValidationError, OmegaConfBaseException

from eosin.configs.errors import ConfigError

T = TypeVar("T")

_BAD_VALUES = (OmegaConfBaseException, ValueError, TypeError, ArithmeticError)
"""What OmegaConf and the schemas raise for values that do not fit."""


def load_config(
    schema: type[T], files: Sequence[str | Path] = (), overrides: Sequence[str] = ()
) -> T:
    """Builds `schema` from YAML files and overrides; later ones win.

    Args:
        schema: a (nested) dataclass type whose defaults are the lowest layer.
        files: paths of YAML files, or names of shipped ones (see `find_config`).
        overrides: ``key.sub=value`` strings, values in YAML syntax.

    Raises:
        ConfigError: a file is missing or not YAML, a key is unknown (with the nearest known one),
            a value has the wrong type, a required key is missing, or the schema refuses a value.
    """
    merged = OmegaConf.structured(schema)
    for name in files:
        path = find_config(name)
        merged = _merge(merged, _read_yaml(path), f"{path}, ")
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{override}' is not of the form key=value")
        merged = _merge(merged, _read_override(override), "", key)
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if not missing:
            return cast(T, OmegaConf.to_object(merged))
    except _BAD_VALUES as error:
        raise ConfigError(_first_line(error)) from error
    raise ConfigError(f"required and not given: {', '.join(missing)} (write {missing[0]}=…)")


def find_config(name: str | Path) -> Path:
    """The YAML file called `name`: a path, or a shipped config such as ``pretrain/smoke``."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = resources.files("eosin.configs")
    candidate = Path(str(shipped)) / f"{name}.yaml"
    if candidate.is_file():
        return candidate
    root = Path(str(shipped))
    known = sorted(str(p.relative_to(root).with_suffix("")) for p in root.rglob("*.yaml"))
    raise ConfigError(f"no config file '{name}'; shipped ones: {', '.join(known)}")


def to_yaml(config: Any) -> str:
    """The resolved config as plain YAML that `load_config` reads back to an equal object."""
    return _dump(as_plain(config))


def schema_yaml(schema: type[Any]) -> str:
    """All keys of a schema with their defaults; ``???`` marks the required ones."""
    return _dump(_plain(OmegaConf.to_container(OmegaConf.structured(schema))))


def as_plain(config: Any) -> dict[str, Any]:
    """A config as plain JSON-able values (paths as strings, tuples as lists)."""
    return cast(dict[str, Any], _plain(dataclasses.asdict(config)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _dump(plain: Any) -> str:
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> Any:
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, *_BAD_VALUES) as error:
        raise ConfigError(f"{path} is not valid YAML: {_first_line(error)}") from error
    if not OmegaConf.is_dict(loaded):
        raise ConfigError(f"{path} must hold keys and values, not a list or a bare value")
    return loaded


def _read_override(override: str) -> Any:
    try:
        return OmegaConf.from_dotlist([override])
    except (yaml.YAMLError, *_BAD_VALUES) as error:
        raise ConfigError(f"'{override}' is not key=value in YAML: {_first_line(error)}") from error


def _merge(base: Any, layer: Any, where: str, key: str = "") -> Any:
    try:
        return OmegaConf.merge(base, layer)
    except _BAD_VALUES as error:
        named = getattr(error, "full_key", None) or key
        raise ConfigError(f"{where}{named}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    line = str(error).strip().split("\n")[0]
    if isinstance(error, KeyValidationError):  # YAML reads 0.25, yes and null as no text
        return f"{line}: write it in quotes, as in {{'0.25': 1}}"
    return line
