"""Label-free figures on spectra that are known, and the leak of slides where it was put in."""

import numpy as np
import pytest
import torch

from eosin.eval.label_free import alpha, label_free, lidar
from eosin.eval.leakage import enrichment, explained, leakage

CPU = torch.device("cpu")


def with_spectrum(singular: np.ndarray, n: int = 400, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    left = np.linalg.qr(generator.normal(size=(n, len(singular))))[0]
    right = np.linalg.qr(generator.normal(size=(len(singular), len(singular))))[0]
    return np.asarray((left * singular) @ right)


@pytest.mark.parametrize("rank", [1, 7, 40])
def test_rankme_of_equal_singular_values_is_their_number(rank: int) -> None:
    singular = np.zeros(64)
    singular[:rank] = 3.0
    assert label_free(with_spectrum(singular)).rankme == pytest.approx(rank, rel=1e-3)


def test_rankme_is_of_singular_values_and_not_of_their_squares() -> None:
    singular = np.array([4.0, 2.0, 1.0, 1.0])
    shares = singular / 8
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert label_free(with_spectrum(singular)).rankme == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_alpha_is_the_exponent_of_a_power_law(exponent: float) -> None:
    singular = np.arange(1, 257) ** (-exponent / 2)
    x = with_spectrum(singular, n=4000)
    x -= x.mean(axis=0)
    assert alpha(x) == pytest.approx(exponent, abs=0.03)
    assert alpha(with_spectrum(np.ones(8))) is None


def test_mean_cosine_and_uniformity_are_those_of_a_loop_over_pairs() -> None:
    features = np.random.default_rng(1).normal(size=(60, 5)).astype(np.float32) + 1
    found = label_free(features)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    pairs = [(i, j) for i in range(60) for j in range(60) if i != j]
    cosines = np.mean([unit[i] @ unit[j] for i, j in pairs])
    spread = np.log(np.mean([np.exp(-2 * ((unit[i] - unit[j]) ** 2).sum()) for i, j in pairs]))
    assert found.mean_cosine == pytest.approx(cosines, abs=1e-5)
    assert found.uniformity == pytest.approx(spread, abs=1e-5)
    assert not found.collapsed


def test_the_alarm_is_raised_by_one_direction_and_by_tiles_that_all_look_alike() -> None:
    generator = np.random.default_rng(2)
    line = (generator.normal(size=(100, 1)) * np.ones((1, 30))).astype(np.float32)
    assert label_free(line).collapsed and label_free(line).rankme < 1.01
    alike = (generator.normal(size=(100, 30)) + 40).astype(np.float32)
    assert label_free(alike).collapsed and label_free(alike).mean_cosine > 0.99


def test_lidar_counts_directions_that_tell_tiles_apart_and_not_those_of_views() -> None:
    generator = np.random.default_rng(3)
    tiles = np.zeros((1000, 1, 12))
    tiles[..., :4] = generator.normal(size=(1000, 1, 4))
    views = tiles + 0.1 * generator.normal(size=(1000, 10, 12))
    views[..., 8:] += 5 * generator.normal(size=(1000, 10, 4))
    assert lidar(views) == pytest.approx(4, rel=0.1)
    # what tells nothing apart has the rank of its noise
    assert lidar(generator.normal(size=(2000, 10, 12))) > 10


def leaky(strength: float) -> tuple[np.ndarray, list[str]]:
    generator = np.random.default_rng(4)
    slides = np.repeat(np.arange(12), 25)
    own = generator.normal(size=(12, 16))
    features = generator.normal(size=(300, 16)) + strength * own[slides]
    return features.astype(np.float32), [f"slide{s}" for s in slides]


def test_a_leak_of_the_slide_is_seen_where_it_was_put_in_and_nowhere_else() -> None:
    none, groups = leaky(0.0)
    much, _ = leaky(1.5)
    clean, dirty = leakage(none, groups, 0, CPU), leakage(much, groups, 0, CPU)
    assert clean is not None and dirty is not None
    assert clean.enrichment == pytest.approx(1, abs=0.25) and dirty.enrichment > 5
    assert clean.explained < 0.03 and 0.5 < dirty.explained < 0.8
    assert clean.probe is not None and dirty.probe is not None
    assert clean.probe_chance == pytest.approx(1 / 12)
    assert clean.probe < 0.25 and dirty.probe > 0.9
    assert leakage(none, [str(i) for i in range(300)], 0, CPU) is None
    assert leakage(none, ["one"] * 300, 0, CPU) is None


def test_enrichment_is_that_of_a_loop_also_with_copies_of_tiles() -> None:
    features, groups = leaky(0.5)
    features = np.concatenate([features, features[:20]])
    index = np.array([int(g[5:]) for g in groups] + [int(g[5:]) for g in groups[:20]])
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    same = 0
    for i, row in enumerate(unit):
        similarity = unit @ row
        similarity[i] = -2
        same += int((index[np.argsort(-similarity)[:10]] == index[i]).sum())
    n = len(index)
    sizes = np.bincount(index)
    chance = (sizes * (sizes - 1)).sum() / (n * (n - 1))
    assert enrichment(features, index, CPU) == pytest.approx(same / n / 10 / chance, rel=1e-3)


def test_explained_variance_is_one_where_groups_are_points() -> None:
    points = np.repeat(np.eye(5, dtype=np.float32), 8, axis=0)
    assert explained(points, np.repeat(np.arange(5), 8)) == pytest.approx(1)
