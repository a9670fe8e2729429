"""From a stream of samples to batches on their way to the device, read ahead while the model computes."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from typing import TypeVar

import torch
from torch.utils.data import IterableDataset, get_worker_info

from pipeline.augment import Augmentation
from pipeline.batch import PLAIN, Batch, collate
from pipeline.ranks import added_up
from shards.contract import Contract
from shards.memory import Memory
from shards.sample import Sample
from shards.stream import Stream

T = TypeVar("T")


def micro_batches(
    stream: Iterable[tuple[Sample, int]], size: int, contract: Contract, how: Augmentation = PLAIN, threads: int = 1
) -> Iterator[Batch]:
    """Augmented batches of `size` samples in the stream's order; of a finite stream the last may be smaller.

    So many threads normalise.
    """
    samples, memory = iter(stream), Memory()
    with ThreadPoolExecutor(threads, "normalise") as pool:
        while items := list(itertools.islice(samples, size)):
            yield collate(items, contract, how, memory.empty, pool.map)


def training_batches(
    stream: Iterable[tuple[Sample, int]], size: int, contract: Contract, how: Augmentation, threads: int = 1
) -> Iterator[Batch]:
    """Micro-batches, augmented and, for a GPU, in pinned memory, prepared ahead of the model."""
    batches = micro_batches(stream, size, contract, how, threads)
    return read_ahead((batch.pin_memory() for batch in batches) if torch.cuda.is_available() else batches)


def traffic(stream: Stream) -> Callable[[Mapping[str, object]], Mapping[str, object]]:
    """A hook of the loop: `io`, what the streams of all ranks have done since the step before. Collective.

    `held` is not a difference: the most bytes that lay decoded or waiting so far.
    """
    before: dict[str, float] = {}

    def tell(_: Mapping[str, object]) -> Mapping[str, object]:
        now = stream.ledger
        since = {name: value if name == "held" else value - before.get(name, 0) for name, value in now.items()}
        before.update(now)
        return {"io": added_up(since)}

    return tell


class StreamDataset(IterableDataset[Batch]):
    """A stream for `torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=W)`, which Lightning takes too.

    Yields this rank's micro-batches (`share.micro_batch`) for ever; worker w makes every W-th, so that their order is
    the same for any W. To go on after step S, `stream.load(stream.state(S * global_batch))` before the loader is made.

    Args:
        stream: where to read, from its position on.
        contract: how to normalise; `Contract.normalised` makes one of the selection's.
        how: augmentation.
    """

    def __init__(self, stream: Stream, contract: Contract, how: Augmentation | None = None) -> None:
        self.stream, self.contract, self.how = stream, contract, how or Augmentation()

    def __iter__(self) -> Iterator[Batch]:
        """The micro-batches of this process."""
        info, stream = get_worker_info(), self.stream
        if info is not None:
            # A copy with files of its own: processes that were forked share the position in an open one.
            share = replace(stream.share, workers=info.num_workers, worker=info.id)
            stream = stream.shared(deepcopy(stream.selection), share)
        threads = stream.reader.reading.threads
        yield from micro_batches(stream, stream.share.micro_batch, self.contract, self.how, threads)


def read_ahead(items: Iterator[T], depth: int = 4) -> Iterator[T]:
    """The same items, up to `depth` of them prepared by a thread beforehand; errors arrive in their place."""
    end = object()
    with ThreadPoolExecutor(1, "read-ahead") as pool:
        waiting = deque(pool.submit(next, items, end) for _ in range(depth))
        try:
            while (item := waiting.popleft().result()) is not end:
                waiting.append(pool.submit(next, items, end))
                yield item  # type: ignore[misc]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
