"""What others published on public datasets, to stand beside ours; read, never computed with.

The protocols are not ours: a figure here says what to expect, not which encoder is better. Balanced
accuracy throughout.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedScores:
    """One source's figures on one dataset."""

    source: str
    """Who published it, where, and under which protocol."""
    scores: dict[str, float]
    """Encoder → balanced accuracy."""


_EVA = (
    "kaiko-ai/eva 73b61a7, tools/data/leaderboards/pathology.csv: AdamW probe, class tokens, mean "
    "of 5 runs"
)
_MIDNIGHT = "kaiko-ai/Midnight, README: eva's protocol"
_UNI = "mahmoodlab/UNI, README: linear probe"

PUBLISHED_SCORES: dict[str, list[PublishedScores]] = {
    "bach": [
        PublishedScores(
            f"{_EVA}, reported on the split that it stopped on",
            {"Virchow2": 0.883, "UNI2-h": 0.915, "Midnight-12k": 0.904, "H-optimus-0": 0.759,
             "GigaPath": 0.759, "UNI": 0.785, "Phikon": 0.729, "Lunit ViT-S/16": 0.783},
        ),
        PublishedScores(_MIDNIGHT, {"DINOv2 ViT-g/14": 0.724, "random ViT-g/14": 0.474}),
    ],
    "breakhis": [
        PublishedScores(
            f"{_EVA}, reported on the split that it stopped on; four classes",
            {"Virchow2": 0.821, "UNI2-h": 0.859, "Midnight-12k": 0.819, "H-optimus-0": 0.801,
             "GigaPath": 0.827, "UNI": 0.785, "Phikon": 0.717, "Lunit ViT-S/16": 0.742},
        ),
        PublishedScores(_MIDNIGHT, {"DINOv2 ViT-g/14": 0.783, "random ViT-g/14": 0.425}),
    ],
    "bracs": [
        PublishedScores(
            _MIDNIGHT,
            {"Midnight-92k": 0.615, "UNI2-h": 0.651, "Virchow2": 0.640, "H-optimus-0": 0.620,
             "GigaPath": 0.626, "UNI": 0.613, "DINOv2 ViT-g/14": 0.578, "random ViT-g/14": 0.413},
        )
    ],
    "crc-100k": [
        PublishedScores(
            f"{_EVA}, reported on the split that it stopped on",
            {"Virchow2": 0.967, "UNI2-h": 0.965, "Midnight-12k": 0.966, "H-optimus-0": 0.955,
             "GigaPath": 0.951, "UNI": 0.944, "Phikon": 0.940, "Lunit ViT-S/16": 0.940},
        ),
        PublishedScores(_MIDNIGHT, {"DINOv2 ViT-g/14": 0.943, "random ViT-g/14": 0.754}),
    ],
    "crc-100k-nonorm": [
        PublishedScores(
            _UNI,
            {"UNI": 0.925, "UNI2-h": 0.957, "Virchow2": 0.952, "H-optimus-0": 0.930,
             "GigaPath": 0.929},
        )
    ],
    "gleason": [
        PublishedScores(
            f"{_EVA}, reported on the split that it stopped on",
            {"Virchow2": 0.783, "UNI2-h": 0.775, "Midnight-12k": 0.800, "H-optimus-0": 0.770,
             "GigaPath": 0.724, "UNI": 0.750, "Phikon": 0.729, "Lunit ViT-S/16": 0.750},
        ),
        PublishedScores(_MIDNIGHT, {"DINOv2 ViT-g/14": 0.740, "random ViT-g/14": 0.459}),
    ],
    "mhist": [
        PublishedScores(
            f"{_EVA}, reported on the split that it stopped on",
            {"Virchow2": 0.861, "UNI2-h": 0.824, "Midnight-12k": 0.804, "H-optimus-0": 0.843,
             "GigaPath": 0.829, "UNI": 0.843, "Phikon": 0.803, "Lunit ViT-S/16": 0.781},
        ),
        PublishedScores(_MIDNIGHT, {"DINOv2 ViT-g/14": 0.855, "random ViT-g/14": 0.578}),
    ],
    "pcam": [
        PublishedScores(
            f"{_EVA}, test split",
            {"Virchow2": 0.938, "UNI2-h": 0.950, "Midnight-12k": 0.929, "H-optimus-0": 0.943,
             "GigaPath": 0.945, "UNI": 0.937, "Phikon": 0.920, "Lunit ViT-S/16": 0.897},
        ),
        PublishedScores(_MIDNIGHT, {"DINOv2 ViT-g/14": 0.881, "random ViT-g/14": 0.763}),
    ],
    "tcga-ut": [
        PublishedScores(
            _UNI,
            {"UNI": 0.595, "UNI2-h": 0.675, "Virchow2": 0.620, "H-optimus-0": 0.647,
             "GigaPath": 0.593},
        )
    ],
}  # fmt: skip
"""By the name of the dataset. GigaPath, UNI and the like are named as their sources name them."""
