"""Runs cases in a process of its own, bounded in time and memory, that notes what it is made to do.

``python -m hostile.child FOLDER NAME…`` prints a line of JSON when a case begins and one when it
has ended. Whoever started it finds, from the last line, which case killed it.
"""

import faulthandler
import json
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from hostile.corpus import GROUPS, SECRET
from hostile.folder import write_sound
from hostile.truncations import truncations

from eosin.configs.errors import EosinError, InputError
from eosin.data_curation import shard_reader
from eosin.data_curation.shard_reader import RecordError, ShardReader
from eosin.data_curation.verify import find_problems
from eosin.pretrain.augment import AugmentConfig
from eosin.pretrain.loader import LoaderConfig, batches, open_shards
from eosin.pretrain.steps import BatchPlan

LIMIT_S = 4
ROOM = 1_500_000_000
"""Bytes of address space beyond what imports and the making of the case took."""

_STARTS = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork")
_NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.", "http.client")
_OTHER = ("pickle.find_class", "ctypes.dlopen", "os.remove", "os.rename", "shutil.", "os.chmod")
_WATCHED = (*_STARTS, *_NETWORK, *_OTHER)
_WRITES = 0o3  # O_WRONLY | O_RDWR


class Watch:
    """Audit events of the doors under test; cannot be removed from the process."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event.startswith(_WATCHED):
            self.seen.append(f"{event} {args!r}"[:200])
        elif event == "open" and isinstance(args[0], str | bytes):
            path = args[0] if isinstance(args[0], str) else args[0].decode(errors="replace")
            if path.endswith(SECRET) or path.startswith("/etc/") or (args[2] or 0) & _WRITES:
                self.seen.append(f"open {path}")


class HungError(BaseException):
    """A door that did not come back; no product code catches it."""


def main(arguments: list[str]) -> None:
    work, names = Path(arguments[0]), set(arguments[1:])
    warnings.simplefilter("ignore")
    shard_reader.RETRY_WAITS_S = (0.0, 0.0)
    signal.signal(signal.SIGALRM, _hang)
    watch = Watch()
    (work / SECRET).parent.mkdir(parents=True, exist_ok=True)
    (work / SECRET).write_text("secret")
    shutil.rmtree(work / "warm", ignore_errors=True)  # of a process that a case ended
    write_sound(work / "warm")
    for door in DOORS.values():  # whatever they import, they import now
        door(work / "warm")
    cases = [*(case for group in GROUPS.values() for case in group), *truncations()]
    for case in cases:
        if case.name not in names:
            continue
        print(json.dumps({"begin": case.name}), flush=True)
        case.build(work / case.name)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))
        found = {door: _enter(DOORS[door], work / case.name, watch) for door in DOORS}
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        print(json.dumps({"end": case.name, **found}), flush=True)
        shutil.rmtree(work / case.name)


def _hang(*_: object) -> None:
    raise HungError


def _enter(door: Callable[[Path], dict[str, Any]], folder: Path, watch: Watch) -> dict[str, Any]:
    """What came of a door: its answer, a refusal, or a crash; seconds, bytes and events."""
    watch.seen = []
    before = _peak(reset=True)
    started = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    faulthandler.dump_traceback_later(LIMIT_S + 2, exit=True)  # where no signal gets through
    watch.on = True
    try:
        answer = door(folder)
    except InputError as error:
        answer = {"refused": str(error)}
    except EosinError as error:
        answer = {"failed": str(error)}
    except HungError:
        answer = {"crash": f"hung for {LIMIT_S} s"}
    except Exception as error:
        answer = {"crash": f"{type(error).__name__}: {error}"[:300]}
    finally:
        watch.on = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
    seconds = time.perf_counter() - started
    return {**answer, "s": seconds, "bytes": _peak() - before, "events": watch.seen}


def _peak(reset: bool = False) -> int:
    """The most memory that was resident, in bytes, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _read(folder: Path) -> dict[str, Any]:
    """Every record, by row."""
    reader = ShardReader(folder)
    read: list[int] = []
    named: dict[int, str] = {}
    for row in range(len(reader)):
        try:
            image = reader.image(row)
        except RecordError as error:
            named[row] = str(error)
        else:
            assert image.ndim == 3 and image.shape[2] == 3 and image.dtype == "uint8"
            read.append(row)
    return {"n": len(reader), "read": read, "named": named}


def _verify(folder: Path) -> dict[str, Any]:
    problems, _, n = find_problems(folder, workers=1)
    return {"n": n, "problems": [str(problem) for problem in problems]}


def _train(folder: Path, render: Literal["worker", "device"] = "worker") -> dict[str, Any]:
    """An epoch of batches, and one more."""
    config = LoaderConfig(max_damaged=0.99)
    plan = BatchPlan(
        augment=AugmentConfig(global_px=32, local_px=16, n_local=1, render=render),
        batch_size=4,
        seed=3,
    )
    rows: set[int] = set()
    damaged: dict[int, str] = {}
    reader = open_shards(folder, config)
    for batch in batches(reader, plan, config, first_step=0, last_step=3):
        rows |= set(batch.rows.tolist())
        damaged |= batch.damaged
    return {"read": sorted(rows), "named": damaged}


def _stage(folder: Path) -> dict[str, Any]:
    """The same batches as tiles for the device to crop."""
    return _train(folder, "device")


DOORS = {"reader": _read, "verify": _verify, "loader": _train, "device": _stage}

if __name__ == "__main__":
    main(sys.argv[1:])
