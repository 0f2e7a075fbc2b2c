"""The checkpoints of a run, as one rank sees them: written while training goes on, pruned, loaded.

Each rank writes one file. What several ranks hold alike is shared out among them, once, by one
exchange of hashes. `torch.distributed.checkpoint.save` would send each rank's plan to rank 0 as a
pickle at every save and merge them there, under the lock that its training loop needs too (12 s of
64 ranks with 2,500 tensors each); so its planners are used (see `tensor_files`), and not its
`save`. The copy is made here, one thread a rank writes it, and the threads agree through a process
group of their own: their exchanges cannot come between those of the training.

A checkpoint gets its name when all files were synced and read back, and only then is an older one
removed. If a rank cannot write its file, none of the ranks keeps it, and all of them say so.
"""

import json
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from eosin.configs.errors import EosinError, InterruptedRunError
from eosin.launch.artefacts import file_digest
from eosin.launch.process import World
from eosin.pretrain.checkpoint import (
    DamagedCheckpointError,
    Manifest,
    TrainState,
    check_covered,
    clean_up,
    list_checkpoints,
    read_manifest,
    remove_checkpoint,
    step_folder,
    step_of,
    take_over,
    verified_parts,
    write_manifest,
)
from eosin.pretrain.retention import Retention
from eosin.pretrain.tensor_files import (
    Box,
    Shape,
    fill,
    forget,
    held_boxes,
    local_part,
    read_boxes,
    shapes_of,
    write_boxes,
)


@dataclass(frozen=True)
class _Share:
    """Which boxes of the tensors this rank writes; the same all through a run."""

    shapes: dict[str, Shape]
    boxes: dict[str, Box]


@dataclass(frozen=True)
class _Snapshot:
    """What is written: it does not change while the training goes on."""

    state: TrainState
    share: _Share
    parts: dict[str, Tensor]
    """By name, as `_Share.boxes`."""
    copied: torch.cuda.Event | None
    """After which the parts hold what they should; None where they do already."""


