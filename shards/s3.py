"""S3Store: objects under a bucket and prefix of an S3 service; and how GDAL reads there.

Endpoint, region, profile and credentials come from the usual environment: AWS_ENDPOINT_URL, AWS_REGION, AWS_PROFILE,
AWS_ACCESS_KEY_ID and so on; AWS_NO_SIGN_REQUEST=YES reads public buckets without credentials.

A request that fails in a way that may pass (a busy server, a timeout, a connection cut also in the middle of a body) is
sent again after a growing pause, and counted. What was put is compared with what the server then holds.
"""

from __future__ import annotations

import base64
import builtins
import hashlib
import io
import logging
import os
import re
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import Path
from random import SystemRandom
from tempfile import TemporaryDirectory
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

import boto3
import crc32c
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, FlexibleChecksumError

from shards.s3_errors import ERRORS, line, understand
from shards.store import AbsentError, StoreError, whole

ATTEMPTS = 8  # per request
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0  # seconds; each pause is twice the one before
CONNECT_TIMEOUT, READ_TIMEOUT = 10, 60  # seconds without a byte
PART = 16 << 20  # bytes of one part of an upload; more where there would be over PARTS
PARTS = 10_000
THREADS = 4  # parts under way at once

log = logging.getLogger(__name__)
_counting = threading.Lock()  # adding to a Counter is not atomic


