"""Finding pairs of alike prints among many, without comparing each with each pixel by pixel.

The magnitudes of a picture's spectrum hardly change when it is shifted a bit. Those of windows of
one picture, whitened over the set and scaled to length 1, are compared with those of the middle of
the other, all with all, which is matrix products; the few pairs that are near there go to
`duplicate_match`, which decides. Shapes: N prints, F frequencies, P pairs.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eosin.data_curation.duplicate_match import best_correlation
from eosin.data_curation.tile_print import SIDE, pictures

FAINT_ENERGY = 0.25
"""Mean square of a picture that shows too little to be compared; others have about 1."""

_NEAREST, _NEAREST_TURNED = 0.45, 0.44
"""Cosine from which a pair is looked at closely."""
_WINDOW_PX = 24
_OFFSETS = (0, 4, 8)
_MIDDLE = 4
"""Whatever the shift, a window of one picture lies within 2 px of the middle of the other."""
_FINEST, _FINEST_TURNED = 8, 10
"""Highest frequency of a spectrum, in cycles a window. What the turns share is fewer numbers."""
_SAMPLE = 50_000  # prints that the whitening is taken from
_FEW = 100  # prints, of which no mean can be taken
_RIDGE = 1.0  # of the mean variance: few prints say little of the faint directions
_TILE_ROWS = 2048  # rows and columns of the product that are held at once
_AT_ONCE = 1 << 16  # candidates that are matched together


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of alike prints."""

    first: npt.NDArray[np.int64]
    """[P], rows of the one set."""
    second: npt.NDArray[np.int64]
    """[P], rows of the other (of the same one, and then larger than the first)."""
    similarity: npt.NDArray[np.float32]
    """[P], see `duplicate_match.best_correlation`."""

    def __len__(self) -> int:
        return len(self.first)


