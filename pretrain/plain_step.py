"""The training step as one writes it first: the baseline that `eosin bench step` runs in turn.

Nothing is packed, chunked, compiled or left out: equal-size crops are stacked (one forward of the
student for the global crops, one for the local ones), attention is torch's, drop-path is a
Bernoulli factor on whole branches, and the losses are those of the papers on full fp32 logits.
Parameters have the names of `network.Network`, so a state loads strictly. Legend: B samples, V
global views, L local views, S = V + L, C = V · B global crops, N patches a crop, P prefix tokens,
M masked patches, K prototypes, D width.
"""

import copy
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from eosin.pretrain.heads import HeadConfig
from eosin.pretrain.network import ObjectiveConfig
from eosin.pretrain.optim import OptimConfig
from eosin.pretrain.positions import Jitter, learned_positions, rope_angles, rotate, turns
from eosin.pretrain.upload import upload
from eosin.pretrain.vit import VitConfig

NORM_EPS = 1e-6
STUDENT_TEMPERATURE = 0.1


class PlainAttention(nn.Module):
    """Multi-head self-attention over [B, T, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotations: Tensor | None) -> Tensor:
        """Attends within each crop; `rotations` are rotary cosines and sines [T, C], or None."""
        count, tokens, width = x.shape
        qkv = self.qkv(x).view(count, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, C]
        if rotations is not None:
            q, k = (rotate(t.permute(2, 0, 1, 3), rotations).permute(1, 2, 0, 3) for t in (q, k))
        attended = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return out


class PlainMlp(nn.Module):
    """GELU MLP or SwiGLU (gate first)."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.gated = config.ffn == "swiglu"
        self.fc1 = nn.Linear(config.width, config.hidden * (2 if self.gated else 1))
        self.fc2 = nn.Linear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] → [B, T, D]
        """Applies the feed-forward to every token."""
        hidden = self.fc1(x)
        if self.gated:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * value
        else:
            hidden = F.gelu(hidden)
        out: Tensor = self.fc2(hidden)
        return out


class PlainLayerScale(nn.Module):
    """One learned factor a channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] → [B, T, D]
        """Scales every channel."""
        return x * self.gamma


class PlainDropPath(nn.Module):
    """Stochastic depth as timm has it: each sample's branch is kept with 1 - rate, or zeroed."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] → [B, T, D]
        """Zeroes branches and scales the others by 1 / (1 - rate), in training."""
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1 - self.rate
        return x * x.new_empty(len(x), 1, 1).bernoulli_(keep).div_(keep)


class PlainBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.attn = PlainAttention(config.width, config.heads)
        self.ls1 = PlainLayerScale(config.width)
        self.norm2 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.mlp = PlainMlp(config)
        self.ls2 = PlainLayerScale(config.width)
        self.drop_path = PlainDropPath(config.drop_path)

    def forward(self, x: Tensor, rotations: Tensor | None) -> Tensor:  # [B, T, D] → [B, T, D]
        """Adds both branches."""
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), rotations)))
        out: Tensor = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        return out


class PlainPatchEmbed(nn.Module):
    """Non-overlapping patches to tokens."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch_px, stride=config.patch_px)

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, W] → [B, N, D]
        """Embeds every patch."""
        embedded: Tensor = self.proj(images)
        return embedded.flatten(2).transpose(1, 2)


class PlainVit(nn.Module):
    """The encoder over one stack of equal-size crops."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PlainPatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.reg_token = nn.Parameter(torch.zeros(1, config.registers, config.width))
        self.pos_embed = None
        if config.positions == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, config.grid**2, config.width))
        self.mask_token = nn.Parameter(torch.zeros(1, config.width))
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        jitter: Jitter | None = None,
        crop_group: int = 0,
    ) -> Tensor:
        """Normalised tokens [B, P + N, D], CLS first.

        Args:
            images: normalised [B, 3, H, W].
            mask: which patches the mask token replaces, bool [B, N].
            jitter: of rotary positions.
            crop_group: 0 for the global crops, 1 for the local ones; the jitter's alone.
        """
        config = self.config
        size = (images.shape[2] // config.patch_px, images.shape[3] // config.patch_px)
        x = self.patch_embed(images)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        rotations = None
        if self.pos_embed is not None:
            x = x + learned_positions(self.pos_embed, config.grid, size, config.interpolation)
        else:
            angles = rope_angles(size, config.head_channels, config.rope, jitter, crop_group)
            rotations = upload(torch.from_numpy(turns(angles, config.prefix)), x.device)
        prefix = torch.cat([self.cls_token, self.reg_token], dim=1).expand(len(x), -1, -1)
        x = torch.cat([prefix.to(x.dtype), x], dim=1)
        for block in self.blocks:
            x = block(x, rotations)
        out: Tensor = self.norm(x)
        return out


class PlainHead(nn.Module):
    """The projection head to full logits."""

    def __init__(self, width: int, config: HeadConfig) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.bottleneck),
        )
        self.last_layer = nn.Linear(config.bottleneck, config.prototypes, bias=False)
        self.last_gain = None
        if config.last_layer == "weight_norm":
            self.last_gain = nn.Parameter(torch.ones(config.prototypes, 1))

    def forward(self, tokens: Tensor) -> Tensor:  # [M, D] → [M, K]
        """Logits in fp32."""
        x = F.normalize(self.mlp(tokens), dim=-1)
        weight = self.last_layer.weight
        if self.last_gain is not None:
            weight = self.last_gain * F.normalize(weight, dim=-1)
        return F.linear(x, weight).float()


