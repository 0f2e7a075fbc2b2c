"""The slide encoder folder: weights, config, card, a golden bag with its vector, sums."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eosin.launch.artefacts import replacing_folder, write_text
from eosin.pretrain.checkpoint import TrainState
from eosin.pretrain.slide.config import SlideConfig
from eosin.pretrain.slide.data import SlideData
from eosin.pretrain.slide.encoder import SlideEncoder, SourceShape
from eosin.pretrain.slide.opening import (
    CONFIG,
    SCHEMA,
    SUMS,
    WEIGHTS,
    OpenSlideEncoder,
    SourceRecord,
    digest_of_group,
)
from eosin.pretrain.slide.sources import Source
from eosin.pretrain.tensor_files import save_tensors

GOLDEN_TILES = 64


def write_slide_encoder(
    out: Path,
    config: SlideConfig,
    data: SlideData,
    tensors: dict[str, Tensor],
    state: TrainState,
) -> None:
    """Writes the folder under a temporary name and puts it in place of `out`.

    Args:
        out: the folder; a slide encoder that is there is replaced, anything else is refused.
        config: of the training.
        data: that it was trained on.
        tensors: of the `SlideEncoder`.
        state: of the training.
    """
    records = [_record(source) for source in data.sources.sources]
    kept = {name: tensor.float() for name, tensor in tensors.items()}
    with torch.device("meta"):
        network = SlideEncoder(config.model, [SourceShape(r.name, r.dim) for r in records])
    network.load_state_dict(kept, assign=True)
    said = {
        "slide_encoder": SCHEMA,
        "model": dataclasses.asdict(config.model),
        "sources": [dataclasses.asdict(record) for record in records],
        "training": {
            "steps": state.step,
            "samples_seen": state.step * config.batch_size,
            "unit": config.bags.unit,
            "terms": sorted({"distil", "regress", "contrast", "align", "labels"} - _off(config)),
            "data_digest": state.index_digest,
            "group_digests": sorted(map(digest_of_group, data.sources.groups)),
        },
    }
    with replacing_folder(out, SUMS) as partial:
        save_tensors(partial / WEIGHTS, kept)
        write_text(partial / CONFIG, json.dumps(said, indent=1, ensure_ascii=False) + "\n")
        write_text(partial / "README.md", _card(config, data, state, records))
        (partial / "golden").mkdir()
        golden = _golden(OpenSlideEncoder(network, records, out.name))
        save_tensors(partial / "golden" / "bag.safetensors", golden)
        lines = [
            f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(partial)}\n"
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        ]
        write_text(partial / SUMS, "".join(lines))


def _off(config: SlideConfig) -> set[str]:
    o = config.objective
    terms = ("distil", "regress", "contrast", "align", "labels")
    return {name for name in terms if getattr(o, name) is None}


def _record(source: Source) -> SourceRecord:
    meta = source.store.meta
    return SourceRecord(
        name=source.name,
        dim=source.dim,
        tile_um=source.tile_um,
        encoder_digest=meta.get("encoder_digest"),
        transform_digest=meta.get("transform_digest"),
        pooling=meta.get("pooling"),
    )


def _golden(encoder: OpenSlideEncoder) -> dict[str, Tensor]:
    """A drawn bag of the first source, and what the encoder makes of it."""
    source, rng = encoder.sources[0], np.random.default_rng(0)
    side = int(GOLDEN_TILES**0.5)
    features = rng.standard_normal((GOLDEN_TILES, source.dim)).astype(np.float32)
    cells = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2)
    centre_um = (cells + 0.5) * source.tile_um
    said = encoder.encode([features], [centre_um])
    return {
        "features": torch.from_numpy(features),
        "centre_um": torch.from_numpy(centre_um),
        "vector": torch.from_numpy(said.vector),
        "tokens": torch.from_numpy(said.tokens),
    }


def _card(
    config: SlideConfig, data: SlideData, state: TrainState, records: list[SourceRecord]
) -> str:
    m = config.model
    rows = "\n".join(
        f"| source {number} | {r.name}: {r.dim} features of tiles of {r.tile_um:g} µm, pooling "
        f"{r.pooling or 'not said'}, encoder {r.encoder_digest or 'not said'} |"
        for number, r in enumerate(records)
    )
    latents = f", and {m.latents} latents" if m.pool == "latents" else ""
    return f"""\
# Slide encoder trained with eosin

```python
from eosin.data_curation.bag_store import BagStore
from eosin.pretrain.slide.opening import open_slide_encoder
encoder = open_slide_encoder("THIS_FOLDER")
said = encoder.encode_slide([BagStore("bags")], "slide-1")  # .vector [{m.width}], .tokens, .latents
```

`encoder.encode([features], [centre_um])` takes arrays; `eosin extract slides encoder=THIS_FOLDER
'bags=[bags]' out=vectors` writes the vectors of all slides, for `eosin eval bags`.

| | |
|---|---|
| network | width {m.width}, depth {m.depth}, {m.heads} heads, {m.registers} registers, positions \
{m.position}, pool {m.pool}{latents}, case {m.case} |
{rows}
| training | {state.step} steps, {state.step * config.batch_size} samples seen; data \
{state.index_digest} |
| terms | {", ".join(sorted({"distil", "regress", "contrast", "align", "labels"} - _off(config)))} |

`{CONFIG}` holds digests of the groups (patients) that it was trained on, by which
`eosin extract slides` says how many of yours are among them: test it on others.
`golden/bag.safetensors` holds a drawn bag with its vector and tokens; `{SUMS}` covers every file.
"""
