"""Reader: samples are fetched, checked and decoded ahead of the consumer, by threads.

From a disk, the thread that decodes a sample reads it first. Across a network other threads fetch runs (one sample, or
a block of neighbours) by ranged reads; a run is fetched once and held until its last sample is made. Runs are begun in
the order of their first samples, as far ahead as the memory for them allows; what is decoded ahead is bounded too.
Reading, checking and decoding release the GIL.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from shards.cache import Cache
from shards.manifest import Part, Row, Selection
from shards.memory import Memory
from shards.reading import Reading
from shards.sample import Sample, checksum, decode
from shards.store import FolderStore, Store, StoreError

FETCHED_AHEAD = 4  # times as many samples as are decoded ahead

T = TypeVar("T")
Members = dict[str, memoryview]
Spans = Mapping[str, tuple[int, memoryview]]  # by tar: where the bytes begin in it, and the bytes


class StreamError(OSError):
    """A sample cannot be read, or its bytes are not those that the manifest promises."""


class Job(NamedTuple):
    """A sample to make: `row` of a part, out of a run of its rows, of which later jobs take others if `more`."""

    position: int
    part: int
    row: int
    run: tuple[int, int]
    more: bool


class Extent(NamedTuple):
    """Bytes of a tar."""

    shard: str
    start: int
    end: int


class Reader:
    """Makes the samples of jobs in their order.

    `ledger`: samples, bytes and requests so far, seconds that the consumer waited, and the most bytes held at once.
    """

    def __init__(self, selection: Selection, reading: Reading) -> None:
        self.selection, self.reading = selection, reading
        self.ledger: dict[str, float] = {"samples": 0, "bytes": 0, "requests": 0, "wait": 0.0, "held": 0}
        self.stores = [_cached(part, reading) for part in selection.parts]
        self.near = all(isinstance(store, FolderStore | Cache) for store in self.stores)
        self._memory = Memory()
        self._decoders = [_decoder(part, selection.contract.sensors, self._memory) for part in selection.parts]
        self._largest = 1
        self._lock = threading.Lock()

    @property
    def _depth(self) -> int:
        """Samples that are decoded ahead, by what the largest took so far."""
        return max(2, min(self.reading.ahead, self.reading.memory // self._largest))

    def members(self, part: int, members: Members) -> Members:
        """Undecoded."""
        return members

    def decoded(self, part: int, members: Members) -> Sample:
        """Decoded."""
        return self._decoders[part](members)

    def run(self, jobs: Iterator[Job], make: Callable[[int, Members], T]) -> Iterator[tuple[T, int]]:
        """What `make` makes of each job's members, and the job's position."""
        begun, ahead = deque[Job](), deque[tuple[Job, Future[T]]]()
        makers = ThreadPoolExecutor(self.reading.threads, "decode")
        window = None if self.near else _Window(self)
        job = next(jobs, None)
        try:
            while True:
                while job and len(begun) < FETCHED_AHEAD * self.reading.ahead:
                    if (ready := window.begin(job) if window else job) is None:
                        break
                    begun.append(ready)
                    job = next(jobs, None)
                while begun and len(ahead) < self._depth:
                    ahead.append((begun[0], makers.submit(self._make, begun.popleft(), window, make)))
                if not ahead:
                    return
                yield self._take(*ahead.popleft())
        finally:
            for pool in (window.pool, makers) if window else (makers,):
                pool.shutdown(wait=False, cancel_futures=True)

    def sample(self, part: int, row: int) -> Sample:
        """One sample, now."""
        found = self.selection.parts[part].row(row)
        return self.decoded(part, self._checked(part, found, self.load(part, _extents([found]))))

    def _take(self, job: Job, future: Future[T]) -> tuple[T, int]:
        start = time.perf_counter()
        made = future.result()
        self.ledger["wait"] += time.perf_counter() - start
        self.ledger["samples"] += 1
        return made, job.position

    def _make(self, job: Job, window: _Window | None, make: Callable[[int, Members], T]) -> T:
        row = self.selection.parts[job.part].row(job.row)
        spans = window.spans(job) if window else self.load(job.part, _extents([row]))
        members = self._checked(job.part, row, spans)
        made = make(job.part, members)
        self._largest = max(self._largest, 2 * sum(map(len, members.values())))
        if window:
            window.done(job)
        return made

    def _checked(self, part: int, row: Row, spans: Spans) -> Members:
        """The members of a sample, if their checksum is right; read again where a cache may have been wrong."""
        store = self.stores[part]
        for attempt in range(3 if isinstance(store, Cache) else 1):
            if attempt == 2 and isinstance(store, Cache):  # no other thread has mended it meanwhile
                for shard in {member.shard for member in row.members}:
                    store.forget(shard)
            if attempt:
                spans = self.load(part, _extents([row]))
            members = _cut(row, spans)
            if _sound(row, members):
                return members
        raise StreamError(
            f"{store.url}/{row.members[0].shard}: sample {row.key} differs from the manifest's checksum; "
            "the shard was altered or damaged (mcf shards verify), restore it or build it again"
        )

    def load(self, part: int, extents: list[Extent]) -> Spans:
        """Read these bytes now."""
        store, spans = self.stores[part], {}
        for shard, start, end in extents:
            try:
                if isinstance(store, FolderStore):
                    buffer = self._memory.empty(end - start, np.uint8).data
                    store.into(shard, start, buffer)
                    spans[shard] = start, buffer
                else:
                    spans[shard] = start, memoryview(store.range(shard, start, end - start))
            except StoreError as error:
                raise StreamError(f"bytes {start} to {end} of {error}") from error
        with self._lock:
            self.ledger["bytes"] += sum(len(data) for _, data in spans.values())
            self.ledger["requests"] += len(extents)
        return spans


@dataclass
class _Held:
    """A run that is being fetched or held: its size, the jobs begun that are not done, and whether more will come."""

    data: Future[Spans]
    size: int
    jobs: int = 0
    more: bool = True


class _Window:
    """The runs that one iteration has fetched or is fetching from far away, within the memory for them."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.pool = ThreadPoolExecutor(reader.reading.requests, "fetch")
        self._held: dict[tuple[int, int, int], _Held] = {}
        self._bytes = self._jobs = 0
        self._lock = threading.Lock()

    def begin(self, job: Job) -> Job | None:
        """Have the job's run fetched, or only its row where runs fill the memory; None where it is to wait for room."""
        alone = job._replace(run=(job.row, job.row + 1), more=False)
        with self._lock:
            if not self._has(job, self.reader.reading.memory):
                if self._jobs:
                    return None
                # Nothing is under way that would make room.
                job = alone
                if not self._has(job, self.reader.reading.memory):
                    self._held.clear()  # all idle; what is still needed is fetched again
                    self._bytes = 0
                    self._has(job, math.inf)
            held = self._held[job.part, *job.run]
            held.jobs, held.more = held.jobs + 1, job.more
            self._jobs += 1
        return job

    def spans(self, job: Job) -> Spans:
        """The bytes of a job that was begun, when they are there."""
        return self._held[job.part, *job.run].data.result()

    def done(self, job: Job) -> None:
        """The job's sample is made; a run that no job needs any more is given up."""
        name = (job.part, *job.run)
        with self._lock:
            held = self._held[name]
            held.jobs, self._jobs = held.jobs - 1, self._jobs - 1
            if not held.jobs and not held.more:
                self._bytes -= self._held.pop(name).size

    def _has(self, job: Job, room: float) -> bool:
        """Whether the job's run is held or, now, begun; not where it would take more than `room` bytes in all."""
        name, part = (job.part, *job.run), self.reader.selection.parts[job.part]
        if name in self._held:
            return True
        # In tars of ours a run is one piece, between its first row and its last.
        numbers = range(*job.run) if part.foreign else {job.run[0], job.run[1] - 1}
        extents = _extents([part.row(number) for number in numbers])
        size = sum(extent.end - extent.start for extent in extents)
        if self._bytes + size > room:
            return False
        self._held[name] = _Held(self.pool.submit(self.reader.load, job.part, extents), size)
        self._bytes += size
        self.reader.ledger["held"] = max(self.reader.ledger["held"], self._bytes)
        return True


