"""Reading from a local folder: our stream against a raw read of the same tars, a bare decode, and other loaders.

Everything is in the page cache, so the tables say what a reader costs, not how fast a disk is. Every function of a
table must have read the same number of bytes, or the benchmark fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import crc32c

from benchmarks.reading_data import (
    COUNT,
    members,
    ours,
    ours_in_manifest_order,
    ours_undecoded,
    same_work,
    stream,
    tiles,
    weigh,
    weigh_samples,
    what,
    write_dataset,
)
from benchmarks.reading_peers import (
    BATCH,
    PEERS,
    Peer,
    arrays,
    decode,
    decode_tensors,
    encoded,
    installed,
    tensors,
    undecoded,
    versions,
)
from benchmarks.timing import compare
from shards.manifest import Selection
from shards.sample import Encoding
from shards.sample import decode as decode_members
from shards.stream import Share, Stream

CHUNK = 1 << 20
ENCODINGS: tuple[Encoding, ...] = ("npy", "blosc2-zstd")
WORKERS = (0, 1, 2)
Functions = dict[str, Callable[[], int]]


def run() -> None:
    """For each encoding: undecoded, decoded in the process, and in batches with worker processes."""
    print(versions())
    made = tiles()
    for encoding in ENCODINGS:
        with TemporaryDirectory() as folder:
            selection = write_dataset(Path(folder) / "tars", made, encoding)
            _compare_undecoded(Path(folder) / "tars", selection, encoding)
            _write_peers(Path(folder))
            _compare_decoded(Path(folder), selection, encoding)
            for workers in WORKERS:
                _compare_batches(Path(folder), selection, encoding, workers)
            _compare_training(selection, encoding)


def _compare_undecoded(folder: Path, selection: Selection, encoding: Encoding) -> None:
    """Bytes of members, against the bytes of the tars."""
    tars, wanted = sorted(folder.glob("*.tar")), weigh(parts for _, parts in members(folder))
    floor = {
        "raw read of the tars, 1 MiB at a time": partial(read_raw, tars),
        "the same into one buffer": partial(_read_into, tars),
        "the same, crc32c of all bytes": partial(_read_into, tars, crc32c.crc32c),
    }
    readers: Functions = {"webdataset": lambda: weigh(undecoded(folder))}
    for threads in (1, 2):
        readers[f"ours, shuffled, verified, threads={threads}"] = partial(_ours_undecoded, stream(selection, threads))
    size = sum(tar.stat().st_size for tar in tars)
    functions = same_work(floor, size) | same_work(readers, wanted)
    compare(f"Undecoded: {what(COUNT, encoding)}", functions)


def read_raw(tars: Iterable[Path]) -> int:
    """All bytes of the files, in reads of 1 MiB."""
    count = 0
    for tar in tars:
        with tar.open("rb", buffering=0) as file:
            while data := file.read(CHUNK):
                count += len(data)
    return count


def _read_into(tars: Iterable[Path], look: Callable[[memoryview], object] | None = None) -> int:
    count, buffer = 0, memoryview(bytearray(CHUNK))
    for tar in tars:
        with tar.open("rb", buffering=0) as file:
            while size := file.readinto(buffer):
                count += size
                if look is not None:
                    look(buffer[:size])
    return count


def _write_peers(folder: Path) -> None:
    """The samples in the other loaders' formats: `NAME` with our bytes, `NAME-arrays` with arrays."""
    items = encoded(list(members(folder / "tars")))
    for peer in PEERS:
        if peer.write is not None and installed(peer.name):
            peer.write(folder / peer.name, items)
            peer.write(folder / f"{peer.name}-arrays", [arrays(decode(item)) for item in items])


def _folder(folder: Path, peer: Peer) -> Path:
    return folder / (peer.name if peer.write else "tars")


def _compare_decoded(folder: Path, selection: Selection, encoding: Encoding) -> None:
    """Samples in this process, against decoding alone."""
    held = [parts for _, parts in members(folder / "tars")]
    functions: Functions = {f"bare decode from memory, threads={n}": partial(_bare, held, n) for n in (1, 2)}
    for peer in PEERS:
        if installed(peer.name):
            functions[f"{peer.name}, our bytes and decoder"] = partial(
                lambda dataset: weigh_samples(dataset), peer.open(_folder(folder, peer), decode)
            )
            if peer.write is not None and encoding == "npy":
                dataset = peer.open(folder / f"{peer.name}-arrays", _identity)
                functions[f"{peer.name}, its own arrays"] = partial(_weigh_arrays, dataset)
    for threads in (1, 2):
        made = stream(selection, threads)
        functions |= {
            f"ours, shuffled, threads={threads}": partial(_ours, made),
            f"ours, in manifest order, threads={threads}": partial(_ours_in_manifest_order, made),
        }
    compare(f"Decoded: {what(COUNT, encoding)}", same_work(functions, _bare(held, 1)))
    _say_missing()


