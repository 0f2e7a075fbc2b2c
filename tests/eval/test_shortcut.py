"""APD: croma's reduction, and encoders that see tissue, or the scanner as well."""

import numpy as np
import pytest
import torch

from eosin.eval import shortcut as module
from eosin.eval.shortcut import LEVELS, drop, shortcut

croma = pytest.importorskip("croma")
CPU = torch.device("cpu")


def made_up(scanner: float) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray]:
    generator = np.random.default_rng(0)
    n = 900
    labels, origin = generator.integers(0, 3, n), generator.integers(0, 3, n)
    features = generator.normal(size=(n, 12)) + 1.2 * np.eye(12)[labels]
    features += scanner * np.eye(12)[6 + origin]
    is_test = generator.random(n) < 0.4
    return features.astype(np.float32), labels, [f"s{o}" for o in origin], is_test


def test_the_reduction_is_cromas() -> None:
    scores = np.random.default_rng(1).uniform(0.5, 1, (5, 20))
    assert drop(scores) == pytest.approx(croma.apd(scores), abs=1e-12)


def test_an_encoder_that_shows_the_scanner_loses_and_one_that_does_not_loses_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "REPEATS", 4)
    monkeypatch.setattr(module, "MOST", 60)
    blind, seeing = shortcut(*made_up(0.0), 0, CPU), shortcut(*made_up(4.0), 0, CPU)
    assert blind is not None and seeing is not None
    assert len(blind.accuracies) == len(LEVELS)
    assert abs(blind.apd) < 0.06
    assert seeing.apd < -0.08 and seeing.accuracies[-1] < 0.65 < seeing.accuracies[0]
    again = shortcut(*made_up(4.0), 0, CPU)
    assert again == seeing


def test_classes_that_come_from_one_origin_each_have_no_such_figure() -> None:
    features, labels, _, is_test = made_up(0.0)
    assert shortcut(features, labels, [f"s{c}" for c in labels], is_test, 0, CPU) is None
