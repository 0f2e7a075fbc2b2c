"""Operations of a slide encoder's step: products of matrices alone, forward and backward.

Legend: n tokens of a sequence, R rows of all, W width.
"""

from collections.abc import Sequence

from eosin.pretrain.slide.batch import SlideBatch
from eosin.pretrain.slide.config import SlideConfig


def batch_flops(config: SlideConfig, dims: Sequence[int], batch: SlideBatch) -> float:
    """Of one batch: the student's three passes, and the teacher's one over the global views.

    Args:
        config: of the training.
        dims: features of each source.
        batch: of one rank.
    """
    student = forward_flops(
        config, dims, batch.stream.lengths, [len(x) for x in batch.stream.places]
    )
    total = 3 * student
    if config.objective.teaches:
        whole = batch.stream.first(batch.global_sequences)
        total += forward_flops(config, dims, whole.lengths, [len(x) for x in whole.places])
    distil = config.objective.distil
    if distil is not None:
        head, width = distil.head, config.model.width
        rows = int(batch.hidden.sum()) * (distil.ibot > 0)
        seen = batch.views * len(batch.rows) * (distil.dino > 0)
        taught = batch.n_global * len(batch.rows) * (distil.dino > 0)
        of_row = 2 * head.hidden * (width + head.hidden + head.bottleneck)
        of_row += 2 * head.bottleneck * head.prototypes
        total += of_row * (3 * (rows + seen) + rows + taught)
    return total


def forward_flops(
    config: SlideConfig, dims: Sequence[int], lengths: Sequence[int], counts: Sequence[int]
) -> float:
    """Of one forward pass of the encoder.

    Args:
        config: of the training.
        dims: features of each source.
        lengths: tiles of each sequence.
        counts: tiles of each source.
    """
    m = config.model
    adapters = sum(2 * n * dim * m.width for n, dim in zip(counts, dims, strict=True))
    if m.adapter == "mlp":
        adapters += 2 * sum(counts) * m.width**2
    rows = [n + m.prefix for n in lengths]
    gates = 3 if m.ffn == "swiglu" else 2
    linear = 2 * sum(rows) * (4 * m.width**2 + gates * m.width * m.hidden)
    attention = sum(4 * n**2 * m.width for n in rows)
    return float(adapters + m.depth * (linear + attention))
