"""The samples of the benchmarks of reading, as datasets of ours, and our stream over them.

S2 (13 x uint16) and S1 (2 x float32) of the made-up archive, 256 x 256, with their validity, in tars of 64. A few dozen
tiles differ; further samples are copies of them under other keys.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa

import configs
from shards.build import build
from shards.contract import Contract
from shards.manifest import Selection, select, write_manifest
from shards.order import LANES
from shards.reading import Reading
from shards.sample import Buffer, Encoding, Sample
from shards.store import open_store
from shards.stream import Share, Stream
from shards.synthetic import make_archive
from shards.write import finish_shard, read_record, write_shard

COUNT, PER_SHARD, SIZE = 256, 64, 256
SEED = 0


def what(samples: int, encoding: str) -> str:
    """The samples, for the title of a table."""
    return f"{samples} samples of 13 x uint16 + 2 x float32, {SIZE} x {SIZE}, {encoding}"


def tiles(places: int = 3) -> tuple[list[Sample], Contract]:
    """Different tiles, built by the project's own code, and what they mean."""
    with TemporaryDirectory() as folder:
        make_archive(Path(folder) / "archive", places=places, size=3 * SIZE)
        raw = {"stage": "shards", "archive": {"root": f"{folder}/archive"}, "out": f"{folder}/data"}
        build(configs.parse({**raw, "sensors": ["s2-l1c", "s1"], "tile": {"size": SIZE, "min_valid": 0.5}}))
        selection = select(f"{folder}/data")
        return [sample for sample, _ in Stream(selection, SEED, 1, Share(1)).once()], selection.contract


def write_dataset(
    folder: Path,
    made: tuple[list[Sample], Contract],
    encoding: Encoding,
    count: int = COUNT,
    per_shard: int = PER_SHARD,
) -> Selection:
    """`count` samples as a dataset of ours in `folder`."""
    samples, contract = made
    folder.mkdir(parents=True)
    store, tables, shards = open_store(folder), [], {}
    for first in range(0, count, per_shard):
        numbers, name = range(first, min(first + per_shard, count)), f"shard-{first // per_shard:06d}"
        named = (replace(samples[number % len(samples)], key=f"sample-{number:06d}") for number in numbers)
        record = write_shard(named, store, name, encoding)
        finish_shard(record, store, "benchmark", contract.sensors)
        shards[name] = {"bytes": record.bytes, "sha256": record.sha256}
        tables.append(read_record(store, name)[2].replace_schema_metadata(None))
    facts = {"format_version": 1, "contract": contract.to_json(), "fingerprint": encoding, "shards": shards}
    write_manifest(store, pa.concat_tables(tables), facts)
    return select(str(folder))


def members(folder: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and encoded members of every sample in the tars of a folder."""
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for key, group in groupby(tar, lambda member: member.name.split(".")[0]):
                yield key, {member.name: tar.extractfile(member).read() for member in group}  # type: ignore[union-attr]


def stream(selection: Selection, threads: int) -> Stream:
    """Ours at the beginning of an epoch; it keeps its memory from round to round, as it does in a run."""
    return Stream(selection, SEED, LANES, Share(1), reading=Reading(threads=threads))


def ours(made: Stream) -> Iterator[Sample]:
    """An epoch of our stream in its own order, decoded and verified."""
    return (sample for sample, _ in islice(iter(made), len(made.selection)))


def ours_in_manifest_order(made: Stream) -> Iterator[Sample]:
    """An epoch of our stream in the order of the manifest, decoded and verified."""
    return (sample for sample, _ in made.once())


def ours_undecoded(made: Stream) -> Iterator[Mapping[str, Buffer]]:
    """An epoch of our stream in its own order, verified."""
    return (parts for parts, _ in islice(made.members(), len(made.selection)))


def weigh(items: Iterable[Mapping[str, Buffer]]) -> int:
    """Bytes of the members of undecoded samples."""
    return sum(len(data) for item in items for name, data in item.items() if not name.startswith("__"))


def weigh_samples(samples: Iterable[Sample]) -> int:
    """Bytes of the arrays of decoded samples."""
    return sum(tile.values.nbytes + tile.valid.nbytes for sample in samples for tile in sample.tiles.values())


def same_work(functions: Mapping[str, Callable[[], int]], wanted: int) -> dict[str, Callable[[], object]]:
    """The functions, which fail if what they have read does not weigh what it should."""

    def check(name: str, function: Callable[[], int]) -> None:
        if (found := function()) != wanted:
            raise RuntimeError(f"{name}: {found} bytes read, not {wanted}: not the same work")

    return {name: partial(check, name, function) for name, function in functions.items()}
