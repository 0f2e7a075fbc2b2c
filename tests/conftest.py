"""Shared fixtures: the real data when it is there, and a tiny encoder in a folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from eosin.data_curation.torchvision_import import import_timm

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real slides and tiles; tests that need it are skipped where it is absent."""
    if not REAL_DATA.is_dir():
        pytest.skip("the folder of real slides and tiles is not beside the checkout")
    return REAL_DATA


@pytest.fixture
def write_encoder_folder() -> Callable[..., Path]:
    """A function that writes a folder as timm reads it: a ViT of width 32 with two registers.

    Keywords go into `model_args`; `eosin` and `pretrained_cfg` into ``config.json``.
    """

    def write(
        folder: Path,
        eosin: dict[str, Any] | None = None,
        pretrained_cfg: dict[str, Any] | None = None,
        **model_args: Any,
    ) -> Path:
        args = {
            "embed_dim": 32,
            "depth": 1,
            "num_heads": 2,
            "img_size": 32,
            "patch_size": 8,
            "reg_tokens": 2,
            "num_classes": 0,
            **model_args,
        }
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = import_timm().create_model("vit_tiny_patch16_224", **args)
            for parameter in model.parameters():  # biases and norms too: nothing is left at 0 or 1
                torch.nn.init.normal_(parameter, std=0.2)
        config = {
            "architecture": "vit_tiny_patch16_224",
            "num_classes": 0,
            "model_args": args,
            "pretrained_cfg": {
                "input_size": [3, 32, 32],
                "interpolation": "bicubic",
                "crop_pct": 0.9,
                "mean": [0.7, 0.55, 0.68],
                "std": [0.21, 0.25, 0.19],
                "num_classes": 0,
                **(pretrained_cfg or {}),
            },
            **({"eosin": eosin} if eosin is not None else {}),
        }
        folder.mkdir(parents=True)
        save_file(model.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write
