"""Targets and losses without the logits, against full matrices in double precision."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eosin.configs.errors import ConfigError
from eosin.pretrain.collectives import LogSumOverRanks
from eosin.pretrain.prototype_kernels import LossKernels, PlainKernels, choose_kernels
from eosin.pretrain.prototype_loss import (
    Scaling,
    centred_scaling,
    mean_logits,
    prototype_cross_entropy,
    sinkhorn_scaling,
    sinkhorn_scalings,
    strongest_prototype,
    target_figures,
)

DENSE = PlainKernels()
STREAMED = PlainKernels(chunk_elements=90)  # a few rows at a time, the last block shorter
KERNELS = pytest.mark.parametrize("kernels", [DENSE, STREAMED], ids=["dense", "streamed"])


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def naive_sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """SwAV's algorithm on exponentials, float64, the global maximum subtracted; [M, K]."""
    x = logits.double()
    q = ((x - x.max()) / temperature).exp().T
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(dim=1, keepdim=True) / q.shape[0]
        q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def targets_of(x: Tensor, weight: Tensor, scaling: Scaling) -> Tensor:
    log_q = x.double() @ weight.double().T / scaling.temperature
    q = (log_q + scaling.log_u.double() + scaling.log_v.double()[:, None]).exp()
    if scaling.targets is not None:
        torch.testing.assert_close(scaling.targets.double(), q, atol=1e-4, rtol=1e-3)
    return q


def naive_loss(
    student: Tensor, weight: Tensor, q: Tensor, mix: Tensor, row_weights: Tensor
) -> Tensor:
    """Every view, pair and sample in a loop; student [S, B, Db], q [V, B, K] → [S]."""
    out = []
    for s in range(len(student)):
        total = torch.zeros((), dtype=torch.float64)
        for v in range(len(q)):
            for b in range(q.shape[1]):
                scaled = weight.double() @ student[s, b].double() / 0.1
                log_p = scaled - scaled.logsumexp(0)
                total = total - row_weights[b].double() * mix[s, v].double() * (q[v, b] @ log_p)
        out.append(total)
    return torch.stack(out)


@pytest.mark.pitfall(2, 3)
@KERNELS
@pytest.mark.parametrize("temperature", [0.04, 0.07, 1.0])
@pytest.mark.parametrize("size", [0.3, 1.0, 10.0])
def test_sinkhorn_equals_the_plain_algorithm(
    kernels: LossKernels, temperature: float, size: float
) -> None:
    """For logits of ±10 too, where exp(logit / τ) itself overflows fp32."""
    x, weight = unit(16, 6), size * unit(40, 6, seed=1)
    x[0], weight[0] = weight[1] / size, weight[1]  # a logit of `size`, twice
    scaling = sinkhorn_scaling(x, weight, temperature, kernels)
    q, expected = targets_of(x, weight, scaling), naive_sinkhorn(x @ weight.T, temperature)
    # fp32 logits of size / τ are off by their last digit, and so are the exponents
    digit = 2**-24 * max(size / temperature, 1.0)
    assert (q - expected).abs().max() < 20 * digit
    torch.testing.assert_close(q.sum(dim=1), torch.ones(16).double(), atol=20 * digit, rtol=0)


@pytest.mark.pitfall(3)
@KERNELS
@pytest.mark.parametrize("offset", [-7.0, 7.0])
def test_sinkhorn_forgets_what_all_logits_share(kernels: LossKernels, offset: float) -> None:
    """All logits near ±7, so exp(logit / 0.05) is out of range, though their spread is not."""
    x, weight = torch.ones(12, 6), 0.05 * torch.randn(30, 6)
    x[:, :5], weight[:, 5] = unit(12, 5), offset
    expected = naive_sinkhorn(x @ weight.T, 0.05)
    q = targets_of(x, weight, sinkhorn_scaling(x, weight, 0.05, kernels))
    assert (q - expected).abs().max() < 1e-4


