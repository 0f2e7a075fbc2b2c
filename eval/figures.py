"""Pictures of an evaluation: scores, confusion, and contact sheets of tiles, overlays and tokens.

Image sheets are composed pixel by pixel; matplotlib only adds the words.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.colors import LinearSegmentedColormap
from numpy.typing import NDArray
from PIL import Image, ImageOps

from eosin.eval.results import Results, Score, headline_protocols
from eosin.launch.pictures import (
    EOSIN,
    HAEMATOXYLIN,
    INK,
    MUTED,
    PAGE_PX,
    STONE,
    drawing,
    shortened,
)

KINDS = {
    "encoder": "Trained",
    "random": "Same network, random weights",
    "floor": "Floors: colour alone",
}
"""Kinds of encoder in the order of every table and chart, with their headings."""
KIND_COLOURS = {"encoder": HAEMATOXYLIN, "random": EOSIN, "floor": STONE}
GAP_PX = 8
TEXT_PX = 44
"""Height of a line of words on an image sheet."""
CHARACTER_PX = 13
"""Width of a character of these words, on average."""
MAX_NUMBERED_CLASSES = 16
"""A confusion matrix of more classes shows shades alone."""


def find_score(results: Results, encoder: str, protocol: str) -> Score | None:
    """The balanced accuracy of that encoder under that protocol; None when there is none."""
    try:
        return results.score(encoder, protocol)
    except KeyError:
        return None


def score_bars(results: Results, path: Path) -> None:
    """Draws balanced accuracy with its 95 % interval: a panel a protocol, encoders by kind."""
    charted = headline_protocols(results)
    protocols = [p for p in dict.fromkeys(s.protocol for s in results.scores) if p in charted]
    line = _lines(results)
    columns = min(3, len(protocols))
    panel_rows = -(-len(protocols) // columns)
    height_px = panel_rows * (52 * (max(line.values()) + 1) + 150)
    chance = 1 / len(results.task.classes)
    with drawing(path, PAGE_PX, height_px) as figure:
        figure.set_layout_engine("constrained")
        panels = figure.subplots(panel_rows, columns, squeeze=False, sharey=True).ravel()
        for panel, protocol in zip(panels, protocols, strict=False):
            panel.axvline(chance, color=MUTED, lw=0.8, ls=(0, (3, 3)), zorder=1)
            for encoder in results.encoders:
                score = find_score(results, encoder.name, protocol)
                if score is not None:
                    _draw_score(panel, score, line[encoder.name], KIND_COLOURS[encoder.kind])
            panel.set(xlim=(0, 1), title=shortened(protocol, 34))
            panel.set_xlabel(f"balanced accuracy · dashed: chance {chance:.3f}")
            panel.set_yticks([line[e.name] for e in results.encoders])
            panel.set_yticklabels([shortened(e.label, 34) for e in results.encoders])
            panel.tick_params(axis="y", length=0, labelsize=9, labelcolor=INK)
            panel.spines["left"].set_visible(False)
        panels[0].set_ylim(max(line.values()) + 0.7, -0.7)
        for panel in panels[len(protocols) :]:
            panel.set_axis_off()


def confusion(
    predictions: pa.Table, results: Results, encoder: str, protocol: str, path: Path
) -> None:
    """Draws the confusion matrix of one encoder under one protocol, each row as percentages.

    Args:
        predictions: columns ``encoder``, ``protocol``, and ``label``, ``prediction`` as indices
            into the task's classes.
        results: what the predictions were scored as.
        encoder: name of the encoder.
        protocol: name of the protocol.
        path: where the PNG goes.

    Raises:
        ValueError: there is no prediction of that encoder under that protocol.
    """
    classes = results.task.classes
    counts = confusion_counts(predictions, len(classes), encoder, protocol)
    tiles = counts.sum(axis=1)
    if not tiles.any():
        raise ValueError(f"no predictions of encoder {encoder!r} under protocol {protocol!r}")
    shares = counts / np.maximum(tiles, 1)[:, None]  # [class, predicted class]
    cell_px = max(24, min(84, 760 // len(classes)))
    side_px = cell_px * len(classes)
    with drawing(path, side_px + 400, side_px + 300) as figure:
        figure.set_layout_engine("constrained")
        axes = figure.subplots()
        shades = LinearSegmentedColormap.from_list("haematoxylin", ["#f7f6fa", HAEMATOXYLIN])
        axes.imshow(shares, cmap=shades, vmin=0, vmax=1)
        names = [shortened(name, 20) for name in classes]
        axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
        labels = [f"{name} ({n})" for name, n in zip(names, tiles, strict=True)]
        axes.set_yticks(range(len(names)), labels)
        axes.tick_params(length=0, labelcolor=INK)
        axes.set(xlabel="predicted", ylabel=f"true class (test {results.task.unit})")
        axes.spines[:].set_visible(False)
        if len(classes) <= MAX_NUMBERED_CLASSES:
            for (row, column), share in np.ndenumerate(shares):
                if tiles[row] and round(100 * share) > 0:
                    ink = "white" if share > 0.5 else INK
                    number = f"{100 * share:.0f}"
                    axes.text(column, row, number, color=ink, ha="center", va="center")


def confusion_counts(
    predictions: pa.Table, n_classes: int, encoder: str, protocol: str
) -> NDArray[np.int64]:
    """Tiles by class and predicted class, int64 [n_classes, n_classes]."""
    chosen = predictions.filter(
        (pc.field("encoder") == encoder) & (pc.field("protocol") == protocol)
    )
    label = chosen["label"].to_numpy()
    prediction = chosen["prediction"].to_numpy()
    cells = np.bincount(label * n_classes + prediction, minlength=n_classes**2)
    return cells.reshape(n_classes, n_classes)


def tile_sheet(
    images: Sequence[NDArray[np.uint8]],
    labels: Sequence[str],
    path: Path,
    *,
    columns: int = 12,
) -> None:
    """Writes a contact sheet: the tiles of each class behind its name, classes in sorted order.

    Args:
        images: RGB tiles, uint8 [H, W, 3], of any sizes.
        labels: the class of each tile.
        path: where the PNG goes.
        columns: tiles a line at most; a class of more continues on the next line.
    """
    _same_length(images, labels)
    rows: list[tuple[str, list[NDArray[np.uint8]]]] = []
    for name in sorted(set(labels)):
        tiles = [image for image, label in zip(images, labels, strict=True) if label == name]
        for start in range(0, len(tiles), columns):
            rows.append(("" if start else name, tiles[start : start + columns]))
    names = [shortened(name, 30) for name, _ in rows]
    margin = 40 + CHARACTER_PX * max(map(len, names))
    step = min((PAGE_PX - margin) // max(len(tiles) for _, tiles in rows), 256)
    tile_px = step - GAP_PX
    sheet = _blank(len(rows) * step - GAP_PX, PAGE_PX)
    words = []
    for row, (_, tiles) in enumerate(rows):
        words.append((0, row * step + tile_px // 2, names[row]))
        for column, tile in enumerate(tiles):
            _place(sheet, tile, margin + column * step, row * step, tile_px, tile_px)
    _write_sheet(sheet, words, path)


def overlay_sheet(
    paths: Sequence[Path], captions: Sequence[str], path: Path, *, columns: int = 4
) -> None:
    """Writes several pictures (overlays of slides) as a grid, each above its caption."""
    _same_length(paths, captions)
    columns = min(columns, len(paths))
    cell_px = (PAGE_PX + GAP_PX) // max(columns, 2) - GAP_PX
    images = [_read_rgb(source) for source in paths]
    rows = [
        range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)
    ]
    # A row is as high as its tallest picture needs at the width of a cell.
    heights = [
        max(round(cell_px * min(images[i].shape[0] / images[i].shape[1], 1.5)) for i in row)
        for row in rows
    ]
    step = cell_px + GAP_PX
    sheet = _blank(sum(heights) + len(rows) * (TEXT_PX + GAP_PX), columns * step - GAP_PX)
    words, top = [], 0
    for row, height in zip(rows, heights, strict=True):
        for column, index in enumerate(row):
            bottom = _place(sheet, images[index], column * step, top, cell_px, height)
            caption = shortened(captions[index], cell_px // CHARACTER_PX)
            words.append((column * step, bottom + TEXT_PX // 2, caption))
        top += height + TEXT_PX + GAP_PX
    _write_sheet(sheet, words, path)


def feature_map(
    tokens: Sequence[NDArray[np.floating[Any]]],
    images: Sequence[NDArray[np.uint8]],
    path: Path,
    *,
    columns: int = 6,
) -> None:
    """Writes each image above its patch tokens, whose first three components are shown as RGB.

    The components are those of all the tokens together, so that a colour means the same everywhere.

    Args:
        tokens: patch tokens of each image, float [h, w, D].
        images: the RGB tiles or regions that the tokens describe, uint8 [H, W, 3].
        path: where the PNG goes.
        columns: images a line.
    """
    _same_length(tokens, images)
    columns = min(columns, len(images))
    cell_px = min((PAGE_PX + GAP_PX) // columns, 540) - GAP_PX
    step = cell_px + GAP_PX
    maps = principal_colours(tokens)
    band = 2 * step + 3 * GAP_PX
    sheet = _blank(-(-len(images) // columns) * band - 4 * GAP_PX, columns * step - GAP_PX)
    for index, (image, colours) in enumerate(zip(images, maps, strict=True)):
        left, top = index % columns * step, index // columns * band
        _place(sheet, image, left, top, cell_px, cell_px)
        _place(sheet, colours, left, top + step, cell_px, cell_px, Image.Resampling.NEAREST)
    _write_sheet(sheet, [], path)


def principal_colours(
    tokens: Sequence[NDArray[np.floating[Any]]],
) -> list[NDArray[np.uint8]]:
    """The first three principal components of all tokens as RGB, uint8 [h, w, 3] a map.

    Each component is stretched between its 1st and 99th percentile. Its sign, which is arbitrary,
    is the one that makes the largest loading positive.
    """
    flat = np.concatenate([grid.reshape(-1, grid.shape[-1]) for grid in tokens]).astype(np.float64)
    centred = flat - flat.mean(axis=0)
    _, vectors = np.linalg.eigh(centred.T @ centred)  # [D, D], eigenvalues ascending
    axes = vectors[:, ::-1][:, :3]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    scores = centred @ axes  # [tokens, 3]
    low, high = np.percentile(scores, [1, 99], axis=0)
    colours = np.zeros((len(scores), 3), np.uint8)
    stretched = (scores - low) / np.maximum(high - low, 1e-12)
    colours[:, : scores.shape[1]] = np.round(255 * np.clip(stretched, 0, 1))
    ends = np.cumsum([grid.shape[0] * grid.shape[1] for grid in tokens])[:-1]
    pieces = np.split(colours, ends)
    return [piece.reshape(*grid.shape[:2], 3) for piece, grid in zip(pieces, tokens, strict=True)]


def _lines(results: Results) -> dict[str, int]:
    """The line of each encoder, by kind, with a free line between kinds to set floors apart."""
    line: dict[str, int] = {}
    below = 0
    for kind in KINDS:
        names = [encoder.name for encoder in results.encoders if encoder.kind == kind]
        line |= {name: below + i for i, name in enumerate(names)}
        below += len(names) + bool(names)
    return line


def _draw_score(panel: Any, score: Score, line: int, colour: str) -> None:
    panel.barh(line, score.value, height=0.62, color=colour, alpha=0.25, lw=0)
    panel.plot([score.low, score.high], [line, line], color=colour, lw=2.2, solid_capstyle="butt")
    panel.plot(score.value, line, marker="o", ms=5.5, color=colour, mec="white", mew=0.8)
    # Beyond the interval, or before it where the axis ends.
    beyond = score.high < 0.84
    panel.text(
        score.high + 0.025 if beyond else score.low - 0.025,
        line,
        f"{score.value:.3f}",
        ha="left" if beyond else "right",
        va="center",
        fontsize=8.5,
        color=INK,
    )


def _same_length(items: Sequence[object], others: Sequence[object]) -> None:
    if not items or len(items) != len(others):
        raise ValueError(f"a sheet needs as many words as pictures: {len(items)}, {len(others)}")


def _read_rgb(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _blank(height_px: int, width_px: int) -> NDArray[np.uint8]:
    return np.full((height_px, width_px, 3), 255, np.uint8)


def _place(
    sheet: NDArray[np.uint8],
    image: NDArray[np.uint8],
    left_px: int,
    top_px: int,
    width_px: int,
    height_px: int,
    method: Image.Resampling = Image.Resampling.LANCZOS,
) -> int:
    """Draws `image` into a cell of `sheet`, as large as fits with its shape kept.

    Returns:
        The first row of `sheet` below the image.
    """
    fitted = np.asarray(ImageOps.contain(Image.fromarray(image), (width_px, height_px), method))
    bottom_px = top_px + len(fitted)
    sheet[top_px:bottom_px, left_px : left_px + fitted.shape[1]] = fitted
    return bottom_px


def _write_sheet(
    sheet: NDArray[np.uint8], words: Sequence[tuple[int, int, str]], path: Path
) -> None:
    """Writes `sheet` with each of `words` (left, middle in pixels, text) to `path`."""
    height, width = sheet.shape[:2]
    with drawing(path, width, height) as figure:
        figure.figimage(sheet)
        for left, middle, text in words:
            figure.text(left / width, 1 - middle / height, text, fontsize=9, va="center")
