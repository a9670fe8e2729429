"""Stream: a selection's samples in the order of their positions, for ever, without a seam between epochs.

`order.py` says which sample stands at a position, `reader.py` fetches and decodes ahead. The whole state is a position,
and it is in the caller's hands: every item comes with its own. To go on after the global batch that was consumed last,
begin at the next batch's first position; nothing is read again, whatever the number of ranks, workers and threads was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar

from shards.cache import Cache
from shards.manifest import Selection, differences
from shards.order import BLOCK, Mix, Order, OrderError
from shards.reader import Job, Members, Reader, StreamError
from shards.reading import Reading
from shards.sample import Sample

__all__ = ["Share", "StateError", "Stream", "StreamError"]

FORMAT_VERSION = 1
DENSE = 0.5  # share of a tar's samples from which on reading across those that are not selected is no waste

T = TypeVar("T")


class StateError(ValueError):
    """A saved state belongs to another order; the message says what differs."""


@dataclass(frozen=True)
class Share:
    """Which slots of every global batch this reader takes: slot s goes to rank s mod ranks.

    With a number of lanes that is a multiple of `ranks`, a rank so reads only its own lanes. Of a rank's micro-batches
    (that many of its slots in a row), counted from where the stream begins, worker w takes every `workers`-th.
    """

    global_batch: int
    ranks: int = 1
    rank: int = 0
    micro_batch: int = 1
    workers: int = 1
    worker: int = 0

    def __post_init__(self) -> None:
        """Refuse shares of unequal size, and those that are not there."""
        counts = (self.global_batch, self.ranks, self.micro_batch, self.workers)
        exists = min(counts) > 0 and 0 <= self.rank < self.ranks and 0 <= self.worker < self.workers
        if not exists or self.global_batch % (self.ranks * self.micro_batch):
            raise OrderError(
                f"global batch {self.global_batch}, rank {self.rank} of {self.ranks}, worker {self.worker} of "
                f"{self.workers}, micro-batches of {self.micro_batch}: the batch must be a multiple of the ranks times "
                "the micro-batch; ranks and workers are counted from 0"
            )

    def slots(self, batch: int) -> range:
        """Positions of global batch number `batch` that belong to this rank."""
        return range(batch * self.global_batch + self.rank, (batch + 1) * self.global_batch, self.ranks)

    def positions(self, batch: int) -> Iterator[int]:
        """This worker's positions from global batch number `batch` on."""
        slots = (position for number in count(batch) for position in self.slots(number))
        for number, position in enumerate(slots):
            if number // self.micro_batch % self.workers == self.worker:
                yield position