@KERNELS
def test_the_order_of_the_samples_is_irrelevant(kernels: LossKernels) -> None:
    x, weight, order = unit(20, 6), unit(31, 6, seed=1), torch.randperm(20)
    one = targets_of(x, weight, sinkhorn_scaling(x, weight, 0.05, kernels))
    other = targets_of(x[order], weight, sinkhorn_scaling(x[order], weight, 0.05, kernels))
    torch.testing.assert_close(other, one[order], atol=1e-5, rtol=1e-5)


@KERNELS
def test_centring_is_a_softmax_about_the_centre(kernels: LossKernels) -> None:
    x, weight, centre = unit(9, 6), unit(25, 6, seed=1), torch.randn(25)
    scaling = centred_scaling(x, weight, centre, 0.04, kernels)
    expected = ((x @ weight.T - centre).double() / 0.04).softmax(dim=1)
    torch.testing.assert_close(targets_of(x, weight, scaling), expected, atol=1e-4, rtol=1e-3)
    logits = x @ weight.T
    torch.testing.assert_close(mean_logits(x, weight), logits.mean(dim=0))
    assert torch.equal(mean_logits(x[:0], weight), torch.zeros(25))
    empty = centred_scaling(x[:0], weight, centre, 0.04, kernels)
    assert empty.log_v.shape == (0,) and len(empty.log_u) == 25


