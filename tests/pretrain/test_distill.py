"""One step's losses against a naive reference with a loop per crop, gradients included."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from eosin.pretrain.attention import sdpa_attention
from eosin.pretrain.diagnostics import Health, measure_health, rankme
from eosin.pretrain.distill import Distiller, ObjectiveConfig
from eosin.pretrain.heads import HeadConfig
from eosin.pretrain.losses import koleo_loss, sinkhorn_targets
from eosin.pretrain.vit import VitConfig

MODEL = VitConfig(width=32, depth=2, heads=2, patch_px=8, image_px=32, registers=1, layer_scale=0.5)


def make(**changes: object) -> Distiller:
    head = HeadConfig(prototypes=24, hidden=16, bottleneck=8)
    objective = ObjectiveConfig(**{"head": head, **changes})  # type: ignore[arg-type]
    model = Distiller(MODEL, objective, sdpa_attention, seed=0)
    with torch.no_grad():  # a teacher that differs from the student
        for p in model.teacher.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    return model


def inputs(n_local: int = 3) -> tuple[Tensor, Tensor, np.ndarray]:
    g = torch.Generator().manual_seed(2)
    masks = np.zeros((8, 16), dtype=bool)
    masks[1, :4], masks[6, 3:9] = True, True
    return (
        torch.randn(2, 4, 3, 32, 32, generator=g),
        torch.randn(n_local, 4, 3, 16, 16, generator=g),
        masks,
    )


def naive_total(model: Distiller, crops: Tensor, local: Tensor, masks: np.ndarray) -> Tensor:
    """Every crop through the networks alone; every pair in a loop (DINOv2, ssl_meta_arch)."""
    mask = torch.from_numpy(masks).reshape(2, 4, 16)
    student, teacher = model.student, model.teacher
    with torch.no_grad():
        seen = [[teacher.backbone([crops[v, b][None]])[0] for b in range(4)] for v in range(2)]
        cls = torch.cat([t.cls for view in seen for t in view])
        targets = sinkhorn_targets(teacher.head(cls), 0.05).reshape(2, 4, -1)
        hidden = torch.cat([seen[v][b].patches[0][mask[v, b]] for v in range(2) for b in range(4)])
        patch_targets = sinkhorn_targets(teacher.patch_logits(hidden), 0.05)
    out = {}
    for v, b in itertools.product(range(2), range(4)):
        out[v, b] = student.backbone([crops[v, b][None]], [mask[v, b][None]])[0]
    for v, b in itertools.product(range(len(local)), range(4)):
        out[2 + v, b] = student.backbone([local[v, b][None]])[0]

    def ce(logits: Tensor, target: Tensor) -> Tensor:
        return -(target * (logits / 0.1).log_softmax(-1)).sum(-1)

    pairs = [(s, t) for s in range(2 + len(local)) for t in range(2) if s != t]
    dino = sum(
        ce(student.head(out[s, b].cls)[0], targets[t, b]) / 4 for s, t in pairs for b in range(4)
    ) / len(pairs)
    ibot, row = torch.zeros(()), 0
    for v, b in itertools.product(range(2), range(4)):
        count = int(mask[v, b].sum())
        if count:
            logits = student.patch_logits(out[v, b].patches[0][mask[v, b]])
            ibot = ibot + ce(logits, patch_targets[row : row + count]).mean() / 8
            row += count
    spread = sum(koleo_loss(torch.cat([out[v, b].cls for b in range(4)])) for v in range(2))
    o = model.objective
    return o.dino * dino + o.ibot * ibot + o.koleo * spread


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("n_local", [0, 3])
def test_losses_and_gradients_equal_the_naive_reference(separate: bool, n_local: int) -> None:
    model = make(separate_heads=separate)
    crops, local, masks = inputs(n_local)
    losses, _ = model(crops, local, masks, 0.05, None)
    losses.total.backward()
    got = {k: p.grad.clone() for k, p in model.student.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = naive_total(model, crops, local, masks)
    torch.testing.assert_close(losses.total, expected, atol=1e-5, rtol=1e-5)
    expected.backward()
    for name, parameter in model.student.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(got[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_terms_add_up_and_can_be_switched_off() -> None:
    crops, local, masks = inputs()
    for off in ({"dino": 0.0}, {"ibot": 0.0}, {"koleo": 0.0}, {}):
        losses, _ = make(**off)(crops, local, masks, 0.05, None)
        terms = losses.dino_global + losses.dino_local + losses.ibot + losses.koleo
        torch.testing.assert_close(losses.total, terms)
        parts = losses._asdict() | {"dino": losses.dino_local + losses.dino_global}
        assert all(float(parts[name].detach()) == 0.0 for name in off)
    no_masks = np.zeros_like(masks)
    losses, _ = make()(crops, local, no_masks, 0.05, None)
    assert float(losses.ibot.detach()) == 0.0
    with pytest.raises(ValueError, match="nothing to learn"):
        ObjectiveConfig(dino=0.0, ibot=0.0)


def test_no_gradient_reaches_the_teacher_and_it_follows_the_student() -> None:
    model = make()
    losses, _ = model(*inputs(), 0.05, None)
    losses.total.backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    before = [p.clone() for p in model.teacher.parameters()]
    model.update_teacher(0.9)
    for t, old, s in zip(
        model.teacher.parameters(), before, model.student.parameters(), strict=True
    ):
        torch.testing.assert_close(t, 0.9 * old + 0.1 * s)


def test_rankme_counts_the_dimensions_of_a_known_spectrum() -> None:
    basis = torch.linalg.qr(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))[0]
    assert rankme(basis) == pytest.approx(8.0, rel=1e-3)
    assert rankme(torch.ones(64, 8)) == pytest.approx(1.0, abs=1e-3)


def test_health_sees_a_collapse_and_says_so_in_words() -> None:
    model = make()
    crops, local, masks = inputs()
    healthy = measure_health(model(crops, local, masks, 0.05, None)[1])
    assert healthy.alarm(4) is None
    same = crops[:1, :1].expand_as(crops)
    collapsed = measure_health(model(same, local, masks, 0.05, None)[1])
    assert collapsed.feature_std < 0.02 and "collapsed" in str(collapsed.alarm(4))
    few = Health(rankme=8.0, feature_std=1.0, teacher_entropy=1.0, prototypes_used=1, agreement=1.0)
    assert few.alarm(64) == "the teacher uses 1 prototypes for 64 samples"
