"""Reading ahead gives what reading gives, in order, within its bound, whatever goes wrong."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from eosin.configs.errors import EosinError
from eosin.data_curation import read_ahead
from eosin.data_curation.read_ahead import ReadAhead
from eosin.data_curation.shard_index import Place
from eosin.data_curation.shard_reader import Payload, RecordError, ShardReader
from eosin.data_curation.shards import ShardConfig, shard

N = 40


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    (folder / "images").mkdir()
    for number in range(N):
        side = 8 + 4 * (number % 7)
        rgb = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
        (folder / "images" / f"{number:02d}.jpg").write_bytes(simplejpeg.encode_jpeg(rgb))
    out = folder / "shards"
    shard(ShardConfig(images=folder / "images", out=out, records_per_shard=8, workers=1))
    return out


@pytest.fixture
def reader(shards: Path) -> Iterator[ShardReader]:
    with ShardReader(shards, max_open=2) as reader:
        yield reader


def count_threads() -> int:
    return sum(thread.name.startswith("read-ahead") for thread in threading.enumerate())


@pytest.mark.parametrize("threads", [0, 1, 5])
@pytest.mark.parametrize("max_bytes", [1, 3000, 1 << 20])
def test_records_come_as_the_reader_reads_them(
    reader: ShardReader, threads: int, max_bytes: int
) -> None:
    rng = np.random.default_rng(threads)
    rows = [*rng.permutation(N).tolist(), 7, 7, 7, *rng.integers(0, N, 100).tolist()]
    with ReadAhead(reader, threads, max_bytes) as ahead:
        asked = 0
        for number, row in enumerate(rows):
            while asked < min(len(rows), number + 1 + int(rng.integers(0, 30))):
                ahead.want(rows[asked : asked + 11])
                asked = min(len(rows), asked + 11)
            payload = ahead.take(row)
            assert isinstance(payload, Payload) and payload.data == reader.read(row)
            assert payload.place.row == row
    assert count_threads() == 0


class Watched(ShardReader):
    """Notes how much was fetched and not yet taken, and fails or waits where it is told to."""

    fetched: list[Place]
    fail: frozenset[int] = frozenset()
    gate: threading.Event | None = None

    def fetch(self, place: Place) -> Payload:
        if self.gate is not None:
            assert self.gate.wait(10)
        self.fetched.append(place)
        if place.row in self.fail:
            raise EosinError("the network is down")
        return super().fetch(place)


def test_the_bytes_ahead_are_bounded(shards: Path) -> None:
    with Watched(shards) as reader:
        reader.fetched = []
        sizes = [reader.index.locate(row).size for row in range(N)]
        bound = 3 * max(sizes)
        with ReadAhead(reader, 3, bound) as ahead:
            ahead.want(range(N))
            for row in range(N):
                before = time.monotonic()
                ahead.take(row)
                assert time.monotonic() - before < 5
                time.sleep(0.002)  # the threads do what they may
                assert {place.row for place in reader.fetched} >= set(range(row + 1))
                assert sum(p.size for p in reader.fetched) <= sum(sizes[: row + 1]) + bound
        assert len(reader.fetched) == N  # each once


def test_places_are_read_in_the_order_of_the_disk(shards: Path) -> None:
    with Watched(shards) as reader:
        reader.fetched = []
        with ReadAhead(reader, 1, 1 << 30) as ahead:
            rows = np.random.default_rng(1).permutation(N).tolist()
            ahead.want(rows)
            for row in rows:
                ahead.take(row)
        offsets = [(place.shard, place.offset) for place in reader.fetched]
        assert offsets[:32] == sorted(offsets[:32]) and offsets[32:] == sorted(offsets[32:])


@pytest.mark.parametrize("threads", [0, 3])
def test_a_damaged_record_is_that_rows_answer(shards: Path, tmp_path: Path, threads: int) -> None:
    copy = tmp_path / "shards"
    copy.mkdir()
    for path in shards.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    with ShardReader(copy) as reader, ReadAhead(reader, threads, 1 << 20) as ahead:
        place = reader.index.locate(11)
        with (copy / "000001.tar").open("rb+") as tar:
            data = os.pread(tar.fileno(), 1, place.offset + 9)
            os.pwrite(tar.fileno(), bytes([data[0] ^ 1]), place.offset + 9)
        ahead.want(range(20))
        for row in range(20):
            answer = ahead.take(row)
            assert isinstance(answer, RecordError if row == 11 else Payload)
            if row == 11:
                assert "000001.tar, record" in str(answer) and "checksum mismatch" in str(answer)


def test_what_stops_the_run_is_raised_where_it_is_taken(shards: Path) -> None:
    with Watched(shards) as reader:
        reader.fetched, reader.fail = [], frozenset({5})
        with ReadAhead(reader, 2, 1 << 20) as ahead:
            ahead.want(range(10))
            for row in range(5):
                assert isinstance(ahead.take(row), Payload)
            with pytest.raises(EosinError, match="the network is down"):
                ahead.take(5)
            assert isinstance(ahead.take(6), Payload)
    assert count_threads() == 0


def test_closing_waits_for_no_more_than_the_read_that_runs(shards: Path) -> None:
    with Watched(shards) as reader:
        reader.fetched, reader.gate = [], threading.Event()
        ahead = ReadAhead(reader, 2, 1 << 30)
        ahead.want(list(range(N)) * 5)
        threading.Timer(0.1, reader.gate.set).start()
        ahead.close()
        assert count_threads() == 0 and len(reader.fetched) <= 2
        ahead.close()


@pytest.mark.parametrize("threads", [0, 2])
def test_only_what_was_wanted_can_be_taken_and_in_that_order(
    reader: ShardReader, threads: int
) -> None:
    with ReadAhead(reader, threads, 1 << 20) as ahead:
        with pytest.raises(ValueError, match="row 3 was asked for where None is the next"):
            ahead.take(3)
        ahead.want([4, 3])
        with pytest.raises(ValueError, match="row 3 was asked for where 4 is the next"):
            ahead.take(3)
        assert isinstance(ahead.take(4), Payload) and isinstance(ahead.take(3), Payload)
    with pytest.raises(ValueError, match="threads must be 0 or more, not -1"):
        ReadAhead(reader, -1, 1)
    with pytest.raises(ValueError, match="max_bytes must be positive, not 0"):
        ReadAhead(reader, 1, 0)


def test_what_points_nowhere_counts_as_its_bytes(reader: ShardReader) -> None:
    place = reader.index.locate(3)
    pixels = 3 * place.height_px * place.width_px
    lying = place._replace(suffix="slide")
    assert read_ahead._n_bytes(lying) == read_ahead._n_bytes(place) == place.size != pixels
    assert read_ahead._n_bytes(place._replace(reference={}, size=0)) == pixels
