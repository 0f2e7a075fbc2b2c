"""Checkpoints of several ranks: sharded, read at another world size, failed or killed together.

Run as a script, this file imports what the ranks need, which takes seconds, and forks them: what
they are to do comes line by line.
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from eosin.configs.errors import EosinError
from eosin.launch.process import World
from eosin.pretrain import run_checkpoints
from eosin.pretrain.checkpoint import (
    TrainState,
    find_damage,
    list_checkpoints,
    read_tensors,
    step_of,
)
from eosin.pretrain.retention import Retention
from eosin.pretrain.run_checkpoints import Checkpoints
from eosin.pretrain.tensor_files import local_part

STATE = TrainState(step=1, bad_steps=0, index_digest="abc", mpp=None)
RETENTION = Retention(every=1, keep=2)
ALONE = World()

SHARDED: dict[str, tuple[Placement, ...]] = {
    "rows": (Shard(0),),
    "thin": (Shard(0),),  # two rows: of four ranks two hold nothing
    "one": (Shard(0),),
    "columns": (Shard(1),),
    "flags": (Shard(0),),
    "empty": (Shard(0),),
    "replica": (Replicate(),),
    "hybrid": (Replicate(), Shard(0)),  # of four ranks, two by two
    "inner": (Shard(0),),  # on a mesh of each pair
}
"""Tensors that are DTensors where there are several ranks; all others are plain."""


def whole(step: int) -> dict[str, Tensor]:
    """The whole tensors of a step."""
    draw = torch.Generator().manual_seed(step)
    shapes = {
        "rows": (7, 3), "thin": (2, 5), "one": (1,), "columns": (3, 6), "empty": (0, 4),
        "replica": (5,), "hybrid": (5, 2), "inner": (9,), "plain": (4, 4), "large": (64, 64),
    }  # fmt: skip
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    tensors["flags"] = torch.rand(9, generator=draw) > 0.5
    tensors["columns"] = tensors["columns"].bfloat16()
    tensors["optimizer.plain.step"] = torch.tensor(float(step))
    tensors["count"] = torch.tensor(step, dtype=torch.int32)
    return tensors


def laid_out(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """Each rank's part of the tensors."""
    if world.size == 1:
        return tensors
    flat = init_device_mesh("cpu", (world.size,))
    pairs = init_device_mesh("cpu", (world.size // 2, 2), mesh_dim_names=("outer", "inner"))
    meshes: dict[str, DeviceMesh] = {"hybrid": pairs, "inner": pairs["inner"]}
    return {
        name: distribute_tensor(t, meshes.get(name, flat), SHARDED[name], src_data_rank=None)
        if name in SHARDED
        else t
        for name, t in tensors.items()
    }


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        a, b = local_part(tensor), local_part(expected[name])
        assert a.dtype == b.dtype and torch.equal(a, b), name


def reshard(world: World, folder: Path, *steps: str) -> None:
    """Reads one step and writes the next; with torch's own reader too."""
    read, write = map(int, steps)
    all_of_them = Checkpoints(folder, RETENTION, world)
    if read:
        for of_torch in (False, True):
            blank = {name: torch.zeros_like(t) for name, t in whole(read).items()}
            target = laid_out(blank, world)
            if of_torch:
                reader = dcp.HuggingFaceStorageReader(str(folder / f"step_{read:08d}"))
                del target["empty"]  # of which it knows nothing where nobody holds an element
                dcp.load(target, storage_reader=reader)
                target["empty"] = laid_out(whole(read), world)["empty"]
            else:
                state, passed_over = all_of_them.load_newest(target)
                assert state is not None and state.step == read and not passed_over
            check_equal(target, laid_out(whole(read), world))
    tensors = laid_out({name: t.clone() for name, t in whole(write).items()}, world)
    all_of_them.save(tensors, TrainState(write, 0, "abc", None))
    for tensor in tensors.values():
        local_part(tensor).zero_()
    all_of_them.finish()


def fail_on_one(world: World, folder: Path) -> None:
    """Rank 1 cannot write a large file; all say so, and go on when it can again."""
    all_of_them = Checkpoints(folder, RETENTION, world)
    all_of_them.save(laid_out(whole(1), world), STATE, wait=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:  # torch's own store on disk goes on below it
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    large = laid_out({**whole(2), "rows": torch.zeros(1 << 20)}, world)
    all_of_them.save(large, TrainState(2, 0, "abc", None))
    polls = 0
    try:
        while polls < 1000:
            all_of_them.poll()
            polls += 1
            time.sleep(0.01 if world.rank else 0.002)
    except EosinError as error:
        print(json.dumps([polls, str(error), sorted(p.name for p in folder.iterdir())]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    all_of_them.save(laid_out(whole(3), world), TrainState(3, 0, "abc", None), wait=True)


def differ(world: World, folder: Path) -> None:
    """The ranks hold different tensors: that is said, and nobody hangs."""
    tensors = whole(1) if world.rank == 0 else {**whole(1), "more": torch.zeros(1)}
    try:
        Checkpoints(folder, RETENTION, world).save(tensors, STATE)
    except EosinError as error:
        print(json.dumps(str(error)))


def damaged(world: World, folder: Path) -> None:
    """One of the files of the newest is damaged: all ranks use the one before."""
    target = laid_out({name: torch.zeros_like(t) for name, t in whole(0).items()}, world)
    state, passed_over = Checkpoints(folder, RETENTION, world).load_newest(target)
    assert state is not None
    check_equal(target, laid_out(whole(state.step), world))
    print(json.dumps([state.step, passed_over]))


def save_for_ever(world: World, folder: Path) -> None:
    """Trains as fast as it can; says which step is safe when the next save begins."""
    all_of_them = Checkpoints(folder, RETENTION, world)
    tensors = {name: t.clone() for name, t in whole(0).items()}
    tensors["large"] = torch.zeros(1 << 18)
    parts = laid_out(tensors, world)
    state, passed_over = all_of_them.load_newest(parts)
    assert not passed_over, passed_over
    first = 1 if state is None else state.step + 1
    if state is not None:
        check_equal(parts, laid_out(numbered(state.step), world))
    for step in range(first, 10**6):
        for name, tensor in laid_out(numbered(step), world).items():
            local_part(parts[name]).copy_(local_part(tensor))
        all_of_them.save(parts, TrainState(step, 0, "abc", None))
        print(step - 1 if step > first else 0, flush=True)


def numbered(step: int) -> dict[str, Tensor]:
    """Tensors in which every value is of this step."""
    return {**whole(step), "large": torch.full((1 << 18,), float(step))}


STAGES = (
    "write_boxes",
    "forget",
    "file_digest",
    "write_manifest",
    "take_over",
    "remove_checkpoint",
)
"""What a save does one after the other."""


def die_at(world: World, folder: Path, stage: str, when: str) -> None:
    """Saves two steps, and is killed in the third before or after a stage."""
    all_of_them, work = Checkpoints(folder, RETENTION, world), getattr(run_checkpoints, stage)

    def killed(*arguments: object) -> None:
        if when == "after":
            work(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    for step in (1, 2, 3):
        if step == 3:
            setattr(run_checkpoints, stage, killed)
        all_of_them.save(whole(step), TrainState(step, 0, "abc", None), wait=True)


ROLES: dict[str, Callable[..., None]] = {
    role.__name__: role for role in (reshard, fail_on_one, differ, damaged, save_for_ever, die_at)
}


def run_rank(rank: int, size: int, store: str, role: str, *arguments: str) -> None:
    if size == 1:
        return ROLES[role](ALONE, Path(arguments[0]), *arguments[1:])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    group = dist.group.WORLD
    assert isinstance(group, dist.ProcessGroup)
    world = World(rank=rank, size=size, local_rank=rank, local_size=size, group=group, host=group)
    ROLES[role](world, Path(arguments[0]), *arguments[1:])
    dist.destroy_process_group()


class Ranks:
    """The process that forks the ranks, seen from the tests."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, *request: object) -> Any:
        assert self._server.stdin is not None and self._server.stdout is not None
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())

    def run(self, size: int, role: str, *arguments: object) -> list[str]:
        """What each rank printed, when all of them ended well."""
        statuses = self.ask("run", size, role, *map(str, arguments))
        errors = [(self._folder / f"err-{rank}").read_text() for rank in range(size)]
        assert statuses == [0] * size, "".join(errors)
        return [(self._folder / f"out-{rank}").read_text() for rank in range(size)]

    def close(self) -> None:
        self._server.communicate()  # it ends with its input


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    server = Ranks(tmp_path_factory.mktemp("ranks"))
    yield server
    server.close()


def serve(folder: Path) -> None:
    """Does what comes on the standard input, line by line."""
    import torch._dynamo  # here: for the forks
    import torch.distributed.checkpoint.default_planner

    torch.set_num_threads(1)
    for number, line in enumerate(sys.stdin):
        what, *rest = json.loads(line)
        store = folder / f"store-{number}"
        if what == "run":
            size, role, *arguments = rest
            pids = [fork_rank(r, size, store, folder, role, arguments) for r in range(size)]
            answer: object = [os.waitpid(pid, 0)[1] for pid in pids]
        else:
            answer = campaign(store, folder, *rest)
        print(json.dumps(answer), flush=True)


def fork_rank(
    rank: int, size: int, store: Path, folder: Path, role: str, arguments: list[str]
) -> int:
    """Starts a rank as a fork of this process; what it prints goes to files."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        for descriptor, name in ((1, "out"), (2, "err")):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(folder / f"{name}-{rank}", flags), descriptor)
        signal.alarm(120)  # a deadlock ends here
        run_rank(rank, size, str(store), role, *arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@pytest.mark.pitfall(20)
def test_two_ranks_then_one_then_four_then_one_bit_for_bit(tmp_path: Path, ranks: Ranks) -> None:
    folder = tmp_path / "checkpoints"
    ranks.run(2, "reshard", folder, 0, 1)
    check_equal(read_tensors(folder / "step_00000001"), whole(1))
    all_of_them = Checkpoints(folder, RETENTION, ALONE)
    target = {name: torch.zeros_like(tensor) for name, tensor in whole(0).items()}
    state, _ = all_of_them.load_newest(target)
    assert state == STATE
    check_equal(target, whole(1))
    all_of_them.save(whole(2), TrainState(2, 0, "abc", None), wait=True)
    ranks.run(4, "reshard", folder, 2, 3)
    check_equal(read_tensors(folder / "step_00000003"), whole(3))
    ranks.run(2, "reshard", folder, 3, 4)
    check_equal(read_tensors(folder / "step_00000004"), whole(4))
    assert len(list_checkpoints(folder)) == 2
    # of four ranks, each element was written once, by some rank, and none by one rank alone
    held = [0] * 4
    for rank in range(4):
        with safe_open(folder / "step_00000003" / f"rank_{rank:05d}.safetensors", "pt") as file:
            held[rank] = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert sum(held) == sum(tensor.numel() for tensor in whole(3).values()) and min(held) > 0


def test_a_disk_that_is_full_for_one_rank_is_said_by_all_at_the_same_poll(
    tmp_path: Path, ranks: Ranks
) -> None:
    folder = tmp_path / "checkpoints"
    said = [json.loads(out) for out in ranks.run(2, "fail_on_one", folder)]
    assert said[0] == said[1]
    _, line, there = said[0]
    assert line == (
        "the checkpoint of step 2 was not written (step_00000001 stands): rank 1: File too large"
    )
    assert there == ["step_00000001"]
    assert [p.name for p in list_checkpoints(folder)] == ["step_00000003", "step_00000001"]
    check_equal(read_tensors(folder / "step_00000003"), whole(3))


def test_ranks_that_hold_other_tensors_are_named(tmp_path: Path, ranks: Ranks) -> None:
    said = ranks.run(2, "differ", tmp_path / "checkpoints")
    line = "rank 1 holds other tensors, or other shapes, than rank 0"
    assert [json.loads(out) for out in said] == [line, line]


@pytest.mark.parametrize("victim", ["rank_00000.safetensors", "rank_00001.safetensors"])
def test_a_flipped_byte_in_any_file_sends_all_ranks_to_the_one_before(
    tmp_path: Path, ranks: Ranks, victim: str
) -> None:
    folder = tmp_path / "checkpoints"
    ranks.run(2, "reshard", folder, 0, 1)
    ranks.run(2, "reshard", folder, 1, 2)
    path = folder / "step_00000002" / victim
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    for size in (2, 4):
        said = [json.loads(out) for out in ranks.run(size, "damaged", folder)]
        line = f"step_00000002: {victim} is damaged (its checksum differs)"
        assert said == [[1, [line]]] * size


def campaign(store: Path, logs: Path, size: int, kills: int, where: str, one_only: bool) -> int:
    """Kills all ranks, or one of them, at random moments, and looks at what is there.

    Returns:
        How many of the kills came while a checkpoint was half written.
    """
    draw, within_a_save, durable, folder = random.Random(size), 0, 0, Path(where)
    for number in range(kills):
        pids = [
            fork_rank(rank, size, Path(f"{store}-{number}"), logs, "save_for_ever", [where])
            for rank in range(size)
        ]
        while min(len(lines) for lines in said(logs, size)) < 2:  # each has begun a second save
            assert all(os.waitpid(pid, os.WNOHANG) == (0, 0) for pid in pids), said(logs, size)
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.2))
        for pid in pids[-1:] if one_only else draw.sample(pids, size):
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)  # where one was killed, the others end by themselves
        if one_only:
            line = "InterruptedRunError: a rank was lost while the checkpoint of step"
            assert line in (logs / "err-0").read_text()
        durable = max(durable, *(int(line) for lines in said(logs, size) for line in lines))
        within_a_save += any(folder.glob(".step_*.partial"))
        newest, *older = list_checkpoints(folder)
        assert find_damage(newest) is None
        step = step_of(newest)
        assert step >= durable, "a step that was said to be safe is gone"
        check_equal(read_tensors(newest), numbered(step))
        assert len(older) <= 2  # the one that is kept, and one that was going
        durable = step
        for log in logs.glob("out-*"):
            log.unlink()
    return within_a_save


def said(logs: Path, size: int) -> list[list[str]]:
    """The whole lines that each rank has printed."""
    files = [logs / f"out-{rank}" for rank in range(size)]
    return [f.read_text().split("\n")[:-1] if f.exists() else [] for f in files]


@pytest.mark.pitfall(20)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_at_each_stage_of_a_save(
    tmp_path: Path, ranks: Ranks, stage: str, when: str
) -> None:
    assert ranks.ask("run", 1, "die_at", str(tmp_path), stage, when) == [signal.SIGKILL]
    published = stage == "remove_checkpoint" or (stage == "take_over" and when == "after")
    all_of_them = Checkpoints(tmp_path, RETENTION, ALONE)
    target = {name: torch.zeros_like(tensor) for name, tensor in whole(0).items()}
    state, passed_over = all_of_them.load_newest(target)
    assert state is not None and state.step == (3 if published else 2) and not passed_over
    check_equal(target, whole(state.step))
    assert all(path.name.startswith("step_") for path in tmp_path.iterdir())


CAMPAIGNS = [
    pytest.param(1, 6, False, id="1 process"),
    pytest.param(2, 4, False, id="2 processes"),
    pytest.param(2, 3, True, id="1 of 2 processes"),
    pytest.param(1, 40, False, id="1 process, long", marks=pytest.mark.slow),
    pytest.param(2, 40, False, id="2 processes, long", marks=pytest.mark.slow),
    pytest.param(4, 20, False, id="4 processes, long", marks=pytest.mark.slow),
    pytest.param(2, 20, True, id="1 of 2 processes, long", marks=pytest.mark.slow),
]


@pytest.mark.pitfall(20)
@pytest.mark.parametrize(("size", "kills", "one_only"), CAMPAIGNS)
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(
    tmp_path: Path, ranks: Ranks, size: int, kills: int, one_only: bool
) -> None:
    folder = tmp_path / "checkpoints"
    within_a_save = ranks.ask("campaign", size, kills, str(folder), one_only)
    print(f"{within_a_save} of {kills} kills came while a checkpoint was half written")
    assert within_a_save > 0 or kills < 20
    Checkpoints(folder, RETENTION, ALONE)
    assert all(path.name.startswith("step_") for path in folder.iterdir())


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
