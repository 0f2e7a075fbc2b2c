"""The verb `eval reproduce`: runs an evaluation again and says whether it finds the same numbers.

``results.json`` holds no path, so the config that was written beside it (``config.yaml``) says what
to run; the task and the encoders must have the digests that the results state, and every number is
held against its old one.
"""

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from eosin.configs.errors import EosinError, InputError
from eosin.configs.load import load_config
from eosin.eval.config import EvalConfig
from eosin.eval.results import Results, load_results
from eosin.eval.run import CONFIG_NAME, evaluate


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """Runs an evaluation again, embedding anew, and compares."""

    results: Path
    """A folder of `eosin eval`, or the results.json in it."""
    out: Path | None = None
    """Where the second run is kept; null: nowhere."""
    tolerance: float = 0.0
    """How far a number may be from its old one; 0 on one machine and CPU, some 1e-3 elsewhere."""
    task: str = ""
    """The task's tiles, where they lie elsewhere now."""
    encoder: str = ""
    """The encoder, where it lies elsewhere now."""


def reproduce(config: ReproduceConfig) -> None:
    """Runs again and compares.

    Raises:
        InputError: there is no evaluation, or its tiles or encoders are not what they were.
        EosinError: numbers differ; the message says how many, and the first.
    """
    folder = config.results if config.results.is_dir() else config.results.parent
    before = load_results(folder / "results.json")
    if not (folder / CONFIG_NAME).is_file():
        raise InputError(f"{folder} has no {CONFIG_NAME}, so there is no telling what was run")
    overrides = [f"task.tiles={config.task}"] if config.task else []
    overrides += [f"encoder={config.encoder}"] if config.encoder else []
    again = load_config(EvalConfig, [str(folder / CONFIG_NAME)], overrides)
    with tempfile.TemporaryDirectory() as scratch:
        out = config.out or Path(scratch)
        evaluate(replace(again, out=out), with_report=config.out is not None)
        after = load_results(out / "results.json")
    refuse_other_inputs(before, after)
    apart = differing_numbers(asdict(before), asdict(after), config.tolerance)
    if apart:
        name, old, new = apart[0]
        raise EosinError(
            f"{len(apart)} numbers differ from {folder / 'results.json'} by more than "
            f"{config.tolerance:g}, first {name}: {old} then, {new} now"
        )
    print(f"reproduced: {len(before.scores)} scores within {config.tolerance:g}")


def refuse_other_inputs(before: Results, after: Results) -> None:
    """Raises an error where the task or an encoder is another one."""
    if before.task.digest != after.task.digest:
        raise InputError(
            f"task {after.task.name} is not what it was: labels, splits or bytes of tiles differ"
        )
    for old, new in zip(before.encoders, after.encoders, strict=True):
        if (old.name, old.digest) != (new.name, new.digest):
            raise InputError(
                f"encoder {new.name} is not what {old.name} was: weights, preprocessing or pooling "
                "differ"
            )


def differing_numbers(
    before: Any, after: Any, tolerance: float, name: str = ""
) -> list[tuple[str, Any, Any]]:
    """Name, old and new value of whatever is not the same in two JSON values."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = dict.fromkeys([*before, *after])
        return [
            found
            for key in keys
            for found in differing_numbers(
                before.get(key), after.get(key), tolerance, f"{name}.{key}".lstrip(".")
            )
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [
            found
            for i, (a, b) in enumerate(zip(before, after, strict=True))
            for found in differing_numbers(a, b, tolerance, f"{name}[{i}]")
        ]
    if isinstance(before, float) and isinstance(after, float):
        return [] if abs(before - after) <= tolerance else [(name, before, after)]
    return [] if before == after else [(name, before, after)]
