"""Store: named byte objects in a folder or, by `s3.py`, under an s3:// prefix."""

from __future__ import annotations

import errno
import glob
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Protocol, TypeVar

Data = TypeVar("Data", bytes, memoryview)


class StoreError(OSError):
    """A store could not do what was asked; the message names the object, the cause and what to check."""


class AbsentError(StoreError):
    """There is no such object."""


class Store(Protocol):
    """Objects by name. A name is a relative path with forward slashes; objects appear whole or not at all.

    `retries` counts what had to be asked for again, by reason; it stays empty for a folder.
    """

    url: str
    retries: Counter[str]

    def get(self, name: str) -> bytes:
        """The whole object."""

    def range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`; StoreError when the object is shorter."""

    def reading(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """The object as a file that can be sought in, of which only a piece is in memory."""

    def put(self, name: str, source: bytes | Path) -> None:
        """Store bytes or a file's content, replacing what was there."""

    def writing(self, name: str) -> AbstractContextManager[Path]:
        """A local file to write, which becomes the object when the block ends; no object if the block removes it."""

    def list(self, prefix: str = "") -> list[str]:
        """Sorted names that begin with `prefix`."""

    def exists(self, name: str) -> bool:
        """Whether the object is there."""

    def remove(self, name: str) -> None:
        """Do away with the object, if it is there."""


def told(retries: Counter[str]) -> str:
    """What `Store.retries` says, in words."""
    reasons = ", ".join(f"{count} x {reason}" for reason, count in retries.most_common())
    return f"{retries.total()} retries ({reasons})"


def open_store(url: str | Path) -> Store:
    """The store at a folder or s3://bucket/prefix. Nothing is created or asked before the first call."""
    text = str(url)
    if text.startswith("s3://"):
        from shards.s3 import S3Store  # with boto3, which a folder does not need

        return S3Store(text)
    if "://" in text:
        raise StoreError(f"{text}: only folders and s3:// addresses can be opened")
    return FolderStore(Path(text))


class FolderStore:
    """Objects as files under one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)
        self.retries: Counter[str] = Counter()

    def _path(self, name: str) -> Path:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not name:
            raise StoreError(f"{name!r}: an object's name is a relative path without '..'")
        return self.root / name

    def get(self, name: str) -> bytes:
        """The whole object."""
        with self.reading(name) as file:
            return file.read()

    def range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`."""
        with self.reading(name) as file:
            file.seek(start)
            return whole(file.read(length), f"{self.url}/{name}", start, length)

    def into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from `start`: without fresh memory, which takes longer than a file in memory."""
        with self.reading(name, buffering=0) as file:
            file.seek(start)
            found = 0
            while found < len(buffer) and (more := file.readinto(buffer[found:])):  # type: ignore[attr-defined]
                found += more
            whole(buffer[:found], f"{self.url}/{name}", start, len(buffer))

    @contextmanager
    def reading(self, name: str, buffering: int = -1) -> Iterator[IO[bytes]]:
        """The file, open."""
        try:
            with self._path(name).open("rb", buffering=buffering) as file:
                yield file
        except OSError as error:
            if isinstance(error, StoreError):
                raise
            kind = AbsentError if isinstance(error, FileNotFoundError) else StoreError
            raise kind(f"{self.url}/{name}: {error.strerror or error}") from error

    def put(self, name: str, source: bytes | Path) -> None:
        """Store bytes or a file's content, replacing what was there."""
        with self.writing(name) as path:
            if isinstance(source, bytes):
                path.write_bytes(source)
            else:
                shutil.copyfile(source, path)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A file beside the target, flushed to disk and renamed when the block ends; one writer of a name at a time."""
        path = self._path(name)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # by a killed process
                left.unlink(missing_ok=True)
            yield temporary
            if temporary.exists():
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, path)
                _flush(path.parent)
        except OSError as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"{self.url}/{name}: not written: {error.strerror or error}") from error
        finally:
            with suppress(OSError):  # of which there is word already, such as a file where a folder must be
                temporary.unlink()

    def list(self, prefix: str = "") -> list[str]:
        """Sorted names that begin with `prefix`, unfinished files left out."""
        files = (path for path in self.root.rglob("*") if path.is_file() and not path.name.endswith(".tmp"))
        return sorted(name for path in files if (name := path.relative_to(self.root).as_posix()).startswith(prefix))

    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        return self._path(name).is_file()

    def remove(self, name: str) -> None:
        """Delete the file, if it is there, and the folders below the root that are empty then."""
        path = self._path(name)
        try:
            path.unlink(missing_ok=True)
            for folder in path.relative_to(self.root).parents[:-1]:
                (self.root / folder).rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                raise StoreError(f"{self.url}/{name}: not removed: {error.strerror or error}") from error


def _flush(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def whole(data: Data, where: str, start: int, length: int) -> Data:
    """`data` if it has the length that was asked for; StoreError otherwise."""
    if len(data) != length:
        raise StoreError(f"{where}: {len(data)} of the {length} bytes from {start}; the object is truncated")
    return data
