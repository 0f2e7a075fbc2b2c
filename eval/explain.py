"""The verb `explain`: pictures of what an encoder sees, for a pathologist to judge.

Of a slide: its patch tokens as colours, alike where the encoder finds tissue alike. Of a few tiles:
what the class token attends to. Across a set: the tiles whose features lie nearest to theirs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from eosin.configs.errors import InputError
from eosin.data_curation.encoder import NetworkEncoder, load_encoder
from eosin.data_curation.features import FeatureStore, open_features
from eosin.data_curation.manifest import TILES, Status, read_table
from eosin.eval.neighbours import centred
from eosin.eval.slide_view import RGB, SlideView, slides_of, view_slides
from eosin.eval.token_maps import TokenColours, class_attention
from eosin.launch.device_names import DeviceName
from eosin.launch.pictures import PAGE_PX, drawing, shortened
from eosin.launch.process import choose_device
from eosin.launch.progress import Meter

NEAREST = 7
"""Tiles that are shown beside each."""


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """Pictures of a slide as an encoder sees it."""

    encoder: str
    """As for `eosin embed`."""
    tiles: Path
    """Folder that `eosin tile`, `curate` or `extract` (its tiles/) wrote."""
    out: Path
    """Folder of the pictures."""
    slide: str = ""
    """slide_id; the first of the folder when empty."""
    at: list[list[float]] = field(default_factory=list)
    """Places (x, y) in level-0 pixels whose tiles are looked into, e.g. [[1200,3400]]; none: four
    tiles spread over the tissue."""
    features: Path | None = None
    """A feature store of these tiles by this encoder: nearest tiles are looked for in it."""
    fit_tiles: int = 200
    """Evenly chosen tiles that the components are fitted on; all tiles of tissue are coloured."""
    batch_size: int = 32
    """Tiles a forward pass."""
    device: DeviceName = "auto"

    def __post_init__(self) -> None:
        """Refuses places that are none."""
        if any(len(place) != 2 for place in self.at):
            raise ValueError(f"at={self.at} should be places [x, y], e.g. at=[[1200,3400]]")
        for name in ("fit_tiles", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def explain(config: ExplainConfig) -> None:
    """Draws ``components.png``, ``attention.png`` and, with features, ``nearest.png``.

    Raises:
        InputError: no such slide, place or encoder, or an encoder without patch tokens.
    """
    encoder = load_encoder(config.encoder, choose_device(config.device))
    if not isinstance(encoder, NetworkEncoder):
        raise InputError(f"encoder {encoder.name} has no patch tokens to look at")
    known = sorted(slides_of(config.tiles))
    slide_id = config.slide or known[0]
    if slide_id not in known:
        raise InputError(
            f"{config.tiles} knows no slide '{slide_id}', but {', '.join(known[:5])} …"
        )
    [view] = view_slides(config.tiles, [slide_id])
    tissue = _tissue_tiles(config.tiles, slide_id)
    chosen = _chosen(view, tissue, config.at)
    config.out.mkdir(parents=True, exist_ok=True)
    draw_components(config, encoder, view, tissue)
    draw_attention(config, encoder, view, chosen)
    said = ["components.png", "attention.png"]
    if config.features is not None:
        draw_nearest(config, view, open_features(config.features), chosen)
        said.append("nearest.png")
    print(f"{', '.join(said)} of {slide_id} → {config.out}")


def _tissue_tiles(tiles: Path, slide_id: str) -> list[str]:
    table = read_table(tiles / "tiles.parquet", TILES)
    found = [
        row["tile_id"]
        for row in table.select(["tile_id", "slide_id", "status"]).to_pylist()
        if row["slide_id"] == slide_id and row["status"] == Status.OK
    ]
    if not found:
        raise InputError(f"{tiles / 'tiles.parquet'} has no tiles of tissue on {slide_id}")
    return found


def _chosen(view: SlideView, tissue: list[str], at: Sequence[Sequence[float]]) -> list[str]:
    """Tiles at the places, or four spread over the tissue."""
    if not at:
        return [tissue[i] for i in np.linspace(0, len(tissue) - 1, 6).astype(int)[1:-1]]
    found = []
    for x, y in at:
        for tile_id in tissue:
            place = view.places[tile_id]
            side = [place.size_px * place.mpp / mpp for mpp in view.mpp]
            if 0 <= x - place.left_px < side[0] and 0 <= y - place.top_px < side[1]:
                found.append(tile_id)
                break
        else:
            raise InputError(f"at={[x, y]}: no tile of tissue of {view.slide_id} lies there")
    return found


def _tokens(
    config: ExplainConfig,
    encoder: NetworkEncoder,
    view: SlideView,
    tissue: list[str],
    rows: npt.NDArray[np.int64],
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    """Patch tokens [B, h, w, D] of some tiles, batch after batch, with their rows."""
    for start in range(0, len(rows), config.batch_size):
        batch = rows[start : start + config.batch_size]
        yield batch, encoder.patch_tokens(view.read([tissue[i] for i in batch]))


def draw_components(
    config: ExplainConfig, encoder: NetworkEncoder, view: SlideView, tissue: list[str]
) -> None:
    """The slide, and its patch tokens as colours at their places."""
    some = np.unique(np.linspace(0, len(tissue) - 1, config.fit_tiles).round().astype(int))
    colours = TokenColours.fit(
        np.concatenate([tokens for _, tokens in _tokens(config, encoder, view, tissue, some)])
    )
    overview, corner, mpp = view.overview()
    picture = cv2.cvtColor(cv2.cvtColor(overview, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    picture = (0.4 * picture + 0.6 * 255).astype(np.uint8)
    boxes = view.boxes(tissue, corner, mpp).clip(min=0)
    with Meter("explain", len(tissue), "tiles") as meter:
        for rows, tokens in _tokens(config, encoder, view, tissue, np.arange(len(tissue))):
            for (left, top, right, bottom), patch in zip(boxes[rows], colours(tokens), strict=True):
                target = picture[top:bottom, left:right]
                if target.size:
                    smaller = target.shape[0] < patch.shape[0]
                    how = cv2.INTER_AREA if smaller else cv2.INTER_NEAREST
                    target[:] = cv2.resize(patch, target.shape[1::-1], interpolation=how)
            meter.advance(len(rows))
    tall = overview.shape[0] / overview.shape[1] * PAGE_PX / 2
    with drawing(config.out / "components.png", PAGE_PX, round(tall + 70)) as figure:
        figure.set_layout_engine("constrained")
        titles = (
            shortened(view.slide_id, 60),
            f"patch tokens of {encoder.name}: three components as colours",
        )
        for axes, image, title in zip(
            figure.subplots(1, 2), (overview, picture), titles, strict=True
        ):
            axes.imshow(image)
            axes.set_title(title, fontsize=8.5)
            axes.set_axis_off()


def draw_attention(
    config: ExplainConfig, encoder: NetworkEncoder, view: SlideView, chosen: list[str]
) -> None:
    """Tiles, what the class token attends to in them, and their patch tokens as colours."""
    tiles = view.read(chosen)
    weights = class_attention(encoder, tiles)
    tokens = encoder.patch_tokens(tiles)
    colours = TokenColours.fit(tokens)(tokens)
    seen = [encoder.prepare(tile).permute(1, 2, 0).numpy() for tile in tiles]  # resized and cropped
    with drawing(config.out / "attention.png", 1500, 500 * len(tiles)) as figure:
        figure.set_layout_engine("constrained")
        for row, axes in enumerate(figure.subplots(len(tiles), 3, squeeze=False)):
            edge = len(seen[row]) - 0.5
            where = (-0.5, edge, edge, -0.5)
            axes[0].imshow(seen[row])
            axes[1].imshow(cv2.cvtColor(seen[row], cv2.COLOR_RGB2GRAY), cmap="gray", alpha=0.5)
            axes[1].imshow(weights[row], cmap="cividis", alpha=0.65, extent=where)
            axes[2].imshow(colours[row])
            place = view.places[chosen[row]]
            said = f"x {place.left_px:.0f}, y {place.top_px:.0f}"
            for one, title in zip(
                axes, (said, "attention of CLS, last block", "patch tokens"), strict=True
            ):
                one.set_title(title, fontsize=8.5)
                one.set_axis_off()


def draw_nearest(
    config: ExplainConfig, view: SlideView, store: FeatureStore, chosen: list[str]
) -> None:
    """Each tile before those of the store whose centred features are nearest by cosine."""
    ids = store.rows["tile_id"].to_pylist()
    slide_ids = store.rows["slide_id"].to_pylist()
    rows = {tile_id: row for row, tile_id in enumerate(ids)}
    lost = [tile_id for tile_id in chosen if tile_id not in rows]
    if lost:
        raise InputError(f"{config.features} has no features of tile '{lost[0]}'")
    features = np.asarray(store.features, np.float32)
    known = unit(*centred(features))
    cosines = known[[rows[tile_id] for tile_id in chosen]] @ known.T  # [queries, N]
    order = [
        [int(i) for i in np.argsort(-of, kind="stable") if ids[i] != tile_id][:NEAREST]
        for of, tile_id in zip(cosines, chosen, strict=True)
    ]
    wanted = sorted({slide_ids[i] for found in order for i in found})
    views = {v.slide_id: v for v in view_slides(config.tiles, wanted)}
    with drawing(config.out / "nearest.png", PAGE_PX, 330 * len(chosen)) as figure:
        figure.set_layout_engine("constrained")
        grid = figure.subplots(len(chosen), NEAREST + 1, squeeze=False)
        for axes, tile_id, found, of in zip(grid, chosen, order, cosines, strict=True):
            _show(axes[0], view.read([tile_id])[0], "looked for")
            for one, i in zip(axes[1:], found, strict=False):
                tile = views[slide_ids[i]].read([ids[i]])[0]
                _show(one, tile, f"{of[i]:.2f} {shortened(slide_ids[i], 16)}")
            for one in axes:
                one.set_axis_off()


def unit(features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows of length one."""
    found: npt.NDArray[np.float32] = features / np.maximum(
        np.linalg.norm(features, axis=1, keepdims=True), 1e-12
    )
    return found


def _show(axes: object, tile: RGB, title: str) -> None:
    axes.imshow(tile)  # type: ignore[attr-defined]
    axes.set_title(title, fontsize=7.5)  # type: ignore[attr-defined]
