"""Object storage on a bad day: a real S3 server behind a proxy that spoils requests, or killed and restarted."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import rasterio

from shards import s3
from shards.build import build
from shards.grid import Window
from shards.manifest import select
from shards.raster import open_raster
from shards.scene import Asset, SceneError
from shards.store import AbsentError, StoreError, open_store
from shards.stream import Share, Stream
from shards.verify import verify
from tests.scenes import make_archive, shards_config, write_catalog, write_scene
from tests.services import root
from tests.services.faults import KINDS, faults
from tests.services.s3 import Swift, shared

pytestmark = pytest.mark.s3
PART = 5 << 20  # the least that S3 takes
# What the client says of each fault.
REASONS = {
    "500": "500", "503": "503", "slow": "no answer in time", "cut-request": "connection cut",
    "cut-answer": "connection cut",
}  # fmt: skip


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Less patience than anyone should have, so that the tests take seconds."""
    monkeypatch.setattr(s3, "PART", PART)
    monkeypatch.setattr(s3, "READ_TIMEOUT", 1)
    monkeypatch.setattr(s3, "FIRST_PAUSE", 0.05)
    s3._connect.cache_clear()
    yield
    s3._connect.cache_clear()


def content(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


def stored(url: str) -> dict[str, bytes]:
    """All objects under an address, read by boto3 past any proxy."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    objects = boto3.resource("s3", endpoint_url=shared().endpoint).Bucket(bucket).objects.filter(Prefix=f"{prefix}/")
    return {item.key.removeprefix(f"{prefix}/"): item.get()["Body"].read() for item in objects}


def uploads(client: Any, bucket: str) -> list[str]:
    """Keys of multipart uploads that are neither complete nor given up."""
    return [upload["Key"] for upload in client.list_multipart_uploads(Bucket=bucket).get("Uploads", ())]


@pytest.mark.parametrize("kind", KINDS)
def test_every_request_survives_every_fault(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hasty: None, kind: str
) -> None:
    large, small = content(2 * PART + 1000), content(1000)
    (tmp_path / "large").write_bytes(large)
    with faults(shared().endpoint, rate=0.3, kinds=[kind], seed=1, delay=1.3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        store = open_store(s3_url)
        store.put("large", tmp_path / "large")
        store.put("folder/small", small)
        assert store.list() == ["folder/small", "large"]
        assert store.exists("large") and not store.exists("absent")
        assert store.get("large") == large
        assert store.range("large", PART - 10, 1000) == large[PART - 10 : PART + 990]
        assert 0 < proxy.counts()[kind] <= store.retries[REASONS[kind]]
    assert stored(s3_url) == {"folder/small": small, "large": large}


def scenes_on_s3(url: str, root: Path) -> None:
    """An archive whose catalog is here and whose scenes are at `url`."""
    rows = make_archive(root)
    for row in rows:
        open_store(url).put(row["href"], root / row["href"])
        (root / row["href"]).unlink()
    write_catalog(root, [row | {"href": f"{url}/{row['href']}"} for row in rows])


def test_a_build_from_s3_to_s3_with_5_percent_faults_gives_the_bytes_of_a_local_build(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hasty: None
) -> None:
    make_archive(tmp_path / "local")
    scenes_on_s3(f"{s3_url}/scenes", tmp_path / "remote")
    build(shards_config(tmp_path / "local", tmp_path / "data", "samples_per_shard=3"))
    with faults(shared().endpoint, rate=0.05, seed=5, delay=1.3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        tally = build(shards_config(tmp_path / "remote", f"{s3_url}/data", "samples_per_shard=3"))
        assert tally.retries.total() > 0 and set(tally.retries) <= set(REASONS.values())
        assert any(name == "retries" and " x " in said for name, said in tally.table())
        assert verify(f"{s3_url}/data") == []
        stream = Stream(select(f"{s3_url}/data"), 0, 4, Share(1))
        assert len(list(stream.once())) == 27
        assert proxy.faults() >= 5
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    assert stored(f"{s3_url}/data") == wanted


FORMATS: dict[str, dict[str, Any]] = {
    "deflate": {"driver": "GTiff", "compress": "deflate", "tiled": True, "blockxsize": 128, "blockysize": 128},
    "plain": {"driver": "GTiff"},
    "jp2": {"driver": "JP2OpenJPEG", "reversible": "yes", "quality": 100, "blockxsize": 128, "blockysize": 128},
}


@pytest.mark.parametrize("form", FORMATS)
def test_gdal_reads_scenes_through_faults(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hasty: None, form: str
) -> None:
    values = np.random.default_rng(0).integers(0, 10000, (2, 512, 512)).astype(np.uint16)
    shape = {"count": 2, "height": 512, "width": 512, "dtype": "uint16"}
    where = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 500000, 0, -10, 5300000)}
    with rasterio.open(tmp_path / "scene", "w", **FORMATS[form], **shape, **where) as raster:
        raster.write(values)
    open_store(s3_url).put("scene", tmp_path / "scene")
    # Without `slow` and the numbers, which GDAL waits out by itself: half an answer is what it takes for an answer.
    with faults(shared().endpoint, rate=0.2, kinds=["cut-answer", "cut-request", "503"], seed=5) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with open_raster(Asset(f"{s3_url}/scene")) as opened:
            for row in range(0, 512, 64):
                got = opened.read([1, 2], Window(row, 0, 64, 512))
                np.testing.assert_array_equal(got, values[:, row : row + 64])
                assert opened.mask([1, 2], Window(row, 0, 64, 512)).all()
        assert proxy.counts()["cut-answer"] > 0


def test_an_absent_scene_is_named_and_one_that_may_not_be_read_stops_the_build(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hasty: None
) -> None:
    open_store(s3_url).put("scene.tif", write_scene(tmp_path / "scene.tif", "s1"))
    with pytest.raises(SceneError, match=r"none\.tif: not found"), open_raster(Asset(f"{s3_url}/none.tif")):
        pass
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreError, match="access denied"), open_raster(Asset(f"{s3_url}/scene.tif")):
        pass


def _client(server: Swift) -> Any:
    key = server.environment()
    secret = key["AWS_SECRET_ACCESS_KEY"]
    options = {"aws_access_key_id": key["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": secret}
    return boto3.client("s3", endpoint_url=server.endpoint, region_name=key["AWS_REGION"], **options)


@pytest.fixture(scope="module")
def own_server() -> Iterator[Swift]:
    """A server that a test may kill, with an empty bucket `bucket`."""
    # Not ports that the system deals out: a client's own connection may take one while the server is down.
    first = 19000 + os.getpid() % 1000 * 4
    server = Swift(root() / f"s3-{os.getpid()}", (first, first + 1, first + 2, first + 3))
    try:
        server.start()
        _client(server).create_bucket(Bucket="bucket")
        yield server
    finally:
        server.kill()
        shutil.rmtree(server.folder)


@pytest.fixture
def own_client(own_server: Swift, monkeypatch: pytest.MonkeyPatch, hasty: None) -> Any:
    """boto3 at that server, where the environment leads then too."""
    for name, value in own_server.environment().items():
        monkeypatch.setenv(name, value)
    return _client(own_server)


def test_a_server_killed_in_mid_upload_and_restarted(
    own_server: Swift, own_client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "FIRST_PAUSE", 0.3)  # a busy machine takes a while to start a server
    data, read, starting = content(8 * PART), s3._Content.part, []
    (tmp_path / "shard.tar").write_bytes(data)

    def part(self: s3._Content, start: int) -> bytes:
        if start == 4 * PART and not starting:
            own_server.kill()
            with pytest.raises(OSError):  # refused, or reset by a worker that is dying
                urllib.request.urlopen(own_server.endpoint, timeout=5)
            starting.append(threading.Thread(target=own_server.start))
            starting[0].start()
        return read(self, start)

    monkeypatch.setattr(s3._Content, "part", part)
    store = open_store("s3://bucket/killed")
    store.put("shard.tar", tmp_path / "shard.tar")
    starting[0].join()
    assert own_client.get_object(Bucket="bucket", Key="killed/shard.tar")["Body"].read() == data
    assert store.retries["connection refused"] + store.retries["connection cut"] > 0
    assert uploads(own_client, "bucket") == []


def test_more_keys_than_a_page_holds(own_server: Swift, own_client: Any) -> None:
    names = [f"{number:04d}" for number in range(1010)]
    own_server.enter("bucket", [f"many/{name}" for name in names])
    assert own_client.list_objects_v2(Bucket="bucket", Prefix="many/")["IsTruncated"]
    assert open_store("s3://bucket/many").list() == names
    assert open_store("s3://bucket/many").list("100") == names[1000:1010]


def test_an_upload_that_fails_leaves_nothing_and_the_old_object(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hasty: None
) -> None:
    store, read = open_store(s3_url), s3._Content.part
    store.put("shard.tar", b"old")
    (tmp_path / "shard.tar").write_bytes(content(4 * PART))
    for failure in (OSError("disk"), KeyboardInterrupt()):

        def part(self: s3._Content, start: int, failure: BaseException = failure) -> bytes:
            if start == 3 * PART:
                raise failure
            return read(self, start)

        monkeypatch.setattr(s3._Content, "part", part)
        with pytest.raises(type(failure)):
            store.put("shard.tar", tmp_path / "shard.tar")
        assert stored(s3_url) == {"shard.tar": b"old"}
        assert uploads(boto3.client("s3"), s3_url.split("/")[2]) == []


def test_an_uploader_killed_in_mid_upload_leaves_nothing_visible(s3_url: str, tmp_path: Path) -> None:
    (tmp_path / "shard.tar").write_bytes(content(64 << 20))
    code = "import sys; from pathlib import Path; from shards.store import open_store\n"
    code += "open_store(sys.argv[1]).put('shard.tar', Path(sys.argv[2]))"
    client, bucket = boto3.client("s3"), s3_url.split("/")[2]
    with subprocess.Popen([sys.executable, "-c", code, s3_url, tmp_path / "shard.tar"]) as uploader:
        while not uploads(client, bucket):
            assert uploader.poll() is None
        uploader.kill()
    assert stored(s3_url) == {}
    open_store(s3_url).put("shard.tar", tmp_path / "shard.tar")
    assert stored(s3_url) == {"shard.tar": (tmp_path / "shard.tar").read_bytes()}


def test_without_checksums_the_stored_object_is_still_compared(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hasty: None
) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    (tmp_path / "large").write_bytes(content(2 * PART))
    open_store(s3_url).put("large", tmp_path / "large")
    open_store(s3_url).put("small", b"abc")
    assert stored(s3_url) == {"large": content(2 * PART), "small": b"abc"}


def test_an_object_is_read_as_a_file_in_pieces(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, asked, original = content(4321), [], s3.S3Store.range
    open_store(s3_url).put("object", data)
    open_store(tmp_path).put("object", data)
    monkeypatch.setattr(s3, "PART", 1000)
    monkeypatch.setattr(s3.S3Store, "range", lambda *given: asked.append(given[2:]) or original(*given))
    for store in (open_store(s3_url), open_store(tmp_path)):
        with store.reading("object") as file:
            assert file.seek(-321, io.SEEK_END) == 4000 and file.read() == data[4000:] and file.read() == b""
            assert file.seek(10) == 10 and file.read(5) == data[10:15] and file.tell() == 15
            assert file.seek(7, io.SEEK_CUR) == 22 and file.read(2000) == data[22:2022]
        with pytest.raises(AbsentError), store.reading("absent"):
            pass
    assert max(length for _, length in asked) <= 3000


def test_ranges_past_the_end_are_told(s3_url: str) -> None:
    store = open_store(s3_url)
    store.put("object", bytes(100))
    with pytest.raises(StoreError, match="10 of the 20 bytes from 90; the object is truncated"):
        store.range("object", 90, 20)
    with pytest.raises(StoreError, match="the object ends before these bytes"):
        store.range("object", 100, 1)
    assert store.range("object", 100, 0) == b""
    assert store.retries.total() == 0