class Spectra:
    """What prints are searched by, fitted to a set of them.

    Args:
        prints: [N, `tile_print.DIM`], any N.
        turns: whether spectra of turned and flipped tiles are to be the same.
    """

    def __init__(self, prints: npt.NDArray[np.floating], *, turns: bool) -> None:
        self.turns = turns
        rows = np.unique(np.linspace(0, len(prints) - 1, _SAMPLE).astype(np.int64))
        raw = self._raw(_as_pictures(prints[rows]), _MIDDLE, _MIDDLE)
        self._whiten: Tensor | None = None
        if len(rows) < _FEW:
            return
        self._mean = raw.mean(0)
        centred = (raw - self._mean).double()
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(raw))
        self._whiten = (vectors * (values + _RIDGE * values.mean() + 1e-12).rsqrt()).float()

    def of_middle(self, prints: npt.NDArray[np.floating]) -> Tensor:
        """Whitened spectra of the middle of each picture, of length 1: float32 [N, F].

        Those of faint prints are 0. All others are 1, [N, 1], where there were too few to fit to:
        then all are looked at closely.
        """
        parts = [
            self._of(_as_pictures(some), _MIDDLE, _MIDDLE)
            for some in np.array_split(prints, max(1, len(prints) // _TILE_ROWS))
        ]
        return torch.cat(parts)

    def of_windows(self, prints: npt.NDArray[np.floating]) -> list[Tensor]:
        """The same of windows over the whole picture, each [N, F]."""
        picture = _as_pictures(prints)
        return [self._of(picture, top, left) for top, left in itertools.product(_OFFSETS, _OFFSETS)]

    def _of(self, picture: Tensor, top: int, left: int) -> Tensor:
        unit = torch.ones(len(picture), 1)
        if self._whiten is not None:
            white = (self._raw(picture, top, left) - self._mean) @ self._whiten
            unit = torch.nn.functional.normalize(white, dim=1)
        return unit * (picture.square().mean((1, 2)) >= FAINT_ENERGY).unsqueeze(1)

    def _raw(self, picture: Tensor, top: int, left: int) -> Tensor:
        """Roots of the magnitudes of a window's frequencies, [N, F]."""
        window = picture[:, top : top + _WINDOW_PX, left : left + _WINDOW_PX]
        spectrum: Tensor = torch.fft.fft2(window).abs().sqrt()
        if not self.turns:
            half: Tensor = spectrum[:, *_half_disc(_FINEST)]
            return half
        rows, columns = _octant(_FINEST_TURNED)
        ways = [
            spectrum[:, a, b]
            for y, x in ((rows, columns), (columns, rows))
            for a, b in ((y, x), (y, (-x) % _WINDOW_PX))
        ]
        folded: Tensor = torch.stack(ways).mean(0)
        return folded


def find_pairs(
    prints: npt.NDArray[np.floating],
    others: npt.NDArray[np.floating] | None,
    spectra: Spectra,
    threshold: float,
    *,
    seen: Callable[[int], None] | None = None,
) -> Pairs:
    """All pairs whose pictures correlate by at least `threshold`, sorted.

    Args:
        prints: [N, DIM].
        others: prints that these are compared with; None: the same, each pair once.
        spectra: how candidates are found.
        threshold: of `duplicate_match.best_correlation`.
        seen: called with the number of rows of `prints` that are done now.
    """
    nearest = _NEAREST_TURNED if spectra.turns else _NEAREST
    against = prints if others is None else others
    middles = spectra.of_middle(against)
    none = np.empty(0, np.int64)
    found = [Pairs(none, none, np.empty(0, np.float32))]
    waiting: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
    for low in range(0, len(prints), _TILE_ROWS):
        windows = spectra.of_windows(prints[low : low + _TILE_ROWS])
        for first in range(low if others is None else 0, len(against), _TILE_ROWS):
            middle = middles[first : first + _TILE_ROWS].T
            cosine = windows[0] @ middle
            for window in windows[1:]:
                torch.maximum(cosine, window @ middle, out=cosine)
            near = cosine >= nearest
            if first == low and others is None:
                near = near.triu(1)
            hits = near.nonzero().numpy()
            waiting.append((hits[:, 0] + low, hits[:, 1] + first))
            if sum(len(w[0]) for w in waiting) >= _AT_ONCE:
                found.append(_decide(prints, against, waiting, spectra.turns, threshold))
                waiting = []
        if seen is not None:
            seen(len(windows[0]))
    if waiting:
        found.append(_decide(prints, against, waiting, spectra.turns, threshold))
    return join(found)


def join(parts: list[Pairs]) -> Pairs:
    """All pairs of the parts, each once, sorted by first and second."""
    first, second, similarity = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("first", "second", "similarity")
    )
    order = np.lexsort((-similarity, second, first))
    first, second, similarity = first[order], second[order], similarity[order]
    fresh = np.ones(len(first), np.bool_)
    fresh[1:] = (np.diff(first) != 0) | (np.diff(second) != 0)
    return Pairs(first[fresh], second[fresh], similarity[fresh])


def _decide(
    prints: npt.NDArray[np.floating],
    others: npt.NDArray[np.floating],
    candidates: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]],
    turns: bool,
    threshold: float,
) -> Pairs:
    """The candidates that are alike."""
    first, second = (np.concatenate([pair[side] for pair in candidates]) for side in (0, 1))
    similarity = np.empty(len(first), np.float32)
    for start in range(0, len(first), _TILE_ROWS):
        span = slice(start, start + _TILE_ROWS)
        a, b = pictures(prints[first[span]]), pictures(others[second[span]])
        similarity[span] = best_correlation(a, b, turns=turns)
    alike = similarity >= threshold
    return Pairs(first[alike], second[alike], similarity[alike])


def _as_pictures(prints: npt.NDArray[np.floating]) -> Tensor:
    return torch.from_numpy(np.asarray(pictures(prints), np.float32)).view(-1, SIDE, SIDE)


def _half_disc(finest: int) -> tuple[Tensor, Tensor]:
    """Frequencies up to `finest` without the mean, one of each conjugate pair, as places."""
    y, x = torch.meshgrid(
        torch.arange(-finest, finest + 1), torch.arange(finest + 1), indexing="ij"
    )
    chosen = (y * y + x * x <= finest * finest) & ((x > 0) | (y > 0))
    return y[chosen] % _WINDOW_PX, x[chosen]


def _octant(finest: int) -> tuple[Tensor, Tensor]:
    """Of the frequencies that turns and flips make into each other, one each."""
    y, x = torch.meshgrid(torch.arange(finest + 1), torch.arange(finest + 1), indexing="ij")
    chosen = (y * y + x * x <= finest * finest) & (x >= y) & (x > 0)
    return y[chosen], x[chosen]