class Checkpoints:
    """The checkpoints of one run, on one rank. Every method is called by all ranks together."""

    def __init__(self, folder: Path, retention: Retention, world: World) -> None:
        self._folder, self._retention, self._world = folder, retention, world
        self._writers = world
        if world.host is not None:
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)
            self._writers = replace(world, host=group)
        self._share: _Share | None = None
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        if world.leads:
            clean_up(folder)
        world.barrier()

    def save(self, tensors: Mapping[str, Tensor], state: TrainState, *, wait: bool = False) -> None:
        """Takes a copy and writes it in the background as ``step_NNNNNNNN``.

        Waits first for the save before. A tensor on a GPU is copied in the order of its current
        stream: the caller may change it at once.

        Args:
            tensors: flat name → plain tensor (equal on all ranks) or DTensor. Their names, shapes
                and layout are the same at every save.
            state: the rest.
            wait: whether to return when it is written; then nothing is copied.

        Raises:
            EosinError: this save (where it waits) or the one before failed; the same on all ranks.
        """
        self.finish()
        shapes = shapes_of(tensors)
        if self._share is None or self._share.shapes != shapes:
            self._share = _share_out(tensors, shapes, self._world)
        wait = wait or not self._retention.asynchronous
        parts = {name: local_part(tensors[name]) for name in self._share.boxes}
        on_gpu = any(part.is_cuda for part in parts.values())
        if not wait:
            parts = {name: self._copy(name, part) for name, part in parts.items()}
        copied = None
        if on_gpu:
            copied = torch.cuda.Event()
            copied.record()
        snapshot = _Snapshot(state, self._share, parts, copied)
        # a daemon: a process that has to end does not wait for its disk
        self._thread = threading.Thread(target=self._run, args=(snapshot,), daemon=True)
        self._thread.start()
        if wait:
            self.finish()

    @property
    def is_writing(self) -> bool:
        """Whether a save is under way in the background, on this rank."""
        return self._thread is not None and self._thread.is_alive()

    def poll(self) -> None:
        """Looks whether the save in the background failed. Costs one small exchange at most.

        Raises:
            EosinError: it did, on whatever rank; the same on all ranks.
        """
        if self._thread is None:
            return
        running = self._thread.is_alive()
        flags = torch.tensor([int(running), int(not running and self._failure is not None)])
        if self._world.host is not None:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._world.host)
        if flags[1] or not flags[0]:
            self.finish()

    def finish(self) -> None:
        """Waits for the save in the background.

        Raises:
            EosinError: it failed, on whatever rank; the same on all ranks.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def load_newest(
        self, tensors: Mapping[str, Tensor], at_most: int | None = None
    ) -> tuple[TrainState | None, list[str]]:
        """Fills the tensors in place from the newest checkpoint that is whole.

        It may have been written by another number of ranks, in another layout.

        Args:
            tensors: flat name → plain tensor or DTensor.
            at_most: the highest step that is asked for.

        Returns:
            The state, None when there is no checkpoint at all; and a line for each damaged one that
            was passed over.

        Raises:
            EosinError: there are checkpoints and none is whole; or the newest whole one holds other
                tensors; the same on all ranks.
        """
        self.finish()
        shapes = shapes_of(tensors)
        passed_over: list[str] = []
        for step in self._steps():
            if at_most is not None and step > at_most:
                continue
            path = step_folder(self._folder, step)
            try:
                manifest, parts = self._verify(path)
            except DamagedCheckpointError as error:
                passed_over.append(f"{path.name}: {error}")
                continue
            _check_same(path, manifest.shapes, shapes)
            read = lambda: fill(tensors, path, manifest.shapes, parts)  # noqa: B023, E731
            _together(self._world, read, f"cannot read {path}")
            return manifest.state, passed_over
        if passed_over:
            raise EosinError(f"no whole checkpoint in {self._folder} ({'; '.join(passed_over)})")
        return None, []

    def drop_after(self, step: int) -> None:
        """Removes the checkpoints of later steps."""
        self.finish()
        if self._world.leads:
            for path in list_checkpoints(self._folder):
                if step_of(path) > step:
                    remove_checkpoint(path)
        self._world.barrier()

    def _steps(self) -> list[int]:
        """Of the checkpoints that rank 0 sees, the newest first."""
        seen = [step_of(path) for path in list_checkpoints(self._folder)]
        return [int(step) for step in json.loads(self._world.gather(json.dumps(seen))[0])]

    def _verify(self, path: Path) -> tuple[Manifest, dict[str, dict[str, Box]]]:
        """Manifest and parts of a checkpoint, of which each rank reads its share of the files."""

        def mine() -> str:
            manifest = read_manifest(path)
            names = sorted(manifest.files)[self._world.rank :: self._world.size]
            found = verified_parts(path, manifest, names)
            return json.dumps({f: {n: asdict(b) for n, b in p.items()} for f, p in found.items()})

        parts: dict[str, dict[str, Box]] = {}
        for text in _together(self._world, mine):
            for file, boxes in json.loads(text).items():
                parts[file] = {
                    name: Box(tuple(box["offsets"]), tuple(box["sizes"]))
                    for name, box in boxes.items()
                }
        manifest = read_manifest(path)
        check_covered(manifest, parts)
        return manifest, parts

    def _copy(self, name: str, part: Tensor) -> Tensor:
        """A copy in host memory; that memory is used again by the next save."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != part.shape or buffer.dtype != part.dtype:
            buffer = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
            self._buffers[name] = buffer
        return buffer.copy_(part, non_blocking=True)

    def _run(self, snapshot: _Snapshot) -> None:
        try:
            self._write(snapshot)
        except RuntimeError as error:  # of an exchange itself: all work is done in `_together`
            lost = InterruptedRunError(
                f"a rank was lost while the checkpoint of step {snapshot.state.step} was written; "
                "the same command goes on from the newest that is whole"
            )
            lost.__cause__ = error
            self._failure = lost
        except Exception as error:  # raised again by `finish`, in the training's thread
            self._failure = error

    def _write(self, snapshot: _Snapshot) -> None:
        """Writes a checkpoint, in the thread, with the threads of the other ranks."""
        state, share = snapshot.state, snapshot.share
        final = step_folder(self._folder, state.step)
        partial = final.with_name(f".{final.name}.partial")
        name = f"rank_{self._world.rank:05d}.safetensors"
        digests: dict[str, str] = {}
        header: dict[str, tuple[str, Box]] = {}

        def begin() -> str:
            if self._world.leads:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            older = (path.name for path in list_checkpoints(self._folder) if path != final)
            return next(older, "none")

        def write() -> str:
            if snapshot.copied is not None:
                snapshot.copied.synchronize()
            digest = write_boxes(partial / name, share.boxes, snapshot.parts)
            forget(partial / name)
            if file_digest(partial / name) != digest:
                raise OSError(f"{name} reads back with other bytes than were written")
            header.update(read_boxes(partial / name))
            return digest

        def publish() -> None:
            if self._world.leads:
                layout = {"ranks": self._world.size, "torch": torch.__version__}
                write_manifest(partial, Manifest(state, digests, share.shapes, layout))
                take_over(partial, final)
                read_manifest(final)

        failed = f"the checkpoint of step {state.step} was not written"
        try:
            failed += f" ({_together(self._writers, begin, failed)[0]} stands)"
            written = _together(self._writers, write, failed)
            digests |= {f"rank_{rank:05d}.safetensors": d for rank, d in enumerate(written)}
            self._check_covered(share, header, failed)
            _together(self._writers, publish, failed)
        except EosinError:
            if self._world.leads:
                shutil.rmtree(partial, ignore_errors=True)
            self._writers.barrier()
            raise
        prune = lambda: self._prune(state.step)  # noqa: E731
        _together(self._writers, prune, f"no checkpoint older than {final} can be removed")

    def _check_covered(
        self, share: _Share, mine: Mapping[str, tuple[str, Box]], failed: str
    ) -> None:
        """Checks that the headers, as read back, add up to every tensor; with all ranks."""
        elements = torch.tensor(
            [mine[name][1].numel if name in mine else 0 for name in sorted(share.shapes)]
        )
        if self._writers.host is not None:
            dist.all_reduce(elements, group=self._writers.host)
        for name, found in zip(sorted(share.shapes), elements.tolist(), strict=True):
            if found != share.shapes[name].numel:
                raise EosinError(f"{failed}: the files hold {found} elements of {name}")

    def _prune(self, newest: int) -> None:
        """Removes what retention does not keep; later steps are those of a run that was left."""
        if not self._world.leads:
            return
        found = {step_of(path): path for path in list_checkpoints(self._folder)}
        past = [step for step in found if step <= newest]
        kept = self._retention.kept(past, self._folder.parent / "probes.jsonl")
        for step, path in found.items():
            if step not in kept:
                remove_checkpoint(path)


