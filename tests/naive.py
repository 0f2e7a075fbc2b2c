"""The whole training step written out for reading: what the product is checked against.

Nothing of `eosin.pretrain` is used but its configs. A network is a dict of tensors; each crop goes
through it alone; every pair, sample and patch is a turn of a loop; targets are exponentials.
Sources: DINOv2 (arXiv 2304.07193) and its code for normalisers and groups, DINO (2104.14294), iBOT
(2111.07832), SwAV (2006.09882) for Sinkhorn, KoLeo (1806.03198), AdamW (1711.05101, algorithm 2).
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor

from eosin.pretrain.vit import VitConfig

State = dict[str, Tensor]


def vit(p: State, c: VitConfig, image: Tensor, mask: Tensor | None = None) -> Tensor:
    """One image [3, H, W] → normalised tokens [P + N, D]; masked patches, bool [N]."""
    patch = c.patch_px
    rows, cols = image.shape[1] // patch, image.shape[2] // patch
    tokens = []
    for i in range(rows):
        for j in range(cols):
            square = image[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
            token = p["patch_embed.proj.weight"].flatten(1) @ square.flatten()
            token = token + p["patch_embed.proj.bias"]
            if mask is not None and mask[i * cols + j]:
                token = p["mask_token"][0]
            tokens.append(token)
    embedded = torch.stack(tokens)
    if c.positions == "learned":
        embedded = embedded + learned_positions(p["pos_embed"][0], c, rows, cols)
    x = torch.cat([p["cls_token"][0], p["reg_token"][0], embedded])
    for i in range(c.depth):
        x = block(p, c, f"blocks.{i}.", x, rows, cols)
    return layer_norm(p, "norm", x)


def learned_positions(table: Tensor, c: VitConfig, rows: int, cols: int) -> Tensor:
    """The table of a square grid, resampled where the crop's grid is another one, [N, D]."""
    if (rows, cols) == (c.grid, c.grid):
        return table
    square = table.T.reshape(1, c.width, c.grid, c.grid)
    if c.interpolation == "antialias":
        square = F.interpolate(square, size=(rows, cols), mode="bicubic", antialias=True)
    else:
        factors = ((rows + 0.1) / c.grid, (cols + 0.1) / c.grid)
        square = F.interpolate(square, scale_factor=factors, mode="bicubic")
    return square[0].flatten(1).T


