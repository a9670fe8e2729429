"""How a store is reached, what is said when it is not, and that no secret is ever said."""

from __future__ import annotations

import io
import json
import logging
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import botocore.auth
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import ClientError

from shards import s3
from shards.build import build
from shards.manifest import ManifestError, select
from shards.raster import open_raster
from shards.s3_errors import understand
from shards.scene import Asset
from shards.store import StoreError, open_store
from shards.stream import Share, Stream
from shards.verify import verify
from tests.scenes import make_archive, shards_config, write_catalog, write_scene
from tests.services.faults import faults
from tests.services.s3 import shared

ROOT = Path(__file__).resolve().parents[1]
NOWHERE = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "a-secret-of-nobody",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/nonexistent",
    "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
}


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An environment of which nothing is this user's, and little patience."""
    for name, value in NOWHERE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3, "READ_TIMEOUT", 1)
    monkeypatch.setattr(s3, "FIRST_PAUSE", 0.001)
    s3._connect.cache_clear()
    yield monkeypatch
    s3._connect.cache_clear()


def refusal(url: str = "s3://bucket") -> str:
    """What a store says when it is asked for an object in vain: one line."""
    with pytest.raises(StoreError) as caught:
        open_store(url).get("object")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@contextmanager
def file_server(module: str, folder: Path) -> Iterator[str]:
    """The address of a server of a folder's files, which cares for no signature."""
    where = ["--bind", "127.0.0.1", "--directory", str(folder), "0"] if module == "http.server" else [str(folder)]
    command = [sys.executable, "-u", "-m", module, *where]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT) as server:
        try:
            assert server.stdout is not None
            words = server.stdout.readline().split()
            port = words[words.index("port") + 1] if "port" in words else words[0]
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()


@pytest.mark.s3
def test_a_wrong_secret_a_wrong_key_and_a_wrong_clock(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    open_store(s3_url).put("object", b"abc")
    now = botocore.auth.get_current_datetime
    with monkeypatch.context() as patch:
        patch.setattr(botocore.auth, "get_current_datetime", lambda *given: now(*given) - timedelta(hours=1))
        assert "access denied (403 RequestTimeTooSkewed); this machine's clock" in refusal(s3_url)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with pytest.raises(StoreError, match="access denied"):  # and not that it is no dataset
        select(s3_url)
    assert "access denied (403 SignatureDoesNotMatch); the secret is not the key's" in refusal(s3_url)
    with pytest.raises(StoreError, match=r"access denied \(403\); check AWS_ACCESS_KEY_ID.* clock.* owner"):
        open_store(s3_url).exists("object")  # HEAD is answered without a reason
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "stranger")
    assert "access denied" in refusal(s3_url)


