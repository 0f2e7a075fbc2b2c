"""Checkpoints: exact, verified, and the one before when the newest is damaged."""

import json
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from eosin.configs.errors import EosinError
from eosin.pretrain.checkpoint import (
    TrainState,
    find_damage,
    list_checkpoints,
    load_newest,
    save_checkpoint,
)
from eosin.pretrain.optim import OptimConfig, build_optimizer, set_rates

STATE = TrainState(step=3, bad_steps=1, index_digest="abc", mpp=0.5)


def trained(seed: int, steps: int) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = build_optimizer(model, 1, OptimConfig())
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.randn(3, 4, generator=torch.Generator().manual_seed(step))).sum().backward()
        set_rates(optimizer, 0.01, 0.1, freeze_last=False)
        optimizer.step()
    return model, optimizer


@pytest.mark.pitfall(20)
def test_a_loaded_run_goes_on_exactly(tmp_path: Path) -> None:
    model, optimizer = trained(0, 3)
    save_checkpoint(tmp_path, model, optimizer, STATE, keep=2)
    other, other_optimizer = trained(1, 0)
    state, passed_over = load_newest(tmp_path, other, other_optimizer)
    assert state == STATE and not passed_over
    for m, o in ((model, optimizer), (other, other_optimizer)):
        o.zero_grad()
        m(torch.ones(2, 4)).sum().backward()
        set_rates(o, 0.01, 0.1, freeze_last=False)
        o.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_only_the_newest_are_kept_and_none_is_there_at_first(tmp_path: Path) -> None:
    model, optimizer = trained(0, 1)
    assert load_newest(tmp_path, model, optimizer) == (None, [])
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, model, optimizer, replace(STATE, step=step), keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000010", "step_00000002"]


@pytest.mark.parametrize("victim", ["model.safetensors", "optimizer.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, victim: str
) -> None:
    model, optimizer = trained(0, 2)
    for step in (1, 2):
        save_checkpoint(tmp_path, model, optimizer, replace(STATE, step=step), keep=2)
    path = tmp_path / "step_00000002" / victim
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content) if victim != "manifest.json" else content[:40])
    state, passed_over = load_newest(tmp_path, model, optimizer)
    assert state is not None and state.step == 1
    assert len(passed_over) == 1 and passed_over[0].startswith("step_00000002: ")
    (tmp_path / "step_00000001" / "manifest.json").unlink()
    with pytest.raises(EosinError, match="no whole checkpoint"):
        load_newest(tmp_path, model, optimizer)


def test_a_damaged_later_checkpoint_never_costs_the_one_just_written(tmp_path: Path) -> None:
    model, optimizer = trained(0, 1)
    for step in (2, 3):
        save_checkpoint(tmp_path, model, optimizer, replace(STATE, step=step), keep=2)
    (tmp_path / "step_00000003" / "manifest.json").write_text("{")
    state, _ = load_newest(tmp_path, model, optimizer)
    assert state is not None and state.step == 2
    save_checkpoint(tmp_path, model, optimizer, replace(STATE, step=1), keep=1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000001"]


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    model, optimizer = trained(0, 1)
    save_checkpoint(tmp_path, model, optimizer, replace(STATE, step=1), keep=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # as a disk with 100 bytes left
    try:
        with pytest.raises((EosinError, OSError)):
            save_checkpoint(tmp_path, model, optimizer, replace(STATE, step=2), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    assert find_damage(tmp_path / "step_00000001") is None


def test_a_partial_folder_is_no_checkpoint(tmp_path: Path) -> None:
    model, optimizer = trained(0, 1)
    partial = tmp_path / ".step_00000003.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    assert list_checkpoints(tmp_path) == []
    save_checkpoint(tmp_path, model, optimizer, STATE, keep=1)
    assert not partial.exists()
    manifest = json.loads((tmp_path / "step_00000003" / "manifest.json").read_text())
    assert set(manifest["files"]) == {"model.safetensors", "optimizer.safetensors"}
