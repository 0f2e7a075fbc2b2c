"""Shared fixtures: the real data when it is there, and a tiny encoder in a folder."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
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
def small_disk(tmp_path: Path) -> Iterator[Callable[[float], Path]]:
    """A function that mounts an empty disk of so many MiB and returns its folder.

    The test is skipped where this user may not mount one.
    """
    mounted: list[Path] = []

    def mount(mib: float) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={int(mib * 1024)}k", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            pytest.skip(f"no small disk can be mounted here: {error}")
        if done.returncode != 0:
            pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def run_eosin() -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs ``eosin ARGUMENTS…`` as a child: exit code, stdout, stderr.

    Keyword `deadline_s` (120): after it the child and all that it started are killed, and the test
    fails with what they said. Keyword `env`: variables besides this process's own.
    """

    def run(
        *arguments: str, deadline_s: float = 120.0, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "eosin.launch.cli", *arguments]
        child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
            start_new_session=True,  # so that its workers can be killed with it
        )
        try:
            out, err = child.communicate(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            out, err = child.communicate()
            pytest.fail(f"{' '.join(command[2:])} took over {deadline_s:g} s:\n{out}\n{err}")
        return subprocess.CompletedProcess(command, child.returncode, out, err)

    return run


@pytest.fixture(scope="session")
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
