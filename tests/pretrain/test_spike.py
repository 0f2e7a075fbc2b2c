"""Spikes told from noise, and what is passed over."""

import itertools
import random

import pytest

from eosin.pretrain.spike import LossSpikeError, SpikeConfig, SpikeWatch, passed_over

ON = SpikeConfig(threshold=8, least=0.05, window=20, patience=2)


def see(losses: list[float], config: SpikeConfig = ON, every: int = 5) -> LossSpikeError | None:
    watch = SpikeWatch(config, 0)
    for number, loss in enumerate(losses, 1):
        try:
            watch.see(number * every, loss)
        except LossSpikeError as spike:
            return spike
    return None


def test_a_rise_that_stays_is_a_spike_since_the_last_usual_loss() -> None:
    noise = random.Random(0)
    usual = [10 - 0.01 * n + noise.gauss(0, 0.05) for n in range(40)]
    spike = see([*usual, 14.0, 13.5])
    assert spike is not None
    assert (spike.good_steps, spike.steps, spike.loss) == (200, 210, 13.5)
    assert spike.usual == pytest.approx(9.7, abs=0.1)


def test_noise_a_single_high_loss_a_slow_rise_and_a_fall_are_none() -> None:
    noise = random.Random(1)
    usual = [10 + noise.gauss(0, 0.05) for _ in range(400)]
    assert see(usual) is None
    assert see([*usual[:30], 30.0, *usual[30:60], 30.0, *usual[60:90]]) is None
    assert see([10 + 0.02 * n for n in range(400)]) is None
    assert see([10 - 0.02 * n for n in range(400)]) is None


def test_a_flat_loss_makes_no_spike_of_rounding() -> None:
    assert see([10.0] * 40 + [10.4] * 40) is None
    assert see([10.0] * 40 + [10.6] * 2) is not None


def test_few_losses_say_nothing_and_off_is_off() -> None:
    assert see([10.0] * 8 + [100.0] * 2) is None
    assert see([10.0] * 40 + [100.0] * 5, SpikeConfig()) is None


def test_data_is_passed_over_from_its_step_on() -> None:
    skips = ((7, 2), (10, 5))
    data = [step + passed_over(skips, step) for step in range(14)]
    assert data == [0, 1, 2, 3, 4, 5, 6, 9, 10, 11, 17, 18, 19, 20]
    assert all(b > a for a, b in itertools.pairwise(data))


@pytest.mark.parametrize(
    "values", [{"threshold": -1}, {"window": 3}, {"patience": 0}, {"threshold": float("inf")}]
)
def test_values_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        SpikeConfig(**values)  # type: ignore[arg-type]
