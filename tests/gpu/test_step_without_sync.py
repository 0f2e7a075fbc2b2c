"""On a GPU: a step is judged, taken or left out, and followed without a wait for the device."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from eosin.configs.load import load_config
from eosin.launch.bench_sides import FastStep
from eosin.launch.stopwatch import NoWatch
from eosin.pretrain.batch import Batch, Crops
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.diagnostics import PrototypeUse, Window, measure_health, rankme
from eosin.pretrain.ema import update_teacher
from eosin.pretrain.optim import clip_gradients, step_unless_bad
from eosin.pretrain.step_guard import StepGuard

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
    # of torch's compiler, which hides it only where warnings are shown
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SIZES = [(2, 224), (8, 98)]  # (views, side in pixels)
WIDTH, BATCH, PROTOTYPES = 33, 16, 100  # odd: not every tensor is aligned for wide loads


class Run:
    """A small network with everything that a step touches."""

    def __init__(self, path: Path) -> None:
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(WIDTH, 65), nn.Linear(65, PROTOTYPES)).cuda()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=0.01, fused=True)
        self.use = PrototypeUse(PROTOTYPES).cuda()
        self.guard = StepGuard(
            path, limit=3, count=0, first_step=0, terms=("total",), modules=("0", "1")
        )

    def step(self, number: int, x: Tensor, momentum: float = 0.9) -> None:
        loss = (self.student(x) - self.teacher(x) - 1).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        norms = clip_gradients(self.student.children(), 0.5)
        bad = self.guard.judge(number, torch.arange(BATCH), loss.detach()[None], norms)
        step_unless_bad(self.optimizer, bad)
        update_teacher(self.teacher, self.student, momentum, bad)
        self.use.record(number, self.teacher(x).argmax(dim=1), bad)

    def tensors(self) -> list[Tensor]:
        moments = [t.clone() for s in self.optimizer.state.values() for t in s.values()]
        weights = [*self.student.parameters(), *self.teacher.parameters(), self.use.last_step]
        return moments + [t.detach().clone() for t in weights]


def test_good_and_bad_steps_wait_for_nothing_and_a_bad_one_changes_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path / "bad_steps.jsonl")
    inputs = [torch.randn(BATCH, WIDTH, device="cuda") for _ in range(4)]
    poisoned = inputs[3].clone()
    poisoned[0, 0] = float("nan")
    run.step(0, inputs[0])  # moments and handles are made
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.step(1, inputs[1])
        before = run.tensors()
        run.step(2, poisoned)
        after = run.tensors()
        run.step(3, inputs[2])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(after, run.tensors(), strict=True))
    look = run.guard.look()
    assert look.bad_steps == (2,) and run.guard.count == 1 and look.values["total"] > 0


def test_the_average_is_the_cpus(tmp_path: Path) -> None:
    run = Run(tmp_path / "bad_steps.jsonl")
    with torch.no_grad():
        for parameter in run.student.parameters():
            parameter.normal_()
    teacher, student = (copy.deepcopy(m).cpu() for m in (run.teacher, run.student))
    for momentum in (0.9, 0.996, 0.0, 1.0):
        update_teacher(run.teacher, run.student, momentum)
        update_teacher(teacher, student, momentum)
        for p, q in zip(run.teacher.parameters(), teacher.parameters(), strict=True):
            torch.testing.assert_close(p.cpu(), q, rtol=1e-6, atol=1e-6)


def test_health_is_the_cpus() -> None:
    features, entropy = torch.randn(64, 48), torch.rand(64)
    strongest = torch.randint(0, PROTOTYPES, (2, 64))
    both = []
    for device in ("cpu", "cuda"):
        use = PrototypeUse(PROTOTYPES).to(device)
        use.record(0, strongest[1].to(device))
        use.record(1, strongest[0].to(device))
        measured = measure_health(
            features.to(device),
            entropy.to(device),
            strongest[0].to(device),
            strongest[1].to(device),
            PROTOTYPES,
            Window(use.used_since(0), 2),
        )
        assert measured.figures.device.type == device
        both.append(measured.figures.cpu())
    torch.testing.assert_close(both[0], both[1], rtol=1e-4, atol=1e-4)
    assert rankme(torch.full((4, 3), float("nan"), device="cuda")).isnan()


LEAN = ["model.drop_path=0.25", "compile=blocks"]
EVERY_TERM = [
    "objective.jepa.weight=1", "objective.gram.weight=1", "objective.targets=centre",
    "objective.spread.kind=kde", "model.positions=rope", "compile=none",
]  # fmt: skip


@pytest.mark.parametrize("options", [LEAN, EVERY_TERM], ids=["lean", "every term"])
def test_a_whole_step_waits_for_nothing(options: list[str], tmp_path: Path) -> None:
    """Upload, both networks, all losses, the optimiser, the averages and the use of prototypes."""
    sizes = [
        "model.width=128", "model.heads=2", "model.depth=3", "objective.head.prototypes=4096",
        "batch_size=8", "group_size=4", "log_every=1000", "device=cuda",
    ]  # fmt: skip
    paths = [f"shards={tmp_path}", f"out={tmp_path}"]
    config = load_config(PretrainConfig, [], [*paths, *sizes, *options])
    torch._dynamo.reset()
    fast = FastStep(config, torch.device("cuda", 0), torch.bfloat16, tmp_path)
    crops = Crops(*(torch.randint(256, (n, 8, px, px, 3), dtype=torch.uint8) for n, px in SIZES))
    masks_of = config.batch_plan.masks_of
    batches = [Batch(step, crops, masks_of(step), torch.arange(8), {}) for step in range(6)]
    for batch in batches[:4]:  # kernels are made, and memory is held
        fast.take(batch, NoWatch())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        totals = [fast.take(batch, NoWatch()) for batch in batches[4:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch._dynamo.reset()
    assert torch.stack(totals).isfinite().all()
