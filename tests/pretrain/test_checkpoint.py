"""Checkpoints of one process: exact, verified, and the one before when the newest is damaged."""

import json
import resource
import shutil
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash
from safetensors.torch import load_file
from torch import Tensor, nn

from eosin.configs.errors import EosinError
from eosin.launch.process import World
from eosin.pretrain import run_checkpoints
from eosin.pretrain.checkpoint import (
    TrainState,
    find_damage,
    list_checkpoints,
    read_manifest,
    read_state,
    read_tensors,
    write_manifest,
)
from eosin.pretrain.retention import Retention
from eosin.pretrain.run_checkpoints import Checkpoints

STATE = TrainState(
    step=3, bad_steps=1, index_digest="abc", mpp=0.5, config={"a": [1, None], "b": {"c": "µ"}},
    skips=((2, 1), (7, 30)),
)  # fmt: skip
FILE = "rank_00000.safetensors"


def made(step: int) -> dict[str, Tensor]:
    """Tensors of every kind, of which each value depends on the step."""
    draw = torch.Generator().manual_seed(step)
    normal = torch.randn(3, 5, generator=draw)
    normal[0, :3] = torch.tensor([torch.nan, torch.inf, -0.0])
    return {
        "weight": normal,
        "transposed": torch.randn(4, 3, generator=draw).T,
        "bf16": torch.randn(7, generator=draw).bfloat16(),
        "double": torch.randn(2, generator=draw).double(),
        "scalar": torch.randn((), generator=draw),
        "count": torch.tensor(step, dtype=torch.int32),
        "flags": torch.rand(9, generator=draw) > 0.5,
        "rows": torch.randint(1 << 40, (3,), generator=draw),
        "empty": torch.zeros(0, 3),
    }