class PlainNetwork(nn.Module):
    """Backbone and heads."""

    def __init__(self, model: VitConfig, objective: ObjectiveConfig) -> None:
        super().__init__()
        self.backbone = PlainVit(model)
        self.head = PlainHead(model.width, objective.head) if objective.dino > 0 else None
        self.masked_patches = objective.ibot > 0
        self.patch_head = None
        if objective.separate_heads:
            self.patch_head = PlainHead(model.width, objective.patch_head or objective.head)

    def logits(self, cls: Tensor, patches: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Of CLS and of patch tokens, [·, K] each, where a loss needs them."""
        if self.head is not None and self.patch_head is None and self.masked_patches:
            both: Tensor = self.head(torch.cat([cls, patches]))  # one call for a shared head
            cls_logits, patch_logits = both.tensor_split([len(cls)])
            return cls_logits, patch_logits
        return (
            self.head(cls) if self.head is not None else None,
            self.patch_head(patches) if self.patch_head is not None else None,
        )


class PlainLosses(NamedTuple):
    """The terms as they enter the optimised sum, and that sum; scalars, fp32."""

    total: Tensor
    dino_global: Tensor
    dino_local: Tensor
    ibot: Tensor
    spread: Tensor


class PlainDistiller(nn.Module):
    """Student and teacher with DINO, iBOT and KoLeo under Sinkhorn targets.

    Args:
        model: the encoder.
        objective: the losses.
        group_size: samples that a spread over groups is taken among.

    Raises:
        ValueError: the objective has a term that has no plain form here.
    """

    def __init__(self, model: VitConfig, objective: ObjectiveConfig, group_size: int) -> None:
        super().__init__()
        check_plain(objective)
        self.objective, self.group_size = objective, group_size
        self.student = PlainNetwork(model, objective)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()

    def forward(
        self,
        global_crops: Tensor,
        local_crops: Tensor,
        masks: NDArray[np.bool_],
        temperature: float,
        jitter: Jitter | None = None,
    ) -> PlainLosses:
        """Losses of one step.

        Args:
            global_crops: normalised [V, B, 3, H, W].
            local_crops: normalised [L, B, 3, h, w]; L may be 0.
            masks: which global patches the student does not see, bool [C, N], view-major.
            temperature: of the teacher.
            jitter: of the student's rotary positions.
        """
        o, (views, batch) = self.objective, global_crops.shape[:2]
        images = global_crops.flatten(0, 1)
        mask = torch.from_numpy(masks)
        weights = (1 / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(mask)[mask]
        found = mask.flatten().nonzero().squeeze(1)
        # [M], [M], [C, N]: without a wait, as ours are
        rows, weights, mask = (upload(part, images.device) for part in (found, weights, mask))

        with torch.no_grad():
            seen = self.teacher.backbone(images)
            patches = seen[:, -mask.shape[1] :].flatten(0, 1)[rows]  # [M, D]
            cls_logits, patch_logits = self.teacher.logits(seen[:, 0], patches)
            if cls_logits is not None:
                targets = sinkhorn(cls_logits, temperature).unflatten(0, (views, batch))
            if patch_logits is not None:
                patch_targets = sinkhorn(patch_logits, temperature)

        out = self.student.backbone(images, mask, jitter)
        cls = out[:, 0]  # [C, D]
        every = cls
        if len(local_crops):
            local = self.student.backbone(local_crops.flatten(0, 1), None, jitter, crop_group=1)
            every = torch.cat([cls, local[:, 0]])  # [S · B, D]
        patches = out[:, -mask.shape[1] :].flatten(0, 1)[rows]
        cls_logits, patch_logits = self.student.logits(every, patches)

        dino_global = dino_local = ibot = spread = out.new_zeros((), dtype=torch.float32)
        if cls_logits is not None:
            n_pairs = views * (views - 1) + len(local_crops) * views
            log_p = F.log_softmax(cls_logits / STUDENT_TEMPERATURE, dim=-1)
            log_p = log_p.unflatten(0, (-1, batch))  # [S, B, K]
            for s, student_view in enumerate(log_p):
                for v, teacher_view in enumerate(targets):
                    if s == v:
                        continue
                    pair = -(teacher_view * student_view).sum(-1).mean() * (o.dino / n_pairs)
                    if s >= views:
                        dino_local = dino_local + o.local_weight * pair
                    else:
                        dino_global = dino_global + pair
        if patch_logits is not None:
            log_p = F.log_softmax(patch_logits / STUDENT_TEMPERATURE, dim=-1)
            terms = -(patch_targets * log_p).sum(dim=-1) * weights  # [M]
            ibot = o.ibot * terms.sum() / (views * batch)
        if o.spread.weight > 0:
            spread = o.spread.weight * sum(
                (self._spread(view) for view in cls.chunk(views)), start=spread
            )
        total = dino_global + dino_local + ibot + spread
        return PlainLosses(total, dino_global, dino_local, ibot, spread)

    def _spread(self, features: Tensor) -> Tensor:  # one view's [B, D] → scalar
        over = self.objective.spread.over
        parts = features.split(self.group_size) if over == "group" else (features,)
        return torch.stack([koleo(part) for part in parts]).mean()

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Teacher ← momentum · teacher + (1 - momentum) · student."""
        average: list[Tensor] = list(self.teacher.parameters())
        torch._foreach_lerp_(average, list(self.student.parameters()), 1 - momentum)


def check_plain(objective: ObjectiveConfig) -> None:
    """Refuses what there is no baseline for.

    Raises:
        ValueError: the objective has a term, or targets, beyond DINOv2's.
    """
    has = {
        f"objective.targets={objective.targets}": objective.targets != "sinkhorn",
        f"objective.spread.kind={objective.spread.kind}": objective.spread.kind != "koleo",
        f"objective.gram.weight={objective.gram.weight}": objective.gram.weight > 0,
        f"objective.jepa.weight={objective.jepa.weight}": objective.jepa.weight > 0,
    }
    if beyond := [name for name, is_there in has.items() if is_there]:
        raise ValueError(
            f"the plain step has no {', '.join(beyond)}; it is DINO, iBOT and KoLeo with "
            "Sinkhorn targets"
        )


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Targets balanced over prototypes (SwAV, arXiv 2006.09882, eq. 5), by exponentials.

    Args:
        logits: fp32 [M, K]; M may be 0.
        temperature: of the teacher.
        iterations: of row and column scaling.

    Returns:
        [M, K], rows summing to one.
    """
    if len(logits) == 0:
        return logits
    q = logits.sub(logits.max()).div_(temperature).exp_()
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(dim=0, keepdim=True) * q.shape[1]  # prototypes share alike
        q /= q.sum(dim=1, keepdim=True) * q.shape[0]  # and so do samples
    return q.mul_(q.shape[0])


def koleo(features: Tensor) -> Tensor:
    """-mean log distance to the nearest neighbour (arXiv 1806.03198, eq. 2), [B, D] → scalar."""
    if len(features) < 2:
        return features.new_zeros((), dtype=torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        x = F.normalize(features.float(), dim=-1)
        with torch.no_grad():
            nearest = (x @ x.T).fill_diagonal_(-1).argmax(dim=1)
        return -torch.log(F.pairwise_distance(x, x[nearest], eps=1e-8) + 1e-8).mean()


def clip(student: nn.Module, config: OptimConfig) -> None:
    """Clips the gradient of every child of the student, or of all of them together."""
    parts = list(student.children()) if config.clip == "module" else [student]
    for part in parts:
        nn.utils.clip_grad_norm_(part.parameters(), config.clip_norm)
