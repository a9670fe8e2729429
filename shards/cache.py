"""Cache: whole tars on a node's own disk, in front of a Store, shared by all processes of the node.

On disk, under `folder`:

    mcf-tars/IDENTITY/NAME          a cached tar, whole; its mtime tells when it was last used
    mcf-tars/IDENTITY/.NAME.part    one being downloaded, of its full size from the start, so that others count it
    mcf-tars/.ahead-ID              the tars that one process reads next, which nobody evicts
    mcf-tars/.lock                  held while room is made

Hidden files are locked (flock) by the process they belong to. The kernel frees the lock when that process ends, in
whatever way; a hidden file without a lock is left over and is removed. A tar is a plain file that appears by rename.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path, PurePosixPath
from stat import S_ISREG
from typing import BinaryIO
from uuid import uuid4

from shards.store import Store, StoreError, whole

CACHED = "mcf-tars"  # folder of the tars below the one that a config names
PIECE = 16 << 20  # bytes of one request of a download
THREADS = 4  # requests of one download under way at once
TOUCH = 2.0  # seconds; a use is noted at most so often
PAUSE = 5.0  # seconds without another attempt to cache what is read, after one found no room
ATTEMPTS = 3  # to read a tar that others evict at once

log = logging.getLogger(__name__)


class Cache:
    """A Store whose tars are read from a folder of this node; all but `range` is the store's own.

    Args:
        store: where the tars come from.
        folder: on a disk of this node; the cache keeps to a folder of its own in it.
        limit: bytes that all cached tars may take, those of other datasets included.
        identity: fingerprint of the dataset; datasets of different identity share no files.
        sizes: bytes of each tar; a name that is not in it is read straight from the store.

    `counters`: ranges read from tars that were there (hits), from tars that had to be fetched or waited for (misses)
    and straight from the store (bypassed); bytes_fetched for the cache; tars evicted. Of this process alone.

    Raises:
        StoreError: the folder cannot be written.
    """

    def __init__(self, store: Store, folder: Path, limit: int, identity: str, sizes: Mapping[str, int]) -> None:
        self.store, self.limit, self.sizes = store, limit, sizes
        self.url, self.retries = store.url, store.retries
        self.get, self.exists, self.list = store.get, store.exists, store.list
        self.reading, self.put, self.writing = store.reading, store.put, store.writing
        self.root = folder / CACHED
        self.folder = self.root / hashlib.sha256(identity.encode()).hexdigest()[:32]
        self.counters = dict.fromkeys(("hits", "misses", "bytes_fetched", "evicted", "bypassed"), 0)
        self._names: Sequence[str] | None = None  # to be fetched ahead, not yet taken up
        self._listed: frozenset[bytes] = frozenset()  # what is being fetched ahead, as others see it
        self._changed = threading.Condition()  # guards the list, the counters and the thread
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()
        self._warned, self._paused_until = False, 0.0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._alone():
                pass
        except OSError as error:
            advice = "choose a folder on a disk of this node that you may write, cache_dir=PATH, or none, cache_dir=''"
            raise StoreError(f"{folder}: cannot be a cache: {error.strerror or error}; {advice}") from error

    def range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`, from the cached tar, which is fetched first if it is absent.

        Straight from the store where the tar does not fit under the limit, or the disk is full or fails.

        Raises:
            StoreError: the name leaves the folder; what the store says; the cache was closed during a download.
        """
        try:
            reason, data = self._from_disk(name, start, length)
        except StoreError:
            raise
        except OSError as error:
            self._paused_until = time.monotonic() + PAUSE
            reason, data = f"{self.folder}: {error.strerror or error}", None
        if data is None:
            self._warn(name, reason)
            data = self.store.range(name, start, length)
            self._count("bypassed")
        return data

    def ahead(self, names: Sequence[str]) -> None:
        """Fetch these tars in the background, in this order; replaces the list given before.

        Args:
            names: what is read next, those being read now included. What is in the list of any process of the node is
                not evicted. A list may be longer than fits: it is filled from its beginning up to this process's share
                of the limit (all lists have the same), out of free room and of what is in no list.
        """
        with self._changed:
            self._names = names
            self._changed.notify()
            if self._thread is None and not self._closed.is_set():
                self._thread = threading.Thread(target=self._background, name="cache", daemon=True)
                self._thread.start()

    def forget(self, name: str) -> None:
        """Remove a cached tar, because its content is wrong; the next read fetches it again."""
        self._path(name).unlink(missing_ok=True)

    def close(self) -> None:
        """End the background thread; downloads under way are given up at their next piece, and leave nothing."""
        self._closed.set()
        with self._changed:
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(1.0)  # a request that hangs is not waited for

    def _path(self, name: str) -> Path:
        if not name or name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise StoreError(f"{name!r}: a tar's name is a relative path without '..'")
        return self.folder / name

    def _count(self, what: str, more: int = 1) -> None:
        with self._changed:
            self.counters[what] += more

    def _warn(self, name: str, reason: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("%s/%s is read without the cache (said once): %s", self.url, name, reason)

    # Reading

    def _from_disk(self, name: str, start: int, length: int) -> tuple[str, bytes | None]:
        """The bytes; or why the tar cannot be cached."""
        data = self._read(name, start, length)
        kind, attempts = "hits", 0
        while data is None and attempts < ATTEMPTS:
            kind, attempts = "misses", attempts + 1
            if reason := self._refusal(name) or self._fetch(name):
                return reason, None
            data = self._read(name, start, length)
        if data is not None:
            self._count(kind)
        return "other processes evict it at once; more cache_limit is needed", data

    def _read(self, name: str, start: int, length: int) -> bytes | None:
        """From the cached tar; None when it is absent, or not of its size."""
        with suppress(FileNotFoundError), self._path(name).open("rb") as file:
            state = os.fstat(file.fileno())
            if state.st_size == self.sizes.get(name):
                if time.time() - state.st_mtime > TOUCH:
                    os.utime(file.fileno())
                file.seek(start)
                return whole(file.read(length), f"{self.url}/{name}", start, length)
        return None

    def _refusal(self, name: str) -> str:
        """Why this tar is not cached now, if that is known without looking."""
        if name not in self.sizes:
            return "dataset.json does not tell its size"
        if self.sizes[name] > self.limit:
            return f"it has {self.sizes[name]} bytes, cache_limit is {self.limit}"
        return "there was no room a moment ago" if time.monotonic() < self._paused_until else ""

    # Downloading

    def _fetch(self, name: str, ahead: bool = False) -> str:
        """Have the tar on disk; why not, when there is no room. Whoever comes first downloads, all others wait."""
        path, size = self._path(name), self.sizes[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f".{path.name}.part")) as file:
            if path.exists() and path.stat().st_size == size:  # by now
                return ""
            if not self._reserve(file, size, ahead):
                self._paused_until = time.monotonic() + PAUSE
                return f"what is downloaded now or read next fills cache_limit={self.limit}, or the disk of {self.root}"
            self._download(name, Path(file.name))
            os.fsync(file.fileno())
            with self._alone():  # who makes room would miss it while its name changes
                os.replace(file.name, path)
        return ""

    def _download(self, name: str, target: Path) -> None:
        pieces = iter(range(0, self.sizes[name], PIECE))  # whose next() is atomic
        failures: list[Exception] = []

        def work() -> None:
            try:
                for start in pieces:
                    if failures or self._closed.is_set():
                        break
                    self._download_piece(name, start, target)
            except Exception as error:
                failures.append(error)

        # Daemons, unlike those of an executor: the end of the process does not wait for them.
        threads = [threading.Thread(target=work, name="cache-piece", daemon=True) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        if self._closed.is_set():
            raise StoreError(f"{self.url}/{name}: the cache was closed during the download")

    def _download_piece(self, name: str, start: int, target: Path) -> None:
        length = min(PIECE, self.sizes[name] - start)
        data = whole(self.store.range(name, start, length), f"{self.url}/{name}", start, length)
        with target.open("r+b") as file:
            file.seek(start)
            file.write(data)
        self._count("bytes_fetched", length)

    # Making room

    def _reserve(self, part: BinaryIO, size: int, ahead: bool) -> bool:
        """Give the file its full size, evicting what was used longest ago; False, with nothing evicted, if in vain."""
        with self._alone():
            os.ftruncate(part.fileno(), 0)  # what a killed process left
            tars, used = self._survey()
            lists = self._lists()
            if ahead and size + sum(taken for _, taken, tar in tars if tar in self._listed) > self.limit / len(lists):
                return False
            excess = size - min(self.limit - used, shutil.disk_usage(self.root).free)
            evicted = []
            for _, taken, tar in sorted(tars):
                if excess > 0 and not any(tar in names for names in lists):
                    excess -= taken
                    evicted.append(tar)
            if excess > 0:
                return False
            for tar in evicted:
                (self.root / os.fsdecode(tar)).unlink(missing_ok=True)
            os.posix_fallocate(part.fileno(), 0, size)
        self._count("evicted", len(evicted))
        return True

    def _alone(self) -> AbstractContextManager[BinaryIO]:
        return _locked(self.root / ".lock")

    def _survey(self) -> tuple[list[tuple[float, int, bytes]], int]:
        """(last use, bytes, path under root) of every tar of any dataset; all bytes taken, downloads included."""
        tars, used = [], 0
        for path in self.root.glob("*/**/*"):
            with suppress(FileNotFoundError):
                state, part = path.stat(), path.name.startswith(".") and path.suffix == ".part"
                if S_ISREG(state.st_mode) and not (part and _left_over(path)):
                    used += state.st_size
                    if not part:
                        tars.append((state.st_mtime, state.st_size, os.fsencode(path.relative_to(self.root))))
        return tars, used

    def _lists(self) -> list[frozenset[bytes]]:
        """What each process of the node reads next."""
        paths = [path for path in self.root.glob(".ahead-*") if not _left_over(path)]
        return [frozenset(path.read_bytes().split(b"\n")) for path in paths]

    # Filling ahead

    def _background(self) -> None:
        try:
            with _locked(self.root / f".ahead-{uuid4().hex}") as file:
                while (names := self._next_list()) is not None:
                    fitting = [name for name in names if self.sizes.get(name, self.limit + 1) <= self.limit]
                    self._publish(fitting, file)
                    self._fill(fitting)
        except OSError as error:
            log.warning("%s: nothing is cached ahead: %s", self.root, error)

    def _next_list(self) -> Sequence[str] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._names is not None or self._closed.is_set())
            names, self._names = self._names, None
            return None if self._closed.is_set() else names

    def _publish(self, names: Sequence[str], file: BinaryIO) -> None:
        """Tell other processes what is not to be evicted."""
        self._listed = frozenset(os.fsencode(self._path(name).relative_to(self.root)) for name in names)
        with self._alone():  # under which others read it
            file.truncate(0)
            file.write(b"\n".join(self._listed))
            file.flush()

    def _fill(self, names: Sequence[str]) -> None:
        for name in names:
            if self._names is not None or self._closed.is_set():
                return
            try:
                if self._fetch(name, ahead=True):
                    return
            except StoreError as error:
                log.info("not cached ahead: %s", error)  # who reads it will meet this again


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """The file, made if absent, and locked, against threads as well as processes; removed at the end if not renamed."""
    while True:
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, path):  # its owner before us removed or renamed it
                continue
            try:
                yield file
            finally:
                if _is_at(file, path):
                    path.unlink()
                fcntl.flock(file, fcntl.LOCK_UN)  # a forked child may hold the file open
            return


def _left_over(path: Path) -> bool:
    """Whether the file belonged to a process that is no more, or is gone; then it is removed."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):
                path.unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass
    return True


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
