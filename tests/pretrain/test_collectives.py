"""Two gloo processes against one process that holds everything.

Run as a script, this file is one of the two processes.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from eosin.pretrain.attention import sdpa_attention
from eosin.pretrain.collectives import (
    LogSumOverRanks,
    gather_rows,
    lse_over_ranks,
    max_over_ranks,
    mean_over_ranks,
    sum_over_ranks,
)
from eosin.pretrain.distill import Distiller, StepRates
from eosin.pretrain.heads import HeadConfig
from eosin.pretrain.jepa import JepaConfig
from eosin.pretrain.network import ObjectiveConfig
from eosin.pretrain.prototype_kernels import PlainKernels
from eosin.pretrain.prototype_loss import sinkhorn_scaling
from eosin.pretrain.spread import SpreadConfig, spread_loss
from eosin.pretrain.vit import VitConfig

SPREADS = {
    "koleo": SpreadConfig(kind="koleo"),
    "kde": SpreadConfig(kind="kde", include_self=True),
    "kde_others": SpreadConfig(kind="kde"),
    "kde_log_of_mean": SpreadConfig(kind="kde", reduction="log_of_mean"),
    "koleo_group": SpreadConfig(kind="koleo", over="group"),
}
SHARES = {"uneven": (3, 6), "one_empty": (0, 9), "all_empty": (0, 0)}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sinkhorn(x: Tensor, over_ranks: LogSumOverRanks) -> Tensor:
    """The product's targets for logits of x with 7 prototypes, [rows of x, 7]."""
    weight = 2 * normal(7, 5, seed=4)
    scaling = sinkhorn_scaling(x, weight, 0.2, PlainKernels(), over_ranks=over_ranks)
    return (x @ weight.T / 0.2 + scaling.log_u + scaling.log_v[:, None]).exp()


def model() -> torch.nn.Linear:
    linear = torch.nn.Linear(5, 4)
    with torch.no_grad():
        linear.weight.copy_(normal(4, 5, seed=1))
        linear.bias.zero_()
    return linear


def weighted(rows: Tensor) -> Tensor:
    """A loss that tells the rows of the whole batch apart."""
    return (rows.square() * torch.arange(len(rows))[:, None]).sum()


DISTILLED = {
    "koleo": ObjectiveConfig(head=HeadConfig(prototypes=12, hidden=8, bottleneck=4)),
    "kde_centre": ObjectiveConfig(
        head=HeadConfig(prototypes=12, hidden=8, bottleneck=4), targets="centre",
        spread=SpreadConfig(kind="kde"), jepa=JepaConfig(weight=1.0, depth=1, width=8, heads=1),
    ),
}  # fmt: skip


