"""Attention that falls with distance (Euclidean ALiBi in two dimensions), in tiles of its matrix.

A token attends to another by q·k / √C less a slope of the head times their distance, so what a
slide says does not change when it is turned or mirrored, and no size is foreign (Press et al. 2022
for text; TITAN, Ding et al. 2024, for slides). The bias is computed from places where it is needed:
no matrix of all pairs is ever there, forwards or backwards, so memory grows with the tokens and not
with their square. Sequences lie packed behind one another and do not see each other. Tokens without
a place (class token, registers) are at no distance from any. Legend: T tokens of all sequences, B
sequences, H heads, C channels of a head.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

QUERIES, KEYS = 512, 1024
"""Sides of a tile of the matrix."""
SHORT = 512
"""Sequences up to so many tokens are taken several at a time, filled up to the longest of them."""
CELLS = 2**21
"""Pairs of tokens, of all of them, that are taken at a time."""


class Places(NamedTuple):
    """Where tokens are."""

    position: Tensor
    """In tiles, fp32 [T, 2]; what it is for a token without a place does not matter."""
    placed: Tensor
    """Whether a token has a place, bool [T]."""
    offsets: tuple[int, ...]
    """Where each sequence begins, and the end, B + 1 numbers."""
    section: Tensor | None = None
    """Piece of tissue, int [T]: tokens with a place attend to their own piece alone, and to tokens
    without one; None: to all of their sequence."""


def alibi_slopes(heads: int) -> Tensor:
    """One slope a head, fp32 [H]: 2^(-8 i / H) for i from 1 (Press et al. 2022, section 3)."""
    return torch.pow(2.0, -8.0 * torch.arange(1, heads + 1) / heads)


def distance_attention(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, places: Places) -> Tensor:
    """Attends within each sequence; sums in fp32, memory linear in T.

    Args:
        q: [T, H, C].
        k: likewise.
        v: likewise.
        slopes: of heads, fp32 [H]; no gradient.
        places: of the tokens.

    Returns:
        [T, H, C], of q's dtype.
    """
    found: Tensor = _Tiled.apply(q, k, v, slopes, places)
    return found


def dense_distance_attention(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, places: Places
) -> Tensor:
    """The same with all matrices whole: the reference. The arguments of `distance_attention`."""
    parts = []
    for start, stop in zip(places.offsets, places.offsets[1:], strict=False):
        rows = slice(start, stop)
        own = [x[rows].transpose(0, 1) for x in (q, k, v)]  # each [H, N, C]
        bias = _bias(slopes, places, rows, rows).to(q.dtype)
        scores = own[0] @ own[1].transpose(1, 2) * q.shape[2] ** -0.5 + bias
        parts.append((scores.softmax(dim=2) @ own[2]).transpose(0, 1))
    return torch.cat(parts)


def _bias(slopes: Tensor, places: Places, rows: slice, columns: slice) -> Tensor:
    """What is added to the scores of some queries with some keys, fp32 [H, n, m]."""
    a, b = places.position[rows], places.position[columns]
    both = places.placed[rows, None] & places.placed[columns]
    # not cdist, whose sums of squares lose small differences of large numbers
    away = torch.sqrt((a[:, None, 0] - b[:, 0]) ** 2 + (a[:, None, 1] - b[:, 1]) ** 2)
    bias = -slopes[:, None, None] * torch.where(both, away, 0.0)
    if places.section is not None:
        apart = both & (places.section[rows, None] != places.section[columns])
        bias = bias.masked_fill(apart, -torch.inf)
    return bias


@lru_cache(maxsize=64)
def _parted(offsets: tuple[int, ...]) -> tuple[list[NDArray[np.int64]], list[tuple[int, int]]]:
    """How sequences are taken.

    Returns:
        Short ones of about one length together, as rows [b, n], -1 where one is filled up; and
        where each long one begins and ends.
    """
    starts = np.array(offsets, np.int64)
    sizes = np.diff(starts)
    ordered = [i for i in np.argsort(sizes, kind="stable").tolist() if 0 < sizes[i] <= SHORT]
    together: list[list[int]] = []
    for at in ordered:
        own = together[-1] if together else []
        fits = own and (len(own) + 1) * sizes[at] ** 2 <= CELLS
        if fits and sizes[own[0]] >= 0.75 * sizes[at]:
            own.append(at)
        else:
            together.append([at])
    rows = []
    for members in together:
        longest = int(sizes[members[-1]])
        places = starts[members][:, None] + np.arange(longest)
        rows.append(np.where(np.arange(longest) < sizes[members][:, None], places, -1))
    long = [(int(starts[i]), int(starts[i + 1])) for i in np.flatnonzero(sizes > SHORT)]
    return rows, long


class _Short(NamedTuple):
    """Sequences of about one length, taken together: b of n tokens, filled up."""

    rows: Tensor
    """int64 [b · n]; any row where one is filled up."""
    shape: tuple[int, int]
    there: Tensor
    """Which of the rows are tokens, bool [b · n]."""

    @staticmethod
    def of(rows: NDArray[np.int64], device: torch.device) -> "_Short":
        flat = torch.from_numpy(rows.ravel()).to(device)
        return _Short(flat.clamp(min=0), (rows.shape[0], rows.shape[1]), flat >= 0)

    def take(self, x: Tensor) -> Tensor:
        """Rows of [T, H, C], fp32 [b, H, n, C]."""
        taken: Tensor = x.index_select(0, self.rows).unflatten(0, self.shape)
        return taken.transpose(1, 2).float()

    def put(self, out: Tensor, x: Tensor) -> None:
        """Writes [b, H, n, C] to the rows of [T, H, C] that are tokens."""
        flat = x.transpose(1, 2).flatten(0, 1)
        out[self.rows[self.there]] = flat[self.there].to(out.dtype)

    def shares(self, q: Tensor, k: Tensor, slopes: Tensor, places: Places) -> Tensor:
        """The softmax of the scores, [b, H, n, n]; a filled-up query attends evenly."""
        position = places.position.index_select(0, self.rows).unflatten(0, self.shape)  # [b, n, 2]
        placed = places.placed.index_select(0, self.rows).unflatten(0, self.shape)
        both = placed[:, :, None] & placed[:, None]
        a, b = position[:, :, None], position[:, None]
        away = torch.sqrt((a[..., 0] - b[..., 0]) ** 2 + (a[..., 1] - b[..., 1]) ** 2)
        scores = q @ k.transpose(2, 3)
        scores -= slopes[:, None, None] * torch.where(both, away, 0.0)[:, None]
        apart = ~self.there.unflatten(0, self.shape)[:, None].expand(both.shape)
        if places.section is not None:
            section = places.section.index_select(0, self.rows).unflatten(0, self.shape)
            apart = apart | (both & (section[:, :, None] != section[:, None]))
        # not -inf, which a query that is none would make NaN of
        found: Tensor = scores.masked_fill_(apart[:, None], -1e30).softmax(dim=3)
        return found


def _blocks(start: int, stop: int, side: int) -> list[slice]:
    return [slice(at, min(at + side, stop)) for at in range(start, stop, side)]


class _Tiled(torch.autograd.Function):
    """Softmax over blocks of keys as they come (Milakov 2018; Dao et al. 2022, algorithms 1, 4)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, places: Places
    ) -> Tensor:
        """See `distance_attention`."""
        out = torch.empty_like(q)
        log_sums = q.new_empty(q.shape[:2], dtype=torch.float32)  # [T, H], of long sequences alone
        scale = q.shape[2] ** -0.5
        short, long = _parted(places.offsets)
        for part in short:
            own = _Short.of(part, q.device)
            shares = own.shares(own.take(q) * scale, own.take(k), slopes, places)
            own.put(out, shares @ own.take(v))
        for start, stop in long:
            for rows in _blocks(start, stop, QUERIES):
                queries = q[rows].transpose(0, 1).float() * scale  # [H, n, C]
                shape = queries.shape[:2]
                top = queries.new_full(shape, -torch.inf)
                total, mixed = queries.new_zeros(shape), torch.zeros_like(queries)
                for columns in _blocks(start, stop, KEYS):
                    keys, values = (x[columns].transpose(0, 1).float() for x in (k, v))
                    scores = queries @ keys.transpose(1, 2)
                    scores += _bias(slopes, places, rows, columns)
                    higher = torch.maximum(top, scores.amax(dim=2))
                    base = torch.where(higher.isinf(), 0.0, higher)  # nothing to attend to so far
                    raised = torch.exp(scores - base[..., None])
                    kept = torch.exp(top - base)
                    total = total * kept + raised.sum(dim=2)
                    mixed = mixed * kept[..., None] + raised @ values
                    top = higher
                out[rows] = (mixed / total[..., None]).transpose(0, 1).to(q.dtype)
                log_sums[rows] = (top + total.log()).T
        ctx.save_for_backward(q, k, v, slopes, out, log_sums)
        ctx.places = places
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Every tile of the matrix is computed again; sums are fp32."""
        q, k, v, slopes, out, log_sums = ctx.saved_tensors
        places: Places = ctx.places
        grad = grads[0]
        scale = q.shape[2] ** -0.5
        of_q, of_k, of_v = (torch.zeros(x.shape, device=x.device) for x in (q, k, v))
        short, long = _parted(places.offsets)
        for part in short:
            own = _Short.of(part, q.device)
            queries, keys, values = own.take(q), own.take(k), own.take(v)
            given = own.take(grad) * own.there.unflatten(0, own.shape)[:, None, :, None]
            shares = own.shares(queries * scale, keys, slopes, places)
            inner = given @ values.transpose(2, 3)
            inner -= (given * own.take(out)).sum(dim=3, keepdim=True)
            inner *= shares * scale
            own.put(of_q, inner @ keys)
            own.put(of_k, inner.transpose(2, 3) @ queries)
            own.put(of_v, shares.transpose(2, 3) @ given)
        for start, stop in long:
            for rows in _blocks(start, stop, QUERIES):
                queries, given, said = (x[rows].transpose(0, 1).float() for x in (q, grad, out))
                dot = (given * said).sum(dim=2, keepdim=True)  # [H, n, 1]
                for columns in _blocks(start, stop, KEYS):
                    keys, values = (x[columns].transpose(0, 1).float() for x in (k, v))
                    scores = queries @ keys.transpose(1, 2) * scale
                    scores += _bias(slopes, places, rows, columns)
                    shares = torch.exp(scores - log_sums[rows].T[..., None])  # [H, n, m]
                    of_v[columns] += (shares.transpose(1, 2) @ given).transpose(0, 1)
                    inner = shares * (given @ values.transpose(1, 2) - dot) * scale
                    of_q[rows] += (inner @ keys).transpose(0, 1)
                    of_k[columns] += (inner.transpose(1, 2) @ queries).transpose(0, 1)
        return of_q.to(q.dtype), of_k.to(k.dtype), of_v.to(v.dtype), None, None