class S3Store:
    """Objects under one bucket and prefix of an S3 service, through boto3."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        self.bucket, self.prefix = parts.netloc, parts.path.strip("/")
        if not self.bucket:
            raise StoreError(f"{url!r}: write s3://BUCKET/PREFIX")
        self.retries: Counter[str] = Counter()

    def get(self, name: str) -> bytes:
        """The whole object."""
        return bytes(self._ask("get_object", name)["Body"])

    def range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`."""
        if length == 0:
            return b""
        where, asked = f"{self.url}/{name}", f"bytes={start}-{start + length - 1}"
        reply = self._ask("get_object", name, Range=asked)
        if not reply.get("ContentRange", "").startswith(f"bytes {start}-"):
            raise StoreError(f"{where}: asked for {asked}, but the server sent other bytes; it cannot serve shards")
        return whole(bytes(reply["Body"]), where, start, length)

    @contextmanager
    def reading(self, name: str) -> Iterator[IO[bytes]]:
        """The object as a file, fetched in pieces of PART bytes."""
        size = self._ask("head_object", name)["ContentLength"]
        with io.BufferedReader(_Object(self, name, size), PART) as file:
            yield file

    def put(self, name: str, source: bytes | Path) -> None:
        """One put, or a multipart upload of what is large; S3 shows the object only when all of it has arrived.

        Every request carries the crc32c of its bytes for the server to compare, unless the environment has
        AWS_REQUEST_CHECKSUM_CALCULATION=when_required. At the end, what the server holds is compared with the source.
        """
        content = _Content(source, source.stat().st_size if isinstance(source, Path) else len(source))
        sums = _connection().client.meta.config.request_checksum_calculation != "when_required"
        if len(content.starts) > 1:
            self._put_parts(name, content, sums)
        else:
            self._ask("put_object", name, Body=content.part(0), **_sum(content.part(0), sums))
        self._compare(name, content)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A temporary file, put when the block ends."""
        with TemporaryDirectory() as folder:
            path = Path(folder) / Path(name).name
            yield path
            if path.exists():
                self.put(name, path)

    def _put_parts(self, name: str, content: _Content, sums: bool) -> None:
        algorithm: dict[str, Any] = {"ChecksumAlgorithm": "CRC32C"} if sums else {}
        upload = self._ask("create_multipart_upload", name, **algorithm)["UploadId"]

        def send(start: int) -> dict[str, Any]:
            data = content.part(start)
            known: dict[str, Any] = {"PartNumber": 1 + content.starts.index(start), **_sum(data, sums)}
            return {**known, "ETag": self._ask("upload_part", name, UploadId=upload, Body=data, **known)["ETag"]}

        pool = ThreadPoolExecutor(THREADS, "upload")
        try:
            parts = list(pool.map(send, content.starts))
            # Absent: an earlier attempt succeeded but its answer was lost. The comparison afterwards tells.
            with suppress(AbsentError):
                self._ask("complete_multipart_upload", name, UploadId=upload, MultipartUpload={"Parts": parts})
        except BaseException:
            pool.shutdown(cancel_futures=True)  # a part that arrives later would outlive the upload
            with suppress(StoreError):
                self._ask("abort_multipart_upload", name, attempts=3, UploadId=upload)
            raise
        pool.shutdown()

    def _compare(self, name: str, content: _Content) -> None:
        """What the server holds against the source: by size, and by checksum, by ETag, or by reading it back."""
        there, where = self._ask("head_object", name, ChecksumMode="ENABLED"), f"{self.url}/{name}"
        if there["ContentLength"] != content.size:
            size = f"{there['ContentLength']} of {content.size} bytes"
            raise StoreError(f"{where}: the server holds {size}; put it again")
        if there.get("ChecksumCRC32C") and there["ChecksumCRC32C"] == content.checksum():
            return
        if there["ETag"].strip('"') == content.etag():
            return
        for start in content.starts:
            part = content.part(start)
            if self.range(name, start, len(part)) != part:
                raise StoreError(f"{where}: the server holds other bytes than were sent; put it again")

    def list(self, prefix: str = "") -> list[str]:
        """Sorted names that begin with `prefix`, however many pages they take."""
        skip = len(self._key(""))
        found: builtins.list[str] = []
        more: dict[str, Any] = {}
        while True:
            page = self._ask("list_objects_v2", prefix, **more)
            found += [item["Key"][skip:] for item in page.get("Contents", ())]
            if not page.get("IsTruncated"):
                return sorted(found)
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def exists(self, name: str) -> bool:
        """Whether the object is there."""
        try:
            self._ask("head_object", name)
        except AbsentError:
            return False
        return True

    def remove(self, name: str) -> None:
        """Delete the object, if it is there."""
        with suppress(AbsentError):
            self._ask("delete_object", name)

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def server_time(self, name: str) -> float:
        """Seconds since 1970 by the server's clock, from the reply to a request for an object's first byte.

        Whole seconds, so half a second is added.

        Raises:
            StoreError: no answer, or no such object.
        """
        headers = self._ask("get_object", name, Range="bytes=0-0")["ResponseMetadata"]["HTTPHeaders"]
        return parsedate_to_datetime(headers["date"]).timestamp() + 0.5

    def _ask(self, operation: str, name: str, *, attempts: int = ATTEMPTS, **given: Any) -> dict[str, Any]:
        """The reply to a request, its body read; asked again, after growing pauses, while the failure may pass."""
        client, pauses = _connection().client, _pauses(attempts)
        given["Prefix" if operation == "list_objects_v2" else "Key"] = self._key(name)
        while True:
            try:
                return _read(getattr(client, operation)(Bucket=self.bucket, **given))
            except ERRORS as error:
                failure = understand(error, client.meta.endpoint_url, _anonymous())
            pause = next(pauses, None) if failure.passes else None
            if pause is None:
                kind = AbsentError if failure.absent else StoreError
                tries = f" ({attempts} attempts)" if failure.passes else ""
                raise kind(f"{self.url}/{name}: {failure.reason}{tries}; {failure.advice}")
            with _counting:
                self.retries[failure.reason] += 1
            # Only what lasts is worth a line on the console.
            level = logging.WARNING if pause > LONGEST_PAUSE / 10 else logging.INFO
            log.log(level, "%s/%s: %s; asking again in %.1f s", self.url, name, failure.reason, pause)
            time.sleep(pause)


def _pauses(attempts: int) -> Iterator[float]:
    """Seconds before each further attempt; drawn, so that many clients of one server do not come back together."""
    for number in range(attempts - 1):
        yield min(FIRST_PAUSE * 2**number, LONGEST_PAUSE) * SystemRandom().uniform(0.5, 1)


def _read(reply: dict[str, Any]) -> dict[str, Any]:
    """A reply with its body as bytes; FlexibleChecksumError when they are not those of its checksum."""
    if "Body" in reply:
        reply["Body"] = reply["Body"].read()
        # boto3 compares other checksums itself, but crc32c only where one more library is installed.
        told = reply.get("ChecksumCRC32C", "")
        if told and "-" not in told and told != _base64(_crc32c(reply["Body"])):
            raise FlexibleChecksumError(error_msg=told)
    return reply


class _Object(io.RawIOBase):
    """An object as an unbuffered file: each read is a request for a range."""

    def __init__(self, store: S3Store, name: str, size: int) -> None:
        self._store, self._name, self._size, self._position = store, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self._size - self._position))
        buffer[:length] = self._store.range(self._name, self._position, length)
        self._position += length
        return length


@dataclass(frozen=True)
class _Content:
    """Bytes to be stored, in parts, and their digests as S3 forms them."""

    source: bytes | Path
    size: int

    @property
    def starts(self) -> range:
        """Where the parts begin; there is at least one."""
        return range(0, max(self.size, 1), max(PART, -(-self.size // PARTS)))

    def part(self, start: int) -> bytes:
        """The bytes of a part."""
        if isinstance(self.source, bytes):
            return self.source[start : start + self.starts.step]
        with self.source.open("rb") as file:
            file.seek(start)
            return file.read(self.starts.step)

    def checksum(self) -> str:
        """What ChecksumCRC32C says of the object."""
        digest, count = self._digest(_crc32c)
        return _base64(digest) + count

    def etag(self) -> str:
        """What ETag says of the object where it is not encrypted."""
        digest, count = self._digest(lambda data: hashlib.md5(data, usedforsecurity=False).digest())
        return digest.hex() + count

    def _digest(self, digest: Callable[[bytes], bytes]) -> tuple[bytes, str]:
        """Of the bytes; where there are several parts, of their digests, and "-" with their number."""
        with ThreadPoolExecutor(THREADS) as pool:
            parts = list(pool.map(lambda start: digest(self.part(start)), self.starts))
        return (parts[0], "") if len(parts) == 1 else (digest(b"".join(parts)), f"-{len(parts)}")


def _crc32c(data: bytes) -> bytes:
    return struct.pack(">I", crc32c.crc32c(data))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _sum(data: bytes, wanted: bool) -> dict[str, Any]:
    """The parameter that makes the server compare the bytes that it gets."""
    return {"ChecksumCRC32C": _base64(_crc32c(data))} if wanted else {}


class _Connection(NamedTuple):
    session: Any
    client: Any


def _connection() -> _Connection:
    """The boto3 session and client of this process (a forked child makes its own), as the environment says now."""
    settings = sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))
    return _connect(os.getpid(), tuple(settings))


@lru_cache(maxsize=4)
def _connect(_process: int, settings: tuple[tuple[str, str], ...]) -> _Connection:
    library, said = logging.getLogger("botocore"), dict(settings)
    if library.level == logging.NOTSET:
        library.setLevel(logging.INFO)  # its DEBUG lines hold session tokens
    config = Config(
        retries={"total_max_attempts": 1},  # `_ask` tries again itself, for bodies too, and counts
        connect_timeout=CONNECT_TIMEOUT,
        read_timeout=READ_TIMEOUT,
        max_pool_connections=32,
        signature_version=UNSIGNED if _anonymous() else None,
    )
    try:
        session = boto3.session.Session(region_name=said.get("AWS_REGION") or said.get("AWS_DEFAULT_REGION"))
        return _Connection(session, session.client("s3", region_name=session.region_name or "us-east-1", config=config))
    except (BotoCoreError, ValueError) as error:
        raise StoreError(f"S3: {line(error)}; check AWS_PROFILE, AWS_ENDPOINT_URL and AWS_REGION") from None


def _anonymous() -> bool:
    return os.environ.get("AWS_NO_SIGN_REQUEST", "").upper() in ("YES", "TRUE", "1")


def session() -> Any:
    """The boto3 session whose credentials this module uses, for GDAL to use too."""
    return _connection().session


def gdal_options(path: str) -> dict[str, str]:
    """GDAL's options to read a remote file: patience as here, and for s3:// the endpoint that this module uses."""
    options = {
        "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",  # no listing of the folder around a file before it is opened
        "GDAL_HTTP_MAX_RETRY": "4",
        "GDAL_HTTP_RETRY_DELAY": str(FIRST_PAUSE),
        "GDAL_HTTP_CONNECTTIMEOUT": str(CONNECT_TIMEOUT),
        "GDAL_HTTP_LOW_SPEED_TIME": str(READ_TIMEOUT),
        "GDAL_HTTP_LOW_SPEED_LIMIT": "1",
        # What a cut connection left half read must not be there when the file is opened again.
        "CPL_VSIL_CURL_NON_CACHED": "/vsis3/:/vsicurl/",
    }
    if path.startswith("s3://"):
        options["CPL_DEBUG"] = "OFF"  # it prints a server's refusals, and they repeat the session token
        at = urlsplit(_connection().client.meta.endpoint_url)
        if not re.fullmatch(r"s3[.-]([\w-]+\.)?amazonaws\.com(\.cn)?", at.netloc):  # which GDAL finds by itself
            https = "YES" if at.scheme == "https" else "NO"
            options |= {"AWS_S3_ENDPOINT": at.netloc, "AWS_HTTPS": https, "AWS_VIRTUAL_HOSTING": "FALSE"}
    return options
