"""The Triton kernels on a GPU against the plain ones, at K = 65,536, with their speed."""

import json
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eosin.pretrain.loss_memory import compare_loss_memory, textbook_stage
from eosin.pretrain.prototype_kernels import LossKernels, PlainKernels, choose_kernels
from eosin.pretrain.prototype_loss import prototype_cross_entropy, sinkhorn_scaling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
]
K = 65_536


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return F.normalize(torch.randn(*shape, device="cuda", generator=generator), dim=-1)


def triton_kernels(dtype: torch.dtype) -> LossKernels:
    pytest.importorskip("triton")
    return choose_kernels("triton", torch.device("cuda"), dtype)


def close(ours: Tensor, reference: Tensor, tolerance: float) -> None:
    assert torch.isfinite(ours).all()
    error = (ours.float() - reference.float()).norm() / reference.float().norm()
    assert error <= tolerance, float(error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("rows, channels", [(300, 256), (77, 384), (33, 512), (1, 64), (5, 200)])
def test_operations_equal_the_plain_ones(dtype: torch.dtype, rows: int, channels: int) -> None:
    """Both directions: few rows against K columns (split), K rows against few columns."""
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    plain, fused = PlainKernels(dtype), triton_kernels(dtype)
    tokens, prototypes = unit(rows, channels).to(dtype), unit(K, channels, seed=1).to(dtype)
    for a, b in ((tokens, prototypes), (prototypes, tokens)):
        bias, values = torch.randn(len(b), device="cuda"), unit(*b.shape, seed=2).to(dtype)
        close(fused.log_sum_exp(a, b, bias, 25.0), plain.log_sum_exp(a, b, bias, 25.0), 1e-4)
        for v in (values, b):
            ours, reference = (k.softmax_average(a, b, bias, 25.0, v) for k in (fused, plain))
            close(ours[0], reference[0], tolerance)
            close(ours[1], reference[1], 1e-4)
        row_bias = -plain.log_sum_exp(a, b, bias, 25.0)
        # small, or rounding beside it would outweigh what is added
        outs = [torch.full((len(a), channels), 0.01, device="cuda") for _ in range(2)]
        for out, kernels in zip(outs, (fused, plain), strict=True):
            kernels.add_weighted(out, a, b, row_bias, bias, 25.0, values)
            out -= 0.01
        close(outs[0], outs[1], tolerance)


def one_view(
    student: list[Tensor], teacher: list[Tensor], kernels: LossKernels
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient of the tokens, gradient of the prototypes) of a masked-patch loss."""
    x, weight = (t.detach().requires_grad_() for t in student)
    scaling = sinkhorn_scaling(*teacher, 0.05, kernels)
    rows = torch.full((len(x),), 1 / len(x), device="cuda")
    mix = torch.ones(1, 1, device="cuda")
    loss = prototype_cross_entropy(
        x[None], weight, teacher[0][None], teacher[1], scaling, mix, rows, kernels=kernels
    )[0]
    return loss.detach(), *torch.autograd.grad(loss, (x, weight))


def full_logits(student: list[Tensor], teacher: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = (t.detach().requires_grad_() for t in student)
    loss = textbook_stage(x, weight, *teacher)
    return loss.detach(), *torch.autograd.grad(loss, (x, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_loss_and_gradients_equal_full_logits_in_fp32(dtype: torch.dtype) -> None:
    """bf16: operands and weights of averages carry 8 bits, sums 24."""
    student, teacher = [unit(1000, 256), unit(K, 256, seed=1)], [unit(1000, 256, seed=2)]
    teacher.append(unit(K, 256, seed=3))
    reference = full_logits(student, teacher)
    for kernels in (triton_kernels(dtype), PlainKernels(dtype)):
        loss, *gradients = one_view(student, teacher, kernels)
        close(loss, reference[0], 1e-3 if dtype == torch.bfloat16 else 1e-5)
        for ours, expected in zip(gradients, reference[1:], strict=True):
            close(ours, expected, 3e-2 if dtype == torch.bfloat16 else 1e-3)


def test_auto_takes_triton_in_bf16_alone() -> None:
    pytest.importorskip("triton")
    cuda = torch.device("cuda")
    assert choose_kernels("auto", cuda, torch.bfloat16) == triton_kernels(torch.bfloat16)
    assert choose_kernels("auto", cuda, torch.float32) == PlainKernels()


@pytest.mark.pitfall(24)
def test_new_row_counts_compile_nothing_new() -> None:
    """Masked tokens vary from step to step."""
    triton = pytest.importorskip("triton")
    kernels, compiled = triton_kernels(torch.bfloat16), []
    teacher = [unit(640, 256), unit(8192, 256, seed=1)]
    for rows in (640, 633):
        one_view([unit(rows, 256), teacher[1]], [teacher[0][:rows], teacher[1]], kernels)
    previous = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda **event: compiled.append(event)
    try:
        for rows in (1, 17, 512, 639):
            one_view([unit(rows, 256), teacher[1]], [teacher[0][:rows], teacher[1]], kernels)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = previous
    assert compiled == []


def median_ms(step: Callable[[], object]) -> float:
    times = []
    for _ in range(8):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times[3:])[2]


def test_faster_than_the_textbook_and_says_how_fast(capsys: pytest.CaptureFixture[str]) -> None:
    """M = 4,096 masked tokens, K = 65,536, Db = 256: forward, backward and Sinkhorn."""
    student, teacher = [unit(4096, 256), unit(K, 256, seed=1)], [unit(4096, 256, seed=2)]
    teacher.append(unit(K, 256, seed=3))
    fused, plain = triton_kernels(torch.bfloat16), PlainKernels(torch.bfloat16)

    def textbook() -> None:
        full_logits(student, teacher)

    ms = {
        "triton": median_ms(lambda: one_view(student, teacher, fused)),
        "plain": median_ms(lambda: one_view(student, teacher, plain)),
        "textbook fp32": median_ms(textbook),
    }
    with capsys.disabled():
        print(f"\nloss stage, ms: {json.dumps(ms)}")
    assert ms["triton"] < ms["textbook fp32"]


def test_peak_memory_is_at_most_40_percent_of_the_textbooks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    memory = compare_loss_memory(prototypes=131_072, rows=2_000, bottleneck=256, device="cuda")
    with capsys.disabled():
        print(f"\nloss memory: {memory}")
    assert memory.ours.loss == pytest.approx(memory.textbook.loss, rel=1e-3)
    assert memory.share <= 0.4, memory
