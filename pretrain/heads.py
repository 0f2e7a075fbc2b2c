"""The projection head of DINO and iBOT: an MLP, a unit-length bottleneck, K prototypes.

Legend: M tokens, D width, Db bottleneck channels, K prototypes.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Shape of a projection head (Caron et al. 2021, arXiv 2104.14294, appendix C)."""

    prototypes: int = 65536
    """K: outputs of the last layer."""
    hidden: int = 2048
    """Channels of the MLP's two hidden layers."""
    bottleneck: int = 256
    """Channels that are normalised before the last layer."""
    last_layer: Literal["weight_norm", "plain"] = "weight_norm"
    """DINOv2's weight-normed prototypes (trainable gain), or DINOv3's plain linear layer."""

    def __post_init__(self) -> None:
        """Refuses sizes that are not positive."""
        for name in ("prototypes", "hidden", "bottleneck"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


class HeadMlp(nn.Sequential):
    """Layers in a row, with a forward of its own: `torch.compile` passes over those of torch."""

    def forward(self, x: Tensor) -> Tensor:  # [M, D] → [M, Db]
        """Applies every layer."""
        for layer in self:
            x = layer(x)
        return x


class PrototypeHead(nn.Module):
    """Tokens to prototype logits. Weights are undefined until `initialise` or a loaded state."""

    def __init__(self, width: int, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        self.mlp = HeadMlp(
            nn.Linear(width, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.bottleneck),
        )
        self.last_layer = nn.Linear(config.bottleneck, config.prototypes, bias=False)
        if config.last_layer == "weight_norm":
            self.last_gain = nn.Parameter(torch.empty(config.prototypes, 1))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Truncated normal 0.02, zero biases, unit gains; weight-normed rows uniform."""
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                module.bias.zero_()
        if self.config.last_layer == "weight_norm":
            bound = self.config.bottleneck**-0.5
            self.last_layer.weight.uniform_(-bound, bound, generator=generator)
            self.last_gain.fill_(1.0)
        else:
            nn.init.trunc_normal_(self.last_layer.weight, std=0.02, generator=generator)

    def bottleneck(self, tokens: Tensor) -> Tensor:  # [M, D] → [M, Db]
        """Unit-length tokens before the last layer, fp32.

        The norm is kept off zero by 1e-12, or 1e-6 where the MLP computes in fp16 (DINOv2,
        layers/dino_head.py).
        """
        x: Tensor = self.mlp(tokens)
        eps = 1e-6 if x.dtype == torch.float16 else 1e-12
        return F.normalize(x.float(), dim=-1, eps=eps)

    def prototypes(self) -> Tensor:  # [K, Db]
        """The last layer's effective rows, fp32: gain · v / |v| where it is weight-normed.

        Differentiable; compute it once a step, and give it to every loss of this head.
        """
        weight = self.last_layer.weight.float()
        if self.config.last_layer == "plain":
            return weight
        length = torch.linalg.vector_norm(weight, dim=1, keepdim=True).clamp_min(1e-12)
        rows: Tensor = weight * (self.last_gain.float() / length)
        return rows

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:  # [M, D] → [M, Db], [K, Db]
        """What the logits are the product of: `bottleneck` and `prototypes`."""
        return self.bottleneck(tokens), self.prototypes()

    def logits(self, tokens: Tensor) -> Tensor:  # [M, D] → [M, K]
        """Logits of every token against every prototype, fp32; for a small K."""
        x, weight = self(tokens)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, weight)
