"""The augmentation's config: what it refuses, and that YAML can say all of it."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from eosin.configs.load import load_config, to_yaml
from eosin.pretrain.augment import AugmentConfig, Resolution
from eosin.pretrain.stain import StainTemplateConfig


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"n_global": 3}, "n_global must be 2, not 3"),
        ({"local_blur": 1.5}, "local_blur must be a probability, not 1.5"),
        ({"hue": 0.7}, "hue"),
        ({"brightness": -0.1}, "brightness"),
        ({"hed_shift": -1.0}, "hed_shift"),
        ({"hed_shift": math.inf}, "hed_shift must be finite"),
        ({"blur_sigma_px": (0.1, math.inf)}, "blur_sigma_px"),
        ({"n_local": -1}, "n_local"),
        ({"global_scale": (0.0, 1.0)}, "global_scale"),
        ({"local_scale": (0.5, 1.2)}, "local_scale"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
        ({"global_zoom": (1.1, 0.9)}, r"global_zoom must be .* not \(1\.1, 0\.9\)"),
        ({"local_zoom": (0.0, 0.9)}, "local_zoom"),
        ({"global_zoom": (1.0, math.inf)}, "global_zoom"),
        ({"mpp": 0.5, "global_zoom": (1.0, 1.0)}, "mpp=0.5 needs global_zoom and local_zoom"),
        (
            {"mpp": -1.0, "global_zoom": (1.0, 1.0), "local_zoom": (1.0, 1.0)},
            "mpp must be positive, not -1",
        ),
    ],
)
def test_a_nonsensical_value_is_refused_by_name(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(AugmentConfig(), **changed)


@pytest.mark.parametrize("changed", [{"global_px": 0}, {"local_px": -98}, {"share": math.nan}])
def test_a_resolution_of_nothing_is_refused(changed: dict[str, Any]) -> None:
    (name,) = changed
    with pytest.raises(ValueError, match=f"{name} of a resolution must be positive and finite"):
        Resolution(**{"global_px": 224, "local_px": 98, "share": 1.0, **changed})


@dataclass(frozen=True, kw_only=True)
class Run:
    augment: AugmentConfig = field(default_factory=AugmentConfig)


def test_all_of_it_can_be_written_as_yaml_and_read_back(tmp_path: Path) -> None:
    overrides = [
        "global_zoom=[0.9, 1.1]", "local_zoom=[1, 2]", "mpp=0.5", "stain={probability: 0.3}",
        "resolutions=[{global_px: 224, local_px: 98, share: 3}, "
        "{global_px: 448, local_px: 168, share: 1}]",
        "render=device", "decode=full",
    ]  # fmt: skip
    config = load_config(Run, [], [f"augment.{text}" for text in overrides])
    assert config.augment == AugmentConfig(
        global_zoom=(0.9, 1.1), local_zoom=(1, 2), mpp=0.5, render="device", decode="full",
        stain=StainTemplateConfig(probability=0.3),
        resolutions=[
            Resolution(global_px=224, local_px=98, share=3),
            Resolution(global_px=448, local_px=168, share=1),
        ],
    )  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(config))
    assert load_config(Run, [path]) == config


def test_every_view_has_its_size() -> None:
    config = AugmentConfig(global_px=64, local_px=32, n_local=3)
    assert config.sizes_px == [64, 64, 32, 32, 32]
    assert config.n_views == 5
