"""The objective's terms: DINO and iBOT cross-entropies, Sinkhorn targets, the KoLeo spread.

Legend: B samples, M masked patches, K prototypes, D width. All arithmetic is fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

STUDENT_TEMPERATURE = 0.1  # DINO, arXiv 2104.14294, appendix C


@torch.no_grad()
def sinkhorn_targets(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Teacher targets balanced over prototypes (Sinkhorn-Knopp, SwAV arXiv 2006.09882, eq. 5).

    Works on logarithms, so logits of any size give finite targets, equal to the plain algorithm's
    wherever that does not overflow.

    Args:
        logits: teacher logits [B, K].
        temperature: of the teacher.
        iterations: of row and column scaling.

    Returns:
        Targets [B, K], fp32, rows summing to one; empty for B = 0.
    """
    log_q = logits.float() / temperature
    if len(log_q) == 0:
        return log_q
    for _ in range(iterations):
        log_q = log_q - torch.logsumexp(log_q, dim=0, keepdim=True)  # prototypes share alike
        log_q = log_q - torch.logsumexp(log_q, dim=1, keepdim=True)  # samples sum to one
    return log_q.exp()


def cross_entropy(student_logits: Tensor, targets: Tensor) -> Tensor:
    """-Σ_k t_k log softmax(s / τ)_k of each row, [B]."""
    log_p = F.log_softmax(student_logits.float() / STUDENT_TEMPERATURE, dim=-1)
    return -(targets * log_p).sum(dim=-1)


def dino_pairs(student_logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of every (student view, teacher view) pair.

    Args:
        student_logits: [S, B, K].
        targets: [V, B, K].

    Returns:
        [S, V]: means over the batch.
    """
    log_p = F.log_softmax(student_logits.float() / STUDENT_TEMPERATURE, dim=-1)
    return -torch.einsum("sbk,vbk->sv", log_p, targets) / targets.shape[1]


def ibot_loss(student_logits: Tensor, targets: Tensor, weights: Tensor, crops: int) -> Tensor:
    """Masked-patch cross-entropy: each masked crop counts alike, over all crops (DINOv2).

    Args:
        student_logits: of the masked patches [M, K].
        targets: of the same patches [M, K].
        weights: one over the masked patches of the patch's crop [M].
        crops: global crops in the batch, those without a mask included.

    Returns:
        Scalar; zero for M = 0.
    """
    return (cross_entropy(student_logits, targets) * weights).sum() / crops


def koleo_loss(features: Tensor, eps: float = 1e-8) -> Tensor:
    """Spread regulariser -mean log distance to the nearest neighbour (arXiv 1806.03198, eq. 2).

    Distances are between unit vectors, in fp32, so duplicates give a large finite value; one
    sample alone gives zero.

    Args:
        features: [B, D].
        eps: added to the distance.
    """
    if len(features) < 2:
        return features.new_zeros((), dtype=torch.float32)
    x = F.normalize(features.float(), dim=-1, eps=eps)
    with torch.no_grad():
        similarity = x @ x.T  # [B, B]
        similarity.fill_diagonal_(-2)
        nearest = similarity.argmax(dim=1)
    # the eps inside keeps the gradient of the root finite at zero distance
    distance = ((x - x[nearest]).square().sum(dim=1) + eps**2).sqrt()
    return -torch.log(distance + eps).mean()
