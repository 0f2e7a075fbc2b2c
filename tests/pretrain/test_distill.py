"""One step, and three whole steps of training, against the reference that is written with loops."""

import copy
import itertools
import math
import shutil
from typing import Any

import naive
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from eosin.pretrain.attention import sdpa_attention
from eosin.pretrain.distill import Distiller, StepRates
from eosin.pretrain.drop_path import DropPath
from eosin.pretrain.gram import GramConfig
from eosin.pretrain.heads import HeadConfig
from eosin.pretrain.jepa import JepaConfig
from eosin.pretrain.network import Network, ObjectiveConfig
from eosin.pretrain.optim import (
    OptimConfig,
    build_optimizer,
    clip_gradients,
    set_rates,
    step_unless_bad,
)
from eosin.pretrain.positions import Jitter, RopeConfig
from eosin.pretrain.prototype_kernels import PlainKernels
from eosin.pretrain.spread import SpreadConfig
from eosin.pretrain.vit import VitConfig

MODEL = VitConfig(width=32, depth=2, heads=2, patch_px=8, image_px=32, registers=1, layer_scale=0.5)
HEAD = HeadConfig(prototypes=24, hidden=16, bottleneck=8)
V, B, N = 2, 4, 16


def make(model: VitConfig = MODEL, **changes: Any) -> Distiller:
    objective = ObjectiveConfig(**{"head": HEAD, **changes})
    distiller = Distiller(
        model, objective, sdpa_attention, PlainKernels(torch.float32), group_size=2, seed=0
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # no parameter at a value that hides it, and a teacher of its own
        for network, size in ((distiller.student, 0.1), (distiller.teacher, 0.15)):
            for p in network.parameters():
                p += size * torch.randn(p.shape, generator=generator)
    return distiller


def inputs(
    n_local: int = 3, seed: int = 2, batch: int = B
) -> tuple[Tensor, Tensor, NDArray[np.bool_]]:
    g = torch.Generator().manual_seed(seed)
    masks = np.zeros((V * batch, N), dtype=bool)
    masks[1 % len(masks), :4], masks[-2, 3:9] = True, True
    return (
        torch.randn(V, batch, 3, 32, 32, generator=g),
        torch.randn(n_local, batch, 3, 16, 16, generator=g),
        masks,
    )


def naive_losses(
    state: dict[str, Tensor], teacher: dict[str, Tensor], model: VitConfig, batch: Any, t: float
) -> dict[str, Tensor]:
    crops, local, masks = batch
    mask = torch.from_numpy(masks).reshape(V, B, N)
    return naive.step_losses(state, teacher, model, crops.double(), local.double(), mask, t)


def double(network: torch.nn.Module) -> dict[str, Tensor]:
    """Its parameters in fp64, for the reference."""
    return {k: p.detach().double().requires_grad_() for k, p in network.named_parameters()}


def assert_near(got: Tensor | None, expected: Tensor | None, what: str) -> None:
    """Equal to 1e-5, and to 1e-5 of the largest entry where that is above one."""
    assert got is not None and expected is not None, what
    if got.numel():
        scale = max(float(expected.detach().abs().max()), 1.0)
        difference = float((got - expected.float()).detach().abs().max())
        assert difference <= 1e-5 * scale, f"{what}: {difference} with entries up to {scale}"


OBJECTIVES: dict[str, tuple[VitConfig, dict[str, Any]]] = {
    "shared head": (MODEL, {}),
    "separate heads": (MODEL, {"patch_head": HeadConfig(prototypes=20, hidden=12, bottleneck=6)}),
    "plain last layer": (
        MODEL,
        {"head": HeadConfig(prototypes=24, hidden=16, bottleneck=8, last_layer="plain")},
    ),
    "swiglu, offset positions, no registers": (
        VitConfig(
            width=32, depth=2, heads=2, patch_px=8, image_px=32, registers=0, layer_scale=0.5,
            ffn="swiglu", interpolation="offset",
        ),
        {},
    ),
    "rotary positions": (
        VitConfig(
            width=32, depth=2, heads=2, patch_px=8, image_px=32, registers=2, layer_scale=0.5,
            positions="rope",
        ),
        {},
    ),
}  # fmt: skip


@pytest.mark.pitfall(4, 7)
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("n_local", [0, 3])
def test_losses_and_gradients_equal_the_naive_reference(name: str, n_local: int) -> None:
    model, changes = OBJECTIVES[name]
    distiller, batch = make(model, **changes), inputs(n_local)
    losses, _ = distiller(*batch, StepRates(0.05))
    losses.total.backward()
    state = double(distiller.student)
    expected = naive_losses(state, double(distiller.teacher), model, batch, 0.05)
    for term, value in expected.items():
        assert_near(getattr(losses, term), value, term)
    expected["total"].backward()
    for key, parameter in distiller.student.named_parameters():
        assert_near(parameter.grad, state[key].grad, key)


@pytest.mark.pitfall(14, 16)
def test_three_whole_steps_equal_the_naive_reference() -> None:
    """Losses, clipping, AdamW with its groups, the schedules' rates, and the teacher's average."""
    distiller = make()
    config = OptimConfig(clip_norm=0.5, layer_decay=0.8)
    optimizer = build_optimizer(distiller.student, MODEL.depth, config)
    student, teacher = double(distiller.student), double(distiller.teacher)
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    for step in range(3):
        batch, lr, decay, momentum = inputs(seed=step), 0.01 * (step + 1), 0.1, 0.9 + 0.02 * step
        losses, outputs = distiller(*batch, StepRates(0.05 + 0.01 * step))
        optimizer.zero_grad()
        losses.total.backward()
        clip_gradients(distiller.student.children(), config.clip_norm)
        set_rates(optimizer, lr, decay, freeze_last=step == 0)
        step_unless_bad(optimizer, torch.zeros(()))
        distiller.update_teacher(outputs, momentum)

        expected = naive_losses(student, teacher, MODEL, batch, 0.05 + 0.01 * step)
        assert_near(losses.total, expected["total"], f"loss of step {step}")
        for p in student.values():
            p.grad = None
        expected["total"].backward()
        naive.clip(student, config.clip_norm)
        rates = {
            k: lr * naive.learning_rate_factor(k, MODEL.depth, 0.8, 0.2)
            * (0.0 if step == 0 and ".last_" in k else 1.0)
            for k in student
        }  # fmt: skip
        naive.adamw(student, moments, step + 1, rates, decay)
        naive.follow(teacher, student, momentum)
    # Adam divides rounding noise by itself where the true gradient is zero: attention's key biases
    width = MODEL.width
    for ours, theirs in ((distiller.student, student), (distiller.teacher, teacher)):
        for key, parameter in ours.named_parameters():
            got, expected_value = parameter.detach(), theirs[key].detach()
            if key.endswith("attn.qkv.bias"):
                keep = torch.arange(3 * width)
                keep = keep[(keep < width) | (keep >= 2 * width)]
                got, expected_value = got[keep], expected_value[keep]
            # after Adam, an entry with a gradient near zero carries its rounding: 1e-4 of the rate
            difference = float((got - expected_value.float()).abs().max())
            assert difference <= 1e-5, f"{key}: {difference}"
    # and with the key biases the outputs agree
    batch = inputs(seed=9)
    losses, _ = distiller(*batch, StepRates(0.05))
    expected = naive_losses(student, teacher, MODEL, batch, 0.05)
    assert_near(losses.total, expected["total"], "loss after three steps")


SWITCHES = {
    "dino": {"dino": 0.0},
    "ibot": {"ibot": 0.0},
    "jepa": {"jepa": JepaConfig(weight=0.0)},
    "spread": {"spread": SpreadConfig(weight=0.0)},
    "gram": {"gram": GramConfig(weight=0.0)},
}
ALL_ON = {
    "jepa": JepaConfig(weight=0.5, depth=1, width=16, heads=2),
    "spread": SpreadConfig(kind="kde", weight=0.05),
    "gram": GramConfig(weight=2.0),
}


def combinations() -> list[tuple[str, ...]]:
    """Every set of losses that are off and leaves something to learn."""
    names = [c for n in range(5) for c in itertools.combinations(SWITCHES, n)]
    return [off for off in names if not {"dino", "ibot", "jepa"} <= set(off)]


@pytest.mark.pitfall(7, 23)
@pytest.mark.parametrize("off", combinations(), ids=lambda off: "-".join(off) or "all on")
@pytest.mark.parametrize("targets", ["sinkhorn", "centre"])
def test_any_combination_of_losses_runs(off: tuple[str, ...], targets: str) -> None:
    changes = {**ALL_ON, **{k: v for name in off for k, v in SWITCHES[name].items()}}
    distiller = make(targets=targets, **changes)
    losses, outputs = distiller(*inputs(), StepRates(0.05, gram=True))
    losses.total.backward()
    distiller.update_teacher(outputs, 0.9)
    parts = losses._asdict() | {"dino": losses.dino_global}
    for name in SWITCHES:
        assert (float(parts[name].detach()) == 0.0) == (name in off), name
    total = sum(float(value.detach()) for key, value in losses._asdict().items() if key != "total")
    assert math.isclose(float(losses.total.detach()), total, rel_tol=1e-5)
    unused = [k for k, p in distiller.student.named_parameters() if p.grad is None]
    assert unused == [], "every parameter that is built is trained"


def hostile(kind: str) -> tuple[Tensor, Tensor, NDArray[np.bool_]]:
    crops, local, masks = inputs(batch=1 if kind == "one sample" else B)
    if kind == "duplicates":
        crops, local = crops[:1, :1].expand_as(crops), local[:1, :1].expand_as(local)
    if kind == "no mask":
        masks = np.zeros_like(masks)
    if kind == "one patch":
        masks = np.zeros_like(masks)
        masks[0, 0] = True
    return crops, local, masks


@pytest.mark.pitfall(4, 5)
@pytest.mark.parametrize("kind", ["duplicates", "one sample", "no mask", "one patch", "loud"])
@pytest.mark.parametrize("targets", ["sinkhorn", "centre"])
@pytest.mark.parametrize("spread", ["koleo", "kde"])
def test_hostile_batches_stay_finite(kind: str, targets: str, spread: str) -> None:
    distiller = make(targets=targets, **ALL_ON | {"spread": SpreadConfig(kind=spread)})  # type: ignore[arg-type]
    if kind == "loud":  # prototypes of length 10: logits of ±10
        for network in (distiller.student, distiller.teacher):
            network.head.last_gain.data.fill_(10.0)
    losses, outputs = distiller(*hostile(kind), StepRates(0.04, gram=True))
    losses.total.backward()
    distiller.update_teacher(outputs, 0.9)
    assert all(torch.isfinite(value) for value in losses)
    for name, p in [*distiller.student.named_parameters(), *distiller.teacher.named_parameters()]:
        assert torch.isfinite(p).all() and (p.grad is None or torch.isfinite(p.grad).all()), name


def test_centres_follow_the_teachers_logits_and_shift_its_targets() -> None:
    distiller = make(targets="centre")
    batch = inputs()
    with torch.no_grad():
        tokens = distiller.teacher.backbone([batch[0].flatten(0, 1)])[0]
        cls = distiller.teacher.head.logits(tokens.cls)
        masked = distiller.teacher.head.logits(tokens.patches[torch.from_numpy(batch[2])])
    _, outputs = distiller(*batch, StepRates(0.05))
    for targets, logits in ((outputs.cls, cls), (outputs.masked, masked)):
        assert targets is not None
        log_q = logits / 0.05 + targets.scaling.log_u + targets.scaling.log_v[:, None]
        torch.testing.assert_close(log_q.exp(), (logits / 0.05).softmax(-1), atol=1e-5, rtol=1e-4)
    distiller.update_teacher(outputs, 0.9)
    torch.testing.assert_close(distiller.cls_centre, 0.1 * cls.mean(0))
    torch.testing.assert_close(distiller.masked_centre, 0.1 * masked.mean(0))
    before = distiller.masked_centre.clone()
    _, outputs = distiller(batch[0], batch[1], np.zeros_like(batch[2]), StepRates(0.05))
    distiller.update_teacher(outputs, 0.9)
    assert torch.equal(distiller.masked_centre, before), "no masked patch, no news of them"


@pytest.mark.pitfall(16)
def test_no_gradient_reaches_the_teacher_and_it_follows_the_student() -> None:
    distiller = make(jepa=ALL_ON["jepa"])
    losses, outputs = distiller(*inputs(), StepRates(0.05))
    losses.total.backward()
    assert all(p.grad is None for p in distiller.teacher.parameters())
    assert not hasattr(distiller.teacher, "predictor") and not distiller.teacher.training
    before = copy.deepcopy(dict(distiller.teacher.named_parameters()))
    distiller.update_teacher(outputs, 0.9)
    student = dict(distiller.student.named_parameters())
    for name, p in distiller.teacher.named_parameters():
        torch.testing.assert_close(p, 0.9 * before[name] + 0.1 * student[name])


@pytest.mark.pitfall(16, 22)
def test_drop_path_and_jitter_are_the_students_alone() -> None:
    rope = VitConfig(
        width=32, depth=2, heads=2, patch_px=8, image_px=32, registers=2, layer_scale=0.5,
        positions="rope", rope=RopeConfig(rescale=2.0), drop_path=0.5,
    )  # fmt: skip
    distiller = make(rope)
    _, plain = distiller(*inputs(), StepRates(0.05))
    drop = DropPath(0.5, seed=0, step=0, group_size=2)
    losses, noisy = distiller(*inputs(), StepRates(0.05), drop, Jitter(0, 1))
    again, _ = distiller(*inputs(), StepRates(0.05), drop, Jitter(0, 1))
    other, _ = distiller(*inputs(), StepRates(0.05), drop, Jitter(0, 2))
    assert torch.equal(plain.features, noisy.features)
    assert torch.equal(losses.total, again.total) and not torch.equal(losses.total, other.total)


def test_the_gram_teacher_is_refreshed_on_demand() -> None:
    distiller = make(gram=GramConfig(weight=2.0))
    batch, rates = inputs(), StepRates(0.05, gram=True)
    first = distiller(*batch, rates)[0].gram
    distiller.refresh_gram_teacher()
    assert not torch.equal(first, distiller(*batch, rates)[0].gram)
    off, _ = distiller(*batch, StepRates(0.05))
    assert float(off.gram.detach()) == 0.0
    with torch.no_grad():
        distiller.gram_teacher.load_state_dict(distiller.student.backbone.state_dict())
    unmasked = np.zeros_like(batch[2])
    assert float(distiller(batch[0], batch[1], unmasked, rates)[0].gram.detach()) < 1e-9


def compiled_steps(dynamo: Any, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five whole steps of a compiled and an eager distiller; after the third none compiles."""
    real, choice = torch.compile, {"backend": backend}
    with monkeypatch.context() as patched:  # Module.compile asks for it when it is called
        patched.setattr(torch, "compile", lambda f, **kwargs: real(f, **kwargs | choice))
        eager, compiled = make(), make()
        compiled.compile()
    counts, graphs, rng = set(), 0, np.random.default_rng(0)
    for step in range(5):
        crops, local, _ = inputs(seed=step)
        masks = rng.random((V * B, N)) < 0.05 * (step + 2)
        counts.add(int(masks.sum()))
        drop, results = DropPath(0.5, seed=0, step=step, group_size=2), []
        for distiller in (eager, compiled):
            distiller.zero_grad()
            losses, outputs = distiller(crops, local, masks, StepRates(0.05), drop)
            losses.total.backward()
            distiller.update_teacher(outputs, 0.9)
            gradients = {k: p.grad for k, p in distiller.student.named_parameters()}
            results.append(losses._asdict() | gradients | {"features": outputs.features})
        for name, expected in results[0].items():
            assert_near(results[1][name], expected, f"{name} of step {step}")
        found = dynamo.utils.counters["stats"]["unique_graphs"]
        assert step < 3 or found == graphs, f"step {step} compiled again"
        graphs = found
    assert len(counts) == 5, "masked patches vary from step to step"
    # of student and teacher each: the first block, the last, the head; and the spread
    assert graphs == 7, graphs
    assert not dynamo.utils.counters["graph_break"]


# torch's tracer reads .grad of activations, and hides the warning only where warnings are shown
@pytest.mark.pitfall(24)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, inside the compiler
@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(
                    shutil.which("g++") is None, reason="the compiler of torch needs a C++ one"
                ),
            ],
        ),
    ],
)
def test_a_compiled_step_is_the_eager_one_and_compiles_no_more_after_three(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dynamo = pytest.importorskip("torch._dynamo")
    dynamo.reset()
    dynamo.utils.counters.clear()
    try:
        compiled_steps(dynamo, backend, monkeypatch)
    finally:
        dynamo.reset()


def test_health_sees_a_collapse() -> None:
    distiller = make()
    crops, local, masks = inputs()
    for batch, collapsed in (((crops, local, masks), False),
                             ((crops[:1, :1].expand_as(crops), local, masks), True)):  # fmt: skip
        _, outputs = distiller(*batch, StepRates(0.05))
        found = distiller.record_use(7, outputs)
        health = distiller.health(7, outputs, found, 100, 8).read()
        assert (health.feature_std < 0.02) == collapsed
        assert health.prototypes_used >= 1 and health.window_steps == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dino": 0.0, "ibot": 0.0}, "nothing to learn"),
        ({"ibot": -1.0}, "ibot=-1.0"),
        ({"centre_momentum": 2.0}, "centre_momentum=2.0"),
    ],
)
def test_objectives_that_make_no_sense_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ObjectiveConfig(**changes)


def test_only_the_heads_that_are_used_are_built() -> None:
    names = {name for name, _ in Network(MODEL, ObjectiveConfig(head=HEAD)).named_children()}
    assert names == {"backbone", "head"}
    ibot = ObjectiveConfig(head=HEAD, dino=0.0, jepa=JepaConfig(weight=1.0, width=16, heads=2))
    names = {name for name, _ in Network(MODEL, ibot).named_children()}
    assert names == {"backbone", "patch_head", "predictor"}
