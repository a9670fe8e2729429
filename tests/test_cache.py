"""The cache of a node: what it keeps and evicts, and what becomes of it when processes die and disks fill."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shards import cache as module
from shards.cache import Cache
from shards.store import StoreError
from tests.cached_node import SIZE, Node, content, read, until

PIECE = 30_000  # bytes, so that a tar is several


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    monkeypatch.setattr(module, "PIECE", PIECE)
    monkeypatch.setattr(module, "TOUCH", 0.0)
    monkeypatch.setattr(module, "PAUSE", 0.0)
    made = Node(tmp_path)
    made.fill()
    yield made
    made.store.gate.set()
    for cache in made.caches:
        cache.close()


def test_hits_and_misses_are_counted_and_the_rest_is_the_stores(node: Node) -> None:
    cache = node.cache()
    for letter in "abaab":
        read(cache, letter)
    assert cache.counters == {"hits": 3, "misses": 2, "bytes_fetched": 2 * SIZE, "evicted": 0, "bypassed": 0}
    assert sorted(start for name, start, _ in node.store.asked if name == "sub/a.tar") == [0, 30_000, 60_000, 90_000]
    assert cache.url == node.store.url and cache.retries is node.store.retries
    assert cache.list("sub/a") == ["sub/a.tar"] and cache.exists("sub/b.tar") and not cache.exists("c")
    assert cache.get("sub/h.tar") == content("sub/h.tar")
    assert node.hidden() == []


def test_what_was_used_longest_ago_is_evicted(node: Node) -> None:
    cache = node.cache(tars=3)
    for letter in "abcabd":
        read(cache, letter)
        time.sleep(0.02)  # the clock of files is coarse
    assert node.cached() == ["a", "b", "d"] and cache.counters["evicted"] == 1
    read(node.cache(tars=3, identity="another"), "h")  # the limit is that of all datasets together
    assert node.cached() == ["b", "d", "h"]


def test_datasets_share_no_files(node: Node) -> None:
    first, second = node.cache(identity="../one"), node.cache(identity="two")
    read(first, "a")
    read(second, "a")
    assert second.counters["misses"] == 1 and node.cached() == ["a", "a"]


def test_a_tar_over_the_limit_is_read_straight(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    cache = node.cache(tars=0.9)
    read(cache, "a")
    read(cache, "b")
    assert cache.counters["bypassed"] == 2 and node.cached() == []
    assert [name for name, _, _ in node.store.asked] == ["sub/a.tar", "sub/b.tar"]
    assert caplog.text.count("without the cache") == 1 and "cache_limit is 90000" in caplog.text


def test_a_tar_of_unknown_size_is_read_straight(node: Node) -> None:
    cache = node.cache()
    node.store.put("other.tar", b"0123456789")
    assert cache.range("other.tar", 2, 3) == b"234"
    assert cache.counters["bypassed"] == 1


@pytest.mark.parametrize("when", ["posix_fallocate", "write", "free"])
def test_a_full_disk_is_read_past(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = node.cache()
    read(cache, "a")
    with monkeypatch.context() as patch:
        if when == "free":
            usage = module.shutil.disk_usage(node.path)._replace(free=SIZE - 1)
            patch.setattr(module.shutil, "disk_usage", lambda _: usage)
            read(cache, "b")  # in the place of a
            assert node.cached() == ["b"]
            patch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=-SIZE - 1))
        elif when == "write":
            patch.setattr(Cache, "_download_piece", full)
        else:
            patch.setattr(module.os, "posix_fallocate", full)
        read(cache, "c")
        assert cache.counters["bypassed"] == 1 and "without the cache" in caplog.text
    assert "c" not in node.cached() and node.hidden() == []
    read(cache, "c")
    assert "c" in node.cached()


def test_after_a_failure_the_cache_is_left_alone_for_a_while(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE", 1000.0)
    cache = node.cache()
    read(cache, "a")
    monkeypatch.setattr(Cache, "_reserve", lambda *_: False)
    read(cache, "b")
    monkeypatch.undo()
    read(cache, "b")
    assert cache.counters["bypassed"] == 2 and cache.counters["bytes_fetched"] == SIZE
    read(cache, "a")
    assert cache.counters["hits"] == 1


def test_a_folder_that_cannot_be_written_is_refused(node: Node) -> None:
    (node.path / "cache").write_text("a file")
    with pytest.raises(StoreError, match=r"cache: cannot be a cache: .*cache_dir="):
        node.cache()


@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, SIZE // 2), Path.unlink])
def test_a_truncated_or_removed_tar_is_fetched_again(node: Node, damage: Callable[[Path], None]) -> None:
    cache = node.cache()
    read(cache, "a")
    damage(next((node.path / "cache").rglob("a.tar")))
    read(cache, "a")
    assert cache.counters["misses"] == 2 and cache.counters["bytes_fetched"] == 2 * SIZE


def test_a_forgotten_tar_is_fetched_again(node: Node) -> None:
    cache = node.cache()
    read(cache, "a")
    next((node.path / "cache").rglob("a.tar")).write_bytes(bytes(SIZE))
    assert cache.range("sub/a.tar", 0, 10) == bytes(10)
    cache.forget("sub/a.tar")
    cache.forget("sub/b.tar")
    read(cache, "a")


def test_a_tar_that_others_evict_at_once_is_read_straight(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = node.cache()
    fetch = Cache._fetch

    def fetch_and_lose(self: Cache, name: str) -> str:
        reason = fetch(self, name)
        self.forget(name)
        return reason

    monkeypatch.setattr(Cache, "_fetch", fetch_and_lose)
    read(cache, "a")
    assert cache.counters["bypassed"] == 1 and cache.counters["bytes_fetched"] == module.ATTEMPTS * SIZE


@pytest.mark.parametrize("name", ["../a.tar", "sub/../../a.tar", "/etc/passwd", ""])
def test_a_name_that_leaves_the_folder_is_refused(node: Node, name: str) -> None:
    cache = node.cache(**{name: 10})
    with pytest.raises(StoreError, match=r"without '\.\.'"):
        cache.range(name, 0, 1)
    with pytest.raises(StoreError, match=r"without '\.\.'"):
        cache.forget(name)


def test_the_stores_failure_reaches_the_reader(node: Node) -> None:
    cache = node.cache()
    node.store.failing = True
    with pytest.raises(StoreError, match=r"^sub/a\.tar: out of order"):
        read(cache, "a")
    assert node.cached() == node.hidden() == [] and cache.counters["bypassed"] == 0
    node.store.failing = False
    read(cache, "a")


def test_an_object_shorter_than_promised_is_never_cached(node: Node) -> None:
    cache = node.cache()
    node.store.put("sub/a.tar", content("sub/a.tar")[:-1])
    with pytest.raises(StoreError, match="truncated"):
        cache.range("sub/a.tar", 0, 10)
    assert node.cached() == node.hidden() == []


def test_threads_that_ask_for_one_tar_download_it_once(node: Node) -> None:
    cache = node.cache()
    node.store.gate.clear()
    threads = [threading.Thread(target=read, args=(cache, "a")) for _ in range(8)]
    for thread in threads:
        thread.start()
    until(lambda: len(node.store.asked) == 4)
    node.store.gate.set()
    for thread in threads:
        thread.join()
    assert cache.counters["bytes_fetched"] == SIZE and len(node.store.asked) == 4
    assert cache.counters["hits"] + cache.counters["misses"] == 8 and node.hidden() == []


def test_ahead_fills_in_order_and_stops_at_the_limit(node: Node) -> None:
    cache = node.cache(tars=3.5)
    for letter in "gh":
        read(cache, letter)
    node.store.asked.clear()
    cache.ahead([f"sub/{letter}.tar" for letter in "cdabef"])
    until(lambda: node.cached() == ["a", "c", "d"])
    read(cache, "e")  # no room for it: the others come sooner, or as soon
    first = {name: place for place, (name, _, _) in reversed(list(enumerate(node.store.asked)))}
    assert sorted(first, key=lambda name: first[name]) == [f"sub/{letter}.tar" for letter in "cdae"]
    assert node.cached() == ["a", "c", "d"] and cache.counters["bypassed"] == 1
    for letter in "cda":
        read(cache, letter)
    assert cache.counters["hits"] == 3
    cache.ahead(["sub/a.tar", "sub/h.tar", "sub/b.tar"])  # c and d are done with
    until(lambda: node.cached() == ["a", "b", "h"])


def test_ahead_leaves_what_other_processes_read_next(node: Node) -> None:
    first, second = node.cache(tars=4.5), node.cache(tars=4.5)
    first.ahead(["sub/a.tar", "sub/b.tar"])
    until(lambda: node.cached() == ["a", "b"])
    second.ahead([f"sub/{letter}.tar" for letter in "cdefgh"])
    until(lambda: node.cached() == ["a", "b", "c", "d"])
    read(second, "e")
    assert node.cached() == ["a", "b", "c", "d"] and second.counters["bypassed"] == 1
    first.close()  # its list goes with it
    read(second, "e")
    until(lambda: len(node.cached()) == 4)  # what is downloaded ahead may take its place only now
    assert {"c", "d", "e"} < set(node.cached())


def test_ahead_takes_no_more_than_its_share(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch, done = Cache._fetch, []

    def noted(self: Cache, name: str, ahead: bool) -> str:
        done.append((name, bool(reason := fetch(self, name, ahead))))
        return reason

    monkeypatch.setattr(Cache, "_fetch", noted)
    first, second = node.cache(tars=4.5), node.cache(tars=4.5)
    first.ahead(["sub/a.tar"])
    until(lambda: len(done) == 1)
    second.ahead([f"sub/{letter}.tar" for letter in "cdefgh"])
    until(lambda: len(done) == 4)
    assert done == [("sub/a.tar", False), ("sub/c.tar", False), ("sub/d.tar", False), ("sub/e.tar", True)]


def test_a_new_list_replaces_the_old_one(node: Node) -> None:
    cache = node.cache()
    node.store.gate.clear()
    cache.ahead(node.names)
    until(lambda: len(node.store.asked) == 4)
    cache.ahead(["sub/h.tar"])
    node.store.gate.set()
    until(lambda: "h" in node.cached())
    assert node.cached() == ["a", "h"]


def test_ahead_goes_on_after_a_tar_that_fails_or_never_fits(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    cache = node.cache(**{"absent.tar": SIZE, "huge.tar": 1000 * SIZE})
    cache.ahead(["absent.tar", "huge.tar", "unknown.tar", "sub/a.tar"])
    until(lambda: node.cached() == ["a"])
    assert "not cached ahead: " in caplog.text and "absent.tar" in caplog.text


def test_close_gives_up_what_is_under_way(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "THREADS", 2)
    cache = node.cache()
    node.store.gate.clear()
    cache.ahead(node.names)
    until(lambda: len(node.store.asked) == 2)
    threading.Thread(target=lambda: cache._closed.wait() and node.store.gate.set()).start()
    cache.close()
    until(lambda: node.hidden() == [])
    assert node.cached() == [] and len(node.store.asked) == 2
    with pytest.raises(StoreError, match="closed"):
        read(cache, "b")
    read(node.cache(), "a")


def test_close_does_not_wait_for_a_request_that_hangs(node: Node) -> None:
    cache = node.cache()
    node.store.gate.clear()
    cache.ahead(node.names)
    until(lambda: len(node.store.asked) == 4)
    cache.close()
    assert not node.store.gate.is_set() and node.cached() == []


# Locks


def test_a_tar_appears_while_nobody_counts(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, replace = node.cache(), os.replace

    def watched(source: str, target: Path) -> None:
        assert not module._left_over(cache.root / ".lock")
        replace(source, target)

    monkeypatch.setattr(module.os, "replace", watched)
    read(cache, "a")
    assert node.cached() == ["a"]


def test_a_lock_removes_no_file_but_its_own(tmp_path: Path) -> None:
    with module._locked(tmp_path / "mine") as file:
        file.write(b"mine")
        os.replace(tmp_path / "mine", tmp_path / "renamed")
        (tmp_path / "mine").write_bytes(b"another's")
    assert (tmp_path / "mine").read_bytes() == b"another's" and (tmp_path / "renamed").read_bytes() == b"mine"


# Other processes


def read_at_random(path: Path, tars: float, seed: int, totals: Any) -> None:
    module.PIECE = PIECE
    node, draw = Node(path), random.Random(seed)
    cache = node.cache(tars)
    for _ in range(150):
        name, start = draw.choice(node.names), draw.randrange(SIZE - 100)
        assert cache.range(name, start, 100) == content(name)[start : start + 100]
        with cache._alone():  # or files come and go while they are counted
            assert len(node.cached()) <= tars
    totals.put(cache.counters)


@contextmanager
def processes(work: Callable[..., None], *arguments: tuple[Any, ...]) -> Iterator[list[Any]]:
    started = [multiprocessing.get_context("spawn").Process(target=work, args=given) for given in arguments]
    for process in started:
        process.start()
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.join()


@pytest.mark.parametrize("tars", [8, 3.5])
def test_four_processes_read_at_random(node: Node, tars: float) -> None:
    totals = multiprocessing.get_context("spawn").Queue()
    with processes(read_at_random, *((node.path, tars, seed, totals) for seed in range(4))):
        counters = [totals.get(timeout=120) for _ in range(4)]
    fetched = sum(counter["bytes_fetched"] for counter in counters)
    evicted = sum(counter["evicted"] for counter in counters)
    assert sum(counter["hits"] + counter["misses"] + counter["bypassed"] for counter in counters) == 600
    assert fetched == (len(node.cached()) + evicted) * SIZE
    if tars == 8:
        assert fetched == 8 * SIZE and evicted == 0
    assert node.hidden() == []


def download_for_ever(path: Path) -> None:
    module.PIECE = PIECE
    other = Node(path)
    super_range = other.store.range

    def range_or_hang(name: str, start: int, length: int) -> bytes:
        if start >= 2 * PIECE:
            other.store.gate.clear()
        return super_range(name, start, length)

    other.store.range = range_or_hang  # type: ignore[method-assign]
    cache = other.cache()
    cache.ahead(["sub/b.tar"])
    cache.range("sub/a.tar", 0, 1)


def test_others_go_on_after_kill_9_of_who_downloads(node: Node) -> None:
    with processes(download_for_ever, (node.path,)) as (process,):
        until(lambda: len(node.hidden()) == 3 and len([p for p in node.hidden() if p.stat().st_size == SIZE]) == 2)
        reader = threading.Thread(target=read, args=(node.cache(tars=1.5), "a"))
        reader.start()
        reader.join(0.1)
        assert reader.is_alive() and node.cached() == []  # waits for the other
        process.kill()
        process.join()
        reader.join()
    assert node.cached() == ["a"] and node.hidden() == []  # b.part and its list went, to make room for a
