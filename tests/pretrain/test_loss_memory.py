"""What the prototype losses hold and how long they take, beside the textbook's full logits."""

import json
import statistics
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eosin.pretrain.loss_memory import (
    StageCost,
    compare_loss_memory,
    main,
    streamed_stage,
    textbook_stage,
)
from eosin.pretrain.prototype_dense import EXPONENT_RANGE
from eosin.pretrain.prototype_kernels import PlainKernels
from eosin.pretrain.prototype_loss import prototype_cross_entropy, sinkhorn_scaling


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


class LargestResult(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned, backward included."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_matrix_of_logits_is_ever_made() -> None:
    M, K, D, chunk = 300, 2048, 8, 2**14
    kernels = PlainKernels(chunk_elements=chunk)
    inputs = [unit(M, D), unit(K, D, seed=1), unit(M, D, seed=2), unit(K, D, seed=3)]
    student = [t.requires_grad_() for t in inputs[:2]]
    with LargestResult() as seen:
        textbook_stage(*inputs).backward()
    assert seen.elements == M * K
    expected = [t.grad for t in student]
    for t in student:
        t.grad = None
    with LargestResult() as seen:
        scaling = sinkhorn_scaling(*inputs[2:], 0.05, kernels)
        x, weight, teacher_x, teacher_weight = inputs
        prototype_cross_entropy(
            x[None], weight, teacher_x[None], teacher_weight, scaling, torch.ones(1, 1),
            torch.full((M,), 1 / M), kernels=kernels,
        ).sum().backward()  # fmt: skip
    assert seen.elements == max(chunk, K * D) and scaling.targets is None
    for ours, reference in zip((t.grad for t in student), expected, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-6, rtol=1e-4)


def test_a_measuring_process_reports_what_the_stage_costs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    costs = []
    for version in ("streamed", "textbook"):
        main([version, "4096", "60", "16", "cpu"])
        costs.append(StageCost(**json.loads(capsys.readouterr().out)))
    assert costs[0].loss == pytest.approx(costs[1].loss, rel=1e-5)
    assert all(cost.seconds > 0 for cost in costs)


@pytest.mark.slow
def test_peak_memory_is_at_most_40_percent_of_the_textbooks() -> None:
    memory = compare_loss_memory(prototypes=131_072, rows=2_000, bottleneck=256)
    assert memory.ours.loss == pytest.approx(memory.textbook.loss, rel=1e-5)
    assert memory.share <= 0.4, memory


@pytest.mark.slow
def test_held_logits_are_no_slower_than_the_textbook() -> None:
    """One thread, interleaved, medians of 5; M = 500, K = 8,192, Db = 256."""
    x, weight = unit(500, 256).requires_grad_(), unit(8192, 256, seed=1).requires_grad_()
    teacher_x, teacher_weight = unit(500, 256, seed=2), unit(8192, 256, seed=3)
    assert float((teacher_x @ teacher_weight.T).aminmax().max) / 0.04 < EXPONENT_RANGE
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {"ours": [], "textbook": []}
    for _ in range(6):
        for name, stage in (("ours", streamed_stage), ("textbook", textbook_stage)):
            start = time.process_time()
            stage(x, weight, teacher_x, teacher_weight).backward()
            times[name].append(time.process_time() - start)
    torch.set_num_threads(threads)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    assert medians["ours"] <= medians["textbook"], medians