def blank(like: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.ones_like(tensor) for name, tensor in like.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit, NaN and the sign of zero included."""
    return a.keys() == b.keys() and all(
        x.dtype == b[name].dtype
        and x.shape == b[name].shape
        and torch.equal(
            x.contiguous().reshape(-1).view(torch.uint8),
            b[name].contiguous().reshape(-1).view(torch.uint8),
        )
        for name, x in a.items()
    )


def checkpoints(folder: Path, **retention: object) -> Checkpoints:
    return Checkpoints(folder, Retention(**{"every": 1, **retention}), World())  # type: ignore[arg-type]


def saved(folder: Path, *steps: int, keep: int = 2) -> Checkpoints:
    all_of_them = checkpoints(folder, keep=keep)
    for step in steps:
        all_of_them.save(made(step), replace(STATE, step=step))
    all_of_them.finish()
    return all_of_them


@pytest.mark.pitfall(20)
def test_what_is_loaded_is_what_was_saved_bit_for_bit(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    target = blank(made(3))
    assert not same(target, made(3))
    transposed = target["transposed"]
    state, passed_over = checkpoints(tmp_path).load_newest(target)
    assert (state, passed_over) == (STATE, []) and read_state(tmp_path / "step_00000003") == STATE
    assert same(target, made(3)) and target["transposed"] is transposed  # in place
    assert same(read_tensors(tmp_path / "step_00000003"), made(3))
    assert read_tensors(tmp_path / "step_00000003", "wei").keys() == {"ght"}


def test_torchs_own_reader_and_safetensors_read_it(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    path = tmp_path / "step_00000003"
    assert same(load_file(path / FILE), made(3))
    target = blank(made(3))
    with pytest.warns(UserWarning, match=r"torch\.distributed is disabled"):
        dcp.load(target, storage_reader=dcp.HuggingFaceStorageReader(str(path)))
    assert same(target, made(3))
    manifest = json.loads((path / "manifest.json").read_text())
    digest = xxhash.xxh3_128_hexdigest((path / FILE).read_bytes())
    assert manifest["files"] == {FILE: digest}


def test_training_goes_on_while_a_copy_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, write = threading.Event(), run_checkpoints.write_boxes

    def held_up(*args: object) -> str:
        assert go.wait(30)
        return write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(run_checkpoints, "write_boxes", held_up)
    all_of_them, tensors = checkpoints(tmp_path), made(1)
    all_of_them.save(tensors, replace(STATE, step=1))
    for tensor in tensors.values():
        tensor.zero_()
    all_of_them.poll()
    assert list_checkpoints(tmp_path) == []
    go.set()
    all_of_them.save(made(2), replace(STATE, step=2))  # waits for the first; uses its memory again
    assert same(read_tensors(tmp_path / "step_00000001"), made(1))
    all_of_them.finish()
    assert same(read_tensors(tmp_path / "step_00000002"), made(2))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_that_waits_is_there_when_it_returns(tmp_path: Path, asynchronous: bool) -> None:
    all_of_them = checkpoints(tmp_path, asynchronous=asynchronous)
    all_of_them.save(made(3), STATE, wait=asynchronous)
    assert find_damage(tmp_path / "step_00000003") is None


@pytest.mark.pitfall(20)
def test_a_loaded_optimiser_goes_on_exactly(tmp_path: Path) -> None:
    def steps(model: nn.Module, optimizer: torch.optim.AdamW, *numbers: int) -> None:
        for number in numbers:
            optimizer.zero_grad()
            x = torch.randn(3, 4, generator=torch.Generator().manual_seed(number))
            model(x).square().sum().backward()
            optimizer.step()

    def fresh(seed: int) -> tuple[nn.Module, torch.optim.AdamW, dict[str, Tensor]]:
        torch.manual_seed(seed)
        model = nn.Linear(4, 2)
        optimizer = torch.optim.AdamW(model.parameters(), 0.1)
        steps(model, optimizer, 99)  # so that it has moments
        tensors = dict(model.state_dict())
        for name, parameter in model.named_parameters():
            for moment, value in optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{moment}"] = value
        return model, optimizer, tensors

    model, optimizer, tensors = fresh(0)
    steps(model, optimizer, 1, 2)
    checkpoints(tmp_path).save(tensors, STATE, wait=True)
    other, other_optimizer, others = fresh(1)
    checkpoints(tmp_path).load_newest(others)
    for m, o in ((model, optimizer), (other, other_optimizer)):
        steps(m, o, 3, 4)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_none_is_there_at_first_and_then_the_newest_are_kept(tmp_path: Path) -> None:
    assert checkpoints(tmp_path / "new").load_newest(made(0)) == (None, [])
    saved(tmp_path, 1, 2, 10)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000010", "step_00000002"]


def test_every_kth_and_the_best_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    all_of_them = checkpoints(folder, keep=1, keep_every=4)
    for step in range(1, 8):
        all_of_them.save(made(step), replace(STATE, step=step), wait=True)
        line = {"step": step, "split": "val", "score": 1 / abs(step - 2.5)}
        with (tmp_path / "probes.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    assert [int(p.name[5:]) for p in list_checkpoints(folder)] == [7, 4, 2]


def test_a_step_limit_and_dropping_what_came_after(tmp_path: Path) -> None:
    all_of_them = saved(tmp_path, 1, 2, 3, keep=3)
    target = blank(made(0))
    state, _ = all_of_them.load_newest(target, at_most=2)
    assert state is not None and state.step == 2 and same(target, made(2))
    all_of_them.drop_after(2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000002", "step_00000001"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"flags": None}, "it has besides flags"),
        ({"new": torch.zeros(2)}, "it lacks new"),
        ({"weight": torch.zeros(5, 3)}, r"weight \(F32 \[3, 5\] there, F32 \[5, 3\] here\)"),
        ({"count": torch.tensor(1)}, r"count \(I32 \[\] there, I64 \[\] here\)"),
        ({"empty": torch.zeros(0, 4)}, r"empty \(F32 \[0, 3\] there"),
    ],
)
def test_other_tensors_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Tensor | None], line: str
) -> None:
    all_of_them = saved(tmp_path, 3)
    target = {name: t for name, t in {**made(3), **changes}.items() if t is not None}
    before = {name: tensor.clone() for name, tensor in target.items()}
    with pytest.raises(EosinError, match=line):
        all_of_them.load_newest(target)
    assert same(target, before)


def test_a_dtype_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EosinError, match=r"odd is torch\.complex64"):
        checkpoints(tmp_path).save({"odd": torch.zeros(2, dtype=torch.complex64)}, STATE)


def flip(path: Path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    path.write_bytes(bytes(content))


DAMAGES = {
    "first byte": lambda path: flip(path / FILE, 0),
    "a byte of the header": lambda path: flip(path / FILE, 0.2),
    "last byte": lambda path: flip(path / FILE, 1),
    "cut": lambda path: (path / FILE).write_bytes((path / FILE).read_bytes()[:-1]),
    "empty": lambda path: (path / FILE).write_bytes(b""),
    "missing": lambda path: (path / FILE).unlink(),
    "of the step before": lambda path: shutil.copy(path.parent / "step_00000001" / FILE, path),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "half a manifest": lambda path: (path / "manifest.json").write_bytes(
        (path / "manifest.json").read_bytes()[:80]
    ),
    "another manifest": lambda path: shutil.copy(
        path.parent / "step_00000001" / "manifest.json", path
    ),
    "another count": lambda path: (path / "manifest.json").write_text(
        (path / "manifest.json").read_text().replace('"bad_steps": 1', '"bad_steps": 2')
    ),
    "no JSON object": lambda path: (path / "manifest.json").write_text("[1]"),
    "a folder": lambda path: ((path / FILE).unlink(), (path / FILE).mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, damage: str
) -> None:
    all_of_them = saved(tmp_path, 1, 2)
    DAMAGES[damage](tmp_path / "step_00000002")
    target = blank(made(0))
    state, passed_over = all_of_them.load_newest(target)
    assert state is not None and state.step == 1 and same(target, made(1))
    assert len(passed_over) == 1 and passed_over[0].startswith("step_00000002: ")
    (tmp_path / "step_00000001" / "manifest.json").unlink()
    with pytest.raises(EosinError, match="no whole checkpoint"):
        all_of_them.load_newest(target)


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    """Of the file of tensors each 23rd, and of the manifest each second one."""
    saved(tmp_path, 1)
    for name, stride in ((FILE, 23), ("manifest.json", 2)):
        file = tmp_path / "step_00000001" / name
        whole = file.read_bytes()
        unseen = []
        for place in range(0, len(whole), stride):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            if find_damage(file.parent) is None:
                unseen.append(place)
        assert not unseen
        file.write_bytes(whole)


def test_a_file_that_the_manifest_does_not_name_is_never_read(tmp_path: Path) -> None:
    all_of_them = saved(tmp_path, 1, 2)
    before, path = tmp_path / "step_00000001", tmp_path / "step_00000002"
    shutil.copy(before / FILE, path / "rank_00001.safetensors")
    (path / ".nfs0001").write_bytes(b"x")
    target = blank(made(0))
    state, passed_over = all_of_them.load_newest(target)
    assert state is not None and state.step == 2 and not passed_over and same(target, made(2))
    (tmp_path / "step_notes").mkdir()
    assert list_checkpoints(tmp_path) == [path, before]


def test_a_checkpoint_of_the_former_layout_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "step_00000004").mkdir()
    (tmp_path / "step_00000004" / "manifest.json").write_text(
        json.dumps({"schema_version": 1, "state": {"step": 4}, "files": {}})
    )
    with pytest.raises(EosinError, match=r"schema_version 1; this one reads 2"):
        checkpoints(tmp_path).load_newest(made(0))


def test_a_manifest_cannot_point_out_of_its_folder(tmp_path: Path) -> None:
    saved(tmp_path / "c", 1)
    path = tmp_path / "c" / "step_00000001"
    (path / FILE).rename(tmp_path / "c" / FILE)
    manifest = read_manifest(path)
    write_manifest(path, replace(manifest, files={f"../{FILE}": manifest.files[FILE]}))
    assert find_damage(path) == "manifest.json names files elsewhere"


def test_a_damaged_later_checkpoint_never_costs_the_one_just_written(tmp_path: Path) -> None:
    all_of_them = saved(tmp_path, 2, 3)
    (tmp_path / "step_00000003" / "manifest.json").write_text("{")
    all_of_them.save(made(1), replace(STATE, step=1), wait=True)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000001"]
    all_of_them.save(made(7), replace(STATE, step=1), wait=True)  # the same step again
    assert same(read_tensors(tmp_path / "step_00000001"), made(7))


def test_what_a_killed_run_left_is_put_right(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / ".step_00000003.partial").mkdir()
    (tmp_path / ".step_00000003.partial" / FILE).write_bytes(b"half")
    (tmp_path / "step_00000002").rename(tmp_path / ".step_00000002.old")  # between two renames
    shutil.copytree(tmp_path / "step_00000001", tmp_path / ".step_00000001.old")
    checkpoints(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


def check_failure(all_of_them: Checkpoints, folder: Path, reason: str) -> None:
    """A save that fails is one line, once, and leaves the checkpoint of step 1."""
    all_of_them.save(made(2), replace(STATE, step=2))
    with pytest.raises(EosinError, match=reason) as raised:
        for _ in range(1000):
            all_of_them.poll()
            time.sleep(0.01)
    assert "the checkpoint of step 2 was not written (step_00000001 stands)" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert [p.name for p in folder.iterdir()] == ["step_00000001"]
    assert find_damage(folder / "step_00000001") is None
    all_of_them.finish()  # said once
    with pytest.raises(EosinError, match=reason):
        all_of_them.save(made(2), replace(STATE, step=2), wait=True)


def test_a_file_that_may_not_grow_is_one_line(tmp_path: Path) -> None:
    all_of_them = saved(tmp_path, 1, keep=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        check_failure(all_of_them, tmp_path, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    all_of_them.save(made(2), replace(STATE, step=2), wait=True)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000002"]


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mount.stderr.strip()}")
    try:
        folder = disk / "checkpoints"
        all_of_them = saved(folder, 1, keep=1)
        with (disk / "filler").open("wb", buffering=0) as filler:
            try:
                while filler.write(b"x" * 512):
                    pass
            except OSError:
                pass
        check_failure(all_of_them, folder, "No space left on device")
        (disk / "filler").unlink()
        all_of_them.save(made(2), replace(STATE, step=2), wait=True)
        assert [p.name for p in list_checkpoints(folder)] == ["step_00000002"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_bytes_that_read_back_otherwise_are_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that loses what it was given: the older checkpoint is not removed for it."""
    all_of_them = saved(tmp_path, 1, keep=1)
    forget = run_checkpoints.forget

    def lose(path: Path) -> None:
        forget(path)
        flip(path, 0.9)

    monkeypatch.setattr(run_checkpoints, "forget", lose)
    check_failure(all_of_them, tmp_path, "reads back with other bytes")


def test_a_mistake_in_the_writing_is_raised_and_not_swallowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(*_: object) -> str:
        raise TypeError("a mistake")

    monkeypatch.setattr(run_checkpoints, "write_boxes", mistaken)
    all_of_them = checkpoints(tmp_path)
    all_of_them.save(made(1), STATE)
    with pytest.raises(EosinError, match=r"\(none stands\): TypeError: a mistake"):
        all_of_them.finish()
