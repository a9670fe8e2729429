"""A node's cache for its tests: a store that counts, waits and fails, and caches in front of it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

from shards.cache import Cache
from shards.store import FolderStore, StoreError

SIZE = 100_000  # of a tar


def content(name: str, size: int = SIZE) -> bytes:
    return random.Random(name).randbytes(size)


class Slow(FolderStore):
    """A folder that tells what it was asked for, waits at each request for `gate`, and fails while `failing`."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: list[tuple[str, int, int]] = []
        self.gate, self.failing = threading.Event(), False
        self.gate.set()

    def range(self, name: str, start: int, length: int) -> bytes:
        self.asked.append((name, start, length))
        self.gate.wait()
        if self.failing:
            raise StoreError(f"{name}: out of order")
        return super().range(name, start, length)


class Node:
    """A store of tars a, b, ... and caches in front of it, as the processes of one node have."""

    names = tuple(f"sub/{letter}.tar" for letter in "abcdefgh")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = Slow(path / "store")
        self.caches: list[Cache] = []

    def fill(self) -> None:
        for name in self.names:
            self.store.put(name, content(name))

    def cache(self, tars: float = 100, identity: str = "one", **sizes: int) -> Cache:
        known = {**dict.fromkeys(self.names, SIZE), **sizes}
        self.caches.append(Cache(self.store, self.path / "cache", int(tars * SIZE), identity, known))
        return self.caches[-1]

    def cached(self) -> list[str]:
        """Letters of the tars on disk, of any dataset."""
        return sorted(path.stem for path in (self.path / "cache").rglob("*.tar"))

    def hidden(self) -> list[Path]:
        return list((self.path / "cache").rglob(".*"))


def until(true: Callable[[], bool]) -> None:
    """Wait for what must come; the time is a bound for a run that fails."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def read(cache: Cache, letter: str) -> None:
    name = f"sub/{letter}.tar"
    assert cache.range(name, 12_345, 54_321) == content(name)[12_345 : 12_345 + 54_321]
