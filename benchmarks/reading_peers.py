"""Other loaders over the same encoded samples, with the same decoder: webdataset, litdata and mosaicml-streaming.

webdataset reads our tars. The other two get the same bytes in their own format, a field for each member; besides, their
own arrays, which they need not decode. They are imported only where they are installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shards.sample import Sample, decode_webdataset

BATCH = 16
Members = list[tuple[str, dict[str, bytes]]]


class Peer(NamedTuple):
    """A loader: its distribution, how it is given the samples, and what it opens in a folder.

    `write` takes the folder and items, fields by name, bytes or arrays, and none where it reads our tars. `open` takes
    the folder and what to do with each item, and gives an iterable that can be read again and again. `load` makes
    batches of that with so many worker processes.
    """

    name: str
    write: Callable[[Path, list[dict[str, Any]]], None] | None
    open: Callable[[Path, Callable[[Any], Any]], Iterable[Any]]
    load: Callable[[Any, int], Iterable[Any]]


def installed(name: str) -> str:
    """The version of a distribution, or "" when it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def encoded(members: Members) -> list[dict[str, Any]]:
    """Items as webdataset would give them: `__key__`, and the bytes of each member by its extension."""
    return [{"__key__": key, **{name.split(".", 1)[1]: data for name, data in parts.items()}} for key, parts in members]


def arrays(sample: Sample) -> dict[str, Any]:
    """The arrays of a sample by name; validity as bytes, since not every format has booleans."""
    values = {name: tile.values for name, tile in sample.tiles.items()}
    return values | {f"{name}.valid": tile.valid.view(np.uint8) for name, tile in sample.tiles.items()}


def decode(item: Mapping[str, Any]) -> Sample:
    """An item of `encoded` as a sample."""
    return decode_webdataset(item)


def tensors(sample: Sample) -> dict[str, Any]:
    """The arrays of a sample as tensors, for a DataLoader to stack."""
    import torch

    return {name: torch.from_numpy(array) for name, array in arrays(sample).items()}


def decode_tensors(item: Mapping[str, Any]) -> dict[str, Any]:
    """An item of `encoded` as tensors."""
    return tensors(decode(item))


def _open_webdataset(folder: Path, each: Callable[[Any], Any]) -> Iterable[Any]:
    import webdataset

    return webdataset.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False).map(each)


def _load_webdataset(dataset: Any, workers: int) -> Iterable[Any]:
    import webdataset

    return webdataset.WebLoader(dataset, batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0)


def _write_litdata(folder: Path, items: list[dict[str, Any]]) -> None:
    from litdata.streaming.cache import Cache

    cache = Cache(str(folder), chunk_size=64)
    for number, item in enumerate(items):
        cache._add_item(number, item)
    cache.done()
    cache.merge()


def _open_litdata(folder: Path, each: Callable[[Any], Any]) -> Iterable[Any]:
    import litdata

    return litdata.StreamingDataset(str(folder), shuffle=False, transform=each)


def _load_litdata(dataset: Any, workers: int) -> Iterable[Any]:
    import litdata

    return litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0)


def _write_mosaic(folder: Path, items: list[dict[str, Any]]) -> None:
    from streaming import MDSWriter

    columns = {name: _column(value) for name, value in items[0].items()}
    with MDSWriter(out=str(folder), columns=columns, size_limit=150 << 20) as writer:
        for item in items:
            writer.write(item)


def _column(value: Any) -> str:
    """The type of a field as mosaicml-streaming writes it."""
    if isinstance(value, np.ndarray):
        return f"ndarray:{value.dtype}:{','.join(map(str, value.shape))}"
    return "str" if isinstance(value, str) else "bytes"


def _open_mosaic(folder: Path, each: Callable[[Any], Any]) -> Iterable[Any]:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()

    class Mapped(StreamingDataset):  # type: ignore[misc, unused-ignore]
        """The usual way to change what it yields."""

        def __getitem__(self, at: Any) -> Any:
            return each(super().__getitem__(at))

    return Mapped(local=str(folder), shuffle=False, batch_size=BATCH)


def _load_mosaic(dataset: Any, workers: int) -> Iterable[Any]:
    from streaming import StreamingDataLoader

    return StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0)


WEBDATASET = Peer("webdataset", None, _open_webdataset, _load_webdataset)
LITDATA = Peer("litdata", _write_litdata, _open_litdata, _load_litdata)
MOSAIC = Peer("mosaicml-streaming", _write_mosaic, _open_mosaic, _load_mosaic)
PEERS = (WEBDATASET, LITDATA, MOSAIC)


def versions() -> str:
    """What the tables were made with, in a line."""
    names = (*(peer.name for peer in PEERS), "blosc2", "numpy", "boto3")
    return ", ".join(f"{name} {installed(name) or 'not installed'}" for name in names)


def undecoded(folder: Path) -> Iterator[dict[str, Any]]:
    """Our tars as webdataset gives them without a decoder."""
    yield from _open_webdataset(folder, dict)
