"""Records are read before they are needed: threads wait for the disk while tiles are decoded."""

import queue
import threading
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple, Self

from eosin.configs.errors import EosinError
from eosin.data_curation.codec import MAX_BYTES
from eosin.data_curation.shard_index import Place
from eosin.data_curation.shard_reader import Payload, RecordError, ShardReader

_CHUNK = 32
"""Records that are sorted by their place before they are shared out to threads."""
_JOB = 8
"""Records that a thread reads one after another: handing over costs more than a short read."""
_POLL_S = 5.0
"""Between two looks at whether the threads live, while one is waited for."""


class _Job:
    """Records that one thread reads, and what came of them."""

    def __init__(self, places: list[Place]) -> None:
        self.places = places
        lost = EosinError("a thread that reads ahead died before it came to this record")
        self.results: list[Payload | Exception] = [lost] * len(places)
        self.done = threading.Lock()
        """Free once all are read."""
        self.done.acquire()


class _Ticket(NamedTuple):
    """A record that was wanted, on its way."""

    row: int
    n_bytes: int
    job: _Job
    number: int
    """Of the record in the job."""


class ReadAhead:
    """Reads records in threads, a bounded number of bytes ahead, and hands them over in order.

    All methods are for one thread, the one that made it.

    Args:
        reader: of the shards; use it for other reads meanwhile, if you like.
        threads: that read; 0 reads each record when it is taken.
        max_bytes: of records that are being read or wait to be taken. One larger record is read
            alone.
    """

    def __init__(self, reader: ShardReader, threads: int, max_bytes: int) -> None:
        if threads < 0:
            raise ValueError(f"threads must be 0 or more, not {threads}")
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be positive, not {max_bytes}")
        self._reader, self._max_bytes = reader, max_bytes
        self._waiting: deque[int] = deque()  # rows that no thread has been asked for
        self._next: Place | None = None  # of the first of them, once it was looked up
        self._under_way: deque[_Ticket] = deque()
        self._bytes = 0  # of those under way
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closing = False
        self._threads = [
            threading.Thread(target=self._work, name=f"read-ahead-{n}", daemon=True)
            for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def want(self, rows: Iterable[int]) -> None:
        """Says which rows will be taken, behind those that were wanted before; a row may repeat.

        Raises:
            InputError: the index is damaged there.
        """
        self._waiting.extend(int(row) for row in rows)
        if self._threads:
            self._hand_out()

    def take(self, row: int) -> Payload | RecordError:
        """The next record of those wanted; an error that concerns it alone is returned.

        Args:
            row: which one it is.

        Raises:
            ValueError: another is next, or none.
            EosinError: its shard cannot be fetched, or the index is damaged.
        """
        if not self._threads:
            self._expect(row, self._waiting[0] if self._waiting else None)
            return _fetch(self._reader, self._reader.index.locate(self._waiting.popleft()))
        self._hand_out()
        self._expect(row, self._under_way[0].row if self._under_way else None)
        ticket = self._under_way.popleft()
        self._bytes -= ticket.n_bytes
        while not ticket.job.done.acquire(timeout=_POLL_S):
            if not any(thread.is_alive() for thread in self._threads):
                raise EosinError("the threads that read ahead died; less read-ahead may help")
        ticket.job.done.release()
        result = ticket.job.results[ticket.number]
        if isinstance(result, Exception) and not isinstance(result, RecordError):
            raise result
        return result

    def close(self) -> None:
        """Forgets what was not taken and ends the threads."""
        self._closing = True
        self._waiting.clear()
        self._under_way.clear()
        self._next, self._bytes = None, 0
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _expect(self, row: int, following: int | None) -> None:
        if row != following:
            raise ValueError(f"row {row} was asked for where {following} is the next wanted")

    def _hand_out(self) -> None:
        """Gives threads as many of the waiting records as the bound allows."""
        while self._waiting:
            chunk: list[tuple[int, Place]] = []  # with the number among those under way
            while self._waiting and len(chunk) < _CHUNK:
                place = self._next or self._reader.index.locate(self._waiting[0])
                n_bytes = _n_bytes(place)
                if self._bytes + n_bytes > self._max_bytes and (self._under_way or chunk):
                    self._next = place
                    break
                self._waiting.popleft()
                self._next = None
                self._bytes += n_bytes
                chunk.append((len(chunk), place))
            if not chunk:
                return
            self._share_out(chunk)

    def _share_out(self, chunk: list[tuple[int, Place]]) -> None:
        """Shares a chunk out in the order of shards and offsets, which is the disk's."""
        tickets: list[_Ticket | None] = [None] * len(chunk)
        chunk.sort(key=_position)
        size = min(_JOB, -(-len(chunk) // len(self._threads)))
        for start in range(0, len(chunk), size):
            part = chunk[start : start + size]
            job = _Job([place for _, place in part])
            for number, (at, place) in enumerate(part):
                tickets[at] = _Ticket(place.row, _n_bytes(place), job, number)
            self._jobs.put(job)
        self._under_way.extend(ticket for ticket in tickets if ticket is not None)

    def _work(self) -> None:
        """What a thread does until it is told to end."""
        while (job := self._jobs.get()) is not None:
            try:
                for number, place in enumerate(job.places):
                    if self._closing:
                        break
                    job.results[number] = self._fetch(place)
            finally:
                job.done.release()
        self._reader.close_slides()

    def _fetch(self, place: Place) -> Payload | Exception:
        try:
            return _fetch(self._reader, place)
        except Exception as error:  # raised where the record is taken
            return error


def _fetch(reader: ShardReader, place: Place) -> Payload | RecordError:
    try:
        return reader.fetch(place)
    except RecordError as error:
        return error


def _position(numbered: tuple[int, Place]) -> tuple[int, int]:
    place = numbered[1]
    return place.shard, place.offset


def _n_bytes(place: Place) -> int:
    """Bytes that the record takes when it is read."""
    if place.reference is not None:
        return 3 * place.height_px * place.width_px
    return min(max(place.size, 0), MAX_BYTES)  # more is refused when it is read
