"""Tiles moved to the staining of a reference, on the device that they are on.

Shards hold raw pixels; this is applied when tiles are embedded or scored. How a tile is stained is
told by its slide's columns of slides.parquet (`SlideStains`); a tile of which nothing is known is
measured itself, which is noisier: a tile of fat holds little haematoxylin. Shapes: B tiles, N
pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from eosin.data_curation.embed_config import NormaliseConfig, StainMethod
from eosin.data_curation.stain_library import StainCondition, read_condition
from eosin.data_curation.stain_vectors import FAINTEST, FEWEST_PIXELS, HAEMATOXYLIN_EOSIN
from eosin.launch.artefacts import stamp_of

_LOOKED_AT_PX = 96
"""A tile's stains are measured on about so many pixels a side."""
_DEFAULT_GLASS = 240.0
_LAB_FROM_XYZ = ((0.0, 116.0, 0.0), (500.0, -500.0, 0.0), (0.0, 200.0, -200.0))
_XYZ_FROM_RGB = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
_WHITE = (0.950456, 1.0, 1.088754)  # D65
_EPSILON, _KAPPA = 216 / 24389, 24389 / 27


class StainNormaliser:
    """Moves tiles to a reference.

    Args:
        target: the reference.
        method: see `NormaliseConfig`.

    Raises:
        InputError: the reference has no figures of that method.
    """

    def __init__(self, target: StainCondition, method: StainMethod) -> None:
        target.check(method)
        self.target, self.method = target, method
        self.digest = stamp_of(target=target.figures(method), method=method, version=1)

    def __call__(
        self, tiles: Tensor, sources: Sequence[StainCondition | None] | None = None
    ) -> Tensor:
        """The tiles with the reference's staining.

        Args:
            tiles: RGB from 0 to 255, float [B, 3, H, W].
            sources: how each tile's slide is stained; None: measured on the tile.

        Returns:
            float32 [B, 3, H, W], from 0 to 255. A tile with too little stain to measure is as it
            was.
        """
        tiles = tiles.float()
        move = self._by_lab if self.method == "reinhard" else self._by_vectors
        return move(tiles, sources or [None] * len(tiles))

    def _by_vectors(self, tiles: Tensor, sources: Sequence[StainCondition | None]) -> Tensor:
        """Macenko et al. 2009: amounts by least squares, scaled to the reference's strengths."""
        target = self.target
        bare = [_DEFAULT_GLASS] * 3
        glass = tiles.new_tensor([(s and s.glass) or bare for s in sources])  # [B, 3]
        pixels = tiles.flatten(2).transpose(1, 2)  # [B, N, 3]
        density = -torch.log((pixels + 1) / (glass[:, None] + 1))
        vectors, strength, known = _measure_stains(density, tiles.shape[2], tiles.shape[3])
        for place, source in enumerate(sources):
            if source is not None and source.has(self.method):
                vectors[place] = tiles.new_tensor(source.vectors(self.method)).view(2, 3)
                strength[place] = tiles.new_tensor(source.macenko_strength)
                known[place] = True
        amounts = density @ torch.linalg.pinv(vectors)  # [B, N, 2]
        amounts *= (tiles.new_tensor(target.macenko_strength) / strength)[:, None]
        wanted = amounts @ tiles.new_tensor(target.vectors(self.method)).view(2, 3)
        light = torch.exp(-wanted) * (tiles.new_tensor(target.glass) + 1) - 1
        moved = light.clamp(0, 255).transpose(1, 2).view_as(tiles)
        return torch.where(known[:, None, None, None], moved, tiles)

    def _by_lab(self, tiles: Tensor, sources: Sequence[StainCondition | None]) -> Tensor:
        """Reinhard et al. 2001, with the stained pixels' mean and deviation, in CIELAB."""
        pixels = tiles.flatten(2).transpose(1, 2)  # [B, N, 3]
        lab = rgb_to_lab(pixels)
        density = -torch.log((pixels + 1) / (_DEFAULT_GLASS + 1))
        weight = (density.mean(-1, keepdim=True) > FAINTEST).float()  # [B, N, 1]
        count = weight.sum(1)
        mean = (lab * weight).sum(1) / count.clamp(min=1)
        std = (((lab - mean[:, None]) ** 2 * weight).sum(1) / count.clamp(min=1)).sqrt()
        known = count[:, 0] >= FEWEST_PIXELS
        for place, source in enumerate(sources):
            if source is not None and source.has("reinhard"):
                mean[place] = tiles.new_tensor(source.lab_mean)
                std[place] = tiles.new_tensor(source.lab_std)
                known[place] = True
        scale = tiles.new_tensor(self.target.lab_std) / std.clamp(min=1e-3)
        moved_lab = (lab - mean[:, None]) * scale[:, None] + tiles.new_tensor(self.target.lab_mean)
        # Glass has no stain to move: it is left as it is.
        moved = torch.where(weight > 0, lab_to_rgb(moved_lab), pixels).transpose(1, 2)
        return torch.where(known[:, None, None, None], moved.reshape_as(tiles), tiles)