class Stream:
    """Samples of a selection by position.

    Args:
        selection: what to read.
        seed: of the order.
        lanes: places in the epoch that are read side by side.
        share: this reader's slots of each global batch.
        position: where to begin; a multiple of the global batch.
        reading: threads, memory, cache.

    Raises:
        OrderError: a position inside a batch.
    """

    def __init__(
        self,
        selection: Selection,
        seed: int,
        lanes: int,
        share: Share,
        position: int = 0,
        reading: Reading | None = None,
    ) -> None:
        if position % share.global_batch:
            raise OrderError(f"position {position} is not a multiple of the global batch {share.global_batch}")
        self.selection, self.share, self.position = selection, share, position
        self.order = order_of(selection, seed, lanes)
        self.reader = Reader(selection, reading or Reading())
        self.whole_blocks = self._takes_whole_blocks()

    def shared(self, selection: Selection, share: Share) -> Stream:
        """The same stream over an equal selection for another share, from the same position on."""
        order = self.order.orders[0]
        return Stream(selection, order.seed, order.lanes, share, self.position, self.reader.reading)

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process: what it was made of, so that files are opened anew there."""
        order = self.order.orders[0]
        return Stream, (self.selection, order.seed, order.lanes, self.share, self.position, self.reader.reading)

    @property
    def ledger(self) -> dict[str, float]:
        """Counts since the stream was made.

        Samples, bytes and requests, requests that were sent again (`retries`), seconds that the consumer waited, the
        most bytes of tars `held` at once; behind a cache also its `hits`, `misses` and so on.
        """
        found = {**self.reader.ledger, "retries": sum(store.retries.total() for store in self.reader.stores)}
        for store in self.reader.stores:
            if isinstance(store, Cache):
                found = {**found, **{name: found.get(name, 0) + more for name, more in store.counters.items()}}
        return found

    def __iter__(self) -> Iterator[tuple[Sample, int]]:
        """This rank's samples from `position` on, each with its own position."""
        return self._read(self.reader.decoded)

    def members(self) -> Iterator[tuple[Members, int]]:
        """The same in the same order, undecoded: the bytes of each sample's members by name, checksum verified."""
        return self._read(self.reader.members)

    def once(self) -> Iterator[tuple[Sample, int]]:
        """Every sample of the selection exactly once in manifest order, rank r taking every r-th; for evaluation."""
        rows = range(self.share.rank, len(self.selection), self.share.ranks)
        return self.reader.run(map(self._alone, rows), self.reader.decoded)

    def at(self, key: str) -> Sample:
        """The sample with this key; KeyError when the selection has none."""
        return self.row(self.selection.row_of_key[key])

    def row(self, number: int) -> Sample:
        """The sample of this row of the selection."""
        job = self._alone(number)
        return self.reader.sample(job.part, job.row)

    def state(self, position: int) -> dict[str, Any]:
        """What is to be kept, as JSON, to go on at `position`: that of the next global batch."""
        order = self.order.orders[0]
        identity = {"seed": order.seed, "lanes": order.lanes, "data": self.selection.identity}
        return {"format_version": FORMAT_VERSION, "position": position, **identity}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, with any number of ranks, workers and threads.

        Raises:
            StateError: it is of another order: another dataset, filter, seed, or number of lanes; which, it says.
            OrderError: its position is inside a global batch of this stream.
        """
        here = self.state(0)
        if found := [
            f"{name}: {state.get(name)} in the state, {here[name]} here"
            for name in ("format_version", "seed", "lanes")
            if state.get(name) != here[name]
        ] + differences(state.get("data", []), here["data"]):
            raise StateError(f"this state belongs to another order of samples; {'; '.join(found)}")
        if state["position"] % self.share.global_batch:
            raise OrderError(
                f"position {state['position']} is not a multiple of the global batch {self.share.global_batch}"
            )
        self.position = state["position"]

    def close(self) -> None:
        """End what a cache does in the background."""
        for store in self.reader.stores:
            if isinstance(store, Cache):
                store.close()

    def _read(self, make: Callable[[int, Members], T]) -> Iterator[tuple[T, int]]:
        positions = self.share.positions(self.position // self.share.global_batch)
        return self.reader.run(map(self._job, positions), make)

    def _alone(self, number: int) -> Job:
        part, row = self.selection.place(number)
        return Job(number, part, row, (row, row + 1), False)

    def _job(self, position: int) -> Job:
        part, own = self.order.own(position)
        order = self.order.orders[part]
        block, offset = order.block(own)
        first = int(order.starts[block.shard]) + block.first
        row = first + block.taken[offset]
        store = self.reader.stores[part]
        if isinstance(store, Cache) and (offset == 0 or position < self.position + self.share.global_batch):
            shards = self.selection.parts[part].shards
            store.ahead([shards[shard][0] for shard in order.upcoming(own)])
        if self.whole_blocks:
            return Job(position, part, row, (first, first + block.count), offset + 1 < block.count)
        return Job(position, part, row, (row, row + 1), False)

    def _takes_whole_blocks(self) -> bool:
        """Whether to fetch blocks by one read: across a network, where all their samples are wanted and fit.

        Otherwise samples are fetched one by one, which from a disk is as quick.
        """
        if self.reader.near:
            return False
        part, *others = self.selection.parts
        lanes = self.order.orders[0].lanes
        mine = not others and lanes % self.share.ranks == 0 and self.share.workers == 1
        block = BLOCK * sum(part.sizes.values()) / len(part)  # what lies between the selected samples included
        dense = len(part) >= DENSE * len(part.table) and part.foreign is None
        return mine and dense and 1.25 * block * lanes / self.share.ranks <= self.reader.reading.memory


def order_of(selection: Selection, seed: int, lanes: int) -> Mix:
    """The order of a selection's samples."""
    orders = [Order([samples for _, samples in part.shards], seed, lanes) for part in selection.parts]
    return Mix(orders, [part.weight for part in selection.parts], seed)