def layer_norm(p: State, name: str, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def rotate(x: Tensor, c: VitConfig, rows: int, cols: int) -> Tensor:
    """Axial rotary positions of one head's patch tokens, [P + N, C]; prefix tokens stay."""
    size = x.shape[1]
    out = [x[t] for t in range(c.prefix)]
    for i in range(rows):
        for j in range(cols):
            y, z = 2 * (i + 0.5) / rows - 1, 2 * (j + 0.5) / cols - 1
            angles = []
            for coordinate in (y, z):
                for f in range(size // 4):
                    angles.append(2 * math.pi * coordinate / c.rope.base ** (2 * f / (size // 2)))
            angle = torch.tensor(angles, dtype=x.dtype)
            a, b = x[c.prefix + i * cols + j].chunk(2)
            out.append(
                torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])
            )
    return torch.stack(out)


def block(p: State, c: VitConfig, name: str, x: Tensor, rows: int, cols: int) -> Tensor:
    y = layer_norm(p, name + "norm1", x) @ p[name + "attn.qkv.weight"].T
    q, k, v = (y + p[name + "attn.qkv.bias"]).chunk(3, dim=-1)
    heads, size = [], c.width // c.heads
    for h in range(c.heads):
        s = slice(h * size, (h + 1) * size)
        a, b = q[:, s], k[:, s]
        if c.positions == "rope":
            a, b = rotate(a, c, rows, cols), rotate(b, c, rows, cols)
        heads.append((a @ b.T / math.sqrt(size)).softmax(-1) @ v[:, s])
    y = torch.cat(heads, dim=-1) @ p[name + "attn.proj.weight"].T + p[name + "attn.proj.bias"]
    x = x + p[name + "ls1.gamma"] * y
    y = layer_norm(p, name + "norm2", x) @ p[name + "mlp.fc1.weight"].T + p[name + "mlp.fc1.bias"]
    if c.ffn == "swiglu":
        gate, value = y.chunk(2, dim=-1)
        y = gate * torch.sigmoid(gate) * value
    else:
        y = gelu(y)
    y = y @ p[name + "mlp.fc2.weight"].T + p[name + "mlp.fc2.bias"]
    return x + p[name + "ls2.gamma"] * y


def head(p: State, token: Tensor) -> Tensor:
    """One token [D] → logits [K]."""
    x = gelu(p["mlp.0.weight"] @ token + p["mlp.0.bias"])
    x = gelu(p["mlp.2.weight"] @ x + p["mlp.2.bias"])
    x = p["mlp.4.weight"] @ x + p["mlp.4.bias"]
    x = x / x.norm()
    rows = p["last_layer.weight"]
    if "last_gain" in p:
        rows = p["last_gain"] * rows / rows.norm(dim=1, keepdim=True)
    return rows @ x


def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Targets [M, K] by scaling the matrix of exponentials; float64, global maximum subtracted."""
    x = logits.double()
    q = ((x - x.max()) / temperature).exp().T  # [K, M]
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(dim=1, keepdim=True) / q.shape[0]
        q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T.to(logits.dtype)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-Σ t log softmax(s / 0.1) of one row."""
    scaled = logits / 0.1
    return -(target * (scaled - scaled.exp().sum().log())).sum()


def koleo(features: Tensor) -> Tensor:
    unit = features / features.norm(dim=1, keepdim=True)
    total = torch.zeros(())
    for i in range(len(unit)):
        nearest = min(
            float((unit[i] - unit[j]).norm().detach()) for j in range(len(unit)) if j != i
        )
        for j in range(len(unit)):
            if j != i and float((unit[i] - unit[j]).norm().detach()) == nearest:
                total = total - ((unit[i] - unit[j]).norm() + 1e-8).log() / len(unit)
                break
    return total


def part(state: State, prefix: str) -> State:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def step_losses(
    student: State,
    teacher: State,
    c: VitConfig,
    crops: Tensor,
    local: Tensor,
    mask: Tensor,
    temperature: float,
    weights: tuple[float, float, float] = (1.0, 1.0, 0.1),
) -> dict[str, Tensor]:
    """DINO, iBOT and KoLeo of one batch, each with its weight, and their sum.

    Args:
        student: by the names of a `Network`.
        teacher: likewise.
        c: shape of both backbones.
        crops: global crops [V, B, 3, H, W].
        local: local crops [L, B, 3, h, w].
        mask: masked patches of the global crops, bool [V, B, N].
        temperature: of the teacher.
        weights: of DINO, iBOT and KoLeo.
    """
    V, B = crops.shape[:2]
    prefix = c.prefix
    patch_head = "patch_head." if any(k.startswith("patch_head.") for k in student) else "head."
    with torch.no_grad():
        body = part(teacher, "backbone.")
        seen = {(v, b): vit(body, c, crops[v, b]) for v in range(V) for b in range(B)}
        cls = [head(part(teacher, "head."), seen[v, b][0]) for v in range(V) for b in range(B)]
        targets = sinkhorn(torch.stack(cls), temperature)
        where = [
            (v, b, n)
            for v in range(V)
            for b in range(B)
            for n in range(mask.shape[2])
            if mask[v, b, n]
        ]
        hidden = [head(part(teacher, patch_head), seen[v, b][prefix + n]) for v, b, n in where]
        hidden_targets = sinkhorn(torch.stack(hidden), temperature) if where else None
    body = part(student, "backbone.")
    out = {(v, b): vit(body, c, crops[v, b], mask[v, b]) for v in range(V) for b in range(B)}
    for v in range(len(local)):
        out |= {(V + v, b): vit(body, c, local[v, b]) for b in range(B)}
    logits = {key: head(part(student, "head."), tokens[0]) for key, tokens in out.items()}

    pairs = [(s, t) for s in range(V + len(local)) for t in range(V) if s != t]
    losses = {
        "dino_global": torch.zeros(()),
        "dino_local": torch.zeros(()),
        "ibot": torch.zeros(()),
    }
    for s, t in pairs:
        name = "dino_global" if s < V else "dino_local"
        for b in range(B):
            term = cross_entropy(logits[s, b], targets[t * B + b])
            losses[name] = losses[name] + weights[0] * term / B / len(pairs)
    for row, (v, b, n) in enumerate(where):
        assert hidden_targets is not None
        term = cross_entropy(
            head(part(student, patch_head), out[v, b][prefix + n]), hidden_targets[row]
        )
        losses["ibot"] = losses["ibot"] + weights[1] * term / mask[v, b].sum() / (V * B)
    views = [torch.stack([out[v, b][0] for b in range(B)]) for v in range(V)]
    losses["spread"] = weights[2] * torch.stack([koleo(view) for view in views]).sum()
    losses["total"] = torch.stack(list(losses.values())).sum()
    return losses


def clip(student: State, max_norm: float) -> None:
    """Each module's gradient (backbone, each head) to at most `max_norm`, in place."""
    for module in {name.split(".")[0] for name in student}:
        grads = [v.grad for k, v in student.items() if k.startswith(f"{module}.")]
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads if g is not None))
        for g in grads:
            if g is not None and norm > max_norm:
                g *= max_norm / norm


def learning_rate_factor(name: str, depth: int, layer_decay: float, patch_embed: float) -> float:
    """DINOv2's layer ids (param_groups.py): 0 embeddings, i + 1 block i, depth + 1 the rest."""
    found = re.match(r"backbone\.blocks\.(\d+)\.", name)
    if found:
        factor = layer_decay ** (depth - int(found[1]))
    elif name.startswith("backbone.norm.") or not name.startswith("backbone."):
        factor = 1.0
    else:
        factor = layer_decay ** (depth + 1)
    return factor * patch_embed if "patch_embed" in name else factor


def adamw(
    student: State,
    moments: dict[str, tuple[Tensor, Tensor]],
    step: int,
    rates: dict[str, float],
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> None:
    """Step number `step` (from 1) in place; no decay of biases, norms and LayerScale."""
    for name, p in student.items():
        if p.grad is None:
            continue
        m, v = moments.setdefault(name, (torch.zeros_like(p), torch.zeros_like(p)))
        m.copy_(betas[0] * m + (1 - betas[0]) * p.grad)
        v.copy_(betas[1] * v + (1 - betas[1]) * p.grad**2)
        decays = not (name.endswith(".bias") or ".norm" in name or "gamma" in name)
        with torch.no_grad():
            p *= 1 - rates[name] * (weight_decay if decays else 0.0)
            scaled = (v / (1 - betas[1] ** step)).sqrt() + eps
            p -= rates[name] * (m / (1 - betas[0] ** step)) / scaled


@torch.no_grad()
def follow(teacher: State, student: State, momentum: float) -> None:
    for name, value in teacher.items():
        value.copy_(momentum * value + (1 - momentum) * student[name].detach())