class Ranks:
    """As many threads as ranks; the hook of each waits for all, then sums what they brought."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world, timeout=20)
        self.brought: list[Tensor] = [torch.empty(0)] * world
        self.calls = [0] * world

    def hook(self, rank: int) -> LogSumOverRanks:
        def over_ranks(log_sum: Tensor, bound: Tensor | None = None) -> Tensor:
            self.brought[rank] = log_sum
            self.calls[rank] += 1
            self.barrier.wait()
            out = torch.logsumexp(torch.stack(self.brought), dim=0)
            if bound is not None:  # what an exchange relative to it must hold
                assert (out - bound).max() < 80 and (out - bound).min() > -80
            self.barrier.wait()
            return out

        return over_ranks


@KERNELS
def test_two_heads_share_each_exchange_and_get_what_each_gets_alone(kernels: LossKernels) -> None:
    heads = [(unit(17, 6), unit(40, 6, seed=1)), (unit(9, 4, seed=2), 10 * unit(25, 4, seed=3))]
    calls: list[tuple[int, bool]] = []

    def over_ranks(log_sum: Tensor, bound: Tensor | None) -> Tensor:
        calls.append((len(log_sum), bound is not None))
        return log_sum

    both = sinkhorn_scalings(heads, 0.05, kernels, over_ranks=over_ranks)
    assert calls == [(65, False), (65, True), (65, True)]
    for (x, weight), scaling in zip(heads, both, strict=True):
        alone = sinkhorn_scaling(x, weight, 0.05, kernels)
        torch.testing.assert_close(scaling.log_u, alone.log_u)
        torch.testing.assert_close(scaling.log_v, alone.log_v)


@pytest.mark.pitfall(2, 4)
@KERNELS
@pytest.mark.parametrize("size", [1.0, 10.0])
def test_ranks_with_different_row_counts_equal_one_rank(kernels: LossKernels, size: float) -> None:
    """A rank without masked tokens takes part in every exchange."""
    x, weight = unit(17, 6), size * unit(40, 6, seed=1)
    parts = [x[:5], x[5:5], x[5:]]
    ranks, results = Ranks(3), {}

    def work(rank: int) -> None:
        results[rank] = sinkhorn_scaling(
            parts[rank], weight, 0.05, kernels, over_ranks=ranks.hook(rank)
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    q = torch.cat([targets_of(parts[r], weight, results[r]) for r in range(3)])
    assert (q - naive_sinkhorn(x @ weight.T, 0.05)).abs().max() < 20 * 2**-24 * size / 0.05
    assert ranks.calls == [3, 3, 3]
    for rank in (1, 2):
        assert torch.equal(results[rank].log_u, results[0].log_u), "one scaling on every rank"


MIXES = {
    "pairs": torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.25, 0.5]]) / 18,
    "a view alone": torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]),
}


def loss_and_gradients(
    kernels: LossKernels, mix: Tensor, size: float = 1.0
) -> tuple[list[Tensor], list[Tensor]]:
    """Ours and the naive: the losses of the views, the gradients of tokens and prototypes."""
    S, V, B, K, D = 4, 2, 5, 37, 8
    teacher_x, teacher_weight = unit(V, B, D, seed=1), size * unit(K, D, seed=2)
    rows = torch.rand(B, generator=torch.Generator().manual_seed(3))
    upstream = torch.tensor([1.0, -0.5, 2.0, 0.1])
    results = []
    for naive in (False, True):
        x = unit(S, B, D, seed=4).requires_grad_()
        weight = (size * unit(K, D, seed=5)).requires_grad_()
        if naive:
            q = naive_sinkhorn(teacher_x.flatten(0, 1) @ teacher_weight.T, 0.07)
            loss = naive_loss(x, weight, q.unflatten(0, (V, B)), mix, rows)
        else:
            scaling = sinkhorn_scaling(teacher_x.flatten(0, 1), teacher_weight, 0.07, kernels)
            loss = prototype_cross_entropy(
                x, weight, teacher_x, teacher_weight, scaling, mix, rows, kernels=kernels
            )
        (loss * upstream).sum().backward()
        assert x.grad is not None and weight.grad is not None
        results.append([loss.detach().double(), x.grad.double(), weight.grad.double()])
    return results[0], results[1]


@KERNELS
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("size", [1.0, 10.0])
def test_loss_and_gradients_equal_the_loops(kernels: LossKernels, mix: Tensor, size: float) -> None:
    for ours, naive in zip(*loss_and_gradients(kernels, mix, size), strict=True):
        assert (ours - naive).abs().max() < 1e-5 * size * naive.abs().max()


def test_in_double_precision_the_difference_is_rounding() -> None:
    for chunk in (10**6, 90):
        kernels = PlainKernels(torch.float64, chunk)
        for ours, naive in zip(*loss_and_gradients(kernels, MIXES["pairs"]), strict=True):
            # the losses and gradients are handed out in the fp32 of the inputs; logits are not
            assert (ours - naive).abs().max() < 2e-7 * naive.abs().max()


@pytest.mark.parametrize("chunk", [10**6, 90])
def test_bf16_operands_cost_two_digits(chunk: int) -> None:
    """Products and averages of rounded operands: 2⁻⁸ each, sums in fp32."""
    kernels = PlainKernels(torch.bfloat16, chunk)
    ours, naive = loss_and_gradients(kernels, MIXES["pairs"])
    assert (ours[0] - naive[0]).abs().max() < 2e-2 * naive[0].abs().max()
    for a, b in zip(ours[1:], naive[1:], strict=True):
        assert (a - b).norm() < 3e-2 * b.norm()


@pytest.mark.pitfall(7)
@KERNELS
def test_masked_patches_are_the_case_of_one_view(kernels: LossKernels) -> None:
    """iBOT: each masked crop counts alike, over all crops; two of the four carry no mask."""
    x, weight = unit(5, 8), unit(21, 8, seed=1)
    teacher_x, teacher_weight = unit(5, 8, seed=2), unit(21, 8, seed=3)
    rows = torch.tensor([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3]) / 4
    scaling = sinkhorn_scaling(teacher_x, teacher_weight, 0.05, kernels)
    loss = prototype_cross_entropy(
        x[None], weight, teacher_x[None], teacher_weight, scaling, torch.ones(1, 1), rows,
        kernels=kernels,
    )  # fmt: skip
    q = naive_sinkhorn(teacher_x @ teacher_weight.T, 0.05)
    ce = -(q * (x @ weight.T / 0.1).double().log_softmax(dim=1)).sum(dim=1)
    expected = (ce[:2].mean() + ce[2:].mean()) / 4
    torch.testing.assert_close(loss[0].double(), expected, atol=1e-5, rtol=1e-5)


def one_view(
    x: Tensor, weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor, kernels: LossKernels,
    temperature: float = 0.04,
) -> Tensor:  # fmt: skip
    scaling = sinkhorn_scaling(teacher_x, teacher_weight, temperature, kernels)
    return prototype_cross_entropy(
        x[None], weight, teacher_x[None], teacher_weight, scaling, torch.ones(1, 1),
        torch.full((len(x),), 1 / max(len(x), 1)), kernels=kernels,
    )[0]  # fmt: skip


@pytest.mark.pitfall(3, 4)
@KERNELS
def test_finite_on_large_logits_duplicates_one_token_and_none(kernels: LossKernels) -> None:
    large = 10 * torch.eye(8).repeat(5, 1)
    for x in (unit(6, 8).sign(), torch.ones(6, 8), torch.zeros(6, 8), unit(1, 8), unit(0, 8)):
        for weight in (large, torch.ones(23, 8), 10 * unit(33, 8).sign()):
            student_x, student_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
            loss = one_view(student_x, student_weight, x, weight, kernels)
            loss.backward()
            assert torch.isfinite(loss)
            for grad in (student_x.grad, student_weight.grad):
                assert grad is not None and torch.isfinite(grad).all()
            if len(x) == 0:
                assert float(loss.detach()) == 0.0 and not student_weight.grad.any()


@pytest.mark.pitfall(2)
@KERNELS
def test_nothing_of_the_callers_is_written_to_and_backward_can_be_repeated(
    kernels: LossKernels,
) -> None:
    x, weight = unit(7, 8).requires_grad_(), unit(29, 8, seed=1).requires_grad_()
    teacher_x, teacher_weight = unit(7, 8, seed=2), unit(29, 8, seed=3)
    given = [x, weight, teacher_x, teacher_weight, torch.ones(1, 1), torch.rand(7)]
    before = [t.detach().clone() for t in given]
    centred_scaling(teacher_x, teacher_weight, torch.zeros(29), 0.05, kernels)
    scaling = sinkhorn_scaling(teacher_x, teacher_weight, 0.05, kernels)
    found = [t for t in vars(scaling).values() if isinstance(t, Tensor)]
    given, before = given + found, before + [t.clone() for t in found]
    loss = prototype_cross_entropy(
        x[None], weight, teacher_x[None], teacher_weight, scaling, *given[4:6], kernels=kernels
    )[0]
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    target_figures(teacher_x, teacher_weight, scaling, kernels)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@KERNELS
def test_one_gradient_alone_and_autocast_change_nothing(kernels: LossKernels) -> None:
    def gradients(autocast: bool, x_too: bool, weight_too: bool) -> list[Tensor | None]:
        x, weight = unit(7, 8), unit(29, 8, seed=1)
        x.requires_grad_(x_too), weight.requires_grad_(weight_too)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            one_view(x, weight, unit(7, 8, seed=2), unit(29, 8, seed=3), kernels).backward()
        return [x.grad, weight.grad]

    both = gradients(False, True, True)
    for which in ((True, True, True), (False, True, False), (False, False, True)):
        for ours, reference, asked in zip(gradients(*which), both, which[1:], strict=True):
            assert (ours is not None) == asked
            if ours is not None:
                torch.testing.assert_close(ours, reference, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        loss = one_view(unit(7, 8), unit(29, 8), unit(7, 8), unit(29, 8), kernels)
    assert not loss.requires_grad and torch.isfinite(loss)


@KERNELS
def test_figures_equal_those_of_the_full_targets(kernels: LossKernels) -> None:
    x, weight = unit(11, 8), unit(30, 8, seed=1)
    scaling = sinkhorn_scaling(x, weight, 0.05, kernels)
    figures, q = target_figures(x, weight, scaling, kernels), naive_sinkhorn(x @ weight.T, 0.05)
    entropy = -(q * q.log()).sum(dim=1)
    torch.testing.assert_close(figures.entropy.double(), entropy, atol=1e-4, rtol=1e-4)
    assert torch.equal(figures.strongest, q.argmax(dim=1))
    assert torch.equal(strongest_prototype(x, weight, kernels), (x @ weight.T).argmax(dim=1))
    assert len(target_figures(x[:0], weight, sinkhorn_scaling(
        x[:0], weight, 0.05, kernels), kernels).strongest) == 0  # fmt: skip


def test_what_does_not_fit_together_is_refused() -> None:
    x, weight = unit(4, 8), unit(9, 8)
    scaling, one = sinkhorn_scaling(x, weight, 0.05, DENSE), torch.ones(1, 1)

    def call(s: Scaling = scaling, mix: Tensor = one, rows: int = 4, tau: float = 0.1) -> None:
        prototype_cross_entropy(
            x[None], weight, x[None], weight, s, mix, torch.ones(rows),
            kernels=DENSE, student_temperature=tau,
        )  # fmt: skip

    call()
    with pytest.raises(ValueError, match="do not fit"):
        call(mix=torch.ones(1, 2))
    with pytest.raises(ValueError, match="do not fit"):
        call(dataclasses.replace(scaling, log_v=torch.zeros(3)))
    with pytest.raises(ValueError, match="3 row weights for B=4"):
        call(rows=3)
    with pytest.raises(ValueError, match=r"student_temperature=0\.0"):
        call(tau=0.0)
    with pytest.raises(ValueError, match="temperature=0"):
        sinkhorn_scaling(x, weight, 0.0, DENSE)
    with pytest.raises(ValueError, match="iterations=0"):
        sinkhorn_scaling(x, weight, 0.05, DENSE, iterations=0)
    with pytest.raises(ValueError, match="temperature=-1"):
        centred_scaling(x, weight, torch.zeros(9), -1.0, DENSE)


def test_kernels_are_chosen_once_from_name_and_hardware() -> None:
    cpu = torch.device("cpu")
    assert choose_kernels("auto", cpu, torch.bfloat16) == PlainKernels(torch.bfloat16)
    assert choose_kernels("plain", torch.device("cuda"), torch.float32) == PlainKernels()
    assert isinstance(choose_kernels("auto", torch.device("cuda"), torch.float32), PlainKernels)
    with pytest.raises(ConfigError, match="needs CUDA, not cpu"):
        choose_kernels("triton", cpu, torch.bfloat16)
    with pytest.raises(ConfigError, match="fp16"):
        choose_kernels("auto", cpu, torch.float16)
    if importlib.util.find_spec("triton") is None:
        with pytest.raises(ConfigError, match="not installed"):
            choose_kernels("triton", torch.device("cuda"), torch.bfloat16)


def test_triton_kernels_in_the_interpreter_equal_the_plain_ones() -> None:
    """Runs itself again in a process where Triton interprets; fp16 stands for 16 bits there."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed; tests/gpu compares its kernels on a GPU")
    if os.environ.get("TRITON_INTERPRET") != "1":
        name = "test_triton_kernels_in_the_interpreter_equal_the_plain_ones"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, f"{__file__}::{name}"], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
        return
    from eosin.pretrain.prototype_triton import TritonKernels

    for rows, columns, channels in ((37, 70, 24), (150, 9, 40), (1, 5, 16), (5, 1, 8)):
        for dtype, tolerance in ((torch.float32, 3e-6), (torch.float16, 3e-3)):
            plain, fused = PlainKernels(dtype), TritonKernels(dtype, programs=6)
            a, b = unit(rows, channels).to(dtype), unit(columns, channels, seed=1).to(dtype)
            values = unit(columns, channels, seed=2).to(dtype)
            bias, row_bias = 5 * torch.randn(columns), torch.randn(rows)
            results: list[list[Tensor]] = []
            for kernels in (plain, fused):
                out = torch.ones(rows, channels)
                kernels.add_weighted(out, a, b, row_bias, bias - 20, 25.0, values)
                kernels.add_weighted(out, a, b, None, bias - 20, 25.0, values)
                results.append(
                    [
                        kernels.log_sum_exp(a, b, bias, 25.0),
                        kernels.log_sum_exp(a, b, None, 10.0),
                        *kernels.softmax_average(a, b, bias, 25.0, values),
                        *kernels.softmax_average(a, b, None, 10.0, b),
                        out,
                    ]
                )
            for ours, reference in zip(results[1], results[0], strict=True):
                assert (ours - reference).abs().max() <= tolerance * reference.abs().max()
    fused = TritonKernels(torch.float32)
    assert fused.log_sum_exp(a.float(), b[:0].float(), None, 1.0).isneginf().all()
    for ours, naive in zip(*loss_and_gradients(fused, MIXES["pairs"]), strict=True):
        assert (ours - naive).abs().max() < 1e-5 * naive.abs().max()
