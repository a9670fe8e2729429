"""Store: named byte objects in a folder or under an s3:// prefix; the only place that talks to object storage.

S3 takes its endpoint, region, profile and credentials from the usual environment: AWS_ENDPOINT_URL, AWS_REGION,
AWS_PROFILE, AWS_ACCESS_KEY_ID and so on; AWS_NO_SIGN_REQUEST=YES reads public buckets without credentials.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from urllib.parse import urlsplit

ATTEMPTS = 8  # per request; back-off doubles between them
PART = 16 << 20  # bytes of one part of a multipart upload


class StoreError(OSError):
    """A store could not do what was asked; the message names the object, the cause and what to check."""


class Store(Protocol):
    """Objects by name. A name is a relative path with forward slashes; objects appear whole or not at all."""

    url: str

    def get(self, name: str) -> bytes:
        """The whole object."""

    def range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`; StoreError when the object is shorter."""

    def put(self, name: str, source: bytes | Path) -> None:
        """Store bytes or a file's content, replacing what was there."""

    def list(self, prefix: str = "") -> list[str]:
        """Sorted names that begin with `prefix`."""

    def exists(self, name: str) -> bool:
        """Whether the object is there."""


def open_store(url: str | Path) -> Store:
    """The store at a folder or s3://bucket/prefix. Nothing is created or asked before the first call."""
    text = str(url)
    if text.startswith("s3://"):
        return S3Store(text)
    if "://" in text:
        raise StoreError(f"{text}: only folders and s3:// addresses can be opened")
    return FolderStore(Path(text))


class FolderStore:
    """Objects as files under one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def _path(self, name: str) -> Path:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not name:
            raise StoreError(f"{name!r}: an object's name is a relative path without '..'")
        return self.root / name

    def get(self, name: str) -> bytes:
        """The whole object."""
        with self._opened(name) as file:
            return bytes(file.read())

    def range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`."""
        with self._opened(name) as file:
            file.seek(start)
            return _whole(bytes(file.read(length)), f"{self.url}/{name}", start, length)

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        try:
            with self._path(name).open("rb") as file:
                yield file
        except OSError as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"{self.url}/{name}: {error.strerror or error}") from error

    def put(self, name: str, source: bytes | Path) -> None:
        """Write beside the target, flush to disk, rename."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                if isinstance(source, bytes):
                    file.write(source)
                else:
                    with source.open("rb") as content:
                        shutil.copyfileobj(content, file, PART)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StoreError(f"{self.url}/{name}: not written: {error.strerror or error}") from error

    def list(self, prefix: str = "") -> list[str]:
        """Sorted names that begin with `prefix`, unfinished files left out."""
        files = (path for path in self.root.rglob("*") if path.is_file() and not path.name.endswith(".tmp"))
        return sorted(name for path in files if (name := path.relative_to(self.root).as_posix()).startswith(prefix))

    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        return self._path(name).is_file()


class S3Store:
    """Objects under one bucket and prefix of an S3 service, through boto3 with its retries and checksums."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        self.bucket, self.prefix = parts.netloc, parts.path.strip("/")
        if not self.bucket:
            raise StoreError(f"{url!r}: write s3://BUCKET/PREFIX")
        self._made: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Clients do not travel to other processes; they are made again there."""
        return {**self.__dict__, "_made": None}

    @property
    def client(self) -> Any:
        """The boto3 client of this process (a forked child makes its own)."""
        if self._made is None or self._made[0] != os.getpid():
            self._made = (os.getpid(), _client())
        return self._made[1]

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except ClientError as error:
            raise StoreError(f"{self.url}/{name}: {_explain(error)}") from None
        except (BotoCoreError, Boto3Error) as error:
            raise StoreError(f"{self.url}/{name}: {error} (after up to {ATTEMPTS} attempts)") from None

    def get(self, name: str) -> bytes:
        """The whole object."""
        with self._errors(name):
            return bytes(self.client.get_object(Bucket=self.bucket, Key=self._key(name))["Body"].read())

    def range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`."""
        with self._errors(name):
            asked = f"bytes={start}-{start + length - 1}"
            reply = self.client.get_object(Bucket=self.bucket, Key=self._key(name), Range=asked)
            return _whole(bytes(reply["Body"].read()), f"{self.url}/{name}", start, length)

    def put(self, name: str, source: bytes | Path) -> None:
        """One put, or a multipart upload of a file; S3 shows the object only when all of it has arrived."""
        from boto3.s3.transfer import TransferConfig

        with self._errors(name):
            if isinstance(source, bytes):
                self.client.put_object(Bucket=self.bucket, Key=self._key(name), Body=source)
            else:
                parts = TransferConfig(multipart_threshold=PART, multipart_chunksize=PART)
                self.client.upload_file(str(source), self.bucket, self._key(name), Config=parts)

    def list(self, prefix: str = "") -> list[str]:
        """Sorted names that begin with `prefix`, however many pages they take."""
        skip = len(self._key(""))
        with self._errors(prefix):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._key(prefix))
            return sorted(item["Key"][skip:] for page in pages for item in page.get("Contents", ()))

    def exists(self, name: str) -> bool:
        """Whether the object is there."""
        from botocore.exceptions import ClientError

        with self._errors(name):
            try:
                self.client.head_object(Bucket=self.bucket, Key=self._key(name))
            except ClientError as error:
                if error.response["Error"]["Code"] in ("404", "NoSuchKey", "NotFound"):
                    return False
                raise
        return True


def gdal_options(path: str) -> dict[str, str]:
    """GDAL's options to read `path` through /vsis3 with the credentials and endpoint that this module uses."""
    if not path.startswith(("s3://", "/vsicurl/")):
        return {}
    # No listing of the folder around a file before it is opened, and another try after a busy server's answer.
    options = {
        "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
        "GDAL_HTTP_MAX_RETRY": str(ATTEMPTS),
        "GDAL_HTTP_RETRY_DELAY": "1",
    }
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if path.startswith("s3://") and endpoint:
        parts = urlsplit(endpoint)
        https = "YES" if parts.scheme == "https" else "NO"
        options |= {"AWS_S3_ENDPOINT": parts.netloc, "AWS_HTTPS": https, "AWS_VIRTUAL_HOSTING": "FALSE"}
    return options


def _whole(data: bytes, where: str, start: int, length: int) -> bytes:
    if len(data) != length:
        raise StoreError(f"{where}: {len(data)} of the {length} bytes from {start}; the object is truncated")
    return data


def _client() -> Any:
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    anonymous = os.environ.get("AWS_NO_SIGN_REQUEST", "").upper() in ("YES", "TRUE", "1")
    config = Config(
        retries={"max_attempts": ATTEMPTS, "mode": "standard"},
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=32,
        signature_version=UNSIGNED if anonymous else None,
    )
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return boto3.session.Session().client("s3", region_name=region, config=config)


def _explain(error: Any) -> str:
    code = error.response.get("Error", {}).get("Code", "")
    if code in ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
        return f"access denied ({code}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_PROFILE, and the policy"
    if code in ("404", "NoSuchKey", "NoSuchBucket", "NotFound"):
        return f"not found ({code}); check the bucket, the prefix and AWS_ENDPOINT_URL"
    return f"{code}: {error.response.get('Error', {}).get('Message', '')}"
