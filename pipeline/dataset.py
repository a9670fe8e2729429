"""From a stream of samples to batches on their way to the device, read ahead while the model computes."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pipeline.augment import augment
from pipeline.batch import Batch, collate
from shards.contract import Contract
from shards.sample import Sample

T = TypeVar("T")


def micro_batches(stream: Iterable[tuple[Sample, int]], size: int, contract: Contract) -> Iterator[Batch]:
    """Batches of `size` samples in the stream's order; of a finite stream the last may be smaller."""
    samples = iter(stream)
    while items := list(itertools.islice(samples, size)):
        yield collate(items, contract)


def training_batches(
    stream: Iterable[tuple[Sample, int]], size: int, contract: Contract, augment_seed: int | None
) -> Iterator[Batch]:
    """Micro-batches, turned and flipped unless `augment_seed` is None, prepared ahead of the model."""
    batches = micro_batches(stream, size, contract)
    return read_ahead(batches if augment_seed is None else (augment(batch, augment_seed) for batch in batches))


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
