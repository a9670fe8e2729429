"""Stream: a selection's samples in the order of their positions, for ever, without a seam between epochs.

The plan: `order.py` says which block of which shard holds a position. A block's samples are one run of bytes in the
tar, fetched by one ranged request into a small buffer (the last few blocks per lane stay there, which is all that an
order by lanes needs). A pool of threads fetches and decodes ahead of the consumer; both release the GIL. What cannot
be avoided: with fewer lanes than ranks, ranks read the same blocks.

The whole state is a position, and it is in the caller's hands: every item comes with its own.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import crc32c

from shards.manifest import Selection
from shards.order import Order
from shards.sample import Sample, decode

AHEAD = 64  # samples fetched and decoded before they are asked for
THREADS = 2
BUFFER_BYTES = 512 << 20
Spans = dict[str, tuple[int, bytes]]  # by tar: where the bytes begin in it, and the bytes


class StreamError(OSError):
    """A sample's bytes are not those that the manifest promises."""


@dataclass(frozen=True)
class Share:
    """Which slots of every global batch this reader takes: slot s goes to rank s mod ranks.

    With a number of lanes that is a multiple of `ranks`, a rank so reads only its own lanes.
    """

    global_batch: int
    ranks: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        """Refuse shares of unequal size."""
        if self.global_batch % self.ranks or not 0 <= self.rank < self.ranks:
            raise ValueError(
                f"global batch {self.global_batch} over {self.ranks} ranks (rank {self.rank}): "
                "the batch must be a multiple of the ranks"
            )

    def slots(self, batch: int) -> range:
        """Positions of global batch number `batch` that belong to this rank."""
        return range(batch * self.global_batch + self.rank, (batch + 1) * self.global_batch, self.ranks)


class Stream:
    """Samples of a selection by position.

    Args:
        selection: what to read.
        seed: of the order.
        lanes: places in the epoch that are read side by side.
        share: this reader's slots of each global batch.
        position: where to begin; a multiple of the global batch.

    Raises:
        ValueError: a position inside a batch.
    """

    def __init__(self, selection: Selection, seed: int, lanes: int, share: Share, position: int = 0) -> None:
        if position % share.global_batch:
            raise ValueError(f"position {position} is not a multiple of the global batch {share.global_batch}")
        self.selection, self.share, self.position = selection, share, position
        self.order = Order([count for _, count in selection.shards], seed, lanes)
        self._reader = _Reader(selection)

    @property
    def ledger(self) -> dict[str, float]:
        """Samples, bytes and requests so far, requests that were sent again, and seconds that the consumer waited."""
        return {**self._reader.ledger, "retries": self.selection.store.retries.total()}

    def __iter__(self) -> Iterator[tuple[Sample, int]]:
        """This rank's samples from `position` on, each with its own position."""
        first = self.position // self.share.global_batch
        positions = (p for batch in _count(first) for p in self.share.slots(batch))
        jobs = ((p, self.order.sample(p), self._run_of(p)) for p in positions)
        return self._reader.run(jobs)

    def once(self) -> Iterator[tuple[Sample, int]]:
        """Every sample of the selection exactly once in manifest order, rank r taking every r-th; for evaluation."""
        rows = range(self.share.rank, len(self.selection), self.share.ranks)
        return self._reader.run((row, row, (row, row + 1)) for row in rows)

    def at(self, key: str) -> Sample:
        """The sample with this key; KeyError when the selection has none."""
        row = self.selection.row_of_key[key]
        return self._reader.sample(row, (row, row + 1))

    def _run_of(self, position: int) -> tuple[int, int]:
        block, _ = self.order.block(position)
        first = int(self.order.starts[block.shard]) + block.first
        return first, first + block.count


def _count(start: int) -> Iterator[int]:
    while True:
        yield start
        start += 1


def _decoder(selection: Selection) -> Callable[[Mapping[str, bytes]], Sample]:
    """How the members of one sample become a sample."""
    sensors = selection.contract.sensors
    if selection.foreign is None:
        return partial(decode, sensors=sensors)
    from shards import foreign  # with GDAL, which our own shards do not need

    return partial(foreign.decode, parts=foreign.parts_of(selection.foreign), sensors=sensors)


