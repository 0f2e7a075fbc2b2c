"""The rows of an evaluation's table: the encoder, its twin, floors, and what else was asked for."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from eosin.configs.errors import InputError
from eosin.data_curation.encoder import DescriptorEncoder, load_encoder
from eosin.data_curation.encoder_interface import Encoder
from eosin.data_curation.manifest import make_id
from eosin.data_curation.normalised_encoder import load_normalised
from eosin.eval.config import EvalConfig
from eosin.eval.results import EncoderRecord
from eosin.launch.process import choose_device

FLOORS = ("builtin:mean-colour", "builtin:colour-histogram")
"""What every table holds beside the encoder and its random-weights twin."""


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One row of the table."""

    encoder: Encoder
    record: EncoderRecord


def load_rows(config: EvalConfig) -> list[TableRow]:
    """The encoder, its twin, the floors and the extra encoders, under names that are unique.

    Raises:
        InputError: an encoder cannot be loaded, or two have one name.
    """
    device = choose_device(config.device)
    main = load_encoder(config.encoder, device)
    if isinstance(main, DescriptorEncoder):
        raise InputError(f"{config.encoder} is a floor of every table; name a network to score")
    rows = [_row(main, "encoder", f"{main.name} ({main.pooling})")]
    if main.has_twin:
        twin = main.random_twin(config.seed)
        rows.append(_row(twin, "random", f"{main.name}, random weights"))
    for px in config.sizes_px:
        sized = load_encoder(config.encoder, device, input_px=px)
        rows.append(_row(sized, "encoder", f"{sized.name} ({sized.pooling}), {px} px", f"-{px}px"))
    if config.normalise.library is not None:
        moved = load_normalised(config.encoder, device, config.normalise)
        label = f"{main.name} ({main.pooling}), {config.normalise.method} to "
        rows.append(_row(moved, "encoder", label + config.normalise.condition))
    for spec in FLOORS:
        floor = load_encoder(spec, device)
        rows.append(_row(floor, "floor", floor.name.replace("-", " ")))
    for spec in config.extra_encoders:
        extra = load_encoder(spec, device)
        rows.append(_row(extra, "encoder", f"{extra.name} ({extra.pooling})"))
    if config.checkpoints is not None:
        rows += _checkpoints(config.checkpoints, main.pooling, device)
    names = [row.record.name for row in rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"two encoders are called '{twice[0]}'; rename the folder of one")
    return rows


def _checkpoints(run: Path, pooling: str, device: torch.device) -> list[TableRow]:
    """A row an export of a run, by step, pooled as the main encoder."""
    folders = sorted(path.parent for path in run.glob("exports/step_*/model.safetensors"))
    if not folders:
        raise InputError(
            f"checkpoints={run} holds no exports/step_*; 'eosin export step=… out=…' makes them, "
            "or a training with probe.where=job"
        )
    rows = []
    for folder in folders:
        encoder = load_encoder(str(folder), device, pooling=pooling)
        step = int(folder.name.removeprefix("step_"))
        row = _row(encoder, "encoder", f"{run.resolve().name}, step {step:,}")
        name = make_id(f"{run.resolve().name}-{folder.name}-{encoder.pooling}")
        record = replace(row.record, name=name, step=step)
        rows.append(TableRow(encoder=encoder, record=record))
    return rows


def _row(encoder: Encoder, kind: str, label: str, also: str = "") -> TableRow:
    name = encoder.name if kind == "floor" else f"{encoder.name}-{encoder.pooling}{also}"
    record = EncoderRecord(
        name=make_id(name),
        label=label,
        kind=kind,
        pooling=encoder.pooling,
        dim=encoder.dim,
        digest=encoder.digest,
    )
    return TableRow(encoder=encoder, record=record)