def _together(world: World, work: Callable[[], str | None], failed: str = "") -> list[str]:
    """Does the work on each rank, and gathers what it returns.

    Args:
        world: the ranks, with the group through which they agree.
        work: what each does.
        failed: what to say first if it fails on any of them.

    Raises:
        DamagedCheckpointError: the work did, on some rank; the same on all of them.
        EosinError: it failed otherwise on some rank; the same on all of them.
    """
    damage = fault = result = None
    try:
        result = work()
    except DamagedCheckpointError as error:
        damage = str(error)
    except OSError as error:
        fault = error.strerror or str(error)
    except Exception as error:  # the others are waiting: they are told whatever it is
        fault = str(error) if isinstance(error, EosinError) else f"{type(error).__name__}: {error}"
    outcomes = [json.loads(text) for text in world.gather(json.dumps([damage, fault, result]))]
    for rank, (damage, fault, _) in enumerate(outcomes):
        where = f"rank {rank}: " if world.size > 1 else ""
        if fault is not None:
            raise EosinError(f"{failed}: {where}{fault}")
        if damage is not None:
            raise DamagedCheckpointError(damage)
    return [str(result) for _, _, result in outcomes]


def _share_out(tensors: Mapping[str, Tensor], shapes: dict[str, Shape], world: World) -> _Share:
    """Which boxes this rank writes: of those that hold the same one, each takes its turn.

    Raises:
        EosinError: the ranks hold different tensors.
    """
    held = held_boxes(tensors)
    # the largest first, so that the turns even out
    order = sorted(shapes, key=lambda name: (-shapes[name].numel, name))
    wholes = world.gather(str(_mark(repr([(name, shapes[name]) for name in order]))))
    other = [rank for rank, whole in enumerate(wholes) if whole != wholes[0]]
    if other:
        raise EosinError(f"rank {other[0]} holds other tensors, or other shapes, than rank 0")
    mine = torch.tensor([_mark(repr(held.get(name))) for name in order], dtype=torch.int64)
    table = [mine] * world.size
    if world.host is not None:
        table = [torch.empty_like(mine) for _ in range(world.size)]
        dist.all_gather(table, mine, group=world.host)
    marks = torch.stack(table).numpy()  # [ranks, names]
    boxes = {}
    for turn, name in enumerate(order):
        holders = np.flatnonzero(marks[:, turn] == marks[world.rank, turn])
        box = held.get(name)
        if box is None or holders[turn % len(holders)] != world.rank:
            continue
        if box.numel or not shapes[name].numel:
            boxes[name] = box
    return _Share(shapes, boxes)


def _mark(text: str) -> int:
    """A hash that an int64 holds."""
    return xxhash.xxh3_64_intdigest(text.encode()) >> 1


def _check_same(path: Path, saved: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> None:
    """Checks that a checkpoint holds exactly the tensors that are to be filled.

    Raises:
        EosinError: it does not; the names are in the message.
    """
    missing, extra = sorted(set(wanted) - set(saved)), sorted(set(saved) - set(wanted))
    misshaped = [
        f"{name} ({saved[name].dtype} {list(saved[name].sizes)} there, "
        f"{wanted[name].dtype} {list(wanted[name].sizes)} here)"
        for name in sorted(set(saved) & set(wanted))
        if saved[name] != wanted[name]
    ]
    faults = {"lacks": missing, "has besides": extra, "has another shape of": misshaped}
    lines = [f"it {what} {_some(names)}" for what, names in faults.items() if names]
    if lines:
        raise EosinError(f"{path} is of another model or optimiser: {'; '.join(lines)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
