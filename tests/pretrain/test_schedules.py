"""Schedules against arrays written with numpy, and against DINOv2's own convention."""

import numpy as np
import pytest

from eosin.pretrain.schedules import Schedule

TOTAL = 200


def values(schedule: Schedule, steps: int = TOTAL) -> list[float]:
    return [schedule.at(step, TOTAL) for step in range(steps)]


def cosine(high: float, low: float, steps: int) -> np.ndarray:
    return low + (high - low) * (1 + np.cos(np.pi * np.arange(steps) / steps)) / 2


GOLDEN = {
    "learning rate": (
        Schedule(start=0.0, peak=4e-3, end=1e-6, warmup=0.1),
        np.concatenate([np.linspace(0, 4e-3, 20, endpoint=False), cosine(4e-3, 1e-6, 180)]),
    ),
    "weight decay": (Schedule(start=0.04, peak=0.04, end=0.4), cosine(0.04, 0.4, TOTAL)),
    "momentum": (Schedule(start=0.992, peak=0.992, end=1.0), cosine(0.992, 1.0, TOTAL)),
    "temperature": (
        Schedule(start=0.04, peak=0.07, end=0.07, warmup=0.3, shape="constant"),
        np.concatenate([np.linspace(0.04, 0.07, 60, endpoint=False), np.full(140, 0.07)]),
    ),
    "line": (
        Schedule(start=0.0, peak=1.0, end=0.2, warmup=0.25, shape="linear"),
        np.concatenate(
            [np.linspace(0, 1, 50, endpoint=False), np.linspace(1, 0.2, 150, endpoint=False)]
        ),
    ),
}


@pytest.mark.pitfall(15)
@pytest.mark.parametrize("name", GOLDEN)
def test_schedule_equals_its_golden_array(name: str) -> None:
    schedule, golden = GOLDEN[name]
    assert len(golden) == TOTAL
    np.testing.assert_allclose(values(schedule), golden, rtol=1e-12, atol=1e-15)


@pytest.mark.pitfall(15)
def test_the_peak_is_reached_one_step_after_dinov2s_and_the_rest_is_the_same() -> None:
    ours = values(Schedule(start=0.0, peak=1.0, end=0.1, warmup=0.1))
    theirs = np.concatenate([np.linspace(0, 1.0, 20), cosine(1.0, 0.1, 180)])  # peak included
    assert theirs[19] == theirs[20] == ours[20] == 1.0
    assert ours[19] == pytest.approx(0.95)
    np.testing.assert_allclose(ours[20:], theirs[20:], rtol=1e-12)
    np.testing.assert_allclose(ours[:20], theirs[:20] * 19 / 20, rtol=1e-12)


@pytest.mark.pitfall(15)
def test_the_end_comes_one_step_after_the_last_and_stays() -> None:
    schedule = Schedule(peak=1.0, end=0.1)
    assert 0.1 < schedule.at(TOTAL - 1, TOTAL) < 0.1 + 1e-3
    assert schedule.at(TOTAL, TOTAL) == schedule.at(10 * TOTAL, TOTAL) == pytest.approx(0.1)
    constant = Schedule(peak=1.0, end=0.1, shape="constant")
    assert constant.at(10 * TOTAL, TOTAL) == 1.0


@pytest.mark.parametrize(("share", "first_peak"), [(0.0, 0), (0.3, 3), (1.0, 10)])
def test_warmup_of_no_step_and_of_all_steps(share: float, first_peak: int) -> None:
    schedule = Schedule(start=0.5, peak=1.0, end=1.0, warmup=share)
    below = [schedule.at(step, 10) < 1.0 for step in range(11)]
    assert below == [step < first_peak for step in range(11)]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"warmup": 10}, "warmup=10 is a share"),
        ({"warmup": -0.1}, "warmup=-0.1 is a share"),
        ({"end": float("nan")}, "end=nan must be a finite number"),
    ],
)
def test_what_is_no_schedule_is_refused(values: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Schedule(**{"peak": 1.0, "end": 0.0, **values})
