"""How alike two prints are: the best correlation of their pictures over small shifts and turns.

Two tiles of the same tissue that lie up to an eighth of their side apart show it in different
places; where they overlap they still agree. Shapes: P pairs, S = `tile_print.SIDE`.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eosin.data_curation.tile_print import SIDE

LARGEST_SHIFT_PX = SIDE // 8
_SHIFTS = torch.arange(-LARGEST_SHIFT_PX, LARGEST_SHIFT_PX + 1)
_PADDED = SIDE + 2 * LARGEST_SHIFT_PX  # so that what is shifted out does not come in again
_CHUNK = 1024  # pairs that are matched at once


def best_correlation(
    first: npt.NDArray[np.floating], second: npt.NDArray[np.floating], *, turns: bool = False
) -> npt.NDArray[np.float32]:
    """The highest correlation of each pair of pictures, float32 [P], between -1 and 1.

    For each shift of up to `LARGEST_SHIFT_PX` along both axes, that is the sum of products over the
    overlap divided by the root of the product of both energies there.

    Args:
        first: pictures [P, S * S].
        second: likewise.
        turns: whether the second may also be turned and flipped (8 ways).
    """
    found = np.empty(len(first), np.float32)
    for start in range(0, len(first), _CHUNK):
        span = slice(start, start + _CHUNK)
        a, b = (_as_pictures(side[span]) for side in (first, second))
        ways = turned(b) if turns else [b]
        best = torch.stack([_best_over_shifts(a, way) for way in ways]).amax(0)
        found[span] = best.numpy()
    return found


def turned(picture: Tensor) -> list[Tensor]:
    """The eight ways in which [P, S, S] can lie, the one it lies in first."""
    ways = []
    for flipped in (picture, picture.flip(2)):
        ways += [torch.rot90(flipped, quarter, (1, 2)).contiguous() for quarter in range(4)]
    return ways


def _as_pictures(flat: npt.NDArray[np.floating]) -> Tensor:
    return torch.from_numpy(np.asarray(flat, np.float32)).view(-1, SIDE, SIDE)


def _best_over_shifts(a: Tensor, b: Tensor) -> Tensor:
    spectra = (torch.fft.rfft2(side, s=(_PADDED, _PADDED)) for side in (a, b))
    one, other = spectra
    products = torch.fft.irfft2(one * other.conj(), s=(_PADDED, _PADDED))
    products = products[:, _SHIFTS % _PADDED][:, :, _SHIFTS % _PADDED]  # [P, 9, 9]
    energies = _energies(a, _SHIFTS) * _energies(b, -_SHIFTS)
    correlations: Tensor = products / energies.clamp_min(1e-6).sqrt()
    return correlations.flatten(1).amax(1)


def _energies(picture: Tensor, shifts: Tensor) -> Tensor:
    """The energy of the part that still lies over another picture, by shift: [P, 9, 9]."""
    sums = torch.zeros(len(picture), SIDE + 1, SIDE + 1)
    sums[:, 1:, 1:] = picture.square().cumsum(1).cumsum(2)
    low, high = shifts.clamp(min=0), SIDE + shifts.clamp(max=0)
    top, bottom = sums[:, low], sums[:, high]
    return bottom[:, :, high] - top[:, :, high] - bottom[:, :, low] + top[:, :, low]
