"""Object storage: uploads and ranged reads against boto3's own ways, on the S3 server of the tests.

It needs that server, which runs beside it on the same cores (`make services`), so it runs only by name:
`python -m benchmarks uploading`. Each side has its own checks on: boto3 sends CRC32, we send CRC32C and ask afterwards
what the server holds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import boto3
import numpy as np
from boto3.s3.transfer import TransferConfig

from benchmarks.timing import compare
from shards import s3
from shards.store import open_store
from tests.services.s3 import shared

SIZE, RANGES, RANGE = 128 << 20, 64, 1 << 20


def run() -> None:
    """One table for each of the two."""
    if not shared().available():
        sys.exit("uploading needs the S3 server of the tests: make services")
    os.environ.update(shared().environment())
    client = boto3.client("s3")
    with TemporaryDirectory() as folder, _bucket(client) as bucket:
        _compare_uploads(client, bucket, Path(folder) / "shard.tar")
        _compare_ranges(client, bucket)


@contextmanager
def _bucket(client: Any) -> Iterator[str]:
    name = f"benchmark-{os.getpid()}"
    client.create_bucket(Bucket=name)
    try:
        yield name
    finally:
        bucket = boto3.resource("s3").Bucket(name)
        bucket.objects.all().delete()
        bucket.delete()


def _compare_uploads(client: Any, bucket: str, path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(SIZE))
    same = TransferConfig(multipart_threshold=s3.PART, multipart_chunksize=s3.PART, max_concurrency=s3.THREADS)
    compare(
        f"Upload of {SIZE >> 20} MiB",
        {
            "boto3 upload_file, as it comes": lambda: client.upload_file(str(path), bucket, "boto3"),
            "boto3 upload_file, our parts and threads": lambda: client.upload_file(
                str(path), bucket, "boto3", Config=same
            ),
            "Store.put, compared with what is stored": lambda: open_store(f"s3://{bucket}").put("ours", path),
        },
    )


def _compare_ranges(client: Any, bucket: str) -> None:
    store = open_store(f"s3://{bucket}")
    starts = np.random.default_rng(1).integers(0, SIZE - RANGE, RANGES).tolist()

    def chunks() -> int:
        count = 0
        for start in starts:
            reply = client.get_object(Bucket=bucket, Key="ours", Range=f"bytes={start}-{start + RANGE - 1}")
            count += sum(len(chunk) for chunk in reply["Body"].iter_chunks(RANGE))
        return count

    compare(
        f"{RANGES} ranged reads of {RANGE >> 20} MiB, one after the other",
        {
            "boto3 get_object, iter_chunks": chunks,
            "Store.range": lambda: sum(len(store.range("ours", start, RANGE)) for start in starts),
        },
    )
