"""Health figures of batches whose answers are known; alarms in words, none for a healthy one."""

import math

import pytest
import torch
from torch import Tensor

from eosin.pretrain.diagnostics import (
    RANK_ROWS,
    Health,
    PrototypeUse,
    Window,
    measure_health,
    rankme,
)

NONE = torch.zeros(0)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def health(**changes: float) -> Health:
    """A healthy batch of ViT-S with the given figures instead."""
    figures = {
        "rankme": 120.0, "feature_std": 0.9, "teacher_entropy": 5.0, "prototypes_used": 180.0,
        "prototypes_used_lately": 9_000.0, "agreement": 0.3,
    }  # fmt: skip
    sizes = {"samples": 256, "width": 384, "prototypes": 65_536, "window_steps": 100}
    return Health(**{**figures, **sizes, **changes})  # type: ignore[arg-type]


def test_rankme_counts_the_dimensions_of_a_known_spectrum() -> None:
    basis = torch.linalg.qr(draw(64, 8))[0]
    assert rankme(basis).item() == pytest.approx(8.0, rel=1e-3)
    assert rankme(basis.T.contiguous()).item() == pytest.approx(8.0, rel=1e-3)
    assert rankme(torch.ones(64, 8)).item() == pytest.approx(1.0, abs=1e-3)
    spectrum = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    shares = spectrum[:5] / 16
    expected = math.exp(-float((shares * shares.log()).sum()))
    assert rankme(basis * spectrum).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (1, 16)])
def test_rankme_is_equation_1_by_an_svd(shape: tuple[int, int]) -> None:
    features = draw(*shape) * torch.logspace(0, -3, shape[1])
    values = torch.linalg.svdvals(features.double())
    p = values / values.abs().sum() + 1e-7
    expected = math.exp(-float((p * p.log()).sum()))
    assert rankme(features).item() == pytest.approx(expected, rel=1e-5)


def test_rankme_of_many_rows_takes_some_of_all_and_of_nans_is_none() -> None:
    blocks = torch.eye(16).repeat_interleave(RANK_ROWS // 8, dim=0)  # sorted by direction
    assert len(blocks) == 2 * RANK_ROWS
    assert rankme(blocks).item() == pytest.approx(16.0, rel=1e-3)
    assert math.isnan(rankme(torch.full((4, 3), float("nan"))).item())


def test_figures_of_a_batch_are_those_of_a_loop() -> None:
    features, entropy = draw(12, 5) + 1, draw(12, seed=1).abs()
    teacher = torch.tensor([0, 3, 3, 9, 1, 0, 0, 4, 4, 4, 4, 4])
    student = torch.tensor([0, 3, 2, 9, 1, 1, 1, 4, 4, 4, 0, 0])
    measured = measure_health(features, entropy, teacher, student, 10)
    assert measured.figures.shape == (6,) and measured.figures.dtype == torch.float32
    found = measured.read()
    unit = [row / row.square().sum().sqrt() for row in features.double()]
    columns = torch.stack(unit).T
    spread = sum(float(c.std()) for c in columns) / 5 * math.sqrt(5)
    assert found.feature_std == pytest.approx(spread, rel=1e-5)
    assert found.teacher_entropy == pytest.approx(sum(entropy.tolist()) / 12, rel=1e-5)
    assert found.prototypes_used == found.prototypes_used_lately == len(set(teacher.tolist()))
    assert found.agreement == pytest.approx(
        sum(a == b for a, b in zip(teacher.tolist(), student.tolist(), strict=True)) / 12
    )
    assert (found.samples, found.width, found.prototypes, found.window_steps) == (12, 5, 10, 1)
    assert set(found.values()) == {
        "rankme", "feature_std", "teacher_entropy", "prototypes_used", "prototypes_used_lately",
        "agreement",
    }  # fmt: skip


def test_an_objective_without_prototypes_has_the_figures_of_features_alone() -> None:
    none = NONE.long()
    found = measure_health(draw(32, 16), NONE, none, none, 0).read()
    assert set(found.values()) == {"rankme", "feature_std"}
    assert found.alarms() == []
    one = measure_health(draw(1, 16), torch.ones(1), none.new_ones(1), none.new_ones(1), 4).read()
    assert one.feature_std == 0.0 and one.alarms() == []  # one crop is no collapse


def test_prototype_use_over_a_window_is_that_of_a_set_and_resumes_with_its_state() -> None:
    use, resumed = PrototypeUse(50), PrototypeUse(50)
    generator = torch.Generator().manual_seed(0)
    strongest = torch.randint(0, 50, (30, 4), generator=generator)
    for step, row in enumerate(strongest):
        if step == 20:
            resumed.load_state_dict(use.state_dict())
        use.record(step, row)
        if step >= 20:
            resumed.record(step, row)
        for window in (1, 5, 100):
            first = max(step + 1 - window, 0)
            expected = set(strongest[first : step + 1].flatten().tolist())
            assert int(use.used_since(step + 1 - window)) == len(expected)
    assert torch.equal(use.last_step, resumed.last_step)
    window = Window(use.used_since(25), 5)
    found = measure_health(draw(4, 8), torch.ones(4), strongest[-1], strongest[-1], 50, window)
    assert found.read().prototypes_used_lately == len(set(strongest[25:].flatten().tolist()))
    assert found.read().prototypes_used == len(set(strongest[-1].tolist()))


def test_a_bad_step_leaves_the_use_alone() -> None:
    use = PrototypeUse(8)
    use.record(0, torch.tensor([1, 2]), torch.tensor(0.0))
    before = use.last_step.clone()
    use.record(1, torch.tensor([-1, 5, 99]), torch.tensor(1.0))  # as NaN logits may give them
    assert torch.equal(use.last_step, before) and int(use.used_since(0)) == 2


def test_a_healthy_batch_raises_no_alarm_and_constant_features_do() -> None:
    assert health().alarms() == []
    chosen = torch.arange(64)
    ways = torch.full((64,), 2.0)
    assert measure_health(draw(64, 32), ways, chosen, chosen, 256).read().alarms() == []
    (alarm,) = measure_health(draw(1, 32).expand(64, 32), ways, chosen, chosen, 256).read().alarms()
    assert "the features have collapsed: their spread is 0.000 (1 is healthy)" in alarm


@pytest.mark.parametrize(
    ("changes", "said", "advice"),
    [
        (
            {"prototypes_used_lately": 9.0},
            "the teacher uses 9 of 65,536 prototypes in the last 100 logged steps",
            "momentum",
        ),
        (
            {"prototypes_used_lately": 1.0, "window_steps": 1},
            "the teacher uses 1 of 65,536 prototypes in the last step",
            "optim.lr",
        ),
        ({"feature_std": 0.004}, "the features have collapsed: their spread is 0.004", "optim.lr"),
        ({"rankme": 3.2}, "few dimensions: RankMe is 3.2 of 256", "spread"),
        ({"teacher_entropy": 11.08}, "entropy is 11.08 of 11.09 nats", "temperature"),
    ],
)
def test_alarms_name_the_figure_and_what_to_try(
    changes: dict[str, float], said: str, advice: str
) -> None:
    (alarm,) = health(**changes).alarms()
    assert said in alarm and advice in alarm.split("; try ")[1]


def test_several_things_wrong_are_several_alarms() -> None:
    assert (
        len(health(feature_std=0.0, prototypes_used_lately=1.0, teacher_entropy=11.09).alarms())
        == 3
    )
