"""Stain templates: where they take a crop, what they leave alone, and how they are fitted."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from eosin.configs.errors import InputError
from eosin.configs.load import load_config
from eosin.data_curation.shards import ShardConfig, shard
from eosin.pretrain import colour
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.stain import (
    MAX_STAIN_FACTOR,
    StainTemplateConfig,
    chain,
    fit_stain_template,
    move_to_template,
)
from eosin.pretrain.stain_fit import StainFitConfig, fit_stain, sample_rows

TEMPLATE = ((0.4, 0.3, 0.1), (0.2, 0.1, 0.05))


def tissue(seed: int, strength: float = 1.0) -> NDArray[np.uint8]:
    """Pixels of independent stain amounts, 40 × 50."""
    rng = np.random.default_rng(seed)
    amounts = rng.uniform(0, 1, (40, 50, 3)) * np.array([0.8, 0.5, 0.2]) * strength
    return np.round(256 * np.exp(-amounts @ colour.HED_STAINS) - 1).astype(np.uint8)


def moments(image: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    mean, std = colour.stain_moments(colour.optical_density(image))
    return np.array(mean), np.array(std)


def moved(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    density = colour.optical_density(image)
    return colour.change_stains(
        density, *move_to_template(*colour.stain_moments(density), *TEMPLATE)
    )


@pytest.mark.parametrize("strength", [0.7, 1.0, 1.4])
def test_a_crop_takes_on_the_statistics_of_the_template(strength: float) -> None:
    mean, std = moments(moved(tissue(0, strength)))
    assert mean == pytest.approx(TEMPLATE[0], abs=0.01)
    assert std == pytest.approx(TEMPLATE[1], abs=0.01)


def test_crops_of_two_strengths_become_alike() -> None:
    before = np.abs(tissue(1, 0.7).astype(int) - tissue(1, 1.4)).mean()
    after = np.abs(moved(tissue(1, 0.7)).astype(int) - moved(tissue(1, 1.4))).mean()
    assert before > 30 and after < 2


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_crop_of_one_colour_stays_as_it_is(level: int) -> None:
    flat = np.full((20, 20, 3), level, np.uint8)
    assert np.abs(moved(flat).astype(int) - flat).max() <= 1


def test_glass_with_noise_stays_nearly_as_it_is() -> None:
    noise = np.random.default_rng(2).integers(-1, 2, (30, 30, 3))
    glass = (245 + noise).astype(np.uint8)
    mean, std = moments(glass)
    factor = np.array(TEMPLATE[1]) / std
    plain = colour.change_stains(
        colour.optical_density(glass), factor.tolist(), (TEMPLATE[0] - factor * mean).tolist()
    )
    assert np.abs(moved(glass).astype(int) - glass).mean() < 15
    assert np.abs(plain.astype(int) - glass).mean() > 60


def test_the_spread_changes_no_more_than_the_bound_allows() -> None:
    mean, std = (0.3, 0.2, 0.1), (0.01, 0.2, 3.0)
    for wanted in ((0.5, 0.2, 0.05), (-0.1, 0.0, 1e-9)):
        factor, _ = move_to_template(mean, std, TEMPLATE[0], wanted)
        assert all(f * 1.0001 >= 1 / MAX_STAIN_FACTOR for f in factor)
        assert all(f <= MAX_STAIN_FACTOR * 1.0001 for f in factor)
    factor, shift = move_to_template(mean, std, TEMPLATE[0], (0.06, 0.2, 2.0))
    assert factor == pytest.approx((3.0, 1.0, 2 / 3))
    # twice out of reach: half of the way from 0.3 to 0.4
    assert 0.3 * factor[0] + shift[0] == pytest.approx(0.35)
    assert 0.2 * factor[1] + shift[1] == pytest.approx(0.3)


def test_a_chain_is_one_change_after_the_other() -> None:
    amounts = np.random.default_rng(3).normal(size=(9, 3))
    first, second = ((1.1, 0.5, 2.0), (0.1, 0.2, -0.3)), ((0.9, 1.5, 1.2), (0.0, 0.4, 0.1))
    factor, shift = chain(*first, *second)
    expected = (amounts * first[0] + first[1]) * second[0] + second[1]
    assert amounts * factor + shift == pytest.approx(expected)


def test_a_fit_is_mean_and_spread_over_the_images() -> None:
    images = [tissue(seed, 0.5 + 0.1 * seed) for seed in range(8)]
    found = np.array([np.stack(moments(image)) for image in images])
    fitted = fit_stain_template(iter(images), probability=0.3)
    assert fitted.probability == 0.3
    assert fitted.mean == pytest.approx(found[:, 0].mean(0), abs=1e-4)
    assert fitted.mean_std == pytest.approx(found[:, 0].std(0), abs=1e-4)
    assert fitted.std == pytest.approx(found[:, 1].mean(0), abs=1e-4)
    assert fitted.std_std == pytest.approx(found[:, 1].std(0), abs=1e-4)
    with pytest.raises(ValueError, match="at least 2 images, not 1"):
        fit_stain_template(images[:1])
    with pytest.raises(ValueError, match="std must be positive"):
        fit_stain_template([np.full((4, 4, 3), 255, np.uint8)] * 3)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"probability": 1.5}, r"probability must lie in \[0, 1\], not 1.5"),
        ({"std": (0.1, 0.0, 0.1)}, "std must be positive"),
        ({"std_std": (0.1, -0.1, 0.1)}, "std_std must not be negative"),
        ({"mean_std": (-1.0, 0.1, 0.1)}, "mean_std must not be negative"),
        ({"mean": (0.1, float("nan"), 0.1)}, "mean must be finite"),
    ],
)
def test_a_nonsensical_distribution_is_refused_by_name(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(StainTemplateConfig(), **changed)


def test_sampled_rows_are_spread_and_follow_from_the_seed() -> None:
    rows = sample_rows(1003, 100, seed=5)
    assert len(set(rows.tolist())) == 100 and rows.min() >= 0 and rows.max() < 1003
    assert np.histogram(rows, 10, (0, 1003))[0].tolist() == pytest.approx([10] * 10, abs=1)
    assert np.array_equal(rows, sample_rows(1003, 100, seed=5))
    assert not np.array_equal(rows, sample_rows(1003, 100, seed=6))
    assert sample_rows(7, 100, seed=0).tolist() == list(range(7))


def test_the_verb_writes_what_a_training_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [tissue(seed, 0.5 + 0.2 * seed) for seed in range(6)]
    (tmp_path / "tiles").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "tiles" / f"{number}.png")
    shard(ShardConfig(images=tmp_path / "tiles", out=tmp_path / "shards", workers=1))
    out = tmp_path / "stain.yaml"
    fit_stain(StainFitConfig(shards=str(tmp_path / "shards"), out=out))
    config = load_config(PretrainConfig, [out], ["shards=a", f"out={tmp_path / 'run'}"])
    assert config.augment.stain == fit_stain_template(images)
    capsys.readouterr()
    fit_stain(StainFitConfig(shards=str(tmp_path / "shards")))
    assert capsys.readouterr().out == out.read_text()


def test_shards_of_glass_alone_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tiles").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8), "white").save(tmp_path / "tiles" / f"{number}.png")
    shard(ShardConfig(images=tmp_path / "tiles", out=tmp_path / "shards", workers=1))
    with pytest.raises(InputError, match=r"no templates can be fitted .* std must be positive"):
        fit_stain(StainFitConfig(shards=str(tmp_path / "shards")))
