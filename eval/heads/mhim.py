"""MHIM-MIL with recycling, ``mhim/v2@1`` (Tang et al. 2023 and 2025), from the papers.

A gated attention head is the student, its moving average (momentum 0.9997) the teacher. The teacher
sees the whole bag and says which tiles are easiest: its class-aware score of a tile is the largest
probability of a class for that tile's part of the bag, ``softmax(W (a_i h_i) + b)``. The student
learns without the easiest 3 %; of the rest it sees a random 90 %, and the others condensed by
cross-attention (8 heads) into 5 further tokens, whose queries are a moving average (0.9999) of what
comes out. It is held against the teacher's embedding too (softmax at 0.1, weight 0.5). At test the
teacher sees the whole bag.

What is told by fewer tiles than the hidden 3 % is hidden from the student once the teacher knows
it.

Not the papers': the teacher starts as the student, not as a head trained before; it is in eval mode
(theirs adds dropout's noise to its scores and targets). Masks are tensors, where theirs are sets of
numbers on the host. Legend as in `head`; K tokens.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eosin.eval.heads.abmil import GatedAttention
from eosin.eval.heads.head import Criterion, Drawing, Head, Verdict
from eosin.eval.heads.packed import Packed, bag_softmax, bag_sum, sorted_rows

WIDTH = 256
HIDDEN_SHARE = 0.03
KEPT = 0.9
QUERIES = 5
HEADS = 8
TEACHER = 0.9997
QUERY_AVERAGE = 0.9999
CONSISTENCY = 0.5
TEMPERATURE = 0.1


class Recycler(nn.Module):
    """Tiles of a bag, condensed into K tokens by cross-attention."""

    queries: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.keys, self.values = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("queries", torch.randn(QUERIES, WIDTH) * 0.02)

    def forward(self, h: Tensor, packed: Packed) -> Tensor:
        """K tokens of each bag, [B, K, W].

        Args:
            h: [T, W].
            packed: the bags that they are of.
        """
        seen = self.norm(h)
        keys = self.keys(seen).unflatten(1, (HEADS, -1))  # [T, H, w]
        values = self.values(seen)
        queries = self.queries.unflatten(1, (HEADS, -1))  # [K, H, w]
        scores = torch.einsum("khw,thw->tkh", queries, keys) * (WIDTH // HEADS) ** -0.5
        weights = bag_softmax(scores.flatten(1), packed).unflatten(1, (QUERIES, HEADS))
        parts = []
        for head, own in enumerate(values.chunk(HEADS, dim=1)):
            of_head = [
                bag_sum(own.contiguous(), packed, weights[:, k, head].contiguous())
                for k in range(QUERIES)
            ]
            parts.append(torch.stack(of_head, dim=1))  # [B, K, w]
        return torch.cat(parts, dim=2)


class Mhim(Head):
    """See the module."""

    def __init__(self, dim: int, n_outputs: int) -> None:
        super().__init__()
        self.student = GatedAttention(dim, n_outputs, WIDTH)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.recycler = Recycler()
        self.draws = Drawing()
        self._condensed: Tensor | None = None

    def forward(self, packed: Packed) -> Verdict:
        """The teacher's, of whole bags."""
        found: Verdict = self.teacher.eval()(packed)
        return found

    def training_loss(self, packed: Packed, targets: Tensor, criterion: Criterion) -> Tensor:
        """The student's loss on what is left of the bags, and its distance from the teacher."""
        with torch.no_grad():
            told: Verdict = self.teacher.eval()(packed)
            easy = self._class_aware(packed, told)
        kept, rest = self._parts(packed, easy)
        h = self.student.embed(packed.features)
        tokens = self.recycler(h[rest], packed.take(rest))  # [B, K, W]
        self._condensed = tokens.detach().mean(dim=0)
        joined, bags = _behind(h[kept], packed.take(kept), tokens)
        weights = bag_softmax(self.student.score(joined), bags)
        embedding = bag_sum(joined, bags, weights)
        target = (told.embedding / TEMPERATURE).softmax(dim=1)
        alike = F.cross_entropy(embedding, target)
        outputs = self.student.classify(embedding)
        return criterion(outputs, targets) + CONSISTENCY * alike

    @torch.no_grad()
    def after_step(self) -> None:
        """Teacher and queries follow."""
        pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        for average, value in pairs:
            average.lerp_(value, 1 - TEACHER)
        if self._condensed is not None:
            self.recycler.queries.lerp_(self._condensed, 1 - QUERY_AVERAGE)

    def _class_aware(self, packed: Packed, told: Verdict) -> Tensor:
        """How sure the teacher is of some class by each tile alone, [T]."""
        h = self.teacher.embed(packed.features) * told.weights[:, None]
        said: Tensor = self.teacher.classify(h * packed.sizes.to(h.dtype)[packed.bag][:, None])
        return said.softmax(dim=1).amax(dim=1)

    def _parts(self, packed: Packed, easy: Tensor) -> tuple[Tensor, Tensor]:
        """Rows that the student sees, and those that are condensed; both sorted, no bag empty."""
        sizes = packed.sizes
        hidden = (sizes * HIDDEN_SHARE).long()
        seen = ((sizes - hidden) * KEPT).long().clamp_min(1)
        place = _place_in_bag(-easy, packed)
        visible = place >= hidden[packed.bag]
        drawn = self.draws.uniform(len(easy), easy.device) + ~visible * 2.0
        order = _place_in_bag(drawn, packed)
        kept = visible & (order < seen[packed.bag])
        rest = visible & ~kept
        empty = torch.bincount(packed.bag[rest], minlength=packed.n_bags) == 0
        rest = rest | (empty[packed.bag] & kept)  # of a tiny bag: what is seen is condensed too
        return kept.nonzero()[:, 0], rest.nonzero()[:, 0]


def _place_in_bag(keys: Tensor, packed: Packed) -> Tensor:
    """The place of each tile in its bag, smallest key first: int64 [T], from 0."""
    order, place = sorted_rows(keys, packed)
    return torch.empty_like(place).index_copy(0, order, place)


def _behind(h: Tensor, packed: Packed, tokens: Tensor) -> tuple[Tensor, Packed]:
    """Tiles with the tokens of their bag behind them: [T + B · K, W], and where the bags lie."""
    count, extra = tokens.shape[:2]
    bag = torch.cat([packed.bag, torch.arange(count, device=h.device).repeat_interleave(extra)])
    order = bag.argsort(stable=True)
    joined = torch.cat([h, tokens.flatten(0, 1)])[order]
    offsets = packed.offsets + extra * torch.arange(count + 1, device=h.device)
    cells = packed.cells.new_zeros(len(joined), 2)
    return joined, Packed(joined, offsets, cells)
