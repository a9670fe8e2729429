"""Reading from S3: our stream against boto3's own stream of the same tars and webdataset with `pipe:curl`.

The server is the Swift of the tests on the same cores, so it runs only by name: `python -m benchmarks reading_s3`. Then
all again behind a proxy on loopback that holds back every request for 50 ms.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import boto3

from benchmarks.reading_data import (
    members,
    ours,
    ours_undecoded,
    same_work,
    stream,
    tiles,
    weigh,
    weigh_samples,
    what,
    write_dataset,
)
from benchmarks.reading_peers import decode, versions
from benchmarks.timing import compare
from benchmarks.uploading import _bucket
from shards import s3
from shards.manifest import select
from shards.sample import Encoding
from shards.sample import decode as decode_members
from shards.store import open_store
from tests.services.faults import faults
from tests.services.s3 import shared

COUNT, CHUNK, LATENCY, THREADS = 128, 1 << 20, 0.05, 2
PER_SHARD = (64, 4)  # samples in a tar
ENCODINGS: tuple[Encoding, ...] = ("npy", "blosc2-zstd")


def run() -> None:
    """For each encoding and size of tars a table without and one with latency."""
    if not shared().available():
        sys.exit("reading_s3 needs the S3 server of the tests: make services")
    print(versions())
    os.environ.update(shared().environment())
    made = tiles()
    for encoding, per_shard in product(ENCODINGS, PER_SHARD):
        with TemporaryDirectory() as folder, _bucket(boto3.client("s3")) as bucket:
            local = Path(folder) / "data"
            write_dataset(local, made, encoding, COUNT, per_shard)
            for path in local.iterdir():
                open_store(f"s3://{bucket}/data").put(path.name, path)
            for latency in (0.0, LATENCY):
                with _behind(latency):
                    _compare(bucket, local, f"{encoding}, tars of {per_shard}", latency)


@contextmanager
def _behind(latency: float) -> Iterator[None]:
    """The environment leads to the server, or to a proxy before it."""
    if not latency:
        yield
        return
    with (
        faults(shared().endpoint, rate=0, latency=latency) as proxy,
        mock.patch.dict(os.environ, AWS_ENDPOINT_URL=proxy.url),
    ):
        s3._connect.cache_clear()
        yield
    s3._connect.cache_clear()


def _compare(bucket: str, local: Path, kind: str, latency: float) -> None:
    client, selection = boto3.client("s3"), select(f"s3://{bucket}/data")
    tars = sorted(local.glob("*.tar"))
    keys = [f"data/{tar.name}" for tar in tars]
    held = [parts for _, parts in members(local)]
    undecoded: dict[str, Callable[[], int]] = {
        "webdataset, pipe:curl, undecoded": lambda: weigh(_webdataset(client, bucket, keys, dict)),
        "ours, shuffled, undecoded, verified": lambda: weigh(ours_undecoded(stream(selection, THREADS))),
    }
    decoded: dict[str, Callable[[], int]] = {
        "webdataset, pipe:curl, decoded": lambda: weigh_samples(_webdataset(client, bucket, keys, decode)),
        "ours, shuffled, decoded, verified": lambda: weigh_samples(ours(stream(selection, THREADS))),
    }
    chunks = {"boto3 get_object, iter_chunks of the tars": partial(_chunks, client, bucket, keys)}
    functions = same_work(chunks, sum(tar.stat().st_size for tar in tars))
    functions |= same_work(undecoded, weigh(held))
    functions |= same_work(decoded, weigh_samples(decode_members(parts) for parts in held))
    compare(f"S3, {latency * 1e3:.0f} ms latency: {what(COUNT, kind)}", functions)


def _chunks(client: Any, bucket: str, keys: list[str]) -> int:
    bodies = (client.get_object(Bucket=bucket, Key=key)["Body"] for key in keys)
    return sum(len(chunk) for body in bodies for chunk in body.iter_chunks(CHUNK))


def _webdataset(client: Any, bucket: str, keys: list[str], each: Callable[[Any], Any]) -> Any:
    import webdataset

    urls = [client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key}) for key in keys]
    return webdataset.WebDataset([f"pipe:curl -sf '{url}'" for url in urls], shardshuffle=False).map(each)
