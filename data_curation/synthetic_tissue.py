"""Draws synthetic tissue: eight classes that differ in architecture, not in colour.

A painter fills a rectangle with one class as two maps, nuclei (haematoxylin) and matrix (eosin:
cytoplasm, fibres, debris). How dark the nuclei, how blue the matrix, how pink it all is and how
much of it is open glass is drawn for every region from the same ranges, whatever the class
(`balance`), so that only the arrangement tells the classes apart: rings around lumens, packed
nests, wavy or straight fibres, sheets of small nuclei, bubbles, debris, wisps. Sizes are in
micrometres; they follow histology, not any particular organ.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

Floats = NDArray[np.float32]
Points = NDArray[np.float64]
Rng = np.random.Generator

_SUBPIXEL_BITS = 4


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """The rectangle that a painter fills: [H, W] maps at `px_per_um`."""

    nuclei: NDArray[np.uint8]
    """Nuclear density, 0 to 255."""
    matrix: Floats
    """Density of everything that takes up eosin; 0 is open glass, about 1 is solid."""
    px_per_um: float
    rng: Rng

    def points(self, spacing_um: float, jitter: float = 0.3) -> Points:
        """[N, 2] (x, y) in pixels: a hexagonal grid, each point moved by `jitter` of a spacing."""
        height, width = self.matrix.shape
        step = spacing_um * self.px_per_um
        rows, columns = int(height / (step * 0.866)) + 3, int(width / step) + 3
        y, x = np.mgrid[0:rows, 0:columns].astype(np.float64)
        x += 0.5 * (y % 2)
        grid = np.stack([x.ravel() - 1, (y.ravel() - 1) * 0.866], axis=1)
        return (grid + self.rng.normal(0, jitter / 1.5, grid.shape)) * step

    def at(self, field: NDArray[np.generic], points: Points) -> NDArray[np.generic]:
        """Values of a map at points, clamped to the rectangle."""
        height, width = field.shape[:2]
        x = np.clip(points[:, 0].astype(int), 0, width - 1)
        y = np.clip(points[:, 1].astype(int), 0, height - 1)
        values: NDArray[np.generic] = field[y, x]
        return values


def smooth_noise(rng: Rng, shape: tuple[int, int], cell_px: float) -> Floats:
    """[H, W] Gaussian noise of unit variance with features of about `cell_px`."""
    rows, columns = (max(2, round(side / cell_px) + 2) for side in shape)
    field = rng.standard_normal((rows, columns), np.float32)
    return _standard(cv2.resize(field, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC))


def _standard(field: cv2.typing.MatLike) -> Floats:
    """The field scaled to unit variance, estimated on every fourth pixel."""
    floats = np.asarray(field, np.float32)
    return floats / np.float32(max(float(floats[::4, ::4].std()), 1e-6))


def outlines(
    rng: Rng,
    centres: Points,
    major: Points,
    minor: Points,
    angle: Points,
    wobble: float,
    vertices: int = 14,
) -> NDArray[np.int32]:
    """Closed outlines of wobbly ellipses for OpenCV, [N, V, 2] in 1/16 pixels.

    Args:
        rng: source of the wobble.
        centres: [N, 2] in pixels.
        major: [N] semi-axes along `angle`, in pixels.
        minor: [N] semi-axes across, in pixels.
        angle: [N] radians.
        wobble: relative strength of the second to fourth harmonic of the radius.
        vertices: V.
    """
    turn = np.linspace(0, 2 * np.pi, vertices, endpoint=False)
    phase = rng.uniform(0, 2 * np.pi, (len(centres), 3, 1))
    harmonic = np.arange(2, 5)[None, :, None]
    radius = 1 + (wobble * np.sin(harmonic * turn + phase) / np.sqrt(harmonic)).sum(1)  # [N, V]
    along, across = radius * np.cos(turn) * major[:, None], radius * np.sin(turn) * minor[:, None]
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    x = centres[:, :1] + along * cos - across * sin
    y = centres[:, 1:] + along * sin + across * cos
    return np.asarray(np.round(np.stack([x, y], -1) * (1 << _SUBPIXEL_BITS)), np.int32)


def fill(image: NDArray[np.uint8], polygon: NDArray[np.int32], value: int) -> None:
    """Fills one outline of `outlines` with smooth edges."""
    cv2.fillPoly(image, [polygon], value, cv2.LINE_AA, _SUBPIXEL_BITS)


def draw_nuclei(
    sheet: Sheet,
    centres: Points,
    major_um: float,
    minor_um: float,
    angle: Points | None = None,
    vesicular: float = 0.25,
    spread: float = 0.15,
) -> None:
    """Draws nuclei: ellipses with a darker membrane and, when `vesicular`, a nucleolus.

    Args:
        sheet: where; nuclei outside it are left out.
        centres: [N, 2] in pixels.
        major_um: mean semi-axis along `angle`.
        minor_um: mean semi-axis across it.
        angle: [N] radians; random when None.
        vesicular: how much paler the inside is than the membrane, 0 to 1.
        spread: relative standard deviation of the axes.
    """
    rng, (height, width) = sheet.rng, sheet.nuclei.shape
    margin = 2 * major_um * sheet.px_per_um
    x, y = centres.T
    inside = (x > -margin) & (x < width + margin) & (y > -margin) & (y < height + margin)
    centres = centres[inside]
    turns = rng.uniform(0, np.pi, len(centres)) if angle is None else angle[inside]
    size = np.exp(rng.normal(0, spread, (2, len(centres)))) * sheet.px_per_um
    shapes = outlines(rng, centres, size[0] * major_um, size[1] * minor_um, turns, 0.06)
    darkness = rng.uniform(175, 245, len(centres))
    nucleolus = (centres + rng.normal(0, 0.25 * minor_um * sheet.px_per_um, centres.shape)) * 16
    dot = max(1, round(0.9 * sheet.px_per_um * 16))
    for shape, dark, middle in zip(shapes, darkness, nucleolus.astype(int), strict=True):
        fill(sheet.nuclei, shape, int(dark * (1 - vesicular)))
        cv2.polylines(sheet.nuclei, [shape], True, int(dark), 1, cv2.LINE_AA, _SUBPIXEL_BITS)
        if vesicular > 0.3:
            centre = (int(middle[0]), int(middle[1]))
            cv2.circle(sheet.nuclei, centre, dot, 255, -1, cv2.LINE_AA, _SUBPIXEL_BITS)


@dataclass(frozen=True, kw_only=True)
class Fibres:
    """A field of bent parallel lines."""

    along: Floats
    """[H, W] coordinate along the fibres, in pixels."""
    across: Floats
    """[H, W] coordinate across them, in pixels; its level lines are the fibres."""

    def texture(self, sheet: Sheet, along_um: float, across_um: float) -> Floats:
        """[H, W] noise of unit variance in streaks of `along_um` × `across_um`."""
        streaks = cv2.remap(
            sheet.rng.standard_normal((509, 251), np.float32),
            self.along / np.float32(along_um * sheet.px_per_um),
            self.across / np.float32(across_um * sheet.px_per_um),
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_WRAP,
        )
        return _standard(streaks)

    def angle(self, points: Points) -> Points:
        """[N] direction of the fibres at points (x, y) in pixels, radians."""
        height, width = self.across.shape
        x = np.clip(points[:, 0].astype(int), 1, width - 2)
        y = np.clip(points[:, 1].astype(int), 1, height - 2)
        dx = self.across[y, x + 1] - self.across[y, x - 1]
        dy = self.across[y + 1, x] - self.across[y - 1, x]
        return np.asarray(np.arctan2(-dx, dy), np.float64)


def draw_fibres(sheet: Sheet, bend_um: float, wave_um: float) -> Fibres:
    """Lines in a random direction, bent by about `bend_um` over `wave_um`."""
    rng, scale = sheet.rng, sheet.px_per_um
    height, width = sheet.matrix.shape
    x = np.arange(width, dtype=np.float32)[None]
    y = np.arange(height, dtype=np.float32)[:, None]
    turn = rng.uniform(0, np.pi)
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    bend = smooth_noise(rng, (height, width), wave_um * scale) * np.float32(bend_um * scale)
    return Fibres(along=cos * x + sin * y, across=cos * y - sin * x + bend)


def _open(field: Floats, share: float, softness: float) -> Floats:
    """0 in the lowest `share` of `field`, 1 above; the step is `softness` deviations wide."""
    sample = field[::4, ::4]
    threshold, width = np.quantile(sample, share), softness * sample.std()
    return np.asarray(np.clip((field - threshold) / width + 0.5, 0, 1), np.float32)


def _mask(sheet: Sheet, shapes: NDArray[np.int32]) -> Floats:
    """[H, W] 1 inside the outlines, 0 outside, with smooth edges."""
    drawn = np.zeros_like(sheet.nuclei)
    for shape in shapes:
        fill(drawn, shape, 255)
    return drawn.astype(np.float32) / np.float32(255)


def _borders(sheet: Sheet, spacing_um: float, jitter: float) -> Floats:
    """[H, W] distance to the border of Voronoi cells about `spacing_um` wide, in µm."""
    centres = sheet.points(spacing_um, jitter)
    height, width = sheet.matrix.shape
    coarse = 3
    y, x = np.mgrid[0 : height + coarse : coarse, 0 : width + coarse : coarse]
    distance = np.asarray(KDTree(centres).query(np.stack([x.ravel(), y.ravel()], 1), k=2)[0])
    border = (np.diff(distance, axis=1).reshape(x.shape) / 2).astype(np.float32)
    size = (coarse * border.shape[1], coarse * border.shape[0])
    grown = cv2.resize(border, size, interpolation=cv2.INTER_LINEAR)
    return np.asarray(grown[:height, :width] / sheet.px_per_um, np.float32)


def _bed(sheet: Sheet, spindle_spacing_um: float) -> None:
    """Loose fibres with a few spindle nuclei: what lies between structures."""
    lines = draw_fibres(sheet, 9, 60)
    sheet.matrix[:] = np.clip(0.75 + 0.16 * lines.texture(sheet, 40, 2.5), 0.25, 1.2)
    spindles = sheet.points(spindle_spacing_um, 0.6)
    draw_nuclei(sheet, spindles, 5.5, 1.4, lines.angle(spindles), 0.1)


def paint_glands(sheet: Sheet, openness: float) -> None:
    """Glands: a ring of columnar nuclei around an open lumen, in stroma."""
    rng, scale = sheet.rng, sheet.px_per_um
    _bed(sheet, rng.uniform(18, 26))
    spacing_um = rng.uniform(74, 100)
    centres = sheet.points(spacing_um, 0.16)
    radius_um = spacing_um * rng.uniform(0.36, 0.49, len(centres))
    vesicular = rng.uniform(0.1, 0.45)
    lumen_share = min(1.5 * openness, 0.5)  # of a gland's area
    wall_um = np.maximum(radius_um * (1 - np.sqrt(lumen_share)), 12)
    major = radius_um * rng.uniform(1.0, 1.15, len(centres)) * scale
    minor = radius_um * rng.uniform(0.75, 1.0, len(centres)) * scale
    turn = rng.uniform(0, np.pi, len(centres))
    outer = outlines(rng, centres, major, minor, turn, 0.06, vertices=32)
    middle = np.round(centres * (1 << _SUBPIXEL_BITS))[:, None]
    shrink = 1 - (wall_um / radius_um)[:, None, None] * rng.uniform(0.92, 1.08, outer.shape)
    inner = np.asarray(middle + (outer - middle) * shrink, np.int32)
    gland, lumen = _mask(sheet, outer), _mask(sheet, inner)
    sheet.nuclei[gland > 0] = 0
    sheet.matrix[:] = (sheet.matrix * (1 - gland) + 0.85 * gland) * (1 - lumen)
    for outline, centre, depth_um in zip(outer / 16.0, centres, wall_um, strict=True):
        ring = np.concatenate([outline, outline[:1]])
        knots = np.concatenate([[0.0], np.linalg.norm(np.diff(ring, axis=0), axis=1).cumsum()])
        count = max(6, int(knots[-1] / scale / 5.4))
        place = np.arange(count) * knots[-1] / count + rng.normal(0, 0.8 * scale, count)
        basal = np.stack([np.interp(place, knots, ring[:, axis]) for axis in (0, 1)], 1)
        inward = centre - basal
        inward /= np.maximum(np.linalg.norm(inward, axis=1, keepdims=True), 1e-6)
        depth = np.clip(0.36 * depth_um + rng.normal(0, 1.2, count), 3, None) * scale
        nuclei = basal + inward * depth[:, None]
        turns = np.arctan2(inward[:, 1], inward[:, 0])
        walled = np.asarray(sheet.at(lumen, nuclei)) < 0.5  # a neighbour's lumen may be there
        draw_nuclei(sheet, nuclei[walled], 4.4, 2.4, turns[walled], vesicular)


def paint_nests(sheet: Sheet, openness: float) -> None:
    """Solid nests of large vesicular nuclei, parted by stroma and retraction clefts."""
    rng = sheet.rng
    _bed(sheet, rng.uniform(13, 18))
    border = _borders(sheet, rng.uniform(80, 120), 0.4)
    border = border + 2.5 * smooth_noise(rng, border.shape, 18 * sheet.px_per_um)
    septum_um, cleft_um = rng.uniform(3, 7), 14 * openness
    outside = np.clip((border - septum_um) / 1.5, 0, 1)
    nest = np.clip((border - septum_um - cleft_um) / 1.5, 0, 1)
    sheet.nuclei[outside > 0.3] = 0
    sheet.matrix[:] = sheet.matrix * (1 - outside) + 0.85 * nest
    spots = sheet.points(rng.uniform(10.5, 13), 0.25)
    depth = np.asarray(sheet.at(border, spots), np.float64) - septum_um - cleft_um
    draw_nuclei(sheet, spots[depth > 2.5], 4.8, 3.9, None, rng.uniform(0.32, 0.6), 0.2)


def paint_stroma(sheet: Sheet, openness: float) -> None:
    """Wavy collagen with spindle nuclei and short clefts along the fibres."""
    rng, scale = sheet.rng, sheet.px_per_um
    lines = draw_fibres(sheet, rng.uniform(7, 10), 42)
    bundles = lines.texture(sheet, 60, rng.uniform(5, 8)) + 0.5 * lines.texture(sheet, 40, 2)
    patches = smooth_noise(rng, sheet.matrix.shape, 22 * scale)
    gaps = _open(bundles + 0.8 * patches, openness, 0.45)
    threads = lines.texture(sheet, 50, 1.6)
    sheet.matrix[:] = np.clip(0.8 + 0.15 * threads + 0.12 * bundles, 0.2, 1.4) * gaps
    spindles = sheet.points(rng.uniform(13, 19), 0.6)
    spindles = spindles[np.asarray(sheet.at(gaps, spindles)) > 0.3]
    draw_nuclei(sheet, spindles, 6.8, 1.5, lines.angle(spindles), 0.1)


def paint_lymphocytes(sheet: Sheet, openness: float) -> None:
    """Sheets of small round dark nuclei with hardly any cytoplasm."""
    rng, scale, shape = sheet.rng, sheet.px_per_um, sheet.matrix.shape
    loose = smooth_noise(rng, shape, 16 * scale) + 0.8 * smooth_noise(rng, shape, 5 * scale)
    gaps = _open(loose, openness, 0.4)
    sheet.matrix[:] = np.clip(0.75 + 0.15 * smooth_noise(rng, shape, 3 * scale), 0, 1.2) * gaps
    spots = sheet.points(rng.uniform(8.0, 10.5), 0.28)
    spots = spots[np.asarray(sheet.at(gaps, spots)) > 0.4]
    draw_nuclei(sheet, spots, 2.9, 2.7, None, rng.uniform(0, 0.3), 0.1)


def paint_fat(sheet: Sheet, openness: float) -> None:
    """Fat: empty round cells in a net of walls, with flat nuclei in the corners."""
    rng, scale = sheet.rng, sheet.px_per_um
    lines = draw_fibres(sheet, 7, 40)
    border = _borders(sheet, rng.uniform(42, 62), 0.3)
    rounded = np.asarray(cv2.GaussianBlur(border, (0, 0), 3 * scale), np.float32)
    wall = 1 - _open(rounded, 1 - np.clip(openness + 0.15, 0.32, 0.55), 0.12)
    sheet.matrix[:] = np.clip(0.85 + 0.2 * lines.texture(sheet, 30, 2.5), 0.3, 1.3) * wall
    spots = sheet.points(rng.uniform(8.5, 13), 0.6)
    spots = spots[np.asarray(sheet.at(wall, spots)) > 0.8]
    along_walls = Fibres(along=lines.along, across=rounded)
    draw_nuclei(sheet, spots, 4.2, 1.7, along_walls.angle(spots), 0.1)


def paint_necrosis(sheet: Sheet, openness: float) -> None:
    """Necrosis: smeared granular debris, fragments of nuclei, ghosts of cells, cracks."""
    rng, scale, shape = sheet.rng, sheet.px_per_um, sheet.matrix.shape
    cracks = smooth_noise(rng, shape, 12 * scale) + 0.6 * smooth_noise(rng, shape, 4 * scale)
    gaps = _open(cracks, openness, 0.5)
    grain = smooth_noise(rng, shape, 1.5 * scale) + 1.2 * smooth_noise(rng, shape, 5 * scale)
    sheet.matrix[:] = np.clip(0.85 + 0.13 * grain, 0.1, 1.6) * gaps
    ghosts = sheet.points(rng.uniform(17, 24), 0.5)
    size = rng.uniform(3.5, 5.5, len(ghosts)) * scale
    sheet.matrix[:] *= 1 - 0.4 * _mask(sheet, outlines(rng, ghosts, size, size, 0 * size, 0.08))
    clump = smooth_noise(rng, shape, 25 * scale)
    dust = sheet.points(rng.uniform(4.0, 5.0), 0.8)
    chance = 0.45 + 0.35 * np.asarray(sheet.at(clump, dust), np.float64)
    dust = dust[(rng.random(len(dust)) < chance) & (np.asarray(sheet.at(gaps, dust)) > 0.3)]
    draw_nuclei(sheet, dust, 1.15, 0.9, None, 0.0, 0.5)


def paint_mucin(sheet: Sheet, openness: float) -> None:
    """Mucin: streaming strands in pale pools, with small floating islands of cells."""
    rng, scale = sheet.rng, sheet.px_per_um
    lines = draw_fibres(sheet, 16, 50)
    lakes = smooth_noise(rng, sheet.matrix.shape, 30 * scale) + 0.5 * lines.texture(sheet, 50, 9)
    pools = _open(lakes, openness, 0.5)
    strands = np.exp(-((lines.texture(sheet, 90, 7) / 0.35) ** 2))  # thin, where it crosses 0
    haze = np.clip(0.35 + 0.15 * lines.texture(sheet, 60, 8), 0.05, None)
    sheet.matrix[:] = (haze + 0.45 * strands) * pools
    islands = sheet.points(rng.uniform(52, 75), 0.45)
    size = rng.uniform(9, 17, (2, len(islands))) * scale
    turn = rng.uniform(0, np.pi, len(islands))
    island = _mask(sheet, outlines(rng, islands, size[0], size[1], turn, 0.1))
    sheet.matrix[:] = sheet.matrix * (1 - island) + island
    spots = sheet.points(6.8, 0.2)
    spots = spots[np.asarray(sheet.at(island, spots)) > 0.5]
    draw_nuclei(sheet, spots, 3.1, 2.6, None, rng.uniform(0.1, 0.45))


def paint_muscle(sheet: Sheet, openness: float) -> None:
    """Smooth muscle: broad straight fibres side by side, cigar-shaped nuclei, long clefts."""
    rng, scale = sheet.rng, sheet.px_per_um
    lines = draw_fibres(sheet, 6, 130)
    bundles = lines.texture(sheet, 150, rng.uniform(7, 11))
    patches = smooth_noise(rng, sheet.matrix.shape, 35 * scale)
    gaps = _open(bundles + 0.5 * patches, openness, 0.35)
    threads = lines.texture(sheet, 70, 1.8)
    sheet.matrix[:] = np.clip(0.85 + 0.08 * threads + 0.1 * bundles, 0.3, 1.3) * gaps
    cigars = sheet.points(rng.uniform(13, 17), 0.5)
    cigars = cigars[np.asarray(sheet.at(gaps, cigars)) > 0.8]
    draw_nuclei(sheet, cigars, 8.5, 2.0, lines.angle(cigars), rng.uniform(0, 0.3), 0.1)


PAINTERS: dict[str, Callable[[Sheet, float], None]] = {
    "glands": paint_glands,
    "nests": paint_nests,
    "stroma": paint_stroma,
    "lymphocytes": paint_lymphocytes,
    "fat": paint_fat,
    "necrosis": paint_necrosis,
    "mucin": paint_mucin,
    "muscle": paint_muscle,
}
"""The tissue classes and how they are drawn, in the order of their values in a class map."""


def paint(name: str, shape: tuple[int, int], px_per_um: float, rng: Rng) -> tuple[Floats, Floats]:
    """Haematoxylin and eosin of one region of class `name`, both [H, W] in optical density."""
    sheet = Sheet(
        nuclei=np.zeros(shape, np.uint8),
        matrix=np.zeros(shape, np.float32),
        px_per_um=px_per_um,
        rng=rng,
    )
    PAINTERS[name](sheet, rng.uniform(0.12, 0.4))
    return balance(sheet)


def balance(sheet: Sheet) -> tuple[Floats, Floats]:
    """Scales the maps to loads of stain that are drawn from the same ranges for every class.

    Nuclear darkness is drawn first; what the region lacks in haematoxylin then goes into the
    matrix as basophilia, and the eosin of the matrix is scaled to the eosin load.
    """
    rng = sheet.rng
    chromatin = 1 + rng.uniform(0.1, 0.35) * smooth_noise(
        rng, sheet.matrix.shape, 0.9 * sheet.px_per_um
    )
    nuclei = np.asarray(sheet.nuclei / np.float32(255) * chromatin, np.float32)
    grain = rng.uniform(0.03, 0.12) * smooth_noise(rng, nuclei.shape, 1.5 * sheet.px_per_um)
    cloud = rng.uniform(0.03, 0.12) * smooth_noise(rng, nuclei.shape, 12 * sheet.px_per_um)
    serum = max(0, rng.uniform(-0.1, 0.22))  # what fills the open spaces: often nothing
    filled = np.maximum(sheet.matrix, serum)
    matrix = filled * (1 - 0.6 * np.minimum(nuclei, 1)) * (1 + grain + cloud)
    nuclear, solid = float(nuclei.mean()), max(float(matrix.mean()), 1e-3)
    load = rng.uniform(0.16, 0.30)
    darkness = np.clip(rng.uniform(0.4, 0.9) * load / max(nuclear, 1e-3), 0.55, 1.25)
    basophilia = np.clip((load - darkness * nuclear) / solid, 0.03, 0.45)
    haematoxylin = darkness * nuclei + basophilia * matrix
    eosin = np.clip(rng.uniform(0.18, 0.36) / solid, 0.2, 0.9) * matrix
    return np.asarray(haematoxylin, np.float32), np.asarray(eosin, np.float32)
