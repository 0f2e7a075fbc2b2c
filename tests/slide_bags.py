"""Made-up slides as bags: tissues laid out in ways that amounts alone do not tell."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eosin.data_curation.bag_store import BagStore, SlideBag, write_bags

TILE_UM = 112.0


def tissue_map(kind: str, side: int, rng: np.random.Generator) -> np.ndarray:
    """Tissue 0 or 1 of each cell, int [side, side], as many of both: in halves, or in patches.

    ``halves`` has two large areas whose border lies anywhere; ``patches`` squares of 2 cells, half
    of them of either tissue.
    """
    half = side * side // 2
    if kind == "halves":
        angle = rng.uniform(0, 2 * np.pi)
        y, x = np.mgrid[:side, :side]
        order = np.argsort((x * np.cos(angle) + y * np.sin(angle)).ravel(), kind="stable")
        flat = np.zeros(side * side, int)
        flat[order[:half]] = 1
        return flat.reshape(side, side)
    blocks = np.zeros((side // 2) ** 2, int)
    blocks[: len(blocks) // 2] = 1
    blocks = rng.permutation(blocks).reshape(side // 2, side // 2)
    return np.kron(blocks, np.ones((2, 2), int))


def write_slides(
    folder: Path,
    kinds: Sequence[str],
    *,
    side: int = 12,
    dim: int = 16,
    noise: float = 0.5,
    seed: int = 0,
    groups: Sequence[str] | None = None,
    stains: Sequence[str] | None = None,
    encoder: str = "made-up",
    scale: int = 1,
    missing: float = 0.1,
    apart: float = 0.0,
) -> BagStore:
    """One slide a kind of `tissue_map`, each tile its tissue's centre and noise.

    Args:
        folder: of the store.
        kinds: of the slides.
        side: cells along a side at scale 1.
        dim: features.
        noise: spread about the centre.
        seed: of the maps; two stores of one seed have the same maps.
        groups: of the slides; each its own by default.
        stains: of the slides.
        encoder: its name; another name has other centres.
        scale: tiles are so many times as large: one tile of a square of cells (its upper left).
        missing: share of cells without a tile.
        apart: spread of what all tiles of a slide share.
    """
    centres = np.random.default_rng(abs(hash_of(encoder))).standard_normal((2, dim))
    bags = []
    for at, kind in enumerate(kinds):
        rng = np.random.default_rng([seed, at])
        tissue = tissue_map(kind, side, rng)
        there = rng.random((side, side)) >= missing
        there[0, 0] = True
        own = np.random.default_rng([seed, at, abs(hash_of(encoder)), scale])
        rows, columns = np.nonzero(there[::scale, ::scale])
        kind_of = tissue[rows * scale, columns * scale]
        shared = apart * np.random.default_rng([seed, at, 7]).standard_normal(dim)
        features = centres[kind_of] + shared + noise * own.standard_normal((len(rows), dim))
        corner = np.column_stack([columns, rows]) * 224.0 * scale
        bags.append(
            SlideBag(
                slide_id=f"s{at:03d}",
                group=groups[at] if groups else f"p{at:03d}",
                stain=stains[at] if stains else None,
                features=features.astype(np.float32),
                corner_px=corner,
                cells=np.column_stack([columns, rows]).astype(np.int32),
                origin=np.ones(len(rows), np.int32),
                section=np.ones(len(rows), np.int32),
                tile_ids=[f"s{at:03d}_{c}_{r}_{scale}" for c, r in zip(columns, rows, strict=True)],
                mpp=0.5 * scale,
                size_px=224,
                footprint_px=224.0 * scale,
                level0_mpp=0.5,
            )
        )
    meta = {
        "encoder": encoder,
        "encoder_digest": f"digest of {encoder}",
        "transform_digest": "t",
        "pooling": "cls",
        "layout": "eosin",
    }
    return write_bags(folder, bags, dim, f"{encoder}-{seed}-{scale}-{len(kinds)}", meta)


def hash_of(text: str) -> int:
    """The same number in every process."""
    return sum(ord(letter) * 31**at for at, letter in enumerate(text)) % (1 << 31)