@pytest.mark.s3
def test_a_missing_bucket_is_told_by_every_call(s3_url: str, tmp_path: Path) -> None:
    store = open_store("s3://no-such-bucket/prefix")
    (tmp_path / "large").write_bytes(bytes(s3.PART + 1))
    calls: list[Callable[[], object]] = [
        lambda: store.get("a"), lambda: store.range("a", 0, 1), lambda: store.list(), lambda: store.put("a", b"abc"),
        lambda: store.put("a", tmp_path / "large"), lambda: select("s3://no-such-bucket/prefix"),
        lambda: build(shards_config(archive(tmp_path), "s3://no-such-bucket/data")),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises((StoreError, ManifestError), match="not found.*NoSuchBucket.*check the bucket"):
            call()


def archive(folder: Path) -> Path:
    make_archive(folder / "archive", places=1)
    return folder / "archive"


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "InvalidAccessKeyId", "the endpoint does not know the key; check AWS_ACCESS_KEY_ID"),
        (403, "AccessDenied", "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE"),
        (400, "ExpiredToken", "the session token has expired; log in again"),
        (301, "PermanentRedirect", "the bucket is in another region; check AWS_REGION"),
        (409, "Unheard", "409 Unheard: of; check AWS_ENDPOINT_URL"),
    ],
)
def test_answers_that_only_other_servers_give(status: int, code: str, said: str) -> None:
    answer = {"Error": {"Code": code, "Message": "of"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    failure = understand(ClientError(answer, "GetObject"), "https://somewhere", anonymous=False)
    assert said in f"{failure.reason}; {failure.advice}"
    assert not failure.passes and not failure.absent
    assert ("AWS_NO_SIGN_REQUEST" in understand(ClientError(answer, "GetObject"), "", True).advice) == (status == 403)


def test_a_dead_server_is_named_without_what_stands_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "READ_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:hunter2@127.0.0.1:{port}")
        said = refusal()
        assert "no answer in time (8 attempts)" in said and f"http://127.0.0.1:{port} is" in said
    said = refusal()
    assert "connection refused (8 attempts)" in said and f"http://127.0.0.1:{port} is" in said
    assert "hunter2" not in said


def test_settings_that_lead_nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    assert "Invalid endpoint: 127.0.0.1:9000; check" in refusal()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert "Invalid bucket name" in refusal("s3://no such bucket")
    monkeypatch.setenv("AWS_PROFILE", "unknown")
    assert "profile (unknown) could not be found; check AWS_PROFILE" in refusal()
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "no credentials found; set AWS_ACCESS_KEY_ID" in refusal()
    with pytest.raises(StoreError, match="write s3://BUCKET/PREFIX"):
        open_store("s3://")


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN"])
def test_a_credential_with_a_line_break_is_not_quoted(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv(name, "a-secret-thing\nnext line")
    assert "a credential holds a line break" in refusal() and "a-secret-thing" not in refusal()


@pytest.mark.s3
def test_a_profile_gives_credentials_endpoint_and_region_to_boto3_and_gdal(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_store(s3_url).put("scene.tif", write_scene(tmp_path / "scene.tif", "s1"))
    known = shared().environment()
    for name in known:
        monkeypatch.delenv(name)
    (tmp_path / "config").write_text(
        f"[profile tests]\nregion = {known['AWS_REGION']}\nendpoint_url = {known['AWS_ENDPOINT_URL']}\n"
        f"aws_access_key_id = {known['AWS_ACCESS_KEY_ID']}\naws_secret_access_key = {known['AWS_SECRET_ACCESS_KEY']}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "tests")
    assert open_store(s3_url).get("scene.tif") == (tmp_path / "scene.tif").read_bytes()
    with open_raster(Asset(f"{s3_url}/scene.tif")) as raster:
        assert raster.names == ("VV", "VH")


def test_public_buckets_are_read_without_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = write_scene(tmp_path / "bucket/scene.tif", "s1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "YES")
    with file_server("tests.http_server", tmp_path) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        assert open_store("s3://bucket").get("scene.tif") == scene.read_bytes()
        assert open_store("s3://bucket").range("scene.tif", 10, 20) == scene.read_bytes()[10:30]
        with open_raster(Asset("s3://bucket/scene.tif")) as raster:
            assert raster.names == ("VV", "VH")


def test_a_server_that_knows_no_ranges_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket/object").write_bytes(bytes(100))
    with file_server("http.server", tmp_path) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(StoreError, match="asked for bytes=10-19, but the server sent other bytes"):
            open_store("s3://bucket").range("object", 10, 10)


class Liar:
    """A client of a server that holds something else than it was given, and says so or not."""

    def __init__(self, held: bytes, **said: Any) -> None:
        self.held, self.said, self.asked = held, {"ETag": '"encrypted"', **said}, []
        self.meta = s3._connection().client.meta

    def put_object(self, **_: Any) -> dict[str, Any]:
        return {}

    def head_object(self, **_: Any) -> dict[str, Any]:
        return {"ContentLength": len(self.held), **self.said}

    def get_object(self, **given: Any) -> dict[str, Any]:
        self.asked.append(given["Key"])
        return {"Body": io.BytesIO(self.held), "ContentRange": "bytes 0-", **self.said}


@pytest.mark.parametrize(
    ("held", "said", "complaint", "reads"),
    [
        (b"abcd", {}, "holds 4 of 3 bytes", 0),
        (b"abd", {}, "holds other bytes than were sent", 1),
        (b"abc", {}, None, 1),
        (b"abc", {"ETag": '"900150983cd24fb0d6963f7d28e17f72"'}, None, 0),
        (b"abc", {"ChecksumCRC32C": "Nks/tw=="}, None, 0),
    ],
)
def test_what_is_stored_is_compared(
    held: bytes, said: dict[str, str], complaint: str | None, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    liar = Liar(held, **said)
    monkeypatch.setattr(s3, "_connection", lambda: s3._Connection(None, liar))
    if complaint:
        with pytest.raises(StoreError, match=complaint):
            open_store("s3://bucket").put("object", b"abc")
    else:
        open_store("s3://bucket").put("object", b"abc")
    assert len(liar.asked) == reads


def test_bytes_that_are_not_those_of_their_checksum_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    liar = Liar(b"abd", ChecksumCRC32C="Nks/tw==")
    monkeypatch.setattr(s3, "_connection", lambda: s3._Connection(None, liar))
    store = open_store("s3://bucket")
    with pytest.raises(StoreError, match=r"damaged on the way \(8 attempts\)"):
        store.get("object")
    assert store.retries == {"damaged on the way": 7}
    liar.held = b"abc"
    assert store.get("object") == b"abc"


def everything_in(store: Any) -> Iterator[str]:
    """All objects as text, Parquet taken apart."""
    for name in store.list():
        data = store.get(name)
        yield data.decode("latin-1")
        if name.endswith(".parquet"):
            table = pq.read_table(io.BytesIO(data))
            yield str((table.schema.metadata, table.to_pylist()))


@pytest.mark.s3
def test_no_secret_is_ever_said(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    secret, token = shared().environment()["AWS_SECRET_ACCESS_KEY"], "a-session-token-nobody-may-see"
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("AWS_SESSION_TOKEN", token)
    monkeypatch.setenv("CPL_DEBUG", "ON")
    said: list[str] = []
    rows = make_archive(tmp_path / "archive", places=1)
    with faults(shared().endpoint, rate=0.1, kinds=["500", "cut-answer"], seed=1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        store = open_store(s3_url)
        for row in rows:
            store.put(row["href"], tmp_path / "archive" / row["href"])
        write_catalog(tmp_path / "archive", [row | {"href": f"{s3_url}/{row['href']}"} for row in rows])
        build(shards_config(tmp_path / "archive", f"{s3_url}/data"))
        said += verify(f"{s3_url}/data")
        stream = Stream(select(f"{s3_url}/data"), 0, 4, Share(1))
        said += [repr(sample.meta) for sample, _ in stream.once()] + [json.dumps(stream.ledger)]
        said += [repr(store), repr(vars(store)), pickle.dumps(store).decode("latin-1"), repr(s3._connection)]
        said += everything_in(store)
        assert proxy.faults() > 0
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    said += failures(s3_url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", shared().endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "stranger")
    said += failures(s3_url)
    assert any("shards.s3" in record.name for record in caplog.records)
    assert any("botocore" in record.name for record in caplog.records)
    said += [caplog.text, *capfd.readouterr()]
    for text in said:
        assert not any(
            word in text for one in (secret, token) for word in (one, one.encode().hex(" "), one.encode().hex())
        )


def failures(url: str) -> Iterator[str]:
    """What is said, in all forms, when nothing can be done at an address."""
    store = open_store(url)
    for call in (lambda: store.get("object"), lambda: store.list(), lambda: store.put("a", b"a"), lambda: select(url),
                 lambda: open_raster(Asset(f"{url}/place0/s1.tif")).__enter__()):  # fmt: skip
        with pytest.raises((StoreError, ManifestError)) as caught:
            call()
        yield from (str(caught.value), repr(caught.value), str(caught.getrepr(showlocals=False, chain=True)))


def test_a_file_where_a_folder_must_be_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file/name: not written: (Not a directory|File exists)"):
        open_store(tmp_path / "file").put("name", b"data")
