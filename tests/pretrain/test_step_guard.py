"""The guard: verdicts on the device, one look at many steps, the file of bad batches, a resume."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from eosin.configs.errors import EosinError
from eosin.pretrain.ema import update_teacher
from eosin.pretrain.optim import clip_gradients, step_unless_bad
from eosin.pretrain.step_guard import Look, StepGuard

NAN, INF = float("nan"), float("inf")
GOOD = ((3.0, 2.0, 1.0), (0.5, 0.25))
"""Total, dino, ibot; the gradient norms of backbone and head."""


def make(folder: Path, first_step: int = 0, count: int = 0) -> StepGuard:
    return StepGuard(
        folder / "bad_steps.jsonl",
        limit=3,
        count=count,
        first_step=first_step,
        terms=("total", "dino", "ibot"),
        modules=("backbone", "head"),
    )


def judge(guard: StepGuard, step: int, figures: tuple[tuple[float, ...], ...] = GOOD) -> Tensor:
    terms, norms = figures
    return guard.judge(step, torch.tensor([step, 7]), torch.tensor(terms), torch.tensor(norms))


def bad(ibot: float = NAN) -> tuple[tuple[float, ...], ...]:
    return ((NAN, 2.0, ibot), (NAN, NAN))


def lines(folder: Path) -> list[dict[str, object]]:
    text = (folder / "bad_steps.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.pitfall(21)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("place", range(5))
def test_any_figure_that_is_not_finite_makes_a_step_bad(
    tmp_path: Path, value: float, place: int
) -> None:
    guard = make(tmp_path)
    figures = [*GOOD[0], *GOOD[1]]
    assert judge(guard, 0).item() == 0.0
    figures[place] = value
    verdict = judge(guard, 1, (tuple(figures[:3]), tuple(figures[3:])))
    assert verdict.item() == 1.0 and verdict.dtype == torch.float32 and verdict.shape == ()
    assert guard.look().bad_steps == (1,)


@pytest.mark.pitfall(21)
def test_bad_steps_are_counted_written_down_once_and_left_out_of_the_values(tmp_path: Path) -> None:
    guard = make(tmp_path, count=5)
    assert guard.look() == Look()
    for step in range(4):
        judge(guard, step, bad() if step == 1 else GOOD)
    assert not (tmp_path / "bad_steps.jsonl").exists()  # nothing is known before a look
    look = guard.look()
    assert look.bad_steps == (1,) and look.step == 3 and guard.count == 6
    assert look.values == {
        "total": 3.0, "dino": 2.0, "ibot": 1.0, "grad_norm_backbone": 0.5, "grad_norm_head": 0.25,
    }  # fmt: skip
    assert guard.look() == Look() and guard.count == 6
    judge(guard, 4, bad())
    assert guard.look() == Look((4,), 4, {})
    broken = ["total", "ibot", "grad_norm_backbone", "grad_norm_head"]
    assert lines(tmp_path) == [
        {"step": 1, "rows": [1, 7], "not_finite": broken},
        {"step": 4, "rows": [4, 7], "not_finite": broken},
    ]


def test_a_storm_stops_the_run_across_looks_and_says_what_broke_first(tmp_path: Path) -> None:
    guard = make(tmp_path)
    judge(guard, 0, bad())
    judge(guard, 1, bad())
    judge(guard, 2)  # a good one between: the row starts again
    judge(guard, 3, bad(INF))
    guard.look()
    judge(guard, 4, ((NAN, NAN, NAN), (NAN, NAN)))
    guard.look()
    judge(guard, 5, bad())
    words = (
        r"3 steps in a row gave a NaN or Inf, up to step 5; at step 3 the loss term ibot was not "
        r"finite, 1 in the good step before \(grad_norm_backbone 0\.5, grad_norm_head 0\.25\)\. "
        r"The weights are those before them\. Give a lower optim\.lr"
    )
    with pytest.raises(EosinError, match=words):
        guard.look()
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 3, 4, 5]


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        (((3.0, 2.0, 1.0), (INF, 0.25)), "the losses were finite and grad_norm_backbone was not"),
        (((INF, 2.0, 1.0), (0.5, 0.25)), "the loss term total was not finite"),
        (((NAN, NAN, NAN), (NAN, NAN)), "the loss term dino, ibot was not finite"),
    ],
)
def test_the_diagnosis_names_the_figure(
    tmp_path: Path, figures: tuple[tuple[float, ...], ...], words: str
) -> None:
    guard = make(tmp_path)
    for step in range(3):
        judge(guard, step, figures)
    with pytest.raises(EosinError, match=f"at step 0 {words}"):
        guard.look()


def test_a_resume_drops_what_comes_again_and_keeps_counting_the_row(tmp_path: Path) -> None:
    guard = make(tmp_path)
    for step in range(6):
        judge(guard, step, bad() if step in (1, 3, 4) else GOOD)
        guard.look()
    with (tmp_path / "bad_steps.jsonl").open("a") as file:
        file.write('{"step": 5, "rows": [1,')  # the writer was killed
    again = make(tmp_path, first_step=4, count=2)  # the checkpoint was made after step 3
    assert [line["step"] for line in lines(tmp_path)] == [1, 3]
    judge(again, 4, bad())
    again.look()
    assert [line["step"] for line in lines(tmp_path)] == [1, 3, 4] and again.count == 3
    judge(again, 5, bad())
    with pytest.raises(EosinError, match="3 steps in a row gave a NaN or Inf, up to step 5"):
        again.look()  # step 3 belongs to the row


def test_a_step_that_is_bad_on_another_rank_is_left_out_here_too(tmp_path: Path) -> None:
    guard = make(tmp_path)
    guard._over_ranks = lambda verdict: verdict + 2
    for step in range(3):
        assert judge(guard, step).item() == 1.0  # what the fused kernels compare with
    with pytest.raises(EosinError, match="every figure was finite here, so another rank's was not"):
        guard.look()


def test_figures_must_have_names_and_the_limit_a_size(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4 figures for the 5"):
        judge(make(tmp_path), 0, ((1.0, 1.0, 1.0), (1.0,)))
    with pytest.raises(ValueError, match="limit=0 must be at least 1"):
        StepGuard(tmp_path / "x", limit=0, count=0, first_step=0, terms=(), modules=())


def run(
    folder: Path, poisoned: int | None, left_out: int | None = None
) -> tuple[nn.Module, nn.Module]:
    """Six steps of a small network with a step whose input is NaN, or with one left out."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.05, fused=True)
    folder.mkdir()
    guard = StepGuard(
        folder / "bad_steps.jsonl", limit=3, count=0, first_step=0, terms=("total",),
        modules=("0", "1"),
    )  # fmt: skip
    for step in range(6):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        if step == left_out:
            continue
        loss = (student(x * (NAN if step == poisoned else 1.0)) - teacher(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norms = clip_gradients(student.children(), 1.0)
        verdict = guard.judge(step, torch.arange(5), loss.detach()[None], norms)
        step_unless_bad(optimizer, verdict)
        update_teacher(teacher, student, 0.9, verdict)
    assert guard.look().bad_steps == (() if poisoned is None else (poisoned,))
    return student, teacher


@pytest.mark.pitfall(21)
def test_a_run_with_a_bad_step_is_the_run_without_it(tmp_path: Path) -> None:
    ours, expected = run(tmp_path / "a", poisoned=2), run(tmp_path / "b", None, left_out=2)
    for network, other in zip(ours, expected, strict=True):
        for p, q in zip(network.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)
    untouched = run(tmp_path / "c", None)
    assert not torch.equal(next(ours[0].parameters()), next(untouched[0].parameters()))