def _extents(rows: Sequence[Row]) -> list[Extent]:
    """From the first byte to the last of these rows in each tar."""
    found: dict[str, Extent] = {}
    for _, shard, offset, size in (member for row in rows for member in row.members):
        _, start, end = found.get(shard, Extent(shard, offset, 0))
        found[shard] = Extent(shard, min(start, offset), max(end, offset + size))
    return list(found.values())


def _cut(row: Row, spans: Spans) -> Members:
    found = {}
    for name, shard, offset, size in row.members:
        base, data = spans[shard]
        found[name] = data[offset - base : offset - base + size]
    return found


def _sound(row: Row, members: Members) -> bool:
    return row.checksum is None or row.checksum == checksum(members)


def _cached(part: Part, reading: Reading) -> Store | Cache:
    """The part's store, behind the node's cache if there is one; a folder is not cached."""
    if not reading.cache_dir or isinstance(part.store, FolderStore):
        return part.store
    return Cache(part.store, Path(reading.cache_dir), reading.cache_limit, part.identity["dataset"], part.sizes)


def _decoder(part: Part, sensors: tuple[str, ...], memory: Memory) -> Callable[[Members], Sample]:
    """How the members of one sample become a sample."""
    if part.foreign is None:
        return partial(decode, sensors=sensors, empty=memory.empty)
    from shards import foreign  # with GDAL, which our own shards do not need

    return partial(foreign.decode, parts=foreign.parts_of(part.foreign), sensors=sensors)
