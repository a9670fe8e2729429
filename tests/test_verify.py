"""What `mcf shards verify` finds, one fault at a time, and that its memory does not grow with a dataset."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards import verify as module
from shards.merge import merge_statistics
from shards.sample import encode
from shards.store import StoreError, open_store
from shards.verify import verify
from shards.write import finish_shard, read_record, write_shard
from tests.small_dataset import CONTRACT, make_sample

Rows = list[dict[str, Any]]


def make_dataset(folder: Path, shards: int, each: int, size: int = 16) -> Path:
    """A sound dataset as the merge writes it, its manifest in row groups of three."""
    store, tables, facts, statistics = open_store(folder), [], {}, {}
    for index in range(shards):
        samples = (make_sample(index * each + number, size) for number in range(each))
        record = write_shard(samples, store, f"shard-{index:06d}", "blosc2-zstd")
        finish_shard(record, store, "plan", CONTRACT.sensors)
        tables.append(read_record(store, record.name)[2].replace_schema_metadata(None))
        facts[record.name] = {"sha256": record.sha256, "bytes": record.bytes}
        statistics = merge_statistics(statistics, record.statistics)
    pq.write_table(pa.concat_tables(tables), folder / "manifest.parquet", row_group_size=3)
    known = {
        "format_version": 1, "contract": CONTRACT.to_json(), "samples": shards * each, "shards": facts,
        "statistics": {name: values.to_json() for name, values in statistics.items()},
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(known))
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("sound"), shards=2, each=4)


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "data"))


def change_facts(folder: Path, change: Callable[[Any], object]) -> None:
    facts = json.loads((folder / "dataset.json").read_text())
    change(facts)
    (folder / "dataset.json").write_text(json.dumps(facts))


def change_rows(folder: Path, change: Callable[[Rows], object]) -> None:
    table = pq.read_table(folder / "manifest.parquet")
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), folder / "manifest.parquet")


def change_tar(folder: Path, change: Callable[[list[tuple[str, bytes]]], object]) -> None:
    """Rewrites the first tar and its hash, so that only its content is at fault."""
    path = folder / "shard-000000.tar"
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    change(members)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    change_facts(folder, lambda facts: facts["shards"]["shard-000000"].update(sha256=digest))


def test_a_sound_dataset_is_sound(sound: Path) -> None:
    assert verify(str(sound)) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda rows: rows[5].update(checksum=1), ["shard-000001.tar: sample-005: checksum differs"]),
        (
            lambda rows: rows[1]["valid"].update(s1=0.5),
            ["shard-000000.tar: sample-001: s1: valid fraction 0.8594, manifest says 0.5000"],
        ),
        (
            lambda rows: rows[6].update(key="other"),
            ["shard-000001.tar: other: holds key sample-006"],
        ),
        (
            lambda rows: rows[6]["members"][2].update(bytes=7),
            ["shard-000001.tar: sample-006: members differ from the manifest; what follows was not compared"],
        ),
        (
            lambda rows: rows.pop(),
            [
                "manifest.parquet: 7 rows, 8 promised",
                "shard-000001.tar: holds members that are not in the manifest",
            ],
        ),
        (
            lambda rows: rows.__delitem__(slice(4, 8)),
            ["manifest.parquet: 4 rows, 8 promised", "shard-000001.tar: in dataset.json, but not in manifest.parquet"],
        ),
        (
            lambda rows: rows.append(rows[0]),
            [
                "manifest.parquet: 9 rows, 8 promised",
                "manifest.parquet: 1 keys occur twice, such as sample-000",
                "shard-000000.tar: not in dataset.json, or not all of its rows in manifest.parquet stand together",
            ],
        ),
    ],
)
def test_rows_that_are_not_what_the_tars_hold(folder: Path, change: Callable[[Rows], object], found: list[str]) -> None:
    change_rows(folder, change)
    assert verify(str(folder)) == found


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda facts: facts["shards"].pop("shard-000001"), "shard-000001.tar: not in dataset.json"),
        (lambda facts: facts["shards"]["shard-000001"].update(sha256="0"), "shard-000001.tar: sha256 differs from"),
        (lambda facts: facts["contract"]["modalities"][0].update(bands=["VV"]), "s1: 2 bands, contract says 1"),
        (lambda facts: facts["statistics"]["dem"]["mean"].__setitem__(0, 3.0), "dataset.json: statistics of dem are"),
        (lambda facts: facts["statistics"].update(s2=facts["statistics"]["s1"]), "dataset.json: statistics of s2 are"),
    ],
)
def test_facts_that_are_not_those_of_the_samples(folder: Path, change: Callable[[Any], object], found: str) -> None:
    change_facts(folder, change)
    assert any(found in line for line in verify(str(folder)))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda members: members.pop(), "sample-003: members differ from the manifest"),
        (lambda members: members.append(("more.txt", b"more")), "holds members that are not in the manifest"),
        (lambda members: members.reverse(), "sample-000: members differ from the manifest"),
        (lambda members: members.__setitem__(0, (members[0][0], bytes(len(members[0][1])))), "checksum differs"),
    ],
)
def test_tars_that_hold_something_else(folder: Path, change: Callable[[Any], object], found: str) -> None:
    change_tar(folder, change)
    assert any(found in line and line.startswith("shard-000000.tar: ") for line in verify(str(folder)))


def test_samples_that_cannot_be_decoded_are_named_and_the_next_are_looked_at(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written so, with the right hashes: garbage for an array."""
    monkeypatch.setattr(
        "shards.write.encode", lambda sample, _: {**encode(sample, "npy"), f"{sample.key}.s1.npy": b"-"}
    )
    store = open_store(folder)
    record = write_shard(map(make_sample, range(4)), store, "shard-000000", "npy")
    change_facts(folder, lambda facts: facts["shards"]["shard-000000"].update(sha256=record.sha256))
    change_rows(folder, lambda rows: [row.update(new) for row, new in zip(rows, record.rows, strict=False)])
    found = verify(str(folder))
    assert [line.split(": ")[1] for line in found] == ["sample-000", "sample-001", "sample-002", "sample-003"]


def test_a_damaged_manifest_is_named(folder: Path) -> None:
    (folder / "manifest.parquet").write_bytes((folder / "manifest.parquet").read_bytes()[:-50])
    with pytest.raises(StoreError, match=r"manifest\.parquet: damaged, merge the build again"):
        verify(str(folder))


def test_memory_does_not_grow_with_tars_nor_with_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 1 << 15)
    monkeypatch.setattr(module, "BATCH", 4)
    peaks = []
    for name, shards, each in (("few", 1, 8), ("more", 2, 64)):
        data = make_dataset(tmp_path / name, shards, each, size=64)
        tracemalloc.start()
        assert verify(str(data)) == []
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (tmp_path / "more/shard-000000.tar").stat().st_size > peaks[1]
    assert peaks[1] < 1.3 * peaks[0]