def _bare(held: list[dict[str, bytes]], threads: int) -> int:
    if threads == 1:
        return weigh_samples(decode_members(parts) for parts in held)
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(lambda parts: weigh_samples([decode_members(parts)]), held))


def _identity(item: dict[str, object]) -> dict[str, object]:
    return item


def _weigh_arrays(items: Iterable[dict[str, object]]) -> int:
    """Bytes of the arrays or tensors of items or batches."""
    return sum(value.nbytes for item in items for value in item.values() if hasattr(value, "nbytes"))


def _ours_undecoded(made: Stream) -> int:
    return weigh(ours_undecoded(made))


def _ours(made: Stream) -> int:
    return weigh_samples(ours(made))


def _ours_in_manifest_order(made: Stream) -> int:
    return weigh_samples(ours_in_manifest_order(made))


def _compare_batches(folder: Path, selection: Selection, encoding: Encoding, workers: int) -> None:
    """Stacked tensors, with as many workers of a DataLoader, or threads of ours; workers stay between rounds."""
    functions: Functions = {}
    for peer in PEERS:
        if installed(peer.name):
            loader = peer.load(peer.open(_folder(folder, peer), decode_tensors), workers)
            functions[f"{peer.name}, workers={workers}"] = partial(_weigh_arrays, loader)
    functions[f"ours, threads={max(workers, 1)}"] = partial(_batches, stream(selection, max(workers, 1)))
    if workers:
        functions[f"ours in a DataLoader, workers={workers}"] = partial(_weigh_arrays, _loader(selection, workers))
    title = f"Batches of {BATCH} tensors, {workers} workers: {what(COUNT, encoding)}"
    compare(title, same_work(functions, _ours(stream(selection, 1))))
    _say_missing()


def _compare_training(selection: Selection, encoding: Encoding) -> None:
    """What a rank trains on, normalised, turned and stacked as float32, against samples that are only decoded."""
    from pipeline.augment import Augmentation
    from pipeline.dataset import training_batches

    contract = selection.contract.normalised("statistics")

    def train(made: Stream, turn: bool) -> int:
        how = Augmentation(0, "all" if turn else "none")
        batches = training_batches(made, BATCH, contract, how, made.reader.reading.threads)
        return sum(len(batch) for batch in islice(batches, len(selection) // BATCH))

    decoded = {f"decoded, threads={n}": partial(_ours, stream(selection, n)) for n in (1, 2)}
    functions: Functions = {
        f"batches{', turned' if turn else ''}, threads={n}": partial(train, stream(selection, n), turn)
        for n in (1, 2)
        for turn in (False, True)
    }
    what_it_is = f"Batches of {BATCH} for training: {what(COUNT, encoding)}"
    compare(what_it_is, same_work(decoded, _ours(stream(selection, 1))) | same_work(functions, COUNT))


def _batches(made: Stream) -> int:
    from torch.utils.data import default_collate

    items = (tensors(sample) for sample in ours(made))
    return _weigh_arrays(default_collate(group) for group in iter(lambda: list(islice(items, BATCH)), []))


def _loader(selection: Selection, workers: int) -> Iterable[dict[str, object]]:
    """An epoch of our stream as `pipeline.dataset.StreamDataset` shares it among workers, but not normalised."""
    from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

    class Batches(IterableDataset):  # type: ignore[type-arg]
        """This worker's batches of one epoch."""

        def __iter__(self) -> Iterator[dict[str, object]]:
            info = get_worker_info()
            share = Share(BATCH, micro_batch=BATCH, workers=info.num_workers, worker=info.id)
            own = stream(selection, 1).shared(deepcopy(selection), share)
            items = (tensors(sample) for sample, _ in own)
            for _ in range(len(selection) // BATCH // info.num_workers):
                yield default_collate(list(islice(items, BATCH)))

    return DataLoader(Batches(), batch_size=None, num_workers=workers, persistent_workers=True)


def _say_missing() -> None:
    for peer in PEERS:
        if not installed(peer.name):
            print(f"  {peer.name:<44} not installed")