class _Reader:
    """Fetches runs of rows and decodes samples out of them."""

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self.ledger: dict[str, float] = {"samples": 0, "bytes": 0, "requests": 0, "wait": 0.0}
        self._decode = _decoder(selection)
        rows = selection.rows
        self._shards = rows["shard"].combine_chunks()
        self._members = rows["members"].combine_chunks()
        self._checksums = rows["checksum"].combine_chunks()
        self._runs: OrderedDict[tuple[int, int], Future[Spans]] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()

    def run(self, jobs: Iterator[tuple[int, int, tuple[int, int]]]) -> Iterator[tuple[Sample, int]]:
        """Samples of (position, row, run of rows) jobs, in order, made ahead by threads."""
        ahead: deque[tuple[int, Future[Sample]]] = deque()
        with ThreadPoolExecutor(THREADS, "stream") as pool:
            try:
                for position, row, run in jobs:
                    ahead.append((position, pool.submit(self.sample, row, run)))
                    if len(ahead) >= AHEAD:
                        yield self._take(ahead)
                while ahead:
                    yield self._take(ahead)
            finally:
                for _, future in ahead:
                    future.cancel()

    def _take(self, ahead: deque[tuple[int, Future[Sample]]]) -> tuple[Sample, int]:
        position, future = ahead.popleft()
        start = time.perf_counter()
        sample = future.result()
        self.ledger["wait"] += time.perf_counter() - start
        self.ledger["samples"] += 1
        return sample, position

    def sample(self, row: int, run: tuple[int, int]) -> Sample:
        """Decode one row, fetching its run of rows unless it is held already."""
        spans = self._fetch(run)
        parts, checksum = {}, 0
        for member in self._members_of(row):
            base, data = spans[member["shard"]]
            start = member["offset"] - base
            parts[member["name"]] = data[start : start + member["bytes"]]
            checksum = crc32c.crc32c(parts[member["name"]], checksum)
        if checksum != (self._checksums[row].as_py() if self._checksums[row].is_valid else checksum):
            key = self.selection.rows["key"][row].as_py()
            raise StreamError(
                f"{self.selection.store.url}/{self._shards[row].as_py()}: sample {key} differs from the manifest's "
                "checksum; the shard was altered or damaged (mcf shards verify), restore it or build it again"
            )
        return self._decode(parts)

    def _members_of(self, row: int) -> list[dict[str, Any]]:
        shard = self._shards[row].as_py()
        return [{"shard": shard, **member} for member in self._members[row].as_py()]

    def _fetch(self, run: tuple[int, int]) -> Spans:
        """The bytes of a run of rows; whoever asks first fetches, the others wait for it."""
        with self._lock:
            future = self._runs.get(run)
            mine = future is None
            if future is None:
                future = self._runs[run] = Future()
            self._runs.move_to_end(run)
        if mine:
            self._load(run, future)
        return future.result()

    def _load(self, run: tuple[int, int], future: Future[Spans]) -> None:
        try:
            spans = {shard: self._range(shard, *ends) for shard, ends in self._extents(run).items()}
        except BaseException as error:
            with self._lock:
                self._runs.pop(run, None)
            future.set_exception(error)
            return
        future.set_result(spans)
        for _, data in spans.values():
            self._account(len(data))

    def _extents(self, run: tuple[int, int]) -> dict[str, tuple[int, int]]:
        """First and last byte of a run of rows in each tar; in ours a run is one piece."""
        rows = range(*run) if self.selection.foreign else {run[0], run[1] - 1}
        found: dict[str, tuple[int, int]] = {}
        for member in (member for row in rows for member in self._members_of(row)):
            start, end = member["offset"], member["offset"] + member["bytes"]
            first, last = found.get(member["shard"], (start, end))
            found[member["shard"]] = min(first, start), max(last, end)
        return found

    def _range(self, shard: str, start: int, end: int) -> tuple[int, bytes]:
        return start, self.selection.store.range(shard, start, end - start)

    def _account(self, fetched: int) -> None:
        with self._lock:
            self.ledger["bytes"] += fetched
            self.ledger["requests"] += 1
            self._held += fetched
            for run in list(self._runs):
                if self._held <= BUFFER_BYTES or len(self._runs) <= 1:
                    break
                if self._runs[run].done():
                    self._held -= sum(len(data) for _, data in self._runs.pop(run).result().values())