def distilled(
    name: str, samples: slice, ranks: dist.ProcessGroup | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The product's loss for some of four samples; gradients, and the centres after the step."""
    vit = VitConfig(
        width=16, depth=1, heads=2, patch_px=8, image_px=16, registers=1, layer_scale=0.5
    )
    kernels = PlainKernels(torch.float32)
    distiller = Distiller(vit, DISTILLED[name], sdpa_attention, kernels, 2, 0, ranks)
    with torch.no_grad():
        for number, p in enumerate(distiller.parameters()):
            p += 0.1 * normal(*p.shape, seed=number)
    masks = normal(2, 4, 4, seed=5).numpy() > 0.8  # more on one rank than on the other
    crops, local = normal(2, 4, 3, 16, 16, seed=6), normal(3, 4, 3, 8, 8, seed=7)
    mine = masks[:, samples].reshape(-1, 4)
    losses, outputs = distiller(crops[:, samples], local[:, samples], mine, StepRates(0.1))
    losses.total.backward()
    distiller.update_teacher(outputs, 0.9)
    found = {k: p.grad for k, p in distiller.student.named_parameters() if p.grad is not None}
    found |= {k: b for k, b in distiller.named_buffers() if k.endswith("_centre")}
    return torch.stack([v.detach() for v in losses]), found


def worker(rank: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    group = dist.new_group([0, 1])
    assert isinstance(group, dist.ProcessGroup)
    results: dict[str, Tensor] = {}
    for name, counts in SHARES.items():
        x = normal(9, 5, seed=2).split([*counts, 9 - sum(counts)])[rank]
        results[f"sinkhorn_{name}"] = sinkhorn(x, lse_over_ranks(group))
    extreme = torch.tensor([[1e4, -1e4, -torch.inf], [0.0, -1e4, -torch.inf]])[rank]
    results["lse"] = lse_over_ranks(group)(extreme)
    above = torch.tensor([1e4 + 3, -1e4 + 2, 0.0])
    results["lse_bounded"] = lse_over_ranks(group)(extreme, above)
    results["max"] = max_over_ranks(group)(torch.tensor([rank, -rank], dtype=torch.int32))
    results["sum"] = sum_over_ranks(group)(extreme[:2])
    results["mean"] = mean_over_ranks(group)(extreme[:2])
    mine = normal(8, 5, seed=3).chunk(2)[rank]
    results["gathered"] = gather_rows(group)(mine)
    average = mean_over_ranks(group)  # of gradients, as DDP does
    for name, config in SPREADS.items():
        linear = model()
        loss = spread_loss(linear(mine), config, 2, gather_rows(group), rank)
        loss.backward()
        results[f"loss_{name}"] = average(loss.detach())
        results[f"grad_{name}"] = average(linear.weight.grad)
    linear = model()
    weighted(gather_rows(group)(linear(mine))).backward()
    results["grad_weighted"] = average(linear.weight.grad)
    for name in DISTILLED:
        losses, found = distilled(name, slice(2 * rank, 2 * rank + 2), group)
        results[f"losses_{name}"] = average(losses)
        results |= {f"{name}/{key}": average(value) for key, value in found.items()}
    save_file({k: v.contiguous() for k, v in results.items()}, out)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("ranks")
    outs = [folder / f"{rank}.safetensors" for rank in range(2)]
    command = [sys.executable, __file__]
    runs = [
        subprocess.Popen(
            [*command, str(rank), str(folder / "store"), str(out)], stderr=subprocess.PIPE
        )
        for rank, out in enumerate(outs)
    ]
    try:
        for run in runs:
            _, errors = run.communicate(timeout=120)  # a deadlock ends here
            assert run.returncode == 0, errors.decode()
    finally:
        for run in runs:
            run.kill()
    return [load_file(out) for out in outs]


@pytest.mark.pitfall(2, 4, 19)
@pytest.mark.parametrize("share", SHARES)
def test_sinkhorn_of_ranks_is_that_of_the_concatenated_rows(
    ranks: list[dict[str, Tensor]], share: str
) -> None:
    parts = [r[f"sinkhorn_{share}"] for r in ranks]
    assert tuple(map(len, parts)) == SHARES[share]
    expected = sinkhorn(normal(9, 5, seed=2)[: sum(SHARES[share])], lse_over_ranks(None))
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-4, atol=1e-6)


def test_log_sums_sums_and_means_over_ranks(ranks: list[dict[str, Tensor]]) -> None:
    expected = torch.tensor([1e4, -1e4 + torch.log(torch.tensor(2.0)), -torch.inf])
    for rank in ranks:
        torch.testing.assert_close(rank["lse"], expected)
        torch.testing.assert_close(rank["lse_bounded"], expected)
        assert rank["max"].tolist() == [1, 0]
        assert rank["sum"].tolist() == [1e4, -2e4] and rank["mean"].tolist() == [5e3, -1e4]
        assert torch.equal(rank["gathered"], normal(8, 5, seed=3))


@pytest.mark.pitfall(5, 19)
@pytest.mark.parametrize("name", [*SPREADS, "weighted"])
def test_averaged_gradients_are_those_of_the_concatenated_batch(
    ranks: list[dict[str, Tensor]], name: str
) -> None:
    linear = model()
    rows = linear(normal(8, 5, seed=3))
    loss = weighted(rows) if name == "weighted" else spread_loss(rows, SPREADS[name], 2)
    loss.backward()
    assert linear.weight.grad is not None and linear.weight.grad.abs().max() > 1e-3
    for rank in ranks:
        torch.testing.assert_close(rank[f"grad_{name}"], linear.weight.grad, rtol=1e-4, atol=1e-6)
        if name != "weighted":
            torch.testing.assert_close(rank[f"loss_{name}"], loss.detach())


@pytest.mark.pitfall(2, 5, 19)
@pytest.mark.parametrize("name", DISTILLED)
def test_a_step_of_two_ranks_is_that_of_one_with_the_whole_batch(
    ranks: list[dict[str, Tensor]], name: str
) -> None:
    losses, found = distilled(name, slice(0, 4), None)
    for rank in ranks:
        torch.testing.assert_close(rank[f"losses_{name}"], losses, rtol=1e-5, atol=1e-6)
        for key, value in found.items():
            torch.testing.assert_close(rank[f"{name}/{key}"], value, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.pitfall(2)
def test_without_a_group_nothing_is_asked_of_a_process_group() -> None:
    assert not dist.is_initialized()
    x = normal(3, 2, seed=0)
    for make in (sum_over_ranks, max_over_ranks, mean_over_ranks, lse_over_ranks, gather_rows):
        assert make(None)(x) is x


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(int(sys.argv[1]), sys.argv[2], str(Path(sys.argv[3])))
