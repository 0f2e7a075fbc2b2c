"""An encoder that the user brings as Python code."""

from pathlib import Path

import numpy as np
import pytest
import torch

from eosin.configs.errors import InputError
from eosin.data_curation.encoder import load_encoder

CPU = torch.device("cpu")
CODE = """
import numpy as np
import torch

class Squares(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor({scale}))

    def forward(self, x):
        return {result}

def transform(image):
    return torch.from_numpy(np.asarray(image).copy()).float().permute(2, 0, 1) / 255

def build(device):
    return transform, Squares()
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"encoder_of_{tmp_path.name.replace('-', '_')}"
    code = CODE.format(scale=2.0, result="self.scale * x.mean(dim=(2, 3))")
    (tmp_path / f"{name}.py").write_text(code)
    return name


def test_its_features_are_those_of_its_own_code(module: str) -> None:
    encoder = load_encoder(f"python:{module}:build", CPU)
    tiles = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    assert encoder.dim == 3 and not encoder.has_twin
    np.testing.assert_allclose(encoder.embed(tiles), 2 * tiles.mean(axis=(1, 2)) / 255, rtol=1e-5)
    with pytest.raises(InputError, match="no random-weights twin"):
        encoder.random_twin(0)


def test_its_digest_is_of_weights_and_code(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_encoder(f"python:{module}:build", CPU).digest
    assert load_encoder(f"python:{module}:build", CPU).digest == first
    for name, scale in ((f"{module}_b", 3.0), (f"{module}_c", 2.0)):
        code = CODE.format(scale=scale, result="self.scale * x.mean(dim=(2, 3)) + 1")
        (tmp_path / f"{name}.py").write_text(code)
        assert load_encoder(f"python:{name}:build", CPU).digest != first


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("python:nothing_like_it:build", "No module named 'nothing_like_it'"),
        ("python:{module}", "should be python:MODULE:FUNCTION"),
        ("python:{module}:none", "cannot be had: AttributeError"),
        ("python:{module}:transform", "cannot be had"),
        ("python:{module}:build@cls", "pools by itself"),
    ],
)
def test_what_is_no_encoder_is_one_line(module: str, spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_encoder(spec.format(module=module), CPU)
    assert "\n" not in str(caught.value)


def test_features_of_another_shape_are_refused(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}_map.py").write_text(CODE.format(scale=1.0, result="x"))
    with pytest.raises(InputError, match=r"gives \[1, 3, 224, 224\], not features"):
        load_encoder(f"python:{module}_map:build", CPU)