def load_normaliser(config: NormaliseConfig) -> StainNormaliser | None:
    """The normaliser that a config asks for, if any.

    Raises:
        InputError: no such library or condition, or it lacks the method's figures.
    """
    if config.library is None:
        return None
    return StainNormaliser(read_condition(config.library, config.condition), config.method)


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """CIELAB (D65) of sRGB from 0 to 255, float [..., 3]."""
    scaled = rgb / 255
    linear = torch.where(scaled > 0.04045, ((scaled + 0.055) / 1.055) ** 2.4, scaled / 12.92)
    xyz = linear @ rgb.new_tensor(_XYZ_FROM_RGB).T / rgb.new_tensor(_WHITE)
    root = torch.where(
        xyz > _EPSILON, xyz.clamp(min=_EPSILON) ** (1 / 3), (_KAPPA * xyz + 16) / 116
    )
    return root @ rgb.new_tensor(_LAB_FROM_XYZ).T - rgb.new_tensor((16.0, 0.0, 0.0))


def lab_to_rgb(lab: Tensor) -> Tensor:
    """SRGB from 0 to 255 of CIELAB (D65), float [..., 3]; colours out of its range are clipped."""
    lightness = (lab[..., 0] + 16) / 116
    root = torch.stack(
        [lightness + lab[..., 1] / 500, lightness, lightness - lab[..., 2] / 200], -1
    )
    xyz = torch.where(root**3 > _EPSILON, root**3, (116 * root - 16) / _KAPPA)
    linear = xyz * lab.new_tensor(_WHITE) @ torch.linalg.inv(lab.new_tensor(_XYZ_FROM_RGB)).T
    linear = linear.clamp(0, 1)
    curved = 1.055 * linear.clamp(min=1e-6) ** (1 / 2.4) - 0.055
    return torch.where(linear > 0.0031308, curved, 12.92 * linear) * 255


def _measure_stains(density: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Macenko's figures of each tile: vectors [B, 2, 3], strengths [B, 2], and whether it has any.

    As `stain_vectors.macenko`, for all tiles at once, on a lattice of their pixels.
    """
    step = max(1, min(height, width) // _LOOKED_AT_PX)
    grid = density.unflatten(1, (height, width))[:, ::step, ::step].flatten(1, 2)  # [B, n, 3]
    stained = grid.mean(-1) > FAINTEST  # [B, n]
    weight = stained.to(grid.dtype)[..., None]
    count = weight.sum(1)  # [B, 1]
    known = count[:, 0] >= FEWEST_PIXELS
    centred = (grid - (grid * weight).sum(1, keepdim=True) / count.clamp(min=1)[:, None]) * weight
    covariance = centred.transpose(1, 2) @ centred  # [B, 3, 3]
    plane = torch.linalg.eigh(covariance)[1][..., [2, 1]]  # [B, 3, 2]
    plane = plane * torch.where(plane.sum(1, keepdim=True) < 0, -1.0, 1.0)
    along = grid @ plane  # [B, n, 2]
    angle = torch.atan2(along[..., 1], along[..., 0]).masked_fill(~stained, torch.nan)
    extremes = torch.nanquantile(angle, angle.new_tensor([0.01, 0.99]), dim=1).T  # [B, 2]
    found = torch.stack([extremes.cos(), extremes.sin()], -1) @ plane.transpose(1, 2)  # [B, 2, 3]
    found = found.clamp(min=0)
    found = found / found.norm(dim=-1, keepdim=True).clamp(min=1e-9)
    found = torch.where((found[:, 0, 0] < found[:, 1, 0])[:, None, None], found.flip(1), found)
    fallback = found.new_tensor(HAEMATOXYLIN_EOSIN)
    found = torch.where(known[:, None, None], found, fallback)
    amounts = (grid @ torch.linalg.pinv(found)).masked_fill(~stained[..., None], torch.nan)
    strength = torch.nanquantile(amounts, 0.99, dim=1)  # [B, 2]
    strength = torch.where(known[:, None], strength, torch.ones_like(strength))
    return found, strength.clamp(min=1e-3), known
