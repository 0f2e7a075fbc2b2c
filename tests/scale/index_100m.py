"""Opens an index of 100 million records in 10,000 shards, and asks it for the order of training.

Run by `make scale`; ends with 1 where a bound is broken. It takes some minutes, most of them to
write the index.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from eosin.data_curation.manifest import INDEX
from eosin.data_curation.shard_index import ShardIndex, write_index
from eosin.data_curation.shard_store import open_store
from eosin.pretrain.order import MixtureConfig, Order, locate

OPEN_S, MEMORY_MB, STEP_MS = 10.0, 2000.0, 1.0
"""Bounds: opening, the process's peak, the order of one step."""
BATCH, STEPS = 1024, 200
ORGANS = 30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--records", type=int, default=10_000, help="in a shard")
    parser.add_argument("--measure", type=Path, help="a folder that was written before")
    options = parser.parse_args()
    if options.measure is not None:
        return measure(options.measure)
    with tempfile.TemporaryDirectory() as name:
        started = time.monotonic()
        size = write(Path(name), options.shards, options.records)
        print(f"written in {time.monotonic() - started:.0f} s: {size / 1e6:.0f} MB of index")
        # Of its own, so that its peak of memory is that of reading.
        command = [sys.executable, __file__, "--measure", name]
        return subprocess.run(command, check=False).returncode


def write(folder: Path, shards: int, records: int) -> int:
    """A folder of shards without pixels; returns the bytes of its index."""
    stride = 26_112
    described = {}
    for number in range(shards):
        name = f"{number:06d}.tar"
        with (folder / name).open("wb") as tar:
            tar.truncate(stride * records)
        described[name] = {
            "count": records,
            "bytes": stride * records,
            "xxh3_128": f"{number:032x}",
        }
    path = folder / "index.parquet"
    write_index(parts(shards, records, stride), path)
    marker = {"schema_version": 1, "stamp": "", "failed": 0, "with_metadata": 0}
    marker |= {"index_xxh3_128": "0" * 32, "failed_xxh3_128": "0" * 32, "shards": described}
    (folder / "shards.json").write_text(json.dumps(marker))
    return path.stat().st_size


def parts(shards: int, records: int, stride: int) -> Iterator[pa.Table]:
    """The rows of each shard: all alike but for the shard's name, and the organs' turn."""
    rng = np.random.default_rng(0)
    few = max(1, records // 100)  # rows that differ; the rest repeats them, to spare the disk
    organs = pa.array([f"organ {k:02d}" for k in range(ORGANS)])
    numbers = np.arange(records)
    cells = {
        "key": pa.array(
            [f"TCGA-{n:04d}_{n * 224}_{n * 448}_500" for n in (numbers % few).tolist()]
        ),
        "suffix": pa.array(["jpg"] * records),
        "offset": pa.array(512 + stride * numbers),
        "size": pa.array(np.resize(rng.integers(15_000, 25_000, few), records)),
        "checksum": pa.array([rng.bytes(16).hex() for _ in range(few)]).take(
            pa.array(numbers % few)
        ),
        "width_px": pa.array(np.full(records, 256, np.int32)),
        "height_px": pa.array(np.full(records, 256, np.int32)),
        "group": pa.array([f"patient {n % 61}" for n in numbers.tolist()]),
        "slide_id": pa.array([f"TCGA-{n % 97:04d}" for n in numbers.tolist()]),
        "mpp": pa.array(np.full(records, 0.5)),
        "cluster": pa.nulls(records, pa.string()),
        "stain": pa.array(["H&E"] * records),
    }
    for number in range(shards):
        cells["shard"] = pa.array([f"{number:06d}.tar"] * records)
        mixed = np.minimum(rng.geometric(0.15, records), ORGANS) - 1
        table = pa.table([cells[name] for name in INDEX.names], INDEX)
        yield table.append_column("organ", organs.take(pa.array(mixed)))


def measure(folder: Path) -> int:
    """Prints the figures; 1 where one is beyond its bound."""
    started = time.monotonic()
    index = ShardIndex(open_store(folder))
    opened_s = time.monotonic() - started
    print(f"{len(index):,} records in {len(index.names):,} shards opened in {opened_s:.2f} s")
    broken = opened_s > OPEN_S
    for mixture in (MixtureConfig(), MixtureConfig(column="organ", power=0.5)):
        started = time.monotonic()
        order = Order(index.strata(mixture.column), mixture, seed=0, window_shards=64)
        counted_s = time.monotonic() - started
        step_ms = time_steps(order)
        found_ms = time_rows(order, index, mixture.column)
        title = f"by {mixture.column}" if mixture.column else "without a mixture"
        print(
            f"{title}: {counted_s:.2f} s to set up, {step_ms:.3f} ms for the order of a step of "
            f"{BATCH}, {found_ms:.3f} ms to find its rows"
        )
        broken |= step_ms > STEP_MS
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"{peak_mb:.0f} MB of memory at the most")
    broken |= peak_mb > MEMORY_MB
    print("a bound is broken" if broken else "within the bounds")
    return int(broken)


def time_steps(order: Order) -> float:
    """Milliseconds of a step's order, over consecutive steps, the first included."""
    started = time.process_time()
    for step in range(STEPS):
        epochs, positions = locate(step + 1000, BATCH, order.n)
        order.at(int(epochs[0]), positions)
    return (time.process_time() - started) / STEPS * 1e3


def time_rows(order: Order, index: ShardIndex, column: str) -> float:
    """Milliseconds to find the rows and sizes of a step's tiles, likewise."""
    started = time.process_time()
    for step in range(STEPS):
        epochs, positions = locate(step + 1000, BATCH, order.n)
        index.hw(index.rows_at(column, order.at(int(epochs[0]), positions)))
    return (time.process_time() - started) / STEPS * 1e3


if __name__ == "__main__":
    sys.exit(main())
