"""Low-rank additions to linear layers (LoRA, Hu et al. 2021, arXiv 2106.09685, eq. 3).

W' = W + (α / r) B A with W frozen, B zero at the start and α = r here, so the factor is one. An
export has W' alone: whoever loads it needs to know nothing of this. Legend: r rank, I channels in,
O channels out, T tokens.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOW_RANK = ("lora_a", "lora_b")
"""Names of the additions."""


class LowRankLinear(nn.Linear):
    """A linear layer with an addition of rank r; the layer itself where r is 0."""

    def __init__(self, channels_in: int, channels_out: int, rank: int) -> None:
        super().__init__(channels_in, channels_out)
        self.rank = rank
        if rank:
            self.lora_a = nn.Parameter(torch.empty(rank, channels_in))
            self.lora_b = nn.Parameter(torch.empty(channels_out, rank))

    @torch.no_grad()
    def initialise_addition(self, generator: torch.Generator) -> None:
        """Draws A normal, 1 / r, and sets B to zero: the layer is what it was."""
        if self.rank:
            self.lora_a.normal_(std=1 / self.rank, generator=generator)
            self.lora_b.zero_()

    def forward(self, x: Tensor) -> Tensor:  # [T, I] → [T, O]
        """The layer, and its addition."""
        out = super().forward(x)
        if self.rank:
            out = out + F.linear(F.linear(x, self.lora_a), self.lora_b)
        return out


def merge_additions(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state without additions: each is in the weight it belongs to, computed in fp32."""
    merged = {n: t for n, t in state.items() if n.rpartition(".")[2] not in LOW_RANK}
    for name, a in state.items():
        layer, _, kind = name.rpartition(".")
        if kind == "lora_a":
            addition = state[f"{layer}.lora_b"].float() @ a.float()
            merged[f"{layer}.weight"] = merged[f"{layer}.weight"].float() + addition
    return merged
