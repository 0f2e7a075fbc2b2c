"""The README of an encoder folder: what whoever loads the weights must know."""

from dataclasses import dataclass, field

from eosin.pretrain.vit import VitConfig


@dataclass(frozen=True, kw_only=True)
class EncoderCard:
    """What an encoder folder says about itself."""

    steps: int
    tiles_seen: int
    index_digest: str
    mpp: float | None
    """Scale of the training tiles; None where it is unknown or mixed."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    licence: str = ""
    """An SPDX identifier, or words; empty: not stated."""
    sections: dict[str, str] = field(default_factory=dict)
    """Title → Markdown, of what a release adds: data, recipe, cost, scores, overlap."""


def model_card(
    model: VitConfig, card: EncoderCard, any_size: bool, drift: dict[str, dict[str, float]]
) -> str:
    """The folder's README.

    Args:
        model: shape of the network.
        card: provenance and preprocessing.
        any_size: whether timm gives our features at sizes other than `image_px`.
        drift: of the golden features in 16 bits, as `golden.golden_record` gives it.
    """
    scale = f"{card.mpp} µm/px" if card.mpp is not None else "not known: the tiles carried none"
    positions = "learned positions"
    if model.positions == "rope":
        positions = f"axial rotary positions of base {model.rope.base:g}"
    sizes = "" if any_size else " and no other (timm resamples positions in another way)"
    lines = [
        f"| features in {name} | cosine {d['cosine']:.6f} with fp32, largest difference "
        f"{d['largest']:.2g} of the largest entry |"
        for name, d in drift.items()
    ]
    sections = "".join(f"\n## {title}\n\n{text}\n" for title, text in card.sections.items())
    head = f"---\nlibrary_name: timm\nlicense: {card.licence}\n---\n\n" if card.licence else ""
    return f"""\
{head}# Encoder trained with eosin

```python
import timm
encoder = timm.create_model("local-dir:THIS_FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder))
features = encoder(transform(tile)[None])  # [1, {model.width}]
```

| | |
|---|---|
| network | ViT, width {model.width}, depth {model.depth}, {model.heads} heads, patch \
{model.patch_px} px, {model.registers} registers, {model.ffn}, {positions} |
| input | {model.image_px} px{sizes}, mean {list(card.mean)}, std {list(card.std)} |
| scale of the training tiles | {scale} |
| training | {card.steps} steps, {card.tiles_seen} tiles seen, shards {card.index_digest} |
| features | the CLS token after the final norm; patch tokens start at \
`encoder.num_prefix_tokens` = {model.prefix} |
{"".join(line + chr(10) for line in lines)}| licence | {card.licence or "not stated"} |
{sections}
## Checking an installation

`golden/tile.png` is a drawn tile; `golden/features.safetensors` holds what the transform makes of
it (`input`) and its features in fp32: `cls`, and `mean` of the patch tokens. `SHA256SUMS` covers
every file.
`eosin export verify THIS_FOLDER` checks all of it here, and says which stage differs.
"""
