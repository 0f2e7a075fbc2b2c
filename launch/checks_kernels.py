"""Attention and loss kernels: which there are, whether they are right, which training would take.

Each is run forward and backward on a small problem beside the definition in fp64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from eosin.configs.errors import ConfigError, printable
from eosin.launch.checks import Finding
from eosin.launch.process import choose_device, choose_precision
from eosin.pretrain.attention import AttentionFn, AttentionName, Packing, choose_attention
from eosin.pretrain.loss_memory import TEACHER_TEMPERATURE, textbook_stage
from eosin.pretrain.prototype_kernels import LossKernelName, LossKernels, choose_kernels
from eosin.pretrain.prototype_loss import prototype_cross_entropy, sinkhorn_scaling

AREA = "kernels"

K = TypeVar("K")

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Relative, of outputs and of gradients; bf16 carries 8 bits."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One implementation, as it did here."""

    kind: str
    """``attention`` or ``losses``."""
    name: str
    chosen: bool = False
    """Whether ``auto`` takes it."""
    lacking: str = ""
    """Why it cannot be had; the rest is then not known."""
    error: float = 0.0
    """Largest relative error of outputs and gradients."""
    failure: str = ""
    """What it raised."""


def check(folder: Path) -> list[Finding]:
    """Runs every kernel."""
    device = choose_device("auto")
    dtype = choose_precision("auto", device)
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    return judge(look(device, dtype), f"{device.type} in {precision}", _TOLERANCE[dtype])


def look(device: torch.device, dtype: torch.dtype) -> list[Kernel]:
    """The facts, attention first."""
    attention = choose_attention("auto", device, dtype)
    losses = choose_kernels("auto", device, dtype)
    kernels = []
    for name in get_args(AttentionName)[1:]:
        choose = partial(choose_attention, name, device, dtype)
        error = partial(attention_error, device=device, dtype=dtype)
        kernels.append(_tried("attention", name, choose, attention, error))
    for name in get_args(LossKernelName)[1:]:
        pick = partial(choose_kernels, name, device, dtype)
        kernels.append(_tried("losses", name, pick, losses, partial(loss_error, device=device)))
    return kernels


def _tried(
    kind: str, name: str, choose: Callable[[], K], chosen: K, error_of: Callable[[K], float]
) -> Kernel:
    try:
        found = choose()
    except ConfigError as reason:
        return Kernel(kind=kind, name=name, lacking=printable(str(reason).partition(";")[0]))
    try:
        error = error_of(found)
    except Exception as problem:  # a kernel may fail in any way of its library
        failure = printable(f"{type(problem).__name__}: {problem}")
        return Kernel(kind=kind, name=name, chosen=found == chosen, failure=failure)
    return Kernel(kind=kind, name=name, chosen=found == chosen, error=error)


def attention_error(function: AttentionFn, device: torch.device, dtype: torch.dtype) -> float:
    """Largest relative error of the output and the three gradients, against softmax in fp64."""
    packing, heads, channels = Packing(groups=((2, 37), (3, 10))), 2, 64
    generator = torch.Generator().manual_seed(0)
    shape = (packing.tokens, heads, channels)
    *x, weight = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))
    ours = _with_gradients(lambda q, k, v: function(q, k, v, packing), x, weight)
    reference = _with_gradients(
        lambda q, k, v: _softmax_attention(q, k, v, packing),
        [t.double() for t in x],
        weight.double(),
    )
    return _worst(ours, reference)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    out = []
    for a, b, c in zip(*(x.split(packing.lengths) for x in (q, k, v)), strict=True):  # [N, H, C]
        logits = torch.einsum("nhc,mhc->hnm", a, b) * a.shape[-1] ** -0.5
        out.append(torch.einsum("hnm,mhc->nhc", logits.softmax(-1), c))
    return torch.cat(out)


def loss_error(kernels: LossKernels, device: torch.device) -> float:
    """Likewise of the masked-patch loss and its two gradients, against full logits in fp64."""
    M, n, D = 48, 512, 64  # n prototypes
    generator = torch.Generator().manual_seed(0)

    def directions(rows: int) -> Tensor:
        x = F.normalize(torch.randn(rows, D, generator=generator), dim=-1)
        return x.to(kernels.dtype).to(device, torch.float32)  # exact in the kernels' operands

    student = directions(M), directions(n)
    teacher = directions(M), directions(n)

    def streamed(x: Tensor, weight: Tensor) -> Tensor:
        scaling = sinkhorn_scaling(teacher[0], teacher[1], TEACHER_TEMPERATURE, kernels)
        rows = torch.full((M,), 1 / M, device=device)
        mix = torch.ones(1, 1, device=device)
        return prototype_cross_entropy(
            x[None], weight, teacher[0][None], teacher[1], scaling, mix, rows, kernels=kernels
        ).sum()

    def textbook(x: Tensor, weight: Tensor) -> Tensor:
        return textbook_stage(x, weight, teacher[0].double(), teacher[1].double())

    one = torch.ones((), device=device)
    ours = _with_gradients(streamed, student, one)
    return _worst(ours, _with_gradients(textbook, [t.double() for t in student], one.double()))


def _with_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], weight: Tensor
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


def _worst(ours: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    errors = [
        float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, reference, strict=True)
    ]
    return max(errors) if all(e == e for e in errors) else float("inf")


def judge(kernels: Sequence[Kernel], where: str, tolerance: float) -> list[Finding]:
    """The rows.

    Args:
        kernels: what was tried.
        where: device and precision, for people.
        tolerance: error up to which a kernel computes what it should.
    """
    return [_row(kernel, where, tolerance) for kernel in kernels]


def _row(kernel: Kernel, where: str, tolerance: float) -> Finding:
    name = f"{kernel.kind} {kernel.name}"
    if kernel.lacking:
        return Finding(AREA, name, f"not here: {kernel.lacking}")
    key = "attention" if kernel.kind == "attention" else "loss_kernels"
    choice = f"{key}={kernel.name} on {where}" if kernel.chosen else ""
    instead = f"{key}={'sdpa' if kernel.kind == 'attention' else 'plain'}"
    if kernel.failure:
        found, advice = f"fails: {kernel.failure}", f"set {instead}, and reinstall {kernel.name}"
    elif not kernel.error <= tolerance:
        found = f"wrong: off by {kernel.error:.1e} forward and backward, {tolerance:.0e} is allowed"
        advice = f"set {instead}, and do not trust runs of this machine before it is understood"
    else:
        found = f"right to {kernel.error:.1e}, forward and backward"
        return Finding(AREA, name, found, choice)
    return Finding(AREA, name, found, choice, "mend" if kernel.chosen else "note", advice)
